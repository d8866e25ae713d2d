"""Elementary functions of the Triton kernels, each accurate relative to its own size, as csrc/cpu/vector.h."""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")  # as triton.jit reads it
# Whether the hardware's own 2^x, log2 and 1/x may be asked for by name: one instruction each, where the portable
# functions add two to four for numbers under 2^-126, which nothing here depends on.
PTX = tl.constexpr(torch.version.cuda is not None and not INTERPRETED.value)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Adding it rounds to an integer, which then lies in the lowest bits.
ROUNDER = tl.constexpr(12582912.0)
# Sums of exponentials in [1/LARGE, LARGE] (2^40) stand well against their reference.
LARGE = tl.constexpr(1.0995e12)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def fits(total):
    return (total >= 1 / LARGE) & (total <= LARGE)


@triton.jit
def good(total):
    return (total > 0) & is_finite(total)


@triton.jit
def exp2(x):
    """2^x; 0 under 2^-126 where the hardware says so. Blocks only."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def log2(x):
    """log2(x), x > 0. Blocks only."""
    if PTX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x):
    """1/x. Blocks only."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def exponential(x, ANY_SIGN: tl.constexpr = False):
    """e^x, e^x - 1 and e^x - 1 - x for x <= 0; of any sign (to e^88) if ANY_SIGN. NaN stays NaN."""
    clamped = tl.maximum(x, -87.0, propagate_nan=tl.PropagateNan.ALL)
    if ANY_SIGN:
        clamped = tl.minimum(clamped, 88.0, propagate_nan=tl.PropagateNan.ALL)
    rounded = clamped * LOG2E + ROUNDER
    n = rounded - ROUNDER
    r = (clamped - n * 0.693359375) + n * 2.12194440e-4  # the first product is exact
    # e^r = 1 + r + r²·Q(r) on |r| <= ln(2)/2: minimax of relative error 3e-9.
    q = 0.000198578155 * r + 0.001393364232
    q = q * r + 0.00833336077
    q = q * r + 0.04166646513
    q = q * r + 0.1666666653
    q = q * r + 0.5000000013
    phi_r = r * r * q
    t = r + phi_r
    scale = ((rounded.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    e = tl.where(x < -87.0, 0.0, scale * t + scale)
    em = scale * t + (scale - 1.0)
    phi = tl.where(n == 0.0, phi_r, em - x)
    return e, em, phi


@triton.jit
def psi(k, e, phi):
    """1 + (k - 1)·e^k from e = e^k and phi = e^k - 1 - k."""
    near = k * k + (k - 1.0) * phi
    far = 1.0 + (tl.maximum(k, -1000.0) - 1.0) * e
    return tl.where(tl.abs(k) < 1.0, near, far)


@triton.jit
def log1p_and_chi(w):
    """log(1 + w) and w - log(1 + w) for -1 <= w <= 0."""
    y = w + 1.0
    # y = 2^n·m with sqrt(1/2) <= m < sqrt(2); at n = 0, f = w loses nothing to the addition.
    bits = y.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    n = exponent.to(tl.float32)
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    near = exponent == 0
    f = tl.where(near, w, m - 1.0)
    # log(1 + f) = f - f²·P(f): minimax of relative error 5e-8.
    p = 0.07778153897 * f - 0.1277750379
    p = p * f + 0.1311407334
    p = p * f - 0.1419612602
    p = p * f + 0.1662708818
    p = p * f - 0.200016369
    p = p * f + 0.2500077885
    p = p * f - 0.3333332535
    p = p * f + 0.4999999764
    f2p = f * f * p
    far = tl.where(y > 0.0, n * 0.693359375 + (n * -2.12194440e-4 + (f - f2p)), float("-inf"))
    log1p = tl.where(near, w - f2p, far)
    chi = tl.where(near, f2p, w - log1p)
    return log1p, chi


@triton.jit
def two_sum(a, b):
    """The rounded a + b, and what the rounding lost."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@triton.jit
def _upper_half(a):
    return (a.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def two_product(a, b):
    """The rounded a·b, and what the rounding lost: products of 12-bit halves are exact."""
    product = a * b
    a_high, b_high = _upper_half(a), _upper_half(b)
    a_low, b_low = a - a_high, b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


# Sums and maxima of several blocks, through one exchange between the warps. The interpreter, which would walk such a
# reduction number by number, takes one block after the other.


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _max2(a0, a1, b0, b1):
    return tl.maximum(a0, b0), tl.maximum(a1, b1)


@triton.jit
def sum2(a, b):
    if INTERPRETED:
        return tl.sum(a, axis=0), tl.sum(b, axis=0)
    else:
        return tl.reduce((a, b), 0, _add2)


@triton.jit
def max2(a, b):
    if INTERPRETED:
        return tl.max(a, axis=0), tl.max(b, axis=0)
    else:
        return tl.reduce((a, b), 0, _max2)


@triton.jit
def sum4(a, b, c, d):
    if INTERPRETED:
        return sum2(a, b) + sum2(c, d)
    else:
        return tl.reduce((a, b, c, d), 0, _add4)


@triton.jit
def sum8(blocks):
    if INTERPRETED:
        return sum4(blocks[0], blocks[1], blocks[2], blocks[3]) + sum4(blocks[4], blocks[5], blocks[6], blocks[7])
    else:
        return tl.reduce(blocks, 0, _add8)
