r"""``fit``: a training loop that can be killed at any moment and goes on as if it had not been.

It minimises the mean of a module ``loss(*batch) -> [*B]``; the estimators inside bring their own gradients.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from gradlab import checkpoints
from gradlab.estimator import Estimator
from gradlab.metrics import Bar, Journal
from gradlab.relaxations import Schedule

__all__ = ["Fitted", "fit"]

Schedules = LRScheduler | Mapping[str, Schedule] | Sequence[LRScheduler | Mapping[str, Schedule]]


class Fitted(NamedTuple):
    """Where a run ended.

    Attributes:
        step: optimizer steps done, those before a resume included.
        epoch: epochs completed.
        loss: mean loss since the last line of the log (or on it).
        resumed: the step at which this call began, 0 for a fresh run.
    """

    step: int
    epoch: int
    loss: float
    resumed: int


def fit(
    loss: nn.Module,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 1000,
    log: str | os.PathLike[str] | None = None,
    log_every: int = 50,
    schedules: Schedules = (),
    clip: float | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    on_step: Callable[[int, Tensor], Mapping[str, Any] | None] | None = None,
) -> Fitted:
    r"""Minimise the mean of ``loss(*batch)``, and resume exactly where an earlier call was cut off.

    If ``checkpoint`` exists the run goes on from there: parameters, buffers, optimizer, schedules, the place in the
    epoch and all random states are those of the run that was never interrupted, bit for bit on a CPU. To begin
    anew, give another path. The last two checkpoints are kept (``path`` and ``path.previous``).

    Args:
        loss: maps a batch to ``[*B]``, whose mean is minimised. It holds the model *and* the estimators, so that one
            ``state_dict()`` is all there is to save. Its train or eval mode is left as it is.
        loader: a DataLoader, or anything that can be iterated again each epoch. A tuple or list is passed on as
            ``loss(*batch)``, a dict as ``loss(**batch)``.
        optimizer: of parameters of ``loss``.
        steps: stop after so many steps in all; or
        epochs: stop after so many epochs in all.
        checkpoint: the file to write to, and to resume from.
        every: steps from one checkpoint to the next; there is one at the end, and one on Ctrl-C, too.
        log: a file of metrics, one JSON object a line; lines after the step resumed from are removed.
        log_every: steps from one line to the next. The loss is read, and a GPU waited for, only then.
        schedules: torch schedulers, stepped once a step (a ReduceLROnPlateau once a line, with the mean loss), and
            dicts such as ``{"estimator.temperature": exponential_annealing(1.0, 1e-4, 0.5)}``, which set an
            attribute of ``loss`` before each step.
        clip: the largest norm of the gradient, over all parameters.
        device: where to move the batches; by default where the parameters are.
        progress: whether to show a bar; by default on a terminal only.
        on_step: called as ``on_step(step, values)`` with the detached ``[*B]`` after each step; what it returns, if
            anything, is a line of the log.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; says at which step, which tensor and which
            estimators. On a CPU the parameters are still those before that step.
        ValueError: the checkpoint is torn, or belongs to another model, optimizer or loader.
        OSError: a file could not be written; the last checkpoint is intact.
        KeyboardInterrupt: on Ctrl-C, after the step at hand and its checkpoint. A second Ctrl-C does not wait.

    Note:
        Exactness covers what ``state_dict()`` holds, the global generators of torch, numpy and Python, and each
        ``torch.Generator`` that is an attribute of the loader, its samplers, its dataset or a module; it does not
        cover persistent workers that draw random numbers in the dataset. To find its place in an epoch a resume
        reads the batches that were done. Under DDP give each rank its own files, begin the names of scheduled
        attributes with ``module.``, and after a kill let all ranks begin at the same step: chapter 22 of the book does.

    >>> class Square(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.w = nn.Parameter(torch.ones(()))
    ...     def forward(self, x):
    ...         return (self.w - x) ** 2
    >>> loss = Square()
    >>> fitted = fit(loss, [torch.full((4,), 3.0)], torch.optim.SGD(loss.parameters(), lr=0.25), epochs=20)
    >>> fitted.step, round(loss.w.item(), 4)
    (20, 3.0)
    """
    _check_arguments(loss, loader, optimizer, steps, epochs, every, log_every)
    run = _Run(loss, loader, optimizer, schedules, clip, device)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)  # fail now, not after an hour
        run.resume(path)
    began, saved = run.step, run.step
    length = _length(loader)
    goal = steps if epochs is None else length and epochs * length
    with Journal(log, began) as journal, Bar(progress, goal) as bar, _interrupts(path is not None) as interrupts:
        try:
            for batch in run.batches(steps, epochs):
                values = run.advance(batch)
                if run.step % log_every == 0:
                    journal.write(run.report(reset=True))
                bar.show(run.step, run.last)
                if on_step is not None and (extra := on_step(run.step, values)):
                    journal.write({"step": run.step, **extra})
                if path is not None and (run.step % every == 0 or interrupts):
                    run.save(path)
                    saved = run.step
                if interrupts:
                    raise KeyboardInterrupt
            if run.count and run.step > began:
                journal.write(run.report(reset=False))
            if path is not None and run.step > saved:
                run.save(path)
                saved = run.step
            if interrupts:
                raise KeyboardInterrupt
        except KeyboardInterrupt:  # also one that on_step raised
            if path is not None and run.whole and run.step > saved:
                run.save(path)
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            error.add_note(f"fit: raised {'after' if run.whole else 'in'} step {run.step + (not run.whole)}.")
            raise
    return Fitted(run.step, run.epoch, run.last if run.count == 0 else run.mean(), began)


class _Run:
    """All that changes from step to step."""

    def __init__(
        self,
        loss: nn.Module,
        loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        schedules: Schedules,
        clip: float | None,
        device: torch.device | str | None,
    ) -> None:
        self.loss, self.loader, self.optimizer, self.clip = loss, loader, optimizer, clip
        named = dict(loss.named_parameters())
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        _check_owned(named, self.parameters)
        self.device = torch.device(device) if device is not None else self.parameters[0].device
        self.lr, self.attributes = _split(schedules, loss, optimizer)
        self.guard = _Guard(named, self.parameters, loss)
        self.generators = checkpoints.find_generators(loss, loader)
        self.step = self.epoch = self.batch = self.count = self.began = 0
        self.random: dict[str, Any] | None = None  # at the start of the epoch at hand
        self.total: Tensor | None = None
        self.norm: Tensor | None = None
        self.last = math.nan
        self.whole = False  # between two steps, so that a checkpoint would be exact
        self.seconds, self.clock = 0.0, time.monotonic()

    def batches(self, steps: int | None, epochs: int | None) -> Iterator[Any]:
        """Yield what is left of the epoch at hand, then whole epochs."""
        while self.epoch < (epochs or math.inf) and self.step < (steps or math.inf):
            for batch in self._epoch():
                self.batch += 1
                yield batch
                if self.step >= (steps or math.inf):
                    return
                self.whole = False
            if self.batch == 0:
                raise ValueError("fit: found a loader without batches, expected one at least. Look at drop_last.")
            self.epoch, self.batch, self.random = self.epoch + 1, 0, None
        self.whole = True

    def _epoch(self) -> Iterator[Any]:
        """Return the iterator of an epoch, advanced to the batch at hand.

        A shuffle depends on the random state at the start of the epoch: go back there, and return from there.
        """
        now = checkpoints.random_state(self.generators)
        if self.random is None:
            self.random = now
        else:
            checkpoints.set_random_state(self.random, self.generators)
        if hasattr(sampler := getattr(self.loader, "sampler", None), "set_epoch"):
            sampler.set_epoch(self.epoch)
        iterator = iter(self.loader)
        for _ in range(self.batch):
            next(iterator)
        if self.batch:
            checkpoints.set_random_state(now, self.generators)
        return iterator

    def advance(self, batch: Any) -> Tensor:
        """Do one step; return the detached losses ``[*B]``."""
        self.whole = False
        for set_value, schedule in self.attributes.values():
            set_value(schedule(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        values = _call(self.loss, batch, self.device)
        mean = values.mean()
        mean.backward()
        self.guard.see(mean)
        if self.device.type in SYNCHRONOUS:
            self.guard.check(self.began)
        if self.clip is not None:
            self.norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        for scheduler in self.lr:
            if not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()
        self.total = mean.detach() if self.total is None else self.total + mean.detach()
        self.step, self.count, self.whole = self.step + 1, self.count + 1, True
        return values.detach()

    def mean(self) -> float:
        return math.nan if self.total is None else self.total.item() / self.count

    def report(self, reset: bool) -> dict[str, Any]:
        """Return a line of the log; this waits for a GPU."""
        self.guard.check(self.began)
        self.last = self.mean()
        line = {"step": self.step, "epoch": self.epoch + 1, "loss": self.last}
        line |= {"lr": float(self.optimizer.param_groups[0]["lr"]), "seconds": round(self.elapsed(), 3)}
        line |= {name: schedule(self.step - 1) for name, (_, schedule) in self.attributes.items()}
        line |= {} if self.norm is None else {"gradient_norm": self.norm.item()}
        if reset:
            self.total, self.count = None, 0
            for scheduler in self.lr:
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(self.last)
        return line

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.clock

    def save(self, path: Path) -> None:
        """Write a checkpoint, if the state is worth one."""
        self.guard.check(self.began)
        self.guard.check_parameters(self.step)
        checkpoints.write(
            path,
            {
                **{name: getattr(self, name) for name in PLAIN},
                "elapsed": self.elapsed(),
                "model": self.loss.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedulers": [scheduler.state_dict() for scheduler in self.lr],
                "epoch_random": self.random,
                "random": checkpoints.random_state(self.generators),
                "identity": self.identity(),
                "torch": str(torch.__version__),
            },
        )

    def resume(self, path: Path) -> None:
        """Go to where the checkpoint was written, if there is one; check all of it before changing anything."""
        if (state := checkpoints.read(path)) is None:
            return
        checkpoints.check_like("model", state["model"], self.loss.state_dict(), path)
        checkpoints.check_like("run", state["identity"], self.identity(), path)
        self.loss.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for scheduler, values in zip(self.lr, state["schedulers"], strict=True):
            scheduler.load_state_dict(values)
        for name in PLAIN:
            setattr(self, name, state[name])
        self.total = None if self.total is None else self.total.to(self.device)
        self.seconds, self.random, self.began = state["elapsed"], state["epoch_random"], self.step
        checkpoints.set_random_state(state["random"], self.generators)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have been written with, beside the shapes of the model."""
        names = iter(self.guard.names)
        groups = [[next(names) for _ in group["params"]] for group in self.optimizer.param_groups]
        return {
            "optimizer": type(self.optimizer).__name__,
            **{f"parameters of group {i}": group for i, group in enumerate(groups)},
            "schedulers": [type(scheduler).__name__ for scheduler in self.lr],
            "batches an epoch": _length(self.loader),
            "batch size": getattr(self.loader, "batch_size", None),
            "generators": sorted(self.generators),
        }


PLAIN = ("step", "epoch", "batch", "count", "total", "last")
SYNCHRONOUS = {"cpu"}  # devices on which reading a number costs nothing


class _Guard:
    """Remembers, on the device, for each gradient and the loss how many steps were finite: nothing is waited for.

    A zero times a number that is not finite is NaN, and NaN stays.
    """

    def __init__(self, named: Mapping[str, Tensor], parameters: Sequence[Tensor], loss: nn.Module) -> None:
        names = {id(p): name for name, p in named.items()}
        self.parameters = parameters
        self.names = [names[id(p)] for p in parameters]
        self.estimators = {name: m for name, m in loss.named_modules() if isinstance(m, Estimator)}
        self.flags: Tensor | None = None
        self.finite: Tensor | None = None

    def see(self, mean: Tensor) -> None:
        """Take note of one step."""
        flags = torch.stack([mean.detach(), *self._witnesses([p.grad for p in self.parameters])]).mul_(0)
        self.flags = flags if self.flags is None else self.flags.add_(flags)
        good = self.flags == 0
        self.finite = good.int() if self.finite is None else self.finite.add_(good)

    def check(self, began: int) -> None:
        """Raise a FloatingPointError if a step since ``began`` was not finite; this waits for the device."""
        if self.flags is None or self.flags.sum().item() == 0:
            return
        assert self.finite is not None
        counts = self.finite.tolist()
        first = counts.index(min(counts))
        self.fail(began + counts[first] + 1, f"the gradient of {self.names[first - 1]}" if first else "the loss", first)

    def check_parameters(self, step: int) -> None:
        """Raise if a step with a finite gradient has led to a parameter that is not: never save such a state."""
        for i, value in enumerate(torch.stack(self._witnesses([p.detach() for p in self.parameters])).tolist()):
            if not math.isfinite(value):
                self.fail(step, f"the parameter {self.names[i]}", i + 1)

    def fail(self, step: int, what: str, slot: int) -> None:
        inside = {k: m for k, m in self.estimators.items() if slot and self.names[slot - 1].startswith(f"{k}.")}
        shown = [f"{name or 'loss'} ({type(m).__name__})" for name, m in (inside or self.estimators).items()]
        raise FloatingPointError(
            f"fit: found NaN or infinity in {what} at step {step}, expected finite numbers; "
            f"estimator{'s' * (len(shown) > 1)}: {', '.join(shown) or 'none'}. The last good checkpoint, if any, is "
            "kept. Lower the learning rate, give clip=, or look for log(0) and 0/0 in the loss."
        )

    def _witnesses(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Return one number a tensor, which is finite if and only if all of the tensor is.

        A sum in float32 overflows beyond 1e38 only, and is 30 times faster on a CPU than the largest absolute value.
        """
        known = [t._values() if t.is_sparse else t for t in tensors if t is not None]
        if known and known[0].is_cuda:
            sums = iter(torch._foreach_norm(known, math.inf))
        else:
            sums = (t.sum(dtype=torch.float32) if t.dtype.itemsize < 4 else t.sum() for t in known)
        if len(known) == len(tensors):
            return list(sums)
        absent = torch.zeros((), device=self.parameters[0].device)
        return [absent if t is None else next(sums) for t in tensors]


@contextmanager
def _interrupts(active: bool) -> Iterator[list[int]]:
    """Collect Ctrl-C until the step is whole: a checkpoint from its middle would not be exact."""
    seen: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    if not (active and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield seen
        return

    def collect(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    signal.signal(signal.SIGINT, collect)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _call(loss: nn.Module, batch: Any, device: torch.device) -> Tensor:
    """Return ``loss`` of a batch, on the device."""
    if isinstance(batch, Mapping):
        values = loss(**{name: _move(part, device) for name, part in batch.items()})
    elif isinstance(batch, tuple | list):
        values = loss(*[_move(part, device) for part in batch])
    else:
        values = loss(_move(batch, device))
    if not isinstance(values, Tensor) or not values.requires_grad:
        kind = type(values).__name__ if not isinstance(values, Tensor) else "a Tensor without gradient"
        raise TypeError(f"fit: found loss(*batch) to be {kind}, expected a Tensor [*B] that depends on parameters.")
    return values


def _length(loader: Iterable[Any]) -> int | None:
    """Return the number of batches, None if the loader cannot tell."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _move(part: Any, device: torch.device) -> Any:
    return part.to(device, non_blocking=True) if isinstance(part, Tensor) else part


def _split(
    schedules: Schedules, loss: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[list[LRScheduler], dict[str, tuple[Callable[[float], object], Schedule]]]:
    """Return the torch schedulers, and for each attribute how to set it and its schedule."""
    lr: list[LRScheduler] = []
    attributes: dict[str, tuple[Callable[[float], object], Schedule]] = {}
    for schedule in (schedules,) if isinstance(schedules, LRScheduler | Mapping) else schedules:
        if isinstance(schedule, Mapping):
            attributes |= {name: (_setter(loss, name), values) for name, values in schedule.items()}
        elif not isinstance(schedule, LRScheduler):
            raise TypeError(
                f"fit: found a schedule of type {type(schedule).__name__}, expected a torch scheduler or a dict such "
                "as {'estimator.temperature': gradlab.exponential_annealing(1.0, 1e-4, 0.5)}."
            )
        elif schedule.optimizer is not optimizer:
            raise ValueError("fit: found a scheduler of another optimizer, expected one of the optimizer given.")
        else:
            lr.append(schedule)
    return lr, attributes


def _setter(loss: nn.Module, name: str) -> Callable[[float], object]:
    """Return the function that sets an attribute, which must exist: a typing error would change nothing, silently."""
    *path, attribute = name.split(".")
    owner: Any = loss
    for part in path:
        owner = getattr(owner, part, None)
    if not hasattr(owner, attribute) or isinstance(getattr(owner, attribute), nn.Parameter):
        known = sorted(f"{n}.temperature".lstrip(".") for n, m in loss.named_modules() if hasattr(m, "temperature"))
        raise ValueError(
            f"fit: found a schedule for {name!r}, expected a number or buffer among the attributes of loss, not a "
            f"parameter. Temperatures there: {', '.join(known) or 'none'}."
        )
    value = getattr(owner, attribute)
    if isinstance(value, Tensor):
        return partial(Tensor.fill_, value)
    return lambda new: setattr(owner, attribute, new)


def _check_arguments(
    loss: nn.Module,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    steps: int | None,
    epochs: int | None,
    every: int,
    log_every: int,
) -> None:
    if not isinstance(loss, nn.Module):
        raise TypeError(f"fit: found a loss of type {type(loss).__name__}, expected an nn.Module that holds the model.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"fit: found an optimizer of type {type(optimizer).__name__}, expected a torch one.")
    if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
        raise TypeError(
            f"fit: found a loader of type {type(loader).__name__}, expected one that can be iterated again each epoch: "
            "a DataLoader or a list of batches."
        )
    if (steps is None) == (epochs is None):
        raise ValueError(f"fit: found steps={steps} and epochs={epochs}, expected one of the two.")
    for name, number in {"steps": steps, "epochs": epochs, "every": every, "log_every": log_every}.items():
        if number is not None and number < 1:
            raise ValueError(f"fit: found {name}={number}, expected a positive int.")


def _check_owned(named: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> None:
    """What the optimizer trains must be in the state of the loss, or a resume would lose it."""
    own = {id(p) for p in named.values()}
    if lost := [tuple(p.shape) for p in parameters if id(p) not in own]:
        raise ValueError(
            f"fit: found {len(lost)} parameters of the optimizer that loss does not hold (shapes {lost[:4]}), expected "
            "all of them in loss.parameters(). Make the model and the estimators attributes of the module."
        )
