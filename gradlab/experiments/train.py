r"""Train a model of :mod:`gradlab.experiments.models` with one estimator and several seeds, and say how well it does.

All seeds train as one batched model. Run r has the start, the order of the data and the binarisation that its seed
alone would give it; only the noise of the estimator is drawn for all runs at once.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils.data import DataLoader, Dataset, Sampler

from gradlab.experiments import data, results
from gradlab.experiments.models import LARGE, SMALL, build, make_estimator
from gradlab.experiments.plan import seeded
from gradlab.multisample import log_likelihood
from gradlab.surrogate import zero
from gradlab.svi import NegativeELBO
from gradlab.training import fit

__all__ = ["DATA", "DEFAULTS", "Experiment", "Images", "Runs", "bound", "load", "train"]


class Images(NamedTuple):
    """Images for training and for the test, ``[N, D]`` each, whose pixels count from 0 to ``levels``."""

    train: Tensor
    test: Tensor
    levels: int
    dynamic: bool
    """whether pixels are probabilities, and a fresh Bernoulli is drawn at each look"""


def _digits() -> Images:
    return Images(data.digits("train")[0], data.digits("test")[0], 16, False)


def _mnist() -> Images:
    return Images(data.mnist("train")[0], data.mnist("test")[0], 1, True)


def _binarized_mnist() -> Images:
    return Images(data.binarized_mnist("train"), data.binarized_mnist("test"), 1, False)


def _omniglot() -> Images:
    return Images(data.omniglot("train"), data.omniglot("test"), 1, True)


DATA = {"digits": _digits, "mnist": _mnist, "binarized-mnist": _binarized_mnist, "omniglot": _omniglot}
"""``digits`` is embedded; the others come through ``gradlab data fetch``."""


def load(name: str) -> Images:
    """Return the images of a name; those for the test are binarised once and for all.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError: a file is neither in the folder nor to be fetched.
    """
    if name not in DATA:
        raise ValueError(f"data: found {name!r}, expected one of {', '.join(DATA)}.")
    images = DATA[name]()
    return images._replace(test=data.Binarize(seed=0)(images.test)) if images.dynamic else images


class Recipe(NamedTuple):
    """How long, in what batches and how fast a model is trained."""

    epochs: int
    batch_size: int
    rate: float


DEFAULTS = {
    "digits": Recipe(40, 50, 5e-3),
    "mnist": Recipe(500, 100, 1e-4),
    "binarized-mnist": Recipe(500, 100, 1e-4),
    "omniglot": Recipe(100, 100, 1e-4),
}
"""Of source 003 for its data; digits are few and small, so that fewer and longer steps do."""


DOUBLE_BACKWARD = ("rebar", "relax")
"""Estimators that train a control variate."""


@dataclass(frozen=True)
class Experiment:
    """All that a result depends on, beside versions and device."""

    model: str
    estimator: str
    data: str = "digits"
    samples: int = 1
    epochs: int = 40
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 50
    rate: float = 5e-3
    test_samples: int = 200
    """K of the test bound"""
    tests: int = 10
    """how often the test bound is taken, evenly over the epochs"""
    compiled: bool = False
    """whether ``torch.compile`` takes the loss, on a GPU with CUDA graphs; the random numbers are then others"""

    def __post_init__(self) -> None:
        for name in ("samples", "epochs", "batch_size", "test_samples", "tests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a positive number.")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds: found {self.seeds}, expected one or more, each once.")
        if self.compiled and self.estimator in DOUBLE_BACKWARD:
            raise ValueError(
                f"compiled: found the estimator {self.estimator}, which differentiates twice, expected another one: "
                "torch.compile cannot. Leave out --compile."
            )

    @property
    def name(self) -> str:
        """Return the name of its files."""
        return f"{self.data}-{self.model}-{self.estimator}-{self.samples}"

    def test_epochs(self) -> set[int]:
        """Return after which epochs the test bound is taken, the last among them."""
        return {round(self.epochs * (i + 1) / self.tests) for i in range(self.tests)} - {0}


class Shuffle(Sampler[Tensor]):
    """Batches of indices, ``[R, N]``: each run goes through the data in an order that its seed and the epoch give."""

    def __init__(self, size: int, batch_size: int, seeds: tuple[int, ...]) -> None:
        self.size, self.batch_size, self.seeds, self.epoch = size, min(batch_size, size), seeds, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; :func:`gradlab.fit` calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        orders = [torch.Generator().manual_seed(1_000_003 * self.epoch + seed) for seed in self.seeds]
        order = torch.stack([torch.randperm(self.size, generator=g) for g in orders])
        yield from order[:, : len(self) * self.batch_size].split(self.batch_size, 1)


class Pixels(Dataset[Tensor]):
    """Images by indices ``[R, N]``, ``[R, N, D]``; where pixels are probabilities, drawn anew for each run."""

    def __init__(self, x: Tensor, seeds: tuple[int, ...], dynamic: bool) -> None:
        self.x = x
        self.generators = [torch.Generator(x.device).manual_seed(seed) for seed in seeds] if dynamic else []

    def __getitem__(self, index: Tensor) -> Tensor:
        x = self.x[index.to(self.x.device)]
        if not self.generators:
            return x
        return torch.stack([torch.bernoulli(x[r], generator=g) for r, g in enumerate(self.generators)])


class Runs(nn.Module):
    """The losses of R runs, ``[R, N]``, each with the gradient of its own mean loss, as if it were alone.

    It also keeps, for each run, the sum of the losses since :meth:`reset`.
    """

    total: Tensor
    count: Tensor
    seconds: Tensor

    def __init__(self, elbo: NegativeELBO, runs: int) -> None:
        super().__init__()
        self.elbo = elbo
        self.register_buffer("total", torch.zeros(runs, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("seconds", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        loss = self.elbo(x)
        self.total += loss.detach().mean(1)
        self.count += 1
        return loss + (len(loss) - 1) * zero(loss)  # the mean over R N losses has 1 / R of each run's gradient

    def reset(self) -> Tensor:
        """Return the mean loss of each run since the last reset, ``[R]``."""
        mean = self.total / self.count
        self.total.zero_()
        self.count.zero_()
        return mean


def train(
    experiment: Experiment,
    out: Path,
    device: str = "cpu",
    command: str = "",
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train, and return the result; it lies in ``out`` as JSON, beside the log and a checkpoint to go on from.

    A call that was cut off goes on exactly where it was; one that is done returns what it found.

    Args:
        experiment: what to train.
        out: the folder of the files.
        device: where.
        command: what the user typed, to be stored.
        progress: whether to show a bar; by default on a terminal only.

    Raises:
        ValueError: ``out`` holds another experiment of the same name.
        KeyboardInterrupt: on Ctrl-C, after the step at hand and its checkpoint.
    """
    path = out / f"{experiment.name}.json"
    settings = json.loads(json.dumps(dataclasses.asdict(experiment)))
    if (done := results.read(path)) is not None:
        check_settings(done.get("settings"), settings, path)
        if "test" in done:
            return done
    images = load(experiment.data)
    chunk_size = 8 if torch.device(device).type == "cpu" else None  # flips at a time: what stays in the cache
    runs = _build(experiment, images, chunk_size).to(device)
    parameters = [p for p in runs.parameters() if p.requires_grad]
    x, test = (x.to(device, dtype=parameters[0].dtype) for x in (images.train, images.test))
    shuffle = Shuffle(len(x), experiment.batch_size, experiment.seeds)
    loader = DataLoader(Pixels(x, experiment.seeds, images.dynamic), sampler=shuffle, batch_size=None)
    optimizer = torch.optim.Adam(parameters, lr=experiment.rate, fused=True)
    began = results.provenance(command, device) | {"settings": settings}
    results.write(path, began)
    watch = _Watch(experiment, runs, optimizer, test, len(shuffle))
    torch.manual_seed(experiment.seeds[0])
    with _validation():
        if experiment.compiled:
            runs.compile(mode="reduce-overhead" if torch.device(device).type == "cuda" else None)
        fit(
            runs,
            loader,
            optimizer,
            epochs=experiment.epochs,
            checkpoint=out / f"{experiment.name}.pt",
            every=max(len(shuffle), 200),
            log=out / f"{experiment.name}.jsonl",
            log_every=len(shuffle),
            progress=progress,
            on_step=watch,
        )
    result = began | _curves(out / f"{experiment.name}.jsonl")
    results.write(path, result)
    return result


@contextmanager
def _validation() -> Iterator[None]:
    """Keep the default of torch's distributions, which ``torch.compile`` switches off for the whole process."""
    before = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def check_settings(found: Any, expected: Mapping[str, Any], path: Path) -> None:
    """Raise unless a file holds the same experiment."""
    if found == expected:
        return
    differ = [k for k in expected if not isinstance(found, dict) or found.get(k) != expected[k]]
    shown = "; ".join(f"{k}: found {(found or {}).get(k)}, expected {expected[k]}" for k in differ)
    raise ValueError(f"{path} holds another experiment ({shown}). Give another folder as --out, or move it away.")


def _build(experiment: Experiment, images: Images, chunk_size: int | None) -> Runs:
    """S samples of all layers: the second draws one for each of the first, two where leave-one-out needs them."""
    sizes = SMALL if images.train.shape[1] < 100 else LARGE
    name = experiment.estimator
    first, above = (make_estimator(name, s, chunk_size) for s in (experiment.samples, 1 + (name == "score-loo")))
    mean = images.train.mean(0, dtype=torch.get_default_dtype())
    elbo = build(experiment.model, mean, images.levels, first, experiment.seeds, sizes, above)
    return Runs(elbo, len(experiment.seeds))


class _Watch:
    """Writes a line at the end of an epoch: the training bound, the variance of the gradient, the test bound."""

    def __init__(
        self, experiment: Experiment, runs: Runs, optimizer: torch.optim.Optimizer, test: Tensor, length: int
    ) -> None:
        self.experiment, self.runs, self.optimizer, self.test, self.length = experiment, runs, optimizer, test, length
        self.tests = experiment.test_epochs()
        self.now = time.perf_counter if test.is_cuda else time.process_time  # other work delays, but does not count
        self.clock = self.now()

    def __call__(self, step: int, values: Tensor) -> dict[str, Any] | None:
        if step % self.length:
            return None
        if values.is_cuda:
            torch.cuda.synchronize()
        self.runs.seconds += self.now() - self.clock
        epoch = step // self.length
        line = {
            "epoch": epoch,
            "train_seconds": round(self.runs.seconds.item(), 3),
            "train": results.rounded(-self.runs.reset()),
            "log_variance": results.rounded(log_variance(self.optimizer, guide_of(self.runs.elbo))),
        }
        if epoch in self.tests:
            line["test"] = results.rounded(bound(self.runs.elbo, self.test, len(values), self.experiment))
        self.clock = self.now()
        return line


def guide_of(elbo: NegativeELBO) -> list[Tensor]:
    """Return the parameters of the guides of all layers, each ``[R, ...]``."""
    above = guide_of(elbo.prior) if isinstance(elbo.prior, NegativeELBO) else []
    return [*elbo.guide.parameters(), *above]


def log_variance(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> Tensor:
    """Return the log of the mean variance of the gradient by Adam's moving moments, ``[R]``.

    It is nan where the moments say a negative one, as in the first epochs, when the gradient changes fast.
    """
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    found = []
    for p in parameters:
        state = optimizer.state[p]
        mean = state["exp_avg"] / (1 - beta1 ** state["step"].item())
        square = state["exp_avg_sq"] / (1 - beta2 ** state["step"].item())
        found.append((square - mean**2).flatten(1))
    return torch.cat(found, 1).mean(1).log()


def bound(elbo: NegativeELBO, test: Tensor, runs: int, experiment: Experiment, rows: int = 500) -> Tensor:
    """Return the lower bound of log p by importance sampling, the mean over the test images, ``[R]``.

    It has random numbers of its own, the same at each call.
    """
    total = torch.zeros(runs, dtype=torch.float64, device=test.device)
    with seeded(0, test.device):
        for x in test.split(rows):
            x = x.expand(runs, *x.shape)
            found = log_likelihood(elbo.guide, elbo.prior, elbo.likelihood, x, experiment.test_samples, 10)
            total += found.bounds.sum(1)
    return total / len(test)


def _curves(log: Path) -> dict[str, Any]:
    """Return what the epochs brought: the lines of the log that have it, by column."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "train" in line]
    keys = ("epoch", "train_seconds", "train", "log_variance")
    tested = [line for line in lines if "test" in line]
    return {
        "epochs": {key: [line[key] for line in lines] for key in keys},
        "tests": {key: [line[key] for line in tested] for key in ("epoch", "train_seconds", "test")},
        "test": tested[-1]["test"],
    }
