"""Keys of DeepSpeed's JSON: supported ones train as a plain file does, and each that DeepSpeed reads is known."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.levels import full
from support.processes import run
from support.trajectory import small, train

from megapromoe.config.deepspeed_keys import OFFLOAD, OURS, REFUSED, SUPPORTED, ZERO
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.engine import Engine
from megapromoe.nn.parallelize import build

LAYOUT = ("parallel.ep=2", "train.accumulation=2", "model.depth=2")
EVERY, SHARDED, FLAT, STAGE_3 = (0, 1, 2, 3), (1, 2, 3), (1, 2), (3,)
# A value other than DeepSpeed's default for each supported key that is no block, and the stages at which it is tried.
VALUES: dict[str, tuple[object, tuple[int, ...]]] = {
    f"{ZERO}.contiguous_gradients": (False, STAGE_3),
    f"{ZERO}.reduce_scatter": (True, SHARDED),
    f"{ZERO}.reduce_bucket_size": (3000, SHARDED),
    f"{ZERO}.use_multi_rank_bucket_allreduce": (False, FLAT),
    f"{ZERO}.allgather_partitions": (False, FLAT),
    f"{ZERO}.allgather_bucket_size": (1000, FLAT),
    f"{ZERO}.overlap_comm": (True, SHARDED),
    f"{ZERO}.round_robin_gradients": (True, FLAT),
    f"{ZERO}.parameter_alignment": (True, FLAT),
    f"{ZERO}.ignore_unused_parameters": (False, FLAT),
    f"{ZERO}.sub_group_size": (1000, STAGE_3),
    f"{ZERO}.stage3_prefetch_bucket_size": (0, STAGE_3),
    f"{ZERO}.stage3_param_persistence_threshold": (600, STAGE_3),
    f"{ZERO}.stage3_model_persistence_threshold": (1000, STAGE_3),
    f"{ZERO}.stage3_max_live_parameters": (100, STAGE_3),
    f"{ZERO}.stage3_max_reuse_distance": (0, STAGE_3),
    f"{ZERO}.stage3_use_all_reduce_for_fetch_params": (True, STAGE_3),
    f"{ZERO}.stage3_allgather_sequential": (True, STAGE_3),
    f"{ZERO}.memory_efficient_linear": (False, STAGE_3),
    f"{ZERO}.override_module_apply": (False, STAGE_3),
    f"{ZERO}.log_trace_cache_warnings": (True, STAGE_3),
    f"{ZERO}.enable_sanity_checks": (True, STAGE_3),
    "zero_allow_untested_optimizer": (False, EVERY),
    "zero_force_ds_cpu_optimizer": (False, EVERY),
    "steps_per_print": (1, EVERY),
    "wall_clock_breakdown": (True, EVERY),
    "memory_breakdown": (True, EVERY),
    "dump_state": (True, EVERY),
    "comms_logger": ({"enabled": True, "prof_all": True, "verbose": True, "debug": True}, EVERY),
    "communication_data_type": ("fp32", EVERY),
    "timers": ({"throughput": {"enabled": False, "synchronized": False}}, EVERY),
    "flops_profiler": (
        {
            **{"enabled": True, "profile_step": 2, "module_depth": -1, "top_modules": 1, "detailed": False},
            "output_file": "/dev/null",
        },
        EVERY,
    ),
    "csv_monitor": ({"enabled": True, "output_path": "FOLDER", "job_name": "csv"}, EVERY),
    "tensorboard": ({"enabled": True, "output_path": "FOLDER", "job_name": "events"}, EVERY),
}


def with_key(content: dict, key: str, value: object) -> None:
    """Sets a key of a file's content, given by its dotted name."""
    *blocks, name = key.split(".")
    for block in blocks:
        content = content.setdefault(block, {})
    content[name] = value


def trained(folder: Path, stage: int, *keys: str, world: int = 4, **blocks: dict) -> list[float]:
    """The losses of two steps on `world` ranks with a file that sets the values of `keys`."""
    content: dict = {ZERO: {"stage": stage}, **blocks}
    for key in keys:
        with_key(content, key, VALUES[key][0])
    out = folder / ("-".join(keys) or "plain")[:80]
    out.mkdir()
    path = out / "own.json"
    path.write_text(json.dumps(content).replace("FOLDER", str(out)))
    return run(world, train, (*LAYOUT, f"train.deepspeed={path}"), str(out), 2)[0].losses


def keys_of(stage: int) -> list[str]:
    return [key for key, (_, stages) in VALUES.items() if stage in stages]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Callable[..., list[float]]:
    """Losses of a stage on 4 ranks or on `world` with a file that sets the stage alone."""
    return functools.cache(lambda stage, world=4: trained(tmp_path_factory.mktemp("plain"), stage, world=world))


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_supported_keys_together_train_as_a_plain_file(stage, plain, tmp_path):
    assert trained(tmp_path, stage, *keys_of(stage)) == pytest.approx(plain(stage), rel=1e-6)


@pytest.mark.full
@pytest.mark.parametrize(
    "stage, key", [(stages[number % len(stages)], key) for number, (key, (_, stages)) in enumerate(VALUES.items())]
)
def test_each_supported_key_trains_as_a_plain_file(stage, key, plain, tmp_path):
    """At one of its stages on two ranks; at the others and on four it is tried together with all others, above."""
    assert trained(tmp_path, stage, key, world=2) == pytest.approx(plain(stage, 2), rel=1e-6)


@pytest.mark.parametrize("stage, pin", [full(1, True), full(1, False), full(2, True), (2, False)])
def test_offload_to_the_host_trains_as_a_plain_file(stage, pin, plain, tmp_path):
    offload = {"stage": stage, "offload_optimizer": {"device": "cpu", "pin_memory": pin}}
    blocks = {ZERO: offload, "zero_force_ds_cpu_optimizer": False}
    assert trained(tmp_path, stage, **blocks) == pytest.approx(plain(stage), rel=1e-6)


@pytest.mark.parametrize(
    "stage, block",
    [
        full(1, {"check_grad_overflow": False}),
        full(2, {"check_grad_overflow": False}),
        full(3, {"check_grad_overflow": False}),
        full(2, {"grad_accum_dtype": "fp32"}),
        full(2, {"grad_accum_dtype": "bf16"}),
        full(1, {"communication_data_type": "bf16"}),
        full(2, {"communication_data_type": "fp32"}),
        full(3, {"communication_data_type": "fp32"}),
    ],
    ids=str,
)
def test_keys_of_bf16_train_near_fp32(stage, block, plain, tmp_path):
    (name,) = block
    bf16 = {"enabled": True}
    blocks = {
        "check_grad_overflow": {"bf16": bf16 | block},
        "grad_accum_dtype": {"bf16": bf16, "data_types": block},
        "communication_data_type": {"bf16": bf16, **block},
    }[name]
    assert trained(tmp_path, stage, **blocks) == pytest.approx(plain(stage), rel=0.02)


def test_every_supported_key_is_tried():
    tried = {
        *VALUES,
        *(f"{block}.{name}" for block in VALUES if isinstance(VALUES[block][0], dict) for name in VALUES[block][0]),
    }
    tried |= {"timers.throughput.enabled", "timers.throughput.synchronized"}
    tried |= {"bf16", "bf16.enabled", "bf16.check_grad_overflow", "data_types", "data_types.grad_accum_dtype"}
    tried |= {ZERO, f"{ZERO}.stage", OFFLOAD, f"{OFFLOAD}.device", f"{OFFLOAD}.pin_memory"}
    assert tried == set(SUPPORTED)


# ---- what DeepSpeed reads


class Recorder(dict):
    """A configuration that notes the names of the keys that it is asked for."""

    def __init__(self, **content):
        super().__init__(content)
        self.names: set[str] = set()

    def get(self, key, default=None):
        self.names.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.names.add(key)
        return super().__contains__(key)

    def keys(self):
        return self

    def __copy__(self):
        return self


def test_every_key_that_deepspeed_reads_is_in_a_table():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    content = Recorder(train_micro_batch_size_per_gpu=1)
    DeepSpeedConfig(content)
    models = {
        ZERO: DeepSpeedZeroConfig,
        OFFLOAD: DeepSpeedZeroOffloadOptimizerConfig,
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
    }
    expected = content.names | {"sequence_parallel_size", "data_types.grad_accum_dtype"}
    for block, model in models.items():
        for name, field in model.model_fields.items():
            expected |= {f"{block}.{name}", f"{block}.{field.alias or name}"}
    types = ("GRAD_ACCUM_DTYPE", "PARAM_DTYPE", "BUFFER_DTYPE", "KEEP_IN_FP32_MODULES")
    expected |= {f"data_types.{getattr(constants, name)}" for name in types}
    assert len(expected) > 120
    assert expected - SUPPORTED.keys() - OURS.keys() - REFUSED.keys() == set()


# ---- what DeepSpeed refuses nonetheless


def engine_of(path: str, content: dict) -> None:
    """An engine whose DeepSpeed file is not checked, as if the tables had missed one of its keys."""
    import megapromoe.engine.engine as engine

    engine.load_deepspeed = lambda config: content
    config, mesh = small(), make_mesh()
    Engine(build(config, mesh), config, mesh)


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"amp": {"enabled": True}}, "DeepSpeedConfigError: NVIDIA Apex AMP integration has been removed"),
        ({ZERO: {"stage": 1, "no_such_key": 1}}, "ValidationError: 1 validation error for DeepSpeedZeroConfig"),
        ({ZERO: {"stage": 1, "legacy_stage1": True}}, "Exception: The deprecated version of ZeRO Stage 1"),
        ({ZERO: {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "ZeRORuntimeException: "),
    ],
)
def test_a_file_that_deepspeed_refuses_is_named_in_one_sentence(content, reason, tmp_path):
    with pytest.raises(AssertionError) as caught:
        run(1, engine_of, "own.json", content)
    sentence = str(caught.value).strip().splitlines()[-1]
    assert sentence.startswith(
        "megapromoe.engine.protocol.EngineError: train.deepspeed = 'fp32_zero1': DeepSpeed 0.19."
    )
    assert f"does not start with this file: {reason}" in sentence and "(deepspeed/runtime/" in sentence
