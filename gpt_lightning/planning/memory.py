"""Memory of a training step on one device, by formula.

A step holds most at one of these moments: in the loss's forward pass, at the start of the backward pass, in the
backward pass of the last or first block or of the embeddings, or in the optimizer step. Each moment is a sum of
products of the letters, and the largest moment is the answer. Only tensors are counted: not what an allocator
rounds up or keeps, nor the workspaces that kernels allocate and free.

The letters are those of ``step_parts.py``, which has the products.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from gpt_lightning.planning.step_parts import (
    StepShape,
    attention_gradient_bytes,
    autocast_copies,
    bytes_per_logit,
    cast_features,
    chunked_loss,
    kept_activations,
    letters,
    logit_count,
    muon_products,
    parameter_counts,
)


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


def _weights_and_moments(shape: StepShape) -> MemoryBreakdown:
    """What a device holds at every moment."""
    w, share = letters(shape).w, parameter_counts(shape).share
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
    w, p = letters(shape).w, parameter_counts(shape)
    return w * (p.rest_share if shape.shards > 1 and shape.accumulate else p.share)


def _gradients_at_backward(shape: StepShape) -> int:
    """Gradients when the backward pass begins; FSDP2 keeps a shard of the rest's until it gets to them."""
    if shape.accumulate:
        return _old_gradients(shape)
    return letters(shape).w * parameter_counts(shape).rest_share * (shape.shards > 1)


def _gathered(shape: StepShape) -> int:
    """FSDP2's complete weights: the rest's all the time, the blocks' one by one.

    With several micro-batches also the complete gradients, until the last one reduces and shards them.
    """
    if shape.shards == 1:
        return 0
    w, a, p = letters(shape).w, letters(shape).a, parameter_counts(shape)
    gradients = w * (p.rest + shape.config.n_layers * p.block) * shape.accumulate
    return a * (p.rest + p.block) + gradients


def _end_of_forward(shape: StepShape) -> MemoryBreakdown:
    """The loss's forward pass, while all activations and the gradients of the step before are there."""
    copies, activations = autocast_copies(shape), kept_activations(shape)
    if shape.loss_chunk_size is None:
        loss = bytes_per_logit(shape)[0] * logit_count(shape) + cast_features(shape)
    else:
        loss = chunked_loss(shape)[0]
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
    C, V, L, N, _, a, mixed = letters(shape)
    copies, activations = autocast_copies(shape), kept_activations(shape)
    blocks = 0 if shape.activation_checkpointing else L * copies.block
    inside_loss = bytes_per_logit(shape)[1] * logit_count(shape)
    # the gradients by logits (N, V), by features (N, C) and by the head (V, C)
    by_head = a * (N * V + N * C + V * C)
    for loss in (inside_loss, by_head):
        yield replace(
            _weights_and_moments(shape),
            gradients=_gradients_at_backward(shape),
            copies=blocks + copies.head,
            gathered=_gathered(shape),
            activations=activations.total + activations.features * (not mixed),
            loss=loss + cast_features(shape),
            phase="loss",
        )


def _backward_of_block(shape: StepShape, done: int) -> Iterator[MemoryBreakdown]:
    """The backward pass of a block's feed-forward, then of its attention, after ``done`` other blocks.

    Of the last block (0 done), because all activations are there, and of the first, because all gradients are.
    """
    C, V, L, N, w, a, mixed = letters(shape)
    p, activations, sharded = parameter_counts(shape), kept_activations(shape), shape.shards > 1
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
    attention = N * (C * (w + a) + attention_gradient_bytes(shape))
    moment = replace(
        _weights_and_moments(shape),
        gradients=_gradients_at_backward(shape) if shape.accumulate else gradients,
        copies=autocast_copies(shape).block * (1 if shape.activation_checkpointing else left),
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
        return letters(shape).w * shape.config.vocab_size * shape.config.emb_dim
    return chunked_loss(shape)[1]


def _backward_of_embeddings(shape: StepShape) -> MemoryBreakdown:
    """The end of the backward pass: a dense gradient (V, C) of the gradient (N, C), and its sum with a tied head's."""
    C, V, L, N, w, a, _ = letters(shape)
    p, sharded, tied = parameter_counts(shape), shape.shards > 1, shape.config.tied_embeddings
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
    w, p = letters(shape).w, parameter_counts(shape)
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
        temporary = 2 * letters(shape).w * ceil(largest / shape.shards) * (not shape.fused)
    return replace(
        stored,
        gradients=stored.weights,
        optimizer_step=max(temporary, muon_products(shape) * shape.muon),
        phase="optimizer step",
    )
