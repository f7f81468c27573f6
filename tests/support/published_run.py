"""The short training run of the published code (golden/README.md): its recipe, its steps by ours, its results."""

import torch
from support.golden_cases import config_of, null_last, tensors_of

from megapromoe.checkpoint.manager import restore
from megapromoe.config.options import Config
from megapromoe.config.train_options import TrainConfig
from megapromoe.conversion.published_names import from_published
from megapromoe.diffusion.objectives import RectifiedFlow
from megapromoe.distributed.mesh import make_mesh
from megapromoe.distributed.shard_ranges import ShardRange, copy_range
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.nn.parallelize import build

DECAY = 0.9999
RECIPE = TrainConfig(lr=1e-3, max_grad_norm=0.5, ema_decay=DECAY, global_batch=8, deepspeed="fp32_zero1")


def config() -> Config:
    return Config(model=config_of("published_run").model, train=RECIPE)


class FullTensors:
    """Full tensors in place of a checkpoint: `state[kind][name]`, without buffers."""

    def __init__(self, state):
        self.state = state

    def read_range(self, kind: str, name: str, target: ShardRange, out: torch.Tensor) -> None:
        tensor = self.state[kind][name].contiguous()
        copy_range(target, out, ShardRange.of_tensor(tuple(tensor.shape)), tensor.view(-1))


def train(first: int, last: int, state: dict[str, dict[str, torch.Tensor]]) -> dict:
    """Steps first..last-1 of the published run from `state`: losses, norms, and the masters after every step."""
    mesh = make_mesh()
    engine = Engine(build(config(), mesh), config(), mesh)
    ema = EMA(engine, [DECAY])
    restore(engine, ema, FullTensors(state), updates=first)
    objective = RectifiedFlow("uniform")  # the published sigma is given: u itself
    recorded = {"mse": [], "aux": [], "norm": [], "masters": []}
    for step in range(first, last):
        given = tensors_of("published_run", f"step{step}")
        order, conditional = null_last(given["y"], config().model.null_class)
        clean, noise, sigma, y = (given[n][order] for n in ("latents", "noise", "sigma", "y"))
        x, t = objective.corrupt(clean, noise, sigma)

        def loss(prediction, auxiliary, clean=clean, noise=noise, sigma=sigma):
            mse = objective.loss(prediction, clean, noise, sigma)
            return mse + auxiliary.total(), (mse.detach(), sum(auxiliary.losses.values()).detach())

        mse, aux = engine.micro_step(x, t, y, conditional, loss=loss)
        recorded["mse"].append(mse)
        recorded["aux"].append(aux)
        result = engine.step(RECIPE.lr)
        recorded["norm"].append(result.norm)
        ema.update(result)
        recorded["masters"].append(masters(engine))
    engine.close()
    return recorded


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    """On one rank a logical tensor is the local one."""
    out = {name: torch.zeros(layout.shape) for name, layout in engine.layouts.items()}
    for partition in engine.partitions:
        for p in partition.pieces:
            out[p.name].view(-1)[p.start : p.stop] = partition.master.detach()[p.offset : p.offset + p.stop - p.start]
    return out


def assert_reproduced(recorded: dict, first: int) -> None:
    expected = tensors_of("published_run", "final")
    for i, step in enumerate(range(first, 6)):
        given = tensors_of("published_run", f"step{step}")
        torch.testing.assert_close(recorded["mse"][i], given["loss"], rtol=1e-5, atol=0)
        # The published code forms this loss in float32 from logits near 1/0.07, whose last digit is worth 9.5e-7.
        torch.testing.assert_close(recorded["aux"][i], given["aux"], rtol=1e-5, atol=5e-7)
        total, theirs = recorded["mse"][i] + recorded["aux"][i].sum(), given["loss"] + given["aux"].sum()
        torch.testing.assert_close(total, theirs, rtol=1e-5, atol=0)
        assert abs(recorded["norm"][i] / float(given["grad_norm"]) - 1) < 1e-5, f"step {step}"
    final = from_published(expected, config().model)
    assert len(final) > 30
    for name, theirs in final.items():
        ours = recorded["masters"][-1][name]
        if name.endswith("attn.qkv.bias"):
            # The gradient of a key's bias is zero by mathematics; AdamW makes full steps of its rounding noise.
            width = config().model.hidden_size
            ours, theirs = (torch.cat([w[:width], w[2 * width :]]) for w in (ours, theirs))
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7, name
