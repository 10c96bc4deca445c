"""configs/gpt2.yaml: losses of pretrained weights, and training from them."""

import json
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning import load_model
from gpt_lightning.data.tokenizer import gpt2_encoding
from helpers import (
    GPT2,
    Command,
    python,
    validated_losses,
)


@torch.inference_mode()
def losses_by_transformers(model: Any, text: str, length: int) -> dict[str, float]:
    """Losses of transformers' model, weighted by tokens, and bits per byte of the targets' text."""
    split = int(0.9 * len(text))
    metrics = {}
    for name, part in (("train", text[:split]), ("val", text[split:])):
        ids = gpt2_encoding().encode(part)
        starts = range(0, len(ids) - length, length)
        total = 0.0
        for start in starts:
            window = torch.tensor([ids[start : start + length + 1]])
            # transformers' labels stay within the window; the book's targets end one token after it
            log_p = model(window[:, :-1]).logits.log_softmax(dim=-1)
            total -= log_p.gather(2, window[:, 1:, None]).sum().item()
        tokens = len(starts) * length
        text_bytes = len(gpt2_encoding().decode_bytes(ids[1 : tokens + 1]))
        metrics |= {
            f"{name}_loss": total / tokens,
            f"{name}_perplexity": math.exp(total / tokens),
            f"{name}_bits_per_byte": total / math.log(2) / text_bytes,
            f"{name}_tokens": tokens,
        }
    return metrics


@pytest.mark.slow
@pytest.mark.usefixtures("verdict_in_cache")
def test_losses_equal_transformers_for_any_batch_size(
    gpt2: Any, command: Command, verdict: Path
) -> None:
    expected = losses_by_transformers(gpt2, verdict.read_text(encoding="utf-8"), 256)
    for arguments in ([], ["--data.batch_size=5"]):
        metrics = validated_losses(command, "--init_from=gpt2", *arguments)
        ours = {key: metrics[key] for key in expected}
        assert ours == pytest.approx(expected, abs=1e-5, rel=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("verdict_in_cache")
def test_losses_of_two_processes_equal_transformers(gpt2: Any, verdict: Path) -> None:
    expected = losses_by_transformers(gpt2, verdict.read_text(encoding="utf-8"), 256)
    result = python("-m", "gpt_lightning", "validate", *GPT2, "--json", "--init_from=gpt2",
                  "--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=3")  # fmt: skip
    assert result.returncode == 0, result.stderr
    metrics = json.loads(result.stdout)
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-5, rel=1e-6)


def test_validate_prints_losses_of_both_splits(gpt2: Any, command: Command) -> None:
    result = command("validate", *GPT2, "--init_from=gpt2", "--data.text=sample")
    assert result.code == 0, result.err
    weights, text, train, val = result.out.splitlines()
    assert weights == "weights     gpt2"
    assert text == "text        sample, windows of 256 tokens, one every 256"
    assert train.startswith("training    loss 1")
    assert "perplexity" in val
    assert "bits/byte" in val
    assert not Path("checkpoints").exists()


def fit_gpt2(command: Command, *arguments: str) -> Any:
    return command("fit", *GPT2, "--data.text=sample", "--trainer.max_steps=2",
                   "--data.context_length=16", "--evaluation.eval_iter=1",
                   "--evaluation.max_new_tokens=3", *arguments)  # fmt: skip


def test_training_starts_from_gpt2_and_resumes(gpt2: Any, command: Command) -> None:
    assert (result := fit_gpt2(command, "--init_from=gpt2")).code == 0, result.err
    model = load_model("checkpoints/gpt2")
    assert (model.config.context_length, model.config.qkv_bias) == (1024, True)
    assert model.config.tied_embeddings
    moved = (model.tok_emb.weight - gpt2.transformer.wte.weight).abs()
    assert 0 < moved.max() < 1e-3  # after two steps

    again = "--ckpt_path=last", "--trainer.max_steps=3"
    assert (result := fit_gpt2(command, *again)).code == 0, result.err

    result = fit_gpt2(
        command, "--init_from=gpt2", "--model.config.tied_embeddings=false", "--run=untied"
    )
    assert result.code == 0, result.err
    untied = load_model("checkpoints/untied")
    assert not untied.config.tied_embeddings
    assert not torch.equal(untied.out_head.weight, untied.tok_emb.weight)


def test_contradicting_settings_are_refused_with_both_values(gpt2: Any, command: Command) -> None:
    result = fit_gpt2(command, "--init_from=gpt2", "--model.config.emb_dim=32",
               "--model.config.qkv_bias=false", "--model.config.n_layers=2")  # fmt: skip
    assert result.code == 2
    assert result.error.count("\n") == 1
    assert "model.config.emb_dim is 24 there and 32 here" in result.err
    assert "model.config.qkv_bias is True there and False here" in result.err
    assert "n_layers" not in result.err
    assert not Path("checkpoints").exists()


@pytest.mark.slow
def test_training_does_not_import_tensorflow(gpt2: Any, command: Command, tmp_path: Path) -> None:
    """If it is not installed, an empty package with its name is there to be found."""
    environment = dict(os.environ)
    if find_spec("tensorflow") is None:
        (tmp_path / "stand-in/tensorflow").mkdir(parents=True)
        (tmp_path / "stand-in/tensorflow/__init__.py").touch()
        environment["PYTHONPATH"] = str(tmp_path / "stand-in")
    arguments = ["fit", *GPT2, "--init_from=gpt2", "--data.text=sample", "--trainer.max_steps=1",
                 "--data.context_length=16", "--evaluation.eval_iter=1",
                 "--evaluation.max_new_tokens=2"]  # fmt: skip
    code = f"""
import sys, gpt_lightning
from gpt_lightning.cli.main import main
assert main({arguments!r}) == 0
assert "torch.utils.tensorboard" in sys.modules
print(sorted(name for name in sys.modules if name.split(".")[0] == "tensorflow"))
"""
    result = python("-c", code, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    assert list(Path("checkpoints/gpt2").glob("events.out.tfevents*"))


# exercises 5.5 and 5.6 with OpenAI's weights: the losses in the book's repository
REAL = {"gpt2-124M": (3.754757, 3.559627), "gpt2-1558M": (3.304631, 3.119515)}


@pytest.mark.network
@pytest.mark.parametrize("name", REAL)
def test_losses_of_openais_weights_equal_the_books(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The weights are in the user's cache, or this test downloads them."""
    cache = os.environ.get("GPT_LIGHTNING_CACHE", str(Path.home() / ".cache/gpt_lightning"))
    environment = os.environ | {"GPT_LIGHTNING_CACHE": cache}
    result = python("-m", "gpt_lightning", "download", name, env=environment)
    assert result.returncode == 0, result.stderr
    result = python("-m", "gpt_lightning", "validate", *GPT2, "--json", f"--init_from={name}",
                  env=environment, cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    metrics = json.loads(result.stdout)
    assert (metrics["train_loss"], metrics["val_loss"]) == pytest.approx(REAL[name], abs=2e-3)
