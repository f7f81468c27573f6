"""Muon against a plain reference, what it is applied to, what it exchanges, and what is refused."""

import re

import pytest
import torch
from support.levels import full
from torch import Tensor

from megapromoe.checkpoint.disk_space import elements, muon_elements
from megapromoe.checkpoint.origin import fixed_changes
from megapromoe.config.deepspeed_file import read_deepspeed
from megapromoe.config.resolve import ConfigError, resolve
from megapromoe.distributed.mesh import make_mesh
from megapromoe.distributed.parameter_layout import ParameterLayout, Split
from megapromoe.engine.matrix_exchange import Matrix, MatrixExchange, matrices_of
from megapromoe.engine.muon import MuonConstants, MuonUpdate, hidden_parameters, orthogonalize
from megapromoe.engine.protocol import PartitionShards, Piece
from megapromoe.nn.dit import DiT
from megapromoe.nn.parallelize import layouts
from megapromoe.planning.cost import hidden_matrices, memory_per_rank, tensors_on_rank
from megapromoe.planning.roofline import muon_flops
from megapromoe.planning.traffic import collectives

MUON = "train.optimizer=muon"


# ---- the plain reference: a matrix at a time, float64


def plain_orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    x = matrix.double() / matrix.double().norm().clamp(min=1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def plain_update(weight: Tensor, momentum: Tensor, gradient: Tensor, lr: float, constants: MuonConstants):
    """The new weight and momentum of one matrix."""
    momentum = constants.momentum * momentum + (1 - constants.momentum) * gradient
    direction = (1 - constants.momentum) * gradient + constants.momentum * momentum if constants.nesterov else momentum
    rows, columns = weight.shape
    scale = 0.2 * max(rows, columns) ** 0.5 if constants.scale == "match_rms_adamw" else max(1, rows / columns) ** 0.5
    weight = weight * (1 - lr * constants.weight_decay) - lr * scale * plain_orthogonalize(direction, constants.steps)
    return weight, momentum


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows, columns", [(8, 8), (24, 8), (8, 24), (1, 5)])
def test_newton_schulz_is_the_plain_one_and_makes_singular_values_about_1(rows, columns):
    batch = random(5, rows, columns)
    batch[3] = 0
    ours = orthogonalize(batch, 5, torch.float32)
    assert ours.shape == batch.shape
    for matrix, result in zip(batch, ours, strict=True):
        assert torch.allclose(result.double(), plain_orthogonalize(matrix), atol=2e-5)
    before = torch.linalg.svdvals(batch) / torch.linalg.matrix_norm(batch)[:, None].clamp(min=1e-7)
    values = torch.linalg.svdvals(ours)[before > 0.01]  # smaller ones remain smaller
    assert len(values) >= 4 and values.min() > 0.6 and values.max() < 1.25
    assert not ours[3].any()


def test_it_is_that_of_torch_in_bf16():
    """`torch.optim.Muon` computes in bf16, one matrix at a time."""
    weight, gradients = random(16, 40), random(4, 16, 40, seed=1)
    for scale in ("original", "match_rms_adamw"):
        theirs = torch.nn.Parameter(weight.clone())
        optimizer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn=scale)
        update = whole_update(MuonConstants(0.95, True, 5, scale, 0.1), 16, 40, dtype=torch.bfloat16)
        ours, momentum = weight.clone().view(-1), torch.zeros(16 * 40)
        for gradient in gradients:
            theirs.grad = gradient
            optimizer.step()
            update.apply(ours, momentum, gradient.view(-1), 0.02)
        moved = (theirs.detach() - weight).norm()
        assert (ours.view(16, 40) - theirs.detach()).norm() < 0.01 * moved
        assert torch.allclose(momentum.view(16, 40), optimizer.state[theirs]["momentum_buffer"])


def whole_update(constants: MuonConstants, rows: int, columns: int, count: int = 1, dtype=torch.float32) -> MuonUpdate:
    """The update of one rank's partition of `count` matrices."""
    matrices = [Matrix("w", i * rows * columns, rows, columns) for i in range(count)]
    shards = PartitionShards(None, 0, ((Piece("w", 0, count * rows * columns, 0),),))
    return MuonUpdate(constants, MatrixExchange(matrices, shards), dtype)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("on_device", [True, False])
def test_update_is_the_plain_one(nesterov, scale, on_device):
    """Six steps, two of which are skipped if the device decides: with NaN, and with a finite gradient."""
    constants = MuonConstants(0.9, nesterov, 4, scale, 0.1)
    update = whole_update(constants, 6, 4, count=3)
    master, momentum = random(3 * 24 + 5), torch.zeros(3 * 24 + 5)  # with padding at the end
    padding = master[72:].clone()
    weights, momenta = list(master[:72].view(3, 6, 4).double()), [torch.zeros(6, 4).double()] * 3
    for step in range(6):
        lr, gradient = 0.01 * (step + 1), random(77, seed=step + 1)
        gradient[72:] = 0
        applied = not on_device or step not in (2, 4)
        if step == 2 and not applied:
            gradient[5] = torch.nan
        update.apply(master, momentum, gradient, lr, torch.tensor(applied) if on_device else None)
        if applied:
            for i, g in enumerate(gradient[:72].view(3, 6, 4).double()):
                weights[i], momenta[i] = plain_update(weights[i], momenta[i], g, lr, constants)
        assert torch.allclose(master[:72].view(3, 6, 4).double(), torch.stack(weights), atol=2e-5), step
        assert torch.allclose(momentum[:72].view(3, 6, 4).double(), torch.stack(momenta), atol=1e-6), step
    shrunk = padding
    for step in range(6):
        if not on_device or step not in (2, 4):
            shrunk = shrunk * (1 - 0.01 * (step + 1) * 0.1)
    assert torch.allclose(master[72:], shrunk) and not momentum[72:].any(), "padding gets no update"


# ---- what it is applied to

ALIGNED = ("model.align_block=1", "model.align_width=6")
HIDDEN = re.compile(
    r"(attn\.(qkv|proj)|mlp\.fc[12]|(shared|conditional|unconditional)(\.\d+)?\.fc[12]|experts\.fc[12])\.weight$"
)
TEXT = ("model.condition=text", "model.text_width=6", "model.text_tokens=5", "model.text_ffn=24")
ROUTERS = (
    *("promoe", "promoe_ec", "promoe_linear", "tc", "ec", "diffmoe", "classification", "kmeans", "gmm", "race"),
    *("dense", "conditional"),
)
OPTIONS = (
    *((f"model.router={router}",) for router in ROUTERS),
    ("model.activation=swiglu", "model.qk_norm=rms", "model.norm=rms", "model.num_shared_experts=2", *ALIGNED),
    ("model.activation=swiglu", "model.modulation=shared", "model.positions=rope", *TEXT),
)


def model_layouts(*overrides: str) -> tuple:
    size = ("model.hidden_size=32", "model.depth=2", "model.heads=4", "model.num_experts=6", "data.source=synthetic")
    config = resolve(overrides=(*size, *overrides, MUON))
    with torch.device("meta"):
        return config, layouts(DiT(config.model))


@pytest.mark.parametrize("overrides", OPTIONS, ids=",".join)
def test_matrices_of_attention_mlps_and_experts_alone(overrides):
    """By name, an independent judgement; queries, keys, values and the halves of a SwiGLU are matrices of their own."""
    config, table = model_layouts(*overrides)
    expected = {name for name in table if HIDDEN.search(name)}
    assert hidden_parameters(config, table) == expected
    swiglu = config.model.activation == "swiglu"
    for name in expected:
        stacked = 3 if "qkv" in name else 2 if swiglu and "fc1" in name else 1
        matrices = matrices_of(table[name], make_mesh())
        experts = 6 if table[name].expert else 1
        assert len(matrices) == stacked * experts
        assert all((m.rows * stacked, m.columns) == table[name].shape[-2:] for m in matrices)
        assert [m.start for m in matrices] == [i * matrices[0].size for i in range(len(matrices))]
    assert not hidden_parameters(resolve(overrides=("data.source=synthetic",)), table)


@pytest.mark.parametrize("overrides", [OPTIONS[0], *OPTIONS[-2:]], ids=",".join)
def test_the_plan_counts_the_same(overrides):
    config, table = model_layouts(*overrides, "train.deepspeed=fp32_zero1")
    layout = config.layout(1)
    hidden = [sum(part) for part in tensors_on_rank(config.model, layout, hidden=True)]
    rest = [sum(part) for part in tensors_on_rank(config.model, layout, hidden=False)]
    sizes = {name: torch.Size(of.shape).numel() for name, of in table.items()}
    of_muon = hidden_parameters(config, table)
    assert sum(hidden) == sum(sizes[name] for name in of_muon) == muon_elements(config)
    assert sum(hidden) + sum(rest) == sum(sizes.values()) == elements(config)
    built = sorted((m.rows, m.columns) for name in of_muon for m in matrices_of(table[name], make_mesh()))
    planned = [(m.rows, m.columns) for m in hidden_matrices(config.model, layout) for _ in range(m.count)]
    assert sorted(planned) == built
    expected = sum(4 * min(m) ** 2 * max(m) + 2 * min(m) ** 3 for m in built)
    assert muon_flops(config, layout) == 5 * expected
    odd = sum(sum(part) % 2 for part in (hidden, rest))  # groups are padded to even sizes
    assert memory_per_rank(config, 1).optimizer == pytest.approx(8 * sum(hidden) + 12 * sum(rest), abs=24 + odd)


# ---- what is exchanged


def shards_of(sizes: dict[str, int], ranks: int) -> list[PartitionShards]:
    """Of each rank, as ZeRO 1 divides tensors: in equal parts of all of them together."""
    width, begin, pieces = -(-sum(sizes.values()) // ranks), 0, [[] for _ in range(ranks)]
    for name, size in sizes.items():
        for rank in range(ranks):
            start, stop = max(rank * width - begin, 0), min((rank + 1) * width - begin, size)
            if start < stop:
                pieces[rank].append(Piece(name, start, stop, begin + start - rank * width))
        begin += size
    return [PartitionShards(None, rank, tuple(map(tuple, pieces))) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, full(64)])
def test_each_matrix_has_one_owner_and_only_cut_ones_are_sent(ranks, monkeypatch):
    """All ranks' exchanges in one process: what a rank gathers, and what comes back, by the messages of the others."""
    shapes = {"a": (3, 4, 6), "b": (1, 10, 10), "c": (5, 2, 8)}
    sizes = {name: count * rows * columns for name, (count, rows, columns) in shapes.items()}
    matrices = [
        Matrix(name, i * rows * columns, rows, columns)
        for name, (count, rows, columns) in shapes.items()
        for i in range(count)
    ]
    all_shards = shards_of(sizes, ranks)
    exchanges = [MatrixExchange(matrices, shards) for shards in all_shards]
    assert len({exchange.owners for exchange in exchanges}) == 1
    owned = [matrix for exchange in exchanges for matrix in exchange.owned]
    assert sorted(owned) == sorted(matrices)
    assert sum(e.sent_elements for e in exchanges) == sum(e.received_elements for e in exchanges)
    width = -(-sum(sizes.values()) // ranks)
    cut = [
        matrix
        for matrix, begin in zip(matrices, offsets(matrices), strict=True)
        if begin // width != (begin + matrix.size - 1) // width
    ]
    elements_of_all = torch.arange(float(sum(sizes.values())))
    padded = torch.cat([elements_of_all, torch.zeros(ranks * width - len(elements_of_all))])
    flats = list(padded.split(width))
    # The first messages are those to owners; each rank's are remembered, then every rank gets its own.
    assert sum(e.sent_elements for e in exchanges) < sum(matrix.size for matrix in cut) or not cut
    sent: dict[tuple[int, int], Tensor] = {}

    def run_all(call):
        """`call` of every rank twice: at first to learn what it sends, then with what it is sent."""
        results = []
        for delivers in (False, True):
            results = []
            for rank, exchange in enumerate(exchanges):

                def swap(incoming, outgoing, received, sending, group, rank=rank, delivers=delivers):
                    for to, part in enumerate(outgoing.split(sending)):
                        sent[rank, to] = part.clone()
                    if delivers:
                        incoming.copy_(torch.cat([sent[origin, rank] for origin in range(ranks)]))

                monkeypatch.setattr(torch.distributed, "all_to_all_single", swap)
                results.append(call(rank, exchange))
        return results

    gathered = run_all(lambda rank, exchange: exchange.gather(flats[rank]))
    for exchange, matrices_of_rank in zip(exchanges, gathered, strict=True):
        for matrix, value in zip(exchange.owned, matrices_of_rank, strict=True):
            begin = offsets(matrices)[matrices.index(matrix)]
            assert torch.equal(value.reshape(-1), elements_of_all[begin : begin + matrix.size])

    def distributed(rank: int, exchange: MatrixExchange) -> Tensor:
        out = torch.full((width,), -1.0)
        exchange.distribute([value * 2 for value in gathered[rank]], out)
        return out

    back = torch.cat(run_all(distributed))
    assert torch.equal(back[: len(elements_of_all)], 2 * elements_of_all) and (back[len(elements_of_all) :] == -1).all()
    for rank, exchange in enumerate(exchanges):
        held = exchange.held_parts(flats[rank])
        assert sum(part.numel() for _, part in held) == min(width, max(len(elements_of_all) - rank * width, 0))


def offsets(matrices: list[Matrix]) -> list[int]:
    """Where each matrix begins in all tensors together."""
    out, total = [], 0
    for matrix in matrices:
        out.append(total)
        total += matrix.size
    return out


def test_spare_expert_slots_are_no_matrices():
    layout = ParameterLayout("w", (5, 6, 4), Split(1), expert=True, hidden_matrices=2)
    assert len(matrices_of(layout, make_mesh())) == 10


@pytest.mark.parametrize("ranks", [7, full(35), 4])
def test_planned_bytes_of_cut_matrices_are_about_those_of_the_borders(ranks):
    """At 4 ranks all borders of the experts happen to be between matrices: fewer bytes than planned."""
    small = ("model.num_experts=8", "data.source=synthetic", "train.global_batch=140")
    config = resolve("promoe_s", overrides=(MUON, *small), world=ranks)
    with torch.device("meta"):
        table = layouts(DiT(config.model))
    for over, of_experts in (("dp", False), ("edp", True)):
        hidden = [of for of in table.values() if of.hidden_matrices and of.expert == of_experts]
        sizes = {of.name: torch.Size(of.shape).numel() for of in hidden}
        matrices = [matrix for of in hidden for matrix in matrices_of(of, make_mesh())]
        moved = sum(MatrixExchange(matrices, shards).sent_elements for shards in shards_of(sizes, ranks))
        calls = [c for c in collectives(config, config.layout(ranks)) if c.what.startswith("Muon") and c.over == over]
        (call,) = calls
        assert call.count == 2 and 2 * moved < 2 * call.payload * ranks
        if ranks != 4:
            assert 2 * moved > 0.5 * call.payload * ranks


# ---- what is refused


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (("parallel.tp=2",), "parallel.tp = 2: must be 1 with train.optimizer = 'muon'"),
        (("train.adamw_backend=apex",), "train.adamw_backend = 'apex': must be torch or fused"),
        (("train.muon_scale=original",), "train.muon_lr = 0.0: must be given with train.muon_scale = 'original'"),
        (("train.muon_steps=0",), "train.muon_steps"),
        (("train.muon_momentum=1",), "train.muon_momentum"),
    ],
)
def test_refused_options(overrides, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        resolve(overrides=("data.source=synthetic", MUON, *overrides))


def test_remedies_work():
    resolve(overrides=("data.source=synthetic", MUON, "train.muon_scale=original", "train.muon_lr=0.02"))
    resolve(overrides=("data.source=synthetic", MUON, "train.adamw_backend=fused", "parallel.ep=2"))


def test_offloading_is_refused():
    config = resolve(overrides=("data.source=synthetic", MUON, "train.deepspeed=bf16_zero2"))
    assert not read_deepspeed(config)[1]
    with pytest.raises(ConfigError, match="train.optimizer = 'muon': is not supported with train.deepspeed = 'bf16_ze"):
        resolve(overrides=("data.source=synthetic", MUON, "train.deepspeed=bf16_zero2_offload"))


def test_the_optimizer_belongs_to_the_run_and_its_learning_rate_does_not():
    names = ("optimizer", "muon_momentum", "muon_nesterov", "muon_steps", "muon_scale")
    changed = {f"train.{name}": [0, 1] for name in (*names, "muon_lr", "lr")}
    assert fixed_changes(changed) == [f"train.{name}" for name in names]
