"""A step of few rows by our own kernels, five a block where torch has thirteen: for NVIDIA's GPUs.

With one row a product does two operations for each weight it reads, so a step's floor is reading the weights once. What
keeps torch from it is that its products are made for many rows, and that the small kernels between them wait for
one another. What shortcuts add up to is kept in float32.

Shapes: R rows, C ``emb_dim``, H heads, D = C / H, V ``vocab_size``. Needs Triton: see
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
    """How many weights a program has, all of which it reads before it waits for what they are multiplied with."""

    weights: int
    warps: int

    def rows(self, K: int) -> int:
        """Of a weight (N, K)."""
        return max(1, self.weights // next_power_of_2(K))


# measured on an H200 (benchmarks/README.md)
SMALL, LARGE, LARGE_FROM = 8192, 16384, 1 << 22  # weights of a program, and of a layer
WARPS, WARPS_TO_ADD, WARPS_FROM = (
    4,
    8,
    2_500_000,
)  # of what adds to a shortcut, from so many weights on
HEAD = TileConfig(16384, 4)
ATTENTION_SPAN, ATTENTION_BLOCK, ATTENTION_WARPS = 256, 256, 8  # positions


@dataclass(frozen=True)
class LinearOp:
    """``out`` (R, N) becomes x (R, K) times weight (N, K), or has it added to what it holds.

    After a norm ``bias`` has the product with the norm's bias in it, and ``shift`` (N,) is that with its weight.
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
    """The step over a cache whose ``at`` says where it is; called, it advances it by one.

    Args:
        tokens: The newest ids (R,), those below 0 mean nothing; a call writes the likeliest next ones into it.
        padding: (R,), see :meth:`GPTModel.features`.
        largest: (R, T_max), of which a call writes the position's, the largest of its logits.
        likeliest: (R, T_max), the ids of these.

    A call returns logits (R, V), which the next one overwrites.
    """

    def __init__(
        self,
        model: GPTModel,
        cache: KVCache,
        tokens: Tensor,
        padding: Tensor | None,
        largest: Tensor,
        likeliest: Tensor,
    ) -> None:
        config, weight = model.config, model.tok_emb.weight
        device, R, C = weight.device, len(tokens), config.emb_dim
        self._model, self._cache = model, cache
        self._tokens, self._padding = tokens, padding
        self._largest, self._likeliest = largest, likeliest
        self._early = is_hopper_or_newer(device)
        self._spans = cdiv(cache.max_length, ATTENTION_SPAN)

        def empty(*shape: int, dtype: torch.dtype = weight.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self._x = empty(R, C, dtype=torch.float32)
        self._qkv, self._y = empty(R, 3 * C), empty(R, C)
        self._sums = empty(R, C * self._spans, dtype=torch.float32)
        self._totals = empty(R, config.n_heads * self._spans * 2, dtype=torch.float32)
        self._done = torch.zeros(R, config.n_heads, dtype=torch.int32, device=device)
        programs = cdiv(config.vocab_size, HEAD.rows(C))
        self._best = empty(R, programs, dtype=torch.float32)
        self._best_ids = empty(R, programs, dtype=torch.int32)

        hidden = empty(R, 4 * C)
        self._products = [
            self._of_block(cast(TransformerBlock, block), hidden) for block in model.trf_blocks
        ]
        logits = empty(R, config.vocab_size)
        self._head = after_norm(self._x, model.final_norm, model.head_weight, None, logits)

    def _of_block(self, block: TransformerBlock, hidden: Tensor) -> tuple[LinearOp, ...]:
        """In their order: qkv, out_proj, and the feed-forward network's two."""
        x, qkv, out = self._x, block.att.qkv, block.att.out_proj
        widen, narrow = (cast(nn.Linear, block.ff.layers[i]) for i in (0, 2))
        return (
            after_norm(x, block.norm1, qkv.weight, qkv.bias, self._qkv),
            LinearOp(self._y, out.weight, out.bias, x, add=True),
            after_norm(x, block.norm2, widen.weight, widen.bias, hidden, gelu=True),
            LinearOp(hidden, narrow.weight, narrow.bias, x, add=True),
        )

    def __call__(self) -> Tensor:
        with torch.cuda.device_of(self._x):  # Triton launches on the current one
            return self._step()

    def _step(self) -> Tensor:
        model, cache, at = self._model, self._cache, self._cache.at
        R, C = self._x.shape
        kernels.embed[(R,)](
            self._tokens, at, self._padding, model.tok_emb.weight, model.pos_emb.weight, self._x,
            C=C, PADDED=self._padding is not None, BLOCK=next_power_of_2(C), EARLY=self._early,
        )  # fmt: skip
        for layer, (qkv, out_proj, widen, narrow) in enumerate(self._products):
            self._multiply(qkv)
            self._attend(cache.keys[layer], cache.values[layer])
            self._multiply(out_proj)
            self._multiply(widen)
            self._multiply(narrow)
        of, n = self._head, self._best.shape[1]
        assert of.norm is not None
        kernels.head[(n,)](
            self._x, of.weight, of.bias, of.norm.weight, of.shift, of.out, self._best, self._best_ids,
            of.norm.eps, model.config.vocab_size, R,
            K=C, BLOCK_R=next_power_of_2(R), BLOCK_N=HEAD.rows(C), BLOCK_K=next_power_of_2(C),
            **self._launched(HEAD.warps),
        )  # fmt: skip
        kernels.finish[(1,)](
            self._best, self._best_ids, self._largest, self._likeliest, self._tokens, at,
            n, cache.max_length, R,
            BLOCK_R=next_power_of_2(R), BLOCK=next_power_of_2(n), **self._launched(8),
        )  # fmt: skip
        return of.out

    def _multiply(self, of: LinearOp) -> None:
        (N, K), R = of.weight.shape, len(of.x)
        tile = tile_of(of)
        scale, eps = (None, 0.0) if of.norm is None else (of.norm.weight, of.norm.eps)
        kernels.linear[(cdiv(N, tile.rows(K)),)](
            of.x, of.weight, of.bias, scale, of.shift, of.out, eps, N, R,
            K=K, BIAS=of.bias is not None, NORM=of.norm is not None, GELU=of.gelu, ADD=of.add,
            BLOCK_R=next_power_of_2(R), BLOCK_N=tile.rows(K), BLOCK_K=next_power_of_2(K),
            **self._launched(tile.warps),
        )  # fmt: skip

    def _attend(self, keys: Tensor, values: Tensor) -> None:
        """``_qkv`` → ``_y``, by way of the cache."""
        R, H, T, D = keys.shape
        kernels.attention[(H, R, self._spans)](
            self._qkv, keys, values, self._cache.at, self._padding, self._y,
            self._sums, self._totals, self._done, D**-0.5, T,
            C=H * D, D=D, PADDED=self._padding is not None, SPAN=ATTENTION_SPAN, BLOCK_T=ATTENTION_BLOCK,
            BLOCK_D=next_power_of_2(D), SPANS=self._spans, BLOCK_SPANS=next_power_of_2(self._spans),
            **self._launched(ATTENTION_WARPS),
        )  # fmt: skip

    def _launched(self, warps: int) -> dict[str, Any]:
        """How a kernel is that waits for the one before it, by itself where it may start early."""
        early = {"launch_pdl": True} if self._early else {}
        return {"num_warps": warps, "EARLY": self._early, **early}


def after_norm(
    x: Tensor,
    norm: nn.LayerNorm,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    gelu: bool = False,
) -> LinearOp:
    """The product of ``x`` normalised, of which all that does not depend on x is computed here."""
    wide = weight.float()
    shifted = wide @ norm.bias.float()
    if bias is not None:
        shifted = shifted + bias.float()
    return LinearOp(x, weight, shifted, out, norm, wide @ norm.weight.float(), gelu)


def tile_of(product: LinearOp) -> TileConfig:
    """By what was measured of the 124M and the 1558M: what adds to a shortcut gains 1 % by more warps in the larger one,
    of one row, and loses in all else."""
    weights, rows = product.weight.numel(), len(product.x)
    more = product.add and rows == 1 and weights >= WARPS_FROM
    return TileConfig(LARGE if weights >= LARGE_FROM else SMALL, WARPS_TO_ADD if more else WARPS)


def is_hopper_or_newer(device: torch.device) -> bool:
    """Whether a kernel may start before the one before it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
