"""Checks of the arguments of latent_attention."""

from torch import Tensor

from ..checks import check_offsets
from ..dtypes import wide


def check_attention(
    q: Tensor,
    k: Tensor,
    offsets: Tensor | None,
    v: Tensor | None = None,
    *,
    covers_all: bool = True,
) -> None:
    """Raise unless queries, keys and values fit together; the arguments are latent_attention's.

    `covers_all`: the bags must cover all tokens. If False, there may be tokens behind the last bag.
    """
    named = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if q.ndim != 4:
        raise ValueError(f"q: expected [B, H, C, E], got {tuple(q.shape)}")
    batch, heads, _, width = q.shape
    ragged = offsets is not None
    expected = ("T", heads, width) if ragged else (batch, heads, "N", width)
    fits = (
        k.ndim == 3 and k.shape[1:] == (heads, width)
        if ragged
        else k.ndim == 4 and (*k.shape[:2], k.shape[3]) == (batch, heads, width)
    )
    if not fits:
        text = ", ".join(map(str, expected))
        raise ValueError(f"k: expected [{text}] for q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, tensor in named.items():
        if (tensor.dtype, tensor.device) != (q.dtype, q.device):
            raise ValueError(
                f"{name}: expected {q.dtype} on {q.device} as q, got {tensor.dtype} on "
                f"{tensor.device}"
            )
    if offsets is not None:
        check_offsets(offsets, len(k), k.device, batch, covers_all=covers_all)


def check_lse(lse: Tensor | None, q: Tensor) -> None:
    """Raise unless `lse` is None, or fits queries [B, H, C, E]."""
    if lse is None:
        return
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse: expected a tensor, got {type(lse).__name__}")
    if (lse.shape, lse.dtype, lse.device) != (q.shape[:3], wide(q.dtype), q.device):
        raise ValueError(
            f"lse: expected {tuple(q.shape[:3])} {wide(q.dtype)} on {q.device}, got "
            f"{tuple(lse.shape)} {lse.dtype} on {lse.device}"
        )
