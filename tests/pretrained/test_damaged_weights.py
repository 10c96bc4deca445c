"""Weights that are damaged or contradict themselves: exit code 2, one line, no DEST."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_lightning.pretrained.name_map import gpt2_params
from gpt_lightning.storage.checksum import MANIFEST
from helpers import Command, assert_refused, limited_file_size
from random_gpt2 import random_gpt2
from weight_files import flip_bit, truncate


def assert_refused_or_same(
    refuse: Any, name: str, intact: Path, tmp_path: Path, original: str | None = None
) -> None:
    """The file is refused, unless the damage is in the padding between the records, which has no content."""
    from gpt_lightning.pretrained.source import read_weights

    try:
        found = read_weights(str(tmp_path / name), n_heads=12)
    except ValueError:
        refuse(name, name)
        return
    expected = read_weights(str(intact / (original or name)), n_heads=12)
    assert found.config == expected.config
    for key, tensor in expected.state_dict.items():
        assert torch.equal(found.state_dict[key], tensor), f"{key} differs without an error"


@pytest.mark.parametrize("name", ["ours.ckpt", "model.pth"])
def test_damaged_file_is_refused(refuse: Any, intact: Path, tmp_path: Path, name: str) -> None:
    size = (intact / name).stat().st_size
    rng = random.Random(0)
    for at in [0, 30, size - 1, *(rng.randrange(size) for _ in range(12))]:
        shutil.copy(intact / name, tmp_path / name)
        flip_bit(tmp_path / name, at)
        assert_refused_or_same(refuse, name, intact, tmp_path)
    for share in (0.0, 0.3, 0.99):
        shutil.copy(intact / name, tmp_path / name)
        truncate(tmp_path / name, share)
        refuse(name, name, "is damaged")


def test_damaged_safetensors_are_refused(refuse: Any, intact: Path, tmp_path: Path) -> None:
    size = (intact / "hf" / "model.safetensors").stat().st_size
    rng = random.Random(1)
    for at in [0, 8, 100, size - 1, *(rng.randrange(size) for _ in range(6))]:
        shutil.copytree(intact / "hf", tmp_path / "hf", dirs_exist_ok=True)
        flip_bit(tmp_path / "hf" / "model.safetensors", at)
        refuse("hf", "model.safetensors", "is missing or damaged")
    # without a manifest, a truncated file and a damaged header are still found
    (tmp_path / "hf" / MANIFEST).unlink()
    for share in (0.0, 0.0001, 0.5, 0.999):
        shutil.copy(intact / "hf" / "model.safetensors", tmp_path / "hf")
        truncate(tmp_path / "hf" / "model.safetensors", share)
        refuse("hf", "model.safetensors", "is damaged")


@pytest.mark.parametrize("length", [10 * 10**9, 2**63 + 5, 99_000_000])
def test_safetensors_header_with_a_wrong_length_is_refused(
    refuse: Any, intact: Path, tmp_path: Path, length: int
) -> None:
    shutil.copytree(intact / "theirs", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refuse("hf", "model.safetensors", "is damaged")


def test_safetensors_tensors_that_exceed_the_file_are_refused(
    refuse: Any, intact: Path, tmp_path: Path
) -> None:
    shutil.copytree(intact / "theirs", tmp_path / "hf")
    header = json.dumps(
        {
            "transformer.wte.weight": {
                "dtype": "F32",
                "shape": [2**40, 2**20],
                "data_offsets": [0, 2**62],
            }
        }
    ).encode()
    content = len(header).to_bytes(8, "little") + header + b"\0" * 64
    (tmp_path / "hf" / "model.safetensors").write_bytes(content)
    refuse("hf", "model.safetensors", "is damaged")


def test_damaged_manifest_is_refused(refuse: Any, intact: Path, tmp_path: Path) -> None:
    shutil.copytree(intact / "hf", tmp_path / "hf")
    for content in ("{", "[]", '{"files": 3}', '{"files": {"config.json": {}}}'):
        (tmp_path / "hf" / MANIFEST).write_text(content)
        refuse("hf", MANIFEST, "is damaged")


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        ("n_embd", 36, "its architecture says"),
        ("n_positions", 65, "its architecture says"),
        ("n_layer", 2, "has no transformer.h.1."),
        ("n_head", 5, "not divisible"),
        ("n_layer", "two", "n_layer is 'two'"),
        ("n_layer", 10**9, "has no transformer.h.1."),
        ("n_positions", 10**18, "context_length: 1000000000000000000 is not a valid size"),
        ("vocab_size", 2**31 - 1, "its architecture says"),
        ("n_embd", 24 * 10**7, "its architecture says"),
        ("n_inner", 7, "n_inner is 7"),
        ("activation_function", "relu", "activation_function is 'relu'"),
        ("model_type", "llama", "model_type is 'llama'"),
        ("tie_word_embeddings", False, "has no lm_head.weight"),
        ("resid_pdrop", 3, "drop_rate: 3"),
        ("embd_pdrop", 3, "emb_drop_rate: 3"),
        ("attn_pdrop", "0.2", "attn_pdrop is '0.2', not a number"),
        ("num_attention_heads", 6, "n_head is 12 and num_attention_heads is 6"),
        ("hidden_size", 48, "n_embd is 24 and hidden_size is 48"),
        ("num_hidden_layers", 2, "n_layer is 1 and num_hidden_layers is 2"),
        ("max_position_embeddings", 8, "n_positions is 64 and max_position_embeddings is 8"),
        ("scale_attn_weights", False, "scale_attn_weights is False"),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is True"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon is 1e-06"),
        ("add_cross_attention", True, "add_cross_attention is True"),
        ("activation_function", "gelu", "activation_function is 'gelu'"),
        ("tie_word_embeddings", "false", "tie_word_embeddings is 'false'"),
        ("quantization_config", {"quant_method": "fp8"}, "has a quantization_config"),
    ],
    ids=str,
)  # fmt: skip
def test_config_that_contradicts_the_weights_is_refused(
    refuse: Any, intact: Path, tmp_path: Path, key: str, value: Any, cause: str
) -> None:
    shutil.copytree(intact / "theirs", tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**settings, key: value}))
    refuse("hf", cause)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_config_that_is_not_json_is_refused(
    refuse: Any, intact: Path, tmp_path: Path, content: bytes
) -> None:
    shutil.copytree(intact / "theirs", tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_bytes(content)
    refuse("hf", "config.json: is not ")


def test_missing_and_unknown_tensors_are_refused(refuse: Any, intact: Path, tmp_path: Path) -> None:
    shutil.copytree(intact / "theirs", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    missing = {n: t for n, t in tensors.items() if n != "transformer.h.0.mlp.c_fc.bias"}
    save_file(missing, path)
    refuse("hf", "has no transformer.h.0.mlp.c_fc.bias")
    save_file({**tensors, "transformer.h.0.crossattention.bias": torch.ones(2)}, path)
    refuse("hf", "has transformer.h.0.crossattention.bias")
    save_file({**tensors, "transformer.ln_f.bias": torch.ones(24, dtype=torch.int64)}, path)
    refuse("hf", "final_norm.bias holds torch.int64")
    float8 = torch.ones(24).to(torch.float8_e4m3fn)
    save_file({**tensors, "transformer.ln_f.bias": float8}, path)
    refuse("hf", "final_norm.bias holds torch.float8_e4m3fn")
    save_file(
        {**tensors, "model.lm_head.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}, path
    )
    refuse("hf", "has both", "lm_head.weight")

    saved = torch.load(intact / "model.pth", weights_only=True)
    without = {n: t for n, t in saved.items() if n != "trf_blocks.0.att.W_key.weight"}
    torch.save(without, "part.pth")
    refuse("part.pth", "has no trf_blocks.0.att.qkv.weight")
    torch.save(saved | {"trf_blocks.0.norm1.scale": torch.ones(5)}, "shape.pth")
    refuse("shape.pth", "norm1.weight is (5,), its architecture says (24,)")


def test_tensors_beyond_the_architecture_are_refused(
    refuse: Any, intact: Path, tmp_path: Path
) -> None:
    """Otherwise a truncated model would be read without an error."""
    saved = torch.load(intact / "model.pth", weights_only=True)
    second = {
        n.replace("trf_blocks.0.", "trf_blocks.7."): t for n, t in saved.items() if ".0." in n
    }
    torch.save(saved | second, "more.pth")
    refuse("more.pth", "more.pth")
    query, key = "trf_blocks.0.att.W_query.weight", "trf_blocks.0.att.W_key.weight"
    torch.save(saved | {query: saved[query][:12], key: torch.cat((saved[key], saved[key][:12]))},
               "thirds.pth")  # fmt: skip
    refuse("thirds.pth", "differs in shape or dtype")

    state = {
        "transformer.wte.weight": torch.ones(300, 24),
        "transformer.h.1.ln_1.weight": torch.ones(24),
    }
    for param in gpt2_params(1):
        shape = {"wte": (300, 24), "wpe": (64, 24)}.get(param.module)
        widths = {
            "attn.c_attn": (72, 24),
            "attn.c_proj": (24, 24),
            "mlp.c_fc": (96, 24),
            "mlp.c_proj": (24, 96),
        }
        matrix = widths.get(param.module.removeprefix("h.0."), (24,))
        state[f"transformer.{param.module}.{'bias' if param.kind == 'bias' else 'weight'}"] = (
            torch.ones(shape or (matrix if param.kind == "matrix" else matrix[:1]))
        )
    arguments = {"n_layer": 1, "n_head": 12, "n_embd": 24, "block_size": 64, "vocab_size": 300}
    torch.save({"model": state, "model_args": arguments}, "ckpt.pt")
    refuse("ckpt.pt", "has transformer.h.1.ln_1.weight")

    checkpoint = torch.load(intact / "ours.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["config"]["n_layers"] = 10**7
    torch.save(checkpoint, "many.ckpt")
    refuse("many.ckpt", "has 1 blocks, its architecture says 10000000")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ours.ckpt", lambda c: c["hyper_parameters"]["config"].update(n_layers=1.0)),
        ("ours.ckpt", lambda c: c["hyper_parameters"]["config"].update(emb_dim=2**31 - 1)),
        ("ours.ckpt", lambda c: c["state_dict"].update({3: torch.ones(1)})),
        ("ours.ckpt", lambda c: c.update(optimizer_states={"a": 1})),
        ("model.pth", lambda c: c.update({"trf_blocks.0.att.W_key.weight": torch.tensor(1.0)})),
        ("model.pth", lambda c: c.update({5: torch.ones(1)})),
        ("model.pth", lambda c: c.update({"tok_emb.weight": torch.ones(300, 24).to_sparse()})),
    ],
)
def test_content_of_unexpected_types_is_refused(
    refuse: Any, intact: Path, name: str, change: Callable[[Any], None]
) -> None:
    content = torch.load(intact / name, weights_only=True)
    change(content)
    torch.save(content, f"x{Path(name).suffix}")
    refuse(f"x{Path(name).suffix}")


def test_damaged_zip_directory_is_refused_with_the_file_name(
    refuse: Any, intact: Path, tmp_path: Path
) -> None:
    content = (intact / "ours.ckpt").read_bytes()
    directory = content.rindex(b"PK\x01\x02")
    for at in range(directory, directory + 46):
        (tmp_path / "x.ckpt").write_bytes(
            content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1 :]
        )
        assert_refused_or_same(refuse, "x.ckpt", intact, tmp_path, "ours.ckpt")
    torch.save(torch.load(intact / "model.pth", weights_only=True), "old.pth",
               _use_new_zipfile_serialization=False)  # fmt: skip
    refuse("old.pth", "old.pth: is not a torch.save file of torch 1.6 or later")


def test_missing_shards_are_refused(refuse: Any, intact: Path, tmp_path: Path) -> None:
    shutil.copytree(intact / "theirs", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "part.safetensors")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    names = load_file(tmp_path / "hf" / "part.safetensors")
    for weight_map, cause in [
        (dict.fromkeys(names, "other.safetensors"), "other.safetensors"),
        (dict.fromkeys(names, "../part.safetensors"), "which is not in its folder"),
        (
            {**dict.fromkeys(names, "part.safetensors"), "more": "part.safetensors"},
            "more is not in",
        ),
        (None, "has no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        refuse("hf", cause)


def test_a_shard_that_the_index_does_not_name_is_refused(refuse: Any, tmp_path: Path) -> None:
    """It may hold the output head; without it the head would be tied."""
    model = random_gpt2(tmp_path / "one", vocab_size=300, n_layer=1, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"].pop("lm_head.weight")
    assert shard not in content["weight_map"].values()
    index.write_text(json.dumps(content))
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    refuse("hf", f"does not name {shard}")


class Canary:
    def __reduce__(self) -> Any:
        return os.mkdir, ("canary",)


@pytest.mark.parametrize("key", [None, "model_state_dict", "model_args", "state_dict"])
def test_code_in_a_file_is_not_run(
    refuse: Any, intact: Path, tmp_path: Path, key: str | None
) -> None:
    content: Any = Canary() if key is None else {key: Canary()}
    for modern in (True, False):
        torch.save(content, "evil.pth", _use_new_zipfile_serialization=modern)
        refuse("evil.pth", "evil.pth")
    import pickle

    Path("evil.pth").write_bytes(pickle.dumps(content))
    refuse("evil.pth", "evil.pth")
    shutil.copytree(intact / "theirs", tmp_path / "hf")
    shutil.copy("evil.pth", tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    refuse("hf", "holds none of")
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("weight_format", "dest"), [("book", "d.pth"), ("hf", "d"), ("lightning", "d.ckpt")]
)
def test_full_disk_leaves_no_dest(
    command: Command, tmp_path: Path, weight_format: str, dest: str
) -> None:
    random_gpt2(tmp_path / "theirs", vocab_size=30000, n_layer=1)
    for limit in (1, 500_000):
        with limited_file_size(limit):
            result = command("convert", "theirs", dest, "--format", weight_format)
        assert_refused(result, f"dest: {dest} cannot be written")
        assert os.listdir(tmp_path) == ["theirs"]
