"""Recomputed activations: every policy has the same results, and decides, communicates and updates states once."""

from collections import Counter as Tally

import pytest
import torch
from support.meshes import meshes_made_once
from support.processes import run
from support.trajectory import small, stir

from megapromoe.benchmark.counters import Counter
from megapromoe.config.options import ConfigError
from megapromoe.distributed.mesh import Mesh, make_mesh
from megapromoe.nn.parallelize import build
from megapromoe.nn.text_condition import TextCondition
from megapromoe.planning.traffic import Batch, collectives

POLICIES = ("moe", "blocks", "all")
ROUTERS = (
    ("model.router=promoe", "model.balance_weight=0.1"),
    ("model.router=promoe", "model.top_k=2", "model.qk_norm=layer"),
    ("model.router=promoe", "model.capacity_factor=1.0"),
    ("model.router=promoe_ec",),
    ("model.router=classification", "model.balance_weight=0.1", "model.balance_form=sequence"),
    ("model.router=kmeans",),
    ("model.router=gmm", "model.top_k=2"),
    ("model.router=race", "model.top_k=2"),
    ("model.router=promoe_linear", "model.balance_weight=0.1"),
    ("model.router=tc", "model.balance_weight=0.1"),
    ("model.router=ec",),
    ("model.router=diffmoe",),
    ("model.router=promoe", "model.activation=swiglu", "model.norm=rms", "model.positions=rope"),
    ("model.router=promoe", "model.modulation=shared", "model.qk_norm=rms"),
    ("model.router=dense",),
    ("model.router=conditional",),
    ("model.router=promoe", "model.router_input=unmodulated"),
)
WITHOUT_ROUTER = ("model.router=dense", "model.router=conditional")
TEXT = ("model.router=promoe", "data.source=unset", "model.condition=text", "model.num_classes=1000")
TEXT = (*TEXT, "model.text_width=6", "model.text_tokens=5", "model.text_ffn=24")
NULL = 1


def outcome(overrides: tuple[str, ...], mesh: Mesh) -> dict:
    """The results and states after a forward and a backward pass, and their collectives. Collective."""
    config = small("model.depth=2", "model.moe_every=1", *overrides)
    model = build(config, mesh).train()
    stir(model, mesh)
    B, generator = 4, torch.Generator().manual_seed(mesh.dp.rank)
    x, t = torch.randn(B, 4, 8, 8, generator=generator), 1000 * torch.rand(B, generator=generator)
    y = torch.randint(10, (B,), generator=generator)
    y[B - NULL :] = 10
    if config.model.has_text:
        features = torch.randn(B, config.model.text_tokens, config.model.text_width, generator=generator)
        y = TextCondition(features, torch.ones(features.shape[:2], dtype=torch.bool))
    with Counter() as counter:
        prediction, auxiliary = model(x, t, y, B - NULL)
        loss = prediction.square().mean() + auxiliary.total()
        counter.phase("backward")
        loss.backward()
    left = {"loss": loss.detach(), "prediction": prediction.detach(), "load": auxiliary.load_ME}
    left |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    left |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    return {"left": left, "collectives": {n: dict(c.collectives) for n, c in counter.phases.items()}}


def outcomes(cases: list[tuple[str, ...]]) -> list[dict]:
    mesh_of = meshes_made_once()
    return [outcome(overrides, mesh_of(small(*overrides))) for overrides in cases]


OPS = {"all_reduce": "allreduce_", "all_gather": "allgather_", "all_to_all": "alltoall_base_"}


def planned(overrides: tuple[str, ...], world: int) -> Tally:
    """Collectives of forward and backward, from the plan."""
    config = small("model.depth=2", "model.moe_every=1", *overrides)
    batch, calls = Batch(4, 4 - NULL), Tally()
    for c in collectives(config, config.layout(world), batch):
        if c.ours and c.phase in ("forward", "backward"):
            calls[OPS[c.op]] += c.count
    return calls


@pytest.mark.full
@pytest.mark.parametrize("world, layout", [(1, ()), (4, ("parallel.tp=2", "parallel.ep=2"))], ids=["one", "tp 2 ep 2"])
def test_every_policy_is_none_for_every_router(world, layout):
    """Results are equal to the last bit. Statistics over ranks are communicated once."""
    cases = [
        (*router, *(layout if router[0] not in WITHOUT_ROUTER else layout[:1]), f"parallel.recompute={policy}")
        for router in (*ROUTERS, TEXT)
        for policy in ("none", *POLICIES)
        if not (policy == "moe" and router[0] in WITHOUT_ROUTER)
    ]
    for rank, results in enumerate(run(world, outcomes, cases)):
        for overrides, ours in zip(cases, results, strict=True):
            if overrides[-1].endswith("none"):
                plain = ours
            for name, value in plain["left"].items():
                assert torch.equal(ours["left"][name], value), (rank, overrides, name)
            assert ours["collectives"]["forward"] == plain["collectives"]["forward"], overrides
            calls = sum((Tally(c) for c in ours["collectives"].values()), Tally())
            assert calls == planned(overrides, world), overrides


@pytest.mark.parametrize("router", [router for router in ROUTERS if router[0] not in WITHOUT_ROUTER], ids=" ".join)
def test_a_second_pass_routes_as_the_first(router, monkeypatch):
    """Even if rounding would choose other experts: in this test the second pass gets different tokens."""
    model = build(small("model.depth=2", *router, "parallel.recompute=all")).train()
    stir(model, make_mesh())
    moe, assignments, states = model.blocks[1].mlp, [], []
    run_experts, route = moe.run_experts, moe.route
    buffers = list(moe.router.buffers())

    def recorded(x_BSD, assignment, num_routed_images):
        assignments.append((assignment.token_R.clone(), assignment.expert_R.clone()))
        states.append([b.clone() for b in buffers])
        return run_experts(x_BSD, assignment, num_routed_images)

    def of_other_tokens(x_BSD, num_conditional, y_B, routing_cache, scored_BSD):
        sign = -1 if assignments else 1
        scored_BSD = None if scored_BSD is None else sign * scored_BSD
        return route(sign * x_BSD, num_conditional, y_B, routing_cache, scored_BSD)

    monkeypatch.setattr(moe, "run_experts", recorded)
    monkeypatch.setattr(moe, "route", of_other_tokens)
    prediction, auxiliary = model(torch.randn(4, 4, 8, 8), torch.ones(4), torch.tensor([1, 2, 3, 10]), 3)
    (prediction.square().mean() + auxiliary.total()).backward()
    (token, expert), (token_again, expert_again) = assignments
    assert torch.equal(token, token_again) and torch.equal(expert, expert_again)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_each_policy_needs_less_than_the_one_before():
    def kept(policy: str) -> int:
        model = build(small("model.router=promoe", f"parallel.recompute={policy}")).train()
        with Counter() as counter:
            prediction, auxiliary = model(torch.randn(4, 4, 8, 8), torch.ones(4), torch.tensor([1, 2, 3, 10]), 3)
            at_end = counter.live(counter.mark())
            (prediction.square().mean() + auxiliary.total()).backward()
        return at_end

    none, moe, blocks, all_of_it = (kept(policy) for policy in ("none", *POLICIES))
    assert none > 1.2 * moe > 1.2 * 1.2 * blocks > 1.2 * 1.2 * 1.2 * all_of_it


def test_evaluation_recomputes_nothing(monkeypatch):
    model = build(small("parallel.recompute=all")).eval()
    monkeypatch.setattr("megapromoe.nn.block.checkpoint", None)
    model(torch.randn(2, 4, 8, 8), torch.ones(2), torch.tensor([1, 10]), 1)


def test_dense_models_have_no_moe_to_recompute():
    with pytest.raises(ConfigError, match="recompute = 'moe': must be none, blocks or all with model.router = 'dense'"):
        small("model.router=dense", "parallel.recompute=moe")
