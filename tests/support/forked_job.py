"""A job of forked ranks whose store this process holds, as torchrun's agent does."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

from support.forked_ranks import ForkedRank
from torch.distributed import TCPStore

OF_LAUNCHERS = ("SLURM", "TORCHELASTIC", "OMPI", "PMI", "RANK", "WORLD", "LOCAL", "MASTER")


class ForkedJob:
    """`megapromoe WORDS` on so many ranks; each writes the file `output-RANK`. Used as a `subprocess.Popen`."""

    def __init__(self, ranks: int, words: list[str], folder: Path):
        self._store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        env = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port), "OMP_NUM_THREADS": "1"}
        env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self._outputs = [folder / f"output-{rank}" for rank in range(ranks)]
        self.ranks = [
            ForkedRank(words, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, output)
            for rank, output in enumerate(self._outputs)
        ]

    @property
    def returncode(self) -> int | None:
        """None while a rank runs; then the code of the first rank that failed, or 0."""
        codes = [rank.returncode for rank in self.ranks]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """What all ranks wrote, once all have ended. The first that fails ends the others, by SIGTERM."""
        end, terminated = time.monotonic() + timeout, False
        while None in (codes := [rank.returncode for rank in self.ranks]):
            assert time.monotonic() < end, f"the job did not end within {timeout} s"
            if any(codes) and not terminated:
                terminated = True
                for rank in self.ranks:
                    if rank.returncode is None:
                        rank.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        return "".join(output.read_text() for output in self._outputs), None

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
