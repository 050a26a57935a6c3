"""Files without a mirror, made from public sources: the bytes of one file to the bytes of another."""

from __future__ import annotations

import csv
import io
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

__all__ = ["OMNIGLOT_SHA256", "RECIPES", "omniglot_images"]

OMNIGLOT_SHA256 = "da16123c4956c6ae54678b30e50726cade49d77830a2f23d372ddf71d46268c8"
"""Of the uint8 images [32460, 28, 28], background and evaluation sets, as bytes."""

AREA = np.repeat(np.eye(28, dtype=np.float32), 15, axis=1).reshape(28, 105, 4).sum(2)
"""How many quarters of each of 105 pixels fall into each of 28: 15 in a row."""


def omniglot_images(archive: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of an Omniglot archive at 28 x 28, by exact area average, and their drawers.

    The order is that of the names: alphabet, character, drawer.

    Shapes:
        images ``[N, 28, 28]`` uint8, ink from 0 to 225; drawers ``[N]`` from 1 to 20.
    """
    from PIL import Image

    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        names = sorted(name for name in files.namelist() if name.endswith(".png"))
        ink = (~np.asarray(Image.open(io.BytesIO(files.read(name))).convert("1")) for name in names)
        images = np.stack([AREA @ drawing @ AREA.T for drawing in ink])
    return images.astype(np.uint8), np.array([int(name[-6:-4]) for name in names])


def _coal(source: bytes) -> bytes:
    """Dates of disasters, as counts of the years 1851 to 1962."""
    years = Counter(int(float(row["date"])) for row in _rows(source))
    return _table(["year", "disasters"], ([str(year), str(years[year])] for year in range(1851, 1963)))


def _columns(old: list[str], new: list[str], *convert: Callable[[str], str]) -> Callable[[bytes], bytes]:
    """Choose, convert and rename columns."""
    functions: list[Callable[[str], str]] = [*convert, *[str] * (len(old) - len(convert))]

    def recipe(source: bytes) -> bytes:
        return _table(new, ([f(row[c]) for c, f in zip(old, functions, strict=True)] for row in _rows(source)))

    return recipe


def _decimal(text: str) -> str:
    return str(float(text))


CRABS = ["color", "spine", "width", "weight", "satellites"]
SHIPS = ["type", "year", "period", "service", "incidents"]
RECIPES: dict[str, Callable[[bytes], bytes]] = {
    "counts/coal_disasters.csv": _coal,
    "counts/horse_kicks.csv": _columns(["year", "corp", "y"], ["year", "corps", "deaths"], lambda year: f"18{year}"),
    "counts/horseshoe_crabs.csv": _columns(CRABS, CRABS, str, str, _decimal, _decimal),
    "counts/ship_damage.csv": _columns(SHIPS, SHIPS),
    "counts/malay_butterflies.csv": _columns(["nTokens", "Freq"], ["individuals", "species"]),
}
"""For a file, what makes it of its source."""


def _rows(source: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(source.decode())))


def _table(header: list[str], rows: Iterator[list[str]]) -> bytes:
    return "".join(",".join(row) + "\n" for row in [header, *rows]).encode()
