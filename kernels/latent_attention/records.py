"""The gradient of K and V once for all layers that attend to them, instead of a sum over layers.

On a GPU a layer's backward pass computes what it must, the gradient of its queries. What the
gradient of K and V needs of the layer, its queries, the gradient of its result and two numbers per
latent, is a thousandth of K and V: the layer returns it as the gradient of a `record`, a tensor
that nobody reads. Autograd brings the records of all layers to `kv_records`, whose backward pass
reads K and V once and writes their gradient once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, on_triton, refuse_second_derivative
from ..layout import rows_apart

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
_LIBRARY.define(
    "kv_records(Tensor kv, Tensor offsets, Tensor? counts, int layers, int latents, int width, "
    "float scale, float dropout_p) -> Tensor"
)
_LIBRARY.define(
    "kv_records_backward(Tensor records, Tensor kv, Tensor offsets, Tensor? counts, int width, "
    "float scale, float dropout_p) -> Tensor"
)


def takes_triton(backend: str, q: Tensor) -> bool:
    """Return whether Triton attends from queries [B, H, C, E], or torch."""
    too_wide = "takes heads of up to 256 numbers" if q.shape[-1] > 256 else ""
    return on_triton(backend, q.device.type, q.dtype, too_wide)


def record_width(width: int) -> int:
    """Return how many numbers a latent's record has for heads of `width`.

    The query and the gradient of the result, each up to the next multiple of 16, the log-sum-exp,
    the inner product of result and gradient, and the seed of the dropout mask in 4 words.
    """
    return 2 * (width + -width % 16) + 8


def like_record(grad: Tensor) -> Tensor:
    """Return where what a layer leaves goes, from the gradient of its result [B, H, C, E]."""
    size = (*grad.shape[:3], record_width(grad.shape[3]))
    return grad.new_empty(size, dtype=torch.float32)


def kv_records(
    q: Tensor,
    kv: Tensor,
    offsets: Tensor,
    *,
    layers: int,
    counts: Tensor | None,
    scale: float,
    dropout_p: float,
    backend: Backend,
) -> Sequence[Tensor]:
    """Return the records of as many layers as will attend to `kv`, one for each.

    Args:
        q: [B, H, C, E], the queries of one of these layers, or [1, H, C, E].
        kv, offsets, counts, scale, dropout_p, backend: as given to latent_attention_kv, the same
            for all layers.
        layers: L.

    Returns:
        L times [B, H, C, record_width(E)], which hold nothing; none where each layer's backward
        pass computes the gradient of K and V itself, as torch does, or where there is none.
    """
    if not (torch.is_grad_enabled() and kv.requires_grad):
        return ()
    if (backend == "compile" and not dropout_p) or not takes_triton(backend, q):
        return ()
    sizes = (layers, *q.shape[2:])
    made = torch.ops.motet.kv_records(kv, offsets, counts, *sizes, scale, dropout_p)
    return (made.squeeze(2),) if layers == 1 else made.unbind(2)  # a view, where there is one


def _forward(
    kv: Tensor, offsets: Tensor, counts: Tensor | None, layers: int, latents: int, width: int, *_
) -> Tensor:
    size = len(offsets) - 1, kv.shape[2], layers, latents, record_width(width)
    return kv.new_empty(size, dtype=torch.float32)


def _backward_of(
    records: Tensor,
    kv: Tensor,
    offsets: Tensor,
    counts: Tensor | None,
    width: int,
    scale: float,
    dropout_p: float,
) -> Tensor:
    from . import triton as launchers

    dkv = kv.new_empty(kv.shape)
    if not records.numel():  # nobody attends
        return dkv.zero_()
    (k, v), (dk, dv) = rows_apart(kv).unbind(1), dkv.unbind(1)
    own = (width, scale, dropout_p, dk, dv)
    launchers.kv_gradient(records.contiguous(), k, v, offsets, counts, *own)
    return dkv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    kv, offsets, counts, _, _, *ctx.rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(kv, offsets, counts)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    dkv = torch.ops.motet.kv_records_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (dkv, *(None,) * 7)


_LIBRARY.impl("kv_records", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("kv_records_backward", _backward_of, "CompositeExplicitAutograd")
torch.library.register_fake("motet::kv_records", _forward, lib=_LIBRARY)
torch.library.register_fake(
    "motet::kv_records_backward", lambda _, kv, *rest: kv.new_empty(kv.shape), lib=_LIBRARY
)
torch.library.register_autograd(
    "motet::kv_records", _backward, setup_context=_setup_context, lib=_LIBRARY
)
refuse_second_derivative(_LIBRARY, "kv_records")
