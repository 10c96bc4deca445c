"""The kernels of a step of decoding, in Triton: norm, product, bias, GELU and shortcut are one.

A kernel that follows another starts when all programs of that are under way (Hopper's programmatic dependent launch,
EARLY), reads what no kernel writes, which is the weights, and waits then for the other's end. Sums are in float32, in a
fixed order, so the same step has the same bits.

Shapes: R rows, C ``emb_dim``, H heads, D = C / H, V ``vocab_size``, N and K of a weight (N, K). BLOCK_… is a power of 2,
and what a program has of it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _begin(EARLY: tl.constexpr):
    """What follows in the stream may start, to read what nobody writes."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def _wait(EARLY: tl.constexpr):
    """For what came before in the stream."""
    if EARLY:
        gdc_wait()


@triton.jit
def embed(
    tokens, at, padding, tok_emb, pos_emb, x,
    C: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x (R, C): embeddings of ``tokens`` (R,), those below 0 as 0, and of their positions."""
    _begin(EARLY)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    token = tl.maximum(tl.load(tokens + row), 0)
    position = tl.load(at)
    if PADDED:
        position -= tl.load(padding + row)
    token_part = tl.load(tok_emb + token * C + columns, mask=inside)
    position_part = tl.load(pos_emb + position * C + columns, mask=inside)
    sum_of_both = token_part.to(tl.float32) + position_part.to(tl.float32)
    tl.store(x + row * C + columns, sum_of_both, mask=inside)


@triton.jit
def _tile(weight, n, k, N, K: tl.constexpr):
    """Rows n (BLOCK_N,) of the weight (N, K), columns k (BLOCK_K,); what lies outside is 0, and not read."""
    mask = (n < N)[:, None] & (k < K)[None, :]
    where = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(where, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _product(
    x, w, scale, shift, before, k, eps, R, K: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """x (R, K) times the tile w (BLOCK_N, BLOCK_K), and ``before``: (BLOCK_R, BLOCK_N).

    With NORM the rows are normalised first, for which the product does not wait: with (x - m) / s · scale (BLOCK_K,) of a
    row's mean m and deviation s, it is that with x · scale, less m times that with scale, which ``shift`` (BLOCK_N,)
    is, over s. Its last steps are fma in so many words: where a result is used twice the compiler may compute it twice, and
    would round but one of them in between.
    """
    inside = k < K
    if BLOCK_R == 1:  # of one row in two dimensions, for which the compiler finds a better layout
        v = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            mean = tl.sum(v, 0) / K
            centred = tl.where(inside, v - mean, 0.0)
            over = tl.rsqrt(tl.sum(centred * centred, 0) / K + eps)
            y = tl.sum(w.to(tl.float32) * (v * scale)[None, :], 1)
            y = tl.fma(tl.fma(-mean, shift, y)[None, :], over, before)
        else:
            y = tl.sum(w.to(tl.float32) * v[None, :], 1)[None, :] + before
    else:
        r = tl.arange(0, BLOCK_R)
        mask = (r < R)[:, None] & inside[None, :]
        v = tl.load(x + r[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORM:
            mean = tl.sum(v, 1) / K
            centred = tl.where(inside[None, :], v - mean[:, None], 0.0)
            over = tl.rsqrt(tl.sum(centred * centred, 1) / K + eps)[:, None]
            y = tl.sum(w.to(tl.float32)[None, :, :] * (v * scale[None, :])[:, None, :], 2)
            y = tl.fma(tl.fma(-mean[:, None], shift[None, :], y), over, before)
        else:
            y = tl.sum(w.to(tl.float32)[None, :, :] * v[:, None, :], 2) + before
    return y


@triton.jit
def linear(
    x, weight, bias, scale, shift, out, eps, N, R,
    K: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out (R, N): x (R, K), normalised if NORM, times weight (N, K), plus bias, through GPT-2's GELU if GELU; if ADD,
    added to what ``out`` holds."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w = _tile(weight, n, k, N, K)
    _begin(EARLY)
    s, t = 0.0, 0.0
    if NORM:
        s = tl.load(scale + k, mask=k < K, other=0.0).to(tl.float32)
        t = tl.load(shift + n, mask=n < N, other=0.0)
    before = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    if BIAS:
        before += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    _wait(EARLY)
    r = tl.arange(0, BLOCK_R)
    target = out + r[:, None] * N + n[None, :]
    mask = (r < R)[:, None] & (n < N)[None, :]
    if ADD:
        before += tl.load(target, mask=mask, other=0.0)
    y = _product(x, w, s, t, before, k, eps, R, K, NORM, BLOCK_R)
    if GELU:  # its tanh form: (1 + tanh(u)) / 2 is sigmoid(2u)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    tl.store(target, y, mask=mask)


@triton.jit
def _cached(cache, of_head, first, end, d, D: tl.constexpr, BLOCK_T: tl.constexpr):
    """Positions from ``first`` on, as many as a block has, but none from ``end`` on: (BLOCK_T, BLOCK_D)."""
    t = first + tl.arange(0, BLOCK_T)
    mask = (t < end)[:, None] & (d < D)[None, :]
    return tl.load(cache + of_head + t[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def _attend(q, k, v, first, end, y, total, largest, BLOCK_T: tl.constexpr):
    """A block more of keys and values in a softmax that goes on: its sums of values and weights, its largest score."""
    seen = first + tl.arange(0, BLOCK_T) < end
    scores = tl.where(seen, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, 0))
    weights = tl.exp(scores - larger)
    shrink = tl.exp(largest - larger)
    y = y * shrink + tl.sum(weights[:, None] * v.to(tl.float32), 0)
    return y, total * shrink + tl.sum(weights, 0), larger


@triton.jit
def attention(
    qkv, keys, values, at, padding, out, sums, totals, done, scale, T,
    C: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, SPANS: tl.constexpr, BLOCK_SPANS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out (R, C): one head of one row's query over its cached keys and values (R, H, T, D) and over its own, which are
    stored at position ``at``.

    Of many positions a program has SPAN. Each leaves its ``sums`` (R, H, spans, D) and ``totals`` (R, H, spans, 2) of
    weights and largest scores, and the last of a head, by ``done`` (R, H), adds them up in their order.
    """
    _begin(EARLY)
    head, row, span = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    one = row * tl.num_programs(0) + head
    of_head = one.to(tl.int64) * T * D
    position = tl.load(at)
    first = position * 0
    if PADDED:
        first += tl.load(padding + row)
    spans = tl.maximum(tl.cdiv(position - first, SPAN), 1)
    first += span * SPAN
    end = tl.minimum(first + SPAN, position)
    # of steps before this one, so nobody writes them any more
    k_before = _cached(keys, of_head, first, end, d, D, BLOCK_T)
    v_before = _cached(values, of_head, first, end, d, D, BLOCK_T)
    _wait(EARLY)
    if span < spans:
        own = qkv + row * 3 * C + head * D + d
        q = tl.load(own, mask=inside, other=0.0).to(tl.float32) * scale
        y = tl.zeros((BLOCK_D,), tl.float32)
        largest = tl.sum(y, 0) - 1e38
        total = tl.sum(y, 0)
        if span == 0:
            k = tl.load(own + C, mask=inside, other=0.0)
            v = tl.load(own + 2 * C, mask=inside, other=0.0)
            tl.store(keys + of_head + position * D + d, k, mask=inside)
            tl.store(values + of_head + position * D + d, v, mask=inside)
            y = v.to(tl.float32)
            largest = tl.sum(q * k.to(tl.float32), 0)
            total = total + 1.0
        y, total, largest = _attend(q, k_before, v_before, first, end, y, total, largest, BLOCK_T)
        first += BLOCK_T
        while first < end:
            k_before = _cached(keys, of_head, first, end, d, D, BLOCK_T)
            v_before = _cached(values, of_head, first, end, d, D, BLOCK_T)
            y, total, largest = _attend(
                q, k_before, v_before, first, end, y, total, largest, BLOCK_T
            )
            first += BLOCK_T
        target = out + row * C + head * D + d
        if spans == 1:
            tl.store(target, y / total, mask=inside)
        elif SPANS > 1:
            own_sums = sums + one * SPANS * D + d[None, :]
            own_totals = totals + one * SPANS * 2
            tl.store(own_sums + span * D, y[None, :], mask=inside[None, :])
            tl.store(own_totals + span * 2, total)
            tl.store(own_totals + span * 2 + 1, largest)
            tl.debug_barrier()  # all of this program's are written before it is counted
            if tl.atomic_add(done + one, 1, sem="acq_rel") == spans - 1:
                i = tl.arange(0, BLOCK_SPANS)
                there = i < spans
                where = own_totals + i * 2
                weights = tl.load(where, mask=there, other=0.0, cache_modifier=".cg")
                scores = tl.load(where + 1, mask=there, other=-1e38, cache_modifier=".cg")
                grow = tl.exp(scores - tl.max(scores, 0))
                parts = tl.load(
                    own_sums + i[:, None] * D,
                    mask=there[:, None] & inside[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                y = tl.sum(parts * grow[:, None], 0) / tl.sum(weights * grow, 0)
                tl.store(target, y, mask=inside)
                tl.store(done + one, 0)


@triton.jit
def _largest(y, ids):
    """Of each row of ``y`` (r, n) the largest, or NaN if there is one; and the largest number's id, of equal ones the
    lowest."""
    damaged = y != y
    numbers = tl.where(damaged, float("-inf"), y)
    best = tl.max(numbers, 1)
    likeliest = tl.min(tl.where(numbers == best[:, None], ids, 0x7FFFFFFF), 1)
    return tl.where(tl.max(damaged.to(tl.int32), 1) > 0, float("nan"), best), likeliest


@triton.jit
def head(
    x, weight, bias, scale, shift, logits, best, best_ids, eps, V, R,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """logits (R, V) of x (R, K) normalised; and the largest of each program's, and its id (R, programs)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    ids = program * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    wanted = ids < V
    w = _tile(weight, ids, k, V, K)
    _begin(EARLY)
    s = tl.load(scale + k, mask=k < K, other=0.0).to(tl.float32)
    t = tl.load(shift + ids, mask=wanted, other=0.0)
    b = tl.load(bias + ids, mask=wanted, other=0.0)
    _wait(EARLY)
    y = _product(x, w, s, t, b[None, :], k, eps, R, K, True, BLOCK_R)
    y = y.to(logits.dtype.element_ty)  # what is compared is what is seen
    r = tl.arange(0, BLOCK_R)
    mask = (r < R)[:, None] & wanted[None, :]
    tl.store(logits + r[:, None] * V + ids[None, :], y, mask=mask)
    y = tl.where(wanted[None, :], y.to(tl.float32), float("-inf"))
    value, token = _largest(y, ids[None, :])
    tl.store(best + r * programs + program, value, mask=r < R)
    tl.store(best_ids + r * programs + program, token, mask=r < R)


@triton.jit
def finish(
    best, best_ids, largest, likeliest, tokens, at, n, T, R,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The largest of what each program of ``head`` found and its id, to this position's place in (R, T); the id as the
    next token too, and the next position in ``at``. By one program."""
    _wait(EARLY)
    r, i = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    mask = (r < R)[:, None] & (i < n)[None, :]
    y = tl.load(best + r[:, None] * n + i[None, :], mask=mask, other=float("-inf"))
    ids = tl.load(best_ids + r[:, None] * n + i[None, :], mask=mask, other=0x7FFFFFFF)
    value, token = _largest(y, ids)
    position = tl.load(at)
    tl.store(largest + r * T + position, value, mask=r < R)
    tl.store(likeliest + r * T + position, token.to(tl.int64), mask=r < R)
    tl.store(tokens + r, token.to(tl.int64), mask=r < R)
    tl.debug_barrier()  # all have read the position
    tl.store(at, position + 1)
