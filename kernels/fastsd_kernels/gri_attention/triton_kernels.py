"""The two Triton kernels of gri_attention: means over cells, and attention in the form of FlashAttention.

A program of ``attend`` serves a tile of the queries of one window and one head. It walks in tiles over the keys of the
window, then over the cells, as attention's own kernel does over all keys.

Windows are read where they are: a place in a window is a row and a column of the map, and so a token. Where windows are
as wide as the map, their tokens follow each other.
"""

# Triton gives the arguments their types at the launch
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsd_kernels.attention.triton_kernels import (
    absorb,
    load_rows,
    nothing_yet,
    products,
    sequence,
    store_rows,
    weighted_mean,
)


@triton.jit
def corner(window, columns, window_height, grid_height, grid_width, WINDOW_WIDTH: tl.constexpr):
    """Where a window, or a cell, begins, how large it is, and the width of the map."""
    row = window // columns * window_height
    height = tl.minimum(window_height, grid_height - row)
    if WINDOW_WIDTH is None:
        return row, 0, height, grid_width, grid_width
    else:
        column = window % columns * WINDOW_WIDTH
        return row, column, height, tl.minimum(WINDOW_WIDTH, grid_width - column), grid_width


@triton.jit
def places(window, WINDOW_WIDTH: tl.constexpr):
    """How many places a window of this height has, those beyond the map's far edge included."""
    _, _, height, _, grid_width = window
    if WINDOW_WIDTH is None:
        return height * grid_width
    else:
        return height * WINDOW_WIDTH


@triton.jit
def tokens(place, window, WINDOW_WIDTH: tl.constexpr):
    """The tokens at places of a window, and which places exist."""
    first_row, first_column, height, width, grid_width = window
    if WINDOW_WIDTH is None:
        return first_row * grid_width + place, place < height * grid_width
    else:
        row = place // WINDOW_WIDTH
        column = place % WINDOW_WIDTH
        return (first_row + row) * grid_width + first_column + column, (row < height) & (column < width)


@triton.jit
def cell_bias(
    cell,
    cells,
    cell_columns,
    full_bias,
    pool_height,
    pool_width,
    grid_height,
    window,
    UNEVEN: tl.constexpr,
    MASK_OWN_WINDOW: tl.constexpr,
):
    """log2 of how many tokens cells stand for; -inf for those that do not exist or that the window does not see."""
    bias = tl.zeros_like(cell).to(tl.float32) + full_bias
    seen = cell < cells
    if UNEVEN or MASK_OWN_WINDOW:
        first_row, first_column, height, width, grid_width = window
        row = cell // cell_columns * pool_height
        column = cell % cell_columns * pool_width
        cell_height = tl.minimum(grid_height - row, pool_height)
        cell_width = tl.minimum(grid_width - column, pool_width)
        if UNEVEN:
            bias = tl.log2((cell_height * cell_width).to(tl.float32))
        if MASK_OWN_WINDOW:
            rows_inside = (row >= first_row) & (row + cell_height <= first_row + height)
            columns_inside = (column >= first_column) & (column + cell_width <= first_column + width)
            seen = seen & ~(rows_inside & columns_inside)
    return tl.where(seen, bias, float("-inf"))


@triton.jit
def absorb_window(
    state,
    q,
    k_ptr,
    v_ptr,
    k_token,
    v_token,
    scale,
    window,
    keys,
    WINDOW_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    for first in tl.range(0, keys, BLOCK_N, num_stages=STAGES):
        token, inside = tokens(first + tl.arange(0, BLOCK_N), window, WINDOW_WIDTH)
        k = load_rows(k_ptr, token, inside, k_token, WIDTH, MAIN, REST, VECTOR)
        v = load_rows(v_ptr, token, inside, v_token, WIDTH, MAIN, REST, VECTOR)
        state = absorb(state, tl.where(inside[None, :], products(q, k) * scale, float("-inf")), v)
    return state


@triton.jit
def absorb_cells(
    state,
    q,
    k_ptr,
    v_ptr,
    scale,
    window,
    cells,
    cell_columns,
    full_bias,
    pool_height,
    pool_width,
    grid_height,
    UNEVEN: tl.constexpr,
    MASK_OWN_WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    for first in tl.range(0, cells, BLOCK_N, num_stages=STAGES):
        cell = first + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, cell, cell < cells, WIDTH, WIDTH, MAIN, REST, 1)
        v = load_rows(v_ptr, cell, cell < cells, WIDTH, WIDTH, MAIN, REST, 1)
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
        )
        state = absorb(state, products(q, k) * scale + bias[None, :], v)
    return state


@triton.jit
def added(a, b):
    a_main, a_rest = a
    b_main, b_rest = b
    if a_rest is None:
        return a_main + b_main, None
    else:
        return a_main + b_main, a_rest + b_rest


@triton.jit
def attend(
    q_ptr,  # [B, heads, N, d], as are k, v and y
    k_ptr,
    v_ptr,
    k_cells_ptr,  # [B, heads, G, d], contiguous, or None
    v_cells_ptr,
    gate_ptr,  # [heads], or None for one softmax over both kinds of keys
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
    scale,  # times log2(e)
    heads,
    grid_height,
    grid_width,
    window_height,
    window_columns,  # windows side by side
    windows,
    tiles,  # of a window's queries
    pool_height,
    pool_width,
    cell_columns,
    cells,
    full_bias,  # log2 of the tokens of a whole cell
    REGIONS: tl.constexpr,  # whether the window's tokens are keys
    UNEVEN: tl.constexpr,  # whether some cells are smaller than others
    MASK_OWN_WINDOW: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr,  # None where windows are as wide as the map
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
    batch = program // tiles // windows // heads
    head = program // tiles // windows % heads
    window = corner(program // tiles % windows, window_columns, window_height, grid_height, grid_width, WINDOW_WIDTH)
    first = program % tiles * BLOCK_M
    keys = places(window, WINDOW_WIDTH)
    if first >= keys:  # a window at the edge has fewer queries
        return

    token, inside = tokens(first + tl.arange(0, BLOCK_M), window, WINDOW_WIDTH)
    q_ptr = sequence(q_ptr, batch, head, q_batch, q_head, VECTOR)
    q = load_rows(q_ptr, token, inside, q_token, WIDTH, MAIN, REST, VECTOR)
    state = nothing_yet(BLOCK_M, MAIN, REST)
    if REGIONS:
        state = absorb_window(
            state,
            q,
            sequence(k_ptr, batch, head, k_batch, k_head, VECTOR),
            sequence(v_ptr, batch, head, v_batch, v_head, VECTOR),
            k_token,
            v_token,
            scale,
            window,
            keys,
            WINDOW_WIDTH,
            WIDTH,
            MAIN,
            REST,
            VECTOR,
            BLOCK_N,
            STAGES,
        )
    y_ptr = sequence(y_ptr, batch, head, y_batch, y_head, VECTOR)
    if gate_ptr is not None:
        share = 1 / (1 + tl.exp(-tl.load(gate_ptr + head).to(tl.float32)))
        # y has it meanwhile: registers are short
        store_rows(y_ptr, token, inside, y_token, weighted_mean(state, share), WIDTH, MAIN, REST, VECTOR)
        state = nothing_yet(BLOCK_M, MAIN, REST)
        tl.debug_barrier()  # another thread may have stored what this one will load
        # read again: it would else stay in registers
        q = load_rows(q_ptr, token, inside, q_token, WIDTH, MAIN, REST, VECTOR)
    if k_cells_ptr is not None:
        cells_before = (batch.to(tl.int64) * heads + head) * cells * WIDTH
        state = absorb_cells(
            state,
            q,
            k_cells_ptr + cells_before,
            v_cells_ptr + cells_before,
            scale,
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
            REST,
            BLOCK_N,
            STAGES,
        )
    if gate_ptr is None:
        result = weighted_mean(state, 1.0)
    else:
        regional = load_rows(y_ptr, token, inside, y_token, WIDTH, MAIN, REST, VECTOR)
        result = added(weighted_mean(state, 1 - share), regional)
    store_rows(y_ptr, token, inside, y_token, result, WIDTH, MAIN, REST, VECTOR)


@triton.jit
def mean_of_tokens(
    ptr,  # [N, d]
    stride,  # from token to token, in units of VECTOR elements
    cell,  # as of corner
    CELL_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    _, _, height, width, _ = cell
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, places(cell, CELL_WIDTH), BLOCK_T):
        token, inside = tokens(first + tl.arange(0, BLOCK_T), cell, CELL_WIDTH)
        rows = load_rows(ptr, token, inside, stride, WIDTH, BLOCK_D, None, VECTOR)
        total += tl.sum(rows[0].to(tl.float32), 0)
    return total / (height * width).to(tl.float32)


@triton.jit
def pool_cells(
    a_ptr,  # [B, heads, N, d], as is b
    b_ptr,
    a_cells_ptr,  # out: means [B, heads, G, d], contiguous, as is the other
    b_cells_ptr,
    a_batch,  # strides, in units of VECTOR elements
    a_head,
    a_token,
    b_batch,
    b_head,
    b_token,
    heads,
    grid_height,
    grid_width,
    pool_height,
    cell_columns,
    cells,
    CELL_WIDTH: tl.constexpr,  # None where cells are as wide as the map
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The means of two tensors over one cell."""
    program = tl.program_id(0)
    batch = program // cells // heads
    head = program // cells % heads
    cell = corner(program % cells, cell_columns, pool_height, grid_height, grid_width, CELL_WIDTH)
    a_ptr = sequence(a_ptr, batch, head, a_batch, a_head, VECTOR)
    b_ptr = sequence(b_ptr, batch, head, b_batch, b_head, VECTOR)
    a = mean_of_tokens(a_ptr, a_token, cell, CELL_WIDTH, WIDTH, BLOCK_D, VECTOR, BLOCK_T)
    b = mean_of_tokens(b_ptr, b_token, cell, CELL_WIDTH, WIDTH, BLOCK_D, VECTOR, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    offsets = program.to(tl.int64) * WIDTH + column
    tl.store(a_cells_ptr + offsets, a.to(a_cells_ptr.dtype.element_ty), mask=column < WIDTH)
    tl.store(b_cells_ptr + offsets, b.to(b_cells_ptr.dtype.element_ty), mask=column < WIDTH)
