"""Decoding step of a few rows on a CPU, and prompts, in our C code (:mod:`gpt_lightning.kernels.cpu_decode`).

Shapes: R rows, C ``emb_dim``, H heads, D = C / H, V ``vocab_size``; a weight is (N, K).
"""

import math
from ctypes import CDLL
from typing import cast

import torch
from torch import Tensor, nn

from gpt_lightning.kernels import cpu_decode as kernel
from gpt_lightning.model.gpt import GPTModel, QKVProjection, TransformerBlock, has_hooks
from gpt_lightning.model.int4_linear import Int4Linear
from gpt_lightning.model.int8_linear import Int8Linear
from gpt_lightning.model.kv_cache import KVCache
from gpt_lightning.model.packed_linear import can_pack
from gpt_lightning.storage.cache import cache_folder

# a smaller model decodes fast enough without a compiler: torch reads its weights in a few milliseconds
MIN_WEIGHTS = 1 << 24
MAX_ROWS = 4  # for more, torch's products of packed matrices are as fast
_PROMPT_TOKENS = 64  # of a prompt that are computed together: weights are read once for all of them
_TYPES = {torch.float32: kernel.FLOAT32, torch.bfloat16: kernel.BFLOAT16}


class CpuDecodeStep:
    """Decoding step of a model over a cache that contains the prompts.

    A call takes the newest ids ``(R,)`` and returns the logits of the next tokens ``(R, V)``, float32, which the next
    call overwrites. A row that has ended has a negative id; its logits have no meaning. Sums and the residual stream are
    float32. Vectors are rounded to 8 bits for weights in int8 and int4, with a scale for each 64 numbers.

    Args:
        model: One that :func:`cpu_decode_unsupported_reason` accepts, with so many rows.
        cache: Its first ``length`` positions are filled. Each step adds one.
        padding: ``(R,)``, see :meth:`GPTModel.features`.

    Attributes:
        max_logits: ``(R,)``, maximum logit of each row in the last step; NaN if any is.
        argmax_ids: ``(R,)``, the ids of these maxima; of equal logits the lowest id.
    """

    def __init__(self, model: GPTModel, cache: KVCache, padding: Tensor | None = None) -> None:
        rows = len(cache.keys[0])
        library = _library()
        assert library is not None
        self._decode_step = library.decode_step
        self._cache = cache
        self._tensors: list[Tensor] = []  # whose addresses the structures have
        self._blocks = (kernel.Block * len(model.trf_blocks))(
            *(
                self._block(cast(TransformerBlock, block), keys, values)
                for block, keys, values in zip(
                    model.trf_blocks, cache.keys, cache.values, strict=True
                )
            )
        )
        config, embedding = model.config, model.tok_emb.weight
        head = model.out_head if model.out_head is not None else embedding
        self._model = kernel.Model(
            self._address(embedding), self._address(model.pos_emb.weight),
            _TYPES[embedding.dtype], config.n_layers, config.emb_dim, config.n_heads, cache.max_length,
            self._blocks, self._norm(model.final_norm), self._linear(head),
        )  # fmt: skip
        self._first = [0] * rows if padding is None else padding.tolist()
        self._threads = torch.get_num_threads()
        self._decode_room = library.decode_room
        self._room = self._new_room(rows)
        self._logits = torch.empty(rows, config.vocab_size)
        self._renew_maxima()

    def __call__(self, ids: Tensor) -> Tensor:
        column, tokens = self._cache.length, ids.tolist()
        assert column < self._cache.max_length
        rows = [self._row(row, column, max(0, token)) for row, token in enumerate(tokens)]
        self._renew_maxima()
        self._compute(rows, self._room, 0, len(rows))
        self._cache.length += 1
        return self._logits

    def read(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """Fill the cache with prompts ``(R, T)``; returns the logits of the next tokens ``(R, V)``, as a call does.

        Args:
            padding: ``(R,)``, that of these prompts.
        """
        length = ids.shape[1]
        assert length <= self._cache.max_length
        self._first = [0] * len(ids) if padding is None else padding.tolist()
        room = self._new_room(_PROMPT_TOKENS)
        self._renew_maxima()
        for text, tokens in enumerate(ids.tolist()):
            for begin in range(self._first[text], length, _PROMPT_TOKENS):
                columns = range(begin, min(begin + _PROMPT_TOKENS, length))
                rows = [self._row(text, column, tokens[column]) for column in columns]
                self._compute(rows, room, text, int(columns.stop == length))
        self._cache.length = length
        return self._logits

    def _row(self, text: int, column: int, token: int) -> kernel.Row:
        first = self._first[text]
        return kernel.Row(token, column - first, text, column, first)

    def _compute(self, rows: list[kernel.Row], room: Tensor, first: int, count: int) -> None:
        """Compute tokens, and the logits after the last ``count`` of them, which are rows of the results from ``first`` on."""
        assert all(0 <= row.token < self._logits.shape[1] for row in rows)
        results = (self._logits, self.max_logits, self.argmax_ids)
        self._decode_step(
            self._model, (kernel.Row * len(rows))(*rows), len(rows), count, self._threads, room.data_ptr(),
            *(tensor[first:].data_ptr() for tensor in results),
        )  # fmt: skip

    def _renew_maxima(self) -> None:
        """New tensors, because a caller may keep those of the last step."""
        rows = len(self._first)
        self.max_logits, self.argmax_ids = torch.empty(rows), torch.empty(rows, dtype=torch.int64)

    def _new_room(self, rows: int) -> Tensor:
        return torch.empty(self._decode_room(self._model, rows, self._threads))

    def _address(self, tensor: Tensor) -> int:
        self._tensors.append(tensor.detach())  # a parameter may get other memory meanwhile
        return tensor.data_ptr()

    def _float_address(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self._address(tensor.detach().float().contiguous())

    def _norm(self, norm: nn.LayerNorm) -> kernel.Norm:
        return kernel.Norm(
            self._float_address(norm.weight), self._float_address(norm.bias), norm.eps
        )

    def _linear(self, layer: nn.Module | Tensor) -> kernel.Linear:
        """The structure of a linear layer, or of a weight without a bias."""
        if isinstance(layer, Tensor):
            weight, bias = layer, None
        else:
            bias = self._float_address(cast(Tensor | None, layer.bias))
            if isinstance(layer, Int8Linear):
                assert layer.codes is not None
                codes, scales = self._address(layer.codes), self._address(layer.scales)
                return kernel.Linear(codes, scales, None, bias, kernel.INT8, *layer.shape)
            if isinstance(layer, Int4Linear):
                assert layer.codes is not None
                assert layer.lines is not None
                codes, lines = self._address(layer.codes), self._address(layer.lines)
                return kernel.Linear(codes, None, lines, bias, kernel.INT4, *layer.shape)
            weight = cast(nn.Linear, layer).weight
        number_type = _TYPES[weight.dtype]
        return kernel.Linear(self._address(weight), None, None, bias, number_type, *weight.shape)

    def _block(self, block: TransformerBlock, keys: Tensor, values: Tensor) -> kernel.Block:
        return kernel.Block(
            self._norm(block.norm1), self._norm(block.norm2),
            *(self._linear(layer) for layer in _linear_layers(block)), self._address(keys), self._address(values),
        )  # fmt: skip


def cpu_decode_unsupported_reason(model: GPTModel, rows: int) -> str | None:
    """Why our C code cannot decode ``rows`` rows with this model; ``None`` if it can.

    A model whose weights require gradients is decoded by torch: so samples during training do not depend on a compiler.
    """
    embedding = model.tok_emb.weight
    if embedding.device.type != "cpu":
        return f"the model is on {embedding.device.type}"
    if rows > MAX_ROWS:
        return f"{rows} rows are more than {MAX_ROWS}"
    if any(parameter.requires_grad for parameter in model.parameters()):
        return "its weights require gradients"
    if _num_weights(model) < MIN_WEIGHTS:
        return "it is small"
    if has_hooks(model):
        return "it has hooks"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if not all(type(block) is TransformerBlock for block in model.trf_blocks):
        return "it has layers of other types than GPTModel"
    blocks = [cast(TransformerBlock, block) for block in model.trf_blocks]
    layers = [layer for block in blocks for layer in _linear_layers(block)]
    if model.out_head is not None:
        layers.append(model.out_head)
    if not all(_has_rows(layer) for layer in layers):
        return "its linear layers are in a layout for many rows"
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
    if not all(map(_is_gelu, blocks)) or not all(map(_is_layer_norm, (*norms, model.final_norm))):
        return "it has layers of other types than GPTModel"
    parameters = list(model.parameters())
    if not all(p.is_contiguous() and p.dtype in _TYPES for p in parameters):
        return "its weights are not float32 or bfloat16, or not contiguous"
    if model.pos_emb.weight.dtype != embedding.dtype:
        return "its embeddings differ in dtype"
    if _library() is None:
        return "there is no C code for this CPU"
    return None


def reads_prompts_faster(model: GPTModel) -> bool:
    """Whether our C code reads prompts faster than torch, for a model that it can decode.

    Torch's int4 product is made for a few rows, and a CPU without instructions for bfloat16 imitates them. Measured with
    AVX2; with AVX-512 an earlier form of the C code read int4 about as fast as torch.
    """
    layer = cast(TransformerBlock, model.trf_blocks[0]).att.qkv
    if isinstance(layer, Int4Linear):
        return True
    return model.tok_emb.weight.dtype == torch.bfloat16 and not can_pack(torch.bfloat16)


def _num_weights(model: GPTModel) -> int:
    quantized = (m for m in model.modules() if isinstance(m, Int8Linear | Int4Linear))
    return sum(p.numel() for p in model.parameters()) + sum(math.prod(m.shape) for m in quantized)


def _library() -> CDLL | None:
    try:
        folder = cache_folder()
    except ValueError:  # the user has no home folder
        return None
    return kernel.find_library(folder / "kernels")


def _has_rows(layer: nn.Module) -> bool:
    """Whether our C code reads the layer's weights. A subclass may compute something else."""
    if isinstance(layer, Int8Linear | Int4Linear):
        return layer.codes is not None
    return type(layer) in (nn.Linear, QKVProjection)


def _is_gelu(block: TransformerBlock) -> bool:
    activation = block.ff.layers[1]
    return isinstance(activation, nn.GELU) and activation.approximate == "tanh"


def _is_layer_norm(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and (norm.weight is None) == (norm.bias is None)


def _linear_layers(block: TransformerBlock) -> tuple[nn.Module, ...]:
    """The linear layers of a block in their order: qkv, out_proj, up, down (feed-forward)."""
    return block.att.qkv, block.att.out_proj, block.ff.layers[0], block.ff.layers[2]
