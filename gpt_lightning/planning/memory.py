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
from typing import Literal

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
        shards: Devices over which FSDP2 spreads weights, gradients and moments; 1: each holds all.
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


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes on one device at one moment of a step.

    Attributes:
        weights: Of the model, or this device's shard of them.
        moments: AdamW's two per weight.
        gradients: As ``weights``; those of the step before stay until the backward pass begins.
        copies: Weights in the precision that autocast computes in.
        gathered: FSDP2's complete weights, and its complete gradients between micro-batches.
        activations: What blocks, embeddings and the last norm keep for the backward pass.
        loss: Logits, their softmax and gradient; with chunks the gradients by features and head.
        backward: Gradients by activations, and gradients by weights that are not added up yet.
        optimizer_step: What an optimizer that is not fused adds.
        phase: "loss", "backward" or "optimizer step".
    """

    weights: int
    moments: int
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
            self.weights + self.moments + self.gradients + self.copies + self.gathered
            + self.activations + self.loss + self.backward + self.optimizer_step
        )  # fmt: skip


def step_memory(shape: StepShape) -> MemoryBreakdown:
    """Memory at the moment of a step that holds most, once the run is under way."""
    return max(_moments(shape), key=lambda moment: moment.total)


def _itemsizes(precision: str) -> tuple[int, int, bool]:
    """Bytes w of a weight, bytes a of an activation, and whether autocast is on."""
    dtype, low = PRECISIONS[precision]
    return dtype.itemsize, (low or dtype).itemsize, low is not None


def _moments(shape: StepShape) -> Iterator[MemoryBreakdown]:
    """The moments of a step at which its memory can be highest."""
    config, chunked = shape.config, shape.loss_chunk_size is not None
    C, V, L = config.emb_dim, config.vocab_size, config.n_layers
    N = shape.batch_size * shape.length
    w, a, mixed = _itemsizes(shape.precision)
    accumulate, sharded, tied = shape.accumulate, shape.shards > 1, config.tied_embeddings

    # parameters: of one block, and of the rest: embeddings (V + positions)·C, head V·C, last norm 2C
    block = cost.block_parameters(config)
    rest = cost.parameters(config) - L * block
    block_share, rest_share = ceil(block / shape.shards), ceil(rest / shape.shards)
    share = L * block_share + rest_share
    empty = MemoryBreakdown(weights=w * share, moments=2 * w * share)

    # gradients: all of them wait for the next forward pass, which ends before they are zeroed. FSDP2 keeps
    # complete ones until the last micro-batch, and a shard of the rest's until its own backward pass
    gradients, gathered = w * share, 0
    if sharded:
        gathered = a * (rest + block)  # the rest all the time, blocks one by one
        if accumulate:
            gradients = w * rest_share
            gathered += w * (rest + L * block)
    at_backward = gradients if accumulate else w * rest_share * sharded

    # autocast's copies: four matrices of 12C² a block, and 8C + 3C biases, which it keeps until its forward
    # pass ends; the head's V·C
    matrices, biases = 12 * C * C, block - 12 * C * C - 4 * C
    head_copy = a * V * C * (mixed and not chunked and not sharded)
    block_copies = a * matrices * (mixed and not sharded)
    forward_copies = L * (matrices + biases) * a * (mixed and not sharded)
    backward_copies = 0 if shape.activation_checkpointing else L * block_copies

    # activations: a block keeps all that its backward pass needs, or its input N·C alone
    in_block = N * _block_bytes_per_token(shape)
    of_block = N * C * w if shape.activation_checkpointing else in_block
    statistics = 2 * max(4, w)  # a norm's mean and 1/σ
    embedding_mask = _mask_bytes(shape, w) * C * (config.embedding_drop_rate > 0)
    activations = L * of_block + N * (C * w + statistics + embedding_mask)
    features = N * C * w  # the last norm's output

    if chunked:
        at_loss, head_gradient = _chunked_loss(shape)
        yield replace(
            empty, gradients=gradients, copies=forward_copies, gathered=gathered,
            activations=activations + features, loss=at_loss, phase="loss",
        )  # fmt: skip
    else:
        # bytes of a logit: at the end of the forward pass logits and their log-softmax, then the gradients by
        # both beside it. Autocast computes the loss in float32: a GPU casts the log-softmax, a CPU the logits
        forward, backward = 2 * w, 3 * w
        if mixed:
            forward, backward = (8, 10) if shape.device == "cuda" else (10, 12)
        cast_features = N * C * a * mixed
        head_gradient = w * V * C
        yield replace(
            empty, gradients=gradients, copies=forward_copies + head_copy, gathered=gathered,
            activations=activations + features, loss=forward * N * V + cast_features, phase="loss",
        )  # fmt: skip
        # the last: the gradients by logits (N, V), by features (N, C) and by the head (V, C)
        for loss in (backward * N * V, a * (N * V + N * C + V * C)):
            yield replace(
                empty, gradients=at_backward, copies=backward_copies + head_copy, gathered=gathered,
                activations=activations + features * (not mixed), loss=loss + cast_features,
                phase="loss",
            )  # fmt: skip

    # backward pass: the last block's, while all activations are there, and the first's, while all gradients
    # are. A tied head's gradient waits for the embedding's, as does FSDP2's. Widest are the gradients by the
    # feed-forward's 4C hidden values, beside those by its output (autocast: cast) and by its matrix of 4C²
    by_activations = N * C * (w + a * mixed + 4 * a) + 4 * C * C * a
    by_attention = N * (C * (w + a) + 2 * _attention_matrix_bytes(shape))
    waiting = head_gradient if tied or (sharded and not accumulate) else 0
    untied_head = 0 if tied or sharded else V * C
    for done in (0, L - 1):
        so_far = w * (done * block_share + 2 * C + untied_head)
        moment = replace(
            empty,
            gradients=at_backward if accumulate else so_far,
            copies=block_copies if shape.activation_checkpointing else (L - done) * block_copies,
            # FSDP2 has the next block prefetched and the gradients of the one before being reduced
            gathered=gathered + block * sharded * (a * (done < L - 1) + w * (done > 0)),
            activations=(L - done) * of_block + N * embedding_mask,
            backward=waiting + by_activations,
            phase="backward",
        )  # fmt: skip
        if shape.activation_checkpointing:
            moment = replace(moment, activations=moment.activations + in_block - N * C * w)
        yield moment
        # attention's turn: the feed-forward's tensors are freed, its norm's input (C) and 9C
        remaining = moment.activations - N * C * (w + 9 * a)
        yield replace(moment, activations=remaining, backward=waiting + by_attention)
    # the embeddings': a dense gradient (V, C) of the gradient (N, C), and its sum with a tied head's
    so_far = w * (L * block_share + (rest_share if sharded or not tied else 0))
    yield replace(
        empty, gradients=at_backward if accumulate else so_far,
        gathered=(a + w * accumulate) * rest * sharded,
        backward=waiting + w * (N * C + V * C + V * C * tied), phase="backward",
    )  # fmt: skip

    if (
        sharded
    ):  # the rest's gradients are reduced together: complete ones and a copy, without the weights
        yield replace(empty, gradients=w * share, gathered=2 * w * rest, phase="backward")

    # float16's optimizer is not fused on a GPU: one value per weight more
    unfused = w * share * (shape.precision == "16-mixed" and shape.device == "cuda")
    yield replace(empty, gradients=w * share, optimizer_step=unfused, phase="optimizer step")


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
