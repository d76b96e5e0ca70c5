"""Calls of every launcher in kernels/: at the sizes that are shipped, and in every form.

The tensors are on the CPU and hold nothing: registers.py records what would be launched.
"""

from collections.abc import Callable, Iterator

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
    """Return what calls every launcher of latent_attention at one size.

    Ragged keys have rows of a multiple of 16 numbers. True for `shared`: all bags have the same
    queries. As many `layers` attend to them.
    """

    def run() -> None:
        kernels = attention_launchers
        own = {"dtype": BITS[dtype]}
        q = torch.empty(1 if shared else 2, latents, heads, width, **own).transpose(1, 2)
        if ragged:
            padded = width + -width % 16
            k, v = torch.empty(64, 2, heads, padded, **own).unbind(1)
            dk, dv = torch.empty(64, 2, heads, padded, **own).unbind(1)
            offsets = torch.tensor([0, 40, 64])
        else:
            packed = (torch.empty(2, 32, 2, heads, width, **own) for _ in range(2))
            (k, v), (dk, dv) = (x.permute(0, 2, 3, 1, 4).unbind(1) for x in packed)
            offsets = None
        counts = torch.empty(64 if ragged else (2, 32)) if counted else None
        given = (q, k, v, offsets, counts)
        seed = torch.zeros(1, dtype=torch.int64) if dropout else None
        out, lse = kernels.attend(*given, 0.25, dropout, seed)
        record = like_record(out)
        rest = (out, lse, 0.25, dropout, seed, torch.empty_like(q), record)
        kernels.query_gradient(out, *given, *rest)
        records = record[:, :, None].repeat(1, 1, layers, 1, 1)
        kernels.kv_gradient(records, *given[1:], width, 0.25, dropout, dk, dv)
        q = torch.empty(2, heads, latents, k.shape[-1], **own)
        for reduce in (None, "mean"):
            kernels.weights(q, k, offsets, lse, 0.25, reduce)

    return run


def context_kv(
    dtype: str, width: int, sets: int, outputs: int, *, channels: int = 0, grouped: bool = False,
    x_dtype: str | None = None, p_dtype: str = "fp32", biased: bool = True,
) -> Callable[[], None]:  # fmt: skip
    """Return what calls every launcher of context_kv at one size."""

    def run() -> None:
        own = {"dtype": BITS[dtype]}
        x = torch.empty(256, width, dtype=BITS[x_dtype or dtype])
        p = torch.empty(128, channels, dtype=BITS[p_dtype]) if channels else None
        weight = torch.empty(sets, outputs, width + channels, **own)
        bias = torch.empty(sets, outputs, **own) if biased else None
        offsets = torch.arange(sets + 1) if grouped else None
        mean, rstd = statistics_launchers.statistics_of(x, p, None, None, 1e-5)
        mean, rstd = statistics_launchers.statistics_of(x, p, mean, rstd, 1e-5)
        centred, _ = context_launchers.centre(weight, width, None)
        y = context_launchers.project(x, p, centred, bias, offsets, mean, rstd, 1e-5)
        if not grouped:  # else what absorbed attention does with it follows
            context_launchers.weight_gradient(y, x, p, mean, rstd, 1e-5)

    return run


def fold(dtype: str, heads: int, width: int, *, model: str = "fp32") -> Callable[[], None]:
    """Return what calls every launcher of fold_norm at one size, results in `dtype`."""

    def run() -> None:
        own, padding = {"dtype": BITS[model]}, -width % 16
        weight = torch.empty(2 * heads, width, 2048, **own)
        gain, shift = torch.empty(2, 2048, **own).unbind()
        folded, bias = fold_launchers.fold(weight, gain, shift, padding, BITS[dtype])
        fold_launchers.fold_backward(folded, bias, weight, gain, shift)

    return run


def head(latents: int, dim: int, outputs: int, *, model: str = "fp32") -> Callable[[], None]:
    """Return what calls every launcher of head at one size."""

    def run() -> None:
        own = {"dtype": BITS[model]}
        gain, shift = torch.empty(2, dim, **own).unbind()
        weight, bias = torch.empty(outputs, dim, **own), torch.empty(outputs, **own)
        made = head_launchers.forward(
            torch.empty(2, latents, dim, **own), gain, shift, weight, bias, 1e-5
        )
        head_launchers.backward(*made, gain, shift, weight, latents, BITS[model])

    return run


def absorbed(
    dtype: str, rows: int, *, dropout: float, channels: int = 5, counted: bool = False
) -> Callable[[], None]:
    """Return what calls every launcher of absorbed_attention at one size."""

    def run() -> None:
        kernels, own = absorbed_launchers, {"dtype": BITS[dtype]}
        x, offsets = torch.empty(256, 2048, **own), torch.arange(3)
        p = torch.empty(128, channels) if channels else None
        queries = torch.empty(2, rows, 2048 + channels, **own)
        seed = torch.zeros(1, dtype=torch.int64) if dropout else None
        counts = torch.empty(256) if counted else None
        statistics = torch.empty(256), torch.empty(256)
        tokens = kernels.Tokens(x, p, offsets, counts, *statistics, 1e-5, dropout, seed)
        made = kernels.attend(queries, tokens)
        kernels.attend_backward(made.pooled, made.mass, made, tokens)

    return run


def attended(
    dtype: str, heads: int, latents: int, width: int, *, channels: int = 0, shared: bool = False,
    q_dtype: str | None = None,
) -> Callable[[], None]:  # fmt: skip
    """Return what calls the launchers of absorbed_attention for heads of `width` at one size."""

    def run() -> None:
        kernels, own = absorbed_launchers, {"dtype": BITS[dtype]}
        x, offsets = torch.empty(256, 2048, **own), torch.arange(3)
        p = torch.empty(128, channels) if channels else None
        one = torch.empty(256)
        tokens = kernels.Tokens(x, p, offsets, None, one, one, 1e-5, 0.0, None)
        weights = torch.empty(2 * heads, width, 2048 + channels, **own)
        folded = kernels.Weights(weights, weights.new_empty(2 * heads, width))
        size = 1 if shared else 2, latents, heads, width
        q = torch.empty(size, dtype=BITS[q_dtype or dtype]).transpose(1, 2)
        out, made = kernels.gather(q, folded, tokens, 0.25)
        kernels.gather_backward(out, q, folded, made, tokens, 0.25)

    return run


def merge(count: int) -> Callable[[], None]:
    """Return what calls every launcher of both merge operators for `count` inputs."""

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
    asked: bool = True, wanted: tuple[bool, bool, bool] = (True, True, True), shared: bool = False,
    updated: bool = True,
) -> Callable[[], None]:  # fmt: skip
    """Return what calls every launcher of lego_pass at one size, products in `dtype`.

    Args:
        model: dtype of latents and weights.
        optional: give Im Z, present, scaled and a seed.
        asked: give the weights of the next queries.
        wanted: give the gradients of Re Z, of Im Z and of the queries, where there are these.
        shared: let all samples begin alike, and give one row per sample of what was attended, in
            the dtype of the products.
        updated: give what was attended.
    """

    def run() -> None:
        kernels, products, inner = lego_launchers, BITS[dtype], 8 * 64
        own = {"dtype": BITS[model]}
        real = torch.empty(1 if shared else 2, latents, dim, **own)
        imaginary = torch.empty_like(real) if optional and axes else None
        attended = update = None
        if updated:
            kind = products if shared else torch.float32
            attended = torch.empty(2, 8, 1 if shared else latents, 64, dtype=kind)
            update = torch.empty(12 * dim**2 + dim * inner + 12 * dim, **own)
        query_weights = torch.empty((inner + 2) * dim, **own) if asked else None
        present, scaled = torch.ones(2, 2, dtype=torch.bool).unbind()
        seed = torch.zeros(1, dtype=torch.int64)
        rest = [
            update, query_weights, *((present, scaled, seed) if optional else (None, None, None)),
            0.1 if optional else 0.0, snn, axes, rows or latents, products,
        ]  # fmt: skip
        x, y, queries, scale = kernels.forward(real, imaginary, attended, *rest)
        y = None if imaginary is None else y
        of_real, of_imaginary, of_queries = (
            part if given else None for part, given in zip((x, y, queries), wanted, strict=True)
        )
        if not asked:
            of_queries = None
        kernels.backward(of_real, of_imaginary, of_queries, x, y, scale, real, attended, *rest)

    return run


def _shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the sizes that models have: name, and what calls the launchers."""
    # (heads, latents, width): TCGA as released, as in the paper (8 heads) where the blocks differ,
    # and 8x64.
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

    # TCGA as released, as in the paper, and 8x64.
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
        for dim, axes in ((64, ()), (126, (-1,)), (256, (-1,))):  # rows apart
            yield f"pass {dtype} rows of {dim}", lego_pass(dtype, 64, dim, axes)
        for latents, dim in ((25, 119), (17, 126), (17, 62), (16, 65)):  # HEALNet
            yield f"pass {dtype} {latents}x{dim} alone", lego_pass(dtype, latents, dim, ())
        for heads, width in ((8, 16), (8, 63)):
            yield f"fold {dtype} {heads}x{width}", fold(dtype, heads, width)
        yield f"pass {dtype} first queries", lego_pass(dtype, 25, 119, (), updated=False)


def _forms() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield small sizes in every dtype, every optional argument of a launcher None and given."""
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
    # Under autocast, and models in half precision.
    pairs = (
        ("fp32", "fp32"),
        ("bf16", "fp32"),
        ("fp16", "fp32"),
        ("bf16", "bf16"),
        ("fp16", "fp16"),
    )
    for dtype, model in pairs:
        own, small = {"model": model}, (dtype, 64, 64)
        name = f"form: pass {dtype} in {model}"
        yield f"{name} all", lego_pass(*small, **own)
        yield f"{name} none", lego_pass(*small, **own, optional=False, asked=False)
        yield (
            f"{name} of queries",
            lego_pass(*small, **own, optional=False, wanted=(False, True, True), shared=True),
        )
        yield f"{name} of Im Z", lego_pass(*small, **own, wanted=(False, True, False))
        yield f"{name} without axes", lego_pass(*small, (), **own, asked=False)
        yield f"{name} first", lego_pass(*small, **own, updated=False)


CELLS = {**dict(_shipped()), **dict(_forms())}
