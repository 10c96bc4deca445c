"""Writer of llama.cpp's GGUF format: the architecture ``gpt2``, with the tokenizer in the same file.

The layout is that of llama.cpp's ``convert_hf_to_gguf.py``: matrices are ``(out, in)``, as in torch. Norms, biases and
position embeddings are float32 in every file, because llama.cpp computes with them in float32.
"""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt_lightning.data.tokenizer import Tokenizer, merge_pairs
from gpt_lightning.data.tokenizer_json import gpt2_content, splits_as_gpt2
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.pretrained.name_map import HEAD, gpt2_params, hf_name
from gpt_lightning.pretrained.weights import ModelWeights

if TYPE_CHECKING:
    import gguf

OutType = Literal["f32", "f16", "bf16", "q8_0"]

MAGIC = b"GGUF"  # the first bytes of a file
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
# the largest magnitude that a type holds; a block of q8_0 has a scale in float16, times integers up to 127
_LARGEST = {"f16": 65504.0, "q8_0": 65504.0 * 127}
_REMEDY = "give --format hf or lightning"


def check_library() -> None:
    """Raise ``OSError`` if the package ``gguf`` is not installed."""
    if find_spec("gguf") is None:
        raise OSError("format: gguf needs the package gguf; pip install 'gpt-lightning[gguf]'")


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its first bytes."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def write_gguf(weights: ModelWeights, path: Path, outtype: OutType, name: str) -> None:
    """Write a file for llama.cpp. One tensor is read and converted at a time.

    Args:
        outtype: The type of the matrices and of the token embedding.
        name: The model's name, which llama.cpp shows.

    Raises:
        ValueError: llama.cpp's gpt2 cannot hold the model or its tokenizer, or ``outtype`` cannot hold its weights.
    """
    import gguf

    config = weights.config
    _check_model(config, outtype)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_context_length(config.context_length)
        writer.add_embedding_length(config.emb_dim)
        writer.add_feed_forward_length(4 * config.emb_dim)
        writer.add_block_count(config.n_layers)
        writer.add_head_count(config.n_heads)
        writer.add_layer_norm_eps(1e-5)
        file_type = "ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_tokenizer(writer, weights.tokenizer, config.vocab_size)
        types = {
            their_name: gguf.GGMLQuantizationType[(outtype if is_matrix else "f32").upper()]
            for their_name, _, is_matrix in _tensors(weights)
        }
        for their_name, tensor, _ in _tensors(weights):
            qtype = types[their_name]
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, qtype)
            writer.add_tensor_info(
                their_name, shape, np.dtype(np.uint8), prod(shape), raw_dtype=qtype
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for their_name, tensor, _ in _tensors(weights):
            writer.write_tensor_data(_converted(tensor, types[their_name]))
    finally:
        writer.close()


def _check_model(config: GPTConfig, outtype: OutType) -> None:
    if config.n_layers > _MAX_LAYERS:
        raise ValueError(
            f"format: llama.cpp reads at most {_MAX_LAYERS} layers, and the model has {config.n_layers}; {_REMEDY}"
        )
    if outtype == "q8_0" and config.emb_dim % 32:
        raise ValueError(
            f"outtype: q8_0 has blocks of 32 weights, and 32 does not divide emb_dim {config.emb_dim}; give f16"
        )


def _tensors(weights: ModelWeights) -> Iterator[tuple[str, Tensor, bool]]:
    """Each tensor's name in the file, the tensor, and whether it has the type of matrices."""
    import gguf

    config, state_dict = weights.config, weights.state_dict
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layers)

    def their_name(hf: str) -> str:
        name = names.get_name(hf, (".weight", ".bias"))
        assert name is not None
        return name

    for param in gpt2_params(config.n_layers):
        tensor = state_dict.get(param.ours)
        if tensor is None:  # without qkv_bias
            tensor = torch.zeros(3 * config.emb_dim)
        is_matrix = param.kind == "matrix" or param.module == "wte"
        yield their_name(f"transformer.{hf_name(param)}"), tensor, is_matrix
    if not config.tied_embeddings:
        yield their_name(HEAD), state_dict["out_head.weight"], True


def _converted(tensor: Tensor, qtype: "gguf.GGMLQuantizationType") -> NDArray[Any]:
    from gguf.quants import quantize

    values = tensor.to(torch.float32)
    outtype = qtype.name.lower()
    if (limit := _LARGEST.get(outtype)) is not None:
        low, high = values.aminmax()
        if not max(-low.item(), high.item()) <= limit:  # also if a weight is NaN
            raise ValueError(
                f"outtype: {outtype} cannot hold all weights: one is beyond ±{limit:,.0f} or not a number; give f32"
            )
    return quantize(values.contiguous().numpy(), qtype)


# --- the tokenizer --------------------------------------------------------------------------------


def _add_tokenizer(writer: "gguf.GGUFWriter", tokenizer: Tokenizer, vocab_size: int) -> None:
    """Tokens with their types, merges and special tokens; ``ValueError`` if llama.cpp would split text differently."""
    import gguf

    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"format: gguf holds the tokenizer, but {tokenizer} has {tokenizer.vocab_size:,} tokens and the model "
            f"{vocab_size:,}; {_REMEDY}"
        )
    content = gpt2_content() if tokenizer.file is None else json.loads(tokenizer.file)
    if (difference := next(_differences(content), None)) is not None:
        raise ValueError(
            f"format: gguf cannot hold the tokenizer {tokenizer}: it {difference}, unlike llama.cpp's gpt-2; {_REMEDY}"
        )
    # ids without a token pad the vocabulary; every text must be there once
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, i in content["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in content.get("added_tokens") or []:
        kind = gguf.TokenType.CONTROL if added.get("special") else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    types[tokenizer.end_of_text_id] = gguf.TokenType.CONTROL
    if len(set(tokens)) < vocab_size:
        repeated = next(token for token in tokens if tokens.count(token) > 1)
        raise ValueError(
            f"format: gguf cannot hold the tokenizer {tokenizer}: two ids have the token {repeated!r}; {_REMEDY}"
        )
    end_of_text = tokens[tokenizer.end_of_text_id]
    # the list may not be empty; <|endoftext|> never results from merges, so this pair never merges
    pairs = merge_pairs(content["model"]["merges"]) or [(end_of_text, end_of_text)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_bos_token_id(tokenizer.end_of_text_id)
    writer.add_eos_token_id(tokenizer.end_of_text_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _differences(content: dict[str, Any]) -> Iterator[str]:
    """What llama.cpp's pre-tokenizer ``gpt-2`` would do differently."""
    if content.get("normalizer") is not None:
        yield "has a normalizer"
    if not splits_as_gpt2(content["pre_tokenizer"]):
        yield "splits text differently"
    if content["model"].get("ignore_merges"):
        yield "has ignore_merges"
    for added in content.get("added_tokens") or []:
        for key in ("single_word", "lstrip", "rstrip"):
            if added.get(key):
                yield f"has {key} for the token {added['content']!r}"
