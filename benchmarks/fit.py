"""One step of ``gradlab.fit`` beside the same step hand-written in torch: an autoencoder of binary images, 784-256-200.

python benchmarks/fit.py                    one JSON line a ratio
python benchmarks/fit.py --device cuda

Both train equal copies of the model on equal batches from equal loaders, in one process and in alternating rounds. fit
writes its log and checks every step for NaN; the loop by hand has neither. The ratio is that of the medians over the
rounds of the time a step, beside the ratio of the minima; "same" says that the parameters agree bit for bit.
"""

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent
from torch.utils.data import DataLoader, TensorDataset

import gradlab as gl

PIXELS, HIDDEN, LATENTS = 784, 256, 200


class Objective(nn.Module):
    """The negative ELBO of a Bernoulli VAE, with leave-one-out score functions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))
        self.estimator = gl.ScoreFunction(2, gl.LeaveOneOut())

    def forward(self, x: Tensor) -> Tensor:
        q = Independent(Bernoulli(logits=self.encoder(x)), 1)
        prior = Independent(Bernoulli(logits=torch.zeros(LATENTS, device=x.device)), 1)

        def cost(z: Tensor) -> Tensor:
            pixels = Independent(Bernoulli(logits=self.decoder(z)), 1)
            return q.log_prob(z) - prior.log_prob(z) - pixels.log_prob(x)

        return self.estimator(q, cost)


def by_hand(loss: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Train for an epoch."""
    for (x,) in loader:
        optimizer.zero_grad(set_to_none=True)
        loss(x.to(device, non_blocking=True)).mean().backward()
        optimizer.step()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="alternating rounds (default 30)")
    parser.add_argument("--steps", type=int, default=10, help="steps a round (default 10)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for batch in (64, 128):
        print(json.dumps(measure(batch, args.rounds, args.steps, torch.device(args.device))), flush=True)


def measure(batch: int, rounds: int, steps: int, device: torch.device) -> dict[str, object]:
    """Compare the two loops on batches of one size."""
    torch.manual_seed(0)
    images = (torch.rand(batch * steps, PIXELS) < 0.3).float()
    ours = Objective().to(device)
    models = [ours, copy.deepcopy(ours)]
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in models]
    loader = DataLoader(TensorDataset(images), batch)
    times: list[list[float]] = [[], []]
    with tempfile.TemporaryDirectory() as folder:
        loops = [
            lambda: gl.fit(models[0], loader, optimizers[0], epochs=1, log=Path(folder) / "log.jsonl"),
            lambda: by_hand(models[1], loader, optimizers[1], device),
        ]
        gc.disable()
        for r in range(-2, rounds):  # two to warm up
            for i in (0, 1) if r % 2 else (1, 0):
                torch.manual_seed(r)
                seconds = clock(loops[i], device)
                times[i] += [seconds / steps] * (r >= 0)
        gc.enable()
    median = statistics.median(times[0]) / statistics.median(times[1])
    minima = min(times[0]) / min(times[1])
    same = all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    return {
        "ratio": f"fit / by hand, batch {batch}, {device}",
        "medians": round(median, 3),
        "minima": round(minima, 3),
        "noisy": abs(median / minima - 1) > 0.08,
        "milliseconds a step by hand": round(1000 * statistics.median(times[1]), 3),
        "same": same,
        "rounds": rounds,
    }


def clock(call: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call: of the process on a CPU, of the wall on a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
