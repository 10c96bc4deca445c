"""Decoding step of a few rows on a CPU in our C code (:mod:`gpt_lightning.kernels.cpu_decode`).

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
from gpt_lightning.storage.cache import cache_folder

# a smaller model decodes fast enough without a compiler: torch reads its weights in a few milliseconds
MIN_WEIGHTS = 1 << 24
MAX_ROWS = 4  # for more, torch's products of packed matrices are as fast
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
        first = [0] * rows if padding is None else padding.tolist()
        self._rows = (kernel.Row * rows)(
            *(kernel.Row(0, 0, row, 0, column) for row, column in enumerate(first))
        )
        self._threads = torch.get_num_threads()
        self._room = torch.empty(library.decode_room(self._model, rows, self._threads))
        self._logits = torch.empty(rows, config.vocab_size)
        self.max_logits, self.argmax_ids = torch.empty(rows), torch.empty(rows, dtype=torch.int64)

    def __call__(self, ids: Tensor) -> Tensor:
        column, tokens = self._cache.length, ids.tolist()
        assert column < self._cache.max_length
        assert max(tokens) < self._logits.shape[1]
        for row, token in zip(self._rows, tokens, strict=True):
            row.token, row.column, row.position = max(0, token), column, column - row.first
        results = self.max_logits, self.argmax_ids = (
            torch.empty_like(self.max_logits), torch.empty_like(self.argmax_ids),
        )  # fmt: skip
        self._decode_step(
            self._model, self._rows, len(self._rows), self._threads,
            *(tensor.data_ptr() for tensor in (self._room, self._logits, *results)),
        )  # fmt: skip
        self._cache.length += 1
        return self._logits

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
