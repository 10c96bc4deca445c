"""configs/gpt2.yaml: losses of pretrained weights, training from them, and report sizes."""

import csv
import json
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Command, python
from random_gpt2 import random_gpt2

from gpt_lightning import load_model
from gpt_lightning.data.tokenizer import gpt2_encoding
from gpt_lightning.pretrained.convert import WeightFormat, convert

GPT2 = (f"--config={ROOT}/configs/gpt2.yaml", "--trainer.accelerator=cpu")


def validated(command: Command, *arguments: str) -> dict[str, float]:
    done = command("validate", *GPT2, "--json", *arguments)
    assert done.code == 0, done.err
    metrics: dict[str, float] = json.loads(done.out)
    return metrics


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


@pytest.fixture
def gpt2(command: Command, tmp_path: Path) -> Any:
    """A random GPT-2 with 1,024 positions in the folder ``gpt2`` of the working directory."""
    return random_gpt2(tmp_path / "gpt2", n_positions=1024)


@pytest.mark.usefixtures("verdict_in_cache")
def test_losses_equal_transformers_for_any_batch_size_and_two_processes(
    gpt2: Any, command: Command, verdict: Path
) -> None:
    expected = losses_by_transformers(gpt2, verdict.read_text(encoding="utf-8"), 256)
    for arguments in ([], ["--data.batch_size=5"]):
        metrics = validated(command, "--init_from=gpt2", *arguments)
        ours = {key: metrics[key] for key in expected}
        assert ours == pytest.approx(expected, abs=1e-5, rel=1e-6)
        assert metrics["train_tokens"] == expected["train_tokens"]
    done = python("-m", "gpt_lightning", "validate", *GPT2, "--json", "--init_from=gpt2",
                  "--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=3")  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-5, rel=1e-6)


def test_validate_prints_losses_of_both_splits(gpt2: Any, command: Command) -> None:
    done = command("validate", *GPT2, "--init_from=gpt2", "--data.text=sample")
    assert done.code == 0, done.err
    weights, text, train, val = done.out.splitlines()
    assert weights == "weights     gpt2"
    assert text == "text        sample, windows of 256 tokens, one every 256"
    assert train.startswith("training    loss 1")
    assert "perplexity" in val
    assert "bits/byte" in val
    assert not Path("checkpoints").exists()


def fit(command: Command, *arguments: str) -> Any:
    return command("fit", *GPT2, "--data.text=sample", "--trainer.max_steps=2",
                   "--data.context_length=16", "--evaluation.eval_iter=1",
                   "--evaluation.max_new_tokens=3", *arguments)  # fmt: skip


def test_training_starts_from_gpt2_and_resumes(gpt2: Any, command: Command) -> None:
    assert (done := fit(command, "--init_from=gpt2")).code == 0, done.err
    model = load_model("checkpoints/gpt2")
    assert (model.config.context_length, model.config.qkv_bias) == (1024, True)
    assert model.config.tied_embeddings
    moved = (model.tok_emb.weight - gpt2.transformer.wte.weight).abs()
    assert 0 < moved.max() < 1e-3  # after two steps

    again = "--ckpt_path=last", "--trainer.max_steps=3"
    assert (done := fit(command, *again)).code == 0, done.err

    done = fit(command, "--init_from=gpt2", "--model.config.tied_embeddings=false", "--run=untied")
    assert done.code == 0, done.err
    untied = load_model("checkpoints/untied")
    assert not untied.config.tied_embeddings
    assert not torch.equal(untied.out_head.weight, untied.tok_emb.weight)


def test_contradicting_settings_are_refused_with_both_values(gpt2: Any, command: Command) -> None:
    done = fit(command, "--init_from=gpt2", "--model.config.emb_dim=32",
               "--model.config.qkv_bias=false", "--model.config.n_layers=2")  # fmt: skip
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "model.config.emb_dim is 24 there and 32 here" in done.err
    assert "model.config.qkv_bias is True there and False here" in done.err
    assert "n_layers" not in done.err
    assert not Path("checkpoints").exists()


def sizes(command: Command, *arguments: str) -> dict[str, Any]:
    done = command("report", "sizes", "--prompt=Every effort moves you", "--json",
                   "--device=cpu", *arguments)  # fmt: skip
    assert done.code == 0, done.err
    answer: dict[str, Any] = json.loads(done.out)
    return answer


def test_report_sizes_measures_each_model(gpt2: Any, command: Command, tmp_path: Path) -> None:
    random_gpt2(tmp_path / "wider", emb_dim=48, n_positions=512)
    small, wide = sizes(command, "--from", "gpt2", "wider", "--text=sample", "--out=out",
                        "--context_length=64", "--num_samples=2", "--max_new_tokens=6")["models"]  # fmt: skip
    assert small["parameters"] == sum(p.numel() for p in gpt2.parameters())
    assert small["file_bytes"] == (tmp_path / "gpt2" / "model.safetensors").stat().st_size
    expected = validated(
        command, "--init_from=gpt2", "--data.text=sample", "--data.context_length=64"
    )
    for name in ("train_loss", "val_loss", "train_perplexity", "val_perplexity"):
        assert small[name] == pytest.approx(expected[name], rel=1e-5)
    assert wide["parameters"] > small["parameters"]
    for model in (small, wide):
        assert model["tokens_per_second"] > 0
        assert 0 < model["seconds_to_first_token"] < 60
        assert model["peak_memory_bytes"] > model["parameters"] * 4
        assert len(model["samples"]) == 2
        assert all(text.startswith("Every effort moves you") for text in model["samples"])
    with (tmp_path / "out" / "sizes.csv").open(encoding="utf-8") as file:
        assert [row["source"] for row in csv.DictReader(file)] == ["gpt2", "wider"]
    assert json.loads((tmp_path / "out" / "sizes.json").read_text())["models"][0] == small
    assert (tmp_path / "out" / "sizes.png").read_bytes().startswith(b"\x89PNG")

    # generate gives the same samples with the same seed and settings
    done = command("generate", "--from=gpt2", "--prompt=Every effort moves you", "--json",
                   "--num_samples=2", "--max_new_tokens=6", "--temperature=1.5", "--top_k=50",
                   "--device=cpu")  # fmt: skip
    assert [sample["text"] for sample in json.loads(done.out)["samples"]] == small["samples"]


def test_model_that_does_not_fit_is_skipped(gpt2: Any, command: Command, tmp_path: Path) -> None:
    random_gpt2(tmp_path / "wider", emb_dim=48)
    arguments = ("--from", "gpt2", "wider", "--max_new_tokens=2", "--num_samples=1")
    small, wide = sizes(command, *arguments, "--max_memory=0.013")["models"]
    assert small["skipped"] is None
    assert wide["skipped"] == "needs about 0.021 GB, 0.013 GB are available"
    assert wide["samples"] == []
    done = command("report", "sizes", "--prompt=x", *arguments, "--max_memory=0", "--device=cpu")
    assert done.code == 0
    assert "gpt2: skipped: needs about" in done.out


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
    done = python("-c", code, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert list(Path("checkpoints/gpt2").glob("events.out.tfevents*"))


# prints how much the peak memory of loading exceeds the memory before, over the size of the model. Counted is
# anonymous memory, which a process needs: the resident set also counts pages of the mapped file that the process has
# read, but they are the system's cache, which it frees when memory runs low. The small model before it lets torch
# import what it needs for the meta device, about 80 MB.
_PEAK = """
import sys, threading, torch
from gpt_lightning import GPTConfig, GPTModel, load_model
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))
def watch():
    while not is_loaded.wait(0.001):
        seen.append(anonymous())
dtype = getattr(torch, sys.argv[2])
torch.zeros(64, 64, dtype=dtype) @ torch.zeros(64, 64, dtype=dtype)
with torch.device("meta"):
    GPTModel(GPTConfig(emb_dim=4, n_heads=2, n_layers=1, tied_embeddings=True))
before, seen, is_loaded = anonymous(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(sys.argv[1], dtype=dtype)
seen.append(anonymous())
is_loaded.set()
watcher.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((max(seen) - before) / size)
"""


@pytest.fixture(scope="module")
def shape_of_124m(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("124M")
    random_gpt2(folder / "gpt2", emb_dim=768, n_heads=12, n_layers=12, n_positions=1024)
    paths: dict[WeightFormat, Path] = {
        "lightning": folder / "gpt2.ckpt",
        "book": folder / "gpt2.pth",
    }
    for weight_format, path in paths.items():
        convert(str(folder / "gpt2"), path, weight_format)
    return {"hf": folder / "gpt2", **paths}


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc"
)
@pytest.mark.parametrize(
    ("weight_format", "dtype"),
    [
        ("hf", "bfloat16"),
        # the book's query, key and value are concatenated before they are converted
        ("book", "float32"),
        pytest.param("hf", "float32", marks=pytest.mark.slow),
        pytest.param("lightning", "float32", marks=pytest.mark.slow),
        pytest.param("lightning", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_loading_needs_memory_for_one_copy(
    shape_of_124m: dict[str, Path], weight_format: str, dtype: str
) -> None:
    done = python("-c", _PEAK, str(shape_of_124m[weight_format]), dtype)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1.15


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
    done = python("-m", "gpt_lightning", "download", name, env=environment)
    assert done.returncode == 0, done.stderr
    done = python("-m", "gpt_lightning", "validate", *GPT2, "--json", f"--init_from={name}",
                  env=environment, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert (metrics["train_loss"], metrics["val_loss"]) == pytest.approx(REAL[name], abs=2e-3)
