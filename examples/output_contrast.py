"""A loss that separates the outputs of experts, beside the losses of the layer, in a transformer of one's own.

    python examples/output_contrast.py

o_e is the mean output of the routed expert e over its tokens of the batch. The loss is the mean of
exp(-|o_i - o_j| / T) over all pairs of experts that have tokens: 1 if their outputs are equal, near 0 if they are far
apart.

It is for one device and for data parallelism, where each rank separates the outputs of its own batch, as in the
source. With expert parallelism a rank sees the outputs of its experts alone.

Source: the variant "expert_contra" (mode "output") of github.com/kmittle/ProMoE-Plus,
models/models_ProMoE_TC_expert_contra.py.
"""

import torch
from torch import Tensor, nn

from megapromoe.nn import MoE, MoEAuxiliary, auxiliary_losses

TEMPERATURE = 2.0  # suits the short vectors of this example; the source has 0.5


class ContrastedMoE(nn.Module):
    """ProMoE's layer whose auxiliary output also has the loss `output_contrast`."""

    def __init__(self, weight: float, **options):
        super().__init__()
        self.weight = weight
        self.moe = MoE(**options)
        self.moe.experts.register_forward_hook(self._pool)

    def _pool(self, experts: nn.Module, arguments: tuple, output_RD: Tensor) -> None:
        """Keeps the mean output of each expert that has rows. `arguments`: the rows, and which expert each is for."""
        expert_R = arguments[1].expert_R
        used, index_R, count = expert_R.unique(return_inverse=True, return_counts=True)
        sums = output_RD.new_zeros(len(used), output_RD.shape[1]).index_add(0, index_R, output_RD)
        self.mean_output = sums / count.unsqueeze(1)

    def forward(self, x: Tensor, num_conditional: int | None = None) -> tuple[Tensor, MoEAuxiliary]:
        y, auxiliary = self.moe(x, num_conditional)
        mean_output, self.mean_output = self.mean_output, self.mean_output.detach()  # keeps no graph
        if not self.training:
            return y, auxiliary
        losses = {**auxiliary.losses, "output_contrast": self.weight * repulsion(mean_output)}
        return y, auxiliary._replace(losses=losses)


def repulsion(vector_ED: Tensor) -> Tensor:
    """The mean of exp(-|v_i - v_j| / T) over all pairs; 0 for fewer than two vectors."""
    if len(vector_ED) < 2:
        return vector_ED.sum() * 0
    return (-nn.functional.pdist(vector_ED.float()) / TEMPERATURE).exp().mean()


def trained(weight: float, steps: int) -> tuple[float, float]:
    """Trains a layer to reverse the channels of tokens; returns its last error, and the distance of mean outputs."""
    torch.manual_seed(0)
    layer = ContrastedMoE(weight, hidden_size=32, num_experts=4, expert_width=32, unconditional_expert=False).train()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    for step in range(steps):
        x = torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(step))
        y, auxiliary = layer(x)
        losses = auxiliary_losses([auxiliary])
        error = nn.functional.mse_loss(y, x.flip(-1))
        optimizer.zero_grad()
        (error + 0.1 * losses["rcl"].sum() + losses["output_contrast"].sum()).backward()
        optimizer.step()
    return float(error.detach()), float(nn.functional.pdist(layer.mean_output).mean())


def main(steps: int = 100) -> None:
    for weight in (0.0, 1.0):
        error, distance = trained(weight, steps)
        print(f"weight {weight:g}: error {error:.3f}, mean distance of mean outputs {distance:.3f}")


if __name__ == "__main__":
    main()
