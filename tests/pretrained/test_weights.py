"""Weights in two types, and under the names of wrapped models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_lightning import GPTConfig, GPTModel, load_model
from gpt_lightning.pretrained import weights
from gpt_lightning.pretrained.convert import convert
from gpt_lightning.pretrained.source import read_weights
from gpt_lightning.pretrained.weights import ModelWeights, write_lightning
from helpers import QUICKSTART, ROOT, Command
from random_gpt2 import random_gpt2
from weight_files import assert_same_logits, book_model, nanogpt_file, random_ids


def halved(tensors: Any) -> Any:
    """Matrices in half precision, the rest unchanged."""
    return {n: t.half() if t.dim() > 1 else t for n, t in tensors.items()}


def gpt2_for_halving(folder: Path, emb_dim: int = 64) -> Any:
    """A GPT-2 whose matrices have the same values in half precision."""
    theirs = random_gpt2(folder, emb_dim=emb_dim, n_heads=1, n_layers=1, n_positions=16)
    for parameter in theirs.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.half().float()
    theirs.save_pretrained(folder)
    return theirs


def two_dtypes(source: str) -> str:
    return (
        f"gpt_lightning: {source}: has weights in float16 and float32; uses float32 for all, unless another "
        "dtype is given"
    )


@pytest.mark.parametrize("weight_format", ["hf", "lightning", "book", "nanogpt"])
def test_two_dtypes_in_one_file_are_read_as_the_larger(
    tmp_path: Path, command: Command, weight_format: str
) -> None:
    """Some trainers save such files. OpenAI's files are always read as float32."""
    theirs = gpt2_for_halving(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    source = {"hf": "hf", "lightning": "ours.ckpt", "book": "model.pth", "nanogpt": "ckpt.pt"}[
        weight_format
    ]
    if weight_format == "hf":
        save_file(halved(load_file(path)), path)
    elif weight_format == "nanogpt":
        content = nanogpt_file(theirs)
        torch.save({**content, "model": halved(content["model"])}, source)
    elif weight_format == "lightning":
        convert("hf", Path(source), "lightning")
        content = torch.load(source, weights_only=True)
        torch.save({**content, "state_dict": halved(content["state_dict"])}, source)
    else:
        convert("hf", Path(source), "book")
        torch.save(halved(torch.load(source, weights_only=True)), source)
    result = command("generate", f"--from={source}", "--prompt=a", "--max_new_tokens=2")
    assert result.code == 0, result.err
    assert result.err.splitlines()[-1] == two_dtypes(
        source
    )  # after the warning about the book's heads
    assert_same_logits(load_model(source), theirs, random_ids(2, 16))
    assert load_model(source, dtype=torch.bfloat16).tok_emb.weight.dtype == torch.bfloat16
    result = command("convert", source, "again", "--format=hf")
    assert result.code == 0, result.err
    assert two_dtypes(source) in result.err.splitlines()
    assert {t.dtype for t in load_file("again/model.safetensors").values()} == {torch.float32}


def test_two_dtypes_can_be_trained_and_measured(tmp_path: Path, command: Command) -> None:
    gpt2_for_halving(tmp_path / "hf", emb_dim=8)
    path = tmp_path / "hf" / "model.safetensors"
    save_file(halved(load_file(path)), path)
    run = (f"--config={ROOT}/configs/gpt2.yaml", "--init_from=hf", "--trainer.accelerator=cpu",
           "--data.text=sample", "--data.context_length=16")  # fmt: skip
    for arguments in (
        ("validate", *run, "--trainer.limit_val_batches=2"),
        ("fit", *run, "--trainer.fast_dev_run=1", "--evaluation.prompt=null"),
        ("report", "sampling", "--from=hf", "--prompt=a", "--num_samples=10"),
    ):
        result = command(*arguments)
        assert result.code == 0, result.err
        assert two_dtypes("hf") in result.err.splitlines()


RARE_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.module.", "_fsdp_wrapped_module.model.")


PREFIXES = ["module._orig_mod.", "model.",
            *(pytest.param(prefix, marks=pytest.mark.slow) for prefix in RARE_PREFIXES)]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_of_wrapped_models_are_read(tmp_path: Path, prefix: str) -> None:
    """torch.compile, DDP, FSDP and a module around the model each add a prefix to the names."""
    theirs = random_gpt2(tmp_path / "hf", emb_dim=64, n_heads=1, n_layers=1, vocab_size=300)
    idx = random_ids(2, 20) % 300
    torch.save(nanogpt_file(theirs, lambda name: prefix + name), tmp_path / "ckpt.pt")
    assert_same_logits(load_model(str(tmp_path / "ckpt.pt")), theirs, idx)
    path = tmp_path / "hf" / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    assert_same_logits(load_model(str(tmp_path / "hf")), theirs, idx)
    save_file(
        {name.replace("h.0.", "h.0._orig_mod."): t for name, t in load_file(path).items()}, path
    )
    assert_same_logits(load_model(str(tmp_path / "hf")), theirs, idx)

    model, _ = book_model(vocab_size=300, n_layers=1)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    model(idx[:, :16]).sum().backward()
    optimizer.step()
    moment = optimizer.state[model.tok_emb.weight]["exp_avg"]
    torch.save(state, tmp_path / "model.pth")
    torch.save({"model_state_dict": state, "optimizer_state_dict": optimizer.state_dict()},
               tmp_path / "both.pth")  # fmt: skip
    blocks = {name.replace("s.0.", "s.0._orig_mod."): tensor for name, tensor in state.items()}
    torch.save(blocks, tmp_path / "blocks.pth")
    for name in ("blocks.pth", "model.pth", "both.pth"):
        found = read_weights(str(tmp_path / name))
        assert torch.equal(found.state_dict["tok_emb.weight"], state[prefix + "tok_emb.weight"])
        if name == "both.pth":
            assert found.optimizer_state is not None
            assert torch.equal(found.optimizer_state["state"][0]["exp_avg"], moment)

    write_lightning(found, tmp_path / "ours.ckpt")
    content = torch.load(tmp_path / "ours.ckpt", weights_only=True)
    content["state_dict"] = {prefix + name: t for name, t in content["state_dict"].items()}
    torch.save(content, tmp_path / "wrapped.ckpt")
    again = read_weights(str(tmp_path / "wrapped.ckpt"))
    assert again.state_dict.keys() == found.state_dict.keys()


def test_checkpoint_with_wrapped_names_cannot_be_resumed(command: Command) -> None:
    config = GPTConfig(context_length=16, emb_dim=8, n_heads=2, n_layers=1)
    write_lightning(ModelWeights(config, GPTModel(config).state_dict()), Path("ours.ckpt"))
    content = torch.load("ours.ckpt", weights_only=True)
    content |= {"optimizer_states": [{}], "loops": {}, "tokens_seen": 0}
    content["state_dict"] = {f"_orig_mod.{n}": t for n, t in content["state_dict"].items()}
    torch.save(content, "wrapped.ckpt")
    result = command("fit", QUICKSTART, "--ckpt_path=wrapped.ckpt")
    assert (result.code, result.error.count("\n")) == (2, 1)
    assert "has other names than a run's checkpoint; give it as --init_from" in result.err


@pytest.mark.parametrize("keeps", [True, False])
def test_loaded_model_keeps_no_file_mapped_on_windows(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    monkeypatch.setattr(weights, "_KEEPS_MAPPED", keeps)
    convert(str(trained_run), tmp_path / "hf", "hf")
    for source, file in ((trained_run, "last.ckpt"), (tmp_path / "hf", "model.safetensors")):
        model = load_model(str(source))
        maps = Path("/proc/self/maps").read_text(errors="replace")
        path = str((source / file).resolve())
        assert (path in maps) == keeps, source
        del model
