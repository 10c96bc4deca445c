"""Weights of nanoGPT."""

from pathlib import Path

import pytest
import torch

from gpt_lightning import load_model
from random_gpt2 import random_gpt2
from weight_files import assert_same_logits, random_ids


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_gives_transformers_logits(tmp_path: Path, bias: bool) -> None:
    theirs = random_gpt2(tmp_path / "hf", activation_function="gelu_new")
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith("weight") and ("c_attn" in name or "c_proj" in name or "c_fc" in name):
            tensor = tensor.t().contiguous()  # nn.Linear, not Conv1D
        if name.endswith("bias") and not bias:
            tensor.zero_()
            continue
        state[f"_orig_mod.{name}"] = tensor
    padded = torch.cat((theirs.transformer.wte.weight.data, torch.randn(47, 24)))
    state["_orig_mod.transformer.wte.weight"] = state["_orig_mod.lm_head.weight"] = padded
    arguments = {"n_layer": 2, "n_head": 12, "n_embd": 24, "block_size": 64, "bias": bias,
                 "vocab_size": 50304, "dropout": 0.0}  # fmt: skip
    torch.save({"model": state, "model_args": arguments, "optimizer": {}, "iter_num": 3,
                "best_val_loss": torch.tensor(1.0), "config": {}}, tmp_path / "ckpt.pt")  # fmt: skip
    ours = load_model(str(tmp_path / "ckpt.pt"))
    assert ours.config.vocab_size == 50257
    assert ours.config.qkv_bias == bias
    assert_same_logits(ours, theirs, random_ids(2, 20))


def test_nanogpts_separate_head_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = random_gpt2(tmp_path / "hf", tie_word_embeddings=False)
    state = {
        name: tensor.t().contiguous() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        else tensor
        for name, tensor in theirs.state_dict().items()
    }  # fmt: skip
    arguments = {"n_layer": 2, "n_head": 12, "n_embd": 24, "block_size": 64, "bias": True,
                 "vocab_size": 50257, "dropout": 0.0}  # fmt: skip
    torch.save({"model": state, "model_args": arguments}, tmp_path / "ckpt.pt")
    ours = load_model(str(tmp_path / "ckpt.pt"))
    assert "lm_head.weight has other weights than the token embedding" in caplog.text
    assert not ours.config.tied_embeddings
    assert_same_logits(ours, theirs, random_ids(2, 20))
