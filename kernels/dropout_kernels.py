"""The dropout mask in Triton; `dropout_mask` in dropout.py is the same in plain torch."""

import triton
import triton.language as tl


@triton.jit
def kept_weights(seed, n0, row, bag, dropout_p, BLOCK_N: tl.constexpr):
    """Return which weights [BLOCK_C, BLOCK_N] of keys n0 to n0 + BLOCK_N are kept.

    A Philox call gives 4 words, one for each of 4 neighbouring keys: w0 to w3 of a quad, which the
    interleaving puts side by side in this order. n0 is a multiple of 4.
    """
    quad = n0 // 4 + tl.arange(0, BLOCK_N // 4)
    zero = row[:, None] * 0
    w0, w1, w2, w3 = tl.philox(seed, quad[None, :] + zero, row[:, None] + quad[None, :] * 0,
                               bag, 0)  # fmt: skip
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    threshold = tl.full([1, 1], dropout_p, tl.float32) * 4294967296.0
    return word >= threshold.to(tl.uint32)
