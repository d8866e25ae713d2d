"""The Triton kernels of products with a few rows of an lm_head for each token, gathered by their ids.

Both gradients are sums of gathered rows times a factor each: of a token's rows of the weight, and of an id's rows of
hidden states. An id that comes with a good part of all tokens has a long sum: it is cut into parts, whose sums are
added in their order.
"""

import triton
import triton.language as tl

from kdkernels.backends._triton_columns import rounded


@triton.jit
def logits_kernel(
    hidden,
    weight,
    bias,
    places,
    out,
    number_of_ids,
    width,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    scale,
    HAS_BIAS: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = scale·(hidden @ weight[place] + bias[place]) for IDS places of one token; -inf where there is none."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * IDS + tl.arange(0, IDS)
    place = tl.load(places + row * number_of_ids + i, mask=i < number_of_ids, other=-1)
    some = place >= 0
    at = place.to(tl.int64) * weight_row
    end = width * (tl.max(place, axis=0) >= 0).to(tl.int32)  # nothing is read where there are none
    total = tl.zeros((IDS, BLOCK), tl.float32)
    for start in range(0, end, BLOCK):
        columns = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = columns < width
        x = tl.load(hidden + row * hidden_row + columns * hidden_column, mask=inside, other=0.0)
        w = tl.load(
            weight + at[:, None] + (columns * weight_column)[None, :], mask=some[:, None] & inside[None, :], other=0.0
        )
        total += w.to(tl.float32) * x.to(tl.float32)[None, :]
    z = tl.sum(total, axis=1)
    if HAS_BIAS:
        z += tl.load(bias + place, mask=some, other=0.0).to(tl.float32)
    tl.store(out + row * number_of_ids + i, tl.where(some, z * scale, float("-inf")), mask=i < number_of_ids)


@triton.jit
def _sum_of_rows(
    rows,
    factors,
    first,
    last,
    matrix,
    row_stride,
    column_stride,
    columns,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of factor·row over entries [first, last), in their order; negative rows are not read."""
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(first, last, ROWS):
        entries = i + tl.arange(0, ROWS)
        row = tl.load(rows + entries, mask=entries < last, other=-1)
        factor = tl.load(factors + entries, mask=entries < last, other=0.0)
        x = tl.load(
            matrix + (row.to(tl.int64) * row_stride)[:, None] + (columns.to(tl.int64) * column_stride)[None, :],
            mask=(row >= 0)[:, None] & (columns < width)[None, :],
            other=0.0,
        )
        total += tl.sum(factor[:, None] * x.to(tl.float32), axis=0)
    return total


@triton.jit
def _write(target, columns, width, total, ADD: tl.constexpr):
    if ADD:
        total += tl.load(target + columns, mask=columns < width, other=0.0)
    # What is still to be gathered matters more to the cache.
    value = rounded(total, target.dtype.element_ty)
    tl.store(target + columns, value, mask=columns < width, eviction_policy="evict_first")


@triton.jit
def of_hidden_kernel(
    gradient,
    places,
    weight,
    out,
    number_of_ids,
    width,
    weight_row,
    weight_column,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = gradient @ weight[places] for one token."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = row * number_of_ids
    total = _sum_of_rows(
        places, gradient, first, first + number_of_ids, weight, weight_row, weight_column, columns, width, ROWS, BLOCK
    )
    _write(out + row.to(tl.int64) * width, columns, width, total, False)


@triton.jit
def of_weight_kernel(
    rows,
    factors,
    offsets,
    hidden,
    out,
    width,
    hidden_row,
    hidden_column,
    ADD: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[token] = the sum of factor·hidden[row] over its entries; not of tokens with more than PART entries."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(offsets + token)
    last = tl.load(offsets + token + 1)
    if (last - first <= PART) & ((last > first) | (not ADD)):
        total = _sum_of_rows(rows, factors, first, last, hidden, hidden_row, hidden_column, columns, width, ROWS, BLOCK)
        _write(out + token.to(tl.int64) * width, columns, width, total, ADD)


@triton.jit
def _token_at(entry, tokens, offsets, vocabulary):
    """The token of an entry, and its own first and last entry: none (0, 0) where it is no token."""
    token = tl.load(tokens + entry)
    is_token = token < vocabulary
    first = tl.load(offsets + token, mask=is_token, other=0)
    last = tl.load(offsets + token + 1, mask=is_token, other=0)
    return token, first, last


@triton.jit
def parts_kernel(
    tokens,
    rows,
    factors,
    offsets,
    hidden,
    parts,
    number_of_entries,
    vocabulary,
    width,
    hidden_row,
    hidden_column,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The entries of tokens that have more than PART of them, in a window of PART entries: two sums.

    parts[window, 0]: of the token that the window begins with; parts[window, 1]: of the one that begins inside and goes
    on beyond. No third token of so many entries fits.
    """
    window = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    side = tl.program_id(2)
    begin = window * PART
    end = tl.minimum(begin + PART, number_of_entries)
    _, first, last = _token_at(tl.where(side == 0, begin, end - 1), tokens, offsets, vocabulary)
    inside = (first > begin) == (side == 1)
    if (last - first > PART) & inside:
        total = _sum_of_rows(
            rows,
            factors,
            tl.maximum(first, begin),
            tl.minimum(last, end),
            hidden,
            hidden_row,
            hidden_column,
            columns,
            width,
            ROWS,
            BLOCK,
        )
        target = parts + (window * 2 + side).to(tl.int64) * width
        tl.store(target + columns, total, mask=columns < width)


@triton.jit
def sum_of_parts_kernel(
    tokens,
    offsets,
    parts,
    out,
    number_of_entries,
    vocabulary,
    width,
    ADD: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[token] of the token with more than PART entries that begins in a window, if one does."""
    window = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = window * PART
    end = tl.minimum(begin + PART, number_of_entries)
    token, first, last = _token_at(end - 1, tokens, offsets, vocabulary)
    if (last - first > PART) & (first >= begin):
        side = (first > begin).to(tl.int32)
        at = parts + (window * 2 + side).to(tl.int64) * width
        total = tl.load(at + columns, mask=columns < width, other=0.0)
        at = parts + (window * 2).to(tl.int64) * width
        for _ in range(window + 1, (last - 1) // PART + 1):
            at += 2 * width
            total += tl.load(at + columns, mask=columns < width, other=0.0)
        _write(out + token.to(tl.int64) * width, columns, width, total, ADD)
