"""Files of public data, known by their sha256: found in a cache folder, else fetched from mirrors.

``registry.json`` holds, for each file, its size, sha256, mirrors and licence. The folder is the environment variable
``GRADLAB_DATA``, else the platform's cache folder. No byte is used whose hash is not the registered one.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from gradlab.experiments.recipes import RECIPES

__all__ = ["VARIABLE", "family", "fetch", "folder", "mirrors", "offline_alternative", "registry", "state"]

VARIABLE = "GRADLAB_DATA"
"""The environment variable that names the folder of the data."""

TIMEOUT = 15  # seconds without a byte
ALTERNATIVES = {"counts": "randhie()"}  # of a group of files, else digits()


@cache
def registry() -> dict[str, dict[str, Any]]:
    """Return the known files: for each name ``bytes``, ``sha256``, ``urls``, ``licence`` and ``note``.

    >>> registry()["mnist/train-images-idx3-ubyte.gz"]["bytes"]
    9912422
    """
    return json.loads(files("gradlab.experiments").joinpath("registry.json").read_text(encoding="utf-8"))


def library(name: str, caller: str, distribution: str | None = None) -> ModuleType:
    """Import an optional library, or say in one sentence how to get it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{caller}: found no {distribution or name}, expected it beside gradlab; "
            'install it with pip install "gradlab-book[experiments]".'
        ) from error


def folder() -> Path:
    """Return the folder of the data: ``$GRADLAB_DATA``, else the platform's cache folder."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(library("pooch", "files.folder").os_cache("gradlab"))


def family(name: str) -> list[str]:
    """Return the files that a name means: a group (``mnist``), a file, or the end of its path without suffixes.

    >>> family("coal_disasters")
    ['counts/coal_disasters.csv']
    >>> len(family("mnist"))
    4
    """
    found = [key for key in registry() if name in (key, *key.split("/"), key.split("/")[1].split(".")[0])]
    if not found:
        groups = ", ".join(dict.fromkeys(key.split("/")[0] for key in registry()))
        raise ValueError(
            f"found the name {name!r}, expected a group ({groups}) or a file that `gradlab data list` shows."
        )
    return found


def state(name: str) -> str:
    """Return ``"ok"``, ``"missing"`` or ``"corrupt"``: what the folder holds under the name of one file."""
    path = folder() / name
    if not path.is_file():
        return "missing"
    return "ok" if _sha256(path) == registry()[name]["sha256"] else "corrupt"


def fetch(name: str) -> Path:
    """Return the path of a file whose hash is right: the cached one, else a download from the first mirror that works.

    A corrupt cached file is reported by a warning and fetched again; a download with another hash is refused, and not
    kept.

    Raises:
        ValueError: the name is unknown, or a mirror sent another file.
        FileNotFoundError: the file is in no folder and at no mirror that answers.
    """
    if name not in registry():
        raise ValueError(f"fetch: found the name {name!r}, expected one that `gradlab data list` shows.")
    found = state(name)
    if found == "ok":
        return folder() / name
    if found == "corrupt":
        warnings.warn(
            f"{folder() / name} is corrupt (its sha256 is not the registered one): fetching it again.", stacklevel=2
        )
    return _download(name, found)


def mirrors(name: str) -> list[str]:
    """Return the addresses of a file, or of the source that it is made of by a recipe."""
    entry = registry()[name]
    return [source["url"] for source in entry["derived_from"]] if name in RECIPES else entry["urls"]


def offline_alternative(name: str) -> str:
    """Return the loader of embedded data that stands in for a file."""
    return ALTERNATIVES.get(name.split("/")[0], "digits()")


def _download(name: str, found: str) -> Path:
    """Try the mirrors in turn; what none of them could do is one sentence."""
    pooch = library("pooch", "files.fetch")
    pooch.get_logger().setLevel("WARNING")
    sha256, failures = registry()[name]["sha256"], []
    for url in mirrors(name):
        try:
            return _make(pooch, url, name) if name in RECIPES else _retrieve(pooch, url, folder() / name, sha256)
        except (OSError, ValueError) as error:
            failures.append(error)
    if not all(isinstance(e, OSError) for e in failures):
        raise ValueError(
            f"{name}: found a download with a wrong hash, refused and not kept, expected sha256 {sha256}; "
            f"try again later, or put the file in a folder named by {VARIABLE}."
        )
    network = "a network, or " if failures else ""
    raise FileNotFoundError(
        f"{name}: found it {found} in {folder()} and {_mirrors(failures)}, "
        f"expected {network}a folder that has it, named by the environment variable {VARIABLE}; "
        f"{offline_alternative(name)} of gradlab.experiments.data is embedded and needs neither."
    )


def _retrieve(pooch: ModuleType, url: str, path: Path, sha256: str) -> Path:
    """Download to a temporary name, compare the hash, and only then rename."""
    pooch.retrieve(url, f"sha256:{sha256}", fname=path.name, path=path.parent, downloader=_get)
    return path


def _make(pooch: ModuleType, url: str, name: str) -> Path:
    """Download the source of a file and follow the recipe; what comes out must have the registered hash too."""
    path, entry = folder() / name, registry()[name]
    source = _retrieve(pooch, url, folder() / "sources" / Path(url).name, entry["derived_from"][0]["sha256"])
    content = RECIPES[name](source.read_bytes())
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ValueError(f"{name}: found another sha256 after the recipe.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    return part.replace(path)


def _get(url: str, output: str, _: object) -> None:
    """Write what a mirror sends; unlike pooch's own downloader, leave no open socket after an error."""
    requests = import_module("requests")
    with requests.get(url, stream=True, timeout=TIMEOUT) as response, open(output, "wb") as file:
        response.raise_for_status()
        for chunk in response.iter_content(2**16):
            file.write(chunk)


def _mirrors(failures: Sequence[Exception]) -> str:
    """What the mirrors did, in words."""
    if not failures:
        return "it has no mirror"
    why = getattr(failures[-1], "strerror", None) or type(failures[-1]).__name__  # a full disk has words of its own
    return f"at none of its {len(failures)} mirrors (the last failed with {why})"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
