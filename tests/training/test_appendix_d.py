"""Appendix D's digits through the real command, against its record and against the plain code in book.py."""

from pathlib import Path
from typing import Any

import pytest
import torch

import book
from gpt_lightning.data.tokenizer import gpt2_encoding
from gpt_lightning.training.run_files import read_rows
from helpers import ROOT, Command, reference

pytestmark = pytest.mark.usefixtures("verdict_in_cache")

CONFIG = f"--config={ROOT}/configs/appendix-d.yaml"
TINY = {"context_length": 64, "emb_dim": 64, "n_heads": 4, "n_layers": 2, "drop_rate": 0.1}
PROMPT = "Every effort moves you"


class Fitted:
    """What ``fit`` wrote and printed."""

    def __init__(self, command: Command, *arguments: str, **model: Any) -> None:
        sizes = [f"--model.config.{key}={value}" for key, value in {**TINY, **model}.items()]
        result = command(
            "fit", CONFIG, "--run=tiny", "--trainer.log_every_n_steps=1", *sizes, *arguments
        )
        assert result.code == 0, result.err
        rows = read_rows(Path("checkpoints/tiny/metrics.csv"))
        steps = [row for row in rows if "lr" in row]
        evaluated = [row for row in rows if "val_loss" in row]
        last = len(steps) - 1
        # the last weights are evaluated too, which the book does not do
        self.evaluated = [row for row in evaluated if row["step"] % 5 == 0 or row["step"] != last]
        self.lrs = [row["lr"] for row in steps]
        self.norms = [row["train/grad_norm"] for row in steps]
        self.losses = [(row["train_loss"], row["val_loss"]) for row in self.evaluated]
        self.samples = [line for line in result.out.splitlines() if line.startswith(PROMPT)]


def tiny_arguments() -> list[str]:
    """Settings of the recorded run, which has other values than the config."""
    expected = reference("appendix_d_tiny.json")
    return [
        f"--data.batch_size={expected['batch_size']}",
        f"--trainer.max_epochs={expected['epochs']}",
        f"--model.lr={expected['optimizer']['peak_lr']}",
        f"--model.initial_lr={expected['optimizer']['initial_lr']}",
        f"--trainer.gradient_clip_val={expected['clip']['max_norm']}",
    ]


def test_tiny_run_has_the_recorded_digits(command: Command) -> None:
    expected = reference("appendix_d_tiny.json")
    run = Fitted(command, *tiny_arguments())
    places = [[r["epoch"], r["step"], r["tokens_seen"]] for r in run.evaluated]
    assert places == [[row[0], row[1], row[4]] for row in expected["rows"]]
    losses = [loss for pair in run.losses for loss in pair]
    assert losses == pytest.approx(
        [loss for row in expected["rows"] for loss in row[2:4]], abs=1e-4
    )
    assert run.lrs == pytest.approx(expected["lrs"], abs=1e-12)
    clipped = run.norms[expected["clip"]["from_step"] :]
    assert clipped == pytest.approx(expected["grad_norms_from_clip"], rel=1e-3)
    assert run.samples == expected["samples"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        pytest.param("--trainer.gradient_clip_val=null", id="no clipping"),
        pytest.param("--model.clip_from_step=11", id="one step later, as in the printed editions"),
    ],
)
def test_other_clipping_has_other_digits(command: Command, other: str) -> None:
    expected = [row[2:4] for row in reference("appendix_d_tiny.json")["rows"]]
    losses = Fitted(command, *tiny_arguments(), other).losses
    assert losses[1] == pytest.approx(expected[1], abs=1e-4)  # step 5: nothing was clipped before
    assert any(
        loss != pytest.approx(row, abs=1e-4) for loss, row in zip(losses, expected, strict=True)
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"batch_size": 3, "stride": 50, "qkv_bias": True}, marks=pytest.mark.slow),
        pytest.param({"epochs": 1, "batch_size": 5, "seed": 7}, marks=pytest.mark.slow),
        pytest.param(
            {"peak": 5e-3, "initial": 1e-3, "min": 2e-3, "decay": 0.0, "n_layers": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"emb_dim": 24, "n_heads": 2, "context_length": 31, "stride": 31, "max_norm": 0.3,
             "eval_freq": 3},
            marks=pytest.mark.slow,
        ),
        pytest.param({"printed": True, "drop_rate": 0.0}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()),
)  # fmt: skip
def test_other_settings_give_the_appendix_digits(
    command: Command, verdict: Path, changes: dict[str, Any]
) -> None:
    model = {"qkv_bias": False, **TINY}
    model |= {key: value for key, value in changes.items() if key in model}
    rest = {
        "seed": 123, "stride": model["context_length"], "batch_size": 4, "epochs": 2,
        "peak": 2e-3, "initial": 2e-5, "min": 1e-5, "decay": 0.1, "max_norm": 0.5, "eval_freq": 5,
        "printed": False,
    }  # fmt: skip
    rest |= {key: value for key, value in changes.items() if key in rest}

    run = book.new_run(
        {**model, "vocab_size": 50257},
        lr=rest["peak"],
        weight_decay=rest["decay"],
        seed=rest["seed"],
    )
    train_loader, val_loader = book.loaders(
        verdict.read_text(encoding="utf-8"),
        lambda text: gpt2_encoding().encode(text, allowed_special={"<|endoftext|>"}),
        length=model["context_length"],
        stride=rest["stride"],
        batch_size=rest["batch_size"],
        train_ratio=0.9,
    )
    total = rest["epochs"] * len(train_loader)
    warmup = int(0.2 * total)
    appendix = book.AppendixD(
        peak_lr=rest["peak"],
        initial_lr=rest["initial"],
        min_lr=rest["min"],
        warmup=warmup,
        total=total,
        max_norm=rest["max_norm"],
        clip_from=warmup + rest["printed"],
    )
    prompt = torch.tensor([gpt2_encoding().encode(PROMPT)])
    samples: list[str] = []

    def sample(trained: book.BookGPT) -> None:
        ids = book.generate(trained, prompt, 50, model["context_length"])[0].tolist()
        samples.append(gpt2_encoding().decode(ids).replace("\n", " "))
        trained.train()

    book.train(
        run,
        train_loader,
        val_loader,
        epochs=rest["epochs"],
        eval_freq=rest["eval_freq"],
        eval_iter=1,
        appendix=appendix,
        sample=sample,
    )
    fitted = Fitted(
        command,
        f"--seed_everything={rest['seed']}",
        f"--trainer.max_epochs={rest['epochs']}",
        f"--data.stride={rest['stride']}",
        f"--data.batch_size={rest['batch_size']}",
        f"--model.lr={rest['peak']}",
        f"--model.initial_lr={rest['initial']}",
        f"--model.min_lr={rest['min']}",
        f"--model.weight_decay={rest['decay']}",
        f"--trainer.gradient_clip_val={rest['max_norm']}",
        f"--evaluation.eval_freq={rest['eval_freq']}",
        *([f"--model.clip_from_step={warmup + 1}"] if rest["printed"] else []),
        **model,
    )
    evaluations = len(run.train_losses)
    assert fitted.losses[:evaluations] == [
        (pytest.approx(train_loss, abs=1e-4), pytest.approx(val_loss, abs=1e-4))
        for train_loss, val_loss in zip(run.train_losses, run.val_losses, strict=True)
    ]
    assert fitted.lrs == pytest.approx(appendix.lrs, abs=1e-12)
    assert fitted.norms[appendix.clip_from :] == pytest.approx(appendix.norms, rel=1e-3)
    assert fitted.samples == samples


@pytest.mark.nightly
def test_first_rows_of_the_124m_run_equal_the_books(command: Command) -> None:
    """The first four rows; the schedule is the one of the complete run, as numbers of steps."""
    expected = reference("appendix_d_124M.json")
    result = command(
        "fit", CONFIG, "--trainer.max_steps=16", "--model.warmup_steps=27",
        "--model.decay_steps=135", "--trainer.gradient_clip_val=null",
        "--trainer.log_every_n_steps=1",
    )  # fmt: skip
    assert result.code == 0, result.err
    rows = read_rows(Path("checkpoints/appendix-d/metrics.csv"))
    evaluated = [row for row in rows if "val_loss" in row][:4]
    for row, (epoch, step, train_loss, val_loss, _) in zip(
        evaluated, expected["rows"][:4], strict=True
    ):
        assert [row["epoch"], row["step"]] == [epoch, step]
        assert f"{row['train_loss']:.3f}" == f"{train_loss:.3f}"
        assert f"{row['val_loss']:.3f}" == f"{val_loss:.3f}"
    assert [row["lr"] for row in rows if "lr" in row] == pytest.approx(
        expected["lrs"][:16], abs=1e-12
    )
