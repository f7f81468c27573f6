"""Folders that DeepSpeed's own engine writes under ZeRO-1 and 2 in half precision: masters come from float32 shards."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from support.processes import run

from megapromoe.config.resolve import resolve
from megapromoe.conversion.formats import open_state
from megapromoe.conversion.stream import ConversionError
from megapromoe.distributed.mesh import UNSHARDED
from megapromoe.nn.parallelize import build

DENSE = ["model.router=dense", "model.hidden_size=32", "model.depth=2", "model.heads=2"]
KINDS = {"master": None, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def config():
    return resolve("digits", overrides=DENSE)


class Wrapped(torch.nn.Module):
    """Puts `module.` before each name."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


def trained_by_deepspeed(folder: Path, stage: int, precision: str, named: str) -> dict[str, dict[str, torch.Tensor]]:
    """Two steps of DeepSpeed's engine, saved; returns masters and moments as DeepSpeed tells them."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile C++
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    model = build(config(), UNSHARDED)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    if named == "wrapped":
        model = Wrapped(model)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors}], lr=1e-3)
    settings = {"train_batch_size": 2, "zero_optimization": {"stage": stage}, precision: {"enabled": True}}
    if precision == "fp16":
        settings["fp16"]["initial_scale_power"] = 4
    accelerator = deepspeed.accelerator.get_accelerator()
    with mock.patch.object(type(accelerator), "is_fp16_supported", lambda self: True):  # slow where it says no
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    x_BCHW = torch.randn(4, 1, 8, 8, generator=generator)
    for step in range(2):
        prediction, _ = engine(x_BCHW, 300.0 * torch.arange(4), torch.tensor([1, 2, 10, 10]), 2)
        engine.backward((prediction.float() - step).square().mean())
        engine.step()
    zero = engine.optimizer
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for p in group:  # DeepSpeed links them before the first step, when there are no moments yet
            if p._hp_mapping is not None:
                p._hp_mapping.set_optim_state_fragment(flat, zero.optimizer.state[flat])
    engine.save_checkpoint(str(folder))
    return {
        name: {kind: (safe_get_full_fp32_param(p) if key is None else safe_get_full_optimizer_state(p, key)).clone()
               for kind, key in KINDS.items()}
        for name, p in model.named_parameters()
    }  # fmt: skip


@pytest.mark.parametrize(
    "stage, precision, named",
    [
        (1, "bf16", "plain"),
        pytest.param(2, "bf16", "wrapped", marks=pytest.mark.full),
        pytest.param(2, "fp16", "plain", marks=pytest.mark.full),
    ],
)
def test_masters_and_moments_are_the_float32_ones(tmp_path, stage, precision, named):
    expected_tensors = run(2, trained_by_deepspeed, tmp_path, stage, precision, named)[0]
    state = open_state(tmp_path, config=config())
    assert state.step == state.updates == 2 and set(state.kinds) == {"master", "ema", "exp_avg", "exp_avg_sq"}
    rounded = 0
    for name, kinds in expected_tensors.items():
        for kind, tensor in kinds.items():
            assert torch.equal(state.read(kind, name.removeprefix("module.")), tensor), (kind, name)
        half = kinds["master"].to(torch.bfloat16 if precision == "bf16" else torch.float16).float()
        rounded += int((half != kinds["master"]).sum())
    assert rounded > 1000  # the weights in half precision are not the masters
    assert any("masters are read from ZeRO's float32 shards" in note for note in state.notes)
    assert any("its AdamW has lr = 0.001" in note for note in state.notes)

    stale = next(tmp_path.glob("global_step2/*zero_pp_rank_1*"))
    content = torch.load(stale, weights_only=False)
    for partition in content["optimizer_state_dict"]["single_partition_of_fp32_groups"]:
        partition.data.mul_(1.5)
    torch.save(content, stale)
    with pytest.raises(ConversionError, match="the files are of different"):
        open_state(tmp_path, config=config())
