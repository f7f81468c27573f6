"""`megapromoe.nn` as a library over ranks: a foreign model on a mesh, and torch's own wrappers around it."""

import copy

import pytest
import torch
import torch.distributed as dist
from support.foreign_network import NUM_CLASSES, D, E, Network, tokens
from support.levels import full
from support.processes import run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from megapromoe.config.expert_placement import ExpertPlacement, ReplicatedExpert
from megapromoe.nn import auxiliary_loss, make_mesh, parallelize

IMAGES, CONDITIONAL = 4, 3  # of a rank
STEPS, MAX_NORM = 3, 0.5


def batch(data_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of a data-parallel rank, conditional images first."""
    labels = torch.randint(NUM_CLASSES, (IMAGES,), generator=torch.Generator().manual_seed(data_rank))
    labels[CONDITIONAL:] = NUM_CLASSES
    return tokens(IMAGES, seed=data_rank), labels


def whole_batch(data_ranks: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The batch of all ranks, conditional images first."""
    x, y = (torch.cat(parts) for parts in zip(*(batch(rank) for rank in range(data_ranks)), strict=True))
    order = torch.argsort((y == NUM_CLASSES).long(), stable=True)
    return x[order], y[order], data_ranks * CONDITIONAL


def network(options: dict, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(num_classes=NUM_CLASSES, **options).train()


def loss_of(model, x, num_conditional, y):
    out, auxiliary = model(x, num_conditional, y)
    return out.square().mean() + auxiliary_loss([auxiliary])


def alone(options: dict, data_ranks: int) -> dict:
    """Training on one rank with the batches of all."""
    model, (x, y, n) = network(options), whole_batch(data_ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, x, n, y)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "state": {k: v.clone() for k, v in model.state_dict().items()}}


def divided(options: dict, tp: int, ep: int, expert_tp: bool, placement: ExpertPlacement | None = None) -> dict:
    """The same over the ranks of a mesh. Collective. Only rank 0 has the right initial values."""
    mesh = make_mesh(tp, ep, expert_tp, timeout=60)
    model = network(options, seed=dist.get_rank())
    if placement:
        model.moe.place_experts(placement)
    sharding = parallelize(model, mesh)
    x, y = batch(mesh.dp.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, x, CONDITIONAL, y)
        loss.backward()
        sharding.reduce_gradients()
        norms.append(float(sharding.clip_gradients(MAX_NORM)))
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=mesh.dp.process_group)
        losses.append(float(mean) / mesh.dp.size)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copied.eval()(x, CONDITIONAL)[0], model.eval()(x, CONDITIONAL)[0])
    shape = tuple(model.moe.experts.fc1.weight.shape)
    return {"losses": losses, "norms": norms, "state": sharding.state_dict(), "shape": shape}


LAYOUTS = {
    "ep 2": (2, 1, 2, False),
    "tp 2": (2, 2, 1, False),
    "dp 2": (2, 1, 1, False),
    "tp 2 ep 2": (2, 2, 2, False),
    "expert tp 2": (2, 2, 1, True),
}
OPTIONS = [
    {},
    {"router": "promoe_ec"},
    {"router": "kmeans"},
    {"router": "tc", "balance_weight": 0.1, "num_experts": 3, "top_k": 2},
    {"score_function": "sigmoid", "num_shared_experts": 2, "expert_width": 24},
    {"router": "diffmoe"},
    {"router": "classification"},
    {"activation": "swiglu", "expert_width": 24},
]
QUICK = {("ep 2", 0), ("tp 2", 1), ("dp 2", 0), ("tp 2 ep 2", 3), ("expert tp 2", 1)}  # layout, number of the options
ALL = [(layout, number) for layout in LAYOUTS for number in (0, 1)]
ALL += [("ep 2" if number % 2 == 0 else "tp 2 ep 2", number) for number in range(2, len(OPTIONS))]
CASES = [(pytest.param if case in QUICK else full)(case[0], OPTIONS[case[1]]) for case in ALL]


@pytest.mark.parametrize(
    "layout, options", CASES, ids=lambda v: v if isinstance(v, str) else " ".join(map(str, v.values()))
)
def test_a_foreign_model_trains_the_same_on_a_mesh(layout, options):
    """Losses, gradient norms, and the state that is saved; parameters of experts are divided."""
    check_divided(options, *LAYOUTS[layout])


def test_experts_of_a_foreign_model_can_be_on_any_ranks():
    check_divided({"num_experts": 5, "top_k": 2}, *LAYOUTS["ep 2"], ExpertPlacement(((0, 2, 3, 4), (1,))))


def test_experts_can_have_copies():
    shares = ReplicatedExpert(0, ((0, 0.3), (1, 0.7))), ReplicatedExpert(1, ((0, 0.5), (1, 0.5)))
    placement = ExpertPlacement(((0, 2, 3, 4), (1,)), shares)
    check_divided({"num_experts": 5, "top_k": 2}, *LAYOUTS["ep 2"], placement)


def check_divided(options, world, tp, ep, expert_tp, placement=None):
    expected = alone(options, world // tp)
    for result in run(world, divided, options, tp, ep, expert_tp, placement):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert result["state"].keys() == expected["state"].keys()
        for name, value in expected["state"].items():
            torch.testing.assert_close(
                result["state"][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        experts, width = options.get("num_experts", E), options.get("expert_width", 2 * D)
        width *= 2 if options.get("activation") == "swiglu" else 1
        assert result["shape"] == (
            placement.slots if placement else -(-experts // ep),
            width // (tp if expert_tp else 1),
            D,
        )


def wrapped(options: dict, wrapper: str) -> dict:
    """Training of a model that is wrapped by torch's own data parallelism. Collective."""
    mesh = make_mesh(timeout=60)
    model = network(options, seed=dist.get_rank())
    parallelize(model, mesh)  # the same values on all ranks, and statistics over all of them
    if wrapper == "fsdp":
        fully_shard(model.moe)
        fully_shard(model)
        trained = model
    else:
        trained = DistributedDataParallel(model)
    x, y = batch(mesh.dp.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(trained, x, CONDITIONAL, y).backward()
        optimizer.step()
    state = model.state_dict()
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for name, t in state.items()}


def plain(options: dict, data_ranks: int) -> dict:
    model, (x, y, n) = network(options), whole_batch(data_ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, x, n, y).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(
    "router, wrapper", [("promoe", "fsdp"), full("promoe", "ddp"), full("promoe_ec", "fsdp"), ("promoe_ec", "ddp")]
)
def test_torchs_own_data_parallelism(router, wrapper):
    expected = plain({"router": router}, 2)
    for state in run(2, wrapped, {"router": router}, wrapper):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def too_many_ranks():
    with pytest.raises(ValueError, match="ep = 2: must be at most num_experts = 1"):
        parallelize(network({"num_experts": 1}), make_mesh(ep=2, timeout=60))
    with pytest.raises(ValueError, match=r"shared.fc1.weight: dimension 0 of \(33, 16\) does not divide by 2"):
        parallelize(network({"shared_expert_width": 33}), make_mesh(tp=2, timeout=60))


def test_layouts_that_cannot_be_are_named():
    run(2, too_many_ranks)
