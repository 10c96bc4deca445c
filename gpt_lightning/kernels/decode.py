"""Triton kernels for one decoding step. A linear layer is one kernel with its norm, bias, GELU and shortcut.

A kernel with PDL (programmatic dependent launch, from Hopper on) starts when all programs of the previous kernel have
started. It first reads what no kernel writes, which is the weights, and then waits for the previous kernel to end.
Values are accumulated in float32 in a fixed order, so the same step gives the same bits.

Shapes: R rows, C ``emb_dim``, H heads, D = C / H, V ``vocab_size``; a weight is (N, K). BLOCK_X is the size of a program's
block in dimension X, a power of 2.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _launch_next(PDL: tl.constexpr):
    """Allow the next kernel to start. Until this one ends it may only read what no kernel writes."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _wait_for_previous(PDL: tl.constexpr):
    """Wait until the previous kernel has ended and its results are visible."""
    if PDL:
        gdc_wait()


@triton.jit
def embed(
    tokens, position_ptr, padding, tok_emb, pos_emb, x,
    C: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (R, C): token embedding of ``tokens`` (R,) plus position embedding. Negative token ids are read as 0."""
    _launch_next(PDL)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < C
    token = tl.maximum(tl.load(tokens + row), 0)
    position = tl.load(position_ptr)
    if PADDED:
        position -= tl.load(padding + row)
    token_embedding = tl.load(tok_emb + token * C + columns, mask=mask)
    position_embedding = tl.load(pos_emb + position * C + columns, mask=mask)
    embedding = token_embedding.to(tl.float32) + position_embedding.to(tl.float32)
    tl.store(x + row * C + columns, embedding, mask=mask)


@triton.jit
def _load_tile(weight, n, k, N, K: tl.constexpr):
    """Rows n (BLOCK_N,) and columns k (BLOCK_K,) of the weight (N, K); 0 outside of it."""
    mask = (n < N)[:, None] & (k < K)[None, :]
    pointers = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _multiply(
    x, w, scale, shift, addend, k, eps, R, K: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """``addend`` plus the product of x (R, K) and the tile w (BLOCK_N, BLOCK_K): (BLOCK_R, BLOCK_N).

    With NORM the rows are normalized. The product does not wait for their mean m and standard deviation s: the product
    of (x - m) / s · scale with w is that of x · scale with w, minus m times ``shift`` (BLOCK_N,), which is the product of
    scale (BLOCK_K,) with w, all divided by s. The last steps call fma explicitly: where a result is used twice, the
    compiler may compute it twice, once with and once without an intermediate rounding.
    """
    inside = k < K
    if BLOCK_R == 1:  # one row as one dimension, for which the compiler finds a better layout
        v = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            mean = tl.sum(v, 0) / K
            centered = tl.where(inside, v - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(centered * centered, 0) / K + eps)
            y = tl.sum(w.to(tl.float32) * (v * scale)[None, :], 1)
            y = tl.fma(tl.fma(-mean, shift, y)[None, :], rstd, addend)
        else:
            y = tl.sum(w.to(tl.float32) * v[None, :], 1)[None, :] + addend
    else:
        r = tl.arange(0, BLOCK_R)
        mask = (r < R)[:, None] & inside[None, :]
        v = tl.load(x + r[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORM:
            mean = tl.sum(v, 1) / K
            centered = tl.where(inside[None, :], v - mean[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(centered * centered, 1) / K + eps)[:, None]
            y = tl.sum(w.to(tl.float32)[None, :, :] * (v * scale[None, :])[:, None, :], 2)
            y = tl.fma(tl.fma(-mean[:, None], shift[None, :], y), rstd, addend)
        else:
            y = tl.sum(w.to(tl.float32)[None, :, :] * v[:, None, :], 2) + addend
    return y


@triton.jit
def linear(
    x, weight, bias, scale, shift, out, eps, N, R,
    K: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (R, N) = x (R, K) @ weight.T, plus bias if BIAS.

    NORM normalizes x first (see :func:`_multiply`), GELU applies GPT-2's GELU, ADD adds the result to ``out``.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w = _load_tile(weight, n, k, N, K)
    _launch_next(PDL)
    s, t = 0.0, 0.0
    if NORM:
        s = tl.load(scale + k, mask=k < K, other=0.0).to(tl.float32)
        t = tl.load(shift + n, mask=n < N, other=0.0)
    addend = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    if BIAS:
        addend += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    _wait_for_previous(PDL)
    r = tl.arange(0, BLOCK_R)
    pointers = out + r[:, None] * N + n[None, :]
    mask = (r < R)[:, None] & (n < N)[None, :]
    if ADD:
        addend += tl.load(pointers, mask=mask, other=0.0)
    y = _multiply(x, w, s, t, addend, k, eps, R, K, NORM, BLOCK_R)
    if GELU:  # tanh approximation; (1 + tanh(u)) / 2 = sigmoid(2u)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    tl.store(pointers, y, mask=mask)


@triton.jit
def _load_cached(cache, head_offset, first, end, d, D: tl.constexpr, BLOCK_T: tl.constexpr):
    """Cached keys or values of BLOCK_T positions from ``first`` on, 0 from ``end`` on: (BLOCK_T, BLOCK_D)."""
    t = first + tl.arange(0, BLOCK_T)
    mask = (t < end)[:, None] & (d < D)[None, :]
    return tl.load(cache + head_offset + t[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def _online_attention(q, k, v, first, end, y, weight_sum, max_score, BLOCK_T: tl.constexpr):
    """One step of the online softmax: add a block of keys and values to the weighted sum ``y`` of values.

    ``weight_sum`` is the sum of the weights so far, ``max_score`` the maximum score, relative to which they are computed.
    """
    in_range = first + tl.arange(0, BLOCK_T) < end
    scores = tl.where(in_range, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
    new_max = tl.maximum(max_score, tl.max(scores, 0))
    weights = tl.exp(scores - new_max)
    rescale = tl.exp(max_score - new_max)
    y = y * rescale + tl.sum(weights[:, None] * v.to(tl.float32), 0)
    return y, weight_sum * rescale + tl.sum(weights, 0), new_max


@triton.jit
def attention(
    qkv, keys, values, position_ptr, padding, out, span_values, span_stats, spans_done, scale, max_length,
    C: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, SPANS: tl.constexpr, BLOCK_SPANS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out (R, C): attention of one query per row over the cached keys and values (R, H, max_length, D) and its own.

    The query's own key and value are stored in the cache at ``position_ptr``. A program computes one head of one row over
    a span of SPAN positions (split-K, as in flash decoding). With several spans, each program writes its weighted sum of
    values to ``span_values`` (R, H, SPANS, D), its sum of weights and maximum score to ``span_stats`` (R, H, SPANS, 2), and
    counts itself in ``spans_done`` (R, H). The last program of a head combines the spans in their order.
    """
    _launch_next(PDL)
    head, row, span = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    head_index = row * tl.num_programs(0) + head
    head_offset = head_index.to(tl.int64) * max_length * D
    position = tl.load(position_ptr)
    first = position * 0
    if PADDED:
        first += tl.load(padding + row)
    spans = tl.maximum(tl.cdiv(position - first, SPAN), 1)
    first += span * SPAN
    end = tl.minimum(first + SPAN, position)
    # these keys and values are from earlier steps: no running kernel writes them
    k_block = _load_cached(keys, head_offset, first, end, d, D, BLOCK_T)
    v_block = _load_cached(values, head_offset, first, end, d, D, BLOCK_T)
    _wait_for_previous(PDL)
    if span < spans:
        q_pointers = qkv + row * 3 * C + head * D + d
        q = tl.load(q_pointers, mask=inside, other=0.0).to(tl.float32) * scale
        y = tl.zeros((BLOCK_D,), tl.float32)
        max_score = tl.sum(y, 0) - 1e38
        weight_sum = tl.sum(y, 0)
        if span == 0:  # this span includes the query's own key and value
            k = tl.load(q_pointers + C, mask=inside, other=0.0)
            v = tl.load(q_pointers + 2 * C, mask=inside, other=0.0)
            tl.store(keys + head_offset + position * D + d, k, mask=inside)
            tl.store(values + head_offset + position * D + d, v, mask=inside)
            y = v.to(tl.float32)
            max_score = tl.sum(q * k.to(tl.float32), 0)
            weight_sum = weight_sum + 1.0
        y, weight_sum, max_score = _online_attention(
            q, k_block, v_block, first, end, y, weight_sum, max_score, BLOCK_T
        )
        first += BLOCK_T
        while first < end:
            k_block = _load_cached(keys, head_offset, first, end, d, D, BLOCK_T)
            v_block = _load_cached(values, head_offset, first, end, d, D, BLOCK_T)
            y, weight_sum, max_score = _online_attention(
                q, k_block, v_block, first, end, y, weight_sum, max_score, BLOCK_T
            )
            first += BLOCK_T
        out_pointers = out + row * C + head * D + d
        if spans == 1:
            tl.store(out_pointers, y / weight_sum, mask=inside)
        elif SPANS > 1:
            head_values = span_values + head_index * SPANS * D + d[None, :]
            head_stats = span_stats + head_index * SPANS * 2
            tl.store(head_values + span * D, y[None, :], mask=inside[None, :])
            tl.store(head_stats + span * 2, weight_sum)
            tl.store(head_stats + span * 2 + 1, max_score)
            tl.debug_barrier()  # all threads have written their results before the span is counted
            if tl.atomic_add(spans_done + head_index, 1, sem="acq_rel") == spans - 1:
                i = tl.arange(0, BLOCK_SPANS)
                is_span = i < spans
                stats_pointers = head_stats + i * 2
                weights = tl.load(stats_pointers, mask=is_span, other=0.0, cache_modifier=".cg")
                scores = tl.load(
                    stats_pointers + 1, mask=is_span, other=-1e38, cache_modifier=".cg"
                )
                rescale = tl.exp(scores - tl.max(scores, 0))
                span_y = tl.load(
                    head_values + i[:, None] * D,
                    mask=is_span[:, None] & inside[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                y = tl.sum(span_y * rescale[:, None], 0) / tl.sum(weights * rescale, 0)
                tl.store(out_pointers, y, mask=inside)
                tl.store(spans_done + head_index, 0)


@triton.jit
def _max_and_argmax(y, ids):
    """Maximum of each row of ``y`` (r, n), NaN if the row has one, and the lowest of ``ids`` at which it is reached.

    The id is that of the maximum without the NaNs.
    """
    is_nan = y != y
    numbers = tl.where(is_nan, float("-inf"), y)
    row_max = tl.max(numbers, 1)
    argmax = tl.min(tl.where(numbers == row_max[:, None], ids, 0x7FFFFFFF), 1)
    return tl.where(tl.max(is_nan.to(tl.int32), 1) > 0, float("nan"), row_max), argmax


@triton.jit
def head(
    x, weight, bias, scale, shift, logits, program_max, program_argmax, eps, V, R,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """logits (R, V) of x (R, K), normalized; and each program's maximum logit and its id, (R, programs)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    ids = program * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_token = ids < V
    w = _load_tile(weight, ids, k, V, K)
    _launch_next(PDL)
    s = tl.load(scale + k, mask=k < K, other=0.0).to(tl.float32)
    t = tl.load(shift + ids, mask=is_token, other=0.0)
    b = tl.load(bias + ids, mask=is_token, other=0.0)
    _wait_for_previous(PDL)
    y = _multiply(x, w, s, t, b[None, :], k, eps, R, K, True, BLOCK_R)
    y = y.to(
        logits.dtype.element_ty
    )  # the argmax is taken of the rounded logits, as a caller would
    r = tl.arange(0, BLOCK_R)
    mask = (r < R)[:, None] & is_token[None, :]
    tl.store(logits + r[:, None] * V + ids[None, :], y, mask=mask)
    y = tl.where(is_token[None, :], y.to(tl.float32), float("-inf"))
    max_logit, argmax = _max_and_argmax(y, ids[None, :])
    tl.store(program_max + r * programs + program, max_logit, mask=r < R)
    tl.store(program_argmax + r * programs + program, argmax, mask=r < R)


@triton.jit
def finish_step(
    program_max, program_argmax, max_logits, argmax_ids, tokens, position_ptr, programs, max_length, R,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Reduce the results of ``head`` (R, programs) to one maximum and one id per row, in one program.

    They are written to column ``position`` of ``max_logits`` and ``argmax_ids`` (R, max_length). The ids are also
    written to ``tokens`` (R,), as the input of the next step, and the position is increased by 1.
    """
    _wait_for_previous(PDL)
    r, i = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    mask = (r < R)[:, None] & (i < programs)[None, :]
    y = tl.load(program_max + r[:, None] * programs + i[None, :], mask=mask, other=float("-inf"))
    ids = tl.load(program_argmax + r[:, None] * programs + i[None, :], mask=mask, other=0x7FFFFFFF)
    max_logit, argmax = _max_and_argmax(y, ids)
    position = tl.load(position_ptr)
    tl.store(max_logits + r * max_length + position, max_logit, mask=r < R)
    tl.store(argmax_ids + r * max_length + position, argmax.to(tl.int64), mask=r < R)
    tl.store(tokens + r, argmax.to(tl.int64), mask=r < R)
    tl.debug_barrier()  # all threads have read the position
    tl.store(position_ptr, position + 1)
