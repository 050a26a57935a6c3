"""fit: exact resume after any cut, clear errors with nothing lost, and no waiting for the device."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trainings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradlab as gl
from gradlab import checkpoints, metrics, training

SCRIPT = Path(__file__).with_name("trainings.py")


class Cut(Exception):
    """Stops a run between two checkpoints."""


def cut_at(step: int, error: type[BaseException] = Cut):
    def on_step(now: int, values: Tensor) -> None:
        if now == step:
            raise error

    return on_step


def state(arguments: dict) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in arguments["loss"].state_dict().items()}


def lines(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def uninterrupted(folder: Path, **build) -> tuple[dict[str, Tensor], list[dict]]:
    folder.mkdir()
    arguments = trainings.build(**build)
    fitted = gl.fit(**arguments, **trainings.files(folder), steps=26)
    assert fitted[:2] == (26, 4)
    assert fitted.resumed == 0
    return state(arguments), lines(folder / "log.jsonl")


def resumed(folder: Path, **build) -> tuple[dict[str, Tensor], list[dict]]:
    arguments = trainings.build(**build)
    torch.rand(7)  # a new process has other random numbers
    fitted = gl.fit(**arguments, **trainings.files(folder), steps=26)
    assert fitted.step == 26
    return state(arguments), lines(folder / "log.jsonl")


def program(folder: Path, how: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), str(folder), how]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def cut(folder: Path, step: int = 17, error: type[BaseException] = Cut, **build) -> None:
    with pytest.raises(error):
        gl.fit(**trainings.build(**build), **trainings.files(folder), steps=26, on_step=cut_at(step, error))


@pytest.mark.parametrize("how", ["step", "write"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, how):
    """SIGKILL between two checkpoints, and in the middle of writing one."""
    expected = uninterrupted(tmp_path / "whole")
    assert program(tmp_path, how).returncode == -signal.SIGKILL
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert saved["step"] == {"step": 15, "write": 5}[how]
    assert (tmp_path / "run.pt.partial").exists() == (how == "write")
    found = resumed(tmp_path)
    assert same(found[0], expected[0])
    assert found[1] == expected[1]


@pytest.mark.parametrize(
    "build, step",
    [({"shuffle": "global"}, 7), ({"shuffle": "global"}, 12), ({"shuffle": "none"}, 18), ({"workers": 2}, 9)],
)
def test_any_cut_resumes_bit_for_bit(tmp_path, build, step):
    expected = uninterrupted(tmp_path / "whole", **build)
    cut(tmp_path, step, **build)
    found = resumed(tmp_path, **build)
    assert same(found[0], expected[0])
    assert found[1] == expected[1]


def test_longer_is_the_same_as_long_at_once(tmp_path):
    expected = uninterrupted(tmp_path / "whole")
    for goal in ({"steps": 3}, {"epochs": 2}, {"epochs": 2}, {"steps": 23}):
        gl.fit(**trainings.build(), **trainings.files(tmp_path), **goal)
    assert same(resumed(tmp_path)[0], expected[0])


def forget(monkeypatch, what: str) -> None:
    """Make reading a checkpoint lose a part of it."""
    read = checkpoints.read

    def forgetful(path: Path):
        found = read(path)
        if found is not None and what == "buffers":
            found["model"] |= {k: v * 0 for k, v in found["model"].items() if k.startswith("average.")}
        elif found is not None and what == "batch":
            found["batch"] = 0
        elif found is not None and what in ("python", "numpy", "torch", "generators"):
            found["random"] |= {what: checkpoints.random_state(FRESH)[what]}
        elif found is not None:
            found[what] = trainings.build()[what].state_dict() if what == "optimizer" else found["random"]
        return found

    monkeypatch.setattr(checkpoints, "read", forgetful)


FRESH = {
    f"loader.{name}generator": torch.Generator() for name in ("", "dataset.", "sampler.", "batch_sampler.sampler.")
}


@pytest.mark.parametrize(
    "what", ["buffers", "optimizer", "batch", "epoch_random", "torch", "python", "numpy", "generators"]
)
def test_mutants_that_forget_a_part_do_not_resume(tmp_path, monkeypatch, what):
    expected = uninterrupted(tmp_path / "whole")
    cut(tmp_path)
    forget(monkeypatch, what)
    assert not same(resumed(tmp_path)[0], expected[0])


def test_ctrl_c_saves_the_step_at_hand(tmp_path):
    expected = uninterrupted(tmp_path / "whole")
    arguments = trainings.build()
    handler = signal.getsignal(signal.SIGINT)

    calls = iter(range(1, 100))

    def press(module: nn.Module, inputs: tuple) -> None:
        if next(calls) == 12:
            os.kill(os.getpid(), signal.SIGINT)

    arguments["loss"].register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt):
        gl.fit(**arguments, **trainings.files(tmp_path), steps=26)
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 12
    assert same(resumed(tmp_path)[0], expected[0])


def test_an_interrupt_from_on_step_saves_too(tmp_path):
    expected = uninterrupted(tmp_path / "whole")
    cut(tmp_path, 17, KeyboardInterrupt)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 17
    assert same(resumed(tmp_path)[0], expected[0])


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """The system itself refuses the second checkpoint, from a limit on the size of files."""
    resource = pytest.importorskip("resource")
    expected = uninterrupted(tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # noqa: E731
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", trainings.before_call(1, limit, os.replace))
            with pytest.raises(OSError, match=r"write the checkpoint .*run\.pt is intact.*run the same") as error:
                gl.fit(**trainings.build(), **trainings.files(tmp_path), steps=26)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    assert not (tmp_path / "run.pt.partial").exists()
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 5
    assert same(resumed(tmp_path)[0], expected[0])


def test_an_interrupt_while_a_batch_is_read_saves_nothing_inexact(tmp_path, monkeypatch):
    """Random numbers were drawn for a batch that no step has seen: the last checkpoint is the place to resume from."""
    expected = uninterrupted(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt = trainings.before_call(8 * 12 + 4, cut_now, trainings.Noisy.__getitem__)
        patch.setattr(trainings.Noisy, "__getitem__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            gl.fit(**trainings.build(), **trainings.files(tmp_path), steps=26)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 10
    assert same(resumed(tmp_path)[0], expected[0])


def cut_now() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", range(1, 7))
def test_every_system_call_of_a_checkpoint_may_fail(tmp_path, monkeypatch, call):
    """Whichever call fails, a whole checkpoint is left."""
    checkpoints.write(tmp_path / "run.pt", {"step": 1})
    calls = iter(range(1, 100))

    def failing(function):
        def wrapped(*args, **keywords):
            if next(calls) == call:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **keywords)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "open"):
            patch.setattr(os, name, failing(getattr(os, name)))
        patch.setattr("builtins.open", failing(open))
        with pytest.raises(OSError, match="is intact") as error:
            checkpoints.write(tmp_path / "run.pt", {"step": 2})
    assert error.value.errno == errno.ENOSPC
    assert checkpoints.read(tmp_path / "run.pt")["step"] in (1, 2)


class Line(nn.Module):
    """A model whose loss can be made to fail."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)
        self.other = nn.Linear(width, 1)
        self.estimator = gl.Reparameterization()
        self.poison = "none"

    def forward(self, x: Tensor) -> Tensor:
        q = torch.distributions.Normal(self.layer(x).squeeze(-1), 1.0)
        values = self.estimator(q, lambda z: z**2) + self.other(x).squeeze(-1) ** 2
        if self.poison == "loss":
            return values + math_log(x)
        return values + (self.other.bias * 0).sqrt().sum() if self.poison == "gradient" else values


def math_log(x: Tensor) -> Tensor:
    return (x[:, 0] * 0).log()


def line(**keywords) -> dict:
    loss = Line(**keywords)
    return {
        "loss": loss,
        "loader": [torch.randn(4, loss.layer.in_features) for _ in range(5)],
        "optimizer": torch.optim.SGD(loss.parameters(), lr=0.01),
        "progress": False,
    }


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(
    "poison, named", [("loss", "the loss at step 8"), ("gradient", "the gradient of other.bias at step 8")]
)
def test_what_is_not_finite_is_named(tmp_path, monkeypatch, poison, named, eager):
    """On a GPU it is found at the next line or checkpoint, and told as if it had been found at once."""
    if not eager:
        monkeypatch.setattr(training, "SYNCHRONOUS", set())
    arguments = line()
    before = {}

    def on_step(step: int, values: Tensor) -> None:
        if step == 7:
            arguments["loss"].poison = poison
            before.update(state(arguments))

    with pytest.raises(FloatingPointError, match=rf"{named}, expected .* estimator: estimator \(Reparameterization\)"):
        gl.fit(**arguments, steps=20, checkpoint=tmp_path / "run.pt", every=5, log_every=100, on_step=on_step)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 5
    assert same(state(arguments), before) == eager


def test_the_estimator_of_a_parameter_is_named():
    arguments = trainings.build()
    weight = arguments["loss"].learned.baseline.net.weight
    weight.register_hook(lambda grad: grad * torch.inf)
    message = r"the gradient of learned\.baseline\.net\.weight at step 1, .*estimator: learned \(ScoreFunction\)"
    with pytest.raises(FloatingPointError, match=message):
        gl.fit(**arguments, steps=2)


def test_a_parameter_that_overflows_is_never_saved(tmp_path):
    arguments = line()
    arguments["loader"] = [torch.full((4, 3), 100.0)]
    arguments["optimizer"].param_groups[0]["lr"] = 1e308
    with pytest.raises(FloatingPointError, match=r"the parameter .* at step 1"):
        gl.fit(**arguments, steps=1, checkpoint=tmp_path / "run.pt")
    assert list(tmp_path.iterdir()) == []


class Readings(TorchDispatchMode):
    """Counts how often a tensor is read by the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_the_device_is_waited_for_at_lines_only(monkeypatch):
    def readings(log_every: int) -> int:
        with Readings() as found:
            gl.fit(**line(), steps=40, log_every=log_every, clip=1.0)
        return found.count

    def forward() -> int:  # what validation inside Reparameterization and Normal reads
        with Readings() as found:
            arguments = line()
            for x, _ in zip(arguments["loader"] * 8, range(40), strict=True):
                arguments["loss"](x).mean().backward()
        return found.count

    monkeypatch.setattr(training, "SYNCHRONOUS", set())
    base, rare, often = forward(), readings(20), readings(1)
    assert rare - base <= 3 * 2
    assert often - base >= 40  # the measure can see a reading


def test_torn_and_foreign_checkpoints(tmp_path):
    path = tmp_path / "run.pt"
    gl.fit(**line(), steps=4, checkpoint=path, every=2)
    whole = path.read_bytes()
    before = line()
    old = state(before)

    def refused(message: str, arguments: dict) -> None:
        with pytest.raises(ValueError, match=message) as error:
            gl.fit(**arguments, steps=8, checkpoint=path)
        assert "expected" in str(error.value)
        assert "To go on" in str(error.value)

    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for torn in (whole[:middle], whole[:-1], flipped, b"", b"hello"):
        path.write_bytes(torn)
        refused("unreadable .* move it away and rename .*run.pt.previous", before)
    torch.save({"format": "other"}, path)
    refused("found .*'other'", before)
    torch.save([1, 2], path)
    refused("found list", before)
    torch.save(torch.load(tmp_path / "run.pt.previous") | {"version": 2}, path)
    refused("'version': 2", before)
    path.write_bytes(whole)
    refused(r"another model\. layer.weight: found \[1, 3\] torch.float64, expected \[1, 4\]", line(width=4))
    refused(r"another model\. encoder", trainings.build())
    other = line()
    refused("optimizer: found SGD, expected Adam", other | {"optimizer": torch.optim.Adam(other["loss"].parameters())})
    refused("batches an epoch: found 5, expected 3", before | {"loader": before["loader"][:3]})
    assert same(state(before), old)  # refused before anything was changed
    path.unlink()  # killed between the two renames
    assert gl.fit(**before, steps=8, checkpoint=path).resumed == 2


@pytest.mark.parametrize("odd", [Path("x"), lambda x: x])
def test_a_checkpoint_that_could_not_be_read_is_not_written(tmp_path, odd):
    with pytest.raises(TypeError, match="weights_only"):
        checkpoints.write(tmp_path / "run.pt", {"odd": odd})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["OneCycleLR", "MultiStepLR", "SequentialLR", "CyclicLR", "LambdaLR"])
def test_any_scheduler_can_be_saved_and_resumed(tmp_path, name):
    def arguments() -> dict:
        torch.manual_seed(0)
        found = line()
        schedulers, optimizer = torch.optim.lr_scheduler, found["optimizer"]
        parts = [schedulers.ConstantLR(optimizer, 0.5, 3), schedulers.ExponentialLR(optimizer, 0.9)]
        options = {
            "OneCycleLR": {"max_lr": 0.1, "total_steps": 20, "cycle_momentum": False},
            "MultiStepLR": {"milestones": [3, 7, 7]},
            "SequentialLR": {"schedulers": parts, "milestones": [6]},
            "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "cycle_momentum": False},
            "LambdaLR": {"lr_lambda": lambda step: 0.9**step},
        }
        return found | {"schedules": getattr(schedulers, name)(optimizer, **options[name])}

    whole = arguments()
    gl.fit(**whole, steps=12)
    gl.fit(**arguments(), steps=5, checkpoint=tmp_path / "run.pt")
    parted = arguments()
    gl.fit(**parted, steps=12, checkpoint=tmp_path / "run.pt")
    assert same(state(parted), state(whole))
    assert parted["optimizer"].param_groups[0]["lr"] == whole["optimizer"].param_groups[0]["lr"]


def test_it_is_the_loop_by_hand():
    ours = trainings.build()
    gl.fit(**ours, steps=12)
    by_hand = trainings.build()
    loss, optimizer, (plateau, cosine, temperature) = by_hand["loss"], by_hand["optimizer"], by_hand["schedules"]
    step, seen = 0, []
    for _ in range(2):
        for batch in by_hand["loader"]:
            loss.relaxed.temperature = temperature["relaxed.temperature"](step)
            optimizer.zero_grad()
            mean = loss(*batch).mean()
            mean.backward()
            nn.utils.clip_grad_norm_(loss.parameters(), 5.0)
            optimizer.step()
            cosine.step()
            step, seen = step + 1, [*seen, mean.detach()]
            if step % 4 == 0:
                plateau.step((sum(seen[1:], seen[0]) / 4).item())
                seen = []
    assert same(state(ours), state(by_hand))


def test_the_log_has_one_line_a_while(tmp_path):
    path = tmp_path / "log.jsonl"
    arguments = trainings.build()

    def on_step(step: int, values: Tensor) -> dict | None:
        assert values.shape == (8,)
        assert not values.requires_grad
        return {"bound": -1.5} if step == 6 else None

    fitted = gl.fit(**arguments, steps=10, log=path, on_step=on_step)
    found = lines(path)
    assert [(x["step"], x.get("epoch")) for x in found] == [(4, 1), (6, None), (8, 2), (10, 2)]
    assert found[1] == {"step": 6, "bound": -1.5}
    assert found[-1]["loss"] == fitted.loss
    assert found[0].keys() == {"step", "epoch", "loss", "lr", "relaxed.temperature", "gradient_norm"}
    gl.fit(**trainings.build(), steps=4, log=path)  # another run: the old file is kept
    assert [x["step"] for x in lines(path)] == [4]
    assert lines(tmp_path / "log.jsonl.previous") == found


def test_a_torn_log_is_cut_and_a_foreign_file_left_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 4}\n{"step": 8}\n{"step": 12}\n{"st')
    metrics.Journal(path, 8)
    assert path.read_text() == '{"step": 4}\n{"step": 8}\n'
    for foreign in ("dear diary\n\nyours\n", "one line", '{"a": 1}\n'):
        path.write_text(foreign)
        with pytest.raises(ValueError, match=r"line 1 of .*log.jsonl to be no metrics"):
            metrics.Journal(path, 8)
        assert path.read_text() == foreign


def test_a_full_disk_stops_the_log_and_the_next_run_mends_it(tmp_path, monkeypatch):
    expected = uninterrupted(tmp_path / "whole")
    write = metrics.Journal.write

    def full(self, line: dict) -> None:
        if line["step"] == 16:
            self.file.write('{"step": 16, "ep')
            self.file.close()
            self.file = Full()
        write(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Journal, "write", full)
        with pytest.raises(OSError, match=r"a line of the log \(No space left on device\).* checkpoint is intact"):
            gl.fit(**trainings.build(), **trainings.files(tmp_path), steps=26)
    found = resumed(tmp_path)
    assert same(found[0], expected[0])
    assert found[1] == expected[1]


class Full:
    def write(self, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        pass


def test_the_bar_is_for_terminals_only(capsys, monkeypatch):
    gl.fit(**line() | {"progress": None}, steps=5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    gl.fit(**line() | {"progress": None}, steps=5)
    assert "step 1/5  loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": None}, "one of the two"),
        ({"epochs": 1}, "one of the two"),
        ({"steps": 0}, "steps=0"),
        ({"every": 0}, "every=0"),
        ({"loss": lambda x: x}, "expected an nn.Module"),
        ({"loader": iter([])}, "iterated again"),
        ({"loader": []}, "without batches"),
        ({"optimizer": torch.optim.SGD([torch.zeros(2, requires_grad=True)])}, "loss does not hold"),
        ({"schedules": {"estimator.temprature": lambda step: 1.0}}, "'estimator.temprature'"),
        ({"schedules": {"layer.weight": lambda step: 1.0}}, "not a parameter"),
        ({"schedules": [3]}, "type int"),
    ],
)
def test_wrong_arguments_are_told(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        gl.fit(**{**line(), "steps": 2, **change})


def test_an_error_inside_tells_the_step():
    arguments = line()
    arguments["loader"][3] = torch.randn(4, 2)
    with pytest.raises(RuntimeError) as error:
        gl.fit(**arguments, steps=10)
    assert error.value.__notes__ == ["fit: raised in step 4."]


def test_a_buffer_can_be_scheduled():
    arguments = line()
    arguments["loss"].register_buffer("weight", torch.zeros(()))
    gl.fit(**arguments, steps=3, schedules={"weight": lambda step: 10.0 + step})
    assert arguments["loss"].weight.item() == 12.0
