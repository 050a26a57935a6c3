"""The command line: its tables, its help, its errors."""

from __future__ import annotations

import json

import pytest

from gradlab.cli import ESTIMATORS, main


def test_compare_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--problem", "bernoulli_3", "--replicates", "500", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert "variance x us" in out
    assert [line.split()[0] for line in out.splitlines()[2:]] == [
        "score", "score-average", "score-loo", "muprop", "gumbel-softmax", "st-gumbel-softmax", "straight-through",
        "gumbel-rao", "reinmax", "rebar", "double-cv", "arm", "disarm", "measure-valued", "local-expectation",
        "taylor-local-expectation", "adaptive-local-expectation", "sum-and-sample", "unordered-set",
        "stochastic-backprop", "enumerate",
    ]  # fmt: skip


def test_compare_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--problem", "gamma_exp", "--estimators", "implicit", "--replicates", "200", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["replicates"] == 200
    assert table["rows"][0]["name"] == "implicit"
    assert table["rows"][0]["z"] < 6


def test_the_seed_makes_it_reproducible(capsys: pytest.CaptureFixture[str]) -> None:
    means = []
    for _ in range(2):
        main(
            [
                "compare",
                "--problem",
                "normal_cos",
                "--estimators",
                "score",
                "--replicates",
                "100",
                "--json",
                "--seed",
                "7",
            ]
        )
        means.append(json.loads(capsys.readouterr().out)["rows"][0]["mean"])
    assert means[0] == means[1]


def test_an_estimator_that_cannot_serve_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--problem", "poisson_exp", "--estimators", "implicit"]) == 2
    assert "ImplicitReparameterization cannot serve Poisson" in capsys.readouterr().err


def test_problems_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["problems"]) == 0
    assert "normal_step" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--help"], ["compare", "--help"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "usage: gradlab" in out
    if len(argv) == 2:
        assert all(name in "".join(out.split()) for name in ESTIMATORS)


@pytest.mark.parametrize(
    "argv",
    [[], ["compare"], ["compare", "--problem", "nope"], ["compare", "--problem", "normal_cos", "--replicates", "0"]],
)
def test_bad_arguments(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
