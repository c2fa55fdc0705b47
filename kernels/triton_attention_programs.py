"""What a program of the attention on NVIDIA GPUs computes (triton_attention.py launches them): forward, and backward in two ways.

One problem is (batch b, chunk u, key/value head g): its queries are G heads of `num_queries` tokens
u * query_step + query_first + i, its keys the valid tokens of K segments of R. Padding is never loaded; no valid key
gives output 0 and log-sum-exp +inf, from which the backward pass gets exact zeros without a branch. Softmax in exp2,
accumulation in fp32. The backward pass is one launch without atomics, so that every run gives the same bits: a program owns a
whole problem where its registers hold dQ (`is_whole`); else some own a tile of queries (dQ), the others a tile of keys
(dK, dV), and each walks the other side.
Queries and keys are held as the two halves that RoPE turns into each other: feature pairs (e, e + P) for the P rotated
ones, then pairs of the rest, whose angle is 0. Letters: H = half the head width, E its power of two, B tiles.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl


@triton.jit
def _pair(half, P: tl.constexpr, HALF: tl.constexpr):
    """Features of each pair's first and second member."""
    if P == HALF:
        return half, half + HALF
    return tl.where(half < P, half, half + P), tl.where(half < P, half + P, half + HALF)


@triton.jit
def _angles(COS, SIN, position, mask, half, P: tl.constexpr):
    """cos and sin [rows, pairs] at `position`; 1 and 0 for pairs that are not rotated. Every program reads the same tables,
    so they go through L1, which the copies of q, k and v into shared memory pass by (.ca and .cg in the machine code).
    """
    rotates = mask[:, None] & (half < P)[None, :]
    at = position[:, None] * P + half[None, :]
    cos = tl.load(COS + at, mask=rotates, other=1.0, cache_modifier=".ca")
    return cos, tl.load(SIN + at, mask=rotates, other=0.0, cache_modifier=".ca")


@triton.jit
def _load_rotated(X, rows, mask, COS, SIN, position, half, P: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr):
    """Two halves [rows, pairs] of X at row offsets `rows`, rotated in fp32, in X's type."""
    first, second = _pair(half, P, HALF)
    inside = mask[:, None] & (half < HALF)[None, :]
    a = tl.load(X + rows[:, None] + first[None, :], mask=inside, other=0.0)
    b = tl.load(X + rows[:, None] + second[None, :], mask=inside, other=0.0)
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if P > 0:
        cos, sin = _angles(COS, SIN, position, mask, half, P)
        x, y = a.to(tl.float32), b.to(tl.float32)
        a, b = (x * cos - y * sin).to(a.dtype), (y * cos + x * sin).to(b.dtype)
    return a, b


@triton.jit
def _store_rotated_back(X, rows, mask, a, b, COS, SIN, position, half, P: tl.constexpr, HALF: tl.constexpr):
    """Store the fp32 gradients of two rotated halves, rotated back."""
    if P > 0:
        cos, sin = _angles(COS, SIN, position, mask, half, P)
        a, b = a * cos + b * sin, b * cos - a * sin
    first, second = _pair(half, P, HALF)
    inside = mask[:, None] & (half < HALF)[None, :]
    tl.store(X + rows[:, None] + first[None, :], a.to(X.dtype.element_ty), mask=inside)
    tl.store(X + rows[:, None] + second[None, :], b.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _apart(x, WIDE: tl.constexpr):
    """Numbers of rows that a stride is to multiply: 64 bits only where a problem's own rows lie so far apart."""
    if WIDE:
        x = x.to(tl.int64)
    return x


@triton.jit
def _rows(i, first, head, g, b, x_b, x_n, x_h, G: tl.constexpr, WIDE: tl.constexpr):
    """Where a tile of queries lies in q, o or their gradients: a place of the problem, 64 bits, and rows from there."""
    return b * x_b + first.to(tl.int64) * x_n + g * G * x_h, _apart(i, WIDE) * x_n + (head - g * G) * x_h


@triton.jit
def _queries(tile, u, g, N, num_queries, query_step, query_first, G: tl.constexpr, BM: tl.constexpr):
    """Rows of a tile of queries: number within the problem, token, head, whether it exists."""
    row = tile * BM + tl.arange(0, BM)
    i, head = row % num_queries, row // num_queries
    token = u * query_step + query_first + i
    return i, token, g * G + head, (head < G) & (token < N)


@triton.jit
def _seen(
    i, key, low, end, begin, R, num_queries, CAUSAL: tl.constexpr, HAS_BEGINS: tl.constexpr, HAS_FIRST: tl.constexpr
):  # fmt: skip
    """Whether each query (rows) sees each key (columns); one row for all queries where they see the same."""
    sees = (key < end)[None, :]
    if HAS_FIRST:
        sees = sees & (key[None, :] >= tl.maximum(low, begin)[:, None])
    elif HAS_BEGINS:
        sees = sees & (key >= begin)[None, :]
    if CAUSAL:
        sees = sees & (key[None, :] <= (i + R - num_queries)[:, None])
    return sees


@triton.jit
def _range(BEGINS, ENDS, at, R, HAS_BEGINS: tl.constexpr, HAS_ENDS: tl.constexpr):
    begin, end = 0, R
    if HAS_BEGINS:
        begin = tl.maximum(tl.load(BEGINS + at), 0).to(tl.int32)
    if HAS_ENDS:
        end = tl.minimum(tl.load(ENDS + at), R).to(tl.int32)  # whatever the data say, nothing outside is read
    return begin, end


@triton.jit
def _load_queries(
    Q, FIRST, COS, SIN, b, g, first, i, token, head, exists, q_b, q_n, q_h, N, query_offset, query_period, half,
    P: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr,
    HAS_FIRST: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile's queries, rotated, and the first key that each sees."""
    place, rows = _rows(i, first, head, g, b, q_b, q_n, q_h, G, WIDE)
    q1, q2 = _load_rotated(Q + place, rows, exists, COS, SIN, query_offset + i % query_period, half, P, HALF, UPCAST)
    low = tl.zeros([BM], tl.int32)
    if HAS_FIRST:
        low = tl.load(FIRST + b * N + token, mask=exists, other=0).to(tl.int32)
    return q1, q2, low


@triton.jit
def _scores(a1, a2, b1, b2):
    """Products [rows of a, rows of b] of queries and keys, given as their halves."""
    return tl.dot(a2, tl.trans(b2), tl.dot(a1, tl.trans(b1), input_precision="ieee"), input_precision="ieee")


@triton.jit
def _seen_range(begin, end, i, low, exists, R, num_queries, CAUSAL: tl.constexpr, HAS_FIRST: tl.constexpr):
    """The range of keys that any query of a tile sees."""
    start = begin
    if HAS_FIRST:
        start = tl.maximum(begin, tl.min(tl.where(exists, low, R), 0))
    if CAUSAL:
        end = tl.minimum(end, tl.max(tl.where(exists, i, -1), 0) + R - num_queries + 1)
    return start, end


@triton.jit
def _place(b, u, j, g, s_b, s_l, s_j, s_h):
    """Where a segment's keys begin in k, v or their gradients."""
    return b * s_b + u.to(tl.int64) * s_l + j * s_j + g * s_h


@triton.jit
def _load_values(V, at, inside, e, HALF: tl.constexpr, UPCAST: tl.constexpr):
    value = tl.load(V + at[:, None] + e[None, :], mask=inside[:, None] & (e < 2 * HALF)[None, :], other=0.0)
    if UPCAST:
        value = value.to(tl.float32)
    return value


@triton.jit
def _mixed(x):
    """As kernels/dropout.py's, of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _hash_queries(SEED, b, head, token):
    """A hash of seed, batch, head and token of each row."""
    low = tl.load(SEED).to(tl.uint32)
    return _mixed(_mixed(_mixed(low + b.to(tl.uint32)) + head.to(tl.uint32)) + token.to(tl.uint32))


@triton.jit
def _kept(SEED, query_hash, key, drop_below, keep):
    """1/(1 - dropout) for the weights [rows, keys] that are kept, else 0; `key` counts through the segments."""
    key_hash = _mixed((tl.load(SEED) >> 32).to(tl.uint32) + key.to(tl.uint32))
    bits = _mixed(query_hash[:, None] ^ key_hash[None, :]) >> 8
    return tl.where(bits.to(tl.int32) < drop_below, 0.0, keep)


@triton.jit
def _attention_forward(
    Q, K, V, O, LSE, BEGINS, ENDS, FIRST, COS, SIN, SEED, drop_below, scale_keep, scale_log2,
    q_b, q_n, q_h, k_b, k_l, k_j, k_s, k_h, v_b, v_l, v_j, v_s, v_h, o_b, o_n, o_h,
    N, L, HEADS, R, num_queries, query_step, query_first, query_offset, query_period, query_tiles,
    NUM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, EH: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, HAS_BEGINS: tl.constexpr, HAS_ENDS: tl.constexpr,
    HAS_FIRST: tl.constexpr, UPCAST: tl.constexpr, DROPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tile, g, pair = tl.program_id(0) % query_tiles, tl.program_id(1), tl.program_id(0) // query_tiles
    b, u = (pair // L).to(tl.int64), pair % L
    half, e = tl.arange(0, EH), tl.arange(0, E)
    first = u * query_step + query_first
    i, token, head, exists = _queries(tile, u, g, N, num_queries, query_step, query_first, G, BM)
    q1, q2, low = _load_queries(Q, FIRST, COS, SIN, b, g, first, i, token, head, exists, q_b, q_n, q_h, N, query_offset,
                                query_period, half, P, HALF, BM, G, WIDE, HAS_FIRST, UPCAST)  # fmt: skip
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, E], tl.float32)
    for j in range(NUM):
        begin, end = _range(BEGINS, ENDS, (b * L + u) * NUM + j, R, HAS_BEGINS, HAS_ENDS)
        start, end = _seen_range(begin, end, i, low, exists, R, num_queries, CAUSAL, HAS_FIRST)
        for s0 in range(start // BN * BN, end, BN):
            key = s0 + tl.arange(0, BN)
            inside = (key >= begin) & (key < end)
            at = _apart(key, WIDE) * k_s
            k1, k2 = _load_rotated(
                K + _place(b, u, j, g, k_b, k_l, k_j, k_h), at, inside, COS, SIN, key, half, P, HALF, UPCAST
            )
            sees = _seen(i, key, low, end, begin, R, num_queries, CAUSAL, HAS_BEGINS, HAS_FIRST)
            score = tl.where(sees, _scores(q1, q2, k1, k2) * scale_log2, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, 1))
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no key so far: all weights 0
            factor = tl.exp2(peak - base)
            weight = tl.exp2(score - base[:, None])
            total = total * factor + tl.sum(weight, 1)
            if DROPS:
                weight *= _kept(SEED, _hash_queries(SEED, b, head, token), j * R + key, drop_below, scale_keep)
            at = _apart(key, WIDE) * v_s
            value = _load_values(V + _place(b, u, j, g, v_b, v_l, v_j, v_h), at, inside, e, HALF, UPCAST)
            out = tl.dot(weight.to(value.dtype), value, out * factor[:, None], input_precision="ieee")
            peak = new_peak
    attends = total != 0  # NaN stays NaN
    out = out / tl.where(attends, total, 1.0)[:, None]
    place, rows = _rows(i, first, head, g, b, o_b, o_n, o_h, G, WIDE)
    tl.store(
        O + place + rows[:, None] + e[None, :],
        out.to(O.dtype.element_ty),
        mask=exists[:, None] & (e < 2 * HALF)[None, :],
    )
    lse = tl.where(attends, peak + tl.log2(tl.where(attends, total, 1.0)), float("inf"))
    tl.store(LSE + (b * HEADS + head) * N + token, lse, mask=exists)


@triton.jit
def _load_gradient(
    O, DO, LSE, b, g, first, i, token, head, exists, o_b, o_n, o_h, N, HEADS, e,
    HALF: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grad_o [rows, E], delta = sum o grad_o and the log-sum-exp of a tile of queries."""
    place, rows = _rows(i, first, head, g, b, o_b, o_n, o_h, G, WIDE)
    at = rows[:, None] + e[None, :]
    inside = exists[:, None] & (e < 2 * HALF)[None, :]
    grad = tl.load(DO + place + at, mask=inside, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * tl.load(O + place + at, mask=inside, other=0.0).to(tl.float32), 1)
    if UPCAST:
        grad = grad.to(tl.float32)
    return grad, delta, tl.load(LSE + (b * HEADS + head) * N + token, mask=exists, other=float("inf"))


@triton.jit
def _query_gradient(
    Q, K, V, O, DO, LSE, DQ, BEGINS, ENDS, FIRST, COS, SIN, SEED, drop_below, scale_keep, scale_log2, scale,
    q_b, q_n, q_h, k_b, k_l, k_j, k_s, k_h, v_b, v_l, v_j, v_s, v_h, o_b, o_n, o_h, N, L, HEADS, R, num_queries,
    query_step, query_first, query_offset, query_period, tile, b, u, g, half, e,
    NUM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, EH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, HAS_BEGINS: tl.constexpr, HAS_ENDS: tl.constexpr,
    HAS_FIRST: tl.constexpr, UPCAST: tl.constexpr, DROPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries."""
    first = u * query_step + query_first
    i, token, head, exists = _queries(tile, u, g, N, num_queries, query_step, query_first, G, BM)
    q1, q2, low = _load_queries(Q, FIRST, COS, SIN, b, g, first, i, token, head, exists, q_b, q_n, q_h, N, query_offset,
                                query_period, half, P, HALF, BM, G, WIDE, HAS_FIRST, UPCAST)  # fmt: skip
    grad, delta, lse = _load_gradient(
        O, DO, LSE, b, g, first, i, token, head, exists, o_b, o_n, o_h, N, HEADS, e, HALF, G, WIDE, UPCAST
    )
    dq1 = tl.zeros([BM, EH], tl.float32)
    dq2 = tl.zeros([BM, EH], tl.float32)
    for j in range(NUM):
        begin, end = _range(BEGINS, ENDS, (b * L + u) * NUM + j, R, HAS_BEGINS, HAS_ENDS)
        start, end = _seen_range(begin, end, i, low, exists, R, num_queries, CAUSAL, HAS_FIRST)
        for s0 in range(start // BN * BN, end, BN):
            key = s0 + tl.arange(0, BN)
            inside = (key >= begin) & (key < end)
            at = _apart(key, WIDE) * k_s
            k1, k2 = _load_rotated(
                K + _place(b, u, j, g, k_b, k_l, k_j, k_h), at, inside, COS, SIN, key, half, P, HALF, UPCAST
            )
            sees = _seen(i, key, low, end, begin, R, num_queries, CAUSAL, HAS_BEGINS, HAS_FIRST)
            score = tl.where(sees, _scores(q1, q2, k1, k2) * scale_log2, float("-inf"))
            weight = tl.exp2(score - lse[:, None])
            at = _apart(key, WIDE) * v_s
            value = _load_values(V + _place(b, u, j, g, v_b, v_l, v_j, v_h), at, inside, e, HALF, UPCAST)
            slope = tl.dot(grad, tl.trans(value), input_precision="ieee")
            if DROPS:
                slope *= _kept(SEED, _hash_queries(SEED, b, head, token), j * R + key, drop_below, scale_keep)
            slope = (weight * (slope - delta[:, None]) * scale).to(k1.dtype)
            dq1 = tl.dot(slope, k1, dq1, input_precision="ieee")
            dq2 = tl.dot(slope, k2, dq2, input_precision="ieee")
    place, rows = _rows(i, first, head, g, b, o_b, o_n, o_h, G, WIDE)  # grad_q is laid out as o
    _store_rotated_back(DQ + place, rows, exists, dq1, dq2, COS, SIN, query_offset + i % query_period, half, P, HALF)


@triton.jit
def _key_gradients(
    Q, K, V, O, DO, LSE, DK, DV, BEGINS, ENDS, FIRST, COS, SIN, SEED, drop_below, scale_keep, scale_log2, scale,
    q_b, q_n, q_h, k_b, k_l, k_j, k_s, k_h, v_b, v_l, v_j, v_s, v_h, o_b, o_n, o_h, g_b, g_l, g_j, g_s, g_h,
    N, L, HEADS, R, num_queries, query_step, query_first, query_offset, query_period, query_tiles, j, lowest, b, u, g,
    half, e, NUM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, EH: tl.constexpr,
    E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, HAS_BEGINS: tl.constexpr,
    HAS_ENDS: tl.constexpr, HAS_FIRST: tl.constexpr, UPCAST: tl.constexpr, DROPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dK and dV of the tile of keys that begins at `lowest` of segment j."""
    key = lowest + tl.arange(0, BN)
    begin, end = _range(BEGINS, ENDS, (b * L + u) * NUM + j, R, HAS_BEGINS, HAS_ENDS)
    inside = (key < end) & (key >= begin)
    at = _apart(key, WIDE) * k_s
    k1, k2 = _load_rotated(K + _place(b, u, j, g, k_b, k_l, k_j, k_h), at, inside, COS, SIN, key, half, P, HALF, UPCAST)
    at = _apart(key, WIDE) * v_s
    value = _load_values(V + _place(b, u, j, g, v_b, v_l, v_j, v_h), at, inside, e, HALF, UPCAST)
    dk1 = tl.zeros([BN, EH], tl.float32)
    dk2 = tl.zeros([BN, EH], tl.float32)
    dv = tl.zeros([BN, E], tl.float32)
    stop = tl.where((lowest < end) & (lowest + BN > begin), query_tiles, 0)  # a tile of padding: zeros
    for tile in range(0, stop):
        first = u * query_step + query_first
        i, token, head, exists = _queries(tile, u, g, N, num_queries, query_step, query_first, G, BM)
        is_needed = True
        if CAUSAL:
            is_needed = tl.max(tl.where(exists, i, -1), 0) + R - num_queries >= lowest
        if is_needed:
            q1, q2, low = _load_queries(Q, FIRST, COS, SIN, b, g, first, i, token, head, exists, q_b, q_n, q_h, N, query_offset,
                                        query_period, half, P, HALF, BM, G, WIDE, HAS_FIRST, UPCAST)  # fmt: skip
            grad, delta, lse = _load_gradient(
                O, DO, LSE, b, g, first, i, token, head, exists, o_b, o_n, o_h, N, HEADS, e, HALF, G, WIDE, UPCAST
            )
            sees = tl.trans(_seen(i, key, low, end, begin, R, num_queries, CAUSAL, HAS_BEGINS, HAS_FIRST))
            score = tl.where(sees, _scores(k1, k2, q1, q2) * scale_log2, float("-inf"))
            weight = tl.exp2(score - lse[None, :])
            slope = tl.dot(value, tl.trans(grad), input_precision="ieee")
            share = weight
            if DROPS:
                hashes = _hash_queries(SEED, b, head, token)
                kept = tl.trans(_kept(SEED, hashes, j * R + key, drop_below, scale_keep))
                share = weight * kept
                slope *= kept
            dv = tl.dot(share.to(grad.dtype), grad, dv, input_precision="ieee")
            slope = (weight * (slope - delta[None, :]) * scale).to(q1.dtype)
            dk1 = tl.dot(slope, q1, dk1, input_precision="ieee")
            dk2 = tl.dot(slope, q2, dk2, input_precision="ieee")
    place, at = _place(b, u, j, g, g_b, g_l, g_j, g_h), _apart(key, WIDE) * g_s
    is_value = (key < R)[:, None] & (e < 2 * HALF)[None, :]
    tl.store(DV + place + at[:, None] + e[None, :], dv.to(DV.dtype.element_ty), mask=is_value)
    _store_rotated_back(DK + place, at, key < R, dk1, dk2, COS, SIN, key, half, P, HALF)


@triton.jit
def _attention_backward(
    Q, K, V, O, DO, LSE, DQ, DK, DV, BEGINS, ENDS, FIRST, COS, SIN, SEED, drop_below, scale_keep, scale_log2, scale,
    q_b, q_n, q_h, k_b, k_l, k_j, k_s, k_h, v_b, v_l, v_j, v_s, v_h, o_b, o_n, o_h, g_b, g_l, g_j, g_s, g_h,
    N, L, HEADS, R, num_queries, query_step, query_first, query_offset, query_period, query_tiles, segment_tiles,
    NUM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, EH: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, HAS_BEGINS: tl.constexpr, HAS_ENDS: tl.constexpr,
    HAS_FIRST: tl.constexpr, UPCAST: tl.constexpr, DROPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    programs = query_tiles + NUM * segment_tiles  # of one (b, u, g)
    program, g, pair = tl.program_id(0) % programs, tl.program_id(1), tl.program_id(0) // programs
    b, u = (pair // L).to(tl.int64), pair % L
    half, e = tl.arange(0, EH), tl.arange(0, E)
    if program < query_tiles:
        _query_gradient(
            Q, K, V, O, DO, LSE, DQ, BEGINS, ENDS, FIRST, COS, SIN, SEED, drop_below, scale_keep, scale_log2, scale,
            q_b, q_n, q_h, k_b, k_l, k_j, k_s, k_h, v_b, v_l, v_j, v_s, v_h, o_b, o_n, o_h, N, L, HEADS, R, num_queries,
            query_step, query_first, query_offset, query_period, program, b, u, g, half, e,
            NUM, G, P, HALF, EH, BM, BN, CAUSAL, HAS_BEGINS, HAS_ENDS, HAS_FIRST, UPCAST, DROPS, WIDE,
        )  # fmt: skip
    else:
        j, lowest = (program - query_tiles) // segment_tiles, (program - query_tiles) % segment_tiles * BN
        _key_gradients(
            Q, K, V, O, DO, LSE, DK, DV, BEGINS, ENDS, FIRST, COS, SIN, SEED, drop_below, scale_keep, scale_log2, scale,
            q_b, q_n, q_h, k_b, k_l, k_j, k_s, k_h, v_b, v_l, v_j, v_s, v_h, o_b, o_n, o_h, g_b, g_l, g_j, g_s, g_h,
            N, L, HEADS, R, num_queries, query_step, query_first, query_offset, query_period, query_tiles, j, lowest,
            b, u, g, half, e,
            NUM, G, P, HALF, EH, E, BM, BN, CAUSAL, HAS_BEGINS, HAS_ENDS, HAS_FIRST, UPCAST, DROPS, WIDE,
        )  # fmt: skip


@triton.jit
def _valid_tile(
    item, BEGINS, ENDS, at, R, NUM: tl.constexpr, BN: tl.constexpr, HAS_BEGINS: tl.constexpr, HAS_ENDS: tl.constexpr
):  # fmt: skip
    """Of the item-th tile that holds valid keys: segment, first key, the segment's range; and how many such tiles there are."""
    its, lowest, its_begin, its_end, past = 0, 0, 0, 0, 0
    for j in tl.static_range(NUM):
        begin, end = _range(BEGINS, ENDS, at + j, R, HAS_BEGINS, HAS_ENDS)
        tiles = tl.where(end > begin, (end + BN - 1) // BN - begin // BN, 0)
        is_its = (item >= past) & (item < past + tiles)
        its = tl.where(is_its, j, its)
        lowest = tl.where(is_its, (begin // BN + item - past) * BN, lowest)
        its_begin, its_end = tl.where(is_its, begin, its_begin), tl.where(is_its, end, its_end)
        past += tiles
    return its, lowest, its_begin, its_end, past


@triton.jit
def _store_zeros(
    DK, DV, BEGINS, ENDS, b, u, g, L, R, g_b, g_l, g_j, g_s, g_h, segment_tiles, e,
    NUM: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr, HAS_BEGINS: tl.constexpr, HAS_ENDS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of tiles that are padding throughout, which no product has written."""
    for item in range(0, NUM * segment_tiles):
        j, s0 = item // segment_tiles, item % segment_tiles * BN
        begin, end = _range(BEGINS, ENDS, (b * L + u) * NUM + j, R, HAS_BEGINS, HAS_ENDS)
        if (end <= begin) | (s0 >= end) | (s0 + BN <= begin):
            key = s0 + tl.arange(0, BN)
            at = (_apart(key, WIDE) * g_s)[:, None] + e[None, :]
            place = _place(b, u, j, g, g_b, g_l, g_j, g_h)
            nothing = tl.zeros([BN, e.shape[0]], DK.dtype.element_ty)
            mask = (key < R)[:, None] & (e < 2 * HALF)[None, :]
            tl.store(DK + place + at, nothing, mask=mask)
            tl.store(DV + place + at, nothing, mask=mask)


@triton.jit
def _attention_backward_whole(
    Q, K, V, O, DO, LSE, DQ, DK, DV, BEGINS, ENDS, FIRST, COS, SIN, SEED, drop_below, scale_keep, scale_log2, scale,
    q_b, q_n, q_h, k_b, k_l, k_j, k_s, k_h, v_b, v_l, v_j, v_s, v_h, o_b, o_n, o_h, g_b, g_l, g_j, g_s, g_h,
    N, L, HEADS, R, num_queries, query_step, query_first, query_offset, query_period, query_tiles, segment_tiles,
    NUM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, EH: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, HAS_BEGINS: tl.constexpr, HAS_ENDS: tl.constexpr,
    HAS_FIRST: tl.constexpr, UPCAST: tl.constexpr, DROPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All gradients of a problem whose queries are one tile: everything is read once and written once, dQ in registers."""
    g, pair = tl.program_id(1), tl.program_id(0)
    b, u = (pair // L).to(tl.int64), pair % L
    half, e = tl.arange(0, EH), tl.arange(0, E)
    first = u * query_step + query_first
    i, token, head, exists = _queries(0, u, g, N, num_queries, query_step, query_first, G, BM)
    q1, q2, low = _load_queries(Q, FIRST, COS, SIN, b, g, first, i, token, head, exists, q_b, q_n, q_h, N, query_offset,
                                query_period, half, P, HALF, BM, G, WIDE, HAS_FIRST, UPCAST)  # fmt: skip
    grad, delta, lse = _load_gradient(
        O, DO, LSE, b, g, first, i, token, head, exists, o_b, o_n, o_h, N, HEADS, e, HALF, G, WIDE, UPCAST
    )
    dq1 = tl.zeros([BM, EH], tl.float32)
    dq2 = tl.zeros([BM, EH], tl.float32)
    at_lengths = (b * L + u) * NUM
    _, _, _, _, tiles = _valid_tile(-1, BEGINS, ENDS, at_lengths, R, NUM, BN, HAS_BEGINS, HAS_ENDS)
    for item in range(0, tiles):  # one loop over all segments, so that loads run ahead from one into the next
        j, s0, begin, end, _ = _valid_tile(item, BEGINS, ENDS, at_lengths, R, NUM, BN, HAS_BEGINS, HAS_ENDS)
        key = s0 + tl.arange(0, BN)
        inside = (key >= begin) & (key < end)
        at = _apart(key, WIDE) * k_s
        k1, k2 = _load_rotated(
            K + _place(b, u, j, g, k_b, k_l, k_j, k_h), at, inside, COS, SIN, key, half, P, HALF, UPCAST
        )
        at = _apart(key, WIDE) * v_s
        value = _load_values(V + _place(b, u, j, g, v_b, v_l, v_j, v_h), at, inside, e, HALF, UPCAST)
        sees = tl.trans(_seen(i, key, low, end, begin, R, num_queries, CAUSAL, HAS_BEGINS, HAS_FIRST))
        score = tl.where(sees, _scores(k1, k2, q1, q2) * scale_log2, float("-inf"))
        weight = tl.exp2(score - lse[None, :])
        slope = tl.dot(value, tl.trans(grad), input_precision="ieee")
        share = weight
        if DROPS:
            hashes = _hash_queries(SEED, b, head, token)
            kept = tl.trans(_kept(SEED, hashes, j * R + key, drop_below, scale_keep))
            share = weight * kept
            slope *= kept
        dv = tl.dot(share.to(grad.dtype), grad, input_precision="ieee")
        place, at = _place(b, u, j, g, g_b, g_l, g_j, g_h), _apart(key, WIDE) * g_s
        is_value = (key < R)[:, None] & (e < 2 * HALF)[None, :]
        tl.store(
            DV + place + at[:, None] + e[None, :], dv.to(DV.dtype.element_ty), mask=is_value
        )  # frees its registers
        slope = (weight * (slope - delta[None, :]) * scale).to(q1.dtype)
        dk1 = tl.dot(slope, q1, input_precision="ieee")
        dk2 = tl.dot(slope, q2, input_precision="ieee")
        _store_rotated_back(DK + place, at, key < R, dk1, dk2, COS, SIN, key, half, P, HALF)
        dq1 = tl.dot(tl.trans(slope), k1, dq1, input_precision="ieee")
        dq2 = tl.dot(tl.trans(slope), k2, dq2, input_precision="ieee")
    _store_zeros(DK, DV, BEGINS, ENDS, b, u, g, L, R, g_b, g_l, g_j, g_s, g_h, segment_tiles, e,
                 NUM, HALF, BN, HAS_BEGINS, HAS_ENDS, WIDE)  # fmt: skip
    place, rows = _rows(i, first, head, g, b, o_b, o_n, o_h, G, WIDE)  # grad_q is laid out as o
    _store_rotated_back(DQ + place, rows, exists, dq1, dq2, COS, SIN, query_offset + i % query_period, half, P, HALF)
