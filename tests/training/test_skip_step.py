"""Steps that are not finite, and spikes: skipped or stopped, logged and counted."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training import skip_step as bad_steps
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.skip_step import SkipBadSteps
from helpers import (
    SMALL_QUICKSTART,
    TINY_MODEL,
    Command,
)
from runs import (
    LAST,
    same_bits,
)


class Watcher(Callback):
    """Callback that copies parameters and optimizer before and after each step, and spoils chosen steps."""

    bad: set[int] = set()  # noqa: RUF012
    kind = ""
    factor = math.nan
    states: dict[int, list[Any]] = {}  # noqa: RUF012

    def snapshot(self, trainer: Any, module: Any) -> Any:
        state = trainer.optimizers[0].state_dict()["state"]
        return [
            {name: p.detach().clone() for name, p in module.named_parameters()},
            {i: {k: v.clone() for k, v in s.items()} for i, s in state.items()},
        ]

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.states.setdefault(trainer.global_step, [self.snapshot(trainer, module)])

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if (
            trainer.global_step - 1 in self.states
            and len(self.states[trainer.global_step - 1]) == 1
        ):
            self.states[trainer.global_step - 1].append(self.snapshot(trainer, module))

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if self.kind == "gradient" and trainer.global_step in self.bad:
            list(module.parameters())[7].grad.view(-1)[3] *= self.factor


@pytest.fixture
def watcher(monkeypatch: pytest.MonkeyPatch) -> type[Watcher]:
    Watcher.states, Watcher.bad, Watcher.kind, Watcher.factor = {}, set(), "", math.nan
    loss = GPTLightningModule.loss

    def injected(self: GPTLightningModule, batch: Any) -> torch.Tensor:
        value = loss(self, batch)
        trainer = self._trainer
        bad = trainer is not None and torch.is_grad_enabled() and trainer.global_step in Watcher.bad
        if bad and Watcher.kind == "loss alone":  # its gradients are finite
            return value + Watcher.factor
        return value * Watcher.factor if bad and Watcher.kind == "loss" else value

    monkeypatch.setattr(GPTLightningModule, "loss", injected)
    return Watcher


def watched_fit(command: Command, *arguments: str) -> Any:
    return command("fit", *SMALL_QUICKSTART,
                   f"--allow_import={__name__}", f"--trainer.callbacks+={__name__}.Watcher",
                   "--trainer.max_steps=6", "--trainer.max_epochs=-1",
                   "--model.config.drop_rate=0.1", "--checkpoint.every_n_train_steps=1", *TINY_MODEL,
                   *arguments)  # fmt: skip


# the default suite has each pair of two of the three choices
CASES = [
    pytest.param(kind, step, *settings, marks=pytest.mark.slow if (i + j + k) % 2 else ())
    for i, kind in enumerate(("loss", "gradient"))
    for j, step in enumerate((0, 3, 5))
    for k, settings in enumerate(((1, "null"), (1, "1.0"), (3, "null")))
]


@pytest.mark.parametrize(("kind", "step", "accumulation", "clip"), CASES)
def test_step_that_is_not_finite_is_skipped(
    command: Command, watcher: type[Watcher], kind: str, step: int, accumulation: int, clip: str
) -> None:
    watcher.kind, watcher.bad = kind, {step}
    result = watched_fit(command, "--bad_steps=skip", f"--trainer.accumulate_grad_batches={accumulation}",
               f"--trainer.gradient_clip_val={clip}")  # fmt: skip
    assert result.code == 0, result.err
    assert list(watcher.states) == [0, 1, 2, 3, 4, 5]
    for other, (before, after) in watcher.states.items():
        assert same_bits(before, after) == (other == step)
        assert all(torch.isfinite(p).all() for p in after[0].values())
    (line,) = [line for line in result.err.splitlines() if "skipped" in line]
    number = "nan" if kind == "loss" else r"[\d.]+"
    # the last of the 7 batches of an epoch is a step alone
    batches = 1 if accumulation == 3 and step % 3 == 2 else accumulation
    windows = ", ".join([r"\d+"] * 2 * batches)
    assert re.fullmatch(
        rf"gpt_lightning: step {step}: loss {number}, gradient norm nan, windows {windows}: "
        r"skipped \(1 in a row, 1 in all\)",
        line,
    )
    events = EventAccumulator("checkpoints/quickstart").Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/skipped_steps")] == [(step, 1.0)]
    assert read_checkpoint(LAST)["global_step"] == 6


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_skipped_step_with_clipping_changes_nothing(
    command: Command, watcher: type[Watcher], algorithm: str
) -> None:
    watcher.kind, watcher.bad = "gradient", {1, 2}
    result = watched_fit(command, "--bad_steps=skip", "--trainer.accumulate_grad_batches=3",
               "--trainer.gradient_clip_val=1.0", f"--trainer.gradient_clip_algorithm={algorithm}")  # fmt: skip
    assert result.code == 0, result.err
    assert "(2 in a row, 2 in all)" in result.err
    for step, (before, after) in watcher.states.items():
        assert same_bits(before, after) == (step in watcher.bad)


@pytest.mark.parametrize("kind", ["loss", "loss alone", "gradient"])
@pytest.mark.parametrize("step", [0, 3])
def test_step_that_is_not_finite_stops_the_run_by_default(
    command: Command, watcher: type[Watcher], kind: str, step: int
) -> None:
    watcher.kind, watcher.bad, watcher.factor = kind, {step}, math.inf
    result = watched_fit(command)
    assert result.code == 1
    line = result.err.splitlines()[-1]
    assert line.startswith(f"gpt_lightning: error: step {step}: loss ")
    assert "nothing was updated" in line
    assert re.search(r"windows \d+, \d+;", line)
    assert "Traceback" not in result.err
    if step:
        assert read_checkpoint(LAST)["global_step"] == step
        last = {
            name.removeprefix("model."): t
            for name, t in read_checkpoint(LAST)["state_dict"].items()
        }
        assert same_bits({f"model.{n}": t for n, t in last.items()}, watcher.states[step][0][0])
    else:
        assert not LAST.exists()
    # without the fault it resumes
    watcher.bad = set()
    if step:
        assert watched_fit(command, "--ckpt_path=last").code == 0


@pytest.mark.parametrize(("kind", "bad"), [("loss", {0}), ("loss", {2, 3}), ("gradient", {5})])
def test_late_check_of_a_step_equals_the_immediate_one(
    command: Command,
    watcher: type[Watcher],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    bad: set[int],
) -> None:
    """As on a GPU: the optimizer skips the step, and the host reads the result one step later."""
    watcher.kind, watcher.bad = kind, bad
    at_once = watched_fit(command, "--run=once", "--bad_steps=skip")
    watcher.states = {}
    monkeypatch.setattr(bad_steps, "_checks_later", lambda module, optimizer: True)
    later = watched_fit(command, "--run=later", "--bad_steps=skip")
    assert later.code == at_once.code == 0, later.err
    lines = [
        [line for line in result.err.splitlines() if "skipped" in line]
        for result in (at_once, later)
    ]
    assert lines[0] == lines[1]
    assert len(lines[1]) == len(bad)
    for step, (before, after) in watcher.states.items():
        assert same_bits(before[0], after[0]) == (step in bad)
    once, other = (
        read_checkpoint(Path(f"checkpoints/{run}/last.ckpt")) for run in ("once", "later")
    )
    for key in ("state_dict", "optimizer_states", "tokens_seen", "callbacks"):
        ours, theirs = (
            {k: v for k, v in c[key].items() if k == "SkipBadSteps"}
            if key == "callbacks"
            else c[key]
            for c in (other, once)
        )
        assert same_bits(ours, theirs), key
    stopped = watched_fit(command, "--run=stopped")
    assert stopped.code == 1
    assert f"error: step {min(bad)}: " in stopped.err.splitlines()[-1]
    last = Path("checkpoints/stopped/last.ckpt")
    assert not min(bad) or read_checkpoint(last)["global_step"] == min(bad)


def test_optimizer_that_was_not_fused_resumes_fused(
    command: Command, watcher: type[Watcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in 16-mixed saves such an optimizer; only the fused one can skip a step by itself."""
    assert watched_fit(command, "--trainer.max_steps=2").code == 0
    checkpoint = torch.load(LAST, weights_only=True)
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group["fused"] = None
    torch.save(checkpoint, LAST)
    (LAST.parent / "manifest.json").unlink()
    monkeypatch.setattr(bad_steps, "_checks_later", lambda module, optimizer: True)
    watcher.kind, watcher.bad = "loss", {4}
    result = watched_fit(command, "--ckpt_path=last", "--bad_steps=skip")
    assert result.code == 0, result.err
    assert "step 4: loss nan" in result.err
    (optimizer,) = read_checkpoint(LAST)["optimizer_states"]
    assert all(group["fused"] for group in optimizer["param_groups"])


@pytest.mark.usefixtures("messages")
def test_features_that_16_mixed_lacks_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a real run, because Lightning uses bf16-mixed instead on a CPU."""
    for rank_zero in (True, False):
        trainer: Any = SimpleNamespace(precision="16-mixed", is_global_zero=rank_zero)
        SkipBadSteps().on_train_start(trainer, None)  # type: ignore[arg-type]
        err = capsys.readouterr().err
        assert err.count("\n") == rank_zero
        for part in ("trainer.precision: ", "bad_steps", "not fused", "loss by chunks"):
            assert (part in err) == rank_zero


def test_too_many_bad_steps_in_a_row_stop_the_run(command: Command, watcher: type[Watcher]) -> None:
    watcher.kind, watcher.bad = "loss", {2, 3, 4}
    result = watched_fit(command, "--bad_steps=skip", "--max_bad_steps=2")
    assert result.code == 1
    assert "2 bad steps in a row were skipped before it" in result.err.splitlines()[-1]
    assert "(2 in a row, 2 in all)" in result.err


def test_spike_is_skipped(
    command: Command, watcher: type[Watcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bad_steps, "SPIKE_STEPS", 3)
    watcher.kind, watcher.bad, watcher.factor = "loss", {4}, 50.0
    result = watched_fit(
        command,
        "--skip_spikes=true",
        "--model.config.emb_dim=16",
        "--model.config.n_heads=2",
        "--model.config.n_layers=2",
    )
    assert result.code == 0, result.err
    (line,) = [line for line in result.err.splitlines() if "skipped" in line]
    assert line.startswith("gpt_lightning: a spike, step 4: loss ")
    for step, (before, after) in watcher.states.items():
        assert same_bits(before, after) == (step == 4)


def test_spike_is_six_deviations_above_128_steps() -> None:
    steps = SkipBadSteps(skip_spikes=True)
    for i in range(128):
        assert not steps._is_spike(1e9, 1e9)
        steps._good.append((4.0 + (-1) ** i, 1.0 + 0.5 * (-1) ** i))  # deviations 1 and 0.5
    assert not steps._is_spike(9.99, 3.99)
    assert steps._is_spike(10.01, 1.0)
    assert steps._is_spike(4.0, 4.01)
    assert not steps._is_spike(-90.0, 0.0)  # a fall is not a spike
    again = SkipBadSteps(skip_spikes=True)
    again.load_state_dict(steps.state_dict())
    assert again._good == steps._good


class Blown(Callback):
    """A step that makes a parameter infinite, from a gradient that was finite."""

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == 3:
            with torch.no_grad():
                next(module.parameters())[0] = math.inf


def test_parameters_that_are_not_finite_are_never_saved(
    command: Command, watcher: type[Watcher]
) -> None:
    result = watched_fit(command, f"--trainer.callbacks+={__name__}.Blown", "--bad_steps=skip",
               "--max_bad_steps=99")  # fmt: skip
    assert result.code == 1
    assert "has made parameters that are not finite" in result.err.splitlines()[-1]
    checkpoint = read_checkpoint(LAST)
    assert checkpoint["global_step"] == 3
    assert all(torch.isfinite(t).all() for t in checkpoint["state_dict"].values())


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("--evaluation.prompt=null",), marks=pytest.mark.slow),
        pytest.param(("--evaluation.eval_freq=1000",), marks=pytest.mark.slow),
        ("--evaluation.eval_freq=1", "--evaluation.log_next_token=true"),
        ("--trainer.logger=false",),
        ("--data.num_workers=2",),
        pytest.param(("--checkpoint.async_save=true",), marks=pytest.mark.slow),
        ("--checkpoint.every_n_train_steps=5", "--checkpoint.save_best=false"),
        ("--bad_steps=skip", "--skip_spikes=true"),
        pytest.param(("--trainer.enable_progress_bar=false",), marks=pytest.mark.slow),
    ],
    ids=lambda arguments: arguments[0],
)
def test_observing_a_run_does_not_change_it(
    command: Command, watcher: type[Watcher], arguments: tuple[str, ...]
) -> None:
    assert watched_fit(command, "--run=plain").code == 0
    assert watched_fit(command, *arguments).code == 0
    plain = read_checkpoint(Path("checkpoints/plain/last.ckpt"))
    other = read_checkpoint(LAST)
    assert same_bits(plain["state_dict"], other["state_dict"])
    assert same_bits(plain["optimizer_states"], other["optimizer_states"])
    assert plain["tokens_seen"] == other["tokens_seen"]
