"""Write the book's notebooks: the only program that does.

    python scripts/notebooks.py                      re-execute every chapter in place
    python scripts/notebooks.py book/02_score.ipynb  re-execute one
    python scripts/notebooks.py draft/02_score.md    build book/02_score.ipynb from MyST text, and execute it
    python scripts/notebooks.py --check [paths]      re-execute, write nothing, fail if a byte would change

Executing twice on one machine gives the same bytes, images included: fixed metadata, cell names taken from the
headings, no time stamps.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

BOOK = Path(__file__).resolve().parent.parent / "book"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks or MyST texts (default: every chapter)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a notebook would change")
    parser.add_argument("--no-execute", action="store_true", help="only bring the file into canonical form")
    args = parser.parse_args()
    changed = []
    for source in args.paths or sorted(BOOK.glob("*.ipynb")):
        target = BOOK / f"{source.stem}.ipynb" if source.suffix == ".md" else source
        notebook = tidy(read(source), target)
        if not args.no_execute:
            execute(notebook, target.parent)
        text = dumps(notebook)
        same = target.exists() and target.read_text(encoding="utf-8") == text
        changed += [] if same else [target.name]
        if not args.check:
            target.write_text(text, encoding="utf-8")
        print(f"{target.name}: {'unchanged' if same else 'would change' if args.check else 'written'}")
    return int(args.check and bool(changed))


def read(path: Path) -> NotebookNode:
    """Read a notebook, or the MyST text of one."""
    if path.suffix == ".md":
        import jupytext

        return jupytext.read(path, fmt="md:myst")
    return nbformat.read(path, as_version=4)


def tidy(notebook: NotebookNode, target: Path) -> NotebookNode:
    """Let ruff lay out the code, so that nobody has to count columns."""
    command = [
        sys.executable,
        "-m",
        "ruff",
        "format",
        "--quiet",
        "--stdin-filename",
        str(target.resolve()),
        "-",
    ]
    done = subprocess.run(command, input=dumps(notebook), capture_output=True, text=True, check=False, cwd=BOOK.parent)
    if done.returncode:
        raise SystemExit(f"{target.name}: {done.stderr}")
    return nbformat.reads(done.stdout, as_version=4)


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in a fresh kernel; an error or anything on stderr stops here."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=50"],  # the kernel's own log is no output
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise SystemExit(f"A cell wrote to stderr:\n{cell.source}\n\n{output.text}")


def dumps(notebook: NotebookNode) -> str:
    """The canonical text of a notebook."""
    return nbformat.writes(canonical(notebook), version=4, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def canonical(notebook: NotebookNode) -> NotebookNode:
    """Keep what a reader sees and what a test compares, and nothing that varies."""
    cells = [_cell(cell, name) for cell, name in zip(notebook.cells, _names(notebook.cells), strict=True)]
    return nbformat.from_dict({"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5})


def _cell(cell: NotebookNode, name: str) -> dict:
    """One cell with its name, its tags and its MyST-NB settings."""
    metadata = {key: cell.metadata[key] for key in ("mystnb", "tags") if cell.metadata.get(key)}
    result = {"cell_type": cell.cell_type, "id": name, "metadata": metadata, "source": cell.source.rstrip()}
    if cell.cell_type == "code":
        result |= {"execution_count": cell.execution_count, "outputs": _outputs(cell.outputs)}
    return result


def _outputs(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join printed text that arrived in pieces; drop nothing else."""
    joined: list[NotebookNode] = []
    for output in outputs:
        output.pop("transient", None)
        last = joined[-1] if joined else None
        if last and output.output_type == "stream" and last.get("name") == output.name:
            last["text"] += output.text
        else:
            joined.append(output)
    return joined


def _names(cells: list[NotebookNode]) -> list[str]:
    """Name cells after the last label or heading: ``the-identity``, ``the-identity-2`` ..."""
    names: list[str] = []
    seen: dict[str, int] = {}
    last = "top"
    for cell in cells:
        if cell.cell_type == "markdown":
            found = re.search(r"^(?:#+ +(.+)|:(?:label|name): *(.+))$", cell.source, re.MULTILINE)
            last = _slug((found[1] or found[2]) if found else last)
        number = seen[last] = seen.get(last, 0) + 1
        while (name := last if number == 1 else f"{last}-{number}") in names:
            number += 1
        names.append(name)
    return names


def _slug(text: str) -> str:
    """Letters, digits and hyphens only, at most 48."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].strip("-") or "cell"


if __name__ == "__main__":
    sys.exit(main())
