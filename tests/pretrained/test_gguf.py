"""The format ``gguf``: what llama.cpp reads, by its own reader, and a forward pass from its tensors."""

import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_lightning import GPTModel, load_tokenizer, save_model
from gpt_lightning.data.tokenizer import END_OF_TEXT, merges, token_ids
from gpt_lightning.data.tokenizer_json import read_tokenizer, tokenizer_from
from gpt_lightning.pretrained import gguf as module
from gpt_lightning.pretrained.gguf import OutType
from helpers import Command, assert_refused, limited_file_size
from own_tokenizers import edit_own, own_file, random_string, write_own
from weight_files import random_ids

gguf = pytest.importorskip("gguf", reason="pip install '.[gguf]'")

CONFIG = {
    "vocab_size": 500, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 2,
    "drop_rate": 0.1, "qkv_bias": True, "tied_embeddings": True,
}  # fmt: skip
TEXT = "Every effort moves you, isn't it?\n\n  1914 é🦜 <|endoftext|>"
TEXTS = (TEXT, "<|user|>Every effort<|bot|> moves you",
         *(random_string(random.Random(i)) for i in range(50)))  # fmt: skip


def random_model(**settings: Any) -> GPTModel:
    """All tensors are random, gains around 1."""
    torch.manual_seed(5)
    model = GPTModel({**CONFIG, **settings}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(mean + 0.3 * torch.randn_like(parameter))
    return model


def save(model: GPTModel, path: Path, outtype: OutType | None = None) -> None:
    """With a small vocabulary: ``gguf``'s reader is slow with GPT-2's."""
    pytest.importorskip("tokenizers")
    own = tokenizer_from(own_file(model.config.vocab_size), "own")
    save_model(model, path, "gguf", tokenizer=own, outtype=outtype)


def values(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def expected_tensors(model: GPTModel) -> dict[str, Tensor]:
    """Each tensor by llama.cpp's name; written down here once more."""
    state = model.state_dict()
    theirs = {"token_embd.weight": "tok_emb.weight", "position_embd.weight": "pos_emb.weight"}
    if not model.config.tied_embeddings:
        theirs["output.weight"] = "out_head.weight"
    modules = {"output_norm": "final_norm"}
    for i in range(model.config.n_layers):
        for name, ours in (
            ("attn_norm", "norm1"), ("attn_qkv", "att.qkv"), ("attn_output", "att.out_proj"),
            ("ffn_norm", "norm2"), ("ffn_up", "ff.layers.0"), ("ffn_down", "ff.layers.2"),
        ):  # fmt: skip
            modules[f"blk.{i}.{name}"] = f"trf_blocks.{i}.{ours}"
    for name, ours in modules.items():
        theirs |= {f"{name}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}
    zeros = torch.zeros(3 * model.config.emb_dim)
    return {name: state.get(ours, zeros) for name, ours in theirs.items()}


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_tensors(tmp_path: Path, outtype: OutType) -> None:
    model = random_model(tied_embeddings=False, qkv_bias=False)
    save(model, tmp_path / "m.gguf", outtype)
    assert os.listdir(tmp_path) == ["m.gguf"]
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    expected = expected_tensors(model)
    assert {tensor.name for tensor in reader.tensors} == expected.keys()
    for tensor in reader.tensors:
        theirs = expected[tensor.name]
        is_matrix = theirs.dim() == 2 and tensor.name != "position_embd.weight"
        assert tensor.tensor_type.name == (outtype.upper() if is_matrix else "F32"), tensor.name
        assert [int(n) for n in reversed(tensor.shape)] == list(theirs.shape), tensor.name
        got = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(theirs.shape)
        if not is_matrix or outtype == "f32":
            np.testing.assert_array_equal(got, theirs.numpy())
        elif outtype == "q8_0":
            scale = theirs.reshape(-1, 32).abs().amax(dim=1, keepdim=True) / 127
            # half a step, and the rounding of the scale to float16 in up to 127 steps
            limit = scale * (0.5 + 127 * 2**-11) + 1e-7
            error = (torch.from_numpy(got.copy()) - theirs).reshape(-1, 32).abs()
            assert (error <= limit).all(), tensor.name
            assert error.max() > 0
        else:
            dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[outtype]
            np.testing.assert_array_equal(got, theirs.to(dtype).float().numpy())


def test_metadata_and_vocabulary(tmp_path: Path, command: Command) -> None:
    """F16 without an option; a padded vocabulary."""
    save_model(random_model(vocab_size=50304), "source.ckpt", "lightning")
    result = command("convert", "source.ckpt", "tiny.gguf")
    assert (result.code, result.err) == (0, "tiny.gguf: written\n")
    got = values(gguf.GGUFReader(tmp_path / "tiny.gguf"))
    expected = {
        "general.architecture": "gpt2", "general.type": "model", "general.name": "tiny",
        "general.file_type": 1, "gpt2.context_length": 16, "gpt2.embedding_length": 32,
        "gpt2.feed_forward_length": 128, "gpt2.block_count": 2, "gpt2.attention.head_count": 4,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 50256, "tokenizer.ggml.eos_token_id": 50256,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    assert {name: got[name] for name in expected} == expected
    assert got["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    tokens, types = got["tokenizer.ggml.tokens"], got["tokenizer.ggml.token_type"]
    assert {token: i for i, token in enumerate(tokens[:50257])} == token_ids()
    assert tokens[50257:] == [f"[PAD{i}]" for i in range(50257, 50304)]
    assert types == [1] * 50256 + [3] + [5] * 47
    assert [tuple(pair.split(" ")) for pair in got["tokenizer.ggml.merges"]] == merges()


@pytest.mark.parametrize("tied", [True, False])
def test_forward_pass_from_the_file(tmp_path: Path, tied: bool) -> None:
    model = random_model(tied_embeddings=tied, qkv_bias=tied)
    save(model, tmp_path / "m.gguf", "f32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    idx = random_ids(16) % 500
    with torch.inference_mode():
        ours = model(idx[None])[0]
    torch.testing.assert_close(llama_logits(tensors, values(reader), idx), ours, atol=1e-4, rtol=0)


def llama_logits(tensors: dict[str, Tensor], meta: dict[str, Any], idx: Tensor) -> Tensor:
    """llama.cpp's graph of gpt2, ``(T,)`` → ``(T, V)``, with the formula of ggml's GELU."""
    T, heads = len(idx), meta["gpt2.attention.head_count"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(dim=-1, keepdim=True)
        epsilon = meta["gpt2.attention.layer_norm_epsilon"]
        x = x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    x = tensors["token_embd.weight"][idx] + tensors["position_embd.weight"][:T]
    mask = torch.full((T, T), -torch.inf).triu(1)
    for i in range(meta["gpt2.block_count"]):
        q, k, v = (
            part.view(T, heads, -1).transpose(0, 1)
            for part in linear(norm(x, f"blk.{i}.attn_norm"), f"blk.{i}.attn_qkv").chunk(3, dim=-1)
        )
        attention = F.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + mask, dim=-1) @ v
        x = x + linear(attention.transpose(0, 1).reshape(T, -1), f"blk.{i}.attn_output")
        y = linear(norm(x, f"blk.{i}.ffn_norm"), f"blk.{i}.ffn_up")
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * y * (1 + 0.044715 * y * y)))
        x = x + linear(y, f"blk.{i}.ffn_down")
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return norm(x, "output_norm") @ head.T


@pytest.mark.slow
def test_added_tokens_travel(tmp_path: Path, command: Command) -> None:
    """Encoded by the tokens and merges of the file alone."""
    tokenizers = pytest.importorskip("tokenizers")
    save_model(random_model(vocab_size=50257), "source.ckpt", "lightning")
    add = ("--add_tokens", "<|user|>", "<|bot|>")
    assert command("convert", "source.ckpt", "a.gguf", *add).code == 0
    got = values(gguf.GGUFReader(tmp_path / "a.gguf"))
    tokens, types = got["tokenizer.ggml.tokens"], got["tokenizer.ggml.token_type"]
    assert tokens[50256:] == [END_OF_TEXT, "<|user|>", "<|bot|>"]
    assert set(types[:50256]) == {1}
    assert types[50256] == 3
    rebuilt = rebuilt_tokenizer(tokenizers, got)
    assert command("convert", "source.ckpt", "a.ckpt", *add).code == 0
    ours = load_tokenizer("a.ckpt")
    for text in TEXTS:
        ids = rebuilt.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode_prompt(text, special=True)


def rebuilt_tokenizer(tokenizers: Any, got: dict[str, Any]) -> Any:
    tokens, types = got["tokenizer.ggml.tokens"], got["tokenizer.ggml.token_type"]
    pairs = [tuple(pair.split(" ")) for pair in got["tokenizer.ggml.merges"]]
    plain = {token: i for i, token in enumerate(tokens)}
    rebuilt = tokenizers.Tokenizer(tokenizers.models.BPE(plain, pairs))
    rebuilt.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (3, 4)]
    rebuilt.add_special_tokens(special)
    return rebuilt


@pytest.mark.parametrize("vocab_size", [257, 500])
def test_a_vocabulary_of_ones_own(tmp_path: Path, vocab_size: int) -> None:
    """257 tokens are the bytes and the delimiter: there are no merges."""
    tokenizers = pytest.importorskip("tokenizers")
    own = read_tokenizer(write_own(tmp_path / "own", vocab_size))
    model = random_model(vocab_size=vocab_size)
    save_model(model, tmp_path / "own.gguf", "gguf", tokenizer=own)
    got = values(gguf.GGUFReader(tmp_path / "own.gguf"))
    assert got["tokenizer.ggml.eos_token_id"] == own.end_of_text_id == 0
    assert got["tokenizer.ggml.token_type"] == [3] + [1] * (vocab_size - 1)
    if vocab_size == 257:
        (pair,) = got.pop("tokenizer.ggml.merges")
        assert pair == f"{END_OF_TEXT} {END_OF_TEXT}"  # what no text has
        got["tokenizer.ggml.merges"] = []
    rebuilt = rebuilt_tokenizer(tokenizers, got)
    for text in TEXTS:
        ids = rebuilt.encode(text, add_special_tokens=False).ids
        assert ids == own.encode_prompt(text, special=True)


@pytest.mark.slow
def test_transformers_reads_it(tmp_path: Path) -> None:
    """Its reader is another implementation of the format; it does not read the context length."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF with it")
    transformers = pytest.importorskip("transformers")
    for tied in (True, False):
        model = random_model(tied_embeddings=tied, qkv_bias=tied)
        save(model, tmp_path / f"{tied}.gguf", "f32")
        theirs = transformers.GPT2LMHeadModel.from_pretrained(
            tmp_path, gguf_file=f"{tied}.gguf", dtype=torch.float32, n_positions=16
        ).eval()
        idx = random_ids(2, 16) % 500
        with torch.inference_mode():
            torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="True.gguf")
    own = tokenizer_from(own_file(500), "own")
    assert tokenizer(TEXT)["input_ids"] == own.encode_prompt(TEXT, special=True)


def test_weights_are_converted_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the checkpoint has several dtypes."""
    from gpt_lightning.pretrained import convert

    monkeypatch.setattr(convert, "to_one_dtype", lambda weights: pytest.fail("all at once"))
    model = random_model()
    model.trf_blocks.bfloat16()
    save(model, tmp_path / "m.gguf", "f32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    expected = expected_tensors(model)
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, expected[tensor.name].float().numpy())


# --- what is refused ------------------------------------------------------------------------------


def refuse(command: Command, *arguments: str, parts: tuple[str, ...]) -> None:
    before = sorted(os.listdir())
    assert_refused(command("convert", *arguments), *parts)
    assert sorted(os.listdir()) == before


def test_bad_input(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(vocab_size=50257)
    save_model(model, "good.ckpt", "lightning")
    save_model(random_model(vocab_size=50257, emb_dim=20), "narrow.ckpt", "lightning")
    save_model(random_model(vocab_size=300), "small.ckpt", "lightning")
    with torch.no_grad():
        model.trf_blocks[1].ff.layers[0].weight[3, 4] = 1e5
    save_model(model, "large.ckpt", "lightning")
    Path("there.gguf").touch()
    for *arguments, part in (
        ["good.ckpt", "there.gguf", "dest: there.gguf exists; give a new name"],
        ["good.ckpt", "m", "--format=gguf", "call it m.gguf"],
        ["narrow.ckpt", "m.gguf", "--outtype=q8_0", "32 does not divide emb_dim 20; give f16"],
        ["small.ckpt", "m.gguf", "small.ckpt: has another tokenizer", "has 300 tokens"],
        ["large.ckpt", "m.gguf", "outtype: f16 cannot hold all weights", "±65,504", "give f32"],
        ["good.ckpt", "m", "--format=hf", "--outtype=f16", "outtype: is for the format gguf, not for hf; leave it"],
        ["good.ckpt", "m.gguf", "--outtype=q4_0", "outtype", "q8_0"],
        ["good.ckpt", "m.gguf", "--gguf_type=f32", "did you mean outtype?"],
    ):  # fmt: skip
        options = [a for a in arguments[2:] if a.startswith("--")]
        parts = (*(a for a in arguments[2:] if not a.startswith("--")), part)
        refuse(command, *arguments[:2], *options, parts=parts)
    assert command("convert", "large.ckpt", "large.gguf", "--outtype=bf16").code == 0
    assert command("convert", "narrow.ckpt", "narrow.gguf").code == 0
    with pytest.raises(ValueError, match=r"gpt2 has 50,257 tokens and the model 300"):
        save_model(random_model(vocab_size=300), "small.gguf", "gguf")
    with pytest.raises(ValueError, match=r"outtype: half is unknown; did you mean f16\?"):
        save_model(model, "m.gguf", "gguf", outtype="half")  # type: ignore[arg-type]
    deep = random_model(vocab_size=50257, n_layers=513, emb_dim=2, n_heads=1)
    with pytest.raises(ValueError, match="at most 512 layers, and the model has 513"):
        save_model(deep, "m.gguf", "gguf")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    refuse(command, "good.ckpt", "m.gguf",
           parts=("gguf needs the package gguf; pip install 'gpt-lightning[gguf]'",))  # fmt: skip


def test_other_splits_of_text_are_refused(tmp_path: Path) -> None:
    """llama.cpp would give a text other ids."""
    pytest.importorskip("tokenizers")
    model = random_model(vocab_size=500)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}  # fmt: skip
    digits = {"type": "Digits", "individual_digits": True}
    added = {"id": 0, "content": END_OF_TEXT, "single_word": False, "lstrip": False,
             "rstrip": True, "normalized": False, "special": True}  # fmt: skip
    changes: list[tuple[str, dict[str, Any]]] = [
        ("has a normalizer", {"normalizer": {"type": "NFC"}}),
        ("splits text differently", {"pre_tokenizer": byte_level}),
        ("splits text differently",
         {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]}}),
        ("has ignore_merges", {"model": {"ignore_merges": True}}),
        ("has rstrip for the token '<|endoftext|>'", {"added_tokens": [added]}),
    ]  # fmt: skip
    for i, (part, change) in enumerate(changes):
        path = tmp_path / f"{i}.json"
        path.write_bytes(own_file())
        own = read_tokenizer(edit_own(path, **change))
        with pytest.raises(ValueError, match=rf"cannot hold the tokenizer {i} .*: it {part}, .*hf"):
            save_model(model, tmp_path / "m.gguf", "gguf", tokenizer=own)
        assert not list(tmp_path.glob("*m.gguf*"))


def test_a_gguf_file_is_not_a_source(command: Command) -> None:
    save(random_model(), Path("m.gguf"))
    for arguments in (
        ["generate", "--from=m.gguf", "--prompt=a"],
        ["convert", "m.gguf", "again.ckpt"],
        ["validate", "--config=quickstart", "--init_from=m.gguf"],
    ):
        result = command(*arguments)
        assert_refused(result, "m.gguf: is a GGUF file, which is for llama.cpp", "made from")


@pytest.mark.skipif(os.name == "nt", reason="there is no such limit")
@pytest.mark.parametrize("limit", [100_000, 3_000_000])
def test_full_disk_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """While the vocabulary is written, and while a tensor is."""
    model = random_model(vocab_size=50257)
    with limited_file_size(limit), pytest.raises(OSError, match=r"m\.gguf cannot be written"):
        save_model(model, tmp_path / "m.gguf", "gguf")
    assert os.listdir(tmp_path) == []
