"""Which process of pytest-xdist gets which file of tests: the last of three gets those that mostly wait."""

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

# Their tests wait for limits, launchers and daemons. One process runs them while two cores compute.
WAITING = frozenset(
    {
        "test_hangs.py",
        "test_slurm.py",
        "test_killed_jobs.py",
        "test_stopped_jobs.py",
        "test_torchrun_nodes.py",
        "test_cut_network.py",
    }
)


class WaitingFilesApart(LoadFileScheduling):
    """Gives files out in their order, those that mostly wait to the last process and the others to the others.

    Processes without a file of their kind get the others, but the last one ends: on two cores a third process that
    computes makes all slower.
    """

    def _files(self, waits: bool) -> list[str]:
        """The files of a kind that no process has yet."""
        return [file for file in self.workqueue if (file.rpartition("/")[2] in WAITING) == waits]

    def _is_last(self, node: WorkerController) -> bool:
        return node.gateway.id == f"gw{self.numnodes - 1}"

    def _assign_work_unit(self, node: WorkerController) -> None:
        if files := self._files(waits=self._is_last(node)):
            self.workqueue.move_to_end(files[0], last=False)
        super()._assign_work_unit(node)

    def _reschedule(self, node: WorkerController) -> None:
        if self._is_last(node) and not self._files(waits=True) and not node.shutting_down:
            node.shutdown()  # it runs what it has
        else:
            super()._reschedule(node)
