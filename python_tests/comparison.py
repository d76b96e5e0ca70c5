"""How close is close enough: the error of a function against float64, beside its reference's.

For the tests, and for the checks on a GPU (benchmarks/checks.py), where neither pytest nor
hypothesis need be installed.
"""

import operator
from collections.abc import Callable, Iterator, Sequence

import torch
from motet import _error_floors
from torch import Tensor

# Absolute error that a comparison may always have, by the dtype that was worked in.
FLOOR = {getattr(torch, name): floor for name, floor in _error_floors.ELEMENT.items()}
WIDE = {torch.complex64: torch.complex128} | dict.fromkeys(
    (torch.float32, torch.float16, torch.bfloat16), torch.float64
)
# What two float64 computations of the same numbers may differ by.
EXACT = {"rtol": 1e-11, "atol": 1e-11}
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def results_of(function: Function, *args: Tensor) -> tuple[Tensor, ...]:
    results = function(*args)
    return (results,) if isinstance(results, Tensor) else results


def with_gradients(function: Function) -> Function:
    """Return a function that adds to the results their gradients in all its arguments.

    What is differentiated is a fixed random sum of the results, the same in every dtype.
    """

    def both(*args: Tensor) -> tuple[Tensor, ...]:
        args = tuple(a.detach().requires_grad_() for a in args)
        results = results_of(function, *args)
        generator = torch.Generator().manual_seed(0)
        sums = [torch.randn(r.shape, generator=generator).bfloat16().to(r) for r in results]
        moving = [(r, s) for r, s in zip(results, sums, strict=True) if r.requires_grad]
        gradients = [torch.zeros_like(a) for a in args]
        if moving:
            outputs, weights = zip(*moving, strict=True)
            gradients = torch.autograd.grad(
                outputs, args, weights, allow_unused=True, materialize_grads=True
            )
        return (*(r.detach() for r in results), *gradients)

    return both


# How many runs of the reference in the working dtype an error is compared with, at most.
REFERENCES = 16


def neighbours(args: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the arguments, then arguments whose numbers lie up to a unit of the last place off.

    Zeros stay zero, and float64 stays as it is.
    """
    yield tuple(args)
    generator = torch.Generator().manual_seed(0)
    for _ in range(REFERENCES - 1 if any(a.dtype in WIDE for a in args) else 0):
        steps = [torch.randint(-1, 2, a.shape, generator=generator).to(a.device) for a in args]
        yield tuple(
            a + a * (step * torch.finfo(a.dtype).eps).to(a.dtype) if a.dtype in WIDE else a
            for a, step in zip(args, steps, strict=True)
        )


# Of a tensor: its largest number, the root mean square of its numbers, its norm.
SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: x.abs().max(),
    "rms": lambda x: x.abs().square().mean().sqrt(),
    "norm": torch.linalg.vector_norm,
}


def errors(
    fast: Function,
    reference: Function,
    *args: Tensor,
    size: str = "max",
    floor: Callable[[torch.dtype, float], float],
) -> list[tuple[float, float]]:
    """Return, result by result, the error of `fast` and what it may be.

    That is 2 max err(reference in the working dtype) + floor, all against the reference in float64.

    To first order the error of a chain of roundings is sum_k J_k d_k, with J_k the derivative of
    the result by what was rounded in step k and |d_k| <= u: its size is that of J, which the fast
    form shares, but one run is one draw of the signs of d, and may come out near zero. So the
    reference is run at n = REFERENCES inputs, these and others a rounding away, where J is the same
    and d another, each against float64 at its own input. Were the fast form's error drawn as those
    of the reference are, it would pass twice the largest of n with a probability of 0.13 % for
    n = 16 (30 % for n = 1) in the worst case, a result that is one number with a normal error; of
    four numbers it is 5e-6. Further runs are made only while an error is above the bound of those
    before, which changes no verdict.

    Args:
        size: what an error is measured by, a key of SIZES.
        floor: returns the floor of a result from its dtype and its size.
    """

    def sized(x: Tensor) -> float:
        return SIZES[size](x).item() if x.numel() else 0.0

    def widened(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return results_of(reference, *(a.to(WIDE.get(a.dtype, a.dtype)) for a in tensors))

    results, exact_results = results_of(fast, *args), widened(args)
    floors, errors_of_fast = [], []
    for result, exact in zip(results, exact_results, strict=True):
        assert result.shape == exact.shape
        floors.append(
            floor(result.real.dtype if result.is_complex() else result.dtype, sized(exact))
        )
        errors_of_fast.append(sized(result - exact))
    worst, allowed = [0.0] * len(results), floors
    for n, near in enumerate(neighbours(args)):
        theirs, wide = results_of(reference, *near), widened(near) if n else exact_results
        errors_of_reference = [sized(a - b) for a, b in zip(theirs, wide, strict=True)]
        worst = list(map(max, worst, errors_of_reference))
        allowed = [2 * w + least for w, least in zip(worst, floors, strict=True)]
        if all(map(operator.le, errors_of_fast, allowed)):
            break
    return list(zip(errors_of_fast, allowed, strict=True))


def assert_as_good_as(
    fast: Function,
    reference: Function,
    *args: Tensor,
    worked_in: torch.dtype | None = None,
    rms: bool = False,
) -> None:
    """Check that no result of `fast` has an error that is not allowed; see `errors`.

    Args:
        worked_in: the dtype that sets the floor, where autocast makes it another than the result's.
        rms: compare root mean squares instead of maxima. Over a chain of many roundings, as in a
            model, which of two computations has the largest single error is a matter of luck.
    """

    def floor(dtype: torch.dtype, size: float) -> float:
        return FLOOR[worked_in or dtype] * max(1, size)

    pairs = errors(fast, reference, *args, size="rms" if rms else "max", floor=floor)
    failed = [
        f"result {i}: error {error:.2e}, allowed {allowed:.2e}"
        for i, (error, allowed) in enumerate(pairs)
        if not error <= allowed
    ]
    assert not failed, "; ".join(failed)
