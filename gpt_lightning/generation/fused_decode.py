"""Decoding step for up to four rows with our Triton kernels: five per block, where torch needs thirteen.

With one row, a matrix product does two operations per weight that it reads, so the time of a step is at least the
time to read all weights once. Torch needs longer for two reasons: its matrix products are made for many rows, and
the small kernels between them wait for each other. The residual stream is kept in float32.

Shapes: R rows, C ``emb_dim``, H heads, D = C / H, V ``vocab_size``. Triton is needed: see
:mod:`gpt_lightning.kernels.support`.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from triton import cdiv, next_power_of_2

from gpt_lightning.kernels import decode as kernels
from gpt_lightning.model.gpt import GPTModel, TransformerBlock
from gpt_lightning.model.kv_cache import KVCache


@dataclass(frozen=True)
class TileConfig:
    """Number of weights and of warps per program. A program reads all its weights before it needs its input."""

    weights: int
    warps: int

    def rows(self, K: int) -> int:
        """Rows per program of a weight (N, K)."""
        return max(1, self.weights // next_power_of_2(K))


# the fastest values on an H200 (benchmarks/README.md)
SMALL_TILE, LARGE_TILE = 8192, 16384  # weights per program
LARGE_TILE_FROM = 1 << 22  # weights of a layer from which LARGE_TILE is used
WARPS, WARPS_TO_ADD = 4, 8  # the second for large products that are added to the residual stream
WARPS_TO_ADD_FROM = 2_500_000  # weights of such a layer
HEAD = TileConfig(16384, 4)
ATTENTION_SPAN, ATTENTION_BLOCK, ATTENTION_WARPS = 256, 256, 8  # the first two in positions


@dataclass(frozen=True)
class LinearOp:
    """Linear layer with its input and output: ``out`` (R, N) = x (R, K) @ weight.T + bias, or ``out`` += that.

    Attributes:
        norm: LayerNorm of ``x`` before the product. Its bias is then included in ``bias``.
        shift: (N,), product of the norm's weight with ``weight``.
        gelu: Whether GELU is applied to the result.
        add: Whether the result is added to ``out``.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    out: Tensor
    norm: nn.LayerNorm | None = None
    shift: Tensor | None = None
    gelu: bool = False
    add: bool = False


class FusedDecodeForward:
    """One decoding step over a cache with a ``position``. A call returns logits (R, V) and advances the position.

    The next call overwrites the logits.

    Args:
        tokens: (R,), the newest ids; negative ids are read as 0. A call overwrites them with the argmax ids.
        padding: (R,), see :meth:`GPTModel.features`.
        max_logits: (R, max_length). A call writes the maximum logit of each row to the position's column.
        argmax_ids: (R, max_length). A call writes the ids of these maxima.
    """

    def __init__(
        self,
        model: GPTModel,
        cache: KVCache,
        tokens: Tensor,
        padding: Tensor | None,
        max_logits: Tensor,
        argmax_ids: Tensor,
    ) -> None:
        config, weight = model.config, model.tok_emb.weight
        device, R, C = weight.device, len(tokens), config.emb_dim
        self._model, self._cache = model, cache
        self._tokens, self._padding = tokens, padding
        self._max_logits, self._argmax_ids = max_logits, argmax_ids
        self._pdl = supports_pdl(device)
        self._spans = cdiv(cache.max_length, ATTENTION_SPAN)

        def empty(*shape: int, dtype: torch.dtype = weight.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self._x = empty(R, C, dtype=torch.float32)
        self._qkv, self._y = empty(R, 3 * C), empty(R, C)
        self._span_values = empty(R, C * self._spans, dtype=torch.float32)
        self._span_stats = empty(R, config.n_heads * self._spans * 2, dtype=torch.float32)
        self._spans_done = torch.zeros(R, config.n_heads, dtype=torch.int32, device=device)
        programs = cdiv(config.vocab_size, HEAD.rows(C))
        self._program_max = empty(R, programs, dtype=torch.float32)
        self._program_argmax = empty(R, programs, dtype=torch.int32)

        hidden = empty(R, 4 * C)
        self._blocks = [
            self._block_ops(cast(TransformerBlock, block), hidden) for block in model.trf_blocks
        ]
        logits = empty(R, config.vocab_size)
        self._head = op_after_norm(self._x, model.final_norm, model.head_weight, None, logits)

    def _block_ops(self, block: TransformerBlock, hidden: Tensor) -> tuple[LinearOp, ...]:
        """The linear layers of a block in their order: qkv, out_proj, up, down (feed-forward)."""
        x, qkv, out = self._x, block.att.qkv, block.att.out_proj
        up, down = (cast(nn.Linear, block.ff.layers[i]) for i in (0, 2))
        return (
            op_after_norm(x, block.norm1, qkv.weight, qkv.bias, self._qkv),
            LinearOp(self._y, out.weight, out.bias, x, add=True),
            op_after_norm(x, block.norm2, up.weight, up.bias, hidden, gelu=True),
            LinearOp(hidden, down.weight, down.bias, x, add=True),
        )

    def __call__(self) -> Tensor:
        with torch.cuda.device_of(self._x):  # Triton launches kernels on the current device
            return self._step()

    def _step(self) -> Tensor:
        model, cache, position = self._model, self._cache, self._cache.position
        R, C = self._x.shape
        kernels.embed[(R,)](
            self._tokens, position, self._padding, model.tok_emb.weight, model.pos_emb.weight, self._x,
            C=C, PADDED=self._padding is not None, BLOCK=next_power_of_2(C), PDL=self._pdl,
        )  # fmt: skip
        for layer, (qkv, out_proj, up, down) in enumerate(self._blocks):
            self._linear(qkv)
            self._attention(cache.keys[layer], cache.values[layer])
            self._linear(out_proj)
            self._linear(up)
            self._linear(down)
        head, programs = self._head, self._program_max.shape[1]
        assert head.norm is not None
        kernels.head[(programs,)](
            self._x, head.weight, head.bias, head.norm.weight, head.shift, head.out,
            self._program_max, self._program_argmax, head.norm.eps, model.config.vocab_size, R,
            K=C, BLOCK_R=next_power_of_2(R), BLOCK_N=HEAD.rows(C), BLOCK_K=next_power_of_2(C),
            **self._launch_options(HEAD.warps),
        )  # fmt: skip
        kernels.finish_step[(1,)](
            self._program_max, self._program_argmax, self._max_logits, self._argmax_ids, self._tokens, position,
            programs, cache.max_length, R,
            BLOCK_R=next_power_of_2(R), BLOCK=next_power_of_2(programs), **self._launch_options(8),
        )  # fmt: skip
        return head.out

    def _linear(self, op: LinearOp) -> None:
        (N, K), R = op.weight.shape, len(op.x)
        tile = tile_config(op)
        scale, eps = (None, 0.0) if op.norm is None else (op.norm.weight, op.norm.eps)
        kernels.linear[(cdiv(N, tile.rows(K)),)](
            op.x, op.weight, op.bias, scale, op.shift, op.out, eps, N, R,
            K=K, BIAS=op.bias is not None, NORM=op.norm is not None, GELU=op.gelu, ADD=op.add,
            BLOCK_R=next_power_of_2(R), BLOCK_N=tile.rows(K), BLOCK_K=next_power_of_2(K),
            **self._launch_options(tile.warps),
        )  # fmt: skip

    def _attention(self, keys: Tensor, values: Tensor) -> None:
        """Attention of ``_qkv`` over the cache, into ``_y``. Appends the new key and value to the cache."""
        R, H, max_length, D = keys.shape
        kernels.attention[(H, R, self._spans)](
            self._qkv, keys, values, self._cache.position, self._padding, self._y,
            self._span_values, self._span_stats, self._spans_done, D**-0.5, max_length,
            C=H * D, D=D, PADDED=self._padding is not None, SPAN=ATTENTION_SPAN, BLOCK_T=ATTENTION_BLOCK,
            BLOCK_D=next_power_of_2(D), SPANS=self._spans, BLOCK_SPANS=next_power_of_2(self._spans),
            **self._launch_options(ATTENTION_WARPS),
        )  # fmt: skip

    def _launch_options(self, warps: int) -> dict[str, Any]:
        """Options of a kernel that calls ``_wait_for_previous``, and with PDL may start before that has ended."""
        pdl = {"launch_pdl": True} if self._pdl else {}
        return {"num_warps": warps, "PDL": self._pdl, **pdl}


def op_after_norm(
    x: Tensor,
    norm: nn.LayerNorm,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    gelu: bool = False,
) -> LinearOp:
    """Linear layer of LayerNorm(x). Everything that does not depend on x is computed here, once."""
    weight32 = weight.float()
    bias_after_norm = weight32 @ norm.bias.float()
    if bias is not None:
        bias_after_norm = bias_after_norm + bias.float()
    shift = weight32 @ norm.weight.float()
    return LinearOp(x, weight, bias_after_norm, out, norm, shift, gelu)


def tile_config(op: LinearOp) -> TileConfig:
    """The fastest tile of those measured on the 124M and 1558M models.

    More warps make large products that are added to the residual stream 1 % faster for one row, and all others slower.
    """
    weights, rows = op.weight.numel(), len(op.x)
    more_warps = op.add and rows == 1 and weights >= WARPS_TO_ADD_FROM
    tile = LARGE_TILE if weights >= LARGE_TILE_FROM else SMALL_TILE
    return TileConfig(tile, WARPS_TO_ADD if more_warps else WARPS)


def supports_pdl(device: torch.device) -> bool:
    """Whether the GPU has programmatic dependent launch (Hopper or newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
