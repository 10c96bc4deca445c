"""Memory of a training step on one device, by formula.

Letters: B windows of T tokens, N = B·T tokens; C ``emb_dim``, H heads, V ``vocab_size``, L blocks. A value takes
w bytes in weights and a bytes in activations (with autocast w is 4 and a is 2, else both are the same).

A step holds most at one of these moments: in the loss's forward pass, at the start of the backward pass, in the
backward pass of the last or first block or of the embeddings, or in the optimizer step. Each moment is a sum of
products of the letters, and the largest moment is the answer. Only tensors are counted: not what an allocator
rounds up or keeps, nor the workspaces that kernels allocate and free.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, NamedTuple

import torch

from gpt_lightning.model import flops as cost
from gpt_lightning.model.config import GPTConfig
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


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes on one device at one moment of a step.

    Attributes:
        weights: Of the model, or this device's shard of them.
        moments: The optimizer's state: AdamW's two per weight.
        ema: Of the weights' average, at least 4 bytes each.
        gradients: As ``weights``; those of the step before stay until the backward pass begins.
        copies: Weights in the precision that autocast computes in.
        gathered: FSDP2's complete weights, and its complete gradients between micro-batches.
        activations: What blocks, embeddings and the last norm keep for the backward pass.
        loss: Logits, their softmax and gradient; with chunks the gradients by features and head.
        backward: Gradients by activations, and gradients by weights that are not added up yet.
        optimizer_step: What Muon, or an optimizer that is not fused, adds.
        phase: "loss", "backward" or "optimizer step".
    """

    weights: int
    moments: int
    ema: int = 0
    gradients: int = 0
    copies: int = 0
    gathered: int = 0
    activations: int = 0
    loss: int = 0
    backward: int = 0
    optimizer_step: int = 0
    phase: str = ""

    @property
    def total(self) -> int:
        return (
            self.weights + self.moments + self.ema + self.gradients + self.copies + self.gathered
            + self.activations + self.loss + self.backward + self.optimizer_step
        )  # fmt: skip


def step_memory(shape: StepShape) -> MemoryBreakdown:
    """Memory at the moment of a step that holds most, after the first step."""
    return max(_moments(shape), key=lambda moment: moment.total)


def _itemsizes(precision: str) -> tuple[int, int, bool]:
    """Bytes w of a weight, bytes a of an activation, and whether autocast is on."""
    dtype, low = PRECISIONS[precision]
    return dtype.itemsize, (low or dtype).itemsize, low is not None


def _moments(shape: StepShape) -> Iterator[MemoryBreakdown]:
    """The moments of a step at which its memory can be highest, in their order."""
    yield _end_of_forward(shape)
    if shape.loss_chunk_size is None:
        yield from _start_of_backward(shape)
    for done in (0, shape.config.n_layers - 1):
        yield from _backward_of_block(shape, done)
    yield _backward_of_embeddings(shape)
    if shape.shards > 1:
        yield _reduction_of_rest(shape)
    yield _optimizer_step(shape)


# --- what several moments have in common ----------------------------------------------------------


class _Letters(NamedTuple):
    """The letters of this module's docstring that are not in :class:`StepShape`."""

    C: int
    V: int
    L: int
    N: int
    w: int
    a: int
    mixed: bool


def _letters(shape: StepShape) -> _Letters:
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


def _parameters(shape: StepShape) -> _Parameters:
    L, block = shape.config.n_layers, cost.block_parameters(shape.config)
    rest = cost.parameters(shape.config) - L * block
    block_share, rest_share = ceil(block / shape.shards), ceil(rest / shape.shards)
    return _Parameters(block, rest, block_share, rest_share, L * block_share + rest_share)


def _weights_and_moments(shape: StepShape) -> MemoryBreakdown:
    """What a device holds at every moment."""
    w, share = _letters(shape).w, _parameters(shape).share
    if shape.state_values is None:
        moments = 2 * w * share
    else:
        moments = w * ceil(shape.state_values / shape.shards)
    ema = max(4, w) * share * shape.ema
    return MemoryBreakdown(weights=w * share, moments=moments, ema=ema)


def _old_gradients(shape: StepShape) -> int:
    """Gradients during the forward pass: those of the step or micro-batch before, which are zeroed after it.

    Between micro-batches FSDP2 has complete ones, see :func:`_gathered`, and a shard of the rest's.
    """
    w, p = _letters(shape).w, _parameters(shape)
    return w * (p.rest_share if shape.shards > 1 and shape.accumulate else p.share)


def _gradients_at_backward(shape: StepShape) -> int:
    """Gradients when the backward pass begins; FSDP2 keeps a shard of the rest's until it gets to them."""
    if shape.accumulate:
        return _old_gradients(shape)
    return _letters(shape).w * _parameters(shape).rest_share * (shape.shards > 1)


def _gathered(shape: StepShape) -> int:
    """FSDP2's complete weights: the rest's all the time, the blocks' one by one.

    With several micro-batches also the complete gradients, until the last one reduces and shards them.
    """
    if shape.shards == 1:
        return 0
    w, a, p = _letters(shape).w, _letters(shape).a, _parameters(shape)
    gradients = w * (p.rest + shape.config.n_layers * p.block) * shape.accumulate
    return a * (p.rest + p.block) + gradients


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


def _copies(shape: StepShape) -> _Copies:
    C, V, L, _, _, a, mixed = _letters(shape)
    if not mixed or shape.shards > 1:
        return _Copies(0, 0, 0)
    matrices, norms = 12 * C * C, 4 * C
    forward = L * (_parameters(shape).block - norms) * a
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


def _activations(shape: StepShape) -> _Activations:
    C, _, L, N, w, _, _ = _letters(shape)
    in_block = N * _block_bytes_per_token(shape)
    of_block = N * C * w if shape.activation_checkpointing else in_block
    statistics = 2 * max(4, w)
    mask = N * _mask_bytes(shape, w) * C * (shape.config.embedding_drop_rate > 0)
    total = L * of_block + N * (C * w + statistics) + mask
    return _Activations(in_block, of_block, mask, total, N * C * w)


# --- the moments ----------------------------------------------------------------------------------


def _end_of_forward(shape: StepShape) -> MemoryBreakdown:
    """The loss's forward pass, while all activations and the gradients of the step before are there."""
    copies, activations = _copies(shape), _activations(shape)
    if shape.loss_chunk_size is None:
        loss = _logit_bytes(shape)[0] * _logits(shape) + _cast_features(shape)
    else:
        loss = _chunked_loss(shape)[0]
    return replace(
        _weights_and_moments(shape),
        gradients=_old_gradients(shape),
        copies=copies.forward + copies.head,
        gathered=_gathered(shape),
        activations=activations.total + activations.features,
        loss=loss,
        phase="loss",
    )


def _start_of_backward(shape: StepShape) -> Iterator[MemoryBreakdown]:
    """The loss's backward pass without chunks: first inside the loss, then in the product with the head."""
    C, V, L, N, _, a, mixed = _letters(shape)
    copies, activations = _copies(shape), _activations(shape)
    blocks = 0 if shape.activation_checkpointing else L * copies.block
    inside_loss = _logit_bytes(shape)[1] * _logits(shape)
    # the gradients by logits (N, V), by features (N, C) and by the head (V, C)
    by_head = a * (N * V + N * C + V * C)
    for loss in (inside_loss, by_head):
        yield replace(
            _weights_and_moments(shape),
            gradients=_gradients_at_backward(shape),
            copies=blocks + copies.head,
            gathered=_gathered(shape),
            activations=activations.total + activations.features * (not mixed),
            loss=loss + _cast_features(shape),
            phase="loss",
        )


def _logits(shape: StepShape) -> int:
    return _letters(shape).N * shape.config.vocab_size


def _logit_bytes(shape: StepShape) -> tuple[int, int]:
    """Bytes per logit in the loss's forward and backward pass.

    Logits and their log-softmax, then also the gradients by both. Autocast computes the loss in float32: a GPU
    casts the log-softmax, a CPU the logits.
    """
    w, mixed = _letters(shape).w, _letters(shape).mixed
    if not mixed:
        return 2 * w, 3 * w
    return (8, 10) if shape.device == "cuda" else (10, 12)


def _cast_features(shape: StepShape) -> int:
    """Bytes of the features (N, C) that autocast has cast for the head."""
    C, _, _, N, _, a, mixed = _letters(shape)
    return N * C * a * mixed


def _backward_of_block(shape: StepShape, done: int) -> Iterator[MemoryBreakdown]:
    """The backward pass of a block's feed-forward, then of its attention, after ``done`` other blocks.

    Of the last block (0 done), because all activations are there, and of the first, because all gradients are.
    """
    C, V, L, N, w, a, mixed = _letters(shape)
    p, activations, sharded = _parameters(shape), _activations(shape), shape.shards > 1
    left = L - done
    untied_head = 0 if shape.config.tied_embeddings or sharded else V * C
    gradients = w * (done * p.block_share + 2 * C + untied_head)
    # FSDP2 has the next block prefetched and the gradients of the one before being reduced
    in_transit = p.block * sharded * (a * (done < L - 1) + w * (done > 0))
    # with activation checkpointing the block has computed its activations again
    computed_again = (activations.in_block - N * C * w) * shape.activation_checkpointing
    kept = left * activations.of_block + activations.embedding_mask + computed_again
    # widest are the gradients by the feed-forward's 4C hidden values, beside those by its output (autocast:
    # cast) and by its matrix of 4C²
    feed_forward = N * C * (w + a * mixed + 4 * a) + 4 * C * C * a
    attention = N * (C * (w + a) + 2 * _attention_matrix_bytes(shape))
    moment = replace(
        _weights_and_moments(shape),
        gradients=_gradients_at_backward(shape) if shape.accumulate else gradients,
        copies=_copies(shape).block * (1 if shape.activation_checkpointing else left),
        gathered=_gathered(shape) + in_transit,
        phase="backward",
    )
    waiting = _waiting_head_gradient(shape)
    yield replace(moment, activations=kept, backward=waiting + feed_forward)
    # before attention's turn the feed-forward's tensors are freed: its norm's input (C) and 9C
    kept -= N * C * (w + 9 * a)
    yield replace(moment, activations=kept, backward=waiting + attention)


def _waiting_head_gradient(shape: StepShape) -> int:
    """Bytes of the head's gradient, if it has to wait for the embedding's: a tied head's, and FSDP2's."""
    if not shape.config.tied_embeddings and (shape.shards == 1 or shape.accumulate):
        return 0
    if shape.loss_chunk_size is None:
        return _letters(shape).w * shape.config.vocab_size * shape.config.emb_dim
    return _chunked_loss(shape)[1]


def _backward_of_embeddings(shape: StepShape) -> MemoryBreakdown:
    """The end of the backward pass: a dense gradient (V, C) of the gradient (N, C), and its sum with a tied head's."""
    C, V, L, N, w, a, _ = _letters(shape)
    p, sharded, tied = _parameters(shape), shape.shards > 1, shape.config.tied_embeddings
    gradients = w * (L * p.block_share + (p.rest_share if sharded or not tied else 0))
    embedding = w * (N * C + V * C + V * C * tied)
    return replace(
        _weights_and_moments(shape),
        gradients=_gradients_at_backward(shape) if shape.accumulate else gradients,
        gathered=(a + w * shape.accumulate) * p.rest * sharded,
        backward=_waiting_head_gradient(shape) + embedding,
        phase="backward",
    )


def _reduction_of_rest(shape: StepShape) -> MemoryBreakdown:
    """FSDP2 reduces the rest's gradients together: complete ones and a copy, without the weights."""
    w, p = _letters(shape).w, _parameters(shape)
    return replace(
        _weights_and_moments(shape),
        gradients=w * p.share,
        gathered=2 * w * p.rest,
        phase="backward",
    )


def _optimizer_step(shape: StepShape) -> MemoryBreakdown:
    """The optimizer step; float16's is not fused on a GPU and takes one value per weight more.

    On a CPU an optimizer that is not fused takes two values more per weight of one parameter at a time.
    """
    stored = _weights_and_moments(shape)
    unfused = shape.precision == "16-mixed" or not shape.fused
    if shape.device == "cuda":
        temporary = stored.weights * unfused
    else:
        largest = shape.config.vocab_size * shape.config.emb_dim
        temporary = 2 * _letters(shape).w * ceil(largest / shape.shards) * (not shape.fused)
    return replace(
        stored,
        gradients=stored.weights,
        optimizer_step=max(temporary, _muon_products(shape) * shape.muon),
        phase="optimizer step",
    )


def _muon_products(shape: StepShape) -> int:
    """Bytes of Muon's step on query, key and value, in the products' type of p bytes.

    The update of 3C², and in a Newton–Schulz step five of that size; or a matrix of 4C² beside its direction in
    the weights' type. A CPU's products in bfloat16 take a workspace, which is largest for a matrix of 4C².
    """
    C, _, _, _, w, _, _ = _letters(shape)
    dtype, low = PRECISIONS[shape.precision]
    p = 4 if (low or dtype) == torch.float16 else (low or dtype).itemsize
    products = (25 if p == 2 and shape.device == "cpu" else 15) * p
    return C * C * max(products, 4 * (w + 2 * p))


# --- what blocks and the loss keep ----------------------------------------------------------------


def _mask_bytes(shape: StepShape, itemsize: int) -> int:
    """Bytes of a value of a dropout mask: a GPU keeps a bool, a CPU the mask in the values' type."""
    return 1 if shape.device == "cuda" else itemsize


def _attention_matrix_bytes(shape: StepShape) -> int:
    """Bytes per token of a (T, T) matrix of all heads; 0: the device's fused kernel keeps none.

    A CPU keeps it with dropout (then in float32), and where two products are faster than the fused kernel.
    """
    if shape.device == "cuda":
        return 0
    a = _itemsizes(shape.precision)[1]
    if _attends_by_products(shape):
        return shape.config.n_heads * shape.length * a
    has_dropout = shape.config.attention_drop_rate > 0
    return shape.config.n_heads * shape.length * max(a, 4) * has_dropout


def _attends_by_products(shape: StepShape) -> bool:
    """Whether ``explicit_causal_attention`` runs: on a CPU, for short windows in bfloat16."""
    dtype, low = PRECISIONS[shape.precision]
    return shape.device == "cpu" and (low or dtype) == torch.bfloat16 and shape.length <= 512


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
    if matrix := _attention_matrix_bytes(shape):
        has_dropout = config.attention_drop_rate > 0
        itemsize = a if _attends_by_products(shape) else max(a, 4)
        attention = 3 * C * itemsize + matrix * (3 if has_dropout else 1)
    masks = 2 * C * _mask_bytes(shape, a) * (config.drop_rate > 0)
    return norms + products + attention + masks


def _chunked_loss(shape: StepShape) -> tuple[int, int]:
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
