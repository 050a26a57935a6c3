"""The data: what the loaders return, and that no wrong, torn or missing file passes."""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import io
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradlab.cli import main
from gradlab.experiments import data, files, recipes

REAL = os.environ.get(files.VARIABLE)
NAME = "mnist/t10k-labels-idx1-ubyte.gz"
CONTENT = b"the right bytes" * 100


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip where the folder named by GRADLAB_DATA lacks a file."""
    missing = [name for name in names if not (REAL and (Path(REAL) / name).is_file())]
    return pytest.mark.skipif(bool(missing), reason=f"{files.VARIABLE}={REAL or ''} has no {', '.join(missing)}")


class Mirror(BaseHTTPRequestHandler):
    """A server whose answer depends on the path: right, wrong, torn, or 404."""

    def do_GET(self) -> None:
        self.seen.append(self.path)  # before the answer: the client may look as soon as it has that
        body = {"/right": CONTENT, "/wrong": b"a page that asks to log in", "/torn": CONTENT}.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write((body or b"")[: 50 if self.path == "/torn" else None])

    def log_message(self, *args: object) -> None:
        """Stay silent."""


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[partial]:
    """Serve on localhost; the function returned sets the mirrors of ``NAME``, whose hash is that of ``CONTENT``."""
    handler = type("Handler", (Mirror,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def use(*paths: str) -> list[str]:
        urls = [f"http://127.0.0.1:{server.server_port}/{path}" for path in paths]
        entry = files.registry()[NAME] | {"urls": urls, "sha256": hashlib.sha256(CONTENT).hexdigest()}
        monkeypatch.setitem(files.registry(), NAME, entry)
        return handler.seen

    yield use
    server.shutdown()
    server.server_close()


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_a_file_is_fetched_once(mirror: partial, tmp_path: Path) -> None:
    seen = mirror("right")
    assert files.state(NAME) == "missing"
    assert files.fetch(NAME).read_bytes() == CONTENT
    assert files.fetch(NAME) == tmp_path / NAME
    assert files.state(NAME) == "ok"
    assert seen == ["/right"]


def test_a_mirror_that_fails_gives_way_to_the_next(mirror: partial) -> None:
    seen = mirror("gone", "wrong", "torn", "right")
    assert files.fetch(NAME).read_bytes() == CONTENT
    assert seen == ["/gone", "/wrong", "/torn", "/right"]


def test_a_wrong_hash_is_refused_and_not_kept(mirror: partial, tmp_path: Path) -> None:
    mirror("wrong")
    with pytest.raises(ValueError, match=r"wrong hash, refused and not kept, expected sha256 .*; try again later"):
        files.fetch(NAME)
    assert left(tmp_path) == []


def test_a_torn_download_is_not_kept(mirror: partial, tmp_path: Path) -> None:
    mirror("torn")
    with pytest.raises((ValueError, FileNotFoundError), match=r"not kept|at none of its 1 mirrors"):
        files.fetch(NAME)
    assert left(tmp_path) == []


def test_a_corrupt_file_says_so_and_is_fetched_again(mirror: partial, tmp_path: Path) -> None:
    mirror("right")
    files.fetch(NAME).write_bytes(CONTENT[:-1])
    assert files.state(NAME) == "corrupt"
    with pytest.warns(UserWarning, match="is corrupt .* fetching it again"):
        assert files.fetch(NAME).read_bytes() == CONTENT


def test_a_corrupt_file_is_never_used_offline(mirror: partial, tmp_path: Path) -> None:
    mirror("gone")
    path = tmp_path / NAME
    path.parent.mkdir()
    path.write_bytes(b"torn")
    with (
        pytest.warns(UserWarning, match="corrupt"),
        pytest.raises(FileNotFoundError, match=r"found it corrupt in .*HTTPError"),
    ):
        files.fetch(NAME)
    assert path.read_bytes() == b"torn"  # nothing lost either


@pytest.mark.parametrize(
    ("load", "name", "embedded"),
    [
        (data.mnist, "mnist/train-images-idx3-ubyte.gz", "digits()"),
        (data.binarized_mnist, "static_binarized_mnist/binarized_mnist_train.amat", "digits()"),
        (data.omniglot, "omniglot/images_background.zip", "digits()"),
        (partial(data.counts, "coal_disasters"), "counts/coal_disasters.csv", "randhie()"),
        (partial(data.counts, "earthquakes"), "counts/earthquakes.csv", "randhie()"),
        (partial(data.counts, "posteriordb_surgical_data"), "counts/posteriordb_surgical_data.json.zip", "randhie()"),
    ],
)
def test_offline_is_one_sentence(load, name: str, embedded: str, tmp_path: Path, monkeypatch) -> None:
    """It names the file, the folder, the variable and the embedded alternative."""

    def unreachable(*args: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(files, "_get", unreachable)
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        load()
    sentence = str(caught.value)
    assert all(word in sentence for word in (name, str(tmp_path), files.VARIABLE, embedded)), sentence
    assert "\n" not in sentence and ". " not in sentence and sentence.endswith(".")
    assert ("a network" in sentence) == bool(files.mirrors(name))
    assert left(tmp_path) == []


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(url: str, output: str, _: object) -> None:
        Path(output).write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    monkeypatch.setattr(files, "_get", full)
    with pytest.raises(FileNotFoundError, match="the last failed with No space left on device"):
        files.fetch(NAME)
    assert left(tmp_path) == []


def test_the_folder_is_the_variable_else_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(files.VARIABLE, "~/somewhere")
    assert files.folder() == Path.home() / "somewhere"
    for unset in (partial(monkeypatch.setenv, files.VARIABLE, ""), partial(monkeypatch.delenv, files.VARIABLE)):
        unset()
        assert files.folder() == Path(pytest.importorskip("pooch").os_cache("gradlab"))


def test_a_missing_library_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    loaders = {
        "sklearn.datasets": (data.digits, data.breast_cancer),
        "networkx": (data.karate_club,),
        "statsmodels.datasets": (data.randhie,),
        "scipy.io": (data.binarized_mnist,),
        "PIL.Image": (data.omniglot,),
    }
    for module, calls in loaders.items():
        monkeypatch.setitem(sys.modules, module, None)
        for load in calls:
            with pytest.raises(
                ImportError, match=r'^\w+: found no .* with pip install "gradlab-book\[experiments\]"\.$'
            ):
                load()


@pytest.mark.parametrize(
    ("load", "name", "expected"),
    [
        (data.digits, "valid", "'all', 'train', 'test'"),
        (data.breast_cancer, "robust", "'standardise', 'min-max', 'none'"),
        (data.mnist, "valid", "'train', 'test'"),
        (data.binarized_mnist, "all", "'train', 'valid', 'test'"),
        (data.omniglot, "valid", "'train', 'test'"),
        (data.counts, "coal", "'coal_disasters'"),
        (files.fetch, "emnist", "gradlab data list"),
        (files.family, "emnist", "static_binarized_mnist"),
    ],
)
def test_an_unknown_name_is_an_error(load, name: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"found .*'{name}', expected .*{expected}"):
        load(name)


def test_the_registry_is_complete_and_shipped() -> None:
    for name, entry in files.registry().items():
        assert set(entry) - {"derived_from"} == {"bytes", "sha256", "urls", "licence", "note"}, name
        assert len(entry["sha256"]) == 64 and entry["bytes"] > 0 and entry["licence"], name
        assert entry["urls"] or "derived_from" in entry, name
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '"gradlab.experiments" = ["registry.json"]' in text


def test_a_name_means_a_group_or_a_file() -> None:
    assert files.family(NAME) == files.family("t10k-labels-idx1-ubyte") == [NAME]
    assert len(files.family("static_binarized_mnist")) == 3
    assert len(files.family("counts")) == len(data.tables()) == len(set(data.tables()))


def test_digits() -> None:
    x, labels = data.digits()
    assert x.shape == (1797, 64) and x.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(x, x.round()) and (x.min(), x.max()) == (0, 16)
    parts = [data.digits(split)[0] for split in ("train", "test")]
    assert torch.equal(torch.cat(parts), x) and len(parts[1]) == 360


def test_breast_cancer() -> None:
    x, y = data.breast_cancer()
    assert x.shape == (569, 30) and x.dtype == y.dtype == torch.float64
    torch.testing.assert_close(x.mean(0), torch.zeros(30), atol=1e-12, rtol=0)
    torch.testing.assert_close(x.square().mean(0), torch.ones(30), atol=1e-12, rtol=0)
    assert y.sum() == 357  # benign
    scaled = data.breast_cancer("min-max")[0]
    assert (scaled.amin(0) == 0).all() and (scaled.amax(0) == 1).all()
    raw = data.breast_cancer("none")[0]
    torch.testing.assert_close((raw - raw.mean(0)) / raw.std(0, correction=0), x)


def test_karate_club() -> None:
    weights, club = data.karate_club()
    assert weights.shape == (34, 34) and weights.dtype == torch.float64 and club.dtype == torch.int64
    assert torch.equal(weights, weights.T) and (weights.diagonal() == 0).all()
    assert (weights > 0).sum() == 2 * 78 and weights.sum() == 2 * 231  # Zachary's edges, and meetings
    assert club[0] == 0 and club[33] == 1 and club.sum() == 17


def test_randhie() -> None:
    table = data.randhie()
    assert len(table) == 10 and all(column.shape == (20190,) for column in table.values())
    visits = table["mdvis"]
    assert visits.dtype == torch.float64 and torch.equal(visits, visits.round()) and visits.max() == 77


IMAGES = ("mnist/train-images-idx3-ubyte.gz", "mnist/train-labels-idx1-ubyte.gz")


@needs(*IMAGES, *(name.replace("train", "t10k") for name in IMAGES))
def test_mnist() -> None:
    for split, size, ones in (("train", 60000, 6742), ("test", 10000, 1135)):
        x, labels = data.mnist(split)
        assert x.shape == (size, 784) and x.dtype == torch.float32 and labels.dtype == torch.int64
        assert (x.min(), x.max()) == (0, 1) and (labels == 1).sum() == ones
    assert labels[:4].tolist() == [7, 2, 1, 0]
    assert x[0].reshape(28, 28)[7, 6:10].mul(255).round().tolist() == [84, 185, 159, 151]  # rows first


@needs(*(f"static_binarized_mnist/binarized_mnist_{split}.amat" for split in ("train", "valid", "test")))
def test_binarized_mnist() -> None:
    for split, size in (("train", 50000), ("valid", 10000), ("test", 10000)):
        x = data.binarized_mnist(split)
        assert x.shape == (size, 784) and x.dtype == torch.float32
        assert ((x == 0) | (x == 1)).all()
    original = files.registry()["static_binarized_mnist/binarized_mnist_test.amat"]["note"]
    text = b"".join(b" ".join(b"%d" % v for v in row) + b"\n" for row in x.int().tolist()[:10000])
    assert hashlib.sha256(text).hexdigest() in original  # the bytes of the file first published


@needs("omniglot/omniglot28.npz")
def test_omniglot() -> None:
    train, test = data.omniglot("train"), data.omniglot("test")
    assert train.shape == (24345, 784) and test.shape == (8115, 784) and train.dtype == torch.float32
    assert (train.min(), train.max()) == (0, 1) and train.mean() < 0.1  # ink is 1


@needs(*files.family("counts"))
def test_counts() -> None:
    tables = {name: data.counts(name) for name in data.tables()}
    for table in tables.values():
        assert all(column.dtype in (torch.float64, torch.int64) for column in table.values())
    coal = tables["coal_disasters"]
    assert coal["year"][[0, -1]].tolist() == [1851, 1962] and coal["disasters"].sum() == 191
    kicks = tables["horse_kicks"]
    assert kicks["deaths"].sum() == 196 and kicks["corps"].unique().tolist() == list(range(14))
    assert tables["horseshoe_crabs"]["satellites"].shape == (173,)
    assert tables["posteriordb_butterfly"]["X"].shape == (28, 20)
    assert tables["posteriordb_gp_pois_regr_reference_draws"]["rho"].shape == (10, 1000)
    assert tables["pbmc68k_700x765_counts"]["counts"].shape == (700, 765)


@needs("omniglot/omniglot28.npz", *(f"omniglot/images_background_small{i}.zip" for i in (1, 2)))
@pytest.mark.parametrize(
    ("part", "alphabets"),
    [(1, "Balinese Early_Aramaic Greek Korean Latin"), (2, "Greek Japanese_(katakana) Latin Sanskrit Tagalog")],
)
def test_omniglot_is_what_the_official_archives_give(part: int, alphabets: str) -> None:
    """Resized here, byte for byte, in the order of the names."""
    images, drawers = recipes.omniglot_images(Path(REAL, f"omniglot/images_background_small{part}.zip").read_bytes())
    arrays = data._read("omniglot/omniglot28.npz", data._npz)
    chosen = np.isin(arrays["alphabet_names"][arrays["alphabet"]], alphabets.encode().split())
    assert np.array_equal(images, arrays["images"][chosen]) and np.array_equal(drawers, arrays["drawer"][chosen])
    assert hashlib.sha256(arrays["images"].tobytes()).hexdigest() == recipes.OMNIGLOT_SHA256


def test_omniglot_from_the_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small archives: ink is exact, the split is by drawer, and other images than the known ones are refused."""
    black = np.ones((105, 105), dtype=bool)
    black[:4, :4] = False  # 4 x 4 pixels of ink: the first small pixel is full, its neighbours get a fifteenth
    for part in ("background", "evaluation"):
        path = tmp_path / f"omniglot/images_{part}.zip"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for drawer in (16, 15):
                png = io.BytesIO()
                Image.fromarray(black).save(png, "PNG")
                archive.writestr(f"images/Greek/character01/0394_{drawer}.png", png.getvalue())
        entry = files.registry()[f"omniglot/images_{part}.zip"]
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(files.registry(), f"omniglot/images_{part}.zip", entry | {"sha256": sha256})
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match="another sha256"):
        data.omniglot()
    images, drawers = recipes.omniglot_images(path.read_bytes())
    assert drawers.tolist() == [15, 16]
    assert images[0, :2, :3].tolist() == [[225, 15, 0], [15, 1, 0]]
    monkeypatch.setattr(data, "OMNIGLOT_SHA256", hashlib.sha256(np.tile(images, (2, 1, 1)).tobytes()).hexdigest())
    assert data.omniglot("train").shape == data.omniglot("test").shape == (2, 784)


def test_a_file_is_made_of_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source and result both have a registered hash; nothing is left of a source that gives another result."""
    source, result = b"rownames,nTokens,Freq\n1,1,118\n", b"individuals,species\n1,118\n"
    name, digest = "counts/malay_butterflies.csv", lambda content: hashlib.sha256(content).hexdigest()
    entry = {"derived_from": [{"url": "https://example.org/Butterfly.csv", "sha256": digest(source)}], "urls": []}
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    monkeypatch.setattr(files, "_get", lambda url, output, _: Path(output).write_bytes(source) and None)
    monkeypatch.setitem(files.registry(), name, entry | {"sha256": digest(b"another")})
    with pytest.raises(ValueError, match="refused and not kept"):
        files.fetch(name)
    assert files.state(name) == "missing"
    monkeypatch.setitem(files.registry(), name, entry | {"sha256": digest(result)})
    assert files.fetch(name).read_bytes() == result
    assert {column: values.tolist() for column, values in data.counts("malay_butterflies").items()} == {
        "individuals": [1],
        "species": [118],
    }


@needs(*recipes.RECIPES)
def test_the_recipes_give_the_files() -> None:
    """The sources, rebuilt from the files: those of four have the registered hash, the dates of coal are lost."""
    for name, recipe in recipes.RECIPES.items():
        content = Path(REAL, name).read_bytes()
        rows = list(csv.DictReader(io.StringIO(content.decode())))
        source = SOURCES[name](rows)
        assert recipe(source) == content, name
        if "coal" not in name:
            assert hashlib.sha256(source).hexdigest() == files.registry()[name]["derived_from"][0]["sha256"], name


def numbered(header: str, *rows: list[str]) -> bytes:
    return "\n".join([f"rownames,{header}", *(",".join([str(i), *row]) for i, row in enumerate(rows, 1)), ""]).encode()


def short(text: str) -> str:
    return text.removesuffix(".0")


SOURCES = {
    "counts/coal_disasters.csv": lambda rows: numbered(
        "date", *([f"{row['year']}.5"] for row in rows for _ in range(int(row["disasters"])))
    ),
    "counts/horse_kicks.csv": lambda rows: numbered(
        "y,year,corp", *([row["deaths"], row["year"][2:], row["corps"]] for row in rows)
    ),
    "counts/horseshoe_crabs.csv": lambda rows: numbered(
        "color,spine,width,weight,satellites", *([short(cell) for cell in row.values()] for row in rows)
    ),
    "counts/ship_damage.csv": lambda rows: numbered(
        "type,year,period,service,incidents", *(list(row.values()) for row in rows)
    ),
    "counts/malay_butterflies.csv": lambda rows: numbered("nTokens,Freq", *(list(row.values()) for row in rows)),
}


def test_an_idx_file_is_read() -> None:
    raw = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, *range(6)])
    assert data._idx(io.BytesIO(gzip.compress(raw))).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]


def test_binarisation_follows_the_grey_levels() -> None:
    x = torch.tensor([0.0, 0.25, 1.0]).expand(40_000, 3)
    mean = data.Binarize(seed=3)(x).mean(0)
    assert mean[0] == 0 and mean[2] == 1
    assert abs(mean[1] - 0.25) < 5 * (0.25 * 0.75 / 40_000) ** 0.5


def test_binarisation_resumes_exactly(tmp_path: Path) -> None:
    """Through a file, in a new object with another seed; and no global random number is used."""
    x = torch.full((3, 5), 0.5)
    binarize = data.Binarize(seed=1)
    before = torch.get_rng_state()
    binarize(x)
    torch.save(binarize.state_dict(), tmp_path / "state.pt")
    expected = [binarize(x) for _ in range(3)]
    resumed = data.Binarize(seed=2)
    assert not torch.equal(resumed(x), expected[0])  # a mutant that ignores the state would pass otherwise
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(resumed(x), z) for z in expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "x", [torch.tensor([16.0]), torch.tensor([float("nan")]), torch.tensor([1], dtype=torch.uint8)]
)
def test_binarisation_wants_probabilities(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected floats in \[0, 1\]\. Divide"):
        data.Binarize()(x)


def test_binarisation_names_another_device() -> None:
    with pytest.raises(ValueError, match="found images on meta"):
        data.Binarize()(torch.ones(2, device="meta"))


def test_the_command_lists(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    assert main(["data", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert str(tmp_path) in lines[0]
    assert len(lines) == 1 + 4 + len(files.registry())
    assert [line.split()[1] for line in lines if line.startswith("digits")] == ["embedded"]


def test_the_command_fetches_and_verifies(mirror: partial, tmp_path: Path, capsys) -> None:
    mirror("right")
    assert main(["data", "fetch", NAME]) == 0
    assert capsys.readouterr().out == f"{tmp_path / NAME}\n"
    assert main(["data", "verify"]) == 0
    assert f"1 ok, {len(files.registry()) - 1} missing, 0 corrupt" in capsys.readouterr().out
    (tmp_path / NAME).write_bytes(b"torn")
    assert main(["data", "verify"]) == 1
    printed = capsys.readouterr()
    assert f"corrupt  {NAME}" in printed.out and "gradlab data fetch" in printed.err


def test_the_command_reports_errors(mirror: partial, capsys, monkeypatch) -> None:
    mirror("wrong")
    for name, words in (
        (NAME, "refused"),
        ("earthquakes", "it has no mirror"),
        ("emnist", "found the name 'emnist'"),
    ):
        assert main(["data", "fetch", name]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("gradlab: ") and words in printed.err
    for name in files.family("mnist"):
        monkeypatch.setitem(files.registry(), name, files.registry()[name] | {"urls": []})
    assert main(["data", "fetch", "mnist"]) == 0
    assert capsys.readouterr().err.count("has no mirror: left out.") == 4
    assert main(["data", "fetch", "digits"]) == 0
    assert "embedded" in capsys.readouterr().out


def test_gradlab_imports_none_of_it() -> None:
    """Nor does the command line before it is asked; even the loaders wait for their call."""
    code = (
        "import sys, gradlab, gradlab.cli; print('gradlab.experiments' in sys.modules); import gradlab.experiments\n"
        "print(sorted({'pooch', 'requests', 'sklearn', 'networkx', 'statsmodels', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split("\n")[:2] == ["False", "[]"]
