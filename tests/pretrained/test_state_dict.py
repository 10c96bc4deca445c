"""``torch.save(model.state_dict(), path)`` as a SOURCE."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning import GPTConfig, GPTModel, load_model
from gpt_lightning.pretrained.source import read_weights
from helpers import Command
from weight_files import random_ids

SMALL = {"vocab_size": 50257, "context_length": 16, "n_layers": 2, "drop_rate": 0.0}


def model_of(**settings: Any) -> GPTModel:
    torch.manual_seed(1)
    return GPTModel({**SMALL, "emb_dim": 64, "n_heads": 1, **settings}).eval()


@pytest.mark.parametrize(
    ("prefix", "settings"),
    [
        ("", {}),
        ("_orig_mod.", {"qkv_bias": True}),
        ("model.", {"tied_embeddings": True}),
        ("", {"emb_dim": 128, "n_heads": 2}),
    ],
)
def test_same_logits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str, settings: dict[str, Any]
) -> None:
    model = model_of(**settings)
    named = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(named, tmp_path / "mine.pt")
    read = load_model(str(tmp_path / "mine.pt"))
    idx = random_ids(2, 16)
    with torch.inference_mode():
        assert torch.equal(read(idx), model(idx))
    assert vars(read.config) == {**vars(model.config), "drop_rate": 0.1}  # the default
    (line,) = caplog.messages
    assert f"assuming {model.config.n_heads} (64 dimensions each)" in line


def test_heads_that_64_does_not_give(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(emb_dim=96, n_heads=4)
    source = str(tmp_path / "mine.pt")
    torch.save(model.state_dict(), source)
    with pytest.raises(ValueError, match=r"n_heads: .* 96 is not a multiple of 64; give --n_heads"):
        load_model(source)
    read = load_model(source, n_heads=4)
    assert caplog.messages == []
    idx = random_ids(2, 16)
    with torch.inference_mode():
        assert torch.equal(read(idx), model(idx))


def test_optimizer_state_continues(command: Command) -> None:
    """The book's two keys, with a GPTModel: fit --init_optimizer takes the moments."""
    model = model_of(vocab_size=50257)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(random_ids(2, 16)).square().mean().backward()
    optimizer.step()
    state = optimizer.state_dict()
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": state}, "both.pth")
    read = read_weights("both.pth").optimizer_state
    assert read is not None
    by_name = dict(model.named_parameters())
    for index, name in enumerate(read["param_groups"][0]["param_names"]):
        expected = optimizer.state[by_name[name]]
        assert torch.equal(read["state"][index]["exp_avg"], expected["exp_avg"]), name
    result = command(
        "fit", "--init_from=both.pth", "--init_optimizer=true", "--run=on", "--data.text=sample",
        "--data.batch_size=2", "--trainer.max_steps=1", "--trainer.accelerator=cpu",
    )  # fmt: skip
    assert result.code == 0, result.err
    resumed = torch.load("checkpoints/on/last.ckpt", weights_only=True)["optimizer_states"][0]
    assert {int(entry["step"]) for entry in resumed["state"].values()} == {2}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda s: s.pop("trf_blocks.1.norm2.weight"), "has no trf_blocks.1.norm2.weight"),
        (lambda s: s.pop("tok_emb.weight"), "has no tok_emb.weight"),
        (lambda s: s.update({"lora.A": torch.zeros(2)}), "has lora.A"),
        (lambda s: s.update({"note": "text"}), "does not hold tensors only"),
        (
            lambda s: s.update({"final_norm.bias": torch.zeros(63)}),
            r"final_norm.bias is \(63,\), its architecture says \(64,\)",
        ),
    ],
)
def test_other_content_is_refused(tmp_path: Path, change: Any, cause: str) -> None:
    state = dict(model_of().state_dict())
    change(state)
    torch.save(state, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=cause):
        load_model(str(tmp_path / "mine.pt"), n_heads=1)


def test_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = model_of()
    other = torch.optim.AdamW(GPTModel(GPTConfig(emb_dim=8, n_heads=1, n_layers=1)).parameters())
    both = {"model_state_dict": model.state_dict(), "optimizer_state_dict": other.state_dict()}
    torch.save(both, tmp_path / "both.pth")
    with pytest.raises(ValueError, match="optimizer_state_dict is not one group of the model's"):
        read_weights(str(tmp_path / "both.pth"))
