"""The equality matrix can fail: each rule, broken on purpose, is seen."""

import pytest
from support.processes import run
from support.trajectory import deviation, train

import megapromoe.distributed.collectives as collectives
from megapromoe.engine.engine import Engine


def divide_by_edp(model, mesh) -> None:
    """Expert gradients divided by the ranks they are summed over, instead of by dp."""
    for name, parameter in model.named_parameters():
        if model.layouts[name].expert:
            parameter.register_hook(lambda g: g * (mesh.dp.size / mesh.edp.size))


def count_every_copy(model, mesh) -> None:
    """A clip norm that counts replicated parameters once for each tp rank."""
    Engine.replica_count = lambda self, name: 1


def count_rank_zero_only(model, mesh) -> None:
    """DeepSpeed's own clip norm under tp: experts count on tp rank 0 alone."""
    right = Engine.replica_count

    def wrong(self, name):
        missed = self.layouts[name].expert and self.mesh.tp.rank > 0
        return float("inf") if missed else right(self, name)

    Engine.replica_count = wrong


def no_reduction_of_centroids(model, mesh) -> None:
    """Each rank contrasts prototypes with the centroids of its own tokens."""
    import megapromoe.nn.moe.prototypes as prototypes

    prototypes.sum_over = lambda x, group: x


def no_gradient_through_the_sum(model, mesh) -> None:
    """Centroids are summed over ranks, but each rank's tokens learn from its own loss alone."""
    collectives._SumOver.backward = staticmethod(lambda ctx, grad: (grad, None))


def gate_gradient_stays_partial(model, mesh) -> None:
    """The weights of rows that other tp ranks compute get no gradient."""
    import megapromoe.nn.moe.dispatcher as dispatch

    def share(self, region, tokens):
        part = SHARE(self._replace(weight_R=self.weight_R.detach()), region, tokens)
        start = tokens * region.rank // region.size
        return part._replace(weight_R=self.weight_R[start : start + part.token_R.shape[0]])

    SHARE = dispatch.Route.share
    dispatch.Route.share = share


LAYOUTS = {
    divide_by_edp: ("parallel.ep=2",),
    count_every_copy: ("parallel.tp=2", "parallel.ep=2"),
    count_rank_zero_only: ("parallel.tp=2", "parallel.ep=2"),
    no_reduction_of_centroids: (),
    no_gradient_through_the_sum: (),
    gate_gradient_stays_partial: ("parallel.tp=2", "parallel.ep=2"),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(1, train, (), str(tmp_path_factory.mktemp("alone")), 2)[0]


@pytest.mark.parametrize("mutation", LAYOUTS, ids=lambda f: f.__name__)
def test_a_broken_rule_is_seen(mutation, alone, tmp_path):
    ours = run(4, train, LAYOUTS[mutation], str(tmp_path), 2, mutation)[0]
    norms = max(abs(a - b) / (1e-5 * b) for a, b in zip(ours.norms, alone.norms, strict=True))
    tensors = max(deviation(ours.gradients, alone.gradients)[0], deviation(ours.parameters, alone.parameters)[0])
    assert max(norms, tensors) > 10, "nothing moved"
