"""The same transformer with its experts over the ranks of a job: expert parallelism in a plain training loop.

torchrun --nproc-per-node 2 examples/over_ranks.py
"""

import torch
import torch.distributed as dist
from own_transformer import Transformer, batch
from torch import nn

from megapromoe.nn import auxiliary_loss, make_mesh, parallelize


def main() -> None:
    torch.manual_seed(0)
    model = Transformer().train()
    mesh = make_mesh(ep=dist.get_world_size())
    sharding = parallelize(model, mesh)  # before the optimizer: parameters of experts change their shapes
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(30):
        x, num_conditional = batch(step * mesh.dp.size + mesh.dp.rank)  # each data-parallel rank has other images
        prediction, auxiliaries = model(x, num_conditional)
        loss = nn.functional.mse_loss(prediction, x.flip(-1)) + 0.1 * auxiliary_loss(auxiliaries)
        optimizer.zero_grad()
        loss.backward()
        sharding.reduce_gradients()
        norm = sharding.clip_gradients(1.0)
        optimizer.step()
        if step % 29 == 0 and mesh.rank == 0:
            print(f"step {step + 1}: loss {float(loss.detach()):.3f}, gradient norm {float(norm):.3f}")
    state = sharding.state_dict()  # that of the undivided model, on every rank
    undivided = Transformer()
    undivided.load_state_dict(state)
    if mesh.rank == 0:
        experts = tuple(model.blocks[0].moe.experts.fc1.weight.shape)
        print(
            f"this rank has experts {experts}, the saved model {tuple(state['blocks.0.moe.experts.fc1.weight'].shape)}"
        )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
