"""The gradient of gri_attention in Triton: four steps that compute the probabilities anew, without atomics.

1. For each query the logarithm of the sum of exponentials, and the product of the result with its gradient.
2. The gradient of the queries, over the keys that each attends to.
3. The gradients of the cells, over all queries, in parts that are summed outside.
4. The gradients of keys and values, over the queries of their window, and the share of their cell's.

``p`` is the weight of a key, ``slope`` the derivative by its score, ``p · (grad · v - grad · result)``. With a gate
there are two softmaxes, and the weights of each are those in the mix. All steps are one kernel, specialised, for their
arguments are the same.
"""

# Triton gives the arguments their types at the launch
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsd_kernels.attention.triton_kernels import load_rows, nothing_yet, products, sequence, store_rows
from fastsd_kernels.gri_attention.triton_kernels import (
    absorb_cells,
    absorb_window,
    cell_bias,
    corner,
    places,
    tokens,
)


@triton.jit
def _rows(source, row, inside, WIDTH: tl.constexpr, MAIN: tl.constexpr, VECTOR: tl.constexpr):
    ptr, stride = source
    return load_rows(ptr, row, inside, stride, WIDTH, MAIN, None, VECTOR)


@triton.jit
def _store_statistics(state, grad, stats_ptr, token, inside, plane):
    largest, total, main, _ = state
    tl.store(stats_ptr + token, largest + tl.log2(total), mask=inside)
    product = tl.sum(grad[0].to(tl.float32) * (main / total[:, None]), 1)
    tl.store(stats_ptr + plane + token, product, mask=inside)


@triton.jit
def _statistics(stats_ptr, token, inside, plane):
    # the sum of a query that does not exist is told by being infinite: one that does has a finite sum, or NaN
    log_sum = tl.load(stats_ptr + token, mask=inside, other=float("inf"))
    return log_sum, tl.load(stats_ptr + plane + token, mask=inside, other=0.0)


@triton.jit
def _weights_and_slopes(q, k, v, grad, bias, statistics, share, scale):
    """``[queries, keys]`` both, in the dtype of ``q``."""
    log_sum, product = statistics
    # of the rows of zeros that stand for those beyond the edge, the products with keys that are not finite are NaN
    there = (log_sum[:, None] != float("inf")) & (bias != float("-inf"))
    p = tl.where(there, share * tl.exp2(products(q, k) * scale + bias - log_sum[:, None]), 0.0)
    slope = tl.where(there, p * (products(grad, v) - product[:, None]), 0.0)
    return p.to(q[0].dtype), slope.to(q[0].dtype)


@triton.jit
def gradient(
    q_ptr,  # [B, heads, N, d], as are k, v, grad, dq, dk and dv
    k_ptr,
    v_ptr,
    grad_ptr,
    dq_ptr,  # out, as are dk and dv
    dk_ptr,
    dv_ptr,
    k_cells_ptr,  # [B, heads, G, d], contiguous, or None
    v_cells_ptr,
    d_cells_ptr,  # out of step 3: [splits, 2, B, heads, G, d], float32; into step 4: [2, B, heads, G, d]; or None
    gate_ptr,  # [heads] or None
    stats_ptr,  # out of step 1: log2 of sums, and products [1 or 2 softmaxes, 2, B, heads, N], float32
    q_batch,  # strides, in units of VECTOR elements; the last is of one element
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    grad_batch,
    grad_head,
    grad_token,
    d_batch,  # of dq, dk and dv
    d_head,
    d_token,
    scale,
    log_scale,  # scale times log2(e)
    plane,  # B * heads * N
    cells_plane,  # B * heads * G * d
    heads,
    grid_height,
    grid_width,
    window_height,
    window_width,
    window_columns,
    windows,
    tiles,  # of a window's tokens; of the cells in step 3
    splits,  # of the queries in step 3
    pool_height,
    pool_width,
    cell_columns,
    cells,
    full_bias,
    STEP: tl.constexpr,
    REGIONS: tl.constexpr,
    UNEVEN: tl.constexpr,
    MASK_OWN_WINDOW: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    if STEP == 3:
        split = program // tiles % splits
        index = program // tiles // splits
    else:
        index = program // tiles // windows
        window = corner(
            program // tiles % windows, window_columns, window_height, grid_height, grid_width, WINDOW_WIDTH
        )
        limit = places(window, WINDOW_WIDTH)
        if tile * BLOCK >= limit:
            return
    batch = index // heads
    head = index % heads
    q_rows = sequence(q_ptr, batch, head, q_batch, q_head, VECTOR), q_token
    k_rows = sequence(k_ptr, batch, head, k_batch, k_head, VECTOR), k_token
    v_rows = sequence(v_ptr, batch, head, v_batch, v_head, VECTOR), v_token
    grad_rows = sequence(grad_ptr, batch, head, grad_batch, grad_head, VECTOR), grad_token
    if k_cells_ptr is not None:
        k_cells_ptr += index.to(tl.int64) * cells * WIDTH
        v_cells_ptr += index.to(tl.int64) * cells * WIDTH

    token_count = grid_height * grid_width
    stats_ptr += index.to(tl.int64) * token_count
    cell_stats_ptr = stats_ptr
    if gate_ptr is None:
        share = 1.0
        cell_share = 1.0
    else:
        share = 1 / (1 + tl.exp(-tl.load(gate_ptr + head).to(tl.float32)))
        cell_share = 1 - share
        cell_stats_ptr += tl.full([], 2, tl.int64) * plane

    lane = tl.arange(0, BLOCK)
    if STEP != 3:
        token, inside = tokens(tile * BLOCK + lane, window, WINDOW_WIDTH)

    if STEP == 1:
        q = _rows(q_rows, token, inside, WIDTH, MAIN, VECTOR)
        grad = _rows(grad_rows, token, inside, WIDTH, MAIN, VECTOR)
        state = nothing_yet(BLOCK, MAIN, None)
        if REGIONS:
            state = absorb_window(
                state,
                q,
                k_rows[0],
                v_rows[0],
                k_token,
                v_token,
                log_scale,
                window,
                limit,
                WINDOW_WIDTH,
                WIDTH,
                MAIN,
                None,
                VECTOR,
                BLOCK,
                1,
            )
        if gate_ptr is not None:
            _store_statistics(state, grad, stats_ptr, token, inside, plane)
            state = nothing_yet(BLOCK, MAIN, None)
        if k_cells_ptr is not None:
            state = absorb_cells(
                state,
                q,
                k_cells_ptr,
                v_cells_ptr,
                log_scale,
                window,
                cells,
                cell_columns,
                full_bias,
                pool_height,
                pool_width,
                grid_height,
                UNEVEN,
                MASK_OWN_WINDOW,
                WIDTH,
                MAIN,
                None,
                BLOCK,
                1,
            )
        _store_statistics(state, grad, cell_stats_ptr, token, inside, plane)

    elif STEP == 2:
        q = _rows(q_rows, token, inside, WIDTH, MAIN, VECTOR)
        grad = _rows(grad_rows, token, inside, WIDTH, MAIN, VECTOR)
        dq = tl.zeros([BLOCK, MAIN], tl.float32)
        if REGIONS:
            statistics = _statistics(stats_ptr, token, inside, plane)
            for first in range(0, limit, BLOCK):
                key, key_inside = tokens(first + lane, window, WINDOW_WIDTH)
                k = _rows(k_rows, key, key_inside, WIDTH, MAIN, VECTOR)
                v = _rows(v_rows, key, key_inside, WIDTH, MAIN, VECTOR)
                bias = tl.where(key_inside, 0.0, float("-inf"))[None, :]
                weights = _weights_and_slopes(q, k, v, grad, bias, statistics, share, log_scale)
                dq = tl.dot(weights[1], k[0], dq, input_precision="ieee")
        if k_cells_ptr is not None:
            cell_statistics = _statistics(cell_stats_ptr, token, inside, plane)
            for first in range(0, cells, BLOCK):
                cell = first + lane
                k = load_rows(k_cells_ptr, cell, cell < cells, WIDTH, WIDTH, MAIN, None, 1)
                v = load_rows(v_cells_ptr, cell, cell < cells, WIDTH, WIDTH, MAIN, None, 1)
                bias = cell_bias(
                    cell,
                    cells,
                    cell_columns,
                    full_bias,
                    pool_height,
                    pool_width,
                    grid_height,
                    window,
                    UNEVEN,
                    MASK_OWN_WINDOW,
                )[None, :]
                weights = _weights_and_slopes(q, k, v, grad, bias, cell_statistics, cell_share, log_scale)
                dq = tl.dot(weights[1], k[0], dq, input_precision="ieee")
        dq_ptr = sequence(dq_ptr, batch, head, d_batch, d_head, VECTOR)
        store_rows(dq_ptr, token, inside, d_token, (dq * scale, None), WIDTH, MAIN, None, VECTOR)

    elif STEP == 3:
        cell = tile * BLOCK + lane
        cell_inside = cell < cells
        k = load_rows(k_cells_ptr, cell, cell_inside, WIDTH, WIDTH, MAIN, None, 1)
        v = load_rows(v_cells_ptr, cell, cell_inside, WIDTH, WIDTH, MAIN, None, 1)
        dk = tl.zeros([BLOCK, MAIN], tl.float32)
        dv = tl.zeros([BLOCK, MAIN], tl.float32)
        for first in range(split * BLOCK, token_count, splits * BLOCK):
            query = first + lane
            query_inside = query < token_count
            row = query // grid_width // window_height * window_height
            column = query % grid_width // window_width * window_width
            own = (
                row[:, None],
                column[:, None],
                tl.minimum(window_height, grid_height - row)[:, None],
                tl.minimum(window_width, grid_width - column)[:, None],
                grid_width,
            )
            q = _rows(q_rows, query, query_inside, WIDTH, MAIN, VECTOR)
            grad = _rows(grad_rows, query, query_inside, WIDTH, MAIN, VECTOR)
            bias = cell_bias(
                cell[None, :],
                cells,
                cell_columns,
                full_bias,
                pool_height,
                pool_width,
                grid_height,
                own,
                UNEVEN,
                MASK_OWN_WINDOW,
            )
            statistics = _statistics(cell_stats_ptr, query, query_inside, plane)
            p, slope = _weights_and_slopes(q, k, v, grad, bias, statistics, cell_share, log_scale)
            dk = tl.dot(tl.trans(slope), q[0], dk, input_precision="ieee")
            dv = tl.dot(tl.trans(p), grad[0], dv, input_precision="ieee")
        dk_ptr = d_cells_ptr + split.to(tl.int64) * 2 * cells_plane + index.to(tl.int64) * cells * WIDTH
        dv_ptr = dk_ptr + cells_plane
        store_rows(dk_ptr, cell, cell_inside, WIDTH, (dk * scale, None), WIDTH, MAIN, None, 1)
        store_rows(dv_ptr, cell, cell_inside, WIDTH, (dv, None), WIDTH, MAIN, None, 1)

    else:
        dk = tl.zeros([BLOCK, MAIN], tl.float32)
        dv = tl.zeros([BLOCK, MAIN], tl.float32)
        if REGIONS:
            k = _rows(k_rows, token, inside, WIDTH, MAIN, VECTOR)
            v = _rows(v_rows, token, inside, WIDTH, MAIN, VECTOR)
            bias = tl.where(inside, 0.0, float("-inf"))[None, :]
            for first in range(0, limit, BLOCK):
                query, query_inside = tokens(first + lane, window, WINDOW_WIDTH)
                q = _rows(q_rows, query, query_inside, WIDTH, MAIN, VECTOR)
                grad = _rows(grad_rows, query, query_inside, WIDTH, MAIN, VECTOR)
                statistics = _statistics(stats_ptr, query, query_inside, plane)
                p, slope = _weights_and_slopes(q, k, v, grad, bias, statistics, share, log_scale)
                dk = tl.dot(tl.trans(slope), q[0], dk, input_precision="ieee")
                dv = tl.dot(tl.trans(p), grad[0], dv, input_precision="ieee")
        dk *= scale
        if k_cells_ptr is not None:
            row = token // grid_width // pool_height
            column = token % grid_width // pool_width
            cell_height = tl.minimum(grid_height - row * pool_height, pool_height)
            cell_width = tl.minimum(grid_width - column * pool_width, pool_width)
            member = 1 / (cell_height * cell_width).to(tl.float32)[:, None]
            dk_cells_ptr = d_cells_ptr + index.to(tl.int64) * cells * WIDTH
            dv_cells_ptr = dk_cells_ptr + cells_plane
            cell = row * cell_columns + column
            dk += member * load_rows(dk_cells_ptr, cell, inside, WIDTH, WIDTH, MAIN, None, 1)[0]
            dv += member * load_rows(dv_cells_ptr, cell, inside, WIDTH, WIDTH, MAIN, None, 1)[0]
        dk_ptr = sequence(dk_ptr, batch, head, d_batch, d_head, VECTOR)
        dv_ptr = sequence(dv_ptr, batch, head, d_batch, d_head, VECTOR)
        store_rows(dk_ptr, token, inside, d_token, (dk, None), WIDTH, MAIN, None, VECTOR)
        store_rows(dv_ptr, token, inside, d_token, (dv, None), WIDTH, MAIN, None, VECTOR)
