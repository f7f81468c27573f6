"""An engine on random input whose collectives are noted, and DeepSpeed files with buckets as small as the model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from support.trajectory import small, stir

from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.engine import Engine
from megapromoe.nn.parallelize import build


def small_buckets(folder: Path, stage: int, overlap: bool = True, **top: object) -> str:
    """A DeepSpeed file whose buckets are smaller than an expert bank (8,192 elements), and hold several others."""
    zero = {"stage": stage, "reduce_bucket_size": 3000, "overlap_comm": overlap, "reduce_scatter": True}
    path = folder / f"stage{stage}-{overlap}.json"
    path.write_text(json.dumps({"zero_optimization": zero, "zero_allow_untested_optimizer": True, **top}))
    return f"train.deepspeed={path}"


class Watched:
    """An engine whose collectives in the backward pass are noted.

    Attributes:
        sent: the function of torch.distributed and the ranks of each, in order.
    """

    def __init__(self, *overrides: str):
        config = small(*overrides)
        p = config.parallel
        self.mesh = make_mesh(p.tp, p.ep, p.expert_tp, 60, p.shard_ranks)
        model = build(config, self.mesh)
        stir(model, self.mesh)
        self.engine = Engine(model, config, self.mesh)
        self.sent: list[tuple[str, tuple[int, ...]]] = []

    def backward(self, loss_of) -> torch.Tensor:
        """A micro-step on random input."""
        generator = torch.Generator().manual_seed(self.mesh.dp.rank)
        B = self.engine.config.layout(self.mesh.world_size).micro_batch
        x, t = torch.randn(B, 4, 8, 8, generator=generator), 1000 * torch.rand(B, generator=generator)
        y = torch.randint(10, (B,), generator=generator)
        y[-1] = 10

        def loss(prediction, auxiliary):
            total = loss_of(prediction, auxiliary)
            return total, total.detach()

        with noted("all_to_all_single", self.sent), noted("all_reduce", self.sent):
            return self.engine.micro_step(x, t, y, B - 1, loss=loss)


@contextmanager
def noted(name: str, calls: list) -> Iterator[None]:
    """Appends the name and the ranks of each call of a collective that names its group."""
    real = getattr(dist, name)

    def call(*arguments, **named):
        calls.append((name, tuple(dist.get_process_group_ranks(named["group"]))))
        return real(*arguments, **named)

    setattr(dist, name, call)
    try:
        yield
    finally:
        setattr(dist, name, real)


def whole_loss(prediction, auxiliary):
    return prediction[:, :4].float().square().mean() + auxiliary.total()
