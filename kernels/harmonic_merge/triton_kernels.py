"""The Triton kernels of harmonic_merge; triton.py says how they are launched.

A program merges BLOCK numbers of all inputs. Complex numbers lie in memory as (re, im) pairs:
[BLOCK, 2] tiles are loaded and split. `parts` and `weights` are tuples, over which the loops are
unrolled at compile time. Divisions and square roots are rounded correctly (div_rn, sqrt_rn), which
those of plain operators on a GPU are not. The polynomials are of the kind that
docs/design/merge-polynomials.md derives for the C++, in float32 and so with fewer terms.
"""

import triton
import triton.language as tl


@triton.jit
def merge_kernel(parts, weights, out, size, CIRCULAR: tl.constexpr, BLOCK: tl.constexpr):
    """Write 1 / sum_i (w_i / |z_i|), turned by the mean phase, of BLOCK numbers.

    Inputs are read twice: the second time from the caches.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    pairs = at[:, None] * 2 + tl.arange(0, 2)[None, :]
    # The larger part of |re| and |im| is |z| up to a factor of 1 to sqrt(2). Magnitudes are taken
    # relative to the smallest of these: the ratios base / |z| are at most 1 and cannot overflow.
    base = tl.full((BLOCK,), float("inf"), tl.float32)
    for j in tl.static_range(len(parts)):
        re, im = tl.split(tl.load(parts[j] + pairs, mask=inside[:, None], other=1.0))
        base = _smaller(base, _larger(tl.abs(re), tl.abs(im)))
    reciprocal = tl.zeros((BLOCK,), tl.float32)
    x = tl.zeros((BLOCK,), tl.float32)
    y = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(len(parts)):
        re, im = tl.split(tl.load(parts[j] + pairs, mask=inside[:, None], other=1.0))
        high = _larger(tl.abs(re), tl.abs(im))
        low = _smaller(tl.abs(re), tl.abs(im))
        infinite = high == float("inf")
        slope = tl.where(infinite, (low == high).to(tl.float32), tl.div_rn(low, high))
        slope = tl.where(high == 0, 0.0, slope)
        length = tl.sqrt_rn(1 + slope * slope)
        reciprocal += weights[j] * tl.div_rn(tl.div_rn(base, high), length)
        if CIRCULAR:
            x += weights[j] * tl.div_rn(tl.div_rn(re, high), length)
            y += weights[j] * tl.div_rn(tl.div_rn(im, high), length)
        else:
            x += weights[j] * _angle(re, im, slope)
    if CIRCULAR:
        length = tl.sqrt_rn(x * x + y * y)
        cos = tl.where(length == 0, 1.0, tl.div_rn(x, length))
        sin = tl.where(length == 0, 0.0, tl.div_rn(y, length))
    else:
        cos, sin = _turned(x)
    mean = tl.div_rn(base, reciprocal)
    # The result is zero if an input is zero.
    re = tl.where(base == 0, 0.0, mean * cos)
    im = tl.where(base == 0, 0.0, mean * sin)
    tl.store(out + pairs, tl.join(re, im), mask=inside[:, None])


@triton.jit
def merge_backward_kernel(
    grad, merged, parts, weights, grads, size, CIRCULAR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the gradients of all inputs; gradient.py has the equation."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    pairs = at[:, None] * 2 + tl.arange(0, 2)[None, :]
    re, im = tl.split(tl.load(grad + pairs, mask=inside[:, None], other=0.0))
    mean, cos, sin = _polar(merged + pairs, inside)
    along = re * cos + im * sin  # Re(p), Im(p) of p = conj(grad) exp(i phi)
    across = re * sin - im * cos
    x = tl.zeros((BLOCK,), tl.float32)
    y = tl.zeros((BLOCK,), tl.float32)
    if CIRCULAR:
        for j in tl.static_range(len(parts)):
            _, cos, sin = _polar(parts[j] + pairs, inside)
            x += weights[j] * cos
            y += weights[j] * sin
    square = x * x + y * y
    for j in tl.static_range(len(parts)):
        length, cos, sin = _polar(parts[j] + pairs, inside)
        phase_weight = weights[j]
        if CIRCULAR:
            cosine = weights[j] * (cos * x + sin * y)
            phase_weight = tl.div_rn(cosine, tl.where(square == 0, 1.0, square))
        ratio = tl.div_rn(mean, tl.where(length == 0, 1.0, length))
        a = weights[j] * along * ratio * ratio
        b = -phase_weight * across * ratio
        part = tl.join(cos * a - sin * b, cos * b + sin * a)
        tl.store(grads[j] + pairs, part, mask=inside[:, None])


@triton.jit
def _polar(pointer, inside):
    """Load complex numbers; return |z| and the parts of z / |z|, 0 at 0."""
    re, im = tl.split(tl.load(pointer, mask=inside[:, None], other=0.0))
    high = _larger(tl.abs(re), tl.abs(im))
    safe = tl.where(high == 0, 1.0, high)
    slope = tl.div_rn(_smaller(tl.abs(re), tl.abs(im)), safe)
    length = tl.sqrt_rn(1 + slope * slope)
    cos = tl.div_rn(tl.div_rn(re, safe), length)
    return high * length, cos, tl.div_rn(tl.div_rn(im, safe), length)


@triton.jit
def _larger(a, b):
    """Return the larger one, or NaN if either is NaN: maximum() alone would hide it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(a, b):
    """Return the smaller one, or NaN if either is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _negative(x):
    """Return whether the sign bit is set, also of -0.0: the branch cut depends on it."""
    return x.to(tl.int32, bitcast=True) < 0


@triton.jit
def _angle(re, im, slope):
    """Return atan2(im, re), given slope = the smaller of |re| and |im| over the larger.

    slope is the tangent of an angle of 0 to 45 degrees. Above tan(pi/8), (slope - 1) / (slope + 1)
    is the tangent of that angle minus pi/4: so the polynomial serves |x| <= tan(pi/8) only. Then
    the angle is brought to its octant, by pi/2 - a and pi - a, and gets the sign of im.
    """
    wide = slope > 0.41421357  # tan(pi/8)
    x = tl.where(wide, tl.div_rn(slope - 1, slope + 1), slope)
    square = x * x
    # (atan(x) - x) / x^3 by Horner's rule; atan(x) / x is off by 6e-10 at most.
    series = square * -0.06032459460398834 + 0.10572580136282739
    series = series * square - 0.14239962985546747
    series = series * square + 0.19998210516714143
    series = series * square - 0.33333307507939947
    angle = (series * square) * x + x
    angle = tl.where(wide, 0.7853981633974483 + angle, angle)
    angle = tl.where(tl.abs(im) > tl.abs(re), 1.5707963267948966 - angle, angle)
    angle = tl.where(_negative(re), 3.141592653589793 - angle, angle)
    return tl.where(_negative(im), -angle, angle)


@triton.jit
def _turned(angle):
    """Return cos and sin of |angle| < 4: a mean of phases is within pi, and rounding.

    The nearest multiple of pi/2 is subtracted, which leaves |x| <= pi/4; its number modulo 4 says
    which of the two polynomials is the cosine, and the signs.
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    # pi/2 in two parts. The first has so few bits that its product with `quarter` is exact.
    x = (angle - quarter * 1.5703125) - quarter * 0.0004838267948966
    square = x * x
    sine = square * 2.7171142903332335e-06 - 0.00019839174161687443
    sine = sine * square + 0.008333328676129518
    sine = sine * square - 0.16666666630299798
    sine = (sine * square) * x + x
    cosine = square * 2.4372245329538446e-05 - 0.00138865243466366
    cosine = cosine * square + 0.041666613069603314
    cosine = (cosine * square - 0.49999999569795034) * square + 1.0
    turns = quarter.to(tl.int32)
    odd = (turns & 1) != 0
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    cos = tl.where(((turns + 1) & 2) != 0, -cos, cos)
    return cos, tl.where((turns & 2) != 0, -sin, sin)
