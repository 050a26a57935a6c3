"""The ``gradlab`` command: measure estimators on a problem, from the shell."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from gradlab.catalogue import ESTIMATORS, MODELS, TRAINABLE
from gradlab.diagnostics import Comparison, compare
from gradlab.distributions import support_size
from gradlab.estimator import Estimator
from gradlab.exact import SumAndSample, UnorderedSet
from gradlab.problems import PROBLEMS, Problem

LIMIT = 2**12  # evaluations of f for one gradient


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = _parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.command == "problems":
        width = max(map(len, PROBLEMS))
        print("\n".join(f"{p.name.ljust(width)}  {p.summary}" for p in PROBLEMS.values()))
        return 0
    if args.command not in ("compare", "problems"):
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
    _train_parser(commands)
    _reproduce_parser(commands)
    _report_parser(commands)
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


TARGETS = ("figure1", "figure2", "figure3", "variance", "table1", "table2", "table3")


def _train_parser(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser(
        "train",
        help="train a discrete latent variable model with one estimator",
        description="All seeds train as one batched model. The result is a JSON file with the training bound, the "
        "variance of the gradient and the test bound by epochs, beside a log and a checkpoint: the same command goes "
        "on where it was stopped, exactly.",
        epilog="example: gradlab train --model categorical-vae --data digits --seeds 0 1 2",
    )
    p.add_argument("--model", required=True, choices=MODELS, metavar="NAME", help=f"one of {', '.join(MODELS)}")
    p.add_argument(
        "--estimator",
        default="local-expectation",
        choices=TRAINABLE,
        metavar="NAME",
        help=f"one of {', '.join(TRAINABLE)} (default local-expectation)",
    )
    p.add_argument("--samples", type=_positive, default=1, metavar="S", help="samples per gradient (default 1)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="one for each run (default 0)")
    _training_options(p)


def _reproduce_parser(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser(
        "reproduce",
        help="repeat a figure or table of Echraibi et al. (2020)",
        description="What is finished is kept: a second call goes on where the first stopped. Tables 1 to 3 take one "
        "data set at a time; digits are a small version for a CPU. `variance` has the variances behind figure 3.",
        epilog="example: gradlab reproduce table2 --data mnist --device cuda --out results",
    )
    p.add_argument("target", choices=TARGETS, metavar="NAME", help=f"one of {', '.join(TARGETS)}")
    p.add_argument("--seeds", type=_positive, default=5, metavar="N", help="how many runs (default 5)")
    p.add_argument("--steps", type=_positive, metavar="N", help="of a figure; default: 4000, 2000 for figure 3")
    p.add_argument("--replicates", type=_positive, metavar="N", help="gradients for one variance of a figure")
    _training_options(p)


def _training_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--data",
        default="digits",
        choices=("digits", "mnist", "binarized-mnist", "omniglot"),
        metavar="NAME",
        help="digits (default, embedded), mnist (binarised anew at each look), binarized-mnist or omniglot",
    )
    p.add_argument("--epochs", type=_positive, metavar="N", help="default: 40 for digits, 500 MNIST, 100 Omniglot")
    p.add_argument("--batch-size", type=_positive, metavar="N", help="default: 50 for digits, else 100")
    p.add_argument("--rate", type=float, metavar="X", help="of Adam; default: 0.005 for digits, else 0.0001")
    p.add_argument("--test-samples", type=_positive, default=200, metavar="K", help="of the test bound (default 200)")
    p.add_argument("--tests", type=_positive, default=10, metavar="N", help="test bounds to take on the way")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    p.add_argument("--compile", action="store_true", help="torch.compile the loss, on a GPU with CUDA graphs")
    p.add_argument("--out", default="results", metavar="FOLDER", help="where the results go (default results)")
    p.add_argument("--quiet", action="store_true", help="no progress bar, also on a terminal")


def _report_parser(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser(
        "report",
        help="print the tables of a folder of results, the paper's numbers beside them, and draw the curves",
        description="Reads the tables that `gradlab reproduce` wrote, prints them as Markdown, and draws the training "
        "bound and the log variance of the gradient by epochs into the same folder.",
    )
    p.add_argument("--out", default="results", metavar="FOLDER", help="the folder (default results)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a positive integer")
    return value


if __name__ == "__main__":
    sys.exit(main())
