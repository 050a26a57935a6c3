"""What each rank of test_distributed.py does: models, estimators with parameters of their own, and fit, under DDP."""

from __future__ import annotations

import copy
import json
import sys
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributions as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gradlab as gl
from gradlab import checkpoints


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


class Critic(nn.Module):
    """A critic of the noisy logits and the context."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3 + 4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.net(torch.cat([x, context.expand(*x.shape[:-1], -1)], -1))


class Model(nn.Module):
    """A guide and a decoder, and one estimator, which may look at x."""

    def __init__(self, estimator: gl.Estimator, context: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(3, 4)
        self.estimator, self.context = estimator, context

    def forward(self, x: Tensor) -> Tensor:
        q = td.Independent(td.Bernoulli(logits=self.encoder(x)), 1)

        def cost(z: Tensor) -> Tensor:
            return (self.decoder(z) - x).square().sum(-1)

        return self.estimator(q, cost, context=x if self.context else None)


def learners() -> dict[str, tuple[gl.Estimator, bool]]:
    """Every kind of estimator that learns; all start away from zero."""
    return {
        "learned": (gl.ScoreFunction(2, gl.Learned(nn.Linear(4, 1))), True),
        "rebar": (gl.REBAR(2), False),
        "relax": (gl.RELAX(Critic(), 2), True),
        "relax and rebar": (gl.RELAX(Critic(), 2, temperature=0.5), True),
        "double": (gl.DoubleControlVariate(3), False),
        "leave-one-out": (gl.ScoreFunction(2, gl.LeaveOneOut()), False),
        "local expectation": (gl.LocalExpectation(), False),
        "adaptive local expectation": (gl.AdaptiveLocalExpectation(), False),
    }


def gradients(loss: nn.Module, x: Tensor, state: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each parameter, from a given random state."""
    loss.zero_grad(set_to_none=True)
    torch.set_rng_state(state)
    loss(x).mean().backward()
    return {name: p.grad.clone() for name, p in loss.named_parameters()}


def check_gradients(rank: int) -> None:
    """DDP's gradient of every parameter is the mean of what the ranks compute alone, from the same random states."""
    for name in learners():
        torch.manual_seed(0)
        estimator, context = learners()[name]
        alone = Model(estimator, context)
        together = DistributedDataParallel(copy.deepcopy(alone), broadcast_buffers=False)
        own = torch.Generator().manual_seed(10 + rank)
        x, state = torch.randn(8, 4, generator=own), own.get_state()
        local, averaged = gradients(alone, x, state), gradients(together, x, state)
        assert len(local) == len(averaged) == 4 + len(list(estimator.parameters()))
        for parameter, gradient in local.items():
            mean = gradient.clone()
            dist.all_reduce(mean)
            error = (mean / 2 - averaged[f"module.{parameter}"]).abs().max()
            assert error <= 1e-12, f"{name}: {parameter}: {error}"
            assert (gradient - mean / 2).abs().max() > 1e-6, f"{name}: {parameter}: the ranks do not differ"


def check_parameters(loss: nn.Module) -> None:
    """The parameters of the ranks are equal, bit for bit."""
    weights = torch.cat([p.detach().flatten() for p in loss.parameters()])
    everywhere = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(everywhere, weights)
    assert torch.equal(*everywhere), "the parameters of the ranks differ"


class Stop(Exception):
    """Cuts a run off."""


def train(rank: int, folder: Path, cut: int | None = None, steps: int = 14) -> tuple[nn.Module, gl.Fitted, list]:
    """Run fit with a DistributedSampler; return the loss, what fit said, and the data seen."""
    torch.manual_seed(0)
    loss = DistributedDataParallel(Model(gl.REBAR()), broadcast_buffers=False)
    torch.manual_seed(100 + rank)
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(5))
    data = TensorDataset(x)
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, seed=7))  # 5 batches a rank
    seen: list[list[int]] = []

    class Recorded:
        sampler, batch_size = loader.sampler, 4

        def __len__(self) -> int:
            return len(loader)

        def __iter__(self):
            for (rows,) in loader:
                seen.append([int((x == row).all(1).nonzero()) for row in rows])
                yield (rows,)

    def stop(step: int, values: Tensor) -> None:
        if step == cut:
            raise Stop

    fitted = None
    with suppress(Stop):
        fitted = gl.fit(
            loss,
            Recorded(),
            torch.optim.Adam(loss.parameters(), lr=0.05),
            steps=steps,
            checkpoint=folder / f"rank{rank}.pt",
            every=4,
            log=folder / "log.jsonl" if rank == 0 else None,
            log_every=2,
            progress=rank == 0,
            schedules={"module.estimator.num_samples": lambda step: 1 + step % 2},
            on_step=stop,
        )
    return loss, fitted, seen


def check_fit(rank: int, folder: Path) -> None:
    """Under DDP fit gives all ranks the same parameters, deals the data anew each epoch, logs once, and resumes."""
    for name in ("whole", "cut"):
        (folder / name).mkdir(exist_ok=True)
    dist.barrier()
    loss, fitted, seen = train(rank, folder / "whole")
    assert fitted[:2] == (14, 2)
    check_parameters(loss)
    everywhere: list = [None, None]
    dist.all_gather_object(everywhere, seen)
    epochs = [[list(chain(*ranks[5 * e : 5 * e + 5])) for ranks in everywhere] for e in range(2)]
    for first, second in epochs:
        assert sorted(first + second) == list(range(40)), "an epoch is not a partition of the data"
    assert epochs[0] != epochs[1], "the epochs have one order: set_epoch was not called"
    if rank == 0:
        assert [json.loads(line)["step"] for line in (folder / "whole/log.jsonl").read_text().splitlines()][-1] == 14
    again, fitted, _ = train(rank, folder / "cut", cut=11)
    assert fitted is None
    dist.barrier()
    again, fitted, _ = train(rank, folder / "cut")
    assert fitted.resumed == 8
    states = loss.state_dict(), again.state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0]), "the resumed run is another"
    path = folder / "cut" / f"rank{rank}.pt"
    if rank == 1:
        path.unlink()  # as if killed between the writes of the ranks: go back to what both have
    mine = checkpoints.read(path)["step"]
    step = torch.tensor(mine)
    dist.all_reduce(step, op=dist.ReduceOp.MIN)
    if mine > step:
        path.unlink()
    again, fitted, _ = train(rank, folder / "cut")
    assert fitted.resumed == 12
    states = loss.state_dict(), again.state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0]), "the torn run is another"


def check_baselines(rank: int) -> None:
    """Train a few steps and check what must agree between ranks, and what must not."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Objective(), broadcast_buffers=False)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(rank)
    for _ in range(5):
        optimiser.zero_grad()
        model(torch.randn(8, 4) + rank).backward()
        optimiser.step()
    check_parameters(model)
    assert model.module.learned.baseline.net.weight.grad.abs().sum() > 0, "the baseline does not learn"
    averages = [torch.empty(()) for _ in range(2)]
    dist.all_gather(averages, model.module.average.baseline.average)
    assert averages[0] != averages[1], "the moving average is not per rank"
    shared = DistributedDataParallel(Objective())  # its buffers are broadcast, before each forward
    shared.module.average.baseline.average.fill_(1.0 + rank)
    shared.eval()
    shared(torch.randn(8, 4))
    assert shared.module.average.baseline.average == 1.0, "the moving average is not that of rank 0"


def main() -> None:
    """Run the checks, and say which of them held."""
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), Path(sys.argv[1])
    checks = {"baselines": check_baselines, "gradients": check_gradients, "fit": lambda rank: check_fit(rank, folder)}
    torch.set_default_dtype(torch.float64)
    for name, check in checks.items():
        check(rank)
        print(f"rank {rank}: {name} ok", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
