"""Weights in every public format: read, written, compared with transformers and the book's code."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import book
import pytest
import torch
from conftest import ROOT, SMALL, Command, python
from random_gpt2 import random_gpt2, transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpt_lightning import GPTConfig, GPTModel, generate, load_model
from gpt_lightning.data.tokenizer import gpt2_encoding, vocabulary_file
from gpt_lightning.generation.sampling import SamplingParams
from gpt_lightning.pretrained import openai
from gpt_lightning.pretrained.convert import WeightFormat, convert
from gpt_lightning.pretrained.load import read_weights
from gpt_lightning.pretrained.name_map import gpt2_params
from gpt_lightning.pretrained.openai import _variable_name
from gpt_lightning.pretrained.weights import ModelWeights, write_lightning
from gpt_lightning.reports.model_comparison import ComparisonTask, measure

needs_tensorflow = pytest.mark.skipif(
    find_spec("tensorflow") is None, reason="TensorFlow is not installed: pip install '.[openai]'"
)
# width and heads in the proportions of the four sizes, small
SHAPES = {"124M": (24, 12), "355M": (32, 16), "774M": (40, 20), "1558M": (50, 25)}


@torch.inference_mode()
def assert_same_logits(ours: GPTModel, theirs: Any, idx: Tensor) -> None:
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-5, rtol=1e-5)


def random_ids(*shape: int) -> Tensor:
    return torch.randint(50257, shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("size", SHAPES)
def test_hugging_face_gives_transformers_logits(tmp_path: Path, size: str) -> None:
    theirs = random_gpt2(tmp_path / "hf", *SHAPES[size], n_positions=1024)
    ours = load_model(str(tmp_path / "hf"))
    assert ours.config.tied_embeddings
    assert ours.config.qkv_bias
    assert_same_logits(ours, theirs, random_ids(2, 20))
    assert_same_logits(ours, theirs, random_ids(1, 1024))  # to position 1,023


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize(
    "weight_format", ["book", pytest.param("openai-tf", marks=needs_tensorflow)]
)
def test_other_formats_give_transformers_logits(
    tmp_path: Path, size: str, weight_format: WeightFormat
) -> None:
    """From transformers to the format and back, at every position of the context."""
    emb_dim, n_heads = SHAPES[size]
    theirs = random_gpt2(tmp_path / "hf", emb_dim, n_heads, n_positions=1024)
    dest = tmp_path / ("model.pth" if weight_format == "book" else "tf")
    convert(str(tmp_path / "hf"), dest, weight_format)
    ours = load_model(str(dest), n_heads=n_heads)
    assert_same_logits(ours, theirs, random_ids(2, 20))
    assert_same_logits(ours, theirs, random_ids(1, 1024))


@torch.inference_mode()
def test_text_beyond_the_context_continues_from_the_last_window(tmp_path: Path) -> None:
    """Each token depends on the last window, as in the book; transformers reads the same window."""
    theirs = random_gpt2(tmp_path / "hf", n_positions=16)
    ours = load_model(str(tmp_path / "hf"))
    ids = random_ids(1, 12)
    found = generate(ours, ids, 20)
    for _ in range(20):
        next_id = theirs(ids[:, -16:]).logits[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat((ids, next_id), dim=1)
    assert torch.equal(found, ids)


def test_sharded_and_untied_hugging_face_gives_transformers_logits(tmp_path: Path) -> None:
    theirs = random_gpt2(tmp_path / "whole", tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    ours = load_model(str(tmp_path / "shards"))
    assert not ours.config.tied_embeddings
    assert_same_logits(ours, theirs, random_ids(2, 20))


def edit_json(path: Path, **changes: Any) -> None:
    """Set the keys of a JSON object; ``None`` removes a key."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(("tied", "shards"), [(True, False), (None, True)])
def test_separate_head_is_kept_although_the_config_ties_it(
    tmp_path: Path, command: Command, tied: bool | None, shards: bool
) -> None:
    model = random_gpt2(tmp_path / "hf", tie_word_embeddings=False)
    if shards:
        shutil.rmtree(tmp_path / "hf")
        model.save_pretrained(tmp_path / "hf", max_shard_size="2MB")
    edit_json(tmp_path / "hf" / "config.json", tie_word_embeddings=tied)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    done = command("convert", "hf", "ours.ckpt", "--format=lightning")
    assert done.code == 0, done.err
    assert done.err.splitlines() == [
        "gpt_lightning: hf: its config.json ties the output head to the token embedding, but "
        "lm_head.weight has other weights; keeping them",
        "ours.ckpt: written",
    ]
    ours = load_model("ours.ckpt")
    assert not ours.config.tied_embeddings
    assert_same_logits(ours, theirs, random_ids(2, 20))
    assert_same_logits(ours, model, random_ids(2, 20))
    # an error stays one line
    done = command("convert", "hf", "tf", "--format=openai-tf")
    assert (done.code, done.err.count("\n")) == (2, 1)
    done = command("validate", f"--config={ROOT}/configs/gpt2.yaml", "--init_from=hf",
                   "--model.config.tied_embeddings=true")  # fmt: skip
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "the source's output head differs from its token embedding" in done.err


@pytest.mark.parametrize("saved_name", ["transformer.wte.weight", "lm_head.weight", "both"])
def test_tied_head_is_read_under_either_name(tmp_path: Path, saved_name: str) -> None:
    theirs = random_gpt2(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    head = tensors.pop("transformer.wte.weight")
    names = ("transformer.wte.weight", "lm_head.weight") if saved_name == "both" else (saved_name,)
    save_file({**tensors, **{name: head.clone() for name in names}}, path)
    weights = read_weights(str(tmp_path / "hf"))
    assert weights.warnings == ()
    assert weights.config.tied_embeddings
    assert_same_logits(load_model(str(tmp_path / "hf")), theirs, random_ids(2, 20))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_exported_model_gives_the_same_logits_in_transformers(
    tmp_path: Path, tied: bool, qkv_bias: bool
) -> None:
    torch.manual_seed(5)
    config = GPTConfig(context_length=32, emb_dim=32, n_heads=4, n_layers=2, qkv_bias=qkv_bias,
                       tied_embeddings=tied)  # fmt: skip
    ours = GPTModel(config).eval()
    write_lightning(ModelWeights(config, ours.state_dict()), tmp_path / "ours.ckpt")
    convert(str(tmp_path / "ours.ckpt"), tmp_path / "hf", "hf")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    assert_same_logits(ours, theirs, random_ids(2, 20))
    again = load_model(str(tmp_path / "hf"))
    assert again.config.tied_embeddings == tied
    assert_same_logits(again, theirs, random_ids(2, 20))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Every effort moves you, doesn't it? Ünïcödé 🙂"
    assert tokenizer(text)["input_ids"] == gpt2_encoding().encode(text)


@needs_tensorflow
def test_tensorflow_to_ours_to_hugging_face(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = random_gpt2(tmp_path / "hf")
    idx = random_ids(2, 30)
    for arguments in [
        ("hf", "tf", "openai-tf"), ("tf", "ours.ckpt", "lightning"), ("ours.ckpt", "again", "hf"),
    ]:  # fmt: skip
        done = command("convert", arguments[0], arguments[1], "--format", arguments[2])
        assert done.code == 0, done.err
    written = {path.name for path in (tmp_path / "tf").iterdir()}
    assert {"checkpoint", "encoder.json", "hparams.json", "model.ckpt.data-00000-of-00001",
            "model.ckpt.index", "vocab.bpe"} <= written  # fmt: skip
    assert_same_logits(load_model("tf"), theirs, idx)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again").eval()
    with torch.inference_mode():
        assert torch.equal(again(idx).logits, theirs(idx).logits)
    # the names and shapes are OpenAI's
    header = json.loads(
        python(
            "-c",
            f"""
import json, tensorflow as tf
print(json.dumps(dict(tf.train.list_variables({str(tmp_path / "tf")!r}))))""",
        ).stdout
    )
    assert header["model/h0/attn/c_attn/w"] == [1, 24, 72]
    assert header["model/wte"] == [50257, 24]
    assert header["model/ln_f/g"] == [24]
    assert len(header) == 2 + 2 * 12 + 2


def book_model(**settings: Any) -> tuple[book.BookGPT, dict[str, Any]]:
    cfg = {"vocab_size": 50257, "context_length": 16, "emb_dim": 64, "n_heads": 1, "n_layers": 2,
           "drop_rate": 0.0, "qkv_bias": False, **settings}  # fmt: skip
    torch.manual_seed(6)
    return book.BookGPT(cfg).eval(), cfg


@pytest.mark.parametrize("qkv_bias", [False, True])
@torch.inference_mode()
def test_books_model_pth_gives_the_books_logits_and_returns_unchanged(
    tmp_path: Path, qkv_bias: bool
) -> None:
    theirs, _ = book_model(qkv_bias=qkv_bias)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    ours = load_model(str(tmp_path / "model.pth"))
    assert not ours.config.tied_embeddings
    idx = random_ids(2, 16)
    torch.testing.assert_close(ours(idx), theirs(idx), atol=1e-5, rtol=1e-5)

    convert(str(tmp_path / "model.pth"), tmp_path / "again.pth", "book")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert list(again.keys() - {k for k in again if k.endswith("mask")})
    book_again = book_model(qkv_bias=qkv_bias)[0]
    book_again.load_state_dict(again)  # strict
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_books_heads_must_be_given_if_no_rule_gives_them(tmp_path: Path, command: Command) -> None:
    theirs, _ = book_model(emb_dim=24, n_heads=4)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    done = command("generate", "--from=model.pth", "--prompt=a")
    assert done.code == 2
    assert "n_heads" in done.err
    done = command("generate", "--from=model.pth", "--prompt=a", "--n_heads=4", "--json",
                   "--max_new_tokens=3")  # fmt: skip
    assert done.code == 0, done.err
    ids = json.loads(done.out)["token_ids"]
    assert len(ids) == 4
    for i in (1, 2, 3):
        assert int(theirs(torch.tensor([ids[:i]]))[0, -1].argmax()) == ids[i]


def test_a_books_gpt2_is_tied(tmp_path: Path) -> None:
    theirs, _ = book_model()
    theirs.out_head.weight = nn.Parameter(theirs.tok_emb.weight.clone())
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    assert load_model(str(tmp_path / "model.pth")).config.tied_embeddings


def test_our_files_contain_the_number_of_heads(
    tmp_path: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    """4 heads cannot be derived from emb_dim 128; the book's own code still loads the file."""
    theirs, cfg = book_model(emb_dim=128, n_heads=4, n_layers=1, vocab_size=300)
    torch.save(theirs.state_dict(), "model.pth")
    assumed = (
        f"gpt_lightning: {tmp_path}/model.pth: does not contain its number of attention heads; assuming 2 (64 "
        "dimensions each); if that is wrong, give --n_heads (--model.config.n_heads with fit and validate)"
    )
    done = command("convert", "model.pth", "guessed.ckpt", "--format=lightning")
    dropout = "gpt_lightning: model.pth: does not contain its dropout rate; writes 0.1"
    assert done.err.splitlines() == [assumed, dropout, "guessed.ckpt: written"]
    load_model("model.pth")
    assert assumed == f"gpt_lightning: {caplog.messages[0]}"

    done = command("convert", "model.pth", "again.pth", "--format=book", "--n_heads=4")
    assert done.err.splitlines() == [dropout, "again.pth: written"]
    book_again = book.BookGPT(cfg)
    book_again.load_state_dict(torch.load("again.pth", weights_only=True))  # strict
    done = command("convert", "again.pth", "ours.ckpt", "--format=lightning")
    assert (done.code, done.err) == (0, "ours.ckpt: written\n")
    for source in ("again.pth", "ours.ckpt"):
        ours = load_model(source)
        assert ours.config.n_heads == 4
        with torch.inference_mode():
            idx = random_ids(2, 16) % 300
            torch.testing.assert_close(ours(idx), theirs(idx), atol=1e-5, rtol=1e-5)
    for verb in (["convert", "again.pth", "x.ckpt", "--format=lightning"],
                 ["generate", "--from=again.pth", "--prompt=a"]):  # fmt: skip
        done = command(*verb, "--n_heads=8")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "n_heads: again.pth has 4, not 8" in done.err


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


def test_moments_to_the_book_and_back_are_unchanged(fit_to_convert: Path) -> None:
    """Ours → the book's .pth → ours is the identity, with the optimizer; the book's AdamW loads it too."""
    convert(str(fit_to_convert), Path("book.pth"), "book")
    convert("book.pth", Path("again.ckpt"), "lightning")
    before, after = read_weights(str(fit_to_convert)), read_weights("again.ckpt")
    assert (
        before.config == after.config
    )  # with heads and dropout, which do not follow from the weights
    assert read_weights("book.pth").warnings == ()
    assert before.state_dict.keys() == after.state_dict.keys()
    for name, tensor in before.state_dict.items():
        assert torch.equal(after.state_dict[name], tensor), name
    moments = [
        {n: s.optimizer_state["state"][i]
         for g in s.optimizer_state["param_groups"]
         for i, n in zip(g["params"], g["param_names"], strict=True)}
        for s in (before, after)
    ]  # fmt: skip
    assert moments[0].keys() == moments[1].keys() == before.state_dict.keys()
    for name, state in moments[0].items():
        for key, value in state.items():
            assert torch.equal(moments[1][name][key], value), (name, key)

    saved = torch.load("book.pth", weights_only=True)
    config = before.config
    model = book.BookGPT(vars(config))
    model.load_state_dict(saved["model_state_dict"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.load_state_dict(saved["optimizer_state_dict"])
    by_parameter = dict(model.named_parameters())
    for name, parameter in by_parameter.items():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape, name
    thirds = [
        optimizer.state[by_parameter[f"trf_blocks.1.att.{w}.weight"]]["exp_avg"]
        for w in ("W_query", "W_key", "W_value")
    ]
    assert torch.equal(torch.cat(thirds), moments[0]["trf_blocks.1.att.qkv.weight"]["exp_avg"])


@pytest.fixture
def fit_to_convert(command: Command) -> Path:
    done = command("fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL,
                   "--trainer.max_steps=2", "--model.config.qkv_bias=true", "--run=r",
                   "--model.config.tied_embeddings=false")  # fmt: skip
    assert done.code == 0, done.err
    return Path("checkpoints/r/last.ckpt")


def test_openai_files_with_another_head_or_tokenizer_are_refused(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TensorFlow: the test writes the safetensors file to which a checkpoint is converted."""
    theirs = random_gpt2(tmp_path / "hf", n_layers=1)
    weights = read_weights("hf")
    tensors = {
        _variable_name(param): t.t()[None].contiguous()
        if param.kind == "matrix"
        else t.contiguous()
        for param in gpt2_params(1)
        for t in [weights.state_dict[param.ours]]
    }
    save_file(tensors, tmp_path / "converted.safetensors")
    monkeypatch.setattr(openai, "_as_safetensors", lambda _: tmp_path / "converted.safetensors")
    Path("tf").mkdir()
    hparams = {"n_vocab": 50257, "n_ctx": 64, "n_embd": 24, "n_head": 12, "n_layer": 1}
    Path("tf/hparams.json").write_text(json.dumps(hparams))
    Path("tf/model.ckpt.index").touch()
    shutil.copy(vocabulary_file("encoder.json"), "tf")
    shutil.copy(vocabulary_file("vocab.bpe"), "tf")
    assert_same_logits(load_model("tf"), theirs, random_ids(2, 20))
    assert command("generate", "--from=tf", "--prompt=a", "--max_new_tokens=1").err == ""
    swap(Path("tf/encoder.json"))
    done = command("generate", "--from=tf", "--prompt=a")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "tf: has another tokenizer than GPT-2's: tf/encoder.json has another" in done.err
    shutil.copy(vocabulary_file("encoder.json"), "tf")
    more = {"head/w": tensors["model/wte"] + 1, "beta1_power": torch.ones(())}
    save_file(tensors | more, tmp_path / "converted.safetensors")
    done = command("generate", "--from=tf", "--prompt=a")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "tf: has head/w, which a GPT-2 of its hparams.json does not have" in done.err


# --- dropout, dtypes, names -----------------------------------------------------------------------


def test_each_dropout_rate_is_kept(tmp_path: Path) -> None:
    random_gpt2(tmp_path / "hf", n_layers=1, resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3)
    convert(str(tmp_path / "hf"), tmp_path / "ours.ckpt", "lightning")
    convert(str(tmp_path / "ours.ckpt"), tmp_path / "model.pth", "book")
    convert(str(tmp_path / "model.pth"), tmp_path / "again", "hf")
    theirs = transformers.GPT2Config.from_pretrained(tmp_path / "again")
    assert (theirs.resid_pdrop, theirs.embd_pdrop, theirs.attn_pdrop) == (0.1, 0.2, 0.3)
    ours = load_model(str(tmp_path / "again"))
    assert ours.drop_emb.p == 0.2
    assert (ours.trf_blocks[0].drop_shortcut.p, ours.trf_blocks[0].att.drop_rate) == (0.1, 0.3)


def test_sizes_are_read_under_their_common_names(tmp_path: Path) -> None:
    theirs = random_gpt2(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", n_head=None, num_attention_heads=12, n_embd=None,
              hidden_size=24, n_layer=None, num_hidden_layers=2, n_positions=None,
              max_position_embeddings=64)  # fmt: skip
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    assert_same_logits(load_model(str(tmp_path / "hf")), theirs, random_ids(2, 20))


def nanogpt_file(
    theirs: Any, rename: Callable[[str], str] = str, **settings: Any
) -> dict[str, Any]:
    """nanoGPT's ``ckpt.pt`` with the weights of a model of transformers'."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[rename(name)] = tensor.t().contiguous() if transposed else tensor
    config = theirs.config
    arguments = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
                 "block_size": config.n_positions, "bias": True, "vocab_size": config.vocab_size,
                 "dropout": 0.0, **settings}  # fmt: skip
    return {"model": state, "model_args": arguments}


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
    done = command("generate", f"--from={source}", "--prompt=a", "--max_new_tokens=2")
    assert done.code == 0, done.err
    assert done.err.splitlines()[-1] == two_dtypes(
        source
    )  # after the warning about the book's heads
    assert_same_logits(load_model(source), theirs, random_ids(2, 16))
    assert load_model(source, dtype=torch.bfloat16).tok_emb.weight.dtype == torch.bfloat16
    done = command("convert", source, "again", "--format=hf")
    assert done.code == 0, done.err
    assert two_dtypes(source) in done.err.splitlines()
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
        done = command(*arguments)
        assert done.code == 0, done.err
        assert two_dtypes("hf") in done.err.splitlines()


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


# --- another tokenizer ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with its tokenizer as transformers saves it, in one file and in two."""
    folder = tmp_path_factory.mktemp("tokenizer") / "hf"
    random_gpt2(folder, emb_dim=8, n_heads=2, n_layers=1, n_positions=32)
    shutil.copy(vocabulary_file("encoder.json"), folder / "vocab.json")
    shutil.copy(vocabulary_file("vocab.bpe"), folder / "merges.txt")
    transformers.GPT2Tokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def spell_differently(folder: Path) -> None:
    """Rewrite the files with the same content: other key order, indents, merges as strings, line ends."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    del content["model"]["vocab"]["<|endoftext|>"]
    content["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
    }
    path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
    vocabulary = json.loads((folder / "vocab.json").read_bytes())
    text = json.dumps(dict(reversed(vocabulary.items())), ensure_ascii=False, indent=1)
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    (folder / "merges.txt").write_bytes("\r\n".join(lines[1:]).encode())
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2TokenizerFast",
              pad_token="<|endoftext|>", clean_up_tokenization_spaces=True)  # fmt: skip


@pytest.mark.parametrize("change", [lambda folder: None, spell_differently])
def test_gpt2s_tokenizer_is_recognized_in_any_layout(
    with_tokenizer: Path, tmp_path: Path, command: Command, change: Callable[[Path], None]
) -> None:
    shutil.copytree(with_tokenizer, "hf")
    change(Path("hf"))
    done = command("generate", "--from=hf", "--prompt=a", "--max_new_tokens=1")
    assert (done.code, done.err) == (0, "")
    done = command("convert", "hf", "again", "--format=hf")
    assert done.code == 0, done.err
    assert command("generate", "--from=again", "--prompt=a", "--max_new_tokens=1").code == 0


def swap(path: Path, *keys: str) -> None:
    """Swap the first two entries of a list or dict in a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    inner = content
    for key in keys:
        inner = inner[key]
    one, other = (0, 1) if isinstance(inner, list) else list(inner)[:2]
    inner[one], inner[other] = inner[other], inner[one]
    path.write_text(json.dumps(content), encoding="utf-8")


def swap_merges(folder: Path) -> None:
    version, one, other, *rest = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    text = "\n".join([version, other, one, *rest])
    (folder / "merges.txt").write_text(text, encoding="utf-8")


def add_token(folder: Path) -> None:
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|user|>"])
    tokenizer.save_pretrained(folder)


def save_with(**settings: Any) -> Callable[[Path], None]:
    """A function that saves transformers' tokenizer with other settings."""

    def change(folder: Path) -> None:
        transformers.GPT2Tokenizer.from_pretrained(folder, **settings).save_pretrained(folder)
        edit_json(folder / "tokenizer_config.json", **dict.fromkeys(settings))

    return change


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "vocab.json": (lambda f: swap(f / "vocab.json"), "vocab.json has another vocabulary"),
    "merges.txt": (swap_merges, "merges.txt has other merges"),
    "vocabulary": (
        lambda f: swap(f / "tokenizer.json", "model", "vocab"),
        "tokenizer.json has another vocabulary",
    ),
    "merges": (
        lambda f: swap(f / "tokenizer.json", "model", "merges"),
        "tokenizer.json has other merges",
    ),
    "added": (add_token, "adds the token '<|user|>'"),
    "prefix space": (save_with(add_prefix_space=True), "splits text differently"),
    "bos": (save_with(add_bos_token=True), "adds tokens to each text"),
    "normalizer": (
        lambda f: edit_json(f / "tokenizer.json", normalizer={"type": "NFC"}),
        "has a normalizer",
    ),
    "not json": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be read"),
    "class": (
        lambda f: edit_json(f / "tokenizer_config.json", tokenizer_class="BertTokenizer"),
        "names BertTokenizer",
    ),
    "class in config": (
        lambda f: edit_json(f / "config.json", tokenizer_class="BertTokenizer"),
        "names BertTokenizer",
    ),
    "sentencepiece": (lambda f: (f / "spiece.model").touch(), "spiece.model belongs to another"),
}  # fmt: skip


SLOW = ("prefix space", "bos", "vocabulary", "merges")


@pytest.mark.parametrize(
    "other",
    [pytest.param(other, marks=pytest.mark.slow if other in SLOW else ()) for other in OTHERS],
)
def test_another_tokenizer_is_refused_for_text(
    with_tokenizer: Path, tmp_path: Path, command: Command, other: str
) -> None:
    shutil.copytree(with_tokenizer, "hf")
    change, cause = OTHERS[other]
    change(Path("hf"))
    done = command("generate", "--from=hf", "--prompt=a")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("gpt_lightning: error: hf: has another tokenizer than GPT-2's: "), (
        done.err
    )
    assert cause in done.err
    assert done.err.count("\n") == 1


@pytest.fixture
def other_tokenizers(with_tokenizer: Path, command: Command) -> list[str]:
    shutil.copytree(with_tokenizer, "hf")
    OTHERS["vocab.json"][0](Path("hf"))
    characters = random_gpt2(Path("x"), emb_dim=8, n_heads=2, n_layers=1, vocab_size=65)
    content = nanogpt_file(characters)
    torch.save(content, "ckpt.pt")
    Path("beside").mkdir()
    gpt2 = transformers.GPT2LMHeadModel.from_pretrained(with_tokenizer)
    torch.save(nanogpt_file(gpt2), "beside/ckpt.pt")
    Path("beside/meta.pkl").write_bytes(b"never opened")
    torch.save(nanogpt_file(gpt2, vocab_size=50257), "gpt2.pt")
    return ["hf", "ckpt.pt", "beside/ckpt.pt"]


def test_another_tokenizer_is_refused_by_every_command_with_text(
    other_tokenizers: list[str], command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    gpt2 = f"--config={ROOT}/configs/gpt2.yaml"
    for source in other_tokenizers:
        for arguments in (
            ["generate", f"--from={source}", "--prompt=A"],
            ["report", "sampling", f"--from={source}", "--prompt=A"],
            ["report", "sweep", f"--from={source}", "--prompt=A"],
            ["validate", gpt2, f"--init_from={source}", "--data.text=sample"],
            ["fit", gpt2, f"--init_from={source}", "--data.text=sample"],
            ["plan", gpt2, f"--init_from={source}", "--data.text=sample"],
        ):
            done = command(*arguments)
            assert done.code == 2, (arguments, done.out)
            assert f"{source}: has another tokenizer than GPT-2's: " in done.err
            assert done.err.count("\n") == 1
    done = command("generate", "--from=gpt2.pt", "--prompt=A", "--max_new_tokens=1")
    assert done.code == 0, done.err
    task = ComparisonTask(
        prompt="A", sampling=SamplingParams(), num_samples=1, max_new_tokens=1, seed=1
    )
    with pytest.raises(ValueError, match="has another tokenizer than GPT-2's"):
        measure("ckpt.pt", task)  # what report sizes runs in a separate process
    load_model("ckpt.pt")  # its ids can be used
    assert "ckpt.pt: has another tokenizer than GPT-2's" in caplog.text
    assert not Path("checkpoints").exists()


def test_conversion_does_not_hide_another_tokenizer(
    other_tokenizers: list[str], command: Command
) -> None:
    """Every format shows a smaller vocabulary, and no format shows another tokenizer."""
    for weight_format, dest in (("hf", "dest"), ("book", "dest.pth"), ("lightning", "dest.ckpt")):
        for source in ("hf", "beside/ckpt.pt"):
            done = command("convert", source, dest, f"--format={weight_format}", "--n_heads=2")
            assert (done.code, done.err.count("\n")) == (2, 1)
            assert f"{source}: has another tokenizer than GPT-2's: " in done.err
        done = command("convert", "ckpt.pt", dest, f"--format={weight_format}")
        assert done.code == 0, done.err
        done = command("generate", f"--from={dest}", "--prompt=A")
        assert done.code == 2
        assert "its vocabulary has 65 tokens" in done.err
    assert not Path("dest/vocab.json").exists()


def test_checkpoint_with_wrapped_names_cannot_be_resumed(command: Command) -> None:
    config = GPTConfig(context_length=16, emb_dim=8, n_heads=2, n_layers=1)
    write_lightning(ModelWeights(config, GPTModel(config).state_dict()), Path("ours.ckpt"))
    content = torch.load("ours.ckpt", weights_only=True)
    content |= {"optimizer_states": [{}], "loops": {}, "tokens_seen": 0}
    content["state_dict"] = {f"_orig_mod.{n}": t for n, t in content["state_dict"].items()}
    torch.save(content, "wrapped.ckpt")
    done = command("fit", f"--config={ROOT}/configs/quickstart.yaml", "--ckpt_path=wrapped.ckpt")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "has other names than a run's checkpoint; give it as --init_from" in done.err
