r"""Data as tensors: embedded (digits, breast cancer, karate club, randhie), or files known by their hash.

Images are rows ``[N, D]`` of float32, tables are columns ``[N]`` of float64. Embedded data need no network and no
folder; the others come through :func:`gradlab.experiments.files.fetch`.

>>> x, labels = digits("test")
>>> x.shape, x.max().item(), labels[:3].tolist()
(torch.Size([360, 64]), 16.0, [2, 3, 4])
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradlab.experiments.files import fetch, library, registry, state
from gradlab.experiments.recipes import OMNIGLOT_SHA256, omniglot_images

__all__ = [
    "Binarize",
    "binarized_mnist",
    "breast_cancer",
    "counts",
    "digits",
    "karate_club",
    "mnist",
    "omniglot",
    "randhie",
    "tables",
]

DIGITS_TRAIN = 1437  # of 1797, in the order of the file: the last fifth is by other writers
OMNIGLOT_TRAIN_DRAWERS = 15  # of 20


class Binarize:
    r"""Dynamic binarisation: a fresh :math:`z_i \sim \text{Bernoulli}(x_i)` for each pixel at each call.

    It draws from a generator of its own, so that what else is random does not move it, and its state resumes exactly.

    Args:
        seed: of the generator.
        device: of the generator, that of the images.

    Shapes:
        x ``[*]`` in [0, 1] to ``[*]`` of 0 and 1, of the same dtype.

    Reference:
        `On the Quantitative Analysis of Deep Belief Networks <https://doi.org/10.1145/1390156.1390266>`_,
        Salakhutdinov and Murray, 2008.

    >>> binarize = Binarize(seed=0)
    >>> saved = binarize.state_dict()
    >>> first = binarize(torch.full((8,), 0.5))
    >>> binarize.load_state_dict(saved)
    >>> torch.equal(binarize(torch.full((8,), 0.5)), first)
    True
    """

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type != self.generator.device.type:
            raise ValueError(
                f"Binarize: found images on {x.device}, expected them on {self.generator.device} like its generator. "
                "Call Binarize(seed, device=x.device)."
            )
        try:
            return torch.bernoulli(x, generator=self.generator)
        except RuntimeError as error:
            raise ValueError(
                f"Binarize: found {x.dtype} in [{x.min():.3g}, {x.max():.3g}], expected floats in [0, 1]. "
                "Divide by the largest value (digits: x / 16)."
            ) from error

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the generator, a uint8 tensor."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume exactly where the state was taken."""
        self.generator.set_state(state["generator"].cpu())


def digits(split: str = "all") -> tuple[Tensor, Tensor]:
    """Return 1797 digits of 8 x 8 pixels, each pixel a count of 0 to 16 (a Binomial likelihood is honest).

    Embedded in scikit-learn. In the order of the file, 1437 images are for training and the last 360, by other
    writers, for the test.

    Args:
        split: ``"all"``, ``"train"`` or ``"test"``.

    Shapes:
        x ``[N, 64]`` float32 counts, labels ``[N]`` int64.
    """
    part = _choose("digits", split, all=slice(None), train=slice(DIGITS_TRAIN), test=slice(DIGITS_TRAIN, None))
    x, labels = _sklearn("digits").load_digits(return_X_y=True)
    return torch.from_numpy(x[part]).float(), torch.from_numpy(labels[part]).long()


def breast_cancer(scaling: str = "standardise") -> tuple[Tensor, Tensor]:
    """Return 569 tumours with 30 measurements; embedded in scikit-learn.

    Args:
        scaling: ``"standardise"`` (mean 0, variance 1), ``"min-max"`` (onto [0, 1]) or ``"none"``, by
            column; the variance has the divisor N.

    Shapes:
        x ``[569, 30]`` float64, y ``[569]`` float64: 1 is benign, 0 malignant.
    """
    scale = _choose("breast_cancer", scaling, **{"standardise": _standardise, "min-max": _min_max, "none": _as_is})
    x, y = _sklearn("breast_cancer").load_breast_cancer(return_X_y=True)
    return scale(torch.from_numpy(x).double()), torch.from_numpy(y).double()


def karate_club() -> tuple[Tensor, Tensor]:
    """Return Zachary's karate club: how many contexts two members met in, and who followed whom.

    Embedded in networkx.

    Shapes:
        weights ``[34, 34]`` float64, symmetric counts with zero diagonal; club ``[34]`` int64: 0 is Mr. Hi's, 1 the
        officer's.
    """
    networkx = library("networkx", "karate_club")
    graph = networkx.karate_club_graph()
    club = [int(graph.nodes[node]["club"] == "Officer") for node in graph]
    return torch.from_numpy(networkx.to_numpy_array(graph)).double(), torch.tensor(club)


def randhie() -> dict[str, Tensor]:
    """Return the RAND health insurance experiment: ``mdvis``, visits to a doctor in a year, and nine covariates.

    Embedded in statsmodels.

    Shapes:
        ten columns ``[20190]`` float64, by name.
    """
    table = library("statsmodels.datasets", "randhie", "statsmodels").randhie.load().data
    return {name: torch.from_numpy(table[name].to_numpy(dtype=np.float64, copy=True)) for name in table.columns}


def mnist(split: str = "train") -> tuple[Tensor, Tensor]:
    """Return MNIST: grey levels divided by 255, 60 000 for training and 10 000 for the test.

    Shapes:
        x ``[N, 784]`` float32 in [0, 1], labels ``[N]`` int64.
    """
    stem = _choose("mnist", split, train="train", test="t10k")
    x = _read(f"mnist/{stem}-images-idx3-ubyte.gz", _idx).reshape(-1, 784)
    return torch.from_numpy(x).float().div_(255), torch.from_numpy(
        _read(f"mnist/{stem}-labels-idx1-ubyte.gz", _idx)
    ).long()


def binarized_mnist(split: str = "train") -> Tensor:
    """Return MNIST as binarised once and for all by Larochelle: 50 000, 10 000 and 10 000 images.

    Args:
        split: ``"train"``, ``"valid"`` or ``"test"``.

    Shapes:
        x ``[N, 784]`` float32, 0 or 1.
    """
    part = _choose("binarized_mnist", split, train="train", valid="valid", test="test")
    loadmat = library("scipy.io", "binarized_mnist", "scipy").loadmat
    return torch.from_numpy(_read(f"static_binarized_mnist/binarized_mnist_{part}.amat", loadmat)["X"]).float()


def omniglot(split: str = "train") -> Tensor:
    """Return Omniglot as 28 x 28 pixels, by exact area average: drawers 1 to 15 train, 16 to 20 test.

    This is the split of ``chardata.mat``, the file of the importance-weighted autoencoder, by what its sizes say:
    24 345 training images as there; but 8115 for the test where that file has 8070, and other pixels, as it was
    resized otherwise. Say so beside a comparison. The images come from the resized file if the folder has it, else
    from the official archives (some seconds, and Pillow).

    Shapes:
        x ``[N, 784]`` float32 in [0, 1], 1 is ink.
    """
    train = _choose("omniglot", split, train=True, test=False)
    images, drawers = _omniglot()
    chosen = (drawers <= OMNIGLOT_TRAIN_DRAWERS) == train
    return torch.from_numpy(images[chosen].reshape(-1, 784)).float().div_(225)


def tables() -> list[str]:
    """Return the names of the count tables.

    >>> "coal_disasters" in tables()
    True
    """
    return [_stem(name) for name in registry() if name.startswith("counts/")]


def counts(name: str) -> dict[str, Tensor]:
    """Return a table of counts by column, as its file names them.

    Numbers become float64 of the shape that the file gives them, ``[N]`` in a table (``.long()`` makes indices);
    texts become int64 ``[N]``, the places of the sorted values. The draws of a posterior are ``[chains, draws]``.

    Args:
        name: one of :func:`tables`.
    """
    files = {_stem(key): key for key in registry() if key.startswith("counts/")}
    key = _choose("counts", name, **files)
    readers: dict[str, Callable] = {".csv": _csv, ".npz": _npz, ".zip": _json}
    return {column: _tensor(values) for column, values in _read(key, readers[Path(key).suffix]).items()}


def _omniglot() -> tuple[np.ndarray, np.ndarray]:
    """Images ``[32460, 28, 28]`` of 0 to 225, and drawers; the images have the one registered hash."""
    if state("omniglot/omniglot28.npz") != "missing":
        arrays = _read("omniglot/omniglot28.npz", _npz)
        return arrays["images"], arrays["drawer"]
    library("PIL.Image", "omniglot", "pillow")
    parts = [
        omniglot_images(fetch(f"omniglot/images_{part}.zip").read_bytes()) for part in ("background", "evaluation")
    ]
    images, drawers = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if hashlib.sha256(images.tobytes()).hexdigest() != OMNIGLOT_SHA256:
        raise ValueError(
            "omniglot: found resized images of another sha256 than the registered one: report this, please."
        )
    return images, drawers


def _choose(caller: str, name: str, **known: Any) -> Any:
    """The value of a name, or an error that lists the names."""
    if name not in known:
        raise ValueError(f"{caller}: found {name!r}, expected one of {', '.join(map(repr, known))}.")
    return known[name]


def _sklearn(caller: str) -> Any:
    return library("sklearn.datasets", caller, "scikit-learn")


def _stem(name: str) -> str:
    return Path(name).name.split(".")[0]


def _standardise(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0, correction=0)


def _min_max(x: Tensor) -> Tensor:
    return (x - x.amin(0)) / (x.amax(0) - x.amin(0))


def _as_is(x: Tensor) -> Tensor:
    return x


def _read(name: str, parse: Callable[[io.BytesIO], Any]) -> Any:
    """Parse a file of the registry."""
    return parse(io.BytesIO(fetch(name).read_bytes()))


def _idx(file: io.BytesIO) -> np.ndarray:
    """An idx file: two zeros, the type (8: bytes), the number of dimensions, the sizes, big-endian, then the bytes."""
    raw = gzip.decompress(file.read())
    sizes = struct.unpack_from(f">{raw[3]}I", raw, 4)
    return np.frombuffer(bytearray(raw), np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


def _npz(file: io.BytesIO) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _csv(file: io.BytesIO) -> dict[str, np.ndarray]:
    rows = list(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8")))
    return {column: _numbers([row[column] for row in rows]) for column in rows[0]}


def _json(file: io.BytesIO) -> dict[str, Any]:
    """The one JSON file in a zip; a list of chains becomes one table."""
    with zipfile.ZipFile(file) as archive:
        found = json.loads(archive.read(archive.namelist()[0]))
    return found if isinstance(found, dict) else {name: [chain[name] for chain in found] for name in found[0]}


def _numbers(column: Iterable[str]) -> np.ndarray:
    """A column of text, as numbers if they are."""
    values = np.array(list(column))
    try:
        return values.astype(np.float64)
    except ValueError:
        return values


def _tensor(values: Any) -> Tensor:
    """Numbers as float64; texts as the places of their sorted values."""
    array = np.asarray(values)
    codes = np.unique(array, return_inverse=True)[1] if array.dtype.kind in "US" else array.astype(np.float64)
    return torch.from_numpy(codes)
