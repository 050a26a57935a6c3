"""Number each chapter by its file name: book/20_which_estimator is 20.

So the numbers stand while chapters are missing. Jupyter Book would count.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx_external_toc.collectors import (
    TocTreeCollectorWithStyles as Collector,
)

CHAPTER = re.compile(r"book/(\d\d)_")


def renumber(env: BuildEnvironment) -> None:
    """Replace the first part of every section number of a chapter."""
    for name, numbers in env.toc_secnumbers.items():
        if match := CHAPTER.match(name):
            chapter = int(match[1])
            for anchor, number in numbers.items():
                numbers[anchor] = number and (chapter, *number[1:])
            titles = env.titles[name], env.longtitles[name]
            entries = env.tocs[name].findall(nodes.reference)
            places: list[Any] = [*titles, *entries]
            for place in places:
                if number := place.get("secnumber"):
                    place["secnumber"] = (chapter, *number[1:])


def setup(app: Sphinx) -> dict[str, bool]:
    """Renumber when sections have numbers, and figures have none yet."""
    assign = Collector.assign_section_numbers

    def assign_section_numbers(
        self: Collector, env: BuildEnvironment
    ) -> list[str]:
        changed = assign(self, env)
        renumber(env)
        return changed

    Collector.assign_section_numbers = assign_section_numbers
    return {"parallel_read_safe": True, "parallel_write_safe": True}
