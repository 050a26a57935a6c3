"""What every notebook of the book shares: set-up, colours and tables of checks.

Only notebooks import this module; it needs the extra ``[book]``.
"""

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # "building the font cache" is no output

import matplotlib as mpl  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

__all__ = ["COLOURS", "Checks", "Table", "axes", "setup", "style"]

# One style per estimator in the whole book. The hues are Okabe and Ito's and Paul Tol's, which colour-blind readers
# can tell apart; line and marker say the same to a reader of a black-and-white print.
_STYLES = {
    "exact": ("#000000", "-", ""),
    "score": ("#D55E00", "-", "o"),
    "leave-one-out": ("#0072B2", "--", "s"),
    "constant baseline": ("#CC79A7", "-.", "v"),
    "moving average": ("#AA4499", ":", "<"),
    "learned baseline": ("#E69F00", ":", "D"),
    "control variate": ("#882255", "--", "P"),
    "muprop": ("#56B4E9", "-.", "X"),
    "reparameterization": ("#009E73", "-", "^"),
    "implicit": ("#332288", "--", "h"),
    "g-rep": ("#999933", "-.", ">"),
    "g-rep 2": ("#666633", ":", "8"),
    "rsvi": ("#CC6677", ":", "*"),
    "importance sampling": ("#777777", "-.", "1"),
    "measure-valued": ("#44AA99", ":", "d"),
    "local expectation": ("#117733", "-.", "p"),
    "sum and sample": ("#AAAA00", "--", "2"),
    "unordered set": ("#EE99AA", ":", "3"),
    "double control variate": ("#6699CC", "-.", "4"),
    "lax": ("#997700", "--", "<"),
    "gumbel-softmax": ("#F0A000", "-", "o"),
    "straight-through": ("#AA3377", "--", "s"),
    "gumbel-rao": ("#4477AA", "-.", "v"),
    "reinmax": ("#228833", ":", "D"),
    "rebar": ("#EE6677", "-", "^"),
    "relax": ("#66CCEE", "--", "P"),
    "arm": ("#BB5566", "-.", "X"),
    "disarm": ("#004488", ":", "h"),
    "stochastic backprop": ("#EE7733", "-", "d"),
    "series": ("#CC3311", "--", "<"),
    "remainder": ("#33BBEE", "-.", ">"),
    "iwae": ("#EE3377", "-", "*"),
    "vimco": ("#0077BB", "--", "p"),
    "dreg": ("#009988", ":", "8"),
}

COLOURS = {name: colour for name, (colour, _, _) in _STYLES.items()}
"""The colour of each estimator, the same in every figure of the book."""

_RC: dict[Any, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "figure.figsize": (6.4, 3.4),
    "figure.facecolor": "white",  # the dark theme shows figures on a light card
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "axes.prop_cycle": plt.cycler(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]),
}


def setup(seed: int = 0) -> None:
    """Make a notebook reproducible and its figures alike: the first code cell of every chapter.

    Double precision, one torch thread, a fixed seed, warnings are errors, and the style of the book's figures.
    """
    warnings.resetwarnings()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=PendingDeprecationWarning, module="ipykernel")  # as a kernel stops
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    mpl.rcParams.update(_RC)
    _use_inline_figures()


def _use_inline_figures() -> None:
    """Show figures as PNG without the name of the program that drew them."""
    from IPython import get_ipython

    if get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("png", bbox_inches="tight", metadata={"Software": None})


def style(name: str, marker: bool = False) -> dict[str, Any]:
    """Keyword arguments for ``Axes.plot``: the colour, line and (on request) marker of an estimator.

    >>> style("score")
    {'color': '#D55E00', 'linestyle': '-', 'label': 'score'}
    """
    colour, line, symbol = _STYLES[name]
    return {"color": colour, "linestyle": line, "label": name} | ({"marker": symbol} if marker else {})


def axes(rows: int = 1, columns: int = 1, height: float = 3.2, width: float = 6.6, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure of the book's width and its axes; ``kwargs`` go to ``plt.subplots``."""
    return plt.subplots(rows, columns, figsize=(width, height), **kwargs)


@dataclass(frozen=True)
class Row:
    """One checked claim; ``measured`` is what the checks page prints."""

    claim: str
    cells: tuple[str, str, str, str]  # exact, estimate, standard error, z
    measured: str
    tolerance: str
    value: bool
    expect: bool

    @property
    def verdict(self) -> str:
        """True, or False where the text says that it must fail; anything else stops the notebook."""
        if self.value == self.expect:
            return "True" if self.value else "False, as it must"
        return "True, BUT SHOULD FAIL" if self.value else "FALSE"


def _number(x: float, digits: int = 4, floor: float = 1e-9) -> str:
    """``x`` to a few significant digits; what rounding alone can produce is 0, and 0 has no sign.

    >>> _number(0.123456), _number(-1e-17), _number(12345.6), _number(2.0)
    ('0.1235', '0', '1.235e+04', '2')
    """
    if abs(x) < floor:
        return "0"
    return f"{x:.{digits}g}"


class Table:
    """A short table of checks. Add rows, then :meth:`show`; every method that adds a row returns the table.

    Rows named ``expect=False`` are the deliberate failures of "Where it fails".
    """

    def __init__(self, chapter: str, label: str, test: str | None, threshold: float, floor: float):
        self.chapter, self.label, self.test, self.threshold, self.floor = (
            chapter,
            label,
            test,
            threshold,
            floor,
        )
        self.rows: list[Row] = []

    def mean(self, claim: str, samples: Tensor, exact: float | Tensor, expect: bool = True) -> Self:
        """Does the mean of independent replicates ``samples [R]`` equal ``exact``? True if abs(z) < 4."""
        samples = torch.as_tensor(samples).detach().double()
        if samples.dim() != 1 or len(samples) < 2:
            raise ValueError(f"{claim}: expected replicates of shape [R], R > 1, found {list(samples.shape)}.")
        exact, estimate = _float(exact), samples.mean().item()
        error = samples.std().item() / math.sqrt(len(samples))
        noiseless = error <= 1e-12 * max(1.0, abs(exact))  # then only rounding is left, and z means nothing
        gap = 0.0 if noiseless and abs(estimate - exact) < 1e-9 else estimate - exact
        z = gap and (math.copysign(math.inf, gap) if noiseless else gap / error)
        cells = (self._print(exact), self._print(estimate), self._print(error, 2), _z(z))
        measured = f"{cells[1]} ± {cells[2]} (z = {cells[3]})"
        return self._add(claim, cells, measured, f"abs(z) < {self.threshold:g}", abs(z) < self.threshold, expect)

    def close(
        self,
        claim: str,
        value: float | Tensor,
        exact: float | Tensor,
        tol: float = 1e-10,
        expect: bool = True,
    ) -> Self:
        """Does a deterministic ``value`` equal ``exact`` to an absolute ``tol``?"""
        value, exact = _float(value), _float(exact)
        cells = (self._print(exact), self._print(value), "-", "-")
        return self._add(claim, cells, cells[1], f"abs(error) <= {tol:g}", abs(value - exact) <= tol, expect)

    def below(self, claim: str, value: float | Tensor, bound: float, expect: bool = True) -> Self:
        """Is ``value``, an error say, at most ``bound``? Prints the bound only: rounding differs between machines."""
        value = _float(value)
        cells = (f"<= {bound:g}", "-", "-", "-")
        return self._add(claim, cells, f"{value:.1e}", f"<= {bound:g}", value <= bound, expect, shown=False)

    def holds(self, claim: str, value: bool | Tensor, expect: bool = True) -> Self:
        """Is a statement true?"""
        return self._add(claim, ("-",) * 4, "-", "yes or no", bool(value), expect, shown=False)

    def show(self) -> None:
        """Print the table and keep its rows for the checks page; an unexpected verdict stops the notebook."""
        from IPython.display import display

        if not self.rows:
            raise ValueError("A table of checks needs at least one row.")
        rows = [{"exact": row.cells[0]} | {k: v for k, v in asdict(row).items() if k != "cells"} for row in self.rows]
        record = {"chapter": self.chapter, "label": self.label, "test": self.test, "rows": rows}
        display({"text/plain": str(self)}, raw=True, metadata={"gradlab": record})
        wrong = [row.claim for row in self.rows if row.value != row.expect]
        if wrong:
            raise AssertionError(f"unexpected verdict: {', '.join(wrong)}")

    def __str__(self) -> str:
        """The table as text, at most 79 characters wide."""
        width = max(len(row.claim) for row in self.rows + [Row("claim", ("",) * 4, "", "", True, True)])
        widths = (width, 10, 10, 7, 5)
        tolerances = "; ".join(dict.fromkeys(r.tolerance for r in self.rows if r.tolerance.startswith("abs")))
        lines = [self.label] + ([f"True means: {tolerances}"] if tolerances else [])
        for cells in [("claim", "exact", "estimate", "s.e.", "z", "verdict")] + [
            (row.claim, *row.cells, row.verdict) for row in self.rows
        ]:
            middle = " ".join(text.rjust(size) for text, size in zip(cells[1:5], widths[1:], strict=True))
            lines.append(f"{cells[0].ljust(width)} {middle}  {cells[5]}".rstrip())
        return "\n".join(lines)

    def _print(self, x: float, digits: int = 4) -> str:
        return _number(x, digits, self.floor)

    def _add(
        self,
        claim: str,
        cells: Sequence[str],
        measured: str,
        tolerance: str,
        value: bool,
        expect: bool,
        shown: bool = True,
    ) -> Self:
        if len(claim) > 24:
            raise ValueError(f"{claim!r} has {len(claim)} characters, expected at most 24: explain it in the text.")
        kind = tolerance.split()[0]
        others = {row.tolerance for row in self.rows if row.tolerance.split()[0] == kind} - {tolerance}
        if shown and others:
            raise ValueError(f"{claim}: one tolerance per table, found {tolerance} and {others.pop()}.")
        self.rows.append(Row(claim, tuple(cells), measured, tolerance, value, expect))  # type: ignore[arg-type]
        return self


def _float(x: float | Tensor) -> float:
    """A number, without the graph that a tensor may carry."""
    return float(x.detach()) if isinstance(x, Tensor) else float(x)


def _z(z: float) -> str:
    """A z-score in at most five characters.

    >>> _z(-0.04), _z(3.96), _z(-261.7), _z(-1234.5), _z(float("inf"))
    ('0.0', '4.0', '-262', '<-999', '>999')
    """
    if abs(z) >= 999:
        return ">999" if z > 0 else "<-999"
    return f"{z:.0f}" if abs(z) >= 99.95 else f"{z:.1f}".replace("-0.0", "0.0")


class Checks:
    """The tables of one chapter.

    ``chapter`` is its label. ``table(label, test=...)`` starts a table; ``test`` names the unit test that keeps the
    claim, as ``tests/test_exact.py::test_score``.

    >>> table = Checks("ch-score").table("The mean of three numbers")
    >>> print(table.close("mean", 2.0, 2.0))
    The mean of three numbers
    True means: abs(error) <= 1e-10
    claim      exact   estimate    s.e.     z  verdict
    mean           2          2       -     -  True
    """

    def __init__(self, chapter: str):
        self.chapter = chapter

    def table(self, label: str, test: str | None = None, threshold: float = 4.0, floor: float = 1e-9) -> Table:
        """Start a table; numbers below ``floor`` print as 0, because rounding differs between machines."""
        if len(label) > 79:
            raise ValueError(f"The label of a table has at most 79 characters, found {len(label)}.")
        return Table(self.chapter, label, test, threshold, floor)
