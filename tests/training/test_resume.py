"""A resumed run equals an uninterrupted one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from gpt_lightning import GPTLightningModule, load_model
from gpt_lightning.training.verify_resume import compare_checkpoints
from helpers import QUICKSTART, SMALL, Command
from runs import (
    BARE,
    RUN,
    THREE_EPOCHS,
    file_times,
    last_checkpoint,
    losses,
    same_checkpoints,
    same_runs,
)


@pytest.mark.parametrize(
    ("cut", "accumulate"),
    [
        ("--trainer.max_steps=5", 1),
        ("--trainer.max_epochs=1", 3),
        pytest.param("--trainer.max_steps=5", 3, marks=pytest.mark.slow),
        pytest.param("--trainer.max_epochs=1", 1, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_uninterrupted_run(fit: Command, cut: str, accumulate: int) -> None:
    """A finished run that is extended has the bits of a run that was that long from the start."""
    extra = (*THREE_EPOCHS, f"--trainer.accumulate_grad_batches={accumulate}")
    fit("--run=straight", *extra)
    fit("--run=cut", *extra, cut)
    fit("--run=cut", *extra, "--ckpt_path=last")
    assert same_runs("straight", "cut")


def test_resumed_run_with_limited_epochs_equals_uninterrupted_run(fit: Command) -> None:
    extra = (*THREE_EPOCHS, "--trainer.limit_train_batches=3")
    fit("--run=straight", *extra)
    fit("--run=cut", *extra, "--trainer.max_epochs=1")
    fit("--run=cut", *extra, "--ckpt_path=last")
    assert same_runs("straight", "cut")


@pytest.fixture
def at_step_5() -> Iterator[Callable[[Callable[[Any], None]], None]]:
    """A function that sets what happens once, in the sixth training step."""
    patch = pytest.MonkeyPatch()

    def set_up(act: Callable[[Any], None]) -> None:
        step = GPTLightningModule.training_step

        def training_step(self: GPTLightningModule, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == 5:
                patch.undo()
                act(self.trainer)
            return step(self, batch, batch_idx)

        patch.setattr(GPTLightningModule, "training_step", training_step)

    yield set_up
    patch.undo()


@pytest.mark.parametrize(
    "ckpt_path",
    [
        "last",
        pytest.param("best", marks=pytest.mark.slow),
        pytest.param("checkpoints/cut/last.ckpt", marks=pytest.mark.slow),
    ],
)
def test_interrupted_run_resumes_from_its_last_checkpoint(
    fit: Command,
    command: Command,
    at_step_5: Callable[[Callable[[Any], None]], None],
    ckpt_path: str,
) -> None:
    def interrupt(trainer: Any) -> None:
        raise KeyboardInterrupt

    extra = (*THREE_EPOCHS, "--checkpoint.every_n_train_steps=2",
             f"--checkpoint.save_best={ckpt_path == 'best'}")  # fmt: skip
    fit("--run=straight", *extra)
    at_step_5(interrupt)
    config = QUICKSTART
    result = command("fit", config, *SMALL, *extra, "--run=cut")
    assert result.code == 130
    assert result.err.endswith(
        "gpt_lightning: interrupted checkpoints/cut: --ckpt_path last resumes it\n"
    )
    assert len(losses("cut")) == 5
    # with best.ckpt the evaluation of the last step has saved too
    saved_step = 5 if ckpt_path == "best" else 4
    assert torch.load("checkpoints/cut/last.ckpt", weights_only=True)["global_step"] == saved_step
    fit("--run=cut", *extra, f"--ckpt_path={ckpt_path}")
    assert same_runs("straight", "cut")


@pytest.mark.parametrize("code", [1, "enough"])
def test_sys_exit_is_not_an_interrupt(command: Command, code: int | str) -> None:
    def leave(*_: Any) -> None:
        raise SystemExit(code)

    config = QUICKSTART
    with mock.patch.object(GPTLightningModule, "training_step", leave):
        result = command("fit", config, *SMALL)
    assert result.code == 1
    assert f"ended by sys.exit({code!r}), not by its settings\n" in result.err
    assert result.err.endswith("enough\n") == (code == "enough")
    assert "interrupted" not in result.err


@pytest.mark.slow
def test_run_that_stops_itself_in_an_epoch_resumes(
    fit: Command, at_step_5: Callable[[Callable[[Any], None]], None]
) -> None:
    fit("--run=straight", *THREE_EPOCHS)
    at_step_5(lambda trainer: setattr(trainer, "should_stop", True))
    fit("--run=cut", *THREE_EPOCHS)
    assert len(losses("cut")) == 6
    fit("--run=cut", *THREE_EPOCHS, "--ckpt_path=last")
    assert same_runs("straight", "cut")


@pytest.mark.parametrize(
    ("limit", "larger", "says"),
    [
        ("--trainer.max_steps=5", "--trainer.max_steps=6", "step 5 of 5"),
        pytest.param(
            "--trainer.max_epochs=1",
            "--trainer.max_epochs=2",
            "epoch 1 of 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--max_tokens=150", "--max_tokens=170", "token 160 of 150", marks=pytest.mark.slow
        ),
    ],
)
def test_finished_run_says_how_to_train_further(
    fit: Command, limit: str, larger: str, says: str
) -> None:
    ends = ["--trainer.max_epochs=-1"] if "epochs" not in limit else []
    fit(*ends, limit)
    before = file_times(Path("checkpoints"))
    for ckpt_path in ("last", "auto", "checkpoints/quickstart/last.ckpt"):
        result = fit(*ends, limit, f"--ckpt_path={ckpt_path}")
        assert result.out == ""
        option = limit.partition("=")[0]
        assert result.err.splitlines()[-1] == (
            f"checkpoints/quickstart: already finished ({says}); to train further, give a larger {option}"
        )
        assert file_times(Path("checkpoints")) == before
    fit(*ends, larger, "--ckpt_path=last")
    assert file_times(Path("checkpoints")) != before


@pytest.mark.slow
def test_wrong_epoch_count_in_a_checkpoint_is_corrected(fit: Command) -> None:
    """Lightning wrote such a checkpoint after a resume at the end of an epoch: one epoch is missing."""
    extra = (*THREE_EPOCHS, "--checkpoint.every_n_train_steps=3")
    fit("--run=straight", *extra)
    fit("--run=cut", *extra, "--trainer.max_epochs=1")
    fit("--run=cut", *extra, "--trainer.max_epochs=2", "--ckpt_path=last")
    path = Path("checkpoints/cut/last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        assert counts == {"ready": 2, "started": 2, "processed": 1, "completed": 1}
        counts.update(ready=1, started=1)
    torch.save(checkpoint, path)
    Path("checkpoints/cut/manifest.json").unlink()
    result = fit("--run=cut", *extra, "--ckpt_path=last")
    assert "counts 1 epochs, its data are in epoch 2" in result.err
    assert same_runs("straight", "cut")
    fit("--run=cut", *extra, "--ckpt_path=last")  # the corrected checkpoint resumes too
    assert same_runs("straight", "cut")


def test_resume_keeps_the_saved_configuration(fit: Command) -> None:
    fit("--trainer.max_steps=2")
    before = Path("checkpoints/quickstart/config.yaml").read_text()
    fit("--trainer.max_steps=4", "--ckpt_path=last")
    assert Path("checkpoints/quickstart/config.yaml").read_text() == before
    assert torch.load("checkpoints/quickstart/last.ckpt", weights_only=True)["global_step"] == 4


def test_given_settings_override_saved_ones_on_resume(fit: Command) -> None:
    fit("--trainer.max_steps=2", "--model.lr=0.01", "--model.warmup_steps=0")
    fit("--trainer.max_steps=3", "--ckpt_path=last", "--model.lr=0.5", "--model.weight_decay=0.3",
        "--model.warmup_steps=0")  # fmt: skip
    groups = torch.load("checkpoints/quickstart/last.ckpt", weights_only=True)["optimizer_states"][
        0
    ]
    assert groups["param_groups"][0]["lr"] == 0.5
    assert groups["param_groups"][0]["weight_decay"] == 0.3


def test_init_from_starts_a_new_run_with_the_given_weights(fit: Command) -> None:
    fit("--trainer.max_steps=4")
    fit("--run=new", "--init_from=checkpoints/quickstart", "--trainer.max_steps=1", "--model.lr=0")
    old, new = load_model("checkpoints/quickstart"), load_model("checkpoints/new")
    pairs = zip(old.parameters(), new.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # lr 0: the step changed nothing
    assert torch.load("checkpoints/new/last.ckpt", weights_only=True)["global_step"] == 1

    def optimizer(run: str) -> dict[str, torch.Tensor]:
        state = torch.load(f"checkpoints/{run}/last.ckpt", weights_only=True)["optimizer_states"][0]
        return state["state"][0]

    assert optimizer("new")["step"] == 1
    fit("--run=both", "--init_from=checkpoints/quickstart", "--init_optimizer=true",
        "--trainer.max_steps=1", "--model.betas=[0.999,0.999]")  # fmt: skip
    assert optimizer("both")["step"] == 5
    moved = optimizer("both")["exp_avg"] - 0.999 * optimizer("quickstart")["exp_avg"]
    assert moved.abs().max() < 0.01 * optimizer("quickstart")["exp_avg"].abs().max() + 1e-4


def test_counters_of_a_run_resumed_at_the_end_of_an_epoch_are_the_same(fit: Command) -> None:
    fit("--trainer.max_epochs=3", "--run=straight")
    fit("--trainer.max_epochs=1")
    fit("--trainer.max_epochs=3", "--ckpt_path=last")
    for part in compare_checkpoints(Path("checkpoints/straight/last.ckpt"), RUN / "last.ckpt"):
        assert part.difference == ""


@pytest.mark.slow
def test_run_with_max_tokens_ends_and_resumes_exactly(fit: Command) -> None:
    """Within an epoch and at its end, with the same checkpoint as a run with max_steps."""

    def run(name: str, *arguments: str) -> str:
        return fit(*BARE, "--model.config.drop_rate=0.1", f"--run={name}", *arguments,
                   "--trainer.max_epochs=null").err  # fmt: skip

    run("straight", "--trainer.max_steps=13")
    # 32 tokens per step, 7 steps per epoch
    for name, tokens, steps in [("in-mid-epoch", 230, 8), ("at-its-end", 224, 7)]:
        assert f"step 0 of {steps} (" in run(name, f"--max_tokens={tokens}")
        assert (last_checkpoint(name)["global_step"], last_checkpoint(name)["tokens_seen"]) == (
            steps,
            32 * steps,
        )
        before = Path(f"checkpoints/{name}/last.ckpt").stat().st_mtime_ns
        run(name, f"--max_tokens={tokens}", "--ckpt_path=last")
        assert Path(f"checkpoints/{name}/last.ckpt").stat().st_mtime_ns == before
        assert f"step {steps} of 13 (" in run(name, "--max_tokens=416", "--ckpt_path=last")
        assert last_checkpoint(name)["tokens_seen"] == 416
        assert same_checkpoints(name, "straight")


@pytest.mark.slow
def test_resumed_run_on_a_mixture_equals_uninterrupted_run(
    fit: Command, command: Command, tmp_path: Path
) -> None:
    """Validation uses the windows of both texts."""
    (tmp_path / "my.txt").write_text("".join(f"Line {i} of a list of lines. " for i in range(200)))
    mixed = (
        *BARE,
        '--data.mixture={"sample": 0.25, "my.txt": 0.75}',
        "--data.document_mask=true",
    )
    fit(*mixed, "--run=straight", "--trainer.max_steps=9", "--data.global_batch_size=8")
    fit(*mixed, "--run=cut", "--trainer.max_steps=5", "--data.global_batch_size=8")
    fit(*mixed, "--run=cut", "--trainer.max_steps=9", "--data.global_batch_size=8", "--ckpt_path=last")  # fmt: skip
    assert same_checkpoints("cut", "straight")

    def validate(*arguments: str) -> dict[str, float]:
        result = command("validate", "--config=checkpoints/cut/config.yaml", "--json",
                       "--ckpt_path=last", *arguments)  # fmt: skip
        return dict(json.loads(result.out))

    both = validate()
    alone = [validate("--data.mixture=null", f"--data.text={text}") for text in ("sample", "my.txt")]  # fmt: skip
    for split in ("train", "val"):
        tokens = [one[f"{split}_tokens"] for one in alone]
        assert both[f"{split}_tokens"] == sum(tokens)
        total = sum(one[f"{split}_loss"] * n for one, n in zip(alone, tokens, strict=True))
        assert both[f"{split}_loss"] == pytest.approx(total / sum(tokens), abs=1e-6)
