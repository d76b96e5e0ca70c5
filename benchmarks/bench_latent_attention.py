"""The operators alone: attention on cached K and V, and the projection that makes them.

    make bench    the small sizes, by pytest-benchmark
    python benchmarks/bench_latent_attention.py [--device cuda] [--dtype bf16] [--json FILE]

All libraries that compute the same function run in turns, on the same tensors, each with its error
against float64. For a library that cannot run, the reason is listed. K and V have the layout in
which the projection writes them, [T, 2, H, E]: if a library needs padded bags, its time includes
the padding.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from motet.cli import bench, measure
from motet.kernels import context_kv
from motet.kernels.context_kv.reference import context_kv_reference
from motet.kernels.latent_attention.operator import latent_attention_kv
from motet.kernels.latent_attention.reference import latent_attention_reference
from torch import Tensor

Attend = Callable[["Inputs", float], Tensor]
Project = Callable[["Projection"], Tensor]


class Inputs(NamedTuple):
    """Queries, keys and values of bags, of one length or ragged."""

    q: Tensor
    """[B, H, C, E]."""
    kv: Tensor
    """[T, 2, H, E]."""
    offsets: Tensor
    lengths: tuple[int, ...]
    scale: float

    @property
    def dense(self) -> bool:
        return len(set(self.lengths)) == 1

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Return a copy in another dtype, as leaves that require gradients."""
        q, kv = (x.detach().to(dtype).requires_grad_() for x in (self.q, self.kv))
        return self._replace(q=q, kv=kv)

    def padded(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return K and V as [B, H, N, E], and the mask of real keys, [B, 1, 1, N].

        The mask is None if all keys are real.
        """
        if self.dense:
            kv, real = self.kv.unflatten(0, (len(self.lengths), -1)), None
        else:
            kv = torch.nn.utils.rnn.pad_sequence(
                list(self.kv.split(list(self.lengths))), batch_first=True
            )
            real = torch.arange(kv.shape[1], device=kv.device) < self.offsets.diff()[:, None]
            real = real[:, None, None]
        k, v = kv.unbind(2)
        return k.transpose(1, 2), v.transpose(1, 2), real


def motet(inputs: Inputs, dropout_p: float) -> Tensor:
    return latent_attention_kv(
        inputs.q, inputs.kv, inputs.offsets, scale=inputs.scale, dropout_p=dropout_p
    )[0]


def reference(inputs: Inputs, dropout_p: float) -> Tensor:
    if inputs.dense:
        (k, v, _), offsets = inputs.padded(), None
    else:
        (k, v), offsets = inputs.kv.unbind(1), inputs.offsets
    return latent_attention_reference(
        inputs.q, k, v, offsets, scale=inputs.scale, dropout_p=dropout_p
    )


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def compiled_reference(inputs: Inputs, dropout_p: float) -> Tensor:
    return compiled(reference)(inputs, dropout_p)


def sdpa(inputs: Inputs, dropout_p: float) -> Tensor:
    k, v, real = inputs.padded()
    return F.scaled_dot_product_attention(
        inputs.q, k, v, attn_mask=real, dropout_p=dropout_p, scale=inputs.scale
    )


def flex(inputs: Inputs, dropout_p: float) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _without_dropout("FlexAttention", dropout_p)
    k, v, real = inputs.padded()
    mask = None
    if real is not None:
        lengths = inputs.offsets.diff()

        def is_real(b, h, q_index, k_index):
            return k_index < lengths[b]

        mask = create_block_mask(
            is_real, len(lengths), None, inputs.q.shape[2], k.shape[2], device=k.device
        )
    return compiled(flex_attention)(inputs.q, k, v, block_mask=mask, scale=inputs.scale)


def varlen(inputs: Inputs, dropout_p: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    _without_dropout("varlen_attn", dropout_p)
    return _call_packed(partial(varlen_attn, scale=inputs.scale), inputs)


def flash(inputs: Inputs, dropout_p: float) -> Tensor:
    function = importlib.import_module("flash_attn").flash_attn_varlen_func
    options = {"dropout_p": dropout_p, "softmax_scale": inputs.scale}
    return _call_packed(partial(function, **options), inputs)


def _call_packed(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    """Call a function of packed queries and keys, and the offsets of both."""
    bags, _, latents, _ = inputs.q.shape
    packed = inputs.q.transpose(1, 2).flatten(0, 1)
    queries = latents * torch.arange(bags + 1, device=packed.device, dtype=torch.int32)
    k, v = inputs.kv.unbind(1)
    out = function(packed, k, v, queries, inputs.offsets.int(), latents, max(inputs.lengths))
    return out.unflatten(0, (bags, latents)).transpose(1, 2)


def _without_dropout(name: str, dropout_p: float) -> None:
    if dropout_p:
        raise NotImplementedError(f"{name} has no dropout")


ATTENTIONS: dict[str, Attend] = {
    "motet": motet,
    "reference": reference,
    "reference, compiled": compiled_reference,
    "SDPA": sdpa,
    "FlexAttention": flex,
}
ON_CUDA: dict[str, Attend] = {"varlen_attn": varlen, "flash-attn": flash}


# These are compiled anew for each size, which takes up to a minute; --quick leaves them out.
COMPILED = {"reference, compiled", "FlexAttention", "the same, compiled"}


def inputs_of(config: measure.Config, lengths: Sequence[int], dtype: str, device: str) -> Inputs:
    """Draw queries, keys and values.

    On CUDA heads are padded with zeros to a multiple of 16, as HEALNet's are there. Other libraries
    need this too.
    """
    torch.manual_seed(0)
    options = {"dtype": measure.DTYPES[dtype], "device": device}
    q = torch.randn(len(lengths), config.heads, config.latents, config.head_dim, **options)
    kv = torch.randn(sum(lengths), 2, config.heads, config.head_dim, **options)
    padding = -config.head_dim % 16 if device == "cuda" else 0
    q, kv = (F.pad(x, (0, padding)).requires_grad_() for x in (q, kv))
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    return Inputs(q, kv, offsets, tuple(lengths), config.head_dim**-0.5)


def attend(
    function: Attend, inputs: Inputs, grad: Tensor, *, backward: bool, dropout_p: float = 0.0
) -> list[Tensor]:
    """Return the output, or the gradients of queries, keys and values."""
    if not backward:  # detached: FlexAttention ignores no_grad and looks at requires_grad alone
        return [function(inputs._replace(q=inputs.q.detach(), kv=inputs.kv.detach()), dropout_p)]
    out = function(inputs, dropout_p)
    return list(torch.autograd.grad(out, (inputs.q, inputs.kv), grad.to(out.dtype)))


class Projection(NamedTuple):
    """The tokens, weights and shifts from which K and V are computed."""

    x: Tensor
    """[T, D]."""
    weight: Tensor
    """[O, D], the weights of K and V."""
    bias: Tensor

    def to(self, dtype: torch.dtype) -> "Projection":
        """Return a copy in another dtype, whose parameters require gradients."""
        parameters = (x.detach().to(dtype).requires_grad_() for x in (self.weight, self.bias))
        return Projection(self.x.to(dtype), *parameters)


def project(inputs: Projection) -> Tensor:
    return context_kv(inputs.x, inputs.weight, inputs.bias)


def project_reference(inputs: Projection) -> Tensor:
    return context_kv_reference(inputs.x, inputs.weight[None], inputs.bias[None])[0]


def project_torch(inputs: Projection) -> Tensor:
    normed = F.layer_norm(inputs.x, inputs.x.shape[1:])
    return F.linear(normed, inputs.weight, inputs.bias)


def project_compiled(inputs: Projection) -> Tensor:
    return compiled(project_torch)(inputs)


PROJECTIONS: dict[str, Project] = {
    "motet": project,
    "layer_norm + linear": project_torch,
    "the same, compiled": project_compiled,
}


def projection_of(
    config: measure.Config, tokens: int, width: int, dtype: str, device: str
) -> Projection:
    """Draw tokens, weights and shifts."""
    torch.manual_seed(0)
    options = {"dtype": measure.DTYPES[dtype], "device": device}
    outputs = 2 * config.heads * config.head_dim
    x = torch.randn(tokens, width, **options)
    weight = torch.randn(outputs, width, device=device).div_(width**0.5).to(options["dtype"])
    bias = torch.randn(outputs, **options, requires_grad=True)
    return Projection(x, weight.requires_grad_(), bias)


def project_with(
    function: Project, inputs: Projection, grad: Tensor, *, backward: bool
) -> list[Tensor]:
    """Return keys and values, or the gradients of weights and shifts."""
    with torch.set_grad_enabled(backward):
        out = function(inputs)
    if not backward:
        return [out]
    return list(torch.autograd.grad(out, (inputs.weight, inputs.bias), grad.to(out.dtype)))


SMALL = (700, 700)
SMALL_RAGGED = (1, 300, 900)


def pytest_generate_tests(metafunc) -> None:
    """Parametrise the quick benchmarks."""
    metafunc.parametrize("backward", [False, True], ids=["forward", "both"])
    if "lengths" in metafunc.fixturenames:
        metafunc.parametrize("contender", ["motet", "reference", "SDPA"])
        metafunc.parametrize("lengths", [SMALL, SMALL_RAGGED], ids=bench.shape_name)
    else:
        metafunc.parametrize("contender", ["motet", "layer_norm + linear"])


def bench_latent_attention(
    benchmark, contender: str, lengths: Sequence[int], backward: bool
) -> None:
    inputs = inputs_of(measure.CONFIGS["blca"], lengths, "fp32", "cpu")
    grad = torch.randn_like(inputs.q)
    exact = attend(reference, inputs.to(torch.float64), grad, backward=backward)
    run = partial(attend, ATTENTIONS[contender], inputs, grad, backward=backward)
    benchmark.group = f"{bench.shape_name(lengths)} {'both' if backward else 'forward'}"
    benchmark.extra_info["error"] = error = measure.relative_error(run(), exact)
    assert error < measure.FLOOR["fp32"]
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


def bench_context_kv(benchmark, contender: str, backward: bool) -> None:
    inputs = projection_of(measure.CONFIGS["blca"], 1400, 512, "fp32", "cpu")
    grad = torch.randn(1400, len(inputs.weight))
    exact = project_with(project_reference, inputs.to(torch.float64), grad, backward=backward)
    run = partial(project_with, PROJECTIONS[contender], inputs, grad, backward=backward)
    benchmark.group = f"context_kv {'both' if backward else 'forward'}"
    benchmark.extra_info["error"] = error = measure.relative_error(run(), exact)
    assert error < measure.FLOOR["fp32"]
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


def measure_cell(
    name: str,
    contenders: dict[str, Callable[[], list[Tensor]]],
    errors: dict[str, float | str],
    device: str,
    dtype: str,
    rounds: int,
) -> dict[str, Any]:
    """Time the contenders whose error is within bounds; print and return the row.

    Args:
        name: of the row.
        contenders: functions to time, by name; motet first.
        errors: of each contender, or the reason why it has none.
        device: "cpu" or "cuda".
        dtype: "fp32" or "bf16".
        rounds: at most so many.
    """
    first = errors[next(iter(contenders))]
    # The bound follows the reference's error, or if the reference did not run, motet's.
    numbers = [error for error in (errors.get("reference"), first) if isinstance(error, float)]
    allowed = 2 * numbers[0] + measure.FLOOR[dtype] if numbers else 0.0
    correct, failed = {}, {}
    for contender, run in contenders.items():
        error = errors[contender]
        if isinstance(error, str):
            failed[contender] = error
        elif not error <= allowed:
            failed[contender] = f"error {error:.1e} is out of bounds"
        else:
            reason, _ = try_run(run)  # errors are without dropout, which a library may lack
            (failed if reason else correct)[contender] = reason or run
    times = measure.in_turns(correct, device, rounds=rounds) if correct else {}
    print(f"\n{name}")
    ours = times.get("motet")
    for contender in contenders:
        if contender in failed:
            print(f"  {contender:20} {failed[contender]}")
        else:
            timing, error = times[contender], errors[contender]
            ratio = timing.median / ours.median if ours else float("nan")
            print(f"  {contender:20} {timing!s:28} {ratio:6.2f}  error {error:.0e}")
    sys.stdout.flush()
    ms = {contender: timing._asdict() for contender, timing in times.items()}
    return {"name": name, "ms": ms, "error": errors, "failed": failed}


def try_run(run: Callable[[], list[Tensor]]) -> tuple[str, list[Tensor]]:
    """Return "" and the results, or the reason why a function does not run, in one line."""
    try:
        return "", run()
    except Exception as error:  # compilers and other libraries raise exceptions of every type
        lines = f"{type(error).__name__}: {error}".splitlines()
        return lines[0][:160], []


def error_of(run: Callable[[], list[Tensor]], exact: list[Tensor]) -> float | str:
    """Return the error of a function's results, or the reason why it does not run."""
    reason, results = try_run(run)
    return reason or measure.relative_error(results, exact)


def attention_rows(
    size: str, inputs: Inputs, dtype: str, functions: dict[str, Attend], rounds: int
) -> list[dict[str, Any]]:
    """Measure all attentions: forward, forward and backward; without and with dropout."""
    grad = torch.randn_like(inputs.q)
    rows, device = [], inputs.q.device.type
    for backward in (False, True):
        exact = attend(reference, inputs.to(torch.float64), grad, backward=backward)
        errors = {
            name: error_of(partial(attend, function, inputs, grad, backward=backward), exact)
            for name, function in functions.items()
        }
        for dropout_p in (0.0, 0.1):
            runs: dict[str, Callable[[], list[Tensor]]] = {
                name: partial(
                    attend, function, inputs, grad, backward=backward, dropout_p=dropout_p
                )
                for name, function in functions.items()
            }
            passes = "forward + backward" if backward else "forward"
            # The error is that without dropout: contenders drop different weights.
            title = f"attention {size} {dtype} {passes}, dropout {dropout_p:g}"
            rows.append(measure_cell(title, runs, errors, device, dtype, rounds))
    return rows


def projection_rows(
    size: str, inputs: Projection, dtype: str, functions: dict[str, Project], rounds: int
) -> list[dict[str, Any]]:
    """Measure all projections: forward, forward and backward."""
    device = inputs.x.device.type
    grad = torch.randn(len(inputs.x), len(inputs.weight), device=device, dtype=inputs.weight.dtype)
    rows = []
    for backward in (False, True):
        wide = inputs.to(torch.float64)
        exact = project_with(project_reference, wide, grad, backward=backward)
        runs: dict[str, Callable[[], list[Tensor]]] = {
            name: partial(project_with, function, inputs, grad, backward=backward)
            for name, function in functions.items()
        }
        errors = {name: error_of(run, exact) for name, run in runs.items()}
        reason, results = try_run(partial(project_with, project_reference, inputs, grad,
                                          backward=backward))  # fmt: skip
        if not reason:
            errors["reference"] = measure.relative_error(results, exact)
        passes = "forward + backward" if backward else "forward"
        title = f"context_kv {size} {dtype} {passes}"
        rows.append(measure_cell(title, runs, errors, device, dtype, rounds))
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="(default: cuda if torch finds a GPU)"
    )
    parser.add_argument("--dtype", choices=tuple(measure.DTYPES), help="(default: both)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch")
    parser.add_argument(
        "--rounds", type=int, default=15, metavar="N",
        help="times that each contender runs, at most (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--config", choices=tuple(measure.CONFIGS), help="one model's sizes (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="sizes that only show that it works")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results to this file too"
    )
    return parser.parse_args()


def main() -> int:
    """Measure every operator, configuration and dtype; return the exit code."""
    options = _options()
    try:
        device = measure.choose_device(options.device, options.threads)
        measure.check_folder("--json", options.json)
    except ValueError as error:
        print(f"bench_latent_attention: {error}", file=sys.stderr)
        return 2
    facts = measure.about(device)
    print(json.dumps(facts))
    print("ms: median (quartiles), in turns; multiple of motet's median; error against float64")
    rows, width = [], 64 if options.quick else 2048
    torch._dynamo.config.recompile_limit = 64  # every size is compiled separately
    attentions = ATTENTIONS | (ON_CUDA if device == "cuda" else {})
    projections = dict(PROJECTIONS)
    for name in COMPILED if options.quick else ():
        attentions.pop(name, None)
        projections.pop(name, None)
    for cell in bench.cells(device, quick=options.quick)[::2]:  # each batch once, not twice
        if options.config not in (None, cell.name.split()[0]):
            continue
        size = cell.name.removesuffix(" forward")
        for dtype in measure.DTYPES if options.dtype is None else (options.dtype,):
            inputs = inputs_of(cell.config, cell.lengths, dtype, device)
            rows += attention_rows(size, inputs, dtype, attentions, options.rounds)
            tokens = sum(cell.lengths)
            projection = projection_of(cell.config, tokens, width, dtype, device)
            rows += projection_rows(size, projection, dtype, projections, options.rounds)
    if options.json is not None:
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
