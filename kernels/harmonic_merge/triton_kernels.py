"""The Triton kernels of harmonic_merge; triton.py says how they are launched."""

import triton
import triton.language as tl


@triton.jit
def merge_kernel(parts, weights, out, size, CIRCULAR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    pairs = at[:, None] * 2 + tl.arange(0, 2)[None, :]
    # The smallest of the larger parts: ratios to it neither over- nor underflow.
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
    # Zero where an input is.
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
        turning = weights[j]
        if CIRCULAR:
            share = weights[j] * (cos * x + sin * y)
            turning = tl.div_rn(share, tl.where(square == 0, 1.0, square))
        ratio = tl.div_rn(mean, tl.where(length == 0, 1.0, length))
        a = weights[j] * along * ratio * ratio
        b = -turning * across * ratio
        own = tl.join(cos * a - sin * b, cos * b + sin * a)
        tl.store(grads[j] + pairs, own, mask=inside[:, None])


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
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _negative(x):
    """Whether the sign is set, that of zero too."""
    return x.to(tl.int32, bitcast=True) < 0


@triton.jit
def _angle(re, im, slope):
    """atan2(im, re), given the smaller of |re| and |im| over the larger."""
    wide = slope > 0.41421357  # tan(pi/8)
    x = tl.where(wide, tl.div_rn(slope - 1, slope + 1), slope)
    square = x * x
    # atan(x) / x, 6e-10 off.
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
    """cos and sin of |angle| < 4."""
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    # pi/2 in two parts, of which the first has few enough bits for products that are exact.
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
