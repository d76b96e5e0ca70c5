"""Keys and values of context tokens: LayerNorm and all projections in one pass over the tokens."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from .backends import (
    Backend,
    check_backend,
    compiled,
    refuse_second_derivative,
    rows_apart,
    triton_kernels,
)
from .checks import DTYPES, check_offsets, refuse_forward_mode
from .native import native

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
_LIBRARY.define(
    "context_kv(Tensor x, Tensor? positions, Tensor weight, Tensor? bias, Tensor? offsets, "
    "Tensor? mean, Tensor? rstd, float eps, str backend) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "context_kv_backward(Tensor grad, Tensor x, Tensor? positions, Tensor weight, Tensor? offsets, "
    "Tensor mean, Tensor rstd, bool given, float eps, str backend, bool[3] needed) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)

# Rows of a chunk times their width: 8 MiB in float32, written and read back within the caches.
# Twice or half of it was 3 to 20 % slower on two Sapphire Rapids cores.
CHUNK_ELEMENTS = 1 << 21


def context_kv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    offsets: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> Tensor:
    r"""Normalise context tokens and project them with several weight sets, reading them once.

    .. math:: y_{s,t} = W_s \frac{z_t - \mu_t}{\sqrt{\sigma_t^2 + \epsilon}} + b_s,
        \quad z_t = [x_t \,|\, p_t]

    The K and V of HEALNet's Eq. 2 for all layers at once. The gain γ and shift β of a LayerNorm
    belong in the weights: W = W₀ diag(γ), b = W₀ β. Neither the normalised tokens nor their
    concatenation with the positions is ever stored. Tokens are centred before they are multiplied,
    so that rows with a mean far above their standard deviation lose no digits.

    Args:
        x: [T, D] tokens; [B, N, D] counts as B·N of them.
        weight: [S, O, D + P], or [O, D + P] for one set; its dtype is that of the product.
        bias: [S, O] or [O], like `weight`.
        positions: [T, P], joined to the tokens; or [N, P] for every N tokens, T a multiple of N.
        offsets: int64 [B + 1], the bags. They change no number in exact arithmetic; with them a
            bag gives the same bits in any batch.
        statistics: μ and 1/√(σ² + ε) of these very rows, [T] each, float32 (float64 for float64
            tokens), where they are known; None means that they are computed.
        eps: ε.
        backend: "auto", "triton", "compile" (without statistics; with them "eager") or "eager".

    Returns:
        [S, T, O], or [T, O] for one set, in the dtype of `weight`. Differentiable once, in reverse
        mode, in `x`, `positions`, `weight` and `bias`.

    Raises:
        ValueError: shapes, dtypes, devices or offsets that do not fit.
        TypeError: something that is not a tensor.

    Example:
        >>> x, weight = torch.randn(70, 32), torch.randn(2, 64, 32)
        >>> motet.kernels.context_kv(x, weight).shape
        torch.Size([2, 70, 64])
    """
    x = x.flatten(0, 1) if isinstance(x, Tensor) and x.ndim == 3 else x
    check_rows(x, positions, offsets)
    if statistics is not None and len(statistics) != 2:
        raise ValueError(f"statistics: expected two tensors, got {len(statistics)}")
    mean, rstd = statistics or (None, None)
    given = {"statistics[0]": mean, "statistics[1]": rstd}
    for name, part in {"weight": weight, "bias": bias, **given}.items():
        if not isinstance(part, Tensor) and (name == "weight" or part is not None):
            raise TypeError(f"{name}: expected a tensor, got {type(part).__name__}")
    one = weight.ndim == 2
    if one:
        weight, bias = weight[None], None if bias is None else bias[None]
    width = x.shape[1] + (0 if positions is None else positions.shape[1])
    if weight.ndim != 3 or weight.shape[2] != width:
        raise ValueError(f"weight: expected [S, O, {width}], got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"bias: expected {tuple(weight.shape[:2])}, got {tuple(bias.shape)}")
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and (
            (part.device, part.dtype) != (x.device, weight.dtype) or not part.is_floating_point()
        ):
            raise ValueError(
                f"{name}: expected {weight.dtype} on {x.device} as x, got {part.dtype} on "
                f"{part.device}"
            )
    if (x.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(f"weight: expected a dtype that goes with {x.dtype}, got {weight.dtype}")
    for name, part in given.items():
        expected = (x.shape[:1], wide(x.dtype), x.device)
        if part is not None and (part.shape, part.dtype, part.device) != expected:
            raise ValueError(
                f"{name}: expected {expected[1]} [{len(x)}] on {x.device}, got {part.dtype} "
                f"{tuple(part.shape)} on {part.device}"
            )
    check_backend(backend)
    refuse_forward_mode("context_kv")
    if backend == "compile" and statistics is None:
        y = compiled(context_kv_reference)(x, weight, bias, positions=positions, eps=eps)
    else:
        y, _, _ = torch.ops.motet.context_kv(
            x, positions, weight, bias, offsets, mean, rstd, eps, backend
        )
    return y[0] if one else y


def context_kv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Compute context_kv in torch, literally; weight [S, O, D + P]."""
    z = x
    if positions is not None:
        shared = positions.repeat(len(x) // len(positions), 1) if len(x) else positions[:0]
        z = torch.cat([x, shared.to(x.dtype)], dim=1)
    z = torch.nn.functional.layer_norm(z.to(wide(x.dtype)), z.shape[1:], eps=eps)
    y = z.to(weight.dtype) @ weight.transpose(1, 2)
    return y if bias is None else y + bias[:, None]


def check_rows(x: Tensor, positions: Tensor | None, offsets: Tensor | None) -> None:
    """Raise unless tokens, positions and offsets fit together."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.ndim != 2 or x.shape[1] == 0 or x.dtype not in DTYPES:
        raise ValueError(
            f"x: expected floating-point [T, D] with D > 0, 16 to 64 bits, got {x.dtype} "
            f"{tuple(x.shape)}"
        )
    if positions is not None:
        if not isinstance(positions, Tensor):
            raise TypeError(f"positions: expected a tensor, got {type(positions).__name__}")
        if not positions.is_floating_point():
            raise ValueError(f"positions: expected floating-point numbers, got {positions.dtype}")
        rows = positions.shape[0] if positions.ndim == 2 else -1
        if rows < 0 or (len(x) and (rows == 0 or len(x) % rows)):
            raise ValueError(
                f"positions: expected [N, P] with {len(x)} tokens a multiple of N, got "
                f"{tuple(positions.shape)}"
            )
        if positions.device != x.device:
            raise ValueError(f"positions: expected {x.device} as x, got {positions.device}")
    if offsets is not None:
        check_offsets(offsets, len(x), x.device)


def bounds_of(offsets: Tensor | None, tokens: int) -> list[int]:
    return [0, tokens] if offsets is None else offsets.tolist()


def chunks(bounds: Sequence[int], width: int) -> Iterator[tuple[int, int, int]]:
    """Yield (bag, start, stop) of chunks of rows, counted from the start of each bag.

    So that the products of a bag have the same shapes, and the same bits, in any batch.
    """
    rows = chunk_rows(width)
    for bag, (first, last) in enumerate(pairwise(bounds)):
        for start in range(first, last, rows):
            yield bag, start, min(start + rows, last)


def chunk_rows(width: int) -> int:
    return max(64, CHUNK_ELEMENTS // max(width, 1) // 64 * 64)


class Standardiser:
    """Normalises rows of [x | p], a chunk at a time, on their way into a product in `dtype`."""

    def __init__(self, x: Tensor, positions: Tensor | None, eps: float, dtype: torch.dtype) -> None:
        self.x, self.eps, self.dtype, self.full = x, eps, dtype, wide(x.dtype)
        self.positions = None if positions is None else positions.detach().to(self.full)
        self.width = x.shape[1] + (0 if positions is None else positions.shape[1])
        self.module = native() if x.device.type == "cpu" and x.stride(1) == 1 else None
        if self.module is not None:
            if self.positions is not None:
                self.positions = self.positions.contiguous()
            low = dtype if dtype == torch.bfloat16 else self.full
            rows = min(chunk_rows(self.width), len(x))
            self.room = x.new_empty(rows, self.width, dtype=low)

    def __call__(
        self, rows: slice, statistics: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised rows, valid until the next call, their means and 1 / SDs."""
        x, positions = self.x[rows], self.positions
        if statistics is None and self.module is not None:
            z = self.room[: len(x)]
            mean, rstd = (x.new_empty(len(x), dtype=self.full) for _ in range(2))
            period = 1 if positions is None else len(positions)
            self.module.standardise(
                _buffer(x), str(x.dtype)[6:], None if positions is None else _buffer(positions),
                rows.start % period, self.eps, _buffer(z), str(z.dtype)[6:], _buffer(mean),
                _buffer(rstd), torch.get_num_threads(),
            )  # fmt: skip
            return z.to(self.dtype), mean, rstd
        z = x.to(self.full)
        if positions is not None:
            z = torch.cat([z, positions_of(positions, rows, len(self.x))], dim=1)
        if statistics is None:
            z, mean, rstd = torch.native_layer_norm(z, z.shape[1:], None, None, self.eps)
            return z.to(self.dtype), mean.flatten(), rstd.flatten()
        mean, rstd = statistics[0][rows], statistics[1][rows]
        return (z - mean[:, None]).mul_(rstd[:, None]).to(self.dtype), mean, rstd


def _buffer(x: Tensor) -> NDArray[Any]:
    """Return a view for the C++ module; half precision as integers, which have a format."""
    return (x.detach() if x.itemsize > 2 else x.detach().view(torch.int16)).numpy()


def positions_of(positions: Tensor, rows: slice, tokens: int) -> Tensor:
    """Return the positions of some rows, given those of all tokens or of every N."""
    if len(positions) == tokens:
        return positions[rows]
    first, last = rows.start // len(positions), (rows.stop - 1) // len(positions)
    if first == last:
        return positions[rows.start - first * len(positions) : rows.stop - first * len(positions)]
    return positions[torch.arange(rows.start, rows.stop, device=positions.device) % len(positions)]


def standardise_backward(grad: Tensor, z: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient of raw rows, given that of the normalised rows z [n, W]."""
    grad = grad - grad.mean(1, keepdim=True) - z * (grad * z).mean(1, keepdim=True)
    return grad * rstd[:, None]


def split_gradient(grad: Tensor, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and positions, given that of their rows [T, W]."""
    dx = grad[:, : x.shape[1]].to(x.dtype).contiguous()
    if positions is None:
        return dx, x.new_empty(0)
    periods = len(x) // len(positions) if len(positions) else 0
    own = grad[:, x.shape[1] :].reshape(periods, *positions.shape)
    return dx, own.sum(0).to(positions.dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of what is summed up over tensors of `dtype`: statistics, softmax."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward(
    x: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    fast = triton_kernels("context_kv", backend, weight)
    if fast is not None:
        y, *found = fast.project(
            rows_apart(x),
            None if positions is None else rows_apart(positions),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            None, mean, rstd, eps,
        )  # fmt: skip
        return y, *(part.clone() if mean is not None else part for part in found)
    statistics = None if mean is None or rstd is None else (mean, rstd)
    sets, outputs, width = weight.shape
    y = weight.new_empty(sets, len(x), outputs)
    means, rstds = (x.new_empty(len(x), dtype=wide(x.dtype)) for _ in range(2))
    standardised = Standardiser(x, positions, eps, weight.dtype)
    for _, start, stop in chunks(bounds_of(offsets, len(x)), width):
        rows = slice(start, stop)
        z, means[rows], rstds[rows] = standardised(rows, statistics)
        for s in range(sets):
            if bias is None:
                torch.mm(z, weight[s].t(), out=y[s, rows])
            else:
                torch.addmm(bias[s], z, weight[s].t(), out=y[s, rows])
    return y, means, rstds


def _backward_rows(
    grad: Tensor,
    x: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    offsets: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    given: bool,
    eps: float,
    backend: str,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, positions, weight and bias; empty where not `needed`.

    `needed` speaks of x or positions, of the weight, and of the bias.
    """
    tokens, weights, biases = needed
    full = wide(x.dtype)
    dbias = grad.sum(1, dtype=full).to(weight.dtype) if biases else x.new_empty(0)
    fast = triton_kernels("context_kv", backend, weight)
    if fast is not None and weights:
        places = None if positions is None else rows_apart(positions)
        dweight = fast.pool(grad, rows_apart(x), places, mean, rstd, None).to(weight.dtype)
        weights = False
    else:
        dweight = weight.new_zeros(weight.shape if weights else 0, dtype=full)
    drows = x.new_empty((len(x), weight.shape[2]) if tokens else 0, dtype=full)
    # Only the gradients of tokens are a bag's own.
    bounds = bounds_of(offsets if tokens else None, len(x)) if weights or tokens else []
    standardised = Standardiser(x, positions, eps, weight.dtype)
    for _, start, stop in chunks(bounds, weight.shape[2]):
        rows = slice(start, stop)
        # Computed again in the very bits of the forward pass, in one sweep.
        z, _, own = standardised(rows, (mean, rstd) if given else None)
        if weights:
            for s in range(len(weight)):
                if full == weight.dtype:
                    dweight[s].addmm_(grad[s, rows].t(), z)
                else:
                    dweight[s] += grad[s, rows].t() @ z
        if tokens:
            dz = torch.zeros_like(z, dtype=full)
            for s in range(len(weight)):
                dz += grad[s, rows] @ weight[s]
            drows[rows] = standardise_backward(dz, z.to(full), own)
    if not tokens:
        return x.new_empty(0), x.new_empty(0), dweight.to(weight.dtype), dbias
    return *split_gradient(drows, x, positions), dweight.to(weight.dtype), dbias


def _setup_context(ctx, inputs, output) -> None:
    x, positions, weight, _, offsets, given, _, ctx.eps, ctx.backend = inputs
    ctx.given = given is not None
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, positions, weight, offsets, mean, rstd)


def _backward(ctx, grad: Tensor, *_: Tensor):
    x, positions, weight, offsets, mean, rstd = ctx.saved_tensors
    of_x, of_positions, of_weight, of_bias = ctx.needs_input_grad[:4]
    dx, dpositions, dweight, dbias = torch.ops.motet.context_kv_backward(
        grad.contiguous(), x, positions, weight, offsets, mean, rstd, ctx.given, ctx.eps,
        ctx.backend, [of_x or of_positions, of_weight, of_bias],
    )  # fmt: skip
    return (
        dx if of_x else None,
        dpositions if of_positions else None,
        dweight if of_weight else None,
        dbias if of_bias else None,
        *[None] * 5,
    )


def _fake(x, positions, weight, bias, offsets, mean, rstd, eps, backend):
    y = weight.new_empty(weight.shape[0], x.shape[0], weight.shape[1])
    return y, *(x.new_empty(x.shape[0], dtype=wide(x.dtype)) for _ in range(2))


def _fake_backward(grad, x, positions, weight, offsets, mean, rstd, given, eps, backend, needed):
    tokens, weights, biases = needed
    return (
        x.new_empty(x.shape if tokens else 0),
        positions.new_empty(positions.shape)
        if tokens and positions is not None
        else x.new_empty(0),
        weight.new_empty(weight.shape if weights else 0),
        weight.new_empty(weight.shape[:2]) if biases else x.new_empty(0),
    )


_LIBRARY.impl("context_kv", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("context_kv_backward", _backward_rows, "CompositeExplicitAutograd")
torch.library.register_fake("motet::context_kv", _fake, lib=_LIBRARY)
torch.library.register_fake("motet::context_kv_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "motet::context_kv", _backward, setup_context=_setup_context, lib=_LIBRARY
)
refuse_second_derivative(_LIBRARY, "context_kv")
