"""The planned collectives, and states in memory, against those of real training steps: calls, groups and bytes."""

import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.meshes import meshes_made_once
from support.placements import placement_file
from support.processes import run
from support.trajectory import small

from megapromoe.config.options import Config
from megapromoe.distributed.mesh import Mesh, rank_tables
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.nn.parallelize import build
from megapromoe.nn.text_condition import TextCondition
from megapromoe.planning.cost import memory_per_rank
from megapromoe.planning.traffic import Batch, collectives

OPS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}
OTHERS = ("broadcast", "reduce", "reduce_scatter", "all_to_all", "gather", "scatter", "all_gather_object", "barrier")
NULL = 1  # null images of a micro-batch


def payload(name: str, arguments: list) -> int:
    """Bytes handed in; of a gather, those got."""
    place = 1 if name in ("reduce_scatter_tensor", "all_to_all_single") else 0
    tensors = arguments[place] if isinstance(arguments[place], list) else [arguments[place]]
    return sum(t.numel() * t.element_size() for t in tensors)


class Listener:
    """Notes every collective: (ours, op, ranks of the group) -> [calls, bytes]."""

    def __init__(self):
        self.on = False
        self.measured: dict = {}
        for name in (*OPS, *OTHERS):  # before DeepSpeed takes some of them by value
            self.listen(name)

    def listen(self, name: str) -> None:
        real = getattr(dist, name)

        def call(*arguments, **named):
            group = named.get("group") or next((a for a in arguments if isinstance(a, dist.ProcessGroup)), None)
            ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
            if self.on and len(ranks) > 1:
                ours = not sys._getframe(1).f_globals["__name__"].startswith("deepspeed")
                line = self.measured[ours, OPS.get(name, name), ranks]
                line[0] += 1
                line[1] += payload(name, [*arguments, *named.values()]) if name in OPS else 0
            return real(*arguments, **named)

        setattr(dist, name, call)


def recorded(cases: list[tuple[str, ...]]) -> list[tuple[dict, dict]]:
    """Of each case, what a rank's optimizer step calls, after two others; and the bytes of its states."""
    listener, mesh_of = Listener(), meshes_made_once()
    return [record(listener, config, mesh_of(config)) for config in (small(*overrides) for overrides in cases)]


def record(listener: Listener, config: Config, mesh: Mesh) -> tuple[dict, dict]:
    engine = Engine(build(config, mesh, placements=config.placements_in_file()), config, mesh)
    ema = EMA(engine, config.train.ema_decays)
    B = config.layout(mesh.world_size).micro_batch
    generator = torch.Generator().manual_seed(mesh.dp.rank)
    listener.measured = defaultdict(lambda: [0, 0])
    for step in range(3):  # at first, stage 3 compares notes and traces the model
        listener.on = step == 2
        for micro in range(config.train.accumulation):
            x, t = torch.randn(B, 4, 8, 8, generator=generator), 1000 * torch.rand(B, generator=generator)
            y: torch.Tensor | TextCondition = torch.randint(10, (B,), generator=generator)
            y[B - NULL :] = 10
            if config.model.has_text:
                N, width = config.model.text_tokens, config.model.text_width
                y = TextCondition(torch.randn(B, N, width, generator=generator), torch.ones(B, N, dtype=torch.bool))

            def loss(prediction, auxiliary):
                total = prediction.float().square().mean() + auxiliary.total()
                return total, total.detach()

            report = engine.micro_step(x, t, y, B - NULL, loss=loss)
            if micro < config.train.accumulation - 1:
                engine.finish_micro_step()
        engine.step(1e-3, report)
    listener.on = False
    parameters = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    states = {
        "parameters": sum(p.numel() * p.element_size() for p in parameters),
        "optimizer": sum(m.nbytes for p in engine.partitions for m in engine.moments(p).values()),
        "ema": sum(a.nbytes for averages in ema.averages for a in averages),
    }
    if engine.stage:
        states["optimizer"] += sum(p.master.nbytes for p in engine.partitions)
    engine.close()
    return {key: tuple(line) for key, line in listener.measured.items()}, states


def planned(overrides: tuple[str, ...], world: int, rank: int) -> dict:
    """The calls of a rank, from the plan."""
    config = small(*overrides)
    layout = config.layout(world)
    tables = rank_tables(world, layout.tp, layout.ep, config.parallel.expert_tp, layout.shard_ranks)
    lines = defaultdict(lambda: [0, 0.0])
    for c in collectives(config, layout, Batch(layout.micro_batch, layout.micro_batch - NULL)):
        ranks = next(tuple(map(int, row)) for row in tables[c.over] if rank in row)
        assert len(ranks) == c.size
        # On gloo our reduce-scatter is an all-to-all of as many bytes.
        op = "all_to_all" if c.op == "reduce_scatter" and c.ours else c.op
        line = lines[c.ours, op, ranks]
        line[0] += c.count
        line[1] += c.count * c.payload
    return {key: tuple(line) for key, line in lines.items()}


def compare(
    world: int,
    cases: list[tuple[str, ...]],
    calls_of_deepspeed: bool = True,
    all_to_all: float = 1e-12,
    uncounted: str = "",
) -> None:
    """Everything exactly, but for calls of DeepSpeed's where asked: it may come in more buckets than one.

    `all_to_all`: relative tolerance of its bytes. `uncounted`: an operation whose calls are not compared.
    """
    ranks = run(world, recorded, cases)
    for number, overrides in enumerate(cases):
        travelled, expected = 0, 0.0
        for rank in range(world):
            measured, states = ranks[rank][number]
            plan = planned(overrides, world, rank)
            assert measured.keys() == plan.keys(), overrides
            for key, (calls, size) in plan.items():
                ours, op, _ = key
                if (ours or calls_of_deepspeed) and op != uncounted:
                    assert measured[key][0] == calls, (overrides, key)
                if op == "all_to_all":  # what a rank sends back is what it got: the sum over ranks is fixed
                    travelled, expected = travelled + measured[key][1], expected + size
                else:
                    assert measured[key][1] == pytest.approx(size, rel=1e-12), (overrides, key)
            memory = memory_per_rank(small(*overrides), world)
            assert states == {name: getattr(memory, name) for name in states}, overrides
        assert travelled == pytest.approx(expected, rel=all_to_all), overrides


TWO = ("model.depth=2",)
TEXT = ("data.source=unset", "model.condition=text", "model.num_classes=1000", "model.text_width=6")
TEXT = (*TEXT, "model.text_tokens=5")


@pytest.mark.full
def test_traffic_of_layouts():
    """ZeRO-1 in fp32, every tp and ep of 1, 2 and 4 over 4 ranks."""
    cases = [(*TWO, f"parallel.tp={tp}", f"parallel.ep={ep}") for tp in (1, 2, 4) for ep in (1, 2, 4)]
    compare(4, cases)


@pytest.mark.full
def test_traffic_with_data_ranks_beside_both():
    compare(8, [(*TWO, "parallel.tp=4", "parallel.ep=4")])


@pytest.mark.full
def test_traffic_of_models():
    what = (
        ("parallel.expert_tp=true", "model.qk_norm=layer", "train.deepspeed=fp32_zero0"),
        ("parallel.recompute=blocks", "train.accumulation=2", "train.deepspeed=bf16_zero2", "model.num_experts=3"),
        ("model.top_k=2", "model.balance_weight=0.1", "model.unconditional_expert=false"),
        ("parallel.recompute=blocks", "model.moe_every=1", "model.batch_scope=rank"),
        ("model.router=promoe_ec", "parallel.recompute=blocks", "train.accumulation=2"),
        ("model.router=tc", "model.balance_weight=0.1", "model.balance_form=sequence"),
        ("model.router=classification", "model.qk_norm=layer", "train.ema_decay=[0.9,0.5]"),
        ("model.router=kmeans",),
        ("model.router=promoe_linear", "model.balance_weight=0.1", "model.balance_bias=0.01"),
        ("model.router=race", "model.batch_scope=rank"),
        ("model.router=gmm", "model.balance_weight=0.1", "parallel.recompute=all"),
        ("parallel.recompute=moe", "model.capacity_factor=1.5"),
        ("parallel.recompute=all", "model.balance_weight=0.1"),
        ("parallel.recompute=all", "model.router=kmeans"),
        ("model.num_shared_experts=3", "model.shared_expert_width=20", "model.num_unconditional_experts=2"),
        ("model.modulation=shared", "model.qk_norm=rms", "model.activation=swiglu", "parallel.recompute=all"),
        (*TEXT, "model.text_ffn=24", "parallel.recompute=blocks"),
    )
    compare(4, [(*TWO, "parallel.tp=2", "parallel.ep=2", *more) for more in what])


def test_traffic_of_placed_experts(tmp_path):
    """Uneven numbers of experts, another one in each block, in traffic and states; and with a capacity."""
    placed = ("parallel.ep=2", "model.num_experts=12")
    file = placement_file(tmp_path, 12, 2)
    slots = small(*placed, f"parallel.placement={file}").layout(2).placed_slots
    assert len(set(slots)) == 2 and min(slots) > 6
    placed = (*placed, f"parallel.placement={file}")
    compare(2, [placed, (*placed, "model.capacity_factor=1.5", "parallel.recompute=moe")])


@pytest.mark.full
def test_traffic_of_copied_experts(tmp_path):
    """Weights of copies to their ranks and gradients back, other numbers of them in each block."""
    what = ("parallel.ep=4", "model.num_experts=12")
    file = placement_file(tmp_path, 12, 4, copies=True)
    what = (*what, f"parallel.placement={file}")
    replicas = small(*what).layout(4).replicas
    assert len(set(replicas)) == 2 and all(slots > 0 and slots < copies < 4 * slots for slots, copies in replicas)
    compare(4, [what, (*what, "parallel.recompute=moe", "train.accumulation=2", "train.deepspeed=bf16_zero2")])


def test_traffic_of_dense_models_and_diffmoe():
    dense = ("model.router=dense", "parallel.tp=2", "parallel.recompute=blocks")
    conditional = ("model.router=conditional", "parallel.tp=2", "parallel.recompute=all")
    batches = ((*TWO, f"model.router={router}") for router in ("diffmoe", "race"))
    compare(2, [(*TWO, *dense), (*TWO, *conditional), *batches])


@pytest.mark.full
def test_traffic_and_states_of_muon(tmp_path):
    """Exactly, but for the bytes of cut matrices, which a plan estimates. Borders of partitions are within matrices."""
    what = (*TWO, "train.global_batch=18", "train.optimizer=muon", "model.expert_width=44")
    scattered = (*what, with_buckets(tmp_path, 1), "train.gradient_reduction=reduce_scatter")
    compare(3, [what], all_to_all=0.7)
    compare(3, [scattered], all_to_all=0.7, uncounted="all_to_all")  # where no border cuts a matrix there is no call


def with_buckets(folder: Path, stage: int, **top: object) -> str:
    """`train.deepspeed` with buckets that hold a block or a few parameters of one."""
    path = folder / f"stage{stage}-{len(top)}.json"
    zero = {"stage": stage, "reduce_scatter": True, "reduce_bucket_size": 5000, "overlap_comm": True}
    path.write_text(json.dumps({"zero_optimization": zero, "zero_allow_untested_optimizer": True, **top}))
    return f"train.deepspeed={path}"


def test_each_gradient_is_sent_once_and_each_parameter_once(tmp_path):
    """A reduce-scatter of each parameter group, in each micro-batch at stage 2: calls, bytes and padding exactly."""
    once = (*TWO, "parallel.ep=2", with_buckets(tmp_path, 1), "train.accumulation=2")
    twice = (*TWO, "parallel.ep=2", "train.accumulation=2", "train.gradient_reduction=all_reduce")
    each_micro_batch = (*TWO, "parallel.ep=2", with_buckets(tmp_path, 2), "train.accumulation=2")
    compare(4, [once, twice, each_micro_batch])

    def sent(overrides: tuple[str, ...], what: str) -> list[float]:
        config = small(*overrides)
        return [c.wire for c in collectives(config, config.layout(4)) if c.what == what]

    for what in ("gradients", "expert gradients"):
        gathered = sent(once, what.replace("gradients", "parameters"))
        assert len(gathered) > 1 and sent(once, what) == gathered
        assert sent(each_micro_batch, what) == [2 * size for size in gathered]
        assert sum(sent(twice, what)) == pytest.approx(2 * sum(gathered), rel=1e-3)


@pytest.mark.full
def test_shards_of_some_ranks_are_summed_once(tmp_path):
    """A reduce-scatter and a gather inside, in each micro-batch at stage 2; and a sum over replicas in the last one.

    The cases divide experts over two ranks or one, and the states in memory are those of as many ranks.
    """
    twice = (*TWO, "train.accumulation=2", "parallel.shard_ranks=2")
    stages = [(*twice, with_buckets(tmp_path, stage)) for stage in (1, 2)]
    compare(4, [*stages, (*stages[1], "parallel.ep=2"), (*stages[0], "parallel.ep=2", "parallel.tp=2")])

    def sent(over: str) -> dict[str, float]:
        """Bytes of a rank in each direction of dp or edp."""
        config, result = small(*stages[1]), defaultdict(float)
        for c in collectives(config, config.layout(4)):
            if c.phase in ("gradients", "update") and c.over.startswith(over):
                result[c.over.removeprefix(over) + " " + c.op] += c.wire
        return result

    for over in ("dp", "edp"):
        inside = sent(over)
        parameters = 2 * inside["_shard all_gather"]  # half of the parameters is of the other rank
        assert inside["_shard reduce_scatter"] == parameters
        assert inside["_replicas all_reduce"] == pytest.approx(parameters / 2)
        assert inside.keys() == {"_shard all_gather", "_shard reduce_scatter", "_replicas all_reduce"}


@pytest.mark.full
def test_parameter_groups_of_every_model(tmp_path):
    """The plan knows the parameters of each group, by the padding of each group."""
    what = (
        *((f"model.router={router}",) for router in ("dense", "conditional", "promoe_ec", "tc", "classification")),
        *((f"model.router={router}",) for router in ("kmeans", "gmm", "promoe_linear")),
        *((f"model.router={router}", "parallel.tp=1") for router in ("race", "diffmoe")),
        ("model.num_shared_experts=3", "model.shared_expert_width=20", "model.num_unconditional_experts=2"),
        ("model.modulation=shared", "model.qk_norm=layer", "model.activation=swiglu", "model.norm=rms"),
        ("model.shared_expert=false", "model.moe_every=1", "model.qk_norm=rms"),
        (*TEXT, "model.text_ffn=24"),
        (with_buckets(tmp_path, 2, communication_data_type="bf16"),),
    )
    compare(4, [(*TWO, "parallel.tp=2", with_buckets(tmp_path, 1), *more) for more in what])


# Large parameters are gathered twice for each micro-batch, as they are in models of billions.
FORGETFUL = {
    "stage3_param_persistence_threshold": 600,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


@pytest.mark.full
def test_traffic_of_stage_3(tmp_path):
    """Bytes and groups; how many calls they come in is left to DeepSpeed."""
    cases = []
    for name, knobs in (("defaults", {}), ("forgetful", FORGETFUL)):
        path = tmp_path / f"{name}.json"
        zero = {"stage": 3, "reduce_scatter": True, "contiguous_gradients": True, "overlap_comm": False, **knobs}
        path.write_text(json.dumps({"zero_optimization": zero, "zero_allow_untested_optimizer": True}))
        for recompute in ("none", "blocks", "all"):
            what = ("parallel.ep=2", f"train.deepspeed={path}", f"parallel.recompute={recompute}")
            cases.append((*TWO, *what, "train.accumulation=2"))
    compare(4, cases, calls_of_deepspeed=False)
