"""What `make gpu-check` checks: operators, and by model_checks.py models, against float64.

An operator may err by twice what its literal reference errs in the same dtype, and the floor below:
the tests' rule (python_tests/comparison.py), with errors as norms.
"""

import copy
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from benchmarks.model_checks import Check, full_length_checks, model_checks
from motet import _error_floors
from motet.cli import measure
from motet.fusion.capture import CudaCapture
from motet.io.encoders.torch_encoder import Setup, TorchEncoder, Transform
from motet.kernels import (
    absorbed_attention,
    attention_weights,
    context_kv,
    harmonic_merge,
    latent_attention,
    slerp,
)
from motet.kernels.absorbed_attention.heads import absorbed_heads
from motet.kernels.absorbed_attention.reference import absorbed_attention_reference
from motet.kernels.context_kv.reference import context_kv_reference
from motet.kernels.harmonic_merge.reference import harmonic_merge_reference
from motet.kernels.latent_attention.reference import latent_attention_reference
from motet.kernels.lego_pass.operator import lego_pass
from motet.kernels.lego_pass.weights import QueryWeights, UpdateWeights
from torch import Tensor

from python_tests.comparison import Function, errors, results_of, with_gradients

# Of norms, relative.
FLOOR = {getattr(torch, name): floor for name, floor in _error_floors.OPERATOR.items()}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
RAGGED = (300, 0, 1, 530)
SHORT = (64, 0, 1, 40)
DROPOUT = 0.25


def run_all(device: str, processes: int = 1) -> Iterator[dict[str, Any]]:
    """Run every check; one that raises has failed, and the others still run.

    What compiles kernels is divided among so many processes, which share the GPU: they wait for
    Triton's compiler, not for it. What needs the GPU's memory comes after, one by one.
    """
    checks = list(_all(device))
    if processes > 1:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.checks"])
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            waiting = {pool.submit(_row, name, check): name for name, check in checks}
            for done in as_completed(waiting):
                died = done.exception()  # a process that is gone takes its checks with it
                failed = {"name": waiting[done], "passed": False, "reason": str(died)}
                yield _print_row(failed if died else done.result())
    else:
        yield from (_print_row(_row(name, check)) for name, check in checks)
    yield from (_print_row(_row(name, check)) for name, check in full_length_checks(device))


def _row(name: str, check: Check) -> dict[str, Any]:
    torch.manual_seed(0)
    started = time.perf_counter()
    try:
        error, allowed = check()
        row = {"name": name, "error": error, "allowed": allowed, "passed": error <= allowed}
    except Exception as problem:  # compilers raise anything
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
        row = {"name": name, "passed": False, "reason": reason}
    return row | {"seconds": round(time.perf_counter() - started, 2)}


def _print_row(row: dict[str, Any]) -> dict[str, Any]:
    outcome = row.get("reason") or f"error {row['error']:.1e}, allowed {row['allowed']:.1e}"
    print(f"{'ok' if row['passed'] else 'FAILED':6} {row['name']:58} {outcome}", flush=True)
    return row


def _all(device: str) -> Iterator[tuple[str, Check]]:
    yield from model_checks(device)
    backends = ("eager", "triton") if device == "cuda" else ("eager",)
    for backend in backends:
        for dtype in NAMES:
            on = (device, backend, dtype)
            title = f"{backend} {NAMES[dtype]}"
            yield f"context_kv {title}", partial(_projection, *on)
            yield f"context_kv far from 0 {title}", partial(_projection, *on, shift=10.0)
            yield f"latent_attention ragged {title}", partial(_attention, *on)
            yield f"latent_attention dense {title}", partial(_attention, *on, dense=True)
            yield f"latent_attention dropout {title}", partial(_dropout, *on)
            yield f"attention_weights {title}", partial(_weights, *on)
            yield f"absorbed_attention {title}", partial(_absorbed, *on)
            yield f"absorbed_heads {title}", partial(_heads_outputs, *on)
            yield f"absorbed_heads shared {title}", partial(_heads_outputs, *on, shared=True)
            yield f"a bag alone {title}, bit for bit", partial(_alone, *on)
        for shape in ((1, 17, 63), (8, 16, 103)):  # as released, and the widest heads
            check = partial(_attention, device, backend, torch.bfloat16, shape=shape)
            yield f"latent_attention {'x'.join(map(str, shape))} {backend} bf16", check
        on = (device, backend)
        yield f"absorbed_attention dropout {backend} fp32", partial(_absorbed_dropout, *on)
        for count in (2, 3):
            yield f"harmonic_merge of {count} {backend}", partial(_harmonic, *on, count)
            yield f"slerp of {count} {backend}", partial(_slerp, *on, count)
    if device == "cuda":
        for latents, dim, axes in ((17, 126, (-2, -1)), (64, 64, (-2,)), (200, 128, (-2,))):
            for dtype in NAMES:
                name = f"lego_pass {latents}x{dim} {NAMES[dtype]}"
                yield name, partial(_lego_pass, latents, dim, axes, dtype)
        yield "latent_attention in a CUDA graph", _graph
        for precision in ("fp32", "bf16", "fp16"):
            yield f"encoder of patches {precision}", partial(_encoder, device, precision)
        yield "patches on the device, bit for bit", partial(_patches_there, device)


def _compare(
    function: Function, reference: Function, tensors: Sequence[Tensor], dtype: torch.dtype
) -> tuple[float, float]:
    """Return the error of results and gradients in a dtype, and what is allowed."""
    low = [x.detach().to(dtype) for x in tensors]
    return _within(with_gradients(function), with_gradients(reference), low, FLOOR[dtype])


def _within(
    function: Function, reference: Function, tensors: Sequence[Tensor], floor: float
) -> tuple[float, float]:
    """Return the error of all results together and what is allowed, in norms of what is right."""
    norms: list[float] = []

    def together(function: Function) -> Function:
        return lambda *x: torch.cat([r.double().flatten() for r in results_of(function, *x)])

    def absolute(_: torch.dtype, norm: float) -> float:
        norms.append(norm)
        return floor * norm

    ((error, allowed),) = errors(
        together(function), together(reference), *tensors, size="norm", floor=absolute
    )
    if not math.isfinite(error):
        return math.inf, 0.0
    return error / norms[0], allowed / norms[0]


def _offsets(lengths: Sequence[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def _projection(
    device: str, backend: Any, dtype: torch.dtype, *, shift: float = 0.0
) -> tuple[float, float]:
    x = (torch.randn(1000, 200, device=device) + shift).to(dtype)
    weight = torch.randn(2, 48, 205, device=device) / 14
    bias, positions = torch.randn(2, 48, device=device), torch.randn(250, 5, device=device)

    def fast(weight: Tensor, bias: Tensor) -> Tensor:
        return context_kv(x, weight, bias, positions=positions, backend=backend)

    def literal(weight: Tensor, bias: Tensor) -> Tensor:
        wide = x.to(weight.dtype) if weight.dtype == torch.float64 else x
        return context_kv_reference(wide, weight, bias, positions=positions)

    return _compare(fast, literal, (weight, bias), dtype)


def _qkv(
    device: str, lengths: Sequence[int], shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, latents, width = shape
    q = torch.randn(len(lengths), heads, latents, width, device=device)
    k, v = torch.randn(2, sum(lengths), heads, width, device=device)
    return q, k, v, _offsets(lengths, device)


def _attention(
    device: str,
    backend: Any,
    dtype: torch.dtype,
    *,
    dense: bool = False,
    shape: tuple[int, int, int] = (8, 25, 16),
) -> tuple[float, float]:
    """Compare output and gradients; ragged ones include an empty bag and one with a single key."""
    lengths = (250, 250) if dense else RAGGED
    q, k, v, offsets = _qkv(device, lengths, shape)
    if dense:
        k, v = (x.unflatten(0, (2, 250)).transpose(1, 2) for x in (k, v))
        offsets = None

    def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return latent_attention(q, k, v, offsets, backend=backend)

    def literal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return latent_attention_reference(q, k, v, offsets)

    return _compare(fast, literal, (q, k, v), dtype)


def _dropout(device: str, backend: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Compare with the literal equation under the same mask.

    The mask does not depend on the values: values that are rows of the identity return it.
    """
    q, k, v, offsets = _qkv(device, SHORT, (8, 25, 64))
    seed = torch.tensor([2**40 + 3], device=device)
    bags = list(pairwise(offsets.tolist()))
    basis = torch.cat([torch.eye(64, device=device)[: stop - start] for start, stop in bags])
    basis = basis[:, None].expand(-1, 8, -1)

    def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return latent_attention(q, k, v, offsets, dropout_p=DROPOUT, seed=seed, backend=backend)

    with torch.no_grad():
        kept = fast(*(x.to(dtype) for x in (q / 8, k, basis))) > 0  # [B, H, C, key]
    share = torch.cat([kept[b, ..., : stop - start].flatten() for b, (start, stop) in
                       enumerate(bags)]).double().mean().item()  # fmt: skip
    if abs(share - (1 - DROPOUT)) > 0.02:  # 7 standard deviations
        raise ArithmeticError(f"kept {share:.3f} of the weights, expected {1 - DROPOUT}")

    def literal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for b, (start, stop) in enumerate(bags):
            keys, values = (x[start:stop].transpose(0, 1) for x in (k, v))
            weights = torch.softmax(q[b] @ keys.mT / 8, dim=-1)  # 8 is the root of the width
            mask = kept[b, ..., : stop - start] / (1 - DROPOUT)
            outs.append((weights * mask.to(weights.dtype)) @ values)
        return torch.stack(outs)

    return _compare(fast, literal, (q, k, v), dtype)


def _weights(device: str, backend: Any, dtype: torch.dtype) -> tuple[float, float]:
    q, k, _, offsets = _qkv(device, RAGGED, (8, 25, 16))

    def fast(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        sums = [
            torch.logsumexp(q[b].float() @ k[start:stop].float().permute(1, 2, 0) / 4, -1)
            for b, (start, stop) in enumerate(pairwise(offsets.tolist()))
        ]
        full = attention_weights(q, k, offsets, lse=torch.stack(sums), backend=backend)
        return full, attention_weights(q, k, offsets, reduce="mean", backend=backend)

    def literal(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        full = attention_weights(q, k, offsets, backend="eager")
        return full, full.mean((1, 2))

    return _within(fast, literal, (q.to(dtype), k.to(dtype)), 4 * FLOOR[dtype])


def _absorbed(device: str, backend: Any, dtype: torch.dtype) -> tuple[float, float]:
    # With one key the gradient is 0; in half precision eager torch leaves the rounding of two equal
    # terms, which is three times the reference's error and no use to look at.
    lengths = RAGGED if dtype == torch.float32 else (300, 0, 20, 530)
    queries = torch.randn(len(lengths), 136, 205, device=device) / 14
    x = torch.randn(sum(lengths), 200, device=device).to(dtype)
    positions = torch.randn(sum(lengths), 5, device=device)
    offsets = _offsets(lengths, device)

    def fast(queries: Tensor) -> tuple[Tensor, ...]:
        return absorbed_attention(queries, x, offsets, positions=positions, backend=backend)

    def literal(queries: Tensor) -> tuple[Tensor, ...]:
        wide = x.double() if queries.dtype == torch.float64 else x
        pooled, mass = absorbed_attention_reference(queries, wide, offsets, positions=positions)
        filled = (offsets.diff() > 0)[:, None].to(mass.dtype)
        return pooled, mass * filled

    return _compare(fast, literal, (queries,), dtype)


def _heads_outputs(
    device: str, backend: Any, dtype: torch.dtype, *, shared: bool = False
) -> tuple[float, float]:
    """Compare the heads' outputs with torch's; `shared`: all bags have the same queries."""
    lengths = (300, 0, 20, 530)
    q = torch.randn(1 if shared else len(lengths), 25, 2, 63, device=device).transpose(1, 2)
    weights, shifts = torch.randn(4, 63, 208, device=device) / 14, torch.randn(4, 63, device=device)
    x = torch.randn(sum(lengths), 203, device=device).to(dtype)
    positions, offsets = torch.randn(sum(lengths), 5, device=device), _offsets(lengths, device)

    def attended(backend: Any) -> Function:
        def run(q: Tensor, *folded: Tensor) -> Tensor:
            tokens = x.double() if q.dtype == torch.float64 else x
            out = absorbed_heads(
                q, *folded, tokens, offsets, positions=positions, scale=0.25, backend=backend
            )
            return out.to(q.dtype)

        return run

    return _compare(attended(backend), attended("eager"), (q, weights, shifts), dtype)


def _absorbed_dropout(device: str, backend: Any) -> tuple[float, float]:
    """Compare the gradient under dropout with a central difference, the mask being the seed's."""
    queries = torch.randn(2, 50, 200, device=device) / 14
    x, offsets = torch.randn(500, 200, device=device), _offsets((200, 300), device)
    seed = torch.tensor([11], device=device)
    factors = torch.randn(2, 50, 200, device=device)

    def value(queries: Tensor) -> Tensor:
        pooled, mass = absorbed_attention(
            queries, x, offsets, dropout_p=DROPOUT, seed=seed, backend=backend
        )
        return (pooled * factors).double().sum() + mass.double().square().sum()

    leaf = queries.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        slope = (value(queries + 0.05 * direction) - value(queries - 0.05 * direction)) / 0.1
    return abs(slope.item() / gradient.norm().item() - 1), 0.01


def _alone(device: str, backend: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Return by how much a bag's results depend on the other bags: by nothing."""
    lengths = (300, 1, 5000, 77)
    q, k, v, offsets = _qkv(device, lengths, (8, 17, 16))
    q, k, v = (part.to(dtype) for part in (q, k, v))
    options = {"device": device, "dtype": dtype}
    grad, x = torch.randn_like(q), torch.randn(sum(lengths), 200, **options)
    weight = torch.randn(1, 96, 200, **options)
    folded = torch.randn(16, 16, 200, **options) / 14, torch.randn(16, 16, **options)

    def compute(bags: slice, rows: slice, offsets: Tensor) -> list[Tensor]:
        query, key, value = (part.clone().requires_grad_() for part in (q[bags], k[rows], v[rows]))
        out = latent_attention(query, key, value, offsets, backend=backend)
        gradients = torch.autograd.grad(out, (query, key, value), grad[bags])
        projected = context_kv(x[rows], weight, offsets=offsets, backend=backend)[0]
        attended = absorbed_heads(query, *folded, x[rows], offsets, scale=0.25, backend=backend)
        gradients += torch.autograd.grad(attended, query, grad[bags])
        return [out.detach(), *gradients, attended.detach(), projected]

    together = compute(slice(None), slice(None), offsets)
    differences = []
    for b, (start, stop) in enumerate(pairwise(offsets.tolist())):
        bag, rows = slice(b, b + 1), slice(start, stop)
        alone = compute(bag, rows, _offsets(lengths[bag], device))
        places = (bag, bag, rows, rows, bag, bag, rows)
        in_batch = [part[place] for part, place in zip(together, places, strict=True)]
        differences += [(a - o).abs().max().item() for a, o in zip(alone, in_batch, strict=True)]
    return max(differences), 0.0


def _harmonic(device: str, backend: Any, count: int) -> tuple[float, float]:
    parts = [torch.randn(9, 1000, 2, device=device) for _ in range(count)]
    weights = [1.0 + i for i in range(count)]

    def merged(merge: Callable[..., Tensor], **options: Any) -> Function:
        return lambda *x: torch.view_as_real(
            merge([torch.view_as_complex(p) for p in x], weights, **options)
        )

    pair = merged(harmonic_merge, backend=backend), merged(harmonic_merge_reference)
    return _compare(*pair, parts, torch.float32)


def _slerp(device: str, backend: Any, count: int) -> tuple[float, float]:
    vectors = [torch.randn(100_000, device=device) for _ in range(count)]
    weights = [1.0 + i for i in range(count)]
    return _compare(
        lambda *x: slerp(x, weights, backend=backend),
        lambda *x: slerp(x, weights, backend="eager"),
        vectors,
        torch.float32,
    )


def _lego_pass(
    latents: int, dim: int, axes: tuple[int, ...], dtype: torch.dtype
) -> tuple[float, float]:
    """Compare the kernels with torch; in half precision under autocast, as it is used.

    Away from the kinks of LeakyReLU and SELU: there one rounding, torch's own no less than the
    kernels', changes a slope, and one such number is more than all other errors together.
    """
    inner = 8 * 64
    shapes = [
        (5, latents, dim), (5, latents, dim), (5, 8, latents, 64), (dim, inner), (dim,), (dim,),
        (dim,), (8 * dim, dim), (8 * dim,), (dim, 4 * dim), (dim,), (dim,), (dim,), (inner, dim),
    ]  # fmt: skip
    tensors = [torch.randn(s, device="cuda") / s[-1] ** 0.5 for s in shapes]
    for bias in (4, 8):  # of the output projection, and of values and gates
        tensors[bias] = tensors[bias].sign() * (1 + tensors[bias].abs())
    present = torch.tensor([True, False, True, True, True], device="cuda")

    def run(backend: Any) -> Function:
        def call(*t: Tensor) -> tuple[Tensor, ...]:
            half = t[0].dtype != torch.float64 and dtype != torch.float32
            with torch.autocast("cuda", dtype if half else torch.bfloat16, enabled=half):
                results = lego_pass(
                    t[0], t[2], UpdateWeights(*t[3:11]), imaginary=t[1], present=present, axes=axes,
                    query_weights=QueryWeights(*t[11:]), backend=backend,
                )  # fmt: skip
            return tuple(x for x in results if x is not None)

        return call

    error, allowed = _compare(run("triton"), run("eager"), tensors, torch.float32)
    return error, allowed + FLOOR[dtype]


def _graph() -> tuple[float, float]:
    """Capture a call, change its queries in place, replay, and compare with a fresh call."""
    q, k, v, offsets = _qkv("cuda", RAGGED, (8, 25, 16))

    def run() -> list[Tensor]:
        return [latent_attention(q, k, v, offsets, backend="triton")]

    replay = captured(run)
    q.normal_()
    return measure.relative_error(replay(), run()), 0.0


class _Patches(torch.nn.Module):
    """A small vision transformer with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 64, 16, stride=16)
        self.first = torch.nn.Parameter(torch.randn(1, 1, 64))
        self.layers = torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True), 2
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT
        tokens = torch.cat([self.first.expand(len(x), -1, -1), tokens], dim=1)
        return self.layers(tokens)[:, 0]


def _encoder(device: str, precision: str) -> tuple[float, float]:
    """Compare features with float64, and allow what plain autocast would do."""
    model, (dtype,) = _Patches().eval(), [t for t, name in NAMES.items() if name == precision]
    pixels = torch.randint(0, 256, (9, 64, 64, 3), dtype=torch.uint8)
    x = pixels.permute(0, 3, 1, 2) / 255
    wide = copy.deepcopy(model).double()
    model = model.to(device)
    encoder = TorchEncoder("check", model, Transform(), Setup(device, precision))

    def encoded(_: Tensor) -> Tensor:
        return torch.from_numpy(encoder.encode(pixels.numpy()))

    @torch.no_grad()
    def literal(x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return wide(x)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return model(x.to(device)).cpu()

    return _within(encoded, literal, (x,), FLOOR[dtype])


def _patches_there(device: str) -> tuple[float, float]:
    """Return by how much it matters where the pixels lie, and when they are given: by nothing."""
    transform = Transform(resize=64, crop=(48, 48), mean=(0.5, 0.5, 0.5))
    encoder = TorchEncoder("check", _Patches(), transform, Setup(device))
    pixels = torch.randint(0, 256, (9, 80, 80, 3), dtype=torch.uint8)
    features = [encoder.encode(given) for given in (pixels.numpy(), pixels, pixels.to(device))]
    return float(max(abs(rows - features[0]).max() for rows in features[1:])), 0.0


def captured(run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """Return a run as the replay of a CUDA graph; its results are overwritten by the next.

    Captured as motet's own graphs are, so that a failure leaves nothing behind.
    """
    recording = CudaCapture(torch.device("cuda"))(run, [])

    def replay() -> list[Tensor]:
        recording.replay()
        return recording.result

    return replay
