"""Generation loop on token ids: prefill the prompts, then decode one token per step with the KV cache."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from gpt_lightning.generation.cuda_graph import (
    GraphedDecodeStep,
    cuda_graph_unsupported_reason,
    fused_decode_unsupported_reason,
    padded_length,
)
from gpt_lightning.generation.finite_check import FiniteLogitsCheck
from gpt_lightning.generation.sampling import SamplingParams, sample_unchecked
from gpt_lightning.model.cpu_decode import (
    CpuDecodeStep,
    cpu_decode_unsupported_reason,
    reads_prompts_faster,
)
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.kv_cache import KVCache

DecodeBackend = Literal["eager", "cpu_kernel", "cuda_graph", "fused"]
NO_TOKEN = -1  # id of a row that has ended, and of padding
FUSED_MIN_NEW_TOKENS = (
    128  # for fewer new tokens, loading the Triton kernels costs more than it saves
)
FINITE_CHECK_INTERVAL = 64  # steps between two checks on a GPU that the logits are finite


@torch.inference_mode()
def generate(
    model: GPTModel,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue prompts of equal length: ids ``(B, T)`` → ``(B, T + n)``, n at most ``max_new_tokens``.

    A row that ends before the others is filled up with ``eos_id``. The step in which the last rows end is
    not returned, as in the book. For the sampling settings see :class:`SamplingParams`, for the other
    arguments :func:`stream_ids`, which also accepts prompts of different lengths.
    """
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty)
    steps = stream_ids(
        model, idx.tolist(), max_new_tokens, sampling, eos_id=eos_id, generator=generator
    )
    for next_ids in steps:
        filled = next_ids if eos_id is None else next_ids.masked_fill(next_ids < 0, eos_id)
        idx = torch.cat((idx, filled[:, None].to(idx.device)), dim=1)
    return idx


def stream_ids(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingParams,
    *,
    num_samples: int = 1,
    eos_id: int | None = None,
    is_over: Callable[[int, list[int]], bool] | None = None,
    generator: torch.Generator | None = None,
    backend: DecodeBackend | None = None,
) -> Iterator[Tensor]:
    """Yield the new ids of each step, ``(R,)``, R = number of prompts × ``num_samples``.

    The samples of a prompt are adjacent rows. A row that has ended yields -1; when all rows have ended, the
    iterator stops. If rows can end (``eos_id`` or ``is_over``), the ids are on the host, else on the model's device.

    Prompts may differ in length: shorter ones are padded at the left, which does not change the result. A row
    longer than ``context_length`` is cropped from the left, as in the book. Learned position embeddings
    cannot be shifted, so from then on each step runs the whole window through the model. Dropout is off, and
    the model's training mode is restored at the end.

    Args:
        eos_id: The token that ends its row; it is not yielded.
        is_over: Called after each token with the row index and the row's new ids; True ends the row.
        generator: Random number generator on the model's device; ``None``: a new one with a random seed. Torch's
            global generator is not used.
        backend: How a decoding step runs: ``"eager"``, in our C code (``"cpu_kernel"``, see
            :mod:`gpt_lightning.model.cpu_decode`), as a CUDA graph (``"cuda_graph"``), or as a CUDA graph of our Triton
            kernels (``"fused"``), see :mod:`gpt_lightning.generation.cuda_graph`. ``None``: the fastest. Backends
            round differently, so they may choose differently between tokens of nearly equal probability.

    Raises:
        ValueError: A setting or a prompt is invalid, or the logits are not finite.
    """
    check_request(model, prompts, max_new_tokens, sampling)
    if num_samples < 1:
        raise ValueError(f"num_samples: {num_samples} is too small; give 1 or more")
    rows = len(prompts) * num_samples
    if backend == "cpu_kernel" and (reason := cpu_decode_unsupported_reason(model, rows)):
        raise ValueError(f"backend: cpu_kernel cannot be used ({reason}); give eager")
    return _stream(
        model,
        prompts,
        max_new_tokens,
        sampling,
        num_samples,
        eos_id,
        is_over,
        generator,
        backend or fastest_backend(model, rows, max(map(len, prompts)), max_new_tokens),
    )


def check_request(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingParams,
) -> None:
    """Raise ``ValueError`` if a setting or a prompt does not fit the model."""
    vocab_size = model.config.vocab_size
    sampling.check_vocabulary(vocab_size)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: {max_new_tokens} is negative; give 0 or more")
    if not prompts or not all(prompts):
        raise ValueError("prompt: is empty; give at least one token")
    if max(map(max, prompts)) >= vocab_size or min(map(min, prompts)) < 0:
        raise ValueError(
            f"prompt: its tokens do not fit the model's vocabulary of {vocab_size}; "
            "give other text or another model"
        )


def fastest_backend(model: GPTModel, rows: int, length: int, max_new_tokens: int) -> DecodeBackend:
    """The fastest backend for ``rows`` rows whose longest prompt has ``length`` tokens.

    The Triton kernels are chosen if they are supported and if enough tokens fit into the context to pay for
    loading the kernels.
    """
    if cuda_graph_unsupported_reason(model):
        return "eager" if cpu_decode_unsupported_reason(model, rows) else "cpu_kernel"
    steps = min(max_new_tokens, model.config.context_length - length)
    if steps < FUSED_MIN_NEW_TOKENS or fused_decode_unsupported_reason(model, rows):
        return "cuda_graph"
    return "fused"


@torch.inference_mode()
def _stream(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingParams,
    num_samples: int,
    eos_id: int | None,
    is_over: Callable[[int, list[int]], bool] | None,
    generator: torch.Generator | None,
    backend: DecodeBackend,
) -> Iterator[Tensor]:
    """The generator of :func:`stream_ids`, after its checks."""
    weight, context_length = model.tok_emb.weight, model.config.context_length
    device = weight.device
    if generator is None:
        generator = torch.Generator(device=device)
        generator.seed()

    width = max(map(len, prompts))
    try:
        ids = torch.full((len(prompts), width + max_new_tokens), NO_TOKEN, device=device)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(
            f"max_new_tokens: {max_new_tokens} tokens do not fit in memory; give fewer"
        ) from error
    shortest = min(map(len, prompts))
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    ids[:, :width] = torch.tensor(
        [[NO_TOKEN] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device
    )
    rows = len(prompts) * num_samples
    new_ids: list[list[int]] = [[] for _ in range(rows)]  # of each row, for ``is_over``
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    decode_step: GraphedDecodeStep | None = None
    cpu_step: CpuDecodeStep | None = None
    in_c = backend == "cpu_kernel" and reads_prompts_faster(model)  # prompts, and full windows
    is_argmax = sampling.temperature == 0.0 and sampling.repetition_penalty == 1.0
    pending: list[Tensor] = []  # newest ids that are not yet written to ``ids``
    may_end = eos_id is not None or is_over is not None
    finite_check = FiniteLogitsCheck(interval=1 if device.type == "cpu" else FINITE_CHECK_INTERVAL)

    was_training = model.training
    model.eval()
    try:
        for step in range(max_new_tokens):
            max_logits = argmax_ids = None
            if step == 0:  # prefill each prompt once, even for several samples
                window, window_padding = _window(ids[:, :width], padding, shortest, context_length)
                length = window.shape[1] + max_new_tokens
                cache = KVCache.allocate(
                    model.config,
                    len(prompts),
                    padded_length(length) if backend in ("cuda_graph", "fused") else length,
                    device,
                    weight.dtype,
                )
                if in_c:
                    logits = CpuDecodeStep(model, cache).read(window, window_padding)
                else:
                    logits = model.head(model.features(window, cache, window_padding)[:, -1])
                logits = logits.repeat_interleave(num_samples, dim=0)
                ids = ids.repeat_interleave(num_samples, dim=0)
                padding = padding.repeat_interleave(num_samples)
                if num_samples > 1:
                    cache = cache.repeat(num_samples)
                    window_padding = (
                        None
                        if window_padding is None
                        else window_padding.repeat_interleave(num_samples)
                    )
                if backend == "cpu_kernel":
                    cpu_step = CpuDecodeStep(model, cache, window_padding)
                elif backend != "eager":
                    decode_step = GraphedDecodeStep(
                        model, cache, window_padding, fused=backend == "fused"
                    )
            elif cache.length < context_length:
                last = ids[:, width - 1]
                if decode_step is not None:
                    # the step has the pending ids as its own argmax ids
                    logits = decode_step(None if pending else last)
                    max_logits, argmax_ids = decode_step.max_logits, decode_step.argmax_ids
                elif cpu_step is not None:
                    logits = cpu_step(last)
                    max_logits, argmax_ids = cpu_step.max_logits, cpu_step.argmax_ids
                else:
                    last = last.clamp(min=0)[:, None]
                    logits = model.head(model.features(last, cache, window_padding)[:, -1])
            else:  # the context is full: the window slides, so there is nothing to cache
                if pending:
                    ids[:, width - len(pending) : width] = torch.stack(pending, dim=1)
                    pending.clear()
                window, window_padding = _window(
                    ids[:, :width], padding, shortest + step, context_length
                )
                if cpu_step is not None and in_c:
                    logits = cpu_step.read(window, window_padding)
                else:
                    logits = model.head(model.features(window, padding=window_padding)[:, -1])

            finite_check.add(logits.amax(dim=-1) if max_logits is None else max_logits, step)
            if argmax_ids is not None and is_argmax:
                next_ids = argmax_ids
            else:
                next_ids = sample_unchecked(
                    logits, sampling, ids=ids[:, :width], generator=generator
                )
            tokens: list[int] = []
            if eos_id is not None:
                ended |= next_ids == eos_id
            if may_end:
                next_ids = next_ids.masked_fill(ended, NO_TOKEN)
                tokens = next_ids.tolist()  # the host waits for the GPU here, once per token
                if all(token == NO_TOKEN for token in tokens):
                    break
            if decode_step is not None and argmax_ids is not None and is_argmax and not may_end:
                pending.append(next_ids)  # saves a copy: the next step reads its own argmax ids
            else:
                ids[:, width] = next_ids
            width += 1
            yield torch.tensor(tokens) if may_end else next_ids
            if is_over is not None:
                for row, token in enumerate(tokens):
                    if token != NO_TOKEN:
                        new_ids[row].append(token)
                        if is_over(row, new_ids[row]):
                            ended[row] = True
                            tokens[row] = NO_TOKEN
                if all(token == NO_TOKEN for token in tokens):
                    break
        finite_check.check()
    finally:
        if decode_step is not None:
            decode_step.close()
        model.train(was_training)


def _window(
    ids: Tensor, padding: Tensor, shortest: int, length: int
) -> tuple[Tensor, Tensor | None]:
    """The last ``length`` columns of padded ids ``(B, T)``, and each row's padding in them ``(B,)``.

    The padding is ``None`` if no row has any.

    Args:
        shortest: Number of tokens of the shortest row, known on the host without waiting for the GPU.
    """
    window = ids[:, -length:].clamp(min=0)
    if shortest >= window.shape[1]:
        return window, None
    return window, (padding - max(0, ids.shape[1] - length)).clamp(min=0)


@torch.inference_mode()
def generate_simple(
    model: GPTModel, idx: Tensor, max_new_tokens: int, context_size: int | None = None
) -> Tensor:
    """The book's greedy loop, without a cache: ids ``(B, T)`` → ``(B, T + max_new_tokens)``.

    It is the reference for :func:`generate`. It does not turn dropout off: call ``model.eval()`` before.
    """
    context_size = context_size or model.config.context_length
    for _ in range(max_new_tokens):
        logits = model(idx[:, -context_size:])[:, -1]
        idx = torch.cat((idx, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return idx
