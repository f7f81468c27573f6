"""ProMoE's layer in somebody's own transformer, on one device.

python examples/own_transformer.py
"""

import torch
from torch import nn

from megapromoe.nn import MoE, auxiliary_loss


class Block(nn.Module):
    """A transformer block with experts in place of its MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.moe = MoE(hidden_size=width, num_experts=8, expert_width=width, top_k=1, router="promoe")

    def forward(self, x, num_conditional):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        y, auxiliary = self.moe(self.norm2(x), num_conditional=num_conditional)
        return x + y, auxiliary


class Transformer(nn.Module):
    """Two blocks that map tokens to tokens."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, width)

    def forward(self, x, num_conditional):
        auxiliaries = []
        for block in self.blocks:
            x, auxiliary = block(x, num_conditional)
            auxiliaries.append(auxiliary)
        return self.head(x), auxiliaries


def batch(seed: int) -> tuple[torch.Tensor, int]:
    """Eight images of 16 tokens; the last one has no class, and visits the unconditional expert."""
    return torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(seed)), 7


def main() -> None:
    torch.manual_seed(0)
    model = Transformer().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(30):
        x, num_conditional = batch(step)
        prediction, auxiliaries = model(x, num_conditional)
        loss = nn.functional.mse_loss(prediction, x.flip(-1)) + 0.1 * auxiliary_loss(auxiliaries)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 29 == 0:
            load = [int(rows) for rows in auxiliaries[0].load_E]
            print(f"step {step + 1}: loss {float(loss.detach()):.3f}, tokens of each expert of the first layer {load}")


if __name__ == "__main__":
    main()
