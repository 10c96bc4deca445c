"""Bytes of the parts of a training step: weights, copies, what waits for the backward pass, the loss, Muon.

Letters: B windows of T tokens, N = B·T tokens; C ``emb_dim``, H heads, V ``vocab_size``, L blocks. A value takes
w bytes in weights and a bytes in activations (with autocast w is 4 and a is 2, else both are the same).
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple

import torch

from gpt_lightning.model import flops as cost
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.cpu_attention import (
    MAX_KEPT_LENGTH,
    attention_weights_of_blocks,
)
from gpt_lightning.model.loss import PAD_VOCABULARY_TO
from gpt_lightning.model.precision import PRECISIONS

DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class StepShape:
    """What decides a step's memory on one device.

    Attributes:
        batch_size: B, windows of one micro-batch.
        length: T, tokens of a window.
        precision: A key of :data:`PRECISIONS`.
        accumulate: Whether a step has several micro-batches, so that gradients exist from its start.
        device: Whose kernels and whose autocast.
        loss_kernel: Whether the GPU runs our kernel of a chunk's loss, as NVIDIA's do from Ampere on.
        ema: Whether an exponential moving average of the weights is kept.
        shards: Devices over which FSDP2 spreads weights, gradients and moments; 1: each holds all.
        state_values: Values that the optimizer keeps for the model; ``None``: AdamW's two for each weight.
        muon: Whether the optimizer step has Muon's matrix products.
        fused: Whether one operation of the optimizer updates a parameter, without a copy of it.
    """

    config: GPTConfig
    batch_size: int
    length: int
    precision: str = "32-true"
    loss_chunk_size: int | None = None
    activation_checkpointing: bool = False
    accumulate: bool = False
    device: DeviceType = "cpu"
    loss_kernel: bool = True
    shards: int = 1
    state_values: int | None = None
    muon: bool = False
    fused: bool = True
    ema: bool = False


def _itemsizes(precision: str) -> tuple[int, int, bool]:
    """Bytes w of a weight, bytes a of an activation, and whether autocast is on."""
    dtype, low = PRECISIONS[precision]
    return dtype.itemsize, (low or dtype).itemsize, low is not None


class _Letters(NamedTuple):
    """The letters of this module's docstring that are not in :class:`StepShape`."""

    C: int
    V: int
    L: int
    N: int
    w: int
    a: int
    mixed: bool


def letters(shape: StepShape) -> _Letters:
    config = shape.config
    N = shape.batch_size * shape.length
    return _Letters(
        config.emb_dim, config.vocab_size, config.n_layers, N, *_itemsizes(shape.precision)
    )


class _Parameters(NamedTuple):
    """Numbers of parameters.

    Attributes:
        block: Of one block.
        rest: Of the embeddings (V + positions)·C, a separate head V·C and the last norm 2C.
        block_share, rest_share: This device's share of them; FSDP2 rounds each up.
        share: This device's share of the model.
    """

    block: int
    rest: int
    block_share: int
    rest_share: int
    share: int


def parameter_counts(shape: StepShape) -> _Parameters:
    L, block = shape.config.n_layers, cost.block_parameters(shape.config)
    rest = cost.parameters(shape.config) - L * block
    block_share, rest_share = ceil(block / shape.shards), ceil(rest / shape.shards)
    return _Parameters(block, rest, block_share, rest_share, L * block_share + rest_share)


class _Copies(NamedTuple):
    """Bytes of the weights that autocast has cast; with FSDP2 the gathered weights have that type already.

    Attributes:
        forward: All blocks' until the forward pass ends: four matrices of 12C² and biases of 8C + 3C each.
        block: One block's matrices, which its backward pass needs.
        head: The head's V·C; the loss by chunks has its own.
    """

    forward: int
    block: int
    head: int


def autocast_copies(shape: StepShape) -> _Copies:
    C, V, L, _, _, a, mixed = letters(shape)
    if not mixed or shape.shards > 1:
        return _Copies(0, 0, 0)
    matrices, norms = 12 * C * C, 4 * C
    forward = L * (parameter_counts(shape).block - norms) * a
    return _Copies(forward, a * matrices, a * V * C * (shape.loss_chunk_size is None))


class _Activations(NamedTuple):
    """Bytes that wait for the backward pass.

    Attributes:
        in_block: All that one block needs for its backward pass.
        of_block: What it keeps until then: the same, or its input N·C with activation checkpointing.
        embedding_mask: Dropout's mask of the embeddings.
        total: Of all blocks, that mask, and the last norm's input and statistics (its mean and 1/σ).
        features: The last norm's output.
    """

    in_block: int
    of_block: int
    embedding_mask: int
    total: int
    features: int


def kept_activations(shape: StepShape) -> _Activations:
    C, _, L, N, w, _, _ = letters(shape)
    in_block = N * _block_bytes_per_token(shape)
    of_block = N * C * w if shape.activation_checkpointing else in_block
    statistics = 2 * max(4, w)
    mask = N * mask_bytes(shape, w) * C * (shape.config.embedding_drop_rate > 0)
    total = L * of_block + N * (C * w + statistics) + mask
    return _Activations(in_block, of_block, mask, total, N * C * w)


def logit_count(shape: StepShape) -> int:
    return letters(shape).N * shape.config.vocab_size


def bytes_per_logit(shape: StepShape) -> tuple[int, int]:
    """Bytes per logit in the loss's forward and backward pass.

    Logits and their log-softmax, then also the gradients by both. Autocast computes the loss in float32: a GPU
    casts the log-softmax, a CPU the logits.
    """
    w, mixed = letters(shape).w, letters(shape).mixed
    if not mixed:
        return 2 * w, 3 * w
    return (8, 10) if shape.device == "cuda" else (10, 12)


def cast_features(shape: StepShape) -> int:
    """Bytes of the features (N, C) that autocast has cast for the head."""
    C, _, _, N, _, a, mixed = letters(shape)
    return N * C * a * mixed


def muon_products(shape: StepShape) -> int:
    """Bytes of Muon's step on query, key and value, in the products' type of p bytes.

    The update of 3C², and in a Newton–Schulz step five of that size; or a matrix of 4C² beside its direction in
    the weights' type. A CPU's products in bfloat16 take a workspace, which is largest for a matrix of 4C².
    """
    C, _, _, _, w, _, _ = letters(shape)
    dtype, low = PRECISIONS[shape.precision]
    p = 4 if (low or dtype) == torch.float16 else (low or dtype).itemsize
    products = (25 if p == 2 and shape.device == "cpu" else 15) * p
    return C * C * max(products, 4 * (w + 2 * p))


def mask_bytes(shape: StepShape, itemsize: int) -> int:
    """Bytes of a value of a dropout mask: a GPU keeps a bool, a CPU the mask in the values' type."""
    return 1 if shape.device == "cuda" else itemsize


def attention_matrix_bytes(shape: StepShape) -> int:
    """Bytes per token of the attention weights of all heads; 0: the device's fused kernel keeps none.

    A CPU keeps them with dropout (then in float32), and where products by blocks are faster than the fused kernel.
    """
    if shape.device == "cuda":
        return 0
    a = _itemsizes(shape.precision)[1]
    if _keeps_attention_of_blocks(shape):
        return (
            shape.config.n_heads
            * sum(attention_weights_of_blocks(shape.length))
            * a
            // shape.length
        )
    has_dropout = shape.config.attention_drop_rate > 0
    return shape.config.n_heads * shape.length * max(a, 4) * has_dropout


def attention_gradient_bytes(shape: StepShape) -> int:
    """Bytes per token that attention's backward pass takes for all heads.

    Of the attention weights and their gradients those that exist at once: all, or of a block of queries. Where the
    weights are computed again, also copies of q, k, v and the output's gradient, and the first three's gradients.
    """
    a = _itemsizes(shape.precision)[1]
    largest = max(attention_weights_of_blocks(shape.length))
    block = shape.config.n_heads * largest * a // shape.length
    if _recomputes_attention(shape):
        return 3 * block + 7 * shape.config.emb_dim * a
    if _keeps_attention_of_blocks(shape):
        return 2 * block
    return 2 * attention_matrix_bytes(shape)


def _keeps_attention_of_blocks(shape: StepShape) -> bool:
    """Whether ``kept_causal_attention`` runs: on a CPU in bfloat16, for short windows."""
    return _is_bfloat16_on_cpu(shape) and shape.length <= MAX_KEPT_LENGTH


def _recomputes_attention(shape: StepShape) -> bool:
    """Whether ``RecomputedCausalAttention`` runs: on a CPU in bfloat16, for longer windows without dropout."""
    has_dropout = shape.config.attention_drop_rate > 0
    return _is_bfloat16_on_cpu(shape) and shape.length > MAX_KEPT_LENGTH and not has_dropout


def _is_bfloat16_on_cpu(shape: StepShape) -> bool:
    dtype, low = PRECISIONS[shape.precision]
    return shape.device == "cpu" and (low or dtype) == torch.bfloat16


def _block_bytes_per_token(shape: StepShape) -> int:
    """What one block keeps of a token for its backward pass.

    Inputs of both norms (2C) and their statistics; inputs of the four products (C, C, C and 4C) and of GELU
    (4C); q, k and v (3C); attention's logsumexp (H in float32) or its matrices: the softmax, and with dropout its
    mask and their product; the masks of two dropouts (2C).
    """
    config = shape.config
    C, H = config.emb_dim, config.n_heads
    w, a, _ = _itemsizes(shape.precision)
    norms = 2 * (C * w + 2 * max(4, w))
    products = 11 * C * a
    attention = 3 * C * a + H * max(4, w)
    if matrix := attention_matrix_bytes(shape):
        has_dropout = config.attention_drop_rate > 0
        itemsize = a if _keeps_attention_of_blocks(shape) else max(a, 4)
        attention = 3 * C * itemsize + matrix * (3 if has_dropout else 1)
    masks = 2 * C * mask_bytes(shape, a) * (config.drop_rate > 0)
    return norms + products + attention + masks


def chunked_loss(shape: StepShape) -> tuple[int, int]:
    """Bytes of the loss by chunks of n tokens at its peak, and of the head's gradient that it leaves.

    d bytes a value: as activations, but 4 for float16. All the time: the gradients by features (N, C) and head
    (V, C), the latter in float32 or more; copies of features and head where they have another type or are
    padded. A chunk: logits (n, V), which become their gradient by our kernel; without it a 16-bit chunk also
    takes (n, V) in float32 and the gradient cast back.
    """
    assert shape.loss_chunk_size is not None
    dtype, low = PRECISIONS[shape.precision]
    N, C = shape.batch_size * shape.length, shape.config.emb_dim
    w, a, _ = _itemsizes(shape.precision)
    d = 4 if (low or dtype) == torch.float16 else a
    cuda = shape.device == "cuda"
    V = shape.config.vocab_size
    padded = V + -V % PAD_VOCABULARY_TO if cuda else V
    n = min(shape.loss_chunk_size, N)
    head_gradient = padded * C * max(w, 4)
    head_is_copied = padded != V or d != (a if shape.shards > 1 else w)
    always = N * C * w + head_gradient + padded * C * d * head_is_copied + N * C * d * (d != w)
    logits = n * padded * d
    in_float32 = cast = 0
    if d < 4 and not (cuda and shape.loss_kernel):
        in_float32, cast = n * padded * 4, logits
    # beside a chunk's gradient: its product with the head (n, C), on a CPU with the features (V, C), in the end
    # the head's gradient as the weights are
    product = max(n * C * d, padded * C * d * (d < max(w, 4) and not cuda))
    final = V * C * w * (w < 4)
    # the float32 values of a chunk are freed only when those of the next chunk exist
    chunk_before = in_float32 if n < N else 0
    peak = logits + cast + in_float32 + max(chunk_before, product, final)
    return always + peak, head_gradient if w >= 4 else V * C * w
