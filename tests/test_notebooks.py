"""The rules for notebooks: what nbval does not see, and what a reader may rely on."""

import base64
import re
import subprocess
import sys

import nbformat
import pytest
import yaml
from programs import ROOT, script

BOOK = ROOT / "book"
CHAPTERS = sorted(BOOK.glob("*.ipynb"))
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
LABEL = re.compile(
    r"^(?:\((?P<target>[\w-]+)\)=|:(?:label|name): *(?P<option>\S+)|\$\$ *\((?P<equation>[\w-]+)\))", re.M
)
VARYING = re.compile(rf"0x[0-9a-f]{{6,}}|/(?:home|tmp|usr|Users)/|{re.escape(str(ROOT))}|Traceback \(most recent")


def read(path):
    return nbformat.read(path, as_version=4)


def code(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs(path):
    return [output for cell in code(path) for output in cell.outputs]


def texts(path):
    """All printed text of a notebook."""
    for output in outputs(path):
        yield output.get("text", "")
        yield from (text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def images(path):
    """The cells that show an image, and the image."""
    for cell in code(path):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                yield cell, base64.b64decode(output.data["image/png"])


every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def test_the_table_of_contents_lists_every_chapter():
    listed = [entry["file"] for part in TOC["parts"] for entry in part["chapters"]]
    assert [name for name in listed if re.match(r"book/\d", name)] == [f"book/{path.stem}" for path in CHAPTERS]
    for name in [TOC["root"], *listed]:
        assert any((ROOT / f"{name}{kind}").exists() for kind in (".md", ".ipynb")), name


def test_labels_are_unique_and_have_a_known_prefix():
    labels = []
    for path in CHAPTERS:
        source = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
        labels += [next(filter(None, match.groups())) for match in LABEL.finditer(source)]
        labels += [cell.metadata["mystnb"]["figure"]["name"] for cell, _ in images(path)]
    assert not {label for label in labels if labels.count(label) > 1}
    wrong = [x for x in labels if not re.match(r"(ch|sec|thm|lem|cor|prop|def|rem|eq|fig|tab|ex|sol|exa|alg)-", x)]
    assert not wrong


@every_chapter
def test_it_is_canonical(path):
    writer = script("notebooks")
    assert path.read_text(encoding="utf-8") == writer.dumps(read(path)), f"run: python scripts/notebooks.py {path}"


@every_chapter
def test_every_cell_was_run_once_in_order(path):
    """A cell without a count is not compared by nbval, so that a stripped notebook would pass."""
    assert [cell.execution_count for cell in code(path)] == list(range(1, len(code(path)) + 1))


@every_chapter
def test_nbval_collects_every_code_cell(path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        str(path),
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert found.count(f"{path.name}::") == len(code(path)), found[-500:]


@every_chapter
def test_the_outputs_do_not_vary(path):
    for output in outputs(path):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
    for text in texts(path):
        assert not VARYING.search(text), VARYING.search(text)


@every_chapter
def test_the_cells_fit_on_a_page(path):
    for cell in code(path):
        lines = cell.source.splitlines()
        assert len(lines) <= 15, f"{len(lines)} lines of code: {lines[0]}"
        assert max(map(len, lines), default=0) <= 79, max(lines, key=len)
    for text in texts(path):
        assert max(map(len, text.splitlines()), default=0) <= 79, text


@every_chapter
def test_every_figure_is_small_and_described(path):
    for cell, image in images(path):
        settings = cell.metadata["mystnb"]
        assert len(image) <= 60_000, f"{settings['figure']['name']}: {len(image)} bytes"
        assert len(settings["image"]["alt"]) > 20, settings
        assert settings["figure"]["caption"], settings


@every_chapter
def test_what_is_not_compared_is_followed_by_a_check(path):
    tags = [cell.metadata.get("tags", []) for cell in code(path)]
    ignored = [number for number, names in enumerate(tags) if "nbval-ignore-output" in names]
    compared = [number for number, cell in enumerate(code(path)) if cell.outputs and number not in ignored]
    assert all(any(number > place for number in compared) for place in ignored)


@every_chapter
def test_it_checks_its_claims_and_shows_where_they_fail(path):
    records = [output.metadata["gradlab"] for output in outputs(path) if "gradlab" in output.get("metadata", {})]
    assert len(records) >= 3
    rows = [row for record in records for row in record["rows"]]
    assert all(row["value"] == row["expect"] for row in rows)
    assert any(not row["expect"] for row in rows), "no case that must fail"
    tests = {record["test"] for record in records if record["test"]}
    assert tests, "no claim is kept by a unit test"
    for test in tests:
        file, _, function = test.partition("::")
        assert (ROOT / file).exists(), f"{test} does not exist"
        name = re.match(r"\w*", function.split("::")[-1])[0]
        assert not name or re.search(rf"def {name}\b", (ROOT / file).read_text()), f"{test} does not exist"


@every_chapter
def test_exercises_have_solutions(path):
    source = "\n".join(cell.source for cell in read(path).cells)
    exercises = set(re.findall(r":label: (ex-[\w-]+)", source))
    solved = set(re.findall(r"\{solution(?:-start)?\} (ex-[\w-]+)", source))
    assert 3 <= len(exercises) <= 5
    assert exercises == solved
