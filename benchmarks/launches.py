"""Calls of every launcher in kernels/: at the sizes of the shipped models, and in every form.

A form is a choice, for every optional argument of a launcher, between None and a tensor. The
tensors are on the CPU and not initialised: registers.py records what would be launched, and runs
nothing.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from motet.kernels.absorbed_attention import triton as absorbed_launchers
from motet.kernels.context_kv import triton as context_launchers
from motet.kernels.fold_norm import triton as fold_launchers
from motet.kernels.harmonic_merge import triton as merge_launchers
from motet.kernels.head import triton as head_launchers
from motet.kernels.latent_attention import triton as attention_launchers
from motet.kernels.latent_attention.records import like_record
from motet.kernels.lego_pass import triton as lego_launchers
from motet.kernels.row_statistics import triton as statistics_launchers
from motet.kernels.slerp import triton as slerp_launchers

LAUNCHERS = (
    absorbed_launchers, attention_launchers, context_launchers, fold_launchers, head_launchers,
    lego_launchers, merge_launchers, slerp_launchers, statistics_launchers,
)  # fmt: skip
BITS = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64
}  # fmt: skip


def attention(
    dtype: str, heads: int, latents: int, width: int, *, dropout: float, ragged: bool,
    counted: bool = False, shared: bool = False, layers: int = 1,
) -> Callable[[], None]:  # fmt: skip
    """Return a function that calls every launcher of latent_attention at one size.

    Args:
        dtype: of queries, keys and values.
        heads: number of heads.
        latents: queries of a bag.
        width: of a head.
        dropout: probability.
        ragged: keys in one ragged batch, whose rows are padded to a multiple of 16 numbers, instead
            of bags of one length.
        counted: give the counts of tokens.
        shared: all bags have the same queries.
        layers: passes whose gradients of K and V are summed.
    """

    def run() -> None:
        kernels = attention_launchers
        options = {"dtype": BITS[dtype]}
        q = torch.empty(1 if shared else 2, latents, heads, width, **options).transpose(1, 2)
        if ragged:
            padded = width + -width % 16
            k, v = torch.empty(64, 2, heads, padded, **options).unbind(1)
            dk, dv = torch.empty(64, 2, heads, padded, **options).unbind(1)
            offsets = torch.tensor([0, 40, 64])
        else:
            packed = (torch.empty(2, 32, 2, heads, width, **options) for _ in range(2))
            (k, v), (dk, dv) = (x.permute(0, 2, 3, 1, 4).unbind(1) for x in packed)
            offsets = None
        counts = torch.empty(64 if ragged else (2, 32)) if counted else None
        inputs = (q, k, v, offsets, counts)
        seed = torch.zeros(1, dtype=torch.int64) if dropout else None
        out, lse = kernels.attend(*inputs, 0.25, dropout, seed)
        record = like_record(out)
        results = (out, lse, 0.25, dropout, seed, torch.empty_like(q), record)
        kernels.query_gradient(out, *inputs, *results)
        records = record[:, :, None].repeat(1, 1, layers, 1, 1)
        kernels.kv_gradient(records, *inputs[1:], width, 0.25, dropout, dk, dv)
        q = torch.empty(2, heads, latents, k.shape[-1], **options)
        for reduce in (None, "mean"):
            kernels.weights(q, k, offsets, lse, 0.25, reduce)

    return run


def context_kv(
    dtype: str, width: int, sets: int, outputs: int, *, channels: int = 0, grouped: bool = False,
    x_dtype: str | None = None, p_dtype: str = "fp32", biased: bool = True,
) -> Callable[[], None]:  # fmt: skip
    """Return a function that calls every launcher of context_kv at one size."""

    def run() -> None:
        options = {"dtype": BITS[dtype]}
        x = torch.empty(256, width, dtype=BITS[x_dtype or dtype])
        p = torch.empty(128, channels, dtype=BITS[p_dtype]) if channels else None
        weight = torch.empty(sets, outputs, width + channels, **options)
        bias = torch.empty(sets, outputs, **options) if biased else None
        offsets = torch.arange(sets + 1) if grouped else None
        mean, rstd = statistics_launchers.statistics_of(x, p, None, None, 1e-5)
        mean, rstd = statistics_launchers.statistics_of(x, p, mean, rstd, 1e-5)
        centred, _ = context_launchers.centre(weight, width, None)
        y = context_launchers.project(x, p, centred, bias, offsets, mean, rstd, 1e-5)
        if not grouped:  # grouped projections serve absorbed attention, which has its own gradients
            context_launchers.weight_gradient(y, x, p, mean, rstd, 1e-5)

    return run


def fold(dtype: str, heads: int, width: int, *, model: str = "fp32") -> Callable[[], None]:
    """Return a function that calls every launcher of fold_norm at one size, results in `dtype`."""

    def run() -> None:
        options, padding = {"dtype": BITS[model]}, -width % 16
        weight = torch.empty(2 * heads, width, 2048, **options)
        gain, shift = torch.empty(2, 2048, **options).unbind()
        folded, bias = fold_launchers.fold(weight, gain, shift, padding, BITS[dtype])
        fold_launchers.fold_backward(folded, bias, weight, gain, shift)

    return run


def head(latents: int, dim: int, outputs: int, *, model: str = "fp32") -> Callable[[], None]:
    """Return a function that calls every launcher of head at one size."""

    def run() -> None:
        options = {"dtype": BITS[model]}
        gain, shift = torch.empty(2, dim, **options).unbind()
        weight, bias = torch.empty(outputs, dim, **options), torch.empty(outputs, **options)
        results = head_launchers.forward(
            torch.empty(2, latents, dim, **options), gain, shift, weight, bias, 1e-5
        )
        head_launchers.backward(*results, gain, shift, weight, latents, BITS[model])

    return run


def absorbed(
    dtype: str, rows: int, *, dropout: float, channels: int = 5, counted: bool = False
) -> Callable[[], None]:
    """Return a function that calls every launcher of absorbed_attention at one size."""

    def run() -> None:
        kernels, options = absorbed_launchers, {"dtype": BITS[dtype]}
        x, offsets = torch.empty(256, 2048, **options), torch.arange(3)
        p = torch.empty(128, channels) if channels else None
        queries = torch.empty(2, rows, 2048 + channels, **options)
        seed = torch.zeros(1, dtype=torch.int64) if dropout else None
        counts = torch.empty(256) if counted else None
        statistics = torch.empty(256), torch.empty(256)
        tokens = kernels.Tokens(x, p, offsets, counts, *statistics, 1e-5, dropout, seed)
        results = kernels.attend(queries, tokens)
        kernels.attend_backward(results.pooled, results.mass, results, tokens)

    return run


def attended(
    dtype: str, heads: int, latents: int, width: int, *, channels: int = 0, shared: bool = False,
    q_dtype: str | None = None,
) -> Callable[[], None]:  # fmt: skip
    """Return a function that calls the launchers of absorbed_heads at one size.

    Its queries and values are `width` numbers per head; those of absorbed_attention are as wide as
    tokens.
    """

    def run() -> None:
        kernels, options = absorbed_launchers, {"dtype": BITS[dtype]}
        x, offsets = torch.empty(256, 2048, **options), torch.arange(3)
        p = torch.empty(128, channels) if channels else None
        statistic = torch.empty(256)  # mean and rstd alike
        tokens = kernels.Tokens(x, p, offsets, None, statistic, statistic, 1e-5, 0.0, None)
        weights = torch.empty(2 * heads, width, 2048 + channels, **options)
        folded = kernels.HeadWeights(weights, weights.new_empty(2 * heads, width))
        size = 1 if shared else 2, latents, heads, width
        q = torch.empty(size, dtype=BITS[q_dtype or dtype]).transpose(1, 2)
        out, results = kernels.attend_heads(q, folded, tokens, 0.25)
        kernels.attend_heads_backward(out, q, folded, results, tokens, 0.25)

    return run


def merge(count: int) -> Callable[[], None]:
    """Return a function that calls every launcher of both merge operators for `count` inputs."""

    def run() -> None:
        latents = [torch.empty(256, dtype=torch.complex64) for _ in range(count)]
        for phase in ("principal", "circular"):
            weights = [1 / count] * count
            merge_launchers.merge(latents, weights, phase, latents[0])
            merge_launchers.merge_backward(latents[0], latents[0], latents, weights, phase)
        vectors = [torch.empty(256) for _ in range(count)]
        slerp_launchers.products(vectors)
        slerp_launchers.combine(vectors, torch.empty(count, dtype=torch.float64), vectors[0])

    return run


def lego_pass(
    dtype: str, latents: int, dim: int, axes: tuple[int, ...] = (-2, -1), *,
    rows: int | None = None, snn: bool = True, model: str = "fp32", optional: bool = True,
    queries: bool = True, gradients: tuple[bool, bool, bool] = (True, True, True),
    shared: bool = False, updated: bool = True,
) -> Callable[[], None]:  # fmt: skip
    """Return a function that calls every launcher of lego_pass at one size, products in `dtype`.

    Args:
        dtype: of the products.
        latents: rows of Z.
        dim: columns of Z.
        axes: of the Fourier transform.
        rows: rows of the complete spectrum, of which Z has `latents`; None if it has all.
        snn: SNN in place of GELU.
        model: dtype of latents and weights.
        optional: give Im Z, present, scaled and a seed.
        queries: give the weights of the next pass's queries.
        gradients: give the gradients of Re Z, of Im Z and of the queries, of those that exist.
        shared: all samples start from the same latents, and the attended values are one row per
            sample, in the dtype of the products.
        updated: give the attended values.
    """

    def run() -> None:
        kernels, products, inner = lego_launchers, BITS[dtype], 8 * 64
        options = {"dtype": BITS[model]}
        real = torch.empty(1 if shared else 2, latents, dim, **options)
        imaginary = torch.empty_like(real) if optional and axes else None
        attended = update = None
        if updated:
            attended_dtype = products if shared else torch.float32
            attended = torch.empty(2, 8, 1 if shared else latents, 64, dtype=attended_dtype)
            update = torch.empty(12 * dim**2 + dim * inner + 12 * dim, **options)
        query_weights = torch.empty((inner + 2) * dim, **options) if queries else None
        present, scaled = torch.ones(2, 2, dtype=torch.bool).unbind()
        seed = torch.zeros(1, dtype=torch.int64)
        settings = [
            update, query_weights, *((present, scaled, seed) if optional else (None, None, None)),
            0.1 if optional else 0.0, snn, axes, rows or latents, products,
        ]  # fmt: skip
        x, y, q, scale = kernels.forward(real, imaginary, attended, *settings)
        y = None if imaginary is None else y
        # The results serve as their own gradients: they have the right shapes and dtypes.
        dx, dy, dq = (
            tensor if used else None for tensor, used in zip((x, y, q), gradients, strict=True)
        )
        if not queries:
            dq = None
        kernels.backward(dx, dy, dq, x, y, scale, real, attended, *settings)

    return run


def _shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield names of the sizes that models have, and functions that call the launchers."""
    # (heads, latents, width): the models of TCGA as released (1 head); as in the paper (8 heads),
    # where the block sizes of the kernels differ; and 8 heads of 64.
    sizes = [
        (1, 25, 16), (1, 17, 63), (1, 17, 27), (1, 16, 103), (8, 25, 16), (8, 17, 27),
        (8, 25, 128), (8, 16, 80), (8, 64, 64), (8, 256, 64),
    ]  # fmt: skip
    for heads, latents, width in sizes:
        for dtype in ("bf16", "fp32"):
            for dropout in (0.0, 0.1):
                name = f"attention {dtype} {heads}x{width} c{latents}"
                yield (
                    f"{name} dropout" if dropout else name,
                    attention(
                        dtype, heads, latents, width, dropout=dropout, ragged=True, layers=2
                    ),
                )  # fmt: skip
    yield "attention bf16 8x64 c64 dense", attention("bf16", 8, 64, 64, dropout=0, ragged=False)
    yield (
        "attention fp16 8x64 c64 dropout",
        attention("fp16", 8, 64, 64, dropout=0.1, ragged=True),
    )
    yield (
        "attention bf16 1x256 c64 dropout",
        attention("bf16", 1, 64, 256, dropout=0.1, ragged=True),
    )
    for heads, latents, width in ((1, 25, 16), (1, 17, 63), (8, 25, 128), (8, 64, 64)):
        for dtype in ("bf16", "fp32"):
            yield (
                f"attention {dtype} {heads}x{width} c{latents} counts",
                attention(dtype, heads, latents, width, dropout=0, ragged=True, counted=True),
            )
    for heads, latents in ((1, 17), (8, 64)):
        yield (
            f"attention bf16 {heads}x64 c{latents} dense counts",
            attention("bf16", heads, latents, 64, dropout=0, ragged=False, counted=True),
        )
    for dtype in ("bf16", "fp32"):
        for sets, outputs in ((1, 32), (1, 128), (1, 224), (5, 64), (1, 1024), (1, 1648)):
            yield (
                f"context {dtype} 2048+5 to {sets}x{outputs}",
                context_kv(dtype, 2048, sets, outputs, channels=5),
            )
        yield (f"context {dtype} 1024 to 1x128", context_kv(dtype, 1024, 1, 128))
        for outputs in (256, 512):  # BLCA and KIRP with 8 heads
            yield f"context {dtype} 2048 to 1x{outputs}", context_kv(dtype, 2048, 1, outputs)
        for outputs in (16, 32, 200):
            yield (
                f"context {dtype} 2048+5 to {outputs} grouped",
                context_kv(dtype, 2048, 2, outputs, channels=5, grouped=True),
            )
    yield ("context fp16 2048+5 to 1x128", context_kv("fp16", 2048, 1, 128, channels=5))
    yield (
        "context bf16 from fp32 2048+5 to 1x128",
        context_kv("bf16", 2048, 1, 128, channels=5, x_dtype="fp32"),
    )

    for rows in (17, 136, 200):
        for dropout in (0.0, 0.1):
            name = f"absorbed bf16 {rows} queries"
            yield f"{name} dropout" if dropout else name, absorbed("bf16", rows, dropout=dropout)
    yield "absorbed fp32 136 queries dropout", absorbed("fp32", 136, dropout=0.1)
    for dtype, rows in (("bf16", 17), ("bf16", 136), ("fp32", 136)):
        name = f"absorbed {dtype} {rows} queries counts"
        yield name, absorbed(dtype, rows, dropout=0, counted=True)

    # The models of TCGA as released, as in the paper, and 8 heads of 64.
    sizes = [
        (1, 25, 16), (1, 17, 63), (1, 17, 27), (1, 16, 103), (8, 25, 16), (8, 17, 63), (8, 16, 103),
        (8, 64, 64),
    ]  # fmt: skip
    for heads, latents, width in sizes:
        for dtype in ("bf16", "fp32"):
            name = f"attended {dtype} {heads}x{width} c{latents}"
            yield name, attended(dtype, heads, latents, width)
            yield f"{name} shared", attended(dtype, heads, latents, width, shared=True)
    yield "attended bf16 1x63 c17 coordinates", attended("bf16", 1, 17, 63, channels=5)
    yield "attended bf16 1x256 c256", attended("bf16", 1, 256, 256)
    for latents, dim, outputs in ((25, 119, 4), (17, 126, 4), (17, 62, 4), (16, 65, 4)):
        yield f"head {latents}x{dim} to {outputs}", head(latents, dim, outputs)
    for model in ("bf16", "fp32"):
        yield f"head {model} 256x256 to 1024", head(256, 256, 1024, model=model)

    for count in (2, 3, 8):
        yield f"merge of {count}", merge(count)

    for dtype in ("bf16", "fp32"):
        for latents, dim in ((17, 126), (25, 119), (64, 64), (256, 32)):
            yield f"pass {dtype} {latents}x{dim}", lego_pass(dtype, latents, dim)
            yield f"pass {dtype} {latents}x{dim} gelu", lego_pass(dtype, latents, dim, snn=False)
        for latents, dim, rows in ((9, 126, 17), (33, 64, 64)):
            yield (
                f"pass {dtype} {latents}x{dim} of {rows}",
                lego_pass(dtype, latents, dim, (-2,), rows=rows),
            )
        for dim, axes in ((64, ()), (126, (-1,)), (256, (-1,))):  # no transform over the rows
            yield f"pass {dtype} rows of {dim}", lego_pass(dtype, 64, dim, axes)
        for latents, dim in ((25, 119), (17, 126), (17, 62), (16, 65)):  # HEALNet
            yield f"pass {dtype} {latents}x{dim} alone", lego_pass(dtype, latents, dim, ())
        for heads, width in ((8, 16), (8, 63)):
            yield f"fold {dtype} {heads}x{width}", fold(dtype, heads, width)
        yield f"pass {dtype} first queries", lego_pass(dtype, 25, 119, (), updated=False)


def _forms() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield small sizes in every dtype, with every optional argument once None and once given."""
    for dtype in ("bf16", "fp16", "fp32"):
        for ragged in (True, False):
            for counted in (True, False):
                name = f"{'ragged' if ragged else 'dense'} {'counts' if counted else 'dropout'}"
                yield (
                    f"form: attention {dtype} {name}",
                    attention(
                        dtype, 8, 17, 16, dropout=0.0 if counted else 0.1, ragged=ragged,
                        counted=counted, shared=ragged and counted,
                    ),
                )  # fmt: skip
        yield (
            f"form: context {dtype} positions, grouped",
            context_kv(dtype, 256, 2, 32, channels=5, grouped=True, biased=False),
        )
        yield f"form: context {dtype} bias", context_kv(dtype, 256, 2, 32)
        yield f"form: context {dtype} in two blocks", context_kv(dtype, 256, 2, 40)
        for x_dtype in ("bf16", "fp16", "fp32"):
            if x_dtype != dtype:
                yield (
                    f"form: context {dtype} from {x_dtype}",
                    context_kv(dtype, 256, 2, 32, channels=5, x_dtype=x_dtype),
                )
        yield (
            f"form: absorbed {dtype} counts",
            absorbed(dtype, 17, dropout=0, channels=0, counted=True),
        )
        yield f"form: absorbed {dtype} positions, dropout", absorbed(dtype, 17, dropout=0.1)
        yield f"form: absorbed {dtype} in two blocks", absorbed(dtype, 80, dropout=0, channels=0)
        yield f"form: attended {dtype}", attended(dtype, 2, 17, 16, channels=5, q_dtype="fp32")
        yield f"form: attended {dtype} shared", attended(dtype, 2, 17, 16, shared=True)
    for p_dtype in ("bf16", "fp16", "fp64"):
        yield (
            f"form: context bf16 with {p_dtype} positions",
            context_kv("bf16", 256, 2, 32, channels=5, p_dtype=p_dtype),
        )
    yield "form: head", head(17, 64, 4)
    for dtype, model in (("fp32", "fp32"), ("fp16", "fp32"), ("bf16", "bf16")):
        yield f"form: fold {dtype} of {model}", fold(dtype, 1, 27, model=model)
    # (products, model): under autocast, and models in half precision.
    pairs = (
        ("fp32", "fp32"),
        ("bf16", "fp32"),
        ("fp16", "fp32"),
        ("bf16", "bf16"),
        ("fp16", "fp16"),
    )
    for dtype, model in pairs:
        small = partial(lego_pass, dtype, 64, 64, model=model)
        name = f"form: pass {dtype} in {model}"
        yield f"{name} all", small()
        yield f"{name} none", small(optional=False, queries=False)
        yield (
            f"{name} of queries",
            small(optional=False, gradients=(False, True, True), shared=True),
        )
        yield f"{name} of Im Z", small(gradients=(False, True, False))
        yield f"{name} without axes", small((), queries=False)
        yield f"{name} first", small(updated=False)


CELLS = {**dict(_shipped()), **dict(_forms())}
"""By name, functions that call the launchers. The names are those of results/registers.json."""
