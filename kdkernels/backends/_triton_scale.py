"""The Triton kernel of backward: a saved gradient times a factor a row."""

import triton
import triton.language as tl

from kdkernels.backends._triton_columns import rounded, row_offset


@triton.jit
def scale_kernel(
    values,
    factors,
    out,
    number_of_rows,
    width,
    factor_stride,
    n1,
    n2,
    n3,
    s0,
    s1,
    s2,
    s3,
    DIMS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = values·factors for ROWS rows, given one stride for both; rows whose factor is 1 stay as they are."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)
    given = tl.load(factors + rows * factor_stride, mask=rows < number_of_rows, other=1.0)
    work = ROWS
    if IN_PLACE:
        work = tl.max((given != 1.0).to(tl.int32), axis=0) * ROWS
    for i in range(work):
        row = first + i
        if row < number_of_rows:
            factor = tl.load(factors + row * factor_stride)
            if (factor != 1.0) | (not IN_PLACE):
                at = row_offset(row, (n1, n2, n3), (s0, s1, s2, s3), DIMS)
                for column in range(0, width, BLOCK):
                    columns = column + tl.arange(0, BLOCK)
                    x = tl.load(values + at + columns, mask=columns < width).to(tl.float32)
                    tl.store(out + at + columns, rounded(x * factor, out.dtype.element_ty), mask=columns < width)
