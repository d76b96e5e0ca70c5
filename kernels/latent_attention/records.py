"""The gradient of K and V, computed once for all layers that attend to them.

Autograd would compute it for every layer and add the layers up, reading and writing tensors as
large as K and V for each. So, on a GPU, a layer's backward pass computes the gradient of its
queries only. What the gradient of K and V needs of a layer (its queries, the gradient of its
result, two numbers and a seed for each latent) takes a thousandth of the memory of K and V. The
layer returns it as the gradient of its `record`: an input of the layer whose values are never
read. Autograd stacks the gradients of the records of all layers and gives them to the backward
pass of `kv_records`, which reads K and V once and writes their gradient once.
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
    """Return whether Triton computes the attention of queries [B, H, C, E]; else torch does."""
    too_wide = "takes heads of up to 256 numbers" if q.shape[-1] > 256 else ""
    return on_triton(backend, q.device.type, q.dtype, too_wide)


def record_width(width: int) -> int:
    """Return how many numbers the record of one latent and head has, for heads of `width`.

    These are the query and the gradient of the result, each padded to a multiple of 16; then eight:
    the log-sum-exp, the inner product of the result and its gradient, the seed of the dropout mask
    in 4 words, and two zeros.
    """
    return 2 * (width + -width % 16) + 8


def like_record(grad: Tensor) -> Tensor:
    """Return memory for the record of a layer, given the gradient of its result [B, H, C, E]."""
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
    """Return one record for each of the layers that will attend to `kv`.

    Args:
        q: [B, H, C, E], the queries of one of these layers, or [1, H, C, E].
        kv, offsets, counts, scale, dropout_p, backend: as given to latent_attention_kv, the same
            for all layers.
        layers: L.

    Returns:
        L tensors [B, H, C, record_width(E)] of undefined values. An empty sequence if K and V need
        no gradient, or if torch computes: then each layer's backward pass has its own gradient of K
        and V.
    """
    if not (torch.is_grad_enabled() and kv.requires_grad):
        return ()
    if (backend == "compile" and not dropout_p) or not takes_triton(backend, q):
        return ()
    sizes = (layers, *q.shape[2:])
    records = torch.ops.motet.kv_records(kv, offsets, counts, *sizes, scale, dropout_p)
    # The gradient of unbind is a stack, a copy; that of squeeze is a view.
    return (records.squeeze(2),) if layers == 1 else records.unbind(2)


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
    if not records.numel():  # no bags, or no queries
        return dkv.zero_()
    (k, v), (dk, dv) = rows_apart(kv).unbind(1), dkv.unbind(1)
    launchers.kv_gradient(
        records.contiguous(), k, v, offsets, counts, width, scale, dropout_p, dk, dv
    )
    return dkv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    kv, offsets, counts, _, _, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(kv, offsets, counts)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    dkv = torch.ops.motet.kv_records_backward(grad, *ctx.saved_tensors, *ctx.options)
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
