"""The Triton kernels of context_kv in Triton's interpreter, against literal torch in float64.

Half precision is float16 here, since the interpreter multiplies the raw bits of bf16. The fixture
`pooling` makes float16 take the path of bf16 too, and `chip` selects the tensor memory accelerator.
"""

from itertools import pairwise

import pytest
import torch

from .conftest import KERNEL_TESTS, require_interpreter

require_interpreter()

from motet.kernels.context_kv import tma_kernels
from motet.kernels.context_kv import triton as context_launchers
from motet.kernels.context_kv.blocks import (
    HALF,
    HOPPER,
    SINGLE,
    WIDE,
    columns_of,
    padded_columns,
    pool_chunk,
)
from motet.kernels.context_kv.triton import Side, centre, pool, project, weight_gradient
from motet.kernels.ragged import count_slots
from motet.kernels.row_statistics.triton import forward as row_statistics
from triton.runtime.interpreter import InterpretedFunction

from .comparison import assert_as_good_as
from .conftest import offsets_of

EPS = 1e-5
RAGGED = [300, 0, 1, 530]
pytestmark = KERNEL_TESTS


@pytest.fixture(params=[0, 90], ids=["pointers", "tma"])
def chip(request, monkeypatch):
    """Launch the kernels that read by pointers, or those that read by TMA."""
    launch_for(request.param, monkeypatch)
    return request.param


def launch_for(capability, monkeypatch):
    monkeypatch.setattr(context_launchers, "capability", lambda _: capability)


def rows_of(count, width, ratio, dtype):
    """Make rows with mean/SD `ratio` (inf: constant rows) whose first columns are outliers."""
    if ratio == float("inf") or not count:
        return (torch.arange(count)[:, None] * 7.3 - 20).repeat(1, width).to(dtype)
    x = torch.randn(count, width)
    x[:, : width // 16] += 6
    x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True).clamp(min=1e-3)
    return ((x + ratio) * torch.logspace(-1, 2, count)[:, None]).to(dtype)


def normalised(x, p, dtype):
    z = x.to(dtype)
    if p is not None:
        z = torch.cat([z, p.to(dtype).repeat(len(x) // len(p), 1)], 1)
    return z, torch.nn.functional.layer_norm(z, z.shape[1:], eps=EPS)


def literal_project(x, p, weight, bias, offsets, dtype):
    _, zhat = normalised(x, p, dtype)
    weight = weight.to(dtype)
    if offsets is None:
        y = zhat @ weight.mT
        return y if bias is None else y + bias.to(dtype)[:, None]
    return torch.cat(
        [
            zhat[slice(*bag)] @ weight[s].mT + (0 if bias is None else bias[s].to(dtype))
            for s, bag in enumerate(pairwise(offsets.tolist()))
        ]
    )


def context(rows, width, channels, sets, outputs, ratio=0.0, dtype=torch.float32, positions=None):
    p = torch.randn(positions or rows, channels) if channels else None
    total = width + channels
    weight = (torch.randn(sets, outputs, total) / total**0.5).to(dtype)
    return rows_of(rows, width, ratio, dtype), p, weight, torch.randn(sets, outputs).to(dtype)


def check_statistics(x, p):
    mean, rstd = row_statistics(x, p, EPS)
    exact, _ = normalised(x, p, torch.float64)
    size = exact.square().mean(1).sqrt()
    assert ((mean - exact.mean(1)).abs() <= 1e-6 * size).all()
    expected = (exact.var(1, correction=0) + EPS) ** -0.5
    torch.testing.assert_close(rstd.double(), expected, rtol=2e-6, atol=0)
    return mean, rstd


def projected(x, p, weight, bias, offsets):
    centred, _ = centre(weight, x.shape[1], None)
    return project(x, p, centred, bias, offsets, *row_statistics(x, p, EPS), EPS)


def check_project(x, p, weight, bias, offsets):
    def literal(weight):
        return literal_project(x, p, weight, bias, offsets, weight.dtype)

    check_statistics(x, p)
    y = projected(x, p, weight, bias, offsets)
    assert y.dtype == weight.dtype
    assert_as_good_as(lambda weight: y, literal, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("width", "channels"), [(37, 0), (150, 5), (5000, 3), (1, 0), (3, 70)])
def test_statistics_of_rows_far_from_zero(width, channels, dtype):
    """Statistics are as good as torch's at means of 1,000 standard deviations."""
    p = torch.randn(20, channels) if channels else None
    for ratio in (0, 1000):
        x = rows_of(20, width, ratio, torch.float32) if width > 3 else torch.randn(20, width)
        x = (x / x.abs().max() * 1e4).to(dtype)
        check_statistics(x, p)
    constant = torch.full((20, width), 0.1).to(dtype)
    mean, rstd = row_statistics(constant, None, EPS)
    assert torch.equal(rstd, torch.full_like(rstd, EPS).rsqrt())
    torch.testing.assert_close(mean, constant[:, 0].float())


def test_statistics_do_not_see_other_rows():
    x, p, *_ = context(150, 70, 5, 1, 1, 1)
    for part in (slice(0, 1), slice(13, 14), slice(13, 150)):
        alone, batch = row_statistics(x[part], p[part], EPS), row_statistics(x, p, EPS)
        assert all(torch.equal(a, b[part]) for a, b in zip(alone, batch, strict=True))


@pytest.mark.parametrize("ratio", [0, 1, 10, 100, float("inf")])
@pytest.mark.parametrize(("width", "channels"), [(37, 0), (150, 5), (512, 0)])
def test_project_is_as_good_as_torch_at_any_mean(width, channels, ratio):
    check_project(*context(40, width, channels, 1, 24, ratio), None)


@pytest.mark.parametrize(
    ("width", "channels", "sets", "outputs", "rows"),
    [(6, 0, 1, 1, 3), (37, 3, 5, 12, 70), (64, 5, 2, 70, 65), (1, 0, 1, 4, 2), (33, 64, 1, 8, 5)],
)
def test_project_of_awkward_sizes(width, channels, sets, outputs, rows):
    check_project(*context(rows, width, channels, sets, outputs, 1), None)


def test_project_without_bias_of_a_strided_context_with_shared_positions():
    wide, p, weight, _ = context(90, 70, 5, 2, 6, 1, positions=30)
    x = wide[:, 3:67]
    check_project(x, p, weight[..., 6:].contiguous(), None, None)


@pytest.mark.usefixtures("chip")
def test_project_in_half_precision():
    for ratio in (0, 1, 10, 100, float("inf")):
        for scale in (1, 100):
            x, *rest = context(70, 104, 5, 2, 24, ratio, torch.float16)
            check_project((x.float() / x.abs().max() * 600 * scale).half(), *rest, None)
    x, _, weight, bias = context(70, 104, 0, 2, 24, float("inf"), torch.float16)
    y = projected(x, None, weight, bias, None)
    assert torch.equal(y, bias[:, None].expand_as(y))


def test_project_mixes_dtypes():
    x, p, weight, bias = context(40, 64, 5, 1, 16, 10)
    check_project(x, p, weight.half(), bias.half(), None)
    check_project(x.half(), p, weight, bias, None)


@pytest.mark.usefixtures("chip")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lengths", [RAGGED, [1], [64, 64, 0, 0, 65]])
def test_project_grouped(lengths, dtype):
    rows = sum(lengths)
    x, p, weight, bias = context(rows, 40, 5, len(lengths), 20, 1, dtype)
    offsets = offsets_of(lengths)
    check_project(x, p, weight, bias, offsets)
    batch = projected(x, p, weight, bias, offsets)
    for g, (start, stop) in enumerate(pairwise(offsets.tolist())):
        bag = slice(start, stop)
        alone = projected(
            x[bag], p[bag], weight[g : g + 1], bias[g : g + 1], torch.tensor([0, stop - start])
        )
        assert torch.equal(alone, batch[bag])


def test_a_row_does_not_see_its_neighbours():
    x, p, weight, bias = context(50, 100, 0, 1, 8, 0)
    y = projected(x, p, weight, bias, None)
    other = torch.cat([rows_of(13, 100, 100, torch.float32), x])
    again = projected(other, p, weight, bias, None)
    assert torch.equal(y, again[:, 13:])


def literal_pool(a, x, p, offsets, dtype):
    _, zhat = normalised(x, p, dtype)
    a = a.to(dtype)
    if offsets is None:
        return a.mT @ zhat
    return torch.stack([a[slice(*b)].mT @ zhat[slice(*b)] for b in pairwise(offsets.tolist())])


def side_of(a, x, p, mean, rstd, offsets):
    """Return the sums that kernels compute beside the product with x, in torch."""
    channels = 0 if p is None else p.shape[1]
    rows = a.float()
    factors = mean.new_ones(len(x)) if not context_launchers.scaled(x, a.dtype) else rstd
    parts = [(rows / factors[:, None])[..., None]]
    if p is not None:
        places = p.repeat(len(x) // len(p), 1)
        if not context_launchers.scaled(x, a.dtype):
            places = (places - mean[:, None]) * rstd[:, None]
        parts.append(rows[..., None] * places[:, None])
    terms = torch.cat(parts, -1)
    chunk = context_launchers.SIDE_CHUNK
    sums = torch.full((count_slots(len(x), len(offsets) - 1, chunk), *terms.shape[1:]), torch.nan)
    for b, (start, stop) in enumerate(pairwise(offsets.tolist())):
        for j, part in enumerate(terms[start:stop].split(chunk) if stop > start else ()):
            sums[start // chunk + b + j] = part.sum(0)
    return Side(sums, channels)


def check_pool(a, x, p, offsets):
    mean, rstd = row_statistics(x, p, EPS)
    weights = a
    if context_launchers.scaled(x, a.dtype):
        weights = (a.float() * rstd[:, None]).to(a.dtype)
    side = side_of(weights, x, p, mean, rstd, offsets)
    out = a.new_empty(len(offsets) - 1, a.shape[1], x.shape[1] + side.channels)
    sums = a.new_empty(out.shape[:2])
    pool(weights, x, mean, rstd, offsets, side, out, sums, None)

    def literal(a):
        total = [a[slice(*bag)].sum(0) for bag in pairwise(offsets.tolist())]
        return literal_pool(a, x, p, offsets, a.dtype), torch.stack(total)

    assert_as_good_as(lambda a: (out, sums), literal, a)
    return out


@pytest.fixture(params=["scaled", "normalised"])
def pooling(request, monkeypatch):
    """Pool float16 as bf16 is pooled, or as float16 is."""
    half = (torch.float16,) if request.param == "scaled" else ()
    monkeypatch.setattr(context_launchers, "_SCALED", half)


@pytest.mark.usefixtures("pooling", "chip")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ratio", [0, 1, 10, 100])
def test_pool_is_as_good_as_torch_at_any_mean(ratio, dtype):
    x = rows_of(200, 72, ratio, dtype)
    p = torch.randn(50, 3)
    for places in (None, p):
        check_pool(torch.randn(200, 24).to(dtype), x, places, torch.tensor([0, 200]))


@pytest.mark.usefixtures("pooling", "chip")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("width", "channels", "outputs", "positions"),
    [(37, 5, 70, 60), (6, 0, 1, None), (72, 3, 136, 600)],
)
def test_pool_of_bags(width, channels, outputs, positions, dtype):
    x, p, *_ = context(600, width, channels, 1, 1, 1, dtype, positions=positions)
    a = torch.randn(600, outputs).to(dtype)
    offsets = offsets_of([20, 0, 1, 579])
    batch = check_pool(a, x, p, offsets)
    assert not batch[1].any()
    part = slice(21, 600)
    shared = p if p is None else p.repeat(600 // len(p), 1)[part]
    alone = check_pool(a[part], x[part], shared, torch.tensor([0, 579]))
    assert torch.equal(alone[0], batch[3])


def check_weight_gradient(grad, x, p):
    mean, rstd = check_statistics(x, p)

    def fast(grad):
        return weight_gradient(grad, x, p, mean, rstd, EPS)

    def literal(grad):
        return literal_pool(grad, x, p, None, grad.dtype), grad.sum(1)

    assert_as_good_as(fast, literal, grad)


def test_gradient_of_the_weights():
    """The gradient is right for several weight sets, several chunks and strided rows."""
    x, p, *_ = context(1100, 40, 4, 1, 1, 1, positions=550)
    check_weight_gradient(torch.randn(3, 1100, 22), x[:, 5:], p)


@pytest.mark.usefixtures("pooling")
@pytest.mark.parametrize("ratio", [0, 1, 10, 100, float("inf")])
def test_gradient_of_the_weights_in_half_precision(ratio):
    x, p, *_ = context(150, 70, 5, 1, 1, ratio, torch.float16, positions=50)
    for places in (None, p):
        check_weight_gradient(torch.randn(2, 150, 12).half(), x, places)


def test_fp16_has_room_for_the_gradients_of_large_rows():
    """The gradients must not be multiplied by 1 / SD, which would make them subnormal."""
    x = (torch.randn(150, 70) * 1e4).clamp(-6e4, 6e4).half()
    check_weight_gradient((torch.randn(1, 150, 12) / 100).half(), x, None)


def test_nothing_comes_of_nothing():
    x, p, weight, bias = context(0, 6, 3, 2, 4)
    y, mean, rstd = projected(x, p, weight, bias, None), *row_statistics(x, p, EPS)
    assert (y.shape, mean.shape, rstd.shape) == ((2, 0, 4), (0,), (0,))
    for half in (False, True):
        inputs = (y, x, p) if not half else (y.bfloat16(), x.bfloat16(), p)
        dweight, dbias = weight_gradient(*inputs, mean, rstd, EPS)
        assert (dweight.shape, dbias.shape) == ((2, 4, 9), (2, 4))
        assert not dweight.any()
        assert not dbias.any()
    check_pool(y[0], x, None, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize(("outputs", "lengths"), [(68, None), (136, [520, 0, 130, 1, 400])])
def test_project_in_turns(capability, outputs, lengths, monkeypatch):
    """With more tiles than multiprocessors (3 here), programs take turns and then half tiles."""
    launch_for(capability, monkeypatch)
    rows = 1000 if lengths is None else sum(lengths)
    sets, offsets = (2, None) if lengths is None else (len(lengths), offsets_of(lengths))
    x, p, weight, bias = context(rows, 24, 3, sets, outputs, 1, torch.float16, positions=rows)
    check_project(x, p, weight, bias, offsets)


def test_tiles_come_by_tma_where_rows_begin_at_16_bytes(chip, monkeypatch):
    names = []
    launch = context_launchers.launch

    def record(kernel, *rest, **options):
        names.append(kernel.__name__)
        launch(kernel, *rest, **options)

    monkeypatch.setattr(context_launchers, "launch", record)
    monkeypatch.setattr(context_launchers, "_SCALED", (torch.float16,))
    x, _, weight, _ = context(20, 40, 0, 1, 24, 1, torch.float16)
    # The weights are contiguous, so that their rows are as long as the tokens are wide.
    for tokens, *aligned in (
        (x, True, True),
        (x[:, :37], False, True),
        (x[:, 4:], False, False),
        (x[:, 8:], True, True),
        (x[:1].expand(20, -1), False, False),
        (x.flatten().as_strided((20, 40), (8, 1)), False, False),
    ):
        offsets = torch.tensor([0, 20])
        y = projected(tokens, None, weight[..., : tokens.shape[1]].contiguous(), None, offsets)
        check_pool(y, tokens, None, offsets)
        kernels = [name for name in names if name.startswith(("project", "pool"))]
        assert [name.endswith("_tma_kernel") for name in kernels[-2:]] == [
            by_tma and chip > 0 for by_tma in aligned
        ], (tokens.shape, tokens.stride())


def test_turns_compute_every_tile_once_and_end_together():
    for slots, tiles, programs in [(938, 1, 132), (938, 2, 132), (3, 7, 132), (1, 1, 3)]:
        launched, full, halves = context_launchers._waves(slots, tiles, programs)
        assert 2 * full + halves == 2 * slots * tiles
        assert not full % tiles
        assert 1 <= launched <= programs
        assert halves <= launched
    # 7 tiles of 128 rows and one of 64 for each of 132 multiprocessors: 8 bags of 15,000.
    assert context_launchers._waves(938, 1, 132) == (132, 924, 28)


@pytest.mark.parametrize("allowed", [SINGLE, HALF, WIDE, HOPPER])
def test_a_program_has_its_outputs_and_few_more(allowed):
    for outputs in (1, 16, 17, 64, 80, 128, 136, 200, 256, 272, 512, 1648):
        columns = columns_of(outputs, allowed)
        assert columns in allowed
        assert all(not part & (part - 1) for part in columns)
        programs = -(-outputs // columns.width)
        assert (programs - 1) * columns.width < outputs <= programs * columns.width


def test_pooled_chunks_are_powers_of_2():
    chunks = [pool_chunk(outputs) for outputs in (0, 1, 16, 17, 128, 136, 200, 512, 1648)]
    assert chunks == [512, 512, 512, 512, 4096, 4096, 4096, 16384, 16384]


def test_136_outputs_cost_144():
    assert [padded_columns(136, chip) for chip in (80, 90, 100)] == [144] * 3
    assert [padded_columns(192, chip) for chip in (80, 90, 100)] == [256, 192, 256]


def test_the_kernels_are_interpreted():
    assert isinstance(tma_kernels.project_tma_kernel, InterpretedFunction)
