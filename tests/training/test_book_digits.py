"""The book's digits through the real command, against its record and against the plain code in book.py."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import book
from gpt_lightning import generate, load_model
from gpt_lightning.data.tokenizer import encode_prompt, gpt2_encoding
from helpers import ROOT, Command, reference
from runs import (
    read_metrics,
)

pytestmark = pytest.mark.usefixtures("verdict_in_cache")

BOOK_MODEL = {"context_length": 64, "emb_dim": 64, "n_heads": 4, "n_layers": 2}


def verdict_fit(command: Command, *arguments: str, **model: Any) -> list[dict[str, float]]:
    """Rows of metrics.csv after ``fit`` on verdict.yaml with a tiny model."""
    sizes = [f"--model.config.{key}={value}" for key, value in {**BOOK_MODEL, **model}.items()]
    result = command(
        "fit",
        f"--config={ROOT}/configs/verdict.yaml",
        "--run=tiny",
        "--model.lr=0.001",
        "--evaluation.eval_iter=3",
        "--data.batch_size=4",
        "--checkpoint.save_best=false",
        *sizes,
        *arguments,
    )
    assert result.code == 0, result.err
    Path("printed").write_text(result.out, encoding="utf-8")
    run = next(a.split("=")[1] for a in ["--run=tiny", *arguments][::-1] if a.startswith("--run="))
    rows = evaluations(run)
    printed = re.findall(
        r"^Ep (\d+) \(Step (\d{6})\): Train loss (\S+), Val loss (\S+)$", result.out, re.M
    )
    assert printed == [
        (
            f"{r['epoch']:.0f}",
            f"{r['step']:06.0f}",
            f"{r['train_loss']:.3f}",
            f"{r['val_loss']:.3f}",
        )
        for r in rows
    ]
    return rows


def evaluations(run: str) -> list[dict[str, float]]:
    return [row for row in read_metrics(Path("checkpoints", run)) if "val_loss" in row]


def column(rows: list[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]


def test_tiny_run_and_exercise_5_4(command: Command) -> None:
    expected = reference("tiny_run.json")
    rows = verdict_fit(command, "--trainer.max_epochs=2")
    assert column(rows, "train_loss") == pytest.approx(expected["train_losses"], abs=1e-4)
    assert column(rows, "val_loss") == pytest.approx(expected["val_losses"], abs=1e-4)
    assert column(rows, "tokens_seen") == expected["tokens_seen"]

    printed = Path("printed").read_text(encoding="utf-8").splitlines()
    assert printed[-1].startswith(expected["greedy_text"])
    model = load_model("checkpoints/tiny")
    assert sum(p.numel() for p in model.parameters()) == expected["n_params"]
    prompt = torch.tensor([encode_prompt(expected["prompt"])])
    greedy = generate(model, prompt, len(expected["greedy_ids"]) - prompt.shape[1])
    assert greedy[0].tolist() == expected["greedy_ids"]
    sampled = generate(
        model,
        prompt,
        len(expected["sampled_ids"]) - prompt.shape[1],
        temperature=expected["sampled_temperature"],
        top_k=expected["sampled_top_k"],
        generator=torch.Generator().manual_seed(123),
    )
    assert sampled[0].tolist() == expected["sampled_ids"]

    rows = verdict_fit(
        command,
        "--run=continued",
        "--init_from=checkpoints/tiny/last.ckpt",
        "--init_optimizer=true",
        "--trainer.max_epochs=1",
    )
    expected = expected["continued"]
    assert column(rows, "train_loss") == pytest.approx(expected["train_losses"], abs=1e-4)
    assert column(rows, "val_loss") == pytest.approx(expected["val_losses"], abs=1e-4)
    assert column(rows, "tokens_seen") == expected["tokens_seen"]


@pytest.mark.slow
def test_exercise_5_4_from_the_file_of_the_books_code(command: Command, verdict: Path) -> None:
    """Ours continues a training that the book's code saved."""
    expected = reference("tiny_run.json")
    run = book.new_run(expected["model"], **expected["optimizer"], seed=expected["seed"])
    loaders = book.loaders(
        verdict.read_text(encoding="utf-8"),
        lambda text: gpt2_encoding().encode(text, allowed_special={"<|endoftext|>"}),
        length=expected["model"]["context_length"],
        stride=expected["stride"],
        batch_size=expected["batch_size"],
        train_ratio=expected["train_ratio"],
    )
    book.train(run, *loaders, epochs=2, eval_freq=5, eval_iter=3)
    torch.save(
        {
            "model_state_dict": run.model.state_dict(),
            "optimizer_state_dict": run.optimizer.state_dict(),
        },
        "model_and_optimizer.pth",
    )
    rows = verdict_fit(
        command,
        "--run=continued",
        "--init_from=model_and_optimizer.pth",
        "--init_optimizer=true",
        "--trainer.max_epochs=1",
    )
    expected = expected["continued"]
    assert column(rows, "train_loss") == pytest.approx(expected["train_losses"], abs=1e-4)
    assert column(rows, "val_loss") == pytest.approx(expected["val_losses"], abs=1e-4)
    assert column(rows, "tokens_seen") == expected["tokens_seen"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"qkv_bias": True}, marks=pytest.mark.slow),
        pytest.param({"seed": 7, "drop_rate": 0.0}, marks=pytest.mark.slow),
        pytest.param({"stride": 17, "batch_size": 3}, marks=pytest.mark.nightly),
        pytest.param(
            {"stride": 100, "train_ratio": 0.7, "eval_freq": 4}, marks=pytest.mark.nightly
        ),
        pytest.param(
            {"batch_size": 5, "train_ratio": 0.8, "eval_iter": 10, "drop_rate": 0.3},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"context_length": 31, "n_heads": 2, "n_layers": 1, "emb_dim": 24, "weight_decay": 0.0},
            marks=pytest.mark.nightly,
        ),
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()),
)
def test_other_settings_give_the_books_digits(
    command: Command, verdict: Path, changes: dict[str, Any]
) -> None:
    model = {"drop_rate": 0.1, "qkv_bias": False, **BOOK_MODEL}
    model |= {key: value for key, value in changes.items() if key in model}
    rest = {"seed": 123, "stride": model["context_length"], "batch_size": 4, "train_ratio": 0.9}
    rest |= {"eval_freq": 5, "eval_iter": 3, "weight_decay": 0.1}
    rest |= {key: value for key, value in changes.items() if key in rest}

    run = book.new_run(
        {**model, "vocab_size": 50257},
        lr=0.001,
        weight_decay=rest["weight_decay"],
        seed=rest["seed"],
    )
    train_loader, val_loader = book.loaders(
        verdict.read_text(encoding="utf-8"),
        lambda text: gpt2_encoding().encode(text, allowed_special={"<|endoftext|>"}),
        length=model["context_length"],
        stride=rest["stride"],
        batch_size=rest["batch_size"],
        train_ratio=rest["train_ratio"],
    )
    epochs = 1 if rest["stride"] < 20 else 2
    book.train(
        run,
        train_loader,
        val_loader,
        epochs=epochs,
        eval_freq=rest["eval_freq"],
        eval_iter=rest["eval_iter"],
    )

    rows = verdict_fit(
        command,
        f"--seed_everything={rest['seed']}",
        f"--trainer.max_epochs={epochs}",
        f"--data.stride={rest['stride']}",
        f"--data.batch_size={rest['batch_size']}",
        f"--data.train_ratio={rest['train_ratio']}",
        f"--model.weight_decay={rest['weight_decay']}",
        f"--evaluation.eval_freq={rest['eval_freq']}",
        f"--evaluation.eval_iter={rest['eval_iter']}",
        **model,
    )
    assert column(rows, "train_loss") == pytest.approx(run.train_losses, abs=1e-4)
    assert column(rows, "val_loss") == pytest.approx(run.val_losses, abs=1e-4)
    assert column(rows, "tokens_seen") == run.tokens_seen


def verdict_fit_resumed(command: Command) -> list[dict[str, float]]:
    result = command(
        "fit", "--config=checkpoints/cut/config.yaml", "--ckpt_path=last",
        "--trainer.max_epochs=2", "--trainer.max_steps=-1",
    )  # fmt: skip
    assert result.code == 0, result.err
    return evaluations("cut")


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(["--trainer.max_epochs=1"], marks=pytest.mark.slow),
        ["--trainer.max_steps=27"],
    ],
)
def test_run_in_the_books_mode_resumes_exactly(command: Command, cut: list[str]) -> None:
    """At the end of an epoch and within one: the seed of the order and the generator are saved."""
    small = {"context_length": 16, "emb_dim": 16}
    settings = ["--data.stride=64", *cut]
    straight = verdict_fit(
        command, "--run=straight", "--data.stride=64", "--trainer.max_epochs=2", **small
    )
    verdict_fit(command, "--run=cut", *settings, **small)
    resumed = verdict_fit_resumed(command)
    assert column(resumed, "train_loss") == column(straight, "train_loss")
    assert column(resumed, "val_loss") == column(straight, "val_loss")
    weights = [load_model(f"checkpoints/{run}").state_dict() for run in ("straight", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_first_rows_of_the_124m_run_equal_the_books(command: Command) -> None:
    """The first three rows of the real run; the table of the complete run is in README."""
    result = command(
        "fit", f"--config={ROOT}/configs/verdict.yaml", "--trainer.max_steps=11",
        "--checkpoint.save_best=false",
    )  # fmt: skip
    assert result.code == 0, result.err
    rows = evaluations("verdict")
    expected = reference("verdict_run.json")["rows"][:3]
    assert [[row["epoch"], row["step"]] for row in rows] == [row[:2] for row in expected]
    for row, (_, _, train_loss, val_loss) in zip(rows, expected, strict=True):
        assert f"{row['train_loss']:.3f}" == f"{train_loss:.3f}"
        assert f"{row['val_loss']:.3f}" == f"{val_loss:.3f}"
    samples = [line for line in result.out.splitlines() if line.startswith("Every effort")]
    assert samples[0] == reference("verdict_run.json")["sample_after_first_epoch"]
