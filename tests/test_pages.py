"""The generated pages are current, and say something about every public name."""

import csv
import re

import pytest
from programs import ROOT, script

import gradlab

BOOK = ROOT / "book"


PAGES = script("pages")


def coverage() -> list[dict[str, str]]:
    return list(csv.DictReader((BOOK / "coverage.csv").read_text(encoding="utf-8").splitlines()))


@pytest.mark.parametrize("name", ["checks.md", "coverage.md", "methods.md", "speed.md", "api.md", "../README.md"])
def test_the_generated_pages_are_current(name):
    assert (BOOK / name).read_text(encoding="utf-8") == PAGES.pages()[name], "run: make pages"


@pytest.mark.parametrize("name", sorted(gradlab.__all__))
def test_every_public_name_is_documented(name):
    entry = re.search(rf"^\.\. [a-z:]+:: gradlab\.{name}$\n(.*)\n(.*)", (BOOK / "api.md").read_text(), re.MULTILINE)
    assert entry, f"{name} is not on the API page"
    assert entry[0].startswith(".. auto") or entry[2].strip(), f"{name} needs a docstring after its assignment"
    if entry[0].startswith(".. auto"):
        assert getattr(gradlab, name).__doc__, f"{name} needs a docstring"


def test_every_statement_of_the_sources_has_a_home():
    rows = coverage()
    numbers = [row["number"] for row in rows]
    sizes = {0: 41, 1: 25, 2: 31, 3: 43, 4: 30}
    assert numbers == [f"{source}.{i:02d}" for source, size in sizes.items() for i in range(1, size + 1)]
    assert all(1 <= int(row["chapter"]) <= 22 and row["topic"] for row in rows)


def test_sections_named_in_the_coverage_table_exist():
    texts = {number: path.read_text(encoding="utf-8") for number, path in PAGES.chapters().items()}
    for row in coverage():
        if row["section"]:
            assert row["section"] in texts[row["chapter"]], row


def test_every_erratum_is_a_statement_of_the_coverage_table():
    errata = re.findall(r"^\| (\d\.\d\d) \|", (BOOK / "errata.md").read_text(encoding="utf-8"), re.MULTILINE)
    known = {row["number"]: row["chapter"] for row in coverage()}
    assert errata
    assert set(errata) <= set(known)


def test_every_citation_has_a_reference():
    keys = set(re.findall(r"^@\w+\{(\w+),", (BOOK / "references.bib").read_text(encoding="utf-8"), re.MULTILINE))
    for path in [*BOOK.glob("*.md"), *BOOK.glob("*.ipynb")]:
        cited = re.findall(r"\{cite:[a-z]+\}`([^`]+)`", path.read_text(encoding="utf-8"))
        assert {key.strip() for group in cited for key in group.split(",")} <= keys, path.name
