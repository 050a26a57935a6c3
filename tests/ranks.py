"""What each rank of test_distributed.py does: a model and an estimator with two baselines under DDP."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributions as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradlab as gl


class Objective(nn.Module):
    """The model and its estimator in one module, so that DDP averages the gradients of both."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.learned = gl.ScoreFunction(2, gl.Learned(nn.Linear(4, 1)))
        self.average = gl.ScoreFunction(2, gl.MovingAverage())

    def forward(self, x: Tensor) -> Tensor:
        q = td.Independent(td.Bernoulli(logits=self.encoder(x)), 1)

        def cost(z: Tensor) -> Tensor:
            return (z.sum(-1) - x.sum(-1)) ** 2

        return (self.learned(q, cost, context=x) + self.average(q, cost)).mean()


def main() -> None:
    """Train a few steps and check what must agree between ranks, and what must not."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(Objective(), broadcast_buffers=False)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(rank)
    for _ in range(5):
        optimiser.zero_grad()
        model(torch.randn(8, 4) + rank).backward()
        optimiser.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    everywhere = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(everywhere, weights)
    assert torch.equal(*everywhere), "the parameters of the ranks differ"
    assert model.module.learned.baseline.net.weight.grad.abs().sum() > 0, "the baseline does not learn"
    averages = [torch.empty(()) for _ in range(2)]
    dist.all_gather(averages, model.module.average.baseline.average)
    assert averages[0] != averages[1], "the moving average is not per rank"
    print(f"rank {rank} ok", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
