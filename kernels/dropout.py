"""Dropout of attention weights: masks that depend only on the seed, the bag and its sizes."""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor


def check_dropout(dropout_p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the seed of the dropout mask, drawn if it is None; None without dropout."""
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p!r}")
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**62, (1,), device=device)
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed: expected a tensor, got {type(seed).__name__}")
    if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != device:
        raise ValueError(
            f"seed: expected int64 [1] on {device}, got {seed.dtype} {tuple(seed.shape)} on "
            f"{seed.device}"
        )
    return seed


def keep_mask(
    seed: Tensor, bag: int, shape: Sequence[int], dropout_p: float, like: Tensor
) -> Tensor:
    """Return the dropout mask of a bag: 1 / (1 - p) for weights that are kept, else 0.

    torch draws it, from a generator for each bag; Triton's masks are those of `dropout_mask`.
    """
    generator = torch.Generator(like.device).manual_seed((int(seed) + bag) % 2**62)
    return like.new_empty(shape).bernoulli_(1 - dropout_p, generator=generator).div_(1 - dropout_p)


def dropout_mask(
    q: Tensor, k: Tensor, offsets: Tensor | None, dropout_p: float, seed: Tensor | int
) -> Tensor:
    """Return which weights the Triton kernels keep, in plain torch on any device.

    The weight of key position n in bag b, head h and latent c is kept if word n % 4 of
    Philox4x32-10(key seed, counter (n // 4, h C + c, b, 0)) is at least 2^32 dropout_p. So the mask
    does not depend on how the work is cut, and the backward pass can draw it again (Salmon et al.
    2011, Parallel random numbers).

    Args:
        q: [B, H, C, E], for its shape.
        k: [T, H, E] with `offsets`, else [B, H, N, E], for its shape.
        offsets: int64 [B + 1], or None.
        dropout_p: probability of dropping a weight, in [0, 1).
        seed: int64 [1], or an int.

    Returns:
        bool [T, H, C], or [B, H, C, N] without offsets.
    """
    bags, heads, latents, _ = q.shape
    row = torch.arange(heads * latents, device=k.device).view(heads, latents)
    if offsets is None:
        position = torch.arange(k.shape[2], device=k.device)
        bag = torch.arange(bags, device=k.device)[:, None, None, None]
        row = row[:, :, None]
    else:
        token = torch.arange(k.shape[0], device=k.device)
        bag = torch.searchsorted(offsets[1:], token, right=True)
        position = (token - offsets[bag])[:, None, None]
        bag = bag[:, None, None]
    words = _philox(seed, position // 4, row, bag)
    lane = (position % 4).expand_as(words[0])
    word = torch.stack(words).gather(0, lane[None])[0]
    return word >= int(representable(dropout_p) * 2**32)


def _philox(seed: Tensor | int, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, ...]:
    """Return the 4 words of Philox4x32-10, in int64: torch has no uint32 arithmetic."""
    low = 0xFFFFFFFF
    key_0, key_1 = seed & low, (seed >> 32) & low
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        left, right = 0xCD9E8D57 * c2, 0xD2511F53 * c0
        c0, c1, c2, c3 = (
            ((left >> 32) & low) ^ c1 ^ key_0,
            left & low,
            ((right >> 32) & low) ^ c3 ^ key_1,
            right & low,
        )
        key_0, key_1 = (key_0 + 0x9E3779B9) & low, (key_1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def representable(dropout_p: float) -> float:
    """Return dropout_p rounded to fp32, as a kernel's argument is, but below 1."""
    (rounded,) = struct.unpack("f", struct.pack("f", dropout_p))
    return min(rounded, 1 - 2**-24)
