"""The kernels of a layer between the base's products: what the base computes there anyway, and in the same launches what adapters add.

    embed      x = embedding;  a = x * g;  sum of squares
    attend_in  q, k, v = rope(r a W_qkv + LoRA); k and v into the cache; what the routers say of the token
    residual   x += y + LoRA (+ parallel adapter);  a = x * g;  sum of squares         behind O and behind DOWN
    act        z = silu(r a W_gate + LoRA) * (r a W_up + LoRA)

A product reads a = x * g and not the norm; its float32 sums are multiplied by r = 1 / rms(x) where they are used, so that no kernel needs a
whole row. One program takes a chunk, at most 16 tokens of one slot under one rule, and some columns; it reads its slot's second factors
only, and of these only the columns that weigh something for one of its tokens. Grids cover the static buffers: empty chunks return.

All that an adapter's coefficients are made of is float32, with exact division: `>=` is discontinuous. What may not be finite is selected
away, never multiplied by 0. The definition is model/moa.py, which every kernel is tested against in Triton's interpreter.
"""

import triton
import triton.language as tl

from moa_serve.gpu.tiles import LOWEST, PROMPT_TILE, dot, online_softmax

CHUNK = 16
"""Tokens of a chunk, at most: what a product on tensor cores takes at least."""
CHUNK_FIELDS = 8
START, COUNT, SLOT, RULE, GIVEN, COUNTERS = range(6)
"""Of a chunk: first token, tokens, slot or -1, row of the rules, whether its layer gates are given, row of the counters or -1."""

# Where these point moves with the layer and the number of tokens, by less than 16 bytes: compiled for any place, a kernel is compiled once.
_MOVING = [
    "chunks_ptr", "token_ids_ptr", "places_ptr", "ints_ptr", "floats_ptr", "rule_ints_ptr", "rule_floats_ptr", "given_ptr", "words_ptr",
    "counters_ptr",
]  # fmt: skip


@triton.jit
def _sigmoid(x):
    return tl.math.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def _silu(x):
    return x * _sigmoid(x)


@triton.jit
def _column(values, columns, index):
    """(C,): column `index` of (C, E); whatever the others are."""
    return tl.sum(tl.where(columns[None, :] == index, values, 0.0), axis=1)


@triton.jit
def _pick(values, index, C: tl.constexpr, K: tl.constexpr):
    """(C, K): of (C, E) the column that each of `index` (K,) names; 1 where it names none."""
    is_named = (index >= 0)[None, :]
    places = tl.broadcast_to(tl.where(is_named, index[None, :], 0), (C, K))
    return tl.where(is_named, tl.gather(values, places, axis=1), 1.0)


@triton.jit
def _inverse_rms(squares_ptr, tokens, mask, width, num_tiles, TILES: tl.constexpr, eps):
    """(C,): 1 / rms, from sums of squares of tiles (T, tiles)."""
    tiles = tl.arange(0, TILES)
    parts = tl.load(
        squares_ptr + tokens[:, None] * num_tiles + tiles[None, :], mask=mask[:, None] & (tiles[None, :] < num_tiles), other=0.0
    )
    return tl.math.rsqrt(tl.sum(parts, axis=1) / width + eps)


@triton.jit
def _low(low_ptr, stride, split_stride, tokens, rows, mask, SPLITS: tl.constexpr):
    """First factors' products: (C, 1) tokens, (1, K) rows -> (C, K), the sum of what `SPLITS` programs made of parts of the inputs."""
    places = low_ptr + tokens * stride + rows
    out = tl.load(places, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        out += tl.load(places + split * split_stride, mask=mask, other=0.0)
    return out


@triton.jit
def _router_low(low_ptr, stride, split_stride, tokens, rows, mask, again, PARTS: tl.constexpr, SPLITS: tl.constexpr):
    """The same of rows that stand twice, `again` rows apart."""
    out = _low(low_ptr, stride, split_stride, tokens, rows, mask, SPLITS)
    if PARTS == 2:
        out += _low(low_ptr, stride, split_stride, tokens, rows + again, mask, SPLITS)
    return out


@triton.jit
def _route(logits, limit_logit, outputs, is_softmax, rule_ints_ptr, rule_floats_ptr, E: tl.constexpr, C: tl.constexpr):
    """What a router says, by its rule (adapter.rules.RouterRule).

    Args:
        logits: (C, E), of which `outputs` are. limit_logit: (C,), of the threshold function.
    Returns:
        scores (C, E), threshold (C,), selected (C, E) bool, gates (C, E).
    """
    columns = tl.arange(0, E)
    used = (columns < outputs)[None, :]
    top = tl.max(tl.where(used, logits, float("-inf")), axis=1)
    powers = tl.where(used, tl.exp(logits - top[:, None]), 0.0)
    total = tl.sum(powers, axis=1)
    soft = tl.math.div_rn(powers, tl.broadcast_to(tl.where(total == 0.0, 1.0, total)[:, None], (C, E)))
    scores = tl.where(used, tl.where(is_softmax != 0, soft, _sigmoid(logits)), 0.0)

    has_threshold = tl.load(rule_ints_ptr + 0) != 0
    is_function = tl.load(rule_ints_ptr + 1) != 0
    subtracts = tl.load(rule_ints_ptr + 2) != 0
    top_k = tl.load(rule_ints_ptr + 3)
    renormalises = tl.load(rule_ints_ptr + 4) != 0
    disabled = tl.load(rule_ints_ptr + 5)
    forced = tl.load(rule_ints_ptr + 6)
    bits = columns.to(tl.int64)
    is_disabled = (((disabled >> bits) & 1) != 0)[None, :]
    is_forced = (((forced >> bits) & 1) != 0)[None, :]

    limit = tl.load(rule_floats_ptr) * tl.where(is_function, _sigmoid(limit_logit), 1.0)
    limit = tl.where(has_threshold, limit, 0.0)
    values = tl.where(subtracts & has_threshold, scores - limit[:, None], scores)
    passes = tl.where(subtracts, values > 0, scores >= limit[:, None])
    kept = used & ((~has_threshold) | passes | is_forced) & (~is_disabled)
    if top_k > 0:
        ranked = tl.where(values == values, values, 2.0)  # not a number: above all scores, so that it comes out and the row fails
        ranked = tl.where(is_forced, float("inf"), ranked)
        ranked = tl.where(kept, ranked, float("-inf"))
        before = tl.zeros((C, E), tl.int32)
        for e in range(outputs):
            other = tl.max(tl.where(columns[None, :] == e, ranked, float("-inf")), axis=1)[:, None]
            before += ((other > ranked) | ((other == ranked) & (e < columns[None, :]))).to(tl.int32)
        kept = kept & (before < top_k)
    gates = tl.where(kept, values, 0.0)
    if renormalises:
        total = tl.sum(gates, axis=1)
        gates = tl.math.div_rn(gates, tl.broadcast_to(tl.where(total == 0.0, 1.0, total)[:, None], (C, E)))
    return scores, limit, kept, gates


@triton.jit
def _say(words_ptr, word_width, router, tokens, mask, scores, limit, selected, gates, E: tl.constexpr):
    """Write down what a router said."""
    columns = tl.arange(0, E)
    own = words_ptr + tokens[:, None] * word_width + router * (3 * E + 1)
    each = mask[:, None] & (columns >= 0)[None, :]
    tl.store(own + columns[None, :], scores, mask=each)
    tl.store(words_ptr + tokens * word_width + router * (3 * E + 1) + E, limit, mask=mask)
    tl.store(own + (E + 1) + columns[None, :], selected.to(tl.float32), mask=each)
    tl.store(own + (2 * E + 1) + columns[None, :], gates, mask=each)


@triton.jit
def _said_gates(words_ptr, word_width, router, tokens, mask, E: tl.constexpr):
    """(C, E): the gates of a router that was asked in an earlier kernel."""
    columns = tl.arange(0, E)
    return tl.load(
        words_ptr + tokens[:, None] * word_width + router * (3 * E + 1) + (2 * E + 1) + columns[None, :], mask=mask[:, None], other=0.0
    )


@triton.jit
def _layer_route(
    low_ptr, stride, split_stride, scale, given_ptr, given_width, is_given, ints_ptr, floats_ptr, rule_ints_ptr, rule_floats_ptr,
    tokens, mask, L: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The layer router of a chunk, from its rows' products times `scale` (C,)."""
    E: tl.constexpr = L.block  # a shape must be a constant by its type
    columns = tl.arange(0, E)
    outputs = tl.load(ints_ptr + L.at_outputs)
    used = (columns < outputs)[None, :]
    is_output = mask[:, None] & used
    last = tl.full((1, 1), L.gate_rows - 1, tl.int32)
    limit_logit = _router_low(low_ptr, stride, split_stride, tokens[:, None], last, mask[:, None], L.gate_rows, L.parts, SPLITS)
    limit_logit = tl.sum(limit_logit, axis=1) * scale + tl.load(floats_ptr + L.at_gate_bias + L.gate_rows - 1)
    logits = _router_low(low_ptr, stride, split_stride, tokens[:, None], columns[None, :], is_output, L.gate_rows, L.parts, SPLITS)
    logits = logits * scale[:, None] + tl.load(floats_ptr + L.at_gate_bias + columns, mask=columns < outputs, other=0.0)[None, :]
    if L.hidden > 0:
        hidden = tl.load(ints_ptr + L.at_hidden)
        if hidden > 0:
            units = tl.arange(0, L.hidden_block)
            is_unit = units < hidden
            each = mask[:, None] & is_unit[None, :]
            one = _router_low(low_ptr, stride, split_stride, tokens[:, None], units[None, :], each, L.gate_rows, L.parts, SPLITS)
            three = _router_low(
                low_ptr, stride, split_stride, tokens[:, None], L.hidden + units[None, :], each, L.gate_rows, L.parts, SPLITS
            )
            one = one * scale[:, None] + tl.load(floats_ptr + L.at_gate_bias + units, mask=is_unit, other=0.0)[None, :]
            three = three * scale[:, None] + tl.load(floats_ptr + L.at_gate_bias + L.hidden + units, mask=is_unit, other=0.0)[None, :]
            inner = tl.where(each, _silu(one) * three, 0.0)
            logits = tl.zeros([C, E], tl.float32)
            for e in range(outputs):
                row = tl.load(floats_ptr + L.at_w2 + e * L.hidden + units, mask=is_unit, other=0.0)
                value = tl.sum(inner * row[None, :], axis=1) + tl.load(floats_ptr + L.at_w2_bias + e)
                logits = tl.where((columns == e)[None, :], value[:, None], logits)
    is_softmax = tl.load(ints_ptr + L.at_softmax)
    scores, limit, selected, gates = _route(logits, limit_logit, outputs, is_softmax, rule_ints_ptr, rule_floats_ptr, L.block, C)
    if is_given != 0:  # instance level: of the prompt, and kept
        own = given_ptr + tokens[:, None] * given_width + columns[None, :]
        gates = tl.load(own, mask=is_output, other=0.0)
        scores = tl.load(own + L.block, mask=is_output, other=0.0)
        selected = used & (gates != 0.0)
    return scores, limit, selected, gates


@triton.jit
def _inner_gates(
    low_ptr, stride, split_stride, scale, ints_ptr, floats_ptr, rule_ints_ptr, rule_floats_ptr, words_ptr, word_width, says, tokens, mask,
    S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """(C, E): what the router of a site says; written down where `says`."""
    columns = tl.arange(0, L.block)
    outputs = tl.load(ints_ptr + L.at_outputs + S.router)
    is_output = mask[:, None] & (columns < outputs)[None, :]
    rows = S.inner_first + columns[None, :]
    logits = _router_low(low_ptr, stride, split_stride, tokens[:, None], rows, is_output, L.inner_rows, L.parts, SPLITS)
    logits = logits * scale[:, None] + tl.load(floats_ptr + S.at_bias + columns, mask=columns < outputs, other=0.0)[None, :]
    last = tl.full((1, 1), S.inner_first + L.inner_rows - 1, tl.int32)
    limit_logit = _router_low(low_ptr, stride, split_stride, tokens[:, None], last, mask[:, None], L.inner_rows, L.parts, SPLITS)
    limit_logit = tl.sum(limit_logit, axis=1) * scale + tl.load(floats_ptr + S.at_bias + L.inner_rows - 1)
    is_softmax = tl.load(ints_ptr + L.at_softmax + S.router)
    scores, limit, selected, gates = _route(
        logits, limit_logit, outputs, is_softmax, rule_ints_ptr + S.router * 8, rule_floats_ptr + S.router, L.block, C
    )
    if says & (outputs > 0):
        _say(words_ptr, word_width, S.router, tokens, mask, scores, limit, selected, gates, L.block)
    return gates


@triton.jit
def _coefficients(
    low_ptr, stride, split_stride, scale, layer_gates, ints_ptr, floats_ptr, rule_ints_ptr, rule_floats_ptr, words_ptr, word_width, says,
    tokens, mask, S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """(C, K) float32: what the columns of a site's second factor are multiplied by, exactly 0 where an expert is not kept.

    A column takes the product of its row of the first factor; one of row -1 is a parallel adapter's bias, and is weighed alone.
    """
    if S.has_inner:  # first: behind the products below, both would be in registers at once
        inner_gates = _inner_gates(
            low_ptr, stride, split_stride, scale, ints_ptr, floats_ptr, rule_ints_ptr, rule_floats_ptr, words_ptr, word_width, says,
            tokens, mask, S, L, C, SPLITS,
        )  # fmt: skip
    K: tl.constexpr = S.columns
    ks = tl.arange(0, K)
    rows = tl.load(ints_ptr + S.at_row + ks)
    is_row = mask[:, None] & (rows >= 0)[None, :]
    low = _low(low_ptr, stride, split_stride, tokens[:, None], S.first + rows[None, :], is_row, SPLITS) * scale[:, None]
    if S.is_parallel:
        low = _silu(low + tl.load(floats_ptr + L.at_parallel_bias + rows, mask=rows >= 0, other=0.0)[None, :])
        low = tl.where((rows == -1)[None, :], 1.0, low)
    weight = tl.broadcast_to(tl.load(floats_ptr + S.at_scale + ks)[None, :], (C, K))
    if L.has_gates:
        outer = _pick(layer_gates, tl.load(ints_ptr + S.at_gate + ks), C, K)
        weight = tl.where(outer != 0.0, outer * weight, 0.0)
    if S.has_inner:
        inner = _pick(inner_gates, tl.load(ints_ptr + S.at_inner + ks), C, K)
        weight = tl.where(weight != 0.0, inner * weight, 0.0)
    is_kept = mask[:, None] & (rows >= -1)[None, :] & (weight != 0.0)
    return tl.where(is_kept, low * weight, 0.0)


@triton.jit
def _expand(acc, coefficients, b_ptr, columns, in_range, S: tl.constexpr):
    """acc (C, N) and on top coefficients (C, K) times the second factor's columns, of which only those that weigh something are read."""
    ks = tl.arange(0, S.columns)
    is_active = tl.max((coefficients != 0.0).to(tl.int32), axis=0) != 0
    if tl.max(is_active.to(tl.int32), axis=0) != 0:
        places = b_ptr + S.at_matrix + ks[:, None] * S.out + columns[None, :]
        b = tl.load(places, mask=is_active[:, None] & in_range[None, :], other=0.0)
        acc += dot(coefficients.to(b.dtype), b)
    return acc


@triton.jit
def _layer_gates(words_ptr, word_width, tokens, mask, L: tl.constexpr, C: tl.constexpr):
    """(C, E): what the layer's router said in `attend_in`; ones where no adapter has such a router."""
    E: tl.constexpr = L.block
    gates = tl.full((C, E), 1.0, tl.float32)
    if L.has_gates:
        gates = _said_gates(words_ptr, word_width, 0, tokens, mask, L.block)
    return gates


@triton.jit
def _site(
    acc, scale, layer_gates, columns, in_range, says, low_ptr, stride, split_stride, ints_ptr, floats_ptr, matrices_ptr,
    rule_ints_ptr, rule_floats_ptr, words_ptr, word_width, tokens, mask,
    S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """acc (C, N) and on top what the experts of a site add to these columns."""
    if S.columns > 0:
        coefficients = _coefficients(
            low_ptr, stride, split_stride, scale, layer_gates, ints_ptr, floats_ptr, rule_ints_ptr, rule_floats_ptr, words_ptr, word_width,
            says, tokens, mask, S, L, C, SPLITS,
        )  # fmt: skip
        acc = _expand(acc, coefficients, matrices_ptr, columns, in_range, S)
    return acc


@triton.jit(do_not_specialize_on_alignment=_MOVING)
def embed(
    chunks_ptr, token_ids_ptr, table_ptr, norm_ptr, x_ptr, a_ptr, squares_ptr, D, num_tiles, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """x = table[token]; a = x * norm; the tile's sums of squares. Grid: (chunks, tiles of N columns)."""
    chunk = chunks_ptr + tl.program_id(0) * 8
    start, count = tl.load(chunk), tl.load(chunk + 1)
    if count > 0:
        tile = tl.program_id(1)
        own = tl.arange(0, C)
        tokens, mask = start + own, own < count
        columns = tile * N + tl.arange(0, N)
        each = mask[:, None] & (columns < D)[None, :]
        ids = tl.load(token_ids_ptr + tokens, mask=mask, other=0)
        values = tl.load(table_ptr + ids[:, None] * D + columns[None, :], mask=each, other=0.0)
        _new_stream(values.to(tl.float32), tokens, mask, columns, each, tile, norm_ptr, x_ptr, a_ptr, squares_ptr, D, num_tiles)


@triton.jit
def _new_stream(values, tokens, mask, columns, each, tile, norm_ptr, x_ptr, a_ptr, squares_ptr, D, num_tiles):
    """Write the residual stream, what the next product reads of it, and the tile's sums of squares."""
    x = values.to(x_ptr.dtype.element_ty)
    places = tokens[:, None] * D + columns[None, :]
    tl.store(x_ptr + places, x, mask=each)
    wide = x.to(tl.float32)
    norm = tl.load(norm_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(a_ptr + places, (wide * norm[None, :]).to(x.dtype), mask=each)
    tl.store(squares_ptr + tokens * num_tiles + tile, tl.sum(tl.where(each, wide * wide, 0.0), axis=1), mask=mask)


@triton.jit(do_not_specialize_on_alignment=_MOVING)
def attend_in(
    chunks_ptr, y_ptr, y_stride, squares_ptr, bias_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, places_ptr,
    q_ptr, k_ptr, v_ptr, key_cache_ptr, value_cache_ptr,
    low_ptr, low_stride, low_slot, split_stride, router_ptr, router_stride, router_slot, router_split_stride,
    ints_ptr, ints_slot, floats_ptr, floats_slot, matrices_ptr, matrices_slot, rule_ints_ptr, rule_floats_ptr, rule_stride,
    given_ptr, given_width, words_ptr, word_width, D, num_tiles, eps,
    L: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_QK_NORM: tl.constexpr, HAS_ADAPTER: tl.constexpr, SPLITS: tl.constexpr, ROUTER_SPLITS: tl.constexpr,
):  # fmt: skip
    """One head of a chunk: its product, LoRA, norm, rotation. Grid: (chunks, H + 2 KV): queries, keys, values.

    `router_*`: products of the layer router's rows with the residual stream, for slots whose router reads that. The program of head 0
    writes down what the layer's router and a nested prompt's say, and the first of each site what that site's says.
    """
    chunk = chunks_ptr + tl.program_id(0) * 8
    start, count = tl.load(chunk), tl.load(chunk + 1)
    slot = tl.load(chunk + 2).to(tl.int64)  # all slots' matrices may be more than 2^31 numbers
    if count > 0:
        head = tl.program_id(1)
        own = tl.arange(0, C)
        tokens, mask = start + own, own < count
        half = tl.arange(0, HALF)
        is_half = half < P // 2
        each = mask[:, None] & is_half[None, :]
        scale = _inverse_rms(squares_ptr, tokens, mask, D, num_tiles, TILES, eps)
        row = y_ptr + tokens[:, None] * y_stride + head * P + half[None, :]
        first = tl.load(row, mask=each, other=0.0) * scale[:, None]
        second = tl.load(row + P // 2, mask=each, other=0.0) * scale[:, None]
        if HAS_BIAS:
            first += tl.load(bias_ptr + head * P + half, mask=is_half, other=0.0).to(tl.float32)[None, :]
            second += tl.load(bias_ptr + head * P + P // 2 + half, mask=is_half, other=0.0).to(tl.float32)[None, :]
        if HAS_ADAPTER:
            if slot >= 0:
                low_ptr += slot * low_slot
                ints_ptr += slot * ints_slot
                floats_ptr += slot * floats_slot
                matrices_ptr += slot * matrices_slot
                rule = tl.load(chunk + 3).to(tl.int64) * rule_stride
                rule_ints_ptr += rule * 8
                rule_floats_ptr += rule
                E: tl.constexpr = L.block
                gates = tl.full((C, E), 1.0, tl.float32)
                if L.has_gates:
                    is_given = tl.load(chunk + 4)
                    router_scale = scale
                    reads_ptr, reads_stride, reads_split = low_ptr, low_stride, split_stride
                    if L.has_residual:
                        if tl.load(ints_ptr + L.at_residual) != 0:
                            router_scale = tl.full((C,), 1.0, tl.float32)
                            reads_ptr, reads_stride, reads_split = router_ptr + slot * router_slot, router_stride, router_split_stride
                    scores, limit, selected, gates = _layer_route(
                        reads_ptr, reads_stride, reads_split, router_scale, given_ptr, given_width, is_given, ints_ptr, floats_ptr,
                        rule_ints_ptr, rule_floats_ptr, tokens, mask, L, C, ROUTER_SPLITS,
                    )  # fmt: skip
                    if head == 0:  # zeros where the layer has no router: a sequence may take them along
                        _say(words_ptr, word_width, 0, tokens, mask, scores, limit, selected, gates, L.block)
                if L.prompt.has_inner:
                    if head == 0:
                        _inner_gates(
                            low_ptr, low_stride, split_stride, scale, ints_ptr, floats_ptr, rule_ints_ptr, rule_floats_ptr, words_ptr,
                            word_width, True, tokens, mask, L.prompt, L, C, SPLITS,
                        )  # fmt: skip
                if head < H:
                    first, second = _adapted_head(
                        first, second, scale, gates, head * P + half, is_half, head == 0, low_ptr, low_stride, split_stride, ints_ptr,
                        floats_ptr, matrices_ptr, rule_ints_ptr, rule_floats_ptr, words_ptr, word_width, tokens, mask,
                        L.q, L, P, C, SPLITS,
                    )  # fmt: skip
                elif head < H + KV:
                    first, second = _adapted_head(
                        first, second, scale, gates, (head - H) * P + half, is_half, head == H, low_ptr, low_stride, split_stride, ints_ptr,
                        floats_ptr, matrices_ptr, rule_ints_ptr, rule_floats_ptr, words_ptr, word_width, tokens, mask,
                        L.k, L, P, C, SPLITS,
                    )  # fmt: skip
                else:
                    first, second = _adapted_head(
                        first, second, scale, gates, (head - H - KV) * P + half, is_half, head == H + KV, low_ptr, low_stride, split_stride,
                        ints_ptr, floats_ptr, matrices_ptr, rule_ints_ptr, rule_floats_ptr, words_ptr, word_width, tokens, mask,
                        L.v, L, P, C, SPLITS,
                    )  # fmt: skip
        if head < H + KV:
            if HAS_QK_NORM:
                norm_ptr = q_norm_ptr
                if head >= H:
                    norm_ptr = k_norm_ptr
                squares = tl.sum(tl.where(each, first * first + second * second, 0.0), axis=1)
                unit = tl.math.rsqrt(squares / P + eps)[:, None]
                first = first * unit * tl.load(norm_ptr + half, mask=is_half, other=0.0).to(tl.float32)[None, :]
                second = second * unit * tl.load(norm_ptr + P // 2 + half, mask=is_half, other=0.0).to(tl.float32)[None, :]
            angle = tokens[:, None] * (P // 2) + half[None, :]
            cos, sin = tl.load(cos_ptr + angle, mask=each, other=0.0), tl.load(sin_ptr + angle, mask=each, other=0.0)
            turned = first * cos - second * sin
            second = second * cos + first * sin
            first = turned
        first, second = first.to(q_ptr.dtype.element_ty), second.to(q_ptr.dtype.element_ty)
        if head < H:
            out = q_ptr + tokens[:, None] * (H * P) + head * P + half[None, :]
            tl.store(out, first, mask=each)
            tl.store(out + P // 2, second, mask=each)
        else:
            out_ptr, cache_ptr, kv_head = k_ptr, key_cache_ptr, head - H
            if head >= H + KV:
                out_ptr, cache_ptr, kv_head = v_ptr, value_cache_ptr, head - H - KV
            out = out_ptr + tokens[:, None] * (KV * P) + kv_head * P + half[None, :]
            tl.store(out, first, mask=each)
            tl.store(out + P // 2, second, mask=each)
            place = tl.load(places_ptr + tokens, mask=mask, other=-1).to(tl.int64)
            cached = each & (place >= 0)[:, None]
            out = cache_ptr + place[:, None] * (KV * P) + kv_head * P + half[None, :]
            tl.store(out, first, mask=cached)
            tl.store(out + P // 2, second, mask=cached)


@triton.jit
def _adapted_head(
    first, second, scale, gates, columns, is_half, says, low_ptr, stride, split_stride, ints_ptr, floats_ptr, matrices_ptr,
    rule_ints_ptr, rule_floats_ptr, words_ptr, word_width, tokens, mask,
    S: tl.constexpr, L: tl.constexpr, P: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Both halves of a head (C, P / 2) and on top the LoRA of its linear; `columns`: of the first half among the linear's outputs."""
    if S.columns > 0:
        coefficients = _coefficients(
            low_ptr, stride, split_stride, scale, gates, ints_ptr, floats_ptr, rule_ints_ptr, rule_floats_ptr, words_ptr, word_width,
            says, tokens, mask, S, L, C, SPLITS,
        )  # fmt: skip
        first = _expand(first, coefficients, matrices_ptr, columns, is_half, S)
        second = _expand(second, coefficients, matrices_ptr, columns + P // 2, is_half, S)
    return first, second


@triton.jit(do_not_specialize_on_alignment=_MOVING)
def residual(
    chunks_ptr, y_ptr, y_stride, bias_ptr, norm_ptr, x_ptr, a_ptr, squares_ptr,
    low_ptr, low_stride, low_slot, split_stride, m_squares_ptr, m_low_ptr, m_stride, m_slot, m_split_stride,
    ints_ptr, ints_slot, floats_ptr, floats_slot, matrices_ptr, matrices_slot, rule_ints_ptr, rule_floats_ptr, rule_stride,
    words_ptr, word_width, D, num_tiles, eps,
    L: tl.constexpr, S: tl.constexpr, PA: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADAPTER: tl.constexpr, SPLITS: tl.constexpr, M_SPLITS: tl.constexpr,
):  # fmt: skip
    """x += y + LoRA of the linear S (+ the parallel adapter PA, which reads `m_low`); then as `embed`. Grid: (chunks, tiles)."""
    chunk = chunks_ptr + tl.program_id(0) * 8
    start, count = tl.load(chunk), tl.load(chunk + 1)
    slot = tl.load(chunk + 2).to(tl.int64)  # all slots' matrices may be more than 2^31 numbers
    if count > 0:
        tile = tl.program_id(1)
        own = tl.arange(0, C)
        tokens, mask = start + own, own < count
        columns = tile * N + tl.arange(0, N)
        in_range = columns < D
        each = mask[:, None] & in_range[None, :]
        out = tl.load(y_ptr + tokens[:, None] * y_stride + columns[None, :], mask=each, other=0.0)
        if HAS_BIAS:
            out += tl.load(bias_ptr + columns, mask=in_range, other=0.0).to(tl.float32)[None, :]
        if HAS_ADAPTER:
            if slot >= 0:
                ints_ptr += slot * ints_slot
                floats_ptr += slot * floats_slot
                matrices_ptr += slot * matrices_slot
                rule = tl.load(chunk + 3).to(tl.int64) * rule_stride
                rule_ints_ptr += rule * 8
                rule_floats_ptr += rule
                gates = _layer_gates(words_ptr, word_width, tokens, mask, L, C)
                says = tile == 0
                ones = tl.full((C,), 1.0, tl.float32)
                out = _site(
                    out, ones, gates, columns, in_range, says, low_ptr + slot * low_slot, low_stride, split_stride,
                    ints_ptr, floats_ptr, matrices_ptr, rule_ints_ptr, rule_floats_ptr, words_ptr, word_width, tokens, mask,
                    S, L, C, SPLITS,
                )  # fmt: skip
                if PA.columns > 0:
                    scale = _inverse_rms(m_squares_ptr, tokens, mask, D, num_tiles, TILES, eps)
                    out = _site(
                        out, scale, gates, columns, in_range, says, m_low_ptr + slot * m_slot, m_stride, m_split_stride,
                        ints_ptr, floats_ptr, matrices_ptr, rule_ints_ptr, rule_floats_ptr, words_ptr, word_width, tokens, mask,
                        PA, L, C, M_SPLITS,
                    )  # fmt: skip
        before = tl.load(x_ptr + tokens[:, None] * D + columns[None, :], mask=each, other=0.0)
        values = before.to(tl.float32) + out
        _new_stream(values, tokens, mask, columns, each, tile, norm_ptr, x_ptr, a_ptr, squares_ptr, D, num_tiles)


@triton.jit(do_not_specialize_on_alignment=_MOVING)
def act(
    chunks_ptr, y_ptr, y_stride, squares_ptr, bias_ptr, z_ptr,
    low_ptr, low_stride, low_slot, split_stride,
    ints_ptr, ints_slot, floats_ptr, floats_slot, matrices_ptr, matrices_slot, rule_ints_ptr, rule_floats_ptr, rule_stride,
    words_ptr, word_width, D, F, num_tiles, eps,
    L: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADAPTER: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """z = silu(gate) * up, with the LoRA of both. Grid: (chunks, tiles of N of the F columns)."""
    chunk = chunks_ptr + tl.program_id(0) * 8
    start, count = tl.load(chunk), tl.load(chunk + 1)
    slot = tl.load(chunk + 2).to(tl.int64)  # all slots' matrices may be more than 2^31 numbers
    if count > 0:
        tile = tl.program_id(1)
        own = tl.arange(0, C)
        tokens, mask = start + own, own < count
        columns = tile * N + tl.arange(0, N)
        in_range = columns < F
        each = mask[:, None] & in_range[None, :]
        scale = _inverse_rms(squares_ptr, tokens, mask, D, num_tiles, TILES, eps)
        row = y_ptr + tokens[:, None] * y_stride + columns[None, :]
        gate = tl.load(row, mask=each, other=0.0) * scale[:, None]
        up = tl.load(row + F, mask=each, other=0.0) * scale[:, None]
        if HAS_BIAS:
            gate += tl.load(bias_ptr + columns, mask=in_range, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptr + F + columns, mask=in_range, other=0.0).to(tl.float32)[None, :]
        if HAS_ADAPTER:
            if slot >= 0:
                low_ptr += slot * low_slot
                ints_ptr += slot * ints_slot
                floats_ptr += slot * floats_slot
                matrices_ptr += slot * matrices_slot
                rule = tl.load(chunk + 3).to(tl.int64) * rule_stride
                rule_ints_ptr += rule * 8
                rule_floats_ptr += rule
                gates = _layer_gates(words_ptr, word_width, tokens, mask, L, C)
                says = tile == 0
                gate = _site(
                    gate, scale, gates, columns, in_range, says, low_ptr, low_stride, split_stride, ints_ptr, floats_ptr, matrices_ptr,
                    rule_ints_ptr, rule_floats_ptr, words_ptr, word_width, tokens, mask, L.gate, L, C, SPLITS,
                )  # fmt: skip
                up = _site(
                    up, scale, gates, columns, in_range, says, low_ptr, low_stride, split_stride, ints_ptr, floats_ptr, matrices_ptr,
                    rule_ints_ptr, rule_floats_ptr, words_ptr, word_width, tokens, mask, L.up, L, C, SPLITS,
                )  # fmt: skip
        z = _silu(gate) * up
        tl.store(z_ptr + tokens[:, None] * F + columns[None, :], z.to(z_ptr.dtype.element_ty), mask=each)


@triton.jit(do_not_specialize=["word_layer"], do_not_specialize_on_alignment=_MOVING)
def count(
    chunks_ptr, words_ptr, word_layer, word_width, ints_ptr, ints_slot, ints_layer, floats_ptr, floats_slot, floats_layer, counters_ptr,
    L: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Add what routers said to the totals of their adapters (model.counters). Grid: (chunks, layers, routers).

    An expert is computed for a chunk as soon as one of its tokens keeps it: then its second factor is read for all of them.
    `counters_ptr`: (n, 4) int64, addresses of `selected`, `gate_sum`, `computed` and `thresholds`, float64.
    """
    chunk = chunks_ptr + tl.program_id(0) * 8
    start, tokens_in, slot, counters = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2).to(tl.int64), tl.load(chunk + 5)
    if (tokens_in > 0) & (slot >= 0) & (counters >= 0):
        layer, router = tl.program_id(1), tl.program_id(2)
        own = tl.arange(0, C)
        tokens, mask = start + own, own < tokens_in
        columns = tl.arange(0, L.block)
        ints_ptr += slot * ints_slot + layer * ints_layer
        floats_ptr += slot * floats_slot + layer * floats_layer
        outputs = tl.load(ints_ptr + L.at_counted + router * L.block + columns)
        is_cell = outputs >= 0
        cells = tl.load(ints_ptr + L.at_cells + router) + columns
        word = words_ptr + layer * word_layer + tokens[:, None] * word_width + router * (3 * L.block + 1)
        each = mask[:, None] & is_cell[None, :]
        selected = tl.load(word + (L.block + 1) + outputs[None, :], mask=each, other=0.0)
        gates = tl.load(word + (2 * L.block + 1) + outputs[None, :], mask=each, other=0.0)
        gates = tl.where(tl.abs(gates) < float("inf"), gates, 0.0)  # one row that overflows must not turn the totals into NaN for good
        limits = tl.load(words_ptr + layer * word_layer + tokens * word_width + router * (3 * L.block + 1) + L.block, mask=mask, other=0.0)
        limits = tl.where(tl.abs(limits) < float("inf"), limits, 0.0)
        total = tl.sum(selected, axis=0)
        computed = tl.where(total > 0, tokens_in, 0).to(tl.float64)
        address = counters_ptr + counters * 4
        selected_ptr = tl.load(address).to(tl.pointer_type(tl.float64))
        gate_sum_ptr = tl.load(address + 1).to(tl.pointer_type(tl.float64))
        computed_ptr = tl.load(address + 2).to(tl.pointer_type(tl.float64))
        thresholds_ptr = tl.load(address + 3).to(tl.pointer_type(tl.float64))
        tl.atomic_add(selected_ptr + cells, total.to(tl.float64), mask=is_cell)
        tl.atomic_add(gate_sum_ptr + cells, tl.sum(gates, axis=0).to(tl.float64), mask=is_cell)
        tl.atomic_add(computed_ptr + cells, computed, mask=is_cell)
        share = tl.load(floats_ptr + L.at_shares + router)
        if share > 0:
            tl.atomic_add(thresholds_ptr + layer, tl.sum(limits.to(tl.float64), axis=0) * share)


@triton.jit(do_not_specialize_on_alignment=_MOVING)
def prompt(
    chunks_ptr, q_ptr, out_ptr, prompt_ptr, prompt_slot, ints_ptr, ints_slot, floats_ptr, floats_slot, words_ptr, word_width, softmax_scale,
    L: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, P: tl.constexpr, P_BLOCK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out += the prompt expert's attention, for chunks of longer runs of tokens; rows of one token have it in their attention's launch.

    Grid: (chunks, H). Keys and values (2, KV, N, P) float32 of the slot's layer; softmax_scale is log2(e) / sqrt(P).
    """
    chunk = chunks_ptr + tl.program_id(0) * 8
    start, tokens_in, slot = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2).to(tl.int64)
    if (tokens_in > 0) & (slot >= 0):
        ints_ptr += slot * ints_slot
        column = tl.load(ints_ptr + L.at_prompt_column)
        if column >= -1:
            head = tl.program_id(1)
            own = tl.arange(0, C)
            tokens, mask = start + own, own < tokens_in
            weight = tl.full((C,), 1.0, tl.float32)
            if L.has_gates:
                gates = _said_gates(words_ptr, word_width, 0, tokens, mask, L.block)
                weight = tl.where(column >= 0, _column(gates, tl.arange(0, L.block), column), 1.0)
            places = tl.arange(0, P_BLOCK)
            is_place = (places < P)[None, :]
            each = mask[:, None] & is_place
            q = tl.load(q_ptr + tokens[:, None] * (H * P) + head * P + places[None, :], mask=each, other=0.0).to(tl.float32)
            own_ptr = prompt_ptr + slot * prompt_slot + (head // (H // KV)) * (L.prompt_block * P)
            acc = tl.zeros([C, P_BLOCK], tl.float32)
            total = tl.zeros([C], tl.float32)
            top = tl.full([C], LOWEST, tl.float32)
            for first in range(0, L.prompt_block, PROMPT_TILE):
                rows = first + tl.arange(0, PROMPT_TILE)
                inner = tl.load(ints_ptr + L.at_prompt_inner + rows)
                is_row = inner >= -1
                row = own_ptr + rows[:, None] * P + places[None, :]
                keys = tl.load(row, mask=is_row[:, None] & is_place, other=0.0)
                values = tl.load(row + KV * L.prompt_block * P, mask=is_row[:, None] & is_place, other=0.0)
                scores = tl.where(is_row[None, :], dot(q, tl.trans(keys)) * softmax_scale, float("-inf"))
                share = None
                if L.prompt.has_inner:
                    inner_gates = _said_gates(words_ptr, word_width, L.prompt.router, tokens, mask, L.block)
                    share = _pick(inner_gates, inner, C, PROMPT_TILE)
                acc, total, top = online_softmax(acc, total, top, scores, share, values)
            added = acc * tl.math.div_rn(weight, total)[:, None]
            added = added * tl.load(floats_ptr + slot * floats_slot + L.at_head_gate + head)
            out = out_ptr + tokens[:, None] * (H * P) + head * P + places[None, :]
            kept = each & (weight != 0.0)[:, None]
            before = tl.load(out, mask=kept, other=0.0).to(tl.float32)
            tl.store(out, (before + added).to(out_ptr.dtype.element_ty), mask=kept)
