"""The Triton kernel of attention, in the form of FlashAttention, and what other ops' attention takes from it.

A program serves a tile of the queries of one head. It walks in tiles over the keys, and keeps for each query the
largest score, the sum of the exponentials and the weighted sum of the values so far. Scores are in units of log2(e), so
that 2 is the base of the exponentials.

Rows of a width that is no power of two are held in two parts, 40 as 32 and 16: less is padded than by 64.
"""

# Triton gives the arguments their types at the launch
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

# Below every score but -inf: where all so far are -inf, exponentials of differences are 0 and not NaN
LOWEST = tl.constexpr(-3.4028234e38)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sequence(ptr, batch, head, batch_stride, head_stride, VECTOR: tl.constexpr):
    # 64 bits: a tensor may hold more than 2³¹ elements
    return ptr + (batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride) * VECTOR


@triton.jit
def load_rows(
    ptr,
    row,
    inside,
    stride,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Rows as ``[len(row), MAIN]`` and ``[len(row), REST]`` or ``None``; 0 outside."""
    row_ptrs = ptr + (row.to(tl.int64) * stride * VECTOR)[:, None]
    column = tl.arange(0, MAIN)
    main = tl.load(row_ptrs + column[None, :], mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
    if REST is None:
        return main, None
    else:
        column = MAIN + tl.arange(0, REST)
        rest = tl.load(row_ptrs + column[None, :], mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
        return main, rest


@triton.jit
def store_rows(
    ptr,
    row,
    inside,
    stride,
    rows,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    VECTOR: tl.constexpr,
):
    main, rest = rows
    row_ptrs = ptr + (row.to(tl.int64) * stride * VECTOR)[:, None]
    column = tl.arange(0, MAIN)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(row_ptrs + column[None, :], main.to(ptr.dtype.element_ty), mask=mask)
    if REST is not None:
        column = MAIN + tl.arange(0, REST)
        mask = inside[:, None] & (column < WIDTH)[None, :]
        tl.store(row_ptrs + column[None, :], rest.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def products(a, b):
    """Of the rows of ``a`` with those of ``b``, ``[len(a), len(b)]``; both as of ``load_rows``."""
    a_main, a_rest = a
    b_main, b_rest = b
    result = tl.dot(a_main, tl.trans(b_main), input_precision="ieee")
    if a_rest is not None:
        result = tl.dot(a_rest, tl.trans(b_rest), result, input_precision="ieee")
    return result


@triton.jit
def nothing_yet(BLOCK_M: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Largest score, sum of exponentials, and weighted sum of values in two parts, of no keys."""
    largest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    main = tl.zeros([BLOCK_M, MAIN], tl.float32)
    if REST is None:
        return largest, total, main, None
    else:
        return largest, total, main, tl.zeros([BLOCK_M, REST], tl.float32)


@triton.jit
def absorb(state, scores, values):
    """``state`` with the keys of these scores ``[BLOCK_M, BLOCK_N]`` and values."""
    before, total, main, rest = state
    v_main, v_rest = values
    largest = tl.maximum(before, tl.max(scores, 1))
    weights = tl.exp2(scores - largest[:, None])
    shrink = tl.exp2(before - largest)
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(v_main.dtype)
    main = tl.dot(weights, v_main, main * shrink[:, None], input_precision="ieee")
    if v_rest is None:
        return largest, total, main, None
    else:
        return largest, total, main, tl.dot(weights, v_rest, rest * shrink[:, None], input_precision="ieee")


@triton.jit
def weighted_mean(state, share):
    """``share`` times the result of the keys so far, in two parts."""
    _, total, main, rest = state
    factor = (share / total)[:, None]
    if rest is None:
        return main * factor, None
    else:
        return main * factor, rest * factor


@triton.jit
def key_bias(ptr, key, inside, stride):
    """The bias of keys, in units of log2(e); -inf outside."""
    bias = tl.load(ptr + key.to(tl.int64) * stride, mask=inside, other=float("-inf")).to(tl.float32)
    scaled = bias * LOG2_E
    # a mask of the least finite number is no -inf: where all keys have it, all count
    return tl.where((scaled == float("-inf")) & (bias != float("-inf")), LOWEST, scaled)


@triton.jit
def attend_all(
    q_ptr,  # [B, heads, N, d], as is y
    k_ptr,  # [B, heads, M, d], as is v
    v_ptr,
    bias_ptr,  # [B or 1, M], or None
    y_ptr,  # out
    q_batch,  # strides, in units of VECTOR elements; the last is of one element
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    y_batch,
    y_head,
    y_token,
    bias_batch,  # strides, in elements; 0 where all samples share a row
    bias_key,
    scale,  # times log2(e)
    heads,
    queries,
    keys,
    tiles,  # of a head's queries
    WIDTH: tl.constexpr,  # d
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # one grid axis: the other two end at 65 535
    program = tl.program_id(0)
    batch = program // tiles // heads
    head = program // tiles % heads
    query = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = query < queries

    q_ptr = sequence(q_ptr, batch, head, q_batch, q_head, VECTOR)
    k_ptr = sequence(k_ptr, batch, head, k_batch, k_head, VECTOR)
    v_ptr = sequence(v_ptr, batch, head, v_batch, v_head, VECTOR)
    q = load_rows(q_ptr, query, inside, q_token, WIDTH, MAIN, REST, VECTOR)
    state = nothing_yet(BLOCK_M, MAIN, REST)
    for first in tl.range(0, keys, BLOCK_N, num_stages=STAGES):
        key = first + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, key, key < keys, k_token, WIDTH, MAIN, REST, VECTOR)
        v = load_rows(v_ptr, key, key < keys, v_token, WIDTH, MAIN, REST, VECTOR)
        scores = products(q, k) * scale
        if bias_ptr is None:
            scores = tl.where((key < keys)[None, :], scores, float("-inf"))
        else:
            row_ptr = bias_ptr + batch.to(tl.int64) * bias_batch
            scores += key_bias(row_ptr, key, key < keys, bias_key)[None, :]
        state = absorb(state, scores, v)
    y_ptr = sequence(y_ptr, batch, head, y_batch, y_head, VECTOR)
    store_rows(y_ptr, query, inside, y_token, weighted_mean(state, 1.0), WIDTH, MAIN, REST, VECTOR)
