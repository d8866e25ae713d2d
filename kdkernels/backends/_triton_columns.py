"""How the Triton kernels walk along a row: offsets, blocks, loads and stores of any alignment, logit transforms."""

from typing import NamedTuple

import triton
import triton.language as tl

from kdkernels.backends._triton_math import INTERPRETED, LOG2E, exp2, exponential

CHUNK: tl.constexpr = tl.constexpr(8)  # columns a lane takes at a time; 16 bytes of a 16-bit type

# What stands for a log-ratio of -inf, such that 0·LEAST is 0.
LEAST = tl.constexpr(-1e30)


class Plan(NamedTuple):
    """What a row kernel is compiled for."""

    DIVERGENCE: str  # a kernel_name of _triton_divergences
    PLAIN: str  # "linear", "ratio", "power" or "none": the formulas of rows whose models are far apart
    GRADIENT: bool
    DIVERGENCE_IN_GRADIENT: bool  # false: kd_weight is 0
    LABELS: bool
    OWN_HARD_SUM: bool  # the cross-entropy's softmax is not the divergence's
    ROW_TEMPERATURES: bool
    SCALE_BY_TEMPERATURE: bool
    SCALE_GRADIENT: bool
    STUDENT_TRANSFORM: str  # "none", "scale" or "softcap"
    TEACHER_TRANSFORM: str
    # "aligned": rows of all tensors start at 16 bytes, and end there. "shifted": they start equally many columns after
    # 16 bytes; blocks start there. "none": neither.
    ALIGNMENT: str
    DIMS: int  # leading dimensions, 1 to 4
    BLOCK: int
    STAGES: int  # of the loads' software pipeline; 1: none
    STRONG: str = ""  # which StrongSet splits the row
    ORDER_SHIFT: int = 0  # low bits of an fp32 number that are the same in all of the teacher's logits
    TERM_WEIGHTS: bool = False  # a decoupled divergence's weights come as a tensor
    TAIL: str = ""  # of a sparse teacher: what becomes of the mass it does not tell
    IDS: int = 0  # places for a sparse teacher's ids, a power of two; no fewer than threads, so that each is one's own
    WHOLE: bool = True  # a sparse teacher's: false where the given ids' columns alone matter
    UNROLL: int = 1  # blocks that a sparse teacher's sweeps load at once
    LANE: int = 8  # columns of a lane that lie together; but in rows of alignment "none"


@triton.jit
def row_offset(row, sizes, strides, DIMS: tl.constexpr):
    """Where row number ``row`` starts: the last of DIMS leading dimensions runs fastest."""
    at = row * 0
    if DIMS > 3:
        at += row % sizes[2] * strides[3]
        row = row // sizes[2]
    if DIMS > 2:
        at += row % sizes[1] * strides[2]
        row = row // sizes[1]
    if DIMS > 1:
        at += row % sizes[0] * strides[1]
        row = row // sizes[0]
    return at + row * strides[0]


@triton.jit
def locate(row, pointers, sizes, strides, misalignment, P: tl.constexpr):
    """Where a row of student, teacher and gradient starts, and the first column after that which is its own."""
    student, teacher, gradient = pointers
    of_student, of_teacher, of_gradient = strides
    student += row_offset(row, sizes, of_student, tl.constexpr(P.DIMS))
    teacher += row_offset(row, sizes, of_teacher, tl.constexpr(P.DIMS))
    gradient_at = row_offset(row, sizes, of_gradient, tl.constexpr(P.DIMS))
    begin = 0
    if P.ALIGNMENT == "shifted":
        begin = ((gradient_at + misalignment) % CHUNK).to(tl.int32)
        student -= begin
        teacher -= begin
        gradient_at -= begin
    gradient += gradient_at
    if P.ALIGNMENT != "none":
        student = tl.multiple_of(student, 16)
        teacher = tl.multiple_of(teacher, 16)
        gradient = tl.multiple_of(gradient, 16)
    return student, teacher, gradient, begin


@triton.jit
def _whole_chunks(columns, begin, end):
    first = columns // CHUNK * CHUNK
    return (first >= begin) & (first + CHUNK <= end)


@triton.jit
def read(row, columns, begin, end, EDGE: tl.constexpr, P: tl.constexpr, EVICT: tl.constexpr = None):
    """A row's logits as fp32. In an EDGE block, columns outside [begin, end) are not read and come out as 0.

    EVICT: the eviction policy of blocks inside the row, where they have one.
    """
    if EDGE:
        valid = (columns >= begin) & (columns < end)
        if P.ALIGNMENT == "shifted":
            # Whole chunks in one access each; what is left column by column, never past the row.
            whole = _whole_chunks(columns, begin, end)
            x = tl.load(row + columns, mask=whole, other=0.0)
            rest = tl.load(row + columns, mask=valid & (whole == 0), other=0.0)
            x = tl.where(whole, x, rest)
        else:
            x = tl.load(row + columns, mask=valid, other=0.0)
    elif EVICT is None:
        x = tl.load(row + columns)
    else:
        x = tl.load(row + columns, eviction_policy=EVICT)
    return x.to(tl.float32)


@triton.jit
def rounded(g, dtype: tl.constexpr):
    """fp32 numbers as ``dtype``, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts off what a GPU rounds
        bits = g.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        g = tl.where(g == g, bits.to(tl.float32, bitcast=True), g)
    return g.to(dtype)


@triton.jit
def write(row, columns, begin, end, g, EDGE: tl.constexpr, P: tl.constexpr):
    """Stores a row's gradient; in an EDGE block, inside [begin, end) alone."""
    g = rounded(g, row.dtype.element_ty)
    if EDGE:
        valid = (columns >= begin) & (columns < end)
        if P.ALIGNMENT == "shifted":
            whole = _whole_chunks(columns, begin, end)
            tl.store(row + columns, g, mask=whole)
            tl.store(row + columns, g, mask=valid & (whole == 0))
        else:
            tl.store(row + columns, g, mask=valid)
    else:
        # Logits that are to be read again matter more to the cache.
        tl.store(row + columns, g, eviction_policy="evict_first")


@triton.jit
def transform(z, scale, cap, KIND: tl.constexpr):
    """x = cap·tanh(scale·z / cap) and dx/dz. Blocks only."""
    if KIND == "none":
        return z, 1.0
    elif KIND == "scale":
        return z * scale, scale
    else:
        u = z * (scale / cap)
        e, em, _ = exponential(-2.0 * tl.abs(u))  # tanh|u| = (1 - e)/(1 + e)
        reciprocal = 1.0 / (1.0 + e)
        magnitude = -em * reciprocal
        return cap * tl.where(u < 0, -magnitude, magnitude), scale * 4.0 * e * reciprocal * reciprocal


@triton.jit
def logits(rows, columns, EDGE: tl.constexpr, P: tl.constexpr):
    """Both models' logits, transformed, and the derivative of the student's transform; -inf outside the row."""
    student, teacher, begin, end, student_scale, student_cap, teacher_scale, teacher_cap = rows
    x = read(student, columns, begin, end, EDGE, P)
    y = read(teacher, columns, begin, end, EDGE, P)
    x, derivative = transform(x, student_scale, student_cap, tl.constexpr(P.STUDENT_TRANSFORM))
    y, _ = transform(y, teacher_scale, teacher_cap, tl.constexpr(P.TEACHER_TRANSFORM))
    if EDGE:
        valid = (columns >= begin) & (columns < end)
        x = tl.where(valid, x, float("-inf"))
        y = tl.where(valid, y, float("-inf"))
    return x, y, derivative


@triton.jit
def student_logits(rows, columns, EDGE: tl.constexpr, P: tl.constexpr, EVICT: tl.constexpr):
    """The student's logits alone, and the derivative of their transform (see :func:`logits`)."""
    student, begin, end = rows[0], rows[2], rows[3]
    x = read(student, columns, begin, end, EDGE, P, EVICT)
    x, derivative = transform(x, rows[4], rows[5], tl.constexpr(P.STUDENT_TRANSFORM))
    if EDGE:
        x = tl.where((columns >= begin) & (columns < end), x, float("-inf"))
    return x, derivative


@triton.jit
def teacher_logits(rows, columns, EDGE: tl.constexpr, P: tl.constexpr):
    """The teacher's logits alone (see :func:`logits`)."""
    teacher, begin, end = rows[1], rows[2], rows[3]
    y, _ = transform(read(teacher, columns, begin, end, EDGE, P), rows[6], rows[7], tl.constexpr(P.TEACHER_TRANSFORM))
    if EDGE:
        y = tl.where((columns >= begin) & (columns < end), y, float("-inf"))
    return y


@triton.jit
def logit_at(row, column, begin, scale, cap, KIND: tl.constexpr):
    """One transformed logit of a row."""
    z = tl.load(row + begin + column + tl.arange(0, 1)).to(tl.float32)
    return tl.sum(transform(z, scale, cap, KIND)[0], axis=0)


@triton.jit
def blocks_inside(rows, P: tl.constexpr):
    """How many of a row's blocks lie inside it."""
    end = rows[3]
    if P.ALIGNMENT == "shifted":
        return tl.maximum(tl.cdiv(end, P.BLOCK) - 2, 0)
    else:
        return end // P.BLOCK


@triton.jit
def inside_from(i, rows, REVERSE: tl.constexpr, P: tl.constexpr):
    """The first column of the i-th block inside the row."""
    if REVERSE:
        i = blocks_inside(rows, P) - 1 - i
    if P.ALIGNMENT == "shifted":
        i += 1
    return i * P.BLOCK


@triton.jit
def inside(i, rows, REVERSE: tl.constexpr, P: tl.constexpr):
    """The columns of the i-th block inside the row."""
    return inside_from(i, rows, REVERSE, P) + tl.arange(0, P.BLOCK)


@triton.jit
def blocks_at_edges(rows, P: tl.constexpr):
    """How many of a row's blocks may not lie inside it."""
    end = rows[3]
    if P.ALIGNMENT == "shifted":
        return tl.minimum(tl.cdiv(end, P.BLOCK), 2)
    else:
        return (end % P.BLOCK + P.BLOCK - 1) // P.BLOCK


@triton.jit
def edge_from(i, rows, P: tl.constexpr):
    """The first column of the i-th block at an edge: the row's last block, then its first."""
    last = (rows[3] - 1) // P.BLOCK
    return last * (1 - i) * P.BLOCK


@triton.jit
def edge(i, rows, P: tl.constexpr):
    """The columns of the i-th block at an edge (see :func:`edge_from`)."""
    return edge_from(i, rows, P) + tl.arange(0, P.BLOCK)


@triton.jit
def _lanes(x, P: tl.constexpr):
    """A block's columns by lane (as a load deals them out, so that folding needs no exchange)."""
    if P.ALIGNMENT == "none":
        return tl.reshape(x, (CHUNK, P.BLOCK // CHUNK))
    else:
        return tl.reshape(x, (P.BLOCK // P.LANE, P.LANE))


@triton.jit
def fold(x, P: tl.constexpr):
    """A block's sums per lane."""
    return tl.sum(_lanes(x, P), axis=0 if P.ALIGNMENT == "none" else 1)


@triton.jit
def fold_max(x, P: tl.constexpr):
    """A block's maxima per lane."""
    return tl.max(_lanes(x, P), axis=0 if P.ALIGNMENT == "none" else 1)


@triton.jit
def lane_column(lane, i, P: tl.constexpr):
    """The i-th of the CHUNK columns that a lane holds of a block."""
    if P.ALIGNMENT == "none":
        return i * (P.BLOCK // CHUNK) + lane
    else:
        return lane * CHUNK + i


@triton.jit
def fill(gradient, begin, end, number, P: tl.constexpr):
    """Writes one number to the columns [begin, end)."""
    for i in range(begin // P.BLOCK, tl.cdiv(end, P.BLOCK)):
        columns = i * P.BLOCK + tl.arange(0, P.BLOCK)
        write(gradient, columns, begin, end, tl.full((P.BLOCK,), number, tl.float32), True, P)


@triton.jit
def log_ratio(x, y, origin):
    """(y - x) - origin, LEAST where the teacher gives no mass, or neither model."""
    ratio = (y - x) - origin
    if INTERPRETED:  # where the larger of NaN and a number is NaN
        return tl.where(ratio > LEAST, ratio, LEAST)
    else:
        return tl.maximum(ratio, LEAST)


@triton.jit
def finish(g, x, derivative, columns, rows, gradient, ce, EDGE: tl.constexpr, P: tl.constexpr):
    """Adds the cross-entropy to a block's gradient, leads it through the transform and stores it."""
    begin, end = rows[2], rows[3]
    ce_weight, by_hard, student_ref, label = ce
    if P.OWN_HARD_SUM:
        g += by_hard * exp2((x - student_ref) * LOG2E)
    if P.LABELS:
        g = tl.where(columns - begin == label, g - ce_weight, g)
    if P.STUDENT_TRANSFORM != "none":
        g *= derivative
    write(gradient, columns, begin, end, g, EDGE, P)
