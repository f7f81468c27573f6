"""Training is one function at every layout: the matrix against ONE process.

Per-step losses and clip norms, all gradients of the first step, parameters and averages after 5 steps agree in
fp32: ‖a-b‖ ≤ 1e-5·‖b‖ + 1e-6·‖everything‖ per tensor. Some gradients are zero by mathematics (an attention key's bias)
and Adam would turn their rounding noise into full steps, so the runs use eps 1e-3, which damps that. The clip norm is
active in every run. `make equality` writes the table of the largest deviations, 1.0 being the limit. The quick level
runs every value of every option that the matrix has, and every pair of two ways to divide a model: dense tensors,
experts, tensors of experts, parameters (ZeRO-3).
"""

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch
from support.backends import grouped
from support.levels import covering, full_unless
from support.page_sections import write_section
from support.placements import placement_file
from support.processes import run
from support.trajectory import Trajectory, deviations, small, train


@dataclass(frozen=True)
class Case:
    """A layout and what is trained there. `what` overrides and `prepare` hold for the one process too.

    `grouped`: experts run by grouped products, as on a GPU that has them, and not one by one. `placed`: uneven numbers
    of experts on the ranks, in an order that differs from block to block. `copies`: also copies of experts on other
    ranks, which divide their rows. `shard`: ranks over which states are divided.
    """

    world: int
    tp: int = 1
    ep: int = 1
    zero: int = 1
    expert_tp: bool = False
    what: tuple[str, ...] = ()
    prepare: str = ""
    recompute: str = "none"
    grouped: bool = False
    placed: bool = False
    shard: int = 0
    copies: bool = False

    @property
    def name(self) -> str:
        what = [w.partition(".")[2].replace(f"{ROOT}/", "") for w in self.what] + (
            [self.prepare] if self.prepare else []
        )
        what += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        what += ["grouped products"] if self.grouped else []
        what += ["placed experts"] if self.placed else []
        what += [f"states over {self.shard} ranks"] if self.shard else []
        what += ["copies of experts"] if self.copies else []
        split = "+experts" if self.expert_tp else ""
        return f"world {self.world} · tp {self.tp}{split} · ep {self.ep} · ZeRO-{self.zero}" + (
            f" · {', '.join(what)}" if what else ""
        )

    def overrides(self) -> tuple[str, ...]:
        return (
            *self.what,
            f"parallel.tp={self.tp}",
            f"parallel.ep={self.ep}",
            f"parallel.expert_tp={str(self.expert_tp).lower()}",
            f"parallel.recompute={self.recompute}",
            f"train.deepspeed=fp32_zero{self.zero}",
            *([f"parallel.shard_ranks={self.shard}", SCATTER] if self.shard else []),
        )


def one_expert(model, mesh) -> None:
    """Sends every token to expert 0: the other experts, and the ranks that hold only such, get none."""
    width = model.config.hidden_size
    direction = torch.ones(width)
    for name, parameter in model.named_parameters():
        layout = model.layouts[name]
        if name.endswith("prototypes"):
            signs = torch.full((model.config.num_experts, 1), -1.0)
            signs[0] = 1.0
            parameter.data.copy_(signs * direction)
        if name.endswith("adaLN_modulation.1.bias") and not name.startswith("final_layer."):
            logical = torch.zeros(6 * width)
            logical[3 * width : 4 * width] = 5.0 * direction  # the shift of the MLP's input
            parameter.data.add_(layout.local_shard(logical, mesh))


ROOT = Path(__file__).parents[2]
BIASED = (f"model.router={ROOT}/examples/my_router.py:BiasedRouter",)  # a router of a user
SCATTER = "train.gradient_reduction=reduce_scatter"
PREPARE = {"": None, "one_expert": one_expert}
ALL_NULL = ("data.condition_dropout=0.999999999",)
NO_NULL = ("data.condition_dropout=0",)
TWELVE = ("model.num_experts=12",)
EIGHT = ("model.num_experts=8",)
ODD = ("train.global_batch=18",)
TWICE = ("train.accumulation=2",)
SEVERAL = (
    "model.num_shared_experts=3",
    "model.shared_expert_width=20",
    "model.num_unconditional_experts=2",
    "model.expert_width=44",
)

BLOCKS = {"activation": "swiglu", "norm": "rms", "qk_norm": "rms", "positions": "rope", "modulation": "shared"}
ALL_OPTIONS = tuple(f"model.{name}={value}" for name, value in BLOCKS.items())

CASES = [
    *(Case(1, zero=z) for z in (1, 2, 3)),
    *(Case(2, zero=z) for z in (0, 1, 2, 3)),
    *(Case(3, ep=3, zero=z, what=ODD) for z in (0, 1, 2, 3)),  # partitions that end in padding
    *(Case(2, ep=2, zero=z) for z in (0, 1, 2, 3)),
    *(Case(2, tp=2, zero=z) for z in (0, 1, 2, 3)),
    *(Case(2, tp=2, ep=2, zero=z) for z in (1, 3)),
    *(Case(4, tp=2, ep=2, zero=z) for z in (0, 1, 2, 3)),
    *(Case(4, ep=4, zero=z) for z in (0, 1, 2, 3)),
    *(Case(4, tp=4, ep=2, zero=z) for z in (0, 1, 2, 3)),
    Case(4, ep=2),
    Case(4, tp=2),
    Case(4, tp=2, ep=4),
    *(Case(4, tp=2, ep=2, expert_tp=True, zero=z) for z in (0, 1, 2, 3)),
    Case(2, tp=2, expert_tp=True),
    *(Case(8, ep=8, zero=z, what=EIGHT) for z in (1, 2)),
    *(Case(8, ep=8, zero=z, what=TWELVE) for z in (1, 3)),
    Case(8, tp=2, ep=2, zero=2),
    Case(8, tp=2, ep=4, expert_tp=True),
    *(Case(w, tp=t, ep=e, zero=z, what=TWICE) for w, t, e, z in
      [(2, 1, 1, 0), (2, 1, 2, 1), (4, 2, 2, 1), (4, 2, 2, 2), (4, 2, 2, 3), (4, 1, 4, 0)]),
    # A rank or an expert without tokens, all null, no null.
    *(Case(4, ep=4, zero=z, prepare="one_expert") for z in (0, 1, 2, 3)),
    Case(4, tp=2, ep=2, prepare="one_expert"),
    *(Case(4, tp=2, ep=2, zero=z, what=ALL_NULL) for z in (0, 1, 2, 3)),
    *(Case(4, tp=2, ep=2, what=(*ALL_NULL, f"model.router={r}")) for r in ("promoe_ec", "tc", "diffmoe")),
    *(Case(4, tp=2, ep=2, zero=z, what=NO_NULL) for z in (1, 3)),
    # Other routers and options under the same dispatch.
    *(Case(4, tp=2, ep=2, what=(f"model.router={r}",)) for r in ("promoe_ec", "ec", "diffmoe")),
    *(Case(4, tp=2, ep=2, zero=z, expert_tp=x, what=("model.router=promoe_ec", "model.score_function=softmax"))
      for z, x in ((1, False), (3, False), (2, True))),
    Case(4, ep=4, what=("model.router=promoe_ec", "model.score_function=softmax", *TWICE)),
    *(Case(4, tp=2, ep=2, what=(f"model.router={r}",)) for r in ("promoe_linear", "classification", "kmeans")),
    Case(2, ep=2, what=("model.router=classification", "model.unconditional_expert=false")),
    Case(4, ep=2, what=("model.router=kmeans", "model.kmeans_decay=0", *TWICE)),
    *(Case(4, tp=2, ep=2, what=(*ALL_NULL, f"model.router={r}")) for r in ("classification", "kmeans")),
    Case(4, tp=2, ep=2, what=("model.score_function=identity",)),
    Case(4, tp=2, ep=2, what=("model.router=tc", "model.balance_weight=0.01")),
    Case(4, tp=2, what=("model.router=dense",)),
    Case(4, tp=2, ep=2, what=("model.top_k=2", "model.score_function=softmax", "model.qk_norm=layer")),
    Case(
        4, tp=2, ep=2, expert_tp=True, what=("model.top_k=2", "model.score_function=sigmoid", "model.rcl_tokens=first")
    ),
    Case(4, tp=2, ep=2, what=("model.shared_expert=false", "model.unconditional_expert=false")),
    # Several shared and unconditional experts, widths of their own, fewer tokens than experts.
    *(Case(w, tp=t, ep=e, zero=z, expert_tp=x, what=SEVERAL) for w, t, e, z, x in
      [(2, 1, 2, 0, False), (4, 2, 2, 1, False), (4, 2, 2, 2, True), (4, 4, 2, 3, False)]),
    Case(4, tp=2, ep=2, zero=3, what=(*SEVERAL, *ALL_NULL)),
    Case(4, tp=2, ep=2, what=(*SEVERAL, "model.router=kmeans", *TWICE), recompute="all"),
    *(Case(4, tp=2, ep=2, zero=z, what=("model.num_experts=20", f"model.router={r}")) for z, r in
      ((1, "promoe_ec"), (2, "diffmoe"))),
    Case(4, tp=2, ep=2, what=("model.balance_weight=0.1", "model.balance_form=sequence")),
    Case(4, tp=2, ep=2, what=("model.balance_weight=0.1", "model.balance_form=batch")),
    Case(4, tp=2, ep=2, what=("diffusion.objective=ddpm", "sample.method=ddim")),
    *(Case(4, tp=2, ep=2, zero=z, recompute=r) for r in ("blocks", "all") for z in (1, 3)),
    Case(4, tp=2, ep=2, recompute="moe"),
    *(Case(4, tp=2, ep=2, zero=z, grouped=True) for z in (0, 1, 2, 3)),
    *(Case(4, ep=4, zero=z, prepare="one_expert", grouped=True) for z in (1, 2)),
    Case(4, tp=2, ep=2, expert_tp=True, grouped=True, recompute="all"),
    *(Case(4, tp=2, ep=2, recompute="all", what=(f"model.router={r}", *TWICE)) for r in ("kmeans", "diffmoe")),
    Case(4, tp=2, ep=2, zero=3, recompute="all", what=BIASED),
    Case(4, tp=2, ep=2, expert_tp=True, what=(*BIASED, "model.top_k=2", *TWICE)),
]  # fmt: skip


# Options of blocks, all together; `test_block_options.py` has each alone.
OPTIONS = [
    Case(4, tp=2, ep=2, what=ALL_OPTIONS),
    Case(4, tp=2, ep=2, expert_tp=True, zero=3, recompute="all", what=(*ALL_OPTIONS, *SEVERAL)),
    Case(4, tp=2, ep=2, zero=2, what=ALL_OPTIONS),
    Case(4, ep=4, zero=2, what=(*ALL_OPTIONS, *TWICE), prepare="one_expert"),
    Case(2, tp=2, zero=3, what=(*ALL_OPTIONS, "model.router=dense")),
    Case(4, tp=4, ep=2, what=(*ALL_OPTIONS, *ALL_NULL), recompute="blocks"),
    Case(4, tp=2, ep=2, what=(*ALL_OPTIONS, *NO_NULL), grouped=True),
    Case(4, tp=2, ep=2, expert_tp=True, zero=0, what=("model.activation=swiglu", "model.qk_norm=rms"), grouped=True),
]

# Texts of 0 to 5 tokens.
TEXT = ("data.source=unset", "model.condition=text", "model.num_classes=1000", "model.text_width=6")
TEXT = (*TEXT, "model.text_tokens=5")
WITH_FFN = (*TEXT, *ALL_OPTIONS, "model.text_ffn=24")
TEXTS = [
    Case(4, tp=2, ep=2, zero=2, what=WITH_FFN),
    Case(4, tp=2, ep=2, expert_tp=True, zero=3, what=WITH_FFN, recompute="all"),
    Case(1, zero=3, what=TEXT),
    Case(3, ep=3, zero=0, what=(*TEXT, *ODD)),
    Case(8, ep=8, what=(*TEXT, *TWELVE)),
    Case(4, tp=4, ep=2, what=(*WITH_FFN, *ALL_NULL), recompute="blocks"),
    Case(4, tp=2, ep=2, zero=3, what=(*TEXT, *NO_NULL, *TWICE), grouped=True),
    Case(2, tp=2, zero=2, what=(*WITH_FFN, "model.router=dense")),
]


# Muon for hidden matrices, which ZeRO's partitions cut.
MUON = ("train.optimizer=muon", "train.muon_lr=0.02", "train.weight_decay=0.1")
MUON_CASES = [
    Case(4, ep=2, zero=1, what=(*MUON, *SEVERAL)),
    Case(4, ep=4, zero=2, what=MUON),
    Case(3, ep=3, zero=1, what=(*MUON, *ODD)),
    Case(2, zero=2, what=(*MUON, *ALL_OPTIONS, *TWICE, "train.muon_scale=original")),
    Case(4, ep=4, zero=1, what=MUON, prepare="one_expert"),
    Case(4, ep=2, zero=3, what=(*MUON, *WITH_FFN)),
]


# Times that are shifted by the size of the latents, several averages, and a teacher.
SHIFTED = ("diffusion.shift_base=4", "train.ema_decay=[0.5,0.9]")
ALIGNED = ("model.align_block=2", "model.align_width=12", "model.align_hidden=24", "data.flip=true")
RECIPES = [
    Case(4, tp=2, ep=2, zero=2, what=(*SHIFTED, *ALIGNED, *TWICE), recompute="all"),
    Case(4, tp=2, ep=2, zero=3, what=(*TEXT, *SHIFTED, *ALIGNED)),
]

# A bias that balances the load, as state that each step changes.
BALANCE_BIAS = ("model.balance_bias=0.02", "model.top_k=2", *TWICE)
ROUTERS = [
    Case(4, tp=2, ep=2, zero=2, what=BALANCE_BIAS, recompute="all"),
    Case(4, ep=2, zero=3, what=("model.router=tc", *BALANCE_BIAS)),
    # Gaussian mixture.
    Case(4, tp=2, ep=2, zero=2, what=("model.router=gmm", "model.top_k=2", *TWICE), recompute="all"),
    # Expert Race.
    Case(4, tp=2, ep=2, zero=1, what=("model.router=race", "model.top_k=2", *TWICE), recompute="all"),
    *(Case(4, tp=2, ep=2, what=(*ALL_NULL, f"model.router={r}")) for r in ("gmm", "race")),
    Case(4, tp=2, ep=2, zero=2, what=(*ALL_NULL, *BALANCE_BIAS)),
]


# Separate experts for null images without a router.
CONDITIONAL = ("model.router=conditional",)
CONDITIONALS = [
    Case(2, tp=2, zero=2, what=CONDITIONAL),
    Case(4, tp=2, zero=3, what=(*CONDITIONAL, *SEVERAL, *TWICE), recompute="all"),
    Case(4, zero=1, what=(*CONDITIONAL, *ALL_OPTIONS, "model.shared_expert=false"), recompute="blocks"),
    Case(3, zero=0, what=(*CONDITIONAL, *ODD, *ALL_NULL)),
    Case(4, tp=4, zero=3, what=(*CONDITIONAL, *WITH_FFN, *NO_NULL)),
]


# Routers that score the normalised tokens.
UNMODULATED = ("model.router_input=unmodulated",)
ROUTER_INPUTS = [
    Case(4, tp=2, ep=2, zero=2, what=UNMODULATED, recompute="blocks"),
    Case(4, tp=2, ep=2, zero=3, what=(*UNMODULATED, "model.router=kmeans", *TWICE), recompute="all"),
    Case(4, ep=4, zero=1, what=(*UNMODULATED, "model.router=diffmoe", *ALL_OPTIONS)),
    Case(4, tp=2, ep=2, expert_tp=True, what=(*UNMODULATED, "model.router=promoe_ec", *WITH_FFN)),
    Case(2, ep=2, what=(*UNMODULATED, "model.router=tc", "model.balance_weight=0.01"), recompute="moe"),
]


# Many narrow experts, several for a token.
FINE = ("model.num_experts=48", "model.top_k=4", "model.activation=swiglu", "model.expert_width=16")
FINE = (*FINE, "model.shared_expert_width=40", "model.num_unconditional_experts=4")
FINE_GRAINED = [
    Case(4, ep=4, zero=2, what=FINE),
    Case(4, tp=2, ep=4, zero=3, what=(*FINE, *TWICE), recompute="all"),
    Case(4, ep=4, zero=1, what=(*FINE, "model.router=tc", "model.shared_expert=false", "model.shared_expert_width=0",
                                "model.unconditional_expert=false", "model.num_unconditional_experts=1"), grouped=True),
]  # fmt: skip


# Experts on any ranks, in uneven numbers.
PLACED = [
    Case(4, ep=4, zero=2, what=TWELVE, placed=True),
    Case(4, tp=2, ep=2, zero=3, what=(*TWELVE, *TWICE), recompute="all", placed=True),
    Case(4, tp=2, ep=2, expert_tp=True, zero=1, what=(*TWELVE, "model.activation=swiglu"), placed=True),
    Case(3, ep=3, zero=1, what=(*MUON, *ODD, *TWELVE), placed=True),
    Case(4, ep=4, zero=0, what=TWELVE, prepare="one_expert", grouped=True, placed=True),
    Case(2, ep=2, zero=1, what=(*TWELVE, "model.router=diffmoe"), placed=True),
    Case(4, ep=4, zero=1, what=(*FINE, "model.balance_bias=0.02"), placed=True),
    Case(4, ep=2, zero=2, what=(*TWELVE, *ALL_NULL), placed=True),
]


# States that are divided over some of the ranks. The first case: dp 2 x 2 and edp 2 x 2.
SHARDS = [
    Case(4, zero=2, what=TWICE, shard=2),
    Case(4, ep=2, zero=1, what=TWELVE, shard=2),
    Case(8, ep=2, zero=1, what=TWICE, shard=4),
    Case(8, tp=2, ep=2, zero=2, what=(*TWICE, *SEVERAL), shard=4, recompute="all"),
    Case(8, tp=2, ep=2, expert_tp=True, zero=1, shard=4),
    Case(4, tp=2, ep=2, zero=2, what=TWICE, shard=2),
    Case(8, tp=2, ep=4, zero=1, what=ALL_NULL, shard=4),
    Case(4, ep=2, zero=1, what=("model.router=diffmoe",), shard=2),
    Case(4, zero=1, what=MUON, shard=2),
    Case(4, zero=1, what=("model.router=dense",), shard=2),
    Case(8, ep=4, zero=2, what=TWELVE, shard=4, placed=True),
    Case(4, ep=2, zero=2, what=EIGHT, prepare="one_expert", shard=1),
]


# Copies of experts, among them of the one that gets every token.
COPIED = [
    Case(4, ep=4, zero=2, what=TWELVE, copies=True),
    Case(4, tp=2, ep=2, zero=1, what=(*TWELVE, *TWICE), recompute="all", copies=True),
    Case(4, tp=2, ep=2, expert_tp=True, zero=1, what=(*TWELVE, "model.activation=swiglu"), copies=True),
    Case(3, ep=3, zero=1, what=(*MUON, *ODD, *TWELVE), copies=True),
    Case(4, ep=4, zero=0, what=TWELVE, prepare="one_expert", grouped=True, copies=True),
    Case(2, ep=2, zero=1, what=(*TWELVE, "model.router=diffmoe"), recompute="moe", copies=True),
    Case(4, ep=4, zero=1, what=(*FINE, "model.balance_bias=0.02"), copies=True),
    Case(4, ep=2, zero=2, what=(*TWELVE, *ALL_NULL), copies=True),
    Case(4, ep=2, zero=1, what=(*TWELVE, *TWICE, "train.gradient_reduction=all_reduce"), copies=True),
    Case(
        4, ep=2, zero=2, what=(*TWELVE, *TWICE, "train.gradient_reduction=all_reduce"), recompute="blocks", copies=True
    ),
    Case(8, ep=4, zero=2, what=(*TWELVE, *TWICE), shard=4, copies=True),
]


CASES += [*OPTIONS, *TEXTS, *MUON_CASES, *RECIPES, *ROUTERS, *CONDITIONALS, *ROUTER_INPUTS, *FINE_GRAINED]
CASES += [*PLACED, *SHARDS, *COPIED]


def values_of(case: Case) -> set[Hashable]:
    """What the quick level needs of a case: the value of each option, and pairs of the ways to divide the model."""
    divided = (("tp", case.tp > 1), ("ep", case.ep > 1), ("expert_tp", case.expert_tp), ("ZeRO-3", case.zero == 3))
    more = ("prepare", case.prepare), ("recompute", case.recompute), ("zero", case.zero), ("grouped", case.grouped)
    placed = ("placed", case.placed), ("copies", case.copies), ("shard", case.shard > 0)
    return {*case.what, *more, *placed, *combinations(divided, 2)}


def cost_of(case: Case) -> float:
    """Seconds of a processor, roughly: of the ranks, and of the one process that they are compared with."""
    return case.world * (2.5 if case.zero == 3 else 1.0) + 1.5


QUICK = covering([values_of(case) for case in CASES], [cost_of(case) for case in CASES])


@cache
def alone(what: tuple[str, ...], prepare: str, folder: str) -> Trajectory:
    """The same training on one process, plain ZeRO-0."""
    place = Path(folder) / str(abs(hash((what, prepare))))
    place.mkdir()
    return run(1, train, (*what, "train.deepspeed=fp32_zero0"), str(place), 5, PREPARE[prepare])[0]


def train_grouped(*arguments) -> Trajectory | None:
    with grouped():
        return train(*arguments)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def table(request):
    rows = []
    yield rows
    if file := request.config.getoption("--equality-table"):
        write_table(Path(file), rows)


@pytest.mark.parametrize("case", full_unless(QUICK, CASES), ids=lambda case: case.name)
def test_same_training_as_one_process(case, tmp_path, shared_folder, table):
    expected = alone(case.what, case.prepare, shared_folder)
    training = train_grouped if case.grouped else train
    overrides = case.overrides()
    if case.placed or case.copies:
        experts = small(*case.what).model.num_experts
        file = placement_file(tmp_path, experts, case.ep, copies=case.copies)
        overrides = (*overrides, f"parallel.placement={file}")
    ours = run(case.world, training, overrides, str(tmp_path), 5, PREPARE[case.prepare])[0]
    measured = deviations(ours, expected)
    table.append((case.name, measured))
    assert min(expected.norms) > 0 and max(expected.norms) > 0.5, "the clip norm is not active"
    assert all(math.isfinite(loss) for loss in ours.losses)
    worst = {kind: f"{value:.3g} × the limit at {where}" for kind, (value, where) in measured.items() if not value <= 1}
    assert not worst, f"{case.name}: {worst}"


README = ROOT / "README.md"
SHOWN = [Case(4, tp=2, ep=2, what=EIGHT), Case(4, ep=4, zero=2, what=EIGHT), Case(8, ep=8, zero=3, what=EIGHT)]
ROW = re.compile(r"^\| (\d) · (\d) · (\d) \| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.e-]+|–) \| ([\d.e-]+|–) \|\n", re.M)


@pytest.mark.full
def test_the_table_of_the_readme_is_what_one_step_gives(tmp_path, shared_folder, request):
    """Loss and gradient norm to the six digits that the README says, and their differences below its limit."""
    single = alone(EIGHT, "", shared_folder)
    measured = [(Case(1, zero=0, what=EIGHT), single.losses[0], single.norms[0])]
    for case in SHOWN:
        (tmp_path / case.name).mkdir()
        ours = run(case.world, train, case.overrides(), str(tmp_path / case.name), 1, None)[0]
        measured.append((case, ours.losses[0], ours.norms[0]))
    rows = []
    for case, loss, norm in measured:
        apart = [abs(a / b - 1) for a, b in ((loss, single.losses[0]), (norm, single.norms[0]))]
        assert max(apart) < 1e-6
        cells = [f"{case.tp} · {case.ep} · {case.zero}", str(case.world), f"{loss:.6g}", f"{norm:.6g}"]
        cells += ["–", "–"] if case.world == 1 else [f"{value:.0e}" if value else "0" for value in apart]
        rows.append(f"| {' | '.join(cells)} |\n")
    if file := request.config.getoption("--readme-table"):
        text = Path(file).read_text(encoding="utf-8")
        old = [match[0] for match in ROW.finditer(text)]
        Path(file).write_text(text.replace("".join(old), "".join(rows)), encoding="utf-8")
    shown = list(ROW.finditer(README.read_text(encoding="utf-8")))
    assert len(shown) == len(measured)
    for match, (case, loss, norm) in zip(shown, measured, strict=True):
        assert tuple(map(int, match.groups()[:4])) == (case.tp, case.ep, case.zero, case.world)
        for text, value in ((match[5], loss), (match[6], norm)):
            assert len(text.replace(".", "").lstrip("0")) <= 6 and float(text) == pytest.approx(value, rel=2e-6)
        assert all(text == "–" or float(text) < 1e-6 for text in (match[7], match[8]))


def write_table(file: Path, rows: list) -> None:
    """The matrix as Markdown."""
    kinds = ("losses", "norms", "gradients", "parameters", "averages")
    lines = [
        "Each row trains 5 updates of a small model in fp32 at one layout and on one process (ZeRO-0), and shows",
        "the largest deviation over steps or tensors **in units of the limit**: 1e-5 relative for losses and clip",
        "norms; ‖a-b‖ ≤ 1e-5·‖b‖ + 1e-6·‖all‖ for tensors (gradients of the first step, parameters and averages after",
        "the fifth). 1.0 would fail. Clipping is active; AdamW's eps is 1e-3, because otherwise the rounding noise of",
        "gradients that are mathematically zero would become full steps.",
        "",
        "Written by `make equality`.",
        "",
        "| case | " + " | ".join(kinds) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for name, deviations_of_case in rows:
        lines.append(f"| {name} | " + " | ".join(f"{deviations_of_case[kind][0]:.3f}" for kind in kinds) + " |")
    worst = max(value for _, deviations_of_case in rows for value, _ in deviations_of_case.values())
    lines += ["", f"{len(rows)} cases, largest deviation {worst:.3f} of the limit."]
    write_section(file, "Every layout trains the same function", "\n".join(lines))
