"""Log-likelihoods of continuations, computed for many texts at once.

Texts of similar length share a batch. A context that has several continuations is computed once, on the KV cache. The
head, which is the largest layer of a small model, is computed only for the tokens of the continuations.

Shapes: B contexts, R rows (one continuation each), T tokens, C ``emb_dim``, V ``vocab_size``, N scored positions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.kv_cache import KVCache

SCORED_POSITIONS = 128  # whose logits are in memory at the same time
CPU_ROWS_PER_PASS = 8  # continuations that go through the blocks together on a CPU


@dataclass(frozen=True)
class Request:
    """Continuations to score after one context.

    Attributes:
        context: Token ids, at least one.
        continuations: Token ids, at least one each.
    """

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]

    @property
    def longest(self) -> int:
        """Number of tokens of the longest continuation."""
        return max(map(len, self.continuations))


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of a continuation.

    Attributes:
        logprob: Natural logarithm of its probability.
        is_greedy: Whether greedy decoding gives exactly this continuation.
    """

    logprob: float
    is_greedy: bool


class NotFiniteError(ValueError):
    """A log-probability is not finite."""


def encode_request(tokenizer: Tokenizer, context: str, continuations: Sequence[str]) -> Request:
    """Token ids of a context and its continuations, split as lm-evaluation-harness splits them.

    White space at the end of the context moves to the continuations. An empty context is ``<|endoftext|>``.
    """
    stem = context.rstrip()
    space = context[len(stem) :]
    ids = tokenizer.encode_prompt(stem)
    encoded = [tokenizer.encode_prompt(stem + space + text)[len(ids) :] for text in continuations]
    return Request(ids or [tokenizer.end_of_text_id], encoded)


def is_cropped(request: Request, context_length: int) -> bool:
    """Whether the context and the longest continuation do not fit. The last token needs no position."""
    return len(request.context) + request.longest > context_length + 1


def check_requests(requests: Sequence[Request], context_length: int) -> None:
    """Check that a model can score all requests.

    Raises:
        ValueError: A continuation is empty or longer than the context.
    """
    for number, request in enumerate(requests, 1):
        if not all(request.continuations):
            raise ValueError(f"example {number}: an ending has no tokens; correct it")
        if request.longest > context_length:
            raise ValueError(
                f"example {number}: an ending has {request.longest} tokens, the model reads {context_length}; "
                "leave it out, or give a model with a longer context"
            )


def perplexity(loss: float) -> float:
    """Perplexity of a loss in nats, at most about the largest float."""
    return math.exp(min(loss, 709.0))


@torch.inference_mode()
def log_likelihoods(
    model: GPTModel,
    requests: Sequence[Request],
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[list[Likelihood]]:
    """Log-likelihoods of the continuations of each request, in their order.

    A context that is too long for the model is cropped from the left.

    Args:
        model: In eval mode.
        batch_size: Maximum number of continuations that are computed together. Those of one context are never separated.
        on_progress: Called after each batch with the number of continuations that are done.

    Raises:
        ValueError: A continuation is empty or longer than the model's context.
        NotFiniteError: The logits are not finite.
    """
    context_length = model.config.context_length
    answers: list[dict[int, Likelihood]] = [{} for _ in requests]
    shared: list[int] = []
    rows: list[_Row] = []
    check_requests(requests, context_length)
    for number, request in enumerate(requests):
        if len(request.continuations) > 1 and not is_cropped(request, context_length):
            shared.append(number)
            continue
        for i, continuation in enumerate(request.continuations):
            ids = [*request.context, *continuation][-context_length - 1 :]
            rows.append(_Row(number, i, ids, len(ids) - len(continuation)))
    done = 0
    for batch in _shared_batches(requests, shared, batch_size, context_length):
        likelihoods = iter(_score_shared(model, [requests[number] for number in batch]))
        for number in batch:
            for i in range(len(requests[number].continuations)):
                answers[number][i] = next(likelihoods)
                done += 1
        on_progress(done)
    # the longest rows come first: if the memory is too small, that is known at once
    rows.sort(key=lambda row: len(row.ids), reverse=True)
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        for row, likelihood in zip(chunk, _score_rows(model, chunk), strict=True):
            answers[row.number][row.continuation] = likelihood
        done += len(chunk)
        on_progress(done)
    return [[answer[i] for i in range(len(answer))] for answer in answers]


@dataclass(frozen=True)
class _Row:
    """A context and one continuation, computed together without a cache.

    Attributes:
        first: Index of the continuation's first token in ``ids``.
    """

    number: int
    continuation: int
    ids: Sequence[int]
    first: int


def _shared_batches(
    requests: Sequence[Request], numbers: Sequence[int], batch_size: int, context_length: int
) -> Iterator[list[int]]:
    """Numbers of requests with equally many continuations of similar length, the longest first.

    Continuations are more tokens than their contexts, so it is their padding that counts.
    """

    def key(number: int) -> tuple[int, int, int]:
        request = requests[number]
        return len(request.continuations), request.longest, len(request.context)

    batch: list[int] = []
    times = width = longest = 0
    for number in sorted(numbers, key=key, reverse=True):
        request = requests[number]
        width = max(width, len(request.context))
        if batch and (
            len(request.continuations) != times
            or (len(batch) + 1) * times > batch_size
            or width + longest > context_length + 1  # the padding takes positions, too
        ):
            yield batch
            batch = []
        if not batch:
            times, longest, width = key(number)
        batch.append(number)
    if batch:
        yield batch


def _score_shared(model: GPTModel, batch: list[Request]) -> list[Likelihood]:
    """Likelihoods of all continuations of a batch from :func:`_shared_batches`."""
    weight = model.tok_emb.weight
    device, times = weight.device, len(batch[0].continuations)
    lengths = [len(request.context) for request in batch]
    width, more = max(lengths), max(request.longest for request in batch) - 1
    padding = None
    if min(lengths) < width:
        padding = torch.tensor([width - length for length in lengths], device=device)
    contexts = [[0] * (width - len(r.context)) + list(r.context) for r in batch]
    cache = KVCache.allocate(model.config, len(batch), width + more, device, weight.dtype)
    features = model.features(torch.tensor(contexts, device=device), cache, padding)[:, -1]
    # the context's last position predicts the first token of each continuation
    first = torch.tensor([[ids[0] for ids in r.continuations] for r in batch], device=device)
    logprobs, is_argmax = _score(model, features, first)  # (B, continuations of a context)
    pairs = zip(logprobs.flatten().tolist(), is_argmax.flatten().tolist(), strict=True)
    scores = [[pair] for pair in pairs]
    rows = [ids for request in batch for ids in request.continuations]
    numbers = sorted((i for i, ids in enumerate(rows) if len(ids) > 1), key=lambda i: len(rows[i]))
    # rows of similar length have less padding; a GPU does not gain by it
    rows_per_pass = CPU_ROWS_PER_PASS if device.type == "cpu" else len(rows)
    passes = [numbers[i : i + rows_per_pass] for i in range(0, len(numbers), rows_per_pass)]
    scored = []
    for part in passes:
        longest = len(rows[part[-1]]) - 1
        inputs = torch.tensor([_padded(rows[i][:-1], longest) for i in part], device=device)
        contexts_of = torch.tensor([i // times for i in part], device=device)
        features = model.features(
            inputs,
            cache.select(contexts_of, width + longest),
            None if padding is None else padding[contexts_of],
        )  # (R, T, C)
        scored.append(_scored_features(features, [(0, len(rows[i]) - 1) for i in part]))
    if scored:
        targets = [rows[i][1:] for i in numbers]
        _add_scores(model, torch.cat(scored), targets, [scores[i] for i in numbers])
    return [_likelihood(each) for each in scores]


def _score_rows(model: GPTModel, rows: list[_Row]) -> list[Likelihood]:
    """Likelihoods of rows without a cache. Padding at the right changes nothing: no token attends to it."""
    width = max(len(row.ids) for row in rows) - 1
    device = model.tok_emb.weight.device
    inputs = torch.tensor([_padded(row.ids[:-1], width) for row in rows], device=device)
    scores: list[list[tuple[float, bool]]] = [[] for _ in rows]
    spans = [(row.first - 1, len(row.ids) - row.first) for row in rows]
    scored = _scored_features(model.features(inputs), spans)
    _add_scores(model, scored, [row.ids[row.first :] for row in rows], scores)
    return [_likelihood(each) for each in scores]


def _padded(ids: Sequence[int], width: int) -> list[int]:
    return [*ids, *[0] * (width - len(ids))]


def _scored_features(features: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Features ``(N, C)`` of the positions that predict a target.

    Args:
        features: ``(R, T, C)``.
        spans: Of each row, the first of these positions, and their number.
    """
    starts, counts = torch.tensor(spans, device=features.device).T[..., None]  # (R, 1) each
    columns = torch.arange(features.shape[1], device=features.device)
    return features[(columns >= starts) & (columns < starts + counts)]


def _add_scores(
    model: GPTModel,
    scored: Tensor,
    targets: list[Sequence[int]],
    scores: list[list[tuple[float, bool]]],
) -> None:
    """Add to ``scores`` the log-probability of each target, and whether it is the most probable token.

    Args:
        scored: Features of all targets, ``(N, C)``, row after row.
        targets: Of each row.
    """
    ids = torch.tensor([token for row in targets for token in row], device=scored.device)
    logprobs, is_argmax = _score(model, scored, ids[:, None])
    pairs = iter(zip(logprobs[:, 0].tolist(), is_argmax[:, 0].tolist(), strict=True))
    for row_scores, row in zip(scores, targets, strict=True):
        row_scores.extend(next(pairs) for _ in row)


def _score(model: GPTModel, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of K tokens at each position, and which of them is the most probable token of all.

    Args:
        features: ``(N, C)``.
        targets: ``(N, K)``; so are both results.

    Raises:
        NotFiniteError: A log-probability is not finite.
    """
    logprobs, is_argmax = [], []
    for start in range(0, len(features), SCORED_POSITIONS):
        target = targets[start : start + SCORED_POSITIONS]
        logits = model.head(features[start : start + SCORED_POSITIONS])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # 16 bits are too few
        best = logits.argmax(dim=-1, keepdim=True)
        is_argmax.append(best == target)
        max_logit, logit = logits.gather(1, best), logits.gather(1, target)
        # in place, because new memory of this size costs more time than the computation
        total = logits.sub_(max_logit).exp_().sum(dim=-1, keepdim=True)
        logprobs.append(logit - max_logit - total.log())
    if not logprobs:
        return torch.empty(targets.shape), torch.empty(targets.shape, dtype=torch.bool)
    result = torch.cat(logprobs)
    if not torch.isfinite(result).all():
        raise NotFiniteError("logits: are not finite; the model's weights are damaged")
    return result, torch.cat(is_argmax)


def _likelihood(scores: list[tuple[float, bool]]) -> Likelihood:
    """Likelihood of a continuation from the scores of its tokens."""
    return Likelihood(
        math.fsum(logprob for logprob, _ in scores), all(is_argmax for _, is_argmax in scores)
    )
