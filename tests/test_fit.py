"""``fit``, ``validate`` and ``generate`` as commands: what they print, write, resume and refuse."""

import json
import os
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from conftest import ROOT, SMALL, Command, python
from jsonargparse import Namespace
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning import GPTLightningModule, load_model
from gpt_lightning.cli import fit as fit_module
from gpt_lightning.cli import run_warnings
from gpt_lightning.model.gpt import TransformerBlock
from gpt_lightning.training.evaluation import EvaluationCallback, SampleTextCallback
from gpt_lightning.training.run_files import loss_figure


def same_weights(one: str, other: str) -> bool:
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    return all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"]) and (
        a["optimizer_states"][0]["state"].keys() == b["optimizer_states"][0]["state"].keys()
    ) and all(
        torch.equal(value, b["optimizer_states"][0]["state"][i][key])
        for i, state in a["optimizer_states"][0]["state"].items()
        for key, value in state.items()
    )  # fmt: skip


def test_run_folder_and_tensorboard(fit: Command) -> None:
    done = fit(
        "--trainer.max_epochs=2", "--evaluation.eval_freq=3", "--evaluation.log_next_token=true"
    )
    folder = Path("checkpoints/quickstart")
    events = [name for name in os.listdir(folder) if name.startswith("events.out.tfevents")]
    assert sorted(os.listdir(folder)) == sorted(
        [
            "best.ckpt",
            "config.yaml",
            "last.ckpt",
            "loss.png",
            "manifest.json",
            "metrics.csv",
            "previous.ckpt",
            *events,
        ]
    )
    assert len(events) == 1

    board = EventAccumulator(str(folder))
    board.Reload()
    tags = board.Tags()
    assert set(EvaluationCallback.TAGS) <= set(tags["scalars"])
    assert set(SampleTextCallback.TAGS) <= set(tags["scalars"])
    assert [e.step for e in board.Scalars(SampleTextCallback.TAGS[0])] == [0, 3, 6, 9, 12]
    assert "losses" in tags["images"]
    assert "sample/text_summary" in tags["tensors"]
    assert "_hparams_/session_start_info" in board.summary_metadata
    assert {"final/train_loss", "final/val_loss"} <= set(tags["scalars"])

    lines = [line for line in done.out.splitlines() if line.startswith("Ep ")]
    samples = [line for line in done.out.splitlines() if not line.startswith("Ep ")]
    assert len(samples) == 2
    logged = [event.value for event in board.Scalars("val_loss")]
    assert len(lines) == len(logged) == len((folder / "metrics.csv").read_text().splitlines()) - 1
    assert [f"{value:.3f}" for value in logged] == [line.split()[-1] for line in lines]
    assert [event.step for event in board.Scalars("val_loss")][:2] == [0, 3]
    assert all(event.value > 0 for event in board.Scalars("grad_norm"))
    assert all(event.value > 0 for event in board.Scalars("tokens_per_second"))


def test_checkpoints_hold_tensors_and_primitives_only(fit: Command) -> None:
    fit("--trainer.max_epochs=1")
    for name in ("last", "best"):
        checkpoint = torch.load(f"checkpoints/quickstart/{name}.ckpt", weights_only=True)
        assert checkpoint["hyper_parameters"]["config"]["emb_dim"] == 16
    module = GPTLightningModule.load_from_checkpoint("checkpoints/quickstart/last.ckpt")
    assert module.config.emb_dim == 16
    assert not list(Path("checkpoints/quickstart").glob(".*"))


def test_best_is_the_lowest_validation_loss(fit: Command) -> None:
    fit(
        "--trainer.max_steps=12", "--evaluation.eval_freq=2", "--model.lr=0.3"
    )  # soon goes up again
    rows = Path("checkpoints/quickstart/metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    losses = {
        int(row.split(",")[0]): float(row.split(",")[header.index("val_loss")]) for row in rows[1:]
    }
    best_step = min(losses, key=lambda step: losses[step])
    assert best_step != max(losses)
    best = torch.load("checkpoints/quickstart/best.ckpt", weights_only=True)
    assert best["global_step"] == best_step + 1


def losses(run: str) -> list[list[str]]:
    header, *rows = Path(f"checkpoints/{run}/metrics.csv").read_text().splitlines()
    kept = ("step", "epoch", "train_loss", "val_loss", "tokens_seen")
    places = [header.split(",").index(name) for name in kept]
    return [[row.split(",")[i] for i in places] for row in rows]


def same_run(one: str, other: str) -> bool:
    return losses(one) == losses(other) and same_weights(
        f"checkpoints/{one}/last.ckpt", f"checkpoints/{other}/last.ckpt"
    )


THREE_EPOCHS = (
    "--trainer.max_epochs=3",
    "--model.config.drop_rate=0.1",
    "--evaluation.eval_freq=1",
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
def test_resumed_equals_uninterrupted(fit: Command, cut: str, accumulate: int) -> None:
    """A finished run made longer has the bits of one that was that long from the start."""
    extra = (*THREE_EPOCHS, f"--trainer.accumulate_grad_batches={accumulate}")
    fit("--run=straight", *extra)
    fit("--run=cut", *extra, cut)
    fit("--run=cut", *extra, "--ckpt_path=last")
    assert same_run("straight", "cut")


def test_epochs_cut_short_by_the_trainer_resume_too(fit: Command) -> None:
    extra = (*THREE_EPOCHS, "--trainer.limit_train_batches=3")
    fit("--run=straight", *extra)
    fit("--run=cut", *extra, "--trainer.max_epochs=1")
    fit("--run=cut", *extra, "--ckpt_path=last")
    assert same_run("straight", "cut")


@pytest.fixture
def at_step_5() -> Iterator[Callable[[Callable[[Any], None]], None]]:
    """Have something happen, once, in the sixth training step."""
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
def test_interrupted_run_goes_on_from_its_last_interval(
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
    config = f"--config={ROOT}/configs/quickstart.yaml"
    done = command("fit", config, *SMALL, *extra, "--run=cut")
    assert done.code == 130
    assert done.err.endswith(
        "gpt_lightning: interrupted checkpoints/cut: --ckpt_path last resumes it\n"
    )
    assert len(losses("cut")) == 5
    # with best.ckpt the evaluation of the last step has saved too
    saved_step = 5 if ckpt_path == "best" else 4
    assert torch.load("checkpoints/cut/last.ckpt", weights_only=True)["global_step"] == saved_step
    fit("--run=cut", *extra, f"--ckpt_path={ckpt_path}")
    assert same_run("straight", "cut")


@pytest.mark.parametrize("code", [1, "enough"])
def test_an_exit_is_not_taken_for_an_interrupt(
    command: Command, capsys: pytest.CaptureFixture[str], code: int | str
) -> None:
    def leave(*_: Any) -> None:
        raise SystemExit(code)

    config = f"--config={ROOT}/configs/quickstart.yaml"
    with (
        mock.patch.object(GPTLightningModule, "training_step", leave),
        pytest.raises(SystemExit) as left,
    ):
        command("fit", config, *SMALL)
    assert left.value.code == code
    said = capsys.readouterr().err
    assert said.splitlines()[-1].endswith(f"ended by sys.exit({code!r}), not by its settings")
    assert "interrupted" not in said


def test_interrupted_validation(command: Command, fit: Command) -> None:
    fit("--trainer.max_steps=1")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    config = f"--config={ROOT}/configs/quickstart.yaml"
    with mock.patch.object(GPTLightningModule, "validation_step", interrupt):
        done = command("validate", config, *SMALL, "--ckpt_path=last")
    assert done.code == 130
    assert done.err.splitlines()[-1] == "gpt_lightning: interrupted"


def test_run_that_stops_itself_in_mid_epoch_goes_on(
    fit: Command, at_step_5: Callable[[Callable[[Any], None]], None]
) -> None:
    fit("--run=straight", *THREE_EPOCHS)
    at_step_5(lambda trainer: setattr(trainer, "should_stop", True))
    fit("--run=cut", *THREE_EPOCHS)
    assert len(losses("cut")) == 6
    fit("--run=cut", *THREE_EPOCHS, "--ckpt_path=last")
    assert same_run("straight", "cut")


@pytest.mark.parametrize(
    ("limit", "larger", "says"),
    [
        ("--trainer.max_steps=5", "--trainer.max_steps=6", "step 5 of 5"),
        ("--trainer.max_epochs=1", "--trainer.max_epochs=2", "epoch 1 of 1"),
        ("--max_tokens=150", "--max_tokens=170", "token 160 of 150"),
    ],
)
def test_a_finished_run_says_how_to_train_further(
    fit: Command, limit: str, larger: str, says: str
) -> None:
    ends = ["--trainer.max_epochs=-1"] if "epochs" not in limit else []
    fit(*ends, limit)
    before = _listed(Path("checkpoints"))
    for ckpt_path in ("last", "auto", "checkpoints/quickstart/last.ckpt"):
        done = fit(*ends, limit, f"--ckpt_path={ckpt_path}")
        assert done.out == ""
        option = limit.partition("=")[0]
        assert done.err.splitlines()[-1] == (
            f"checkpoints/quickstart: already finished ({says}); to train further, give a larger {option}"
        )
        assert _listed(Path("checkpoints")) == before
    fit(*ends, larger, "--ckpt_path=last")
    assert _listed(Path("checkpoints")) != before


def test_a_checkpoint_whose_epochs_were_miscounted_is_corrected(fit: Command) -> None:
    """As Lightning wrote it after a resume at an epoch's end: an epoch is missing from its counts."""
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
    done = fit("--run=cut", *extra, "--ckpt_path=last")
    assert "counts 1 epochs, its data are in epoch 2" in done.err
    assert same_run("straight", "cut")
    fit("--run=cut", *extra, "--ckpt_path=last")  # it is right from now on
    assert same_run("straight", "cut")


def test_overfit_batches_repeats_the_same_windows(fit: Command) -> None:
    fit("--trainer.overfit_batches=1", "--trainer.max_epochs=60", "--model.config.drop_rate=0",
        "--model.lr=0.02", "--evaluation.eval_freq=59", "--evaluation.prompt=null",
        "--trainer.callbacks+=gpt_lightning.training.verify_resume.WindowRecorder",
        "--trainer.callbacks.folder=.")  # fmt: skip
    seen = [json.loads(line)[2] for line in Path("windows-0.jsonl").read_text().splitlines()]
    assert seen == [[0, 1]] * 60
    first, last = (float(row[2]) for row in losses("quickstart"))
    assert last < 0.1 < 5 < first


def test_saving_in_the_background_changes_nothing(fit: Command) -> None:
    fit("--run=waiting", *THREE_EPOCHS)
    fit("--run=background", *THREE_EPOCHS, "--checkpoint.async_save=true")
    assert same_run("waiting", "background")
    for name in ("last", "best"):
        assert same_weights(
            f"checkpoints/waiting/{name}.ckpt", f"checkpoints/background/{name}.ckpt"
        )


def _listed(folder: Path) -> dict[str, tuple[int, int]]:
    """Each file's size and time."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


LINES = [f"Line {i} of a text of its own.\n" for i in range(300)]


@pytest.mark.parametrize(
    ("begun", "resumed", "says"),
    [
        ([], ["--data.stride=30"], "data.stride: the run has 40, here is 30"),
        # as many windows
        (["--data.stride=100"], ["--data.stride=101"], "data.stride: the run has 100, here is 101"),
        ([], ["--data.context_length=15"], "data.context_length: the run has 16, here is 15"),
        ([], ["--data.document_mask=true"], "data.document_mask: the run has False"),
        ([], ["--seed_everything=7"], "seed_everything: the run has 123, here is 7"),
        ([], ["--rng=global"], "rng: the run has step, here is global"),
        (
            [],
            ["--trainer.overfit_batches=2"],
            "trainer.overfit_batches: the run was started without",
        ),
        ([], ["--data.train_ratio=0.11"], "data.text: the training text is not the one"),
        ([], ["--data.text=middle.txt"], "data.text: the training text is not the one"),
        ([], ["--data.text=end.txt"], "data.text: the validation text is not the one"),
        (
            ["--data.mixture={my.txt: 1, sample: 2}"],
            ["--data.mixture={my.txt: 1, sample: 3}"],
            "data.mixture: the run has drawn on 0.3333 of",
        ),
        (
            ["--data.mixture={my.txt: 1, sample: 2}"],
            ["--data.mixture={my.txt: 1, sample: 2}", "--seed_everything=124"],
            "seed_everything: the run has 123, here is 124",
        ),
        (
            ["--data.mixture={my.txt: 1, end.txt: 1}"],
            ["--data.mixture={end.txt: 1, my.txt: 1}"],
            "data.text: the validation text is not the one",
        ),
        (["--data.mixture={my.txt: 1}"], [], "data.mixture: the run has drawn on 1 of"),
    ],
)
def test_resuming_with_other_windows_is_refused(
    fit: Command, command: Command, begun: list[str], resumed: list[str], says: str
) -> None:
    """Whatever decides a window: in one line, and nothing of the run is touched."""
    for name, line in (("my.txt", None), ("middle.txt", 15), ("end.txt", -15)):
        text = list(LINES)
        if line is not None:  # as many tokens, neither the first nor the last
            text[line] = text[line].replace("Line", "Word")
        Path(name).write_text("".join(text), encoding="utf-8")
    fit("--data.text=my.txt", *begun, "--trainer.max_steps=5")
    before = _listed(Path("checkpoints"))
    done = command(
        "fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL, "--ckpt_path=last",
        "--trainer.max_steps=9", "--data.text=my.txt", *resumed,
    )  # fmt: skip
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith(f"gpt_lightning: error: {says}"), done.err
    assert _listed(Path("checkpoints")) == before


def test_a_batch_size_that_does_not_meet_the_position_is_refused(
    fit: Command, command: Command
) -> None:
    fit("--trainer.max_steps=5")
    again = ("fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL, "--ckpt_path=last")
    done = command(*again, "--data.batch_size=4")
    assert (
        "cut after 10 windows of an epoch, which is not a multiple of 4 windows per batch"
        in done.err
    )
    fit("--ckpt_path=last", "--data.batch_size=5", "--trainer.max_steps=7")


def test_another_runs_checkpoint_does_not_overwrite_this_one(
    fit: Command, command: Command
) -> None:
    fit("--trainer.max_steps=1")
    fit("--trainer.max_steps=1", "--run=other")
    done = command(
        "fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL,
        "--ckpt_path=checkpoints/other/last.ckpt",
    )  # fmt: skip
    assert done.code == 2
    assert "is of another run than checkpoints/quickstart" in done.err


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_in_mixed_precision(fit: Command, algorithm: str) -> None:
    fit(
        "--trainer.max_steps=2", "--trainer.precision=bf16-mixed", "--evaluation.eval_freq=1",
        "--trainer.gradient_clip_val=1e-6", f"--trainer.gradient_clip_algorithm={algorithm}",
    )  # fmt: skip
    checkpoint = torch.load("checkpoints/quickstart/last.ckpt", weights_only=True)
    moments = [state["exp_avg"] for state in checkpoint["optimizer_states"][0]["state"].values()]
    assert 0 < max(moment.abs().max() for moment in moments) <= 1e-6
    header, *rows = Path("checkpoints/quickstart/metrics.csv").read_text().splitlines()
    assert float(rows[0].split(",")[header.split(",").index("grad_norm")]) > 1e-3  # before clipping


def test_watching_does_not_move_the_run(fit: Command) -> None:
    common = ("--trainer.max_epochs=1", "--model.config.drop_rate=0.1")
    fit("--run=watched", "--evaluation.eval_freq=1", "--evaluation.log_next_token=true", *common)
    fit("--run=alone", "--evaluation.eval_freq=1000", "--evaluation.prompt=null", *common)
    assert same_weights("checkpoints/watched/last.ckpt", "checkpoints/alone/last.ckpt")


def test_resume_keeps_the_configuration_it_has(fit: Command) -> None:
    fit("--trainer.max_steps=2")
    before = Path("checkpoints/quickstart/config.yaml").read_text()
    fit("--trainer.max_steps=4", "--ckpt_path=last")
    assert Path("checkpoints/quickstart/config.yaml").read_text() == before
    assert torch.load("checkpoints/quickstart/last.ckpt", weights_only=True)["global_step"] == 4


def test_saved_configuration_gives_the_run_again(fit: Command, command: Command) -> None:
    fit("--trainer.max_steps=3")
    done = command("fit", "--config=checkpoints/quickstart/config.yaml", "--run=again")
    assert done.code == 0, done.err
    assert same_weights("checkpoints/quickstart/last.ckpt", "checkpoints/again/last.ckpt")


def test_resume_of_another_architecture_is_refused_with_both_values(
    fit: Command, command: Command
) -> None:
    fit("--trainer.max_steps=2")
    done = command(
        "fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL, "--ckpt_path=last",
        "--trainer.max_steps=9", "--model.config.emb_dim=32",
    )  # fmt: skip
    assert done.code == 2
    assert "model.config.emb_dim is 16 there and 32 here" in done.err
    assert done.err.count("\n") == 1


def test_configuration_wins_on_resume(fit: Command) -> None:
    fit("--trainer.max_steps=2", "--model.lr=0.01", "--model.warmup_steps=0")
    fit("--trainer.max_steps=3", "--ckpt_path=last", "--model.lr=0.5", "--model.weight_decay=0.3",
        "--model.warmup_steps=0")  # fmt: skip
    groups = torch.load("checkpoints/quickstart/last.ckpt", weights_only=True)["optimizer_states"][
        0
    ]
    assert groups["param_groups"][0]["lr"] == 0.5
    assert groups["param_groups"][0]["weight_decay"] == 0.3


def test_init_from_is_a_new_run_with_old_weights(fit: Command) -> None:
    fit("--trainer.max_steps=4")
    fit("--run=new", "--init_from=checkpoints/quickstart", "--trainer.max_steps=1", "--model.lr=0")
    old, new = load_model("checkpoints/quickstart"), load_model("checkpoints/new")
    pairs = zip(old.parameters(), new.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # lr 0: the update moved nothing
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


@pytest.mark.parametrize("decay_matrices_only", ["true", "false"])
def test_decay_and_schedule(fit: Command, decay_matrices_only: str) -> None:
    fit(
        "--trainer.max_steps=6", "--evaluation.eval_freq=1", "--model.lr=0.01",
        f"--model.decay_matrices_only={decay_matrices_only}",
        "--model.warmup_steps=2", "--model.decay_steps=4", "--model.min_lr=0.001",
    )  # fmt: skip
    header, *rows = Path("checkpoints/quickstart/metrics.csv").read_text().splitlines()
    rates = [float(row.split(",")[header.split(",").index("lr")]) for row in rows]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0055, 0.001, 0.001])
    groups = torch.load("checkpoints/quickstart/last.ckpt", weights_only=True)["optimizer_states"][
        0
    ]
    decays = [group["weight_decay"] for group in groups["param_groups"]]
    assert decays == ([0.1, 0.0] if decay_matrices_only == "true" else [0.1])
    if decay_matrices_only == "true":
        names = groups["param_groups"][1]["param_names"]
        assert all("norm" in name or name.endswith("bias") for name in names)


def test_no_logger_no_bar(fit: Command) -> None:
    fit("--trainer.max_steps=1", "--trainer.logger=false", "--trainer.enable_progress_bar=false")
    assert not list(Path("checkpoints/quickstart").glob("events*"))


def test_fast_dev_run_leaves_nothing(fit: Command) -> None:
    assert fit("--trainer.fast_dev_run=2").out.startswith("Ep 1 (Step 000000)")
    assert not Path("checkpoints").exists()


def test_no_checkpoints_where_none_are_wanted(fit: Command) -> None:
    fit("--trainer.max_steps=2", "--trainer.enable_checkpointing=false")
    assert not list(Path("checkpoints/quickstart").glob("*.ckpt"))


def test_validate(fit: Command, command: Command) -> None:
    fit("--trainer.max_steps=3")
    config = "--config=checkpoints/quickstart/config.yaml"
    results = []
    for batch_size in (1, 7):
        done = command(
            "validate", config, "--init_from=checkpoints/quickstart", "--json",
            f"--data.batch_size={batch_size}",
        )  # fmt: skip
        assert done.code == 0, done.err
        results.append(json.loads(done.out))
    assert {"train_loss", "val_loss", "train_perplexity", "val_perplexity"} <= set(results[0])
    assert results[0]["val_tokens"] % 16 == 0
    for key, value in results[0].items():
        same = value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
        assert results[1][key] == same
    assert command("validate", config).code == 2
    done = command("validate", config, "--ckpt_path=best")
    lines = [line.split() for line in done.out.splitlines()]
    assert [line[0] for line in lines] == ["weights", "text", "training", "validation"]
    assert lines[0][1] == "checkpoints/quickstart/best.ckpt"
    done = command(
        "validate", config, "--ckpt_path=last", "--json", "--trainer.precision=bf16-true"
    )
    assert json.loads(done.out)["val_tokens"] == results[0]["val_tokens"]
    assert json.loads(done.out)["val_loss"] == pytest.approx(results[0]["val_loss"], rel=1e-2)


def test_validate_without_a_config_measures_the_runs_own_text(
    fit: Command, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "my.txt").write_text("A text of its own, line by line. " * 100, encoding="utf-8")
    fit("--trainer.max_steps=2", "--data.text=my.txt", "--data.stride=7", "--data.train_ratio=0.6")
    config = "--config=checkpoints/quickstart/config.yaml"
    expected = json.loads(command("validate", config, "--ckpt_path=last", "--json").out)
    assert (expected["text"], expected["stride"], expected["context_length"]) == ("my.txt", 7, 16)
    for source in (
        "--init_from=checkpoints/quickstart",
        "--init_from=checkpoints/quickstart/last.ckpt",
        "--ckpt_path=checkpoints/quickstart/last.ckpt",
    ):
        found = json.loads(command("validate", source, "--json").out)
        assert found == expected
    found = json.loads(command("validate", "--ckpt_path=last", "--run=quickstart", "--json").out)
    assert found == expected
    # what is asked for wins
    other = json.loads(
        command("validate", "--ckpt_path=last", "--run=quickstart", "--json", "--data.text=sample",
                "--data.train_ratio=0.5").out
    )  # fmt: skip
    assert (other["text"], other["stride"]) == ("sample", 7)
    assert other["val_windows"] > expected["val_windows"]


def test_validate_measures_the_run_it_is_given(fit: Command, command: Command) -> None:
    fit("--trainer.max_steps=1")
    fit("--run=new", "--init_from=checkpoints/quickstart", "--trainer.max_steps=9", "--model.lr=0.1",
        "--model.warmup_steps=0")  # fmt: skip
    config = "--config=checkpoints/new/config.yaml"
    assert Path("checkpoints/new/config.yaml").read_text().startswith("# started with --init_from")

    def val_loss(*arguments: str) -> float:
        return float(json.loads(command("validate", config, "--json", *arguments).out)["val_loss"])

    last = val_loss("--ckpt_path=last")
    assert last == val_loss("--init_from=checkpoints/new")
    assert last != val_loss("--init_from=checkpoints/quickstart")


def test_generate(fit: Command, command: Command) -> None:
    fit("--trainer.max_steps=3")
    base = ("generate", "--from=checkpoints/quickstart", "--prompt=The clock", "--max_new_tokens=8")
    greedy = command(*base)
    assert greedy.code == 0
    assert greedy.out.startswith("The clock")
    for seed in ("1", "2", "3"):
        assert command(*base, f"--seed={seed}").out == greedy.out
        assert command(*base, f"--seed={seed}", "--temperature=1", "--top_k=1").out == greedy.out
    done = command(*base, "--temperature=2", "--seed=5", "--json")
    answer = json.loads(done.out)
    assert answer["text"] != greedy.out
    assert len(answer["token_ids"]) == 2 + 8
    assert answer["settings"]["temperature"] == 2.0
    assert command(*base, "--temperature=2", "--seed=5", "--json").out == done.out


def test_long_prompt_is_cropped_and_said(fit: Command, command: Command) -> None:
    fit("--trainer.max_steps=1")
    done = command("generate", "--from=checkpoints/quickstart", "--prompt", "the sea " * 30,
                   "--max_new_tokens=2")  # fmt: skip
    assert done.code == 0
    assert "the model reads 16" in done.err


def test_every_config_parses_and_names_its_command(command: Command) -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        commands = [
            line for line in path.read_text(encoding="utf-8").splitlines() if " fit " in line
        ]
        assert any(f"--config configs/{path.name}" in line for line in commands)
        yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_two_processes_are_one(fit: Command, tmp_path: Path) -> None:
    """DDP on two CPU processes: the losses of one process at the same global batch, also when resumed."""
    base = ("-m", "gpt_lightning", "fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL)
    extra = (
        "--evaluation.eval_freq=2",
        "--evaluation.eval_iter=null",
        "--model.config.drop_rate=0",
    )
    ddp = ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=1", "--run=two")

    def two(*arguments: str) -> None:
        done = python(*base, *extra, *ddp, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "sync_dist" not in done.stderr

    two("--trainer.max_steps=5")
    two("--trainer.max_steps=9", "--ckpt_path=last")
    fit(*extra, "--trainer.max_steps=9", "--run=one")
    for ours, theirs in zip(losses("one"), losses("two"), strict=True):
        assert [float(x) for x in theirs] == pytest.approx([float(x) for x in ours], abs=1e-5)
    validate = ("-m", "gpt_lightning", "validate", "--config=checkpoints/two/config.yaml")
    done = python(*validate, "--ckpt_path=last", "--json", cwd=tmp_path)
    alone = python(*validate, "--ckpt_path=last", "--json", "--trainer.devices=1", cwd=tmp_path)
    assert json.loads(done.stdout) == pytest.approx(json.loads(alone.stdout), abs=1e-5)


# --- settings without effect ------------------------------------------------------------------------


class Kind(StrEnum):
    SLOW = "slow"
    FAST = "fast"


class OfAKind(Callback):
    def __init__(self, kind: Kind = Kind.FAST, by_name: str = Kind.FAST) -> None:
        assert kind == Kind.FAST


def test_a_default_that_yaml_has_no_form_for_is_written(fit: Command) -> None:
    """Timer's interval is an enum where a string is expected; the run's own configuration begins it anew."""
    fit("--trainer.max_steps=1", "--trainer.callbacks+=lightning.pytorch.callbacks.Timer",
        "--trainer.callbacks.duration=00:00:05:00", "--allow_import=test_fit",
        "--trainer.callbacks+=test_fit.OfAKind")  # fmt: skip
    config = Path("checkpoints/quickstart/config.yaml")
    text = config.read_text(encoding="utf-8")
    assert all(line in text for line in ("interval: step\n", "kind: FAST\n", "by_name: fast\n"))
    fit(f"--config={config}", "--run=again", "--trainer.max_steps=1", "--allow_import=test_fit")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], []),
        (["--keep_freed_memory=true"], ["keep_freed_memory"]),
        (["--keep_freed_memory=false"], []),
        (["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=2",
          "--trainer.num_sanity_val_steps=1", "--trainer.log_every_n_steps=5"],
         ["trainer.val_check_interval", "trainer.check_val_every_n_epoch",
          "trainer.num_sanity_val_steps", "trainer.log_every_n_steps"]),
        (["--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"], []),
        (["--trainer.num_sanity_val_steps=0"], []),
        (["--trainer.log_every_n_steps=5",
          "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor"], []),
    ],
)  # fmt: skip
def test_settings_without_effect_are_said(
    fit: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: list[str]
) -> None:
    """Once each, and in no run whose settings all count. As where there is no glibc."""
    monkeypatch.setattr(fit_module, "keep_freed_memory", lambda: False)
    lines = fit("--trainer.max_steps=1", *arguments).err.splitlines()
    said = [line for line in lines if line.startswith("gpt_lightning: ")]
    assert [line.split(": ")[1] for line in said] == told
    assert all("no effect" in line for line in said)


def test_one_evaluation_is_seen_in_the_figure() -> None:
    row = {"seen_epochs": 0.1, "tokens_seen": 32.0, "train_loss": 9.0, "val_loss": 9.5}
    for rows, marker in [([row], "o"), ([row, {**row, "seen_epochs": 0.2}], "")]:
        lines = loss_figure(rows).axes[0].lines
        assert [line.get_marker() for line in lines] == [marker, marker]


@pytest.mark.parametrize(("bf16", "said"), [(1e9, "8 times slower"), (8e9, ""), (2e10, "")])
def test_bfloat16_that_a_cpu_has_no_instructions_for_is_said(
    fit: Command, monkeypatch: pytest.MonkeyPatch, bf16: float, said: str
) -> None:
    rates = {torch.float32: 8e9, torch.bfloat16: bf16}
    monkeypatch.setattr(run_warnings, "measured_peak", lambda dtype, size: rates[dtype])
    done = fit("--trainer.max_steps=1", "--trainer.precision=bf16-mixed")
    assert said in done.err
    assert ("trainer.precision" in done.err) == bool(said)


@pytest.mark.parametrize("rng", ["step", "global"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiled_dropout_is_said(
    fit: Command, monkeypatch: pytest.MonkeyPatch, rng: str, dropout: float
) -> None:
    compiled = mock.Mock()  # for time
    monkeypatch.setattr(TransformerBlock, "compile", compiled)
    monkeypatch.setattr(fit_module, "_check_compiler", lambda cli: None)
    err = fit("--trainer.max_steps=1", "--model.compile=true", "--model.config.drop_rate=0",
              f"--model.config.attn_drop_rate={dropout}", f"--rng={rng}").err  # fmt: skip
    assert ("model.compile: compiled blocks draw other random numbers" in err) == (dropout > 0)
    assert ("not the book's" in err) == (dropout > 0 and rng == "global")
    assert compiled.called


def test_compiling_without_a_compiler_is_refused(tmp_path: Path) -> None:
    done = python("-m", "gpt_lightning", "fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL,
                  "--model.compile=true", cwd=tmp_path, env={**os.environ, "CXX": "/nonexistent/g++"})  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpt_lightning: error: model.compile: ")
    assert "/nonexistent/g++" in line
    assert not (tmp_path / "checkpoints").exists()


def test_a_precision_whose_package_is_missing_is_refused(command: Command) -> None:
    done = command(
        "fit",
        f"--config={ROOT}/configs/quickstart.yaml",
        *SMALL,
        "--trainer.precision=transformer-engine",
    )
    assert done.code == 2
    assert done.err.startswith("gpt_lightning: error: trainer: ")
    assert done.err.count("\n") == 1


def test_the_whole_loss_on_a_gpu_is_remarked(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Namespace(keep_freed_memory=False, rng="step", model=Namespace(compile=False, loss_chunk_size=None),
                       trainer=Namespace(log_every_n_steps=None, callbacks=None))  # fmt: skip
    for kind, chunk, said in [("cuda", None, True), ("cuda", 8192, False), ("cpu", None, False)]:
        trainer = mock.Mock(precision="32-true", limit_val_batches=1)
        trainer.strategy.root_device = torch.device(kind)
        config.model.loss_chunk_size = chunk
        found = run_warnings.run_warnings(
            config, trainer, mock.Mock(drop_rate=0), [], keeps_freed_memory=False
        )
        assert any(line.startswith("model.loss_chunk_size: ") for line in found) == said
