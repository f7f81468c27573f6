"""The equality matrix can fail: it detects each rule that is broken on purpose."""

import pytest
from support.levels import full_unless
from support.processes import run
from support.trajectory import deviation, train

import megapromoe.distributed.collectives as collectives
from megapromoe.engine.engine import Engine


def divide_by_edp(model, mesh) -> None:
    """Expert gradients are divided by the number of ranks that sum them, instead of by dp."""
    for name, parameter in model.named_parameters():
        if model.layouts[name].expert:
            parameter.register_hook(lambda g: g * (mesh.dp.size / mesh.edp.size))


def count_every_copy(model, mesh) -> None:
    """The clip norm counts replicated parameters once for each tp rank."""
    Engine.replica_count = lambda self, name: 1


def count_rank_zero_only(model, mesh) -> None:
    """DeepSpeed's own clip norm with tp: experts count on tp rank 0 only."""
    right = Engine.replica_count

    def wrong(self, name):
        missed = self.layouts[name].expert and self.mesh.tp.rank > 0
        return float("inf") if missed else right(self, name)

    Engine.replica_count = wrong


def no_reduction_of_centroids(model, mesh) -> None:
    """The contrastive loss of each rank uses the centroids of its own tokens only."""
    import megapromoe.nn.moe.prototypes as prototypes

    prototypes.differentiable_all_reduce = lambda x, group: x


def no_gradient_through_the_sum(model, mesh) -> None:
    """Centroids are summed over ranks, but a token gets gradients from the loss of its own rank only."""
    collectives._DifferentiableAllReduce.backward = staticmethod(lambda ctx, grad: (grad, None))


def weight_gradient_stays_partial(model, mesh) -> None:
    """The routing weights of rows that other tp ranks compute get no gradient."""
    from megapromoe.nn.moe.assignment import TokenAssignment

    right = TokenAssignment.shard

    def wrong(self, region, first, number):
        part = right(self._replace(weight_R=self.weight_R.detach()), region, first, number)
        return part._replace(weight_R=self.weight_R[first : first + number])

    TokenAssignment.shard = wrong


def no_sum_between_nodes(model, mesh) -> None:
    """Each group of ranks that divides the optimizer states uses the gradients of its own samples only."""
    from megapromoe.engine.deepspeed_backend.scatter import Bucket

    Bucket.start_sum = Bucket.finish_sum = lambda self: None


def count_every_replica(model, mesh) -> None:
    """The clip norm counts each shard once for each group of ranks that has it."""
    Engine.replica_count = lambda self, name: self.layouts[name].replica_count(self.mesh)


def divide_by_shards(model, mesh) -> None:
    """Gradients are divided by the number of ranks over which DeepSpeed divides the states, instead of by dp."""
    from megapromoe.engine.deepspeed_backend.scatter import Bucket

    right = Bucket.__init__

    def wrong(self, zero, number, partition, replicas, data_ranks, device):
        right(self, zero, number, partition, replicas, data_ranks // replicas.size, device)

    Bucket.__init__ = wrong


LAYOUTS = {
    divide_by_edp: ("parallel.ep=2",),
    count_every_copy: ("parallel.tp=2", "parallel.ep=2"),
    count_rank_zero_only: ("parallel.tp=2", "parallel.ep=2"),
    no_reduction_of_centroids: (),
    no_gradient_through_the_sum: (),
    weight_gradient_stays_partial: ("parallel.tp=2", "parallel.ep=2"),
    no_sum_between_nodes: ("parallel.shard_ranks=2",),
    count_every_replica: ("parallel.shard_ranks=2",),
    divide_by_shards: ("parallel.shard_ranks=2",),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return run(1, train, (), str(tmp_path_factory.mktemp("one_process")), 2)[0]


@pytest.mark.parametrize("mutation", full_unless({0, 6}, [*LAYOUTS]), ids=lambda f: f.__name__)
def test_a_broken_rule_is_detected(mutation, one_process, tmp_path):
    ours = run(4, train, LAYOUTS[mutation], str(tmp_path), 2, mutation)[0]
    norms = max(abs(a - b) / (1e-5 * b) for a, b in zip(ours.norms, one_process.norms, strict=True))
    tensors = max(
        deviation(ours.gradients, one_process.gradients)[0], deviation(ours.parameters, one_process.parameters)[0]
    )
    assert max(norms, tensors) > 10, "no difference from one process"
