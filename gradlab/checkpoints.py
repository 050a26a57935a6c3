"""Checkpoints that survive a kill, and all the randomness that a run depends on.

A checkpoint is a dict of tensors and plain values that ``torch.load(path, weights_only=True)`` reads.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from torch import nn

__all__ = ["FORMAT", "check_like", "find_generators", "previous", "random_state", "read", "set_random_state", "write"]

FORMAT = {"format": "gradlab.fit", "version": 1}


def previous(path: Path) -> Path:
    """Return where the checkpoint before the last one is kept.

    >>> previous(Path("run.pt")).name
    'run.pt.previous'
    """
    return path.with_name(path.name + ".previous")


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint so that a kill or a full disk at any moment leaves a whole one: beside it, sync, rename.

    Raises:
        OSError: it could not be written; what was there before is untouched.
        TypeError: ``torch.load(weights_only=True)`` could not read it again.
    """
    data = _serialised({**FORMAT, **state})
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, previous(path))  # killed here, `read` takes the previous one
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        kept = next((f"{p} is intact" for p in (path, previous(path)) if p.exists()), "there was none before")
        raise OSError(
            error.errno,
            f"fit: found no way to write the checkpoint ({error.strerror or error}), expected room and permission for "
            f"{len(data)} bytes; {kept}. Make room and run the same command again: it resumes from there",
            str(path),
        ) from error


def read(path: Path) -> dict[str, Any] | None:
    """Return the checkpoint, or None if there is none yet.

    Raises:
        ValueError: the file is torn, or not a checkpoint of this version of :func:`gradlab.fit`.
    """
    source = path if path.exists() else previous(path)
    if not source.exists():
        return None
    try:
        _check_sums(source)
        state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a torn or foreign file makes the reader raise
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"fit: found {source} unreadable ({type(error).__name__}: {reason}), expected a checkpoint of gradlab.fit. "
            f"{_remedy(source)}"
        ) from error
    found = {key: state.get(key) for key in FORMAT} if isinstance(state, dict) else type(state).__name__
    if found != FORMAT:
        raise ValueError(f"fit: found {found} in {source}, expected {FORMAT}. {_remedy(source)}")
    return state


def check_like(what: str, found: Mapping[str, Any], expected: Mapping[str, Any], path: Path) -> None:
    """Raise a ValueError that names what a checkpoint lacks, has too much or has in another shape."""
    found, expected = _shapes(found), _shapes(expected)
    if found == expected:
        return
    differ = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    shown = "; ".join(f"{k}: found {_short(found.get(k))}, expected {_short(expected.get(k))}" for k in differ[:4])
    more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
    raise ValueError(f"fit: the checkpoint {path} belongs to another {what}. {shown}{more}. {_remedy(path)}")


def random_state(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """Return the states of torch (CPU and CUDA), Python, numpy and of the generators."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "generators": {key: generator.get_state() for key, generator in generators.items()},
    }


def set_random_state(state: Mapping[str, Any], generators: Mapping[str, torch.Generator]) -> None:
    """Set what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    for key, generator in generators.items():
        generator.set_state(state["generators"][key])


def find_generators(loss: nn.Module, loader: object) -> dict[str, torch.Generator]:
    """Return every torch.Generator that the loader, its samplers, its dataset or a module holds, by name.

    A list of generators counts, too.

    >>> list(find_generators(nn.Identity(), torch.utils.data.DataLoader([1, 2], generator=torch.Generator())))
    ['loader.generator']
    """
    owners = [*_parts("loader", loader), *((f"loss.{name}", module) for name, module in loss.named_modules())]
    return {
        f"{where}.{name}{i}": generator
        for where, owner in owners
        for name, value in getattr(owner, "__dict__", {}).items()
        for i, generator in (_numbered(value) if isinstance(value, list) else [("", value)])
        if isinstance(generator, torch.Generator)
    }


def _numbered(values: list[Any]) -> list[tuple[str, Any]]:
    return [(f".{i}", value) for i, value in enumerate(values)]


def _parts(where: str, owner: object) -> Iterator[tuple[str, object]]:
    yield where, owner
    for name in ("sampler", "batch_sampler", "dataset", "collate_fn"):
        if (part := getattr(owner, name, None)) is not None:
            yield from _parts(f"{where}.{name}", part)


def _serialised(state: dict[str, Any]) -> memoryview:
    """Return the bytes of a checkpoint; one that nobody could read again is worse than none."""
    buffer = BytesIO()
    try:
        torch.save(state, buffer)
        buffer.seek(0)
        torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TypeError(
            f"fit: found something in the state of the run that torch.load(weights_only=True) refuses ({error}), "
            "expected tensors, numbers, strings, lists and dicts. Look at the state_dict() of modules and schedules."
        ) from error
    return buffer.getbuffer()


def _check_sums(source: Path) -> None:
    """Raise if a bit has changed: torch.load does not look at the checksums that torch.save writes."""
    with ZipFile(source) as archive:
        if damaged := archive.testzip():
            raise BadZipFile(f"damaged at {damaged}")


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _shapes(state: Mapping[str, Any]) -> dict[str, object]:
    """What must agree: the shape and dtype of tensors, other values as they are."""
    return {k: f"{list(v.shape)} {v.dtype}" if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) < 120 else text[:120] + " ..."


def _remedy(path: Path) -> str:
    before = previous(path)
    older = f"move it away and rename {before} to resume from the one before, or " if before.exists() else ""
    return f"To go on, {older}give another checkpoint path to start anew, or run what wrote this one."
