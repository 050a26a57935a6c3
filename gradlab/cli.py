"""The ``gradlab`` command: measure estimators on a problem, from the shell."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from gradlab.catalogue import ESTIMATORS
from gradlab.diagnostics import Comparison, compare
from gradlab.distributions import support_size
from gradlab.estimator import Estimator
from gradlab.exact import SumAndSample, UnorderedSet
from gradlab.problems import PROBLEMS, Problem

LIMIT = 2**12  # evaluations of f for one gradient


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = _parser().parse_args(argv)
    if args.command == "problems":
        width = max(map(len, PROBLEMS))
        print("\n".join(f"{p.name.ljust(width)}  {p.summary}" for p in PROBLEMS.values()))
        return 0
    if args.command == "data":
        from gradlab.experiments import command

        return command.run(args)
    try:
        table = run(PROBLEMS[args.problem], args.estimators, args.samples, args.replicates, args.seed)
    except (TypeError, ValueError) as error:
        print(f"gradlab: {error}", file=sys.stderr)
        return 2
    print(json.dumps(table.to_dict(), indent=1) if args.json else table)
    return 0


def run(problem: Problem, names: Sequence[str] | None, samples: int, replicates: int, seed: int) -> Comparison:
    """Compare the named estimators, by default all that can serve the problem."""
    torch.manual_seed(seed)
    chosen = {name: ESTIMATORS[name](samples) for name in names or ESTIMATORS}
    if not names:
        chosen = {name: e for name, e in chosen.items() if serves(e, problem)}
    elif any(e.supports(problem.q()) and e.evaluations(problem.q()) > LIMIT for e in chosen.values()):
        raise ValueError(f"{problem.name}: found over {LIMIT} evaluations of f for one gradient; sample instead.")
    return compare(chosen, problem.make_q, problem.f, problem.params, problem.exact()[0], replicates)


def serves(estimator: Estimator, problem: Problem) -> bool:
    """Whether the estimator can serve the problem: the distribution, the smoothness of f, the size of the support."""
    q = problem.q({k: p.clone().requires_grad_() for k, p in problem.params.items()})
    if not estimator.supports(q) or (estimator.traits.needs_gradient and not problem.smooth):
        return False
    if isinstance(estimator, SumAndSample | UnorderedSet) and support_size(q) > LIMIT:
        return False  # few evaluations, but the whole support is listed
    try:
        return estimator.evaluations(q) <= LIMIT and estimator(q, problem.f).requires_grad
    except (TypeError, ValueError):  # no transform is known for this q, or its support is too small
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradlab", description="Stochastic gradient estimators: measure them before you trust them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("problems", help="list the problems that have an exact gradient")
    p = commands.add_parser(
        "compare",
        help="measure estimators on a problem: bias, variance, evaluations of f, time",
        description="Print a table with one line an estimator: the norm of the bias and the standard error it would "
        "have by chance, the largest |z| over the parameters (above 4 is suspicious), the variance summed over the "
        "parameters, the evaluations of f and the microseconds for one gradient, and variance x time, the number "
        "to minimise.",
        epilog="example: gradlab compare --problem bernoulli_3 --samples 4 --replicates 20000",
    )
    p.add_argument(
        "--problem",
        required=True,
        choices=list(PROBLEMS),
        metavar="NAME",
        help="one of those that `gradlab problems` lists",
    )
    p.add_argument(
        "--estimators",
        nargs="+",
        choices=list(ESTIMATORS),
        metavar="NAME",
        help=f"which estimators (default: all that can serve the problem), of: {', '.join(ESTIMATORS)}",
    )
    p.add_argument(
        "--samples",
        type=_positive,
        default=1,
        metavar="S",
        help="samples per gradient (default 1; leave-one-out: 2)",
    )
    p.add_argument(
        "--replicates", type=_positive, default=10_000, metavar="R", help="gradients measured (default 10000)"
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default 0)")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _data_parser(commands)
    return parser


def _data_parser(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser(
        "data",
        help="list, fetch or verify the data of the experiments",
        description="The files lie in the folder that the environment variable GRADLAB_DATA names, else in the "
        "platform's cache folder. A file whose sha256 is not the registered one is refused.",
    )
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="what there is: embedded, in the folder, or to fetch")
    fetch = actions.add_parser("fetch", help="download files that the folder lacks")
    fetch.add_argument("name", metavar="NAME", help="a group such as mnist, or a file that `gradlab data list` shows")
    actions.add_parser("verify", help="compare every file of the folder with its sha256")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a positive integer")
    return value


if __name__ == "__main__":
    sys.exit(main())
