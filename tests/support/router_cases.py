"""Small routers with random weights and tokens that tests of routers share."""

import torch

from megapromoe.config.model_options import ModelConfig

D, S, E = 16, 9, 5


def config_of(**changes) -> ModelConfig:
    defaults = {"hidden_size": D, "depth": 2, "heads": 2, "num_experts": E, "input_size": 6}
    return ModelConfig(**{**defaults, **changes})


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data.normal_(0, 0.4, generator=g)
    return module


def tokens(B: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(seed))
