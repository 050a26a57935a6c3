"""The comparison of the chapters is itself tested: see scripts/canary.py."""

import pytest
from programs import ROOT, script

CHAPTERS = sorted(path.name[:2] for path in (ROOT / "book").glob("[0-9][0-9]_*.ipynb"))


CANARY = script("canary")
every_canary = pytest.mark.parametrize("canary", CANARY.CANARIES, ids=lambda canary: f"{canary.chapter}-{canary.file}")


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_chapter_has_a_canary(chapter):
    assert chapter in {canary.chapter for canary in CANARY.CANARIES}


@every_canary
def test_the_line_to_break_stands_once(canary):
    assert (ROOT / "gradlab" / canary.file).read_text(encoding="utf-8").count(canary.old) == 1
    assert canary.old != canary.new


@pytest.mark.canary
@pytest.mark.timeout(600)
@every_canary
def test_the_chapter_notices_the_broken_line(canary):
    noticed, output = CANARY.notices(canary)
    assert noticed, output
