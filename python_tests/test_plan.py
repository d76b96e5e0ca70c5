"""plan: its choice on each machine, degenerate cases, its printed text, error messages."""

import dataclasses
import itertools
import timeit
from typing import Any

import motet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from motet.kernels.chips import CHIPS
from motet.kernels.gpu_cost import padded_columns
from motet.kernels.plan import Machine, cpu_machine
from motet.kernels.work import Cost

plan = motet.kernels.plan

SIZES = {"bags": 8, "latents": 25, "heads": 8, "head_dim": 16, "layers": 2}
STRATEGIES = ("cached", "absorbed", "reference")
CPUS = [cpu_machine(threads, amx) for threads in (1, 2, 16) for amx in (False, True)]
# HEALNet on four TCGA cohorts: latents x width of a head, 8 heads (docs/design/algebra.md).
TCGA = {
    "25x16": ("cached", {"latents": 25, "head_dim": 16, "layers": 2}),
    "17x63": ("absorbed", {"latents": 17, "head_dim": 63, "layers": 2}),
    "17x27": ("cached", {"latents": 17, "head_dim": 27, "layers": 5}),
    "16x103": ("absorbed", {"latents": 16, "head_dim": 103, "layers": 2}),
    "17x27, unshared": ("absorbed", {"latents": 17, "head_dim": 27, "layers": 5, "weight_sets": 5}),
}


def planned(tokens: int = 30_000, width: int = 2048, **options: Any) -> motet.kernels.Plan:
    return plan(tokens, width, **{**SIZES, **options})


@pytest.mark.parametrize("name", TCGA)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tokens", [30_000, 120_000])
@pytest.mark.parametrize("machine", CPUS, ids=lambda machine: machine.name)
def test_tcga_on_a_cpu(name: str, training: bool, tokens: int, machine: Machine) -> None:
    strategy, sizes = TCGA[name]
    assert planned(tokens, training=training, device=machine, **sizes).strategy == strategy


@pytest.mark.parametrize("machine", CPUS, ids=lambda machine: machine.name)
def test_short_bags_are_not_absorbed(machine: Machine) -> None:
    """With 16 bags of 100, queries and pooled tokens outnumber the tokens (187 against 76 ms)."""
    sizes = TCGA["17x63"][1] | {"bags": 16}
    assert planned(1600, training=True, device=machine, **sizes).strategy == "cached"


def test_short_bags_share_a_product() -> None:
    """On a CPU torch computes short bags, unless a strategy, Triton or many tokens exclude it."""
    for device in (CPUS[0], "H200"):
        assert planned(8 * 256 - 1, device=device).one_product
        assert not planned(8 * 256, device=device).one_product
        assert planned(8 * 100, device=device, strategy="cached").one_product
    short = planned(8 * 30, device=CPUS[0])
    assert (short.strategy, short.by_torch) == ("cached", True)
    # More tokens than the 2 x 8 x 16 rows of the weights that the LayerNorm is folded into.
    assert not planned(8 * 40, device=CPUS[0]).by_torch
    for options in ({"strategy": "cached"}, {"backend": "triton"}, {"device": "H200"}):
        assert not planned(8 * 30, **{"device": CPUS[0], **options}).by_torch


@pytest.mark.parametrize("device", CHIPS)
def test_gpus_are_known_by_name_without_one_at_hand(device: str) -> None:
    for name in ("25x16", "17x27"):
        chosen = planned(120_000, device=device, dtype=torch.bfloat16, **TCGA[name][1])
        assert (chosen.strategy, chosen.machine) == ("cached", device)
    # Many wide heads without sharing: keys and values of all layers are more than the tokens.
    options = {"layers": 5, "weight_sets": 5, "latents": 4, "head_dim": 128, "heads": 8}
    assert planned(120_000, device=device, dtype=torch.bfloat16, **options).strategy == "absorbed"


def test_faster_machines_are_predicted_to_be_faster() -> None:
    costs = [planned(120_000, device=name).cost.seconds for name in ("A100", "H100", "H200")]
    assert costs == sorted(costs, reverse=True)
    threads = [planned(device=cpu_machine(n, False)).cost.seconds for n in (1, 2, 16)]
    assert threads == sorted(threads, reverse=True)
    assert planned(device="cpu").machine.startswith("CPU, ")
    amx = [planned(device=cpu_machine(1, a), dtype=torch.bfloat16) for a in (False, True)]
    assert amx[0].cost.seconds > amx[1].cost.seconds


sizes = st.fixed_dictionaries(
    {
        "width": st.integers(1, 4096),
        "bags": st.integers(1, 64),
        "latents": st.integers(1, 256),
        "heads": st.integers(1, 16),
        "head_dim": st.integers(1, 128),
        "layers": st.integers(1, 8),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
        "device": st.sampled_from([*CPUS, *CHIPS]),
        "training": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.1]),
        "weights": st.booleans(),
        "tokens_need_grad": st.booleans(),
    }
)


@given(st.integers(1, 10**6), st.integers(1, 10**6), sizes, st.booleans())
def test_the_least_predicted_time_is_chosen_and_grows_with_the_tokens(
    fewer: int, more: int, options: dict[str, Any], shared: bool
) -> None:
    fewer, more = sorted((fewer, more))
    options["weight_sets"] = 1 if shared else options["layers"]
    small, large = (plan(tokens, **options) for tokens in (fewer, more))
    assert small == plan(fewer, **options)
    for chosen in (small, large):
        assert tuple(chosen.costs) == STRATEGIES
        assert chosen.strategy in ("cached", "absorbed")
        fastest = min(chosen.costs[name].seconds for name in ("cached", "absorbed"))
        assert chosen.cost.seconds == fastest
        for cost in chosen.costs.values():
            assert min(dataclasses.astuple(cost)) > 0
    for name, field in itertools.product(STRATEGIES, ("flop", "bytes", "seconds", "graph_seconds")):
        assert getattr(small.costs[name], field) <= getattr(large.costs[name], field)


def test_a_graph_may_choose_otherwise_than_eager_mode() -> None:
    """Eager mode takes the strategy with fewer launches, since the GPU waits for Python."""
    options = {"training": True, "dtype": torch.bfloat16, "device": "H200"} | TCGA["16x103"][1]
    eager, graph = (planned(16_000, graph=graph, **options) for graph in (False, True))
    assert (eager.strategy, graph.strategy) == ("cached", "absorbed")
    assert eager.costs == graph.costs
    for chosen, field in ((eager, "seconds"), (graph, "graph_seconds")):
        assert getattr(chosen.cost, field) == min(
            getattr(chosen.costs[name], field) for name in ("cached", "absorbed")
        )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tokens", [100, 10_000, 1_000_000])
def test_eager_mode_waits_for_python_or_for_the_gpu(tokens: int, training: bool) -> None:
    for cost in planned(tokens, device="H200", training=training).costs.values():
        longer = max(cost.host_seconds, cost.graph_seconds)
        assert longer <= cost.seconds <= cost.host_seconds + cost.graph_seconds


# Launches (cached, absorbed) by (layers, weight sets), as test_launch_counts.py counts them.
LAUNCHES = {
    (1, 1): (33, 37), (2, 1): (44, 59), (3, 1): (54, 81), (5, 1): (74, 125),
    (2, 2): (49, 59), (3, 3): (62, 81), (5, 5): (88, 125),
}  # fmt: skip


@pytest.mark.parametrize(("layers", "sets"), LAUNCHES)
def test_launches_are_those_of_a_training_step_of_healnet(layers: int, sets: int) -> None:
    size = {"layers": layers, "weight_sets": sets, "device": "H200", "training": True}
    costs, dropping = planned(**size).costs, planned(**size, dropout=0.1).costs
    known = planned(**size, statistics=True).costs
    for name, count in zip(("cached", "absorbed"), LAUNCHES[layers, sets], strict=True):
        assert costs[name].launches == count
        assert dropping[name].launches == count + 1
        assert known[name].launches == count - 1
        assert known[name].bytes == costs[name].bytes - 30_000 * 2048 * 4


def test_blocks_of_outputs_are_paid_for_whole() -> None:
    """17 latents and 8 heads are 136 queries: they take blocks of 128 and 16, not 256."""
    for outputs, hopper, ampere in (
        (1, 16, 16), (64, 64, 64), (65, 80, 80), (128, 128, 128), (136, 144, 144),
        (200, 256, 256), (256, 256, 256), (512, 512, 512), (1024, 1024, 1024),
    ):  # fmt: skip
        assert (padded_columns(outputs, 90), padded_columns(outputs, 80)) == (hopper, ampere)
    for outputs in range(1, 2000):
        for capability in (80, 90, 100):
            assert outputs <= padded_columns(outputs, capability) < outputs + 272


def test_a_chip_says_which_of_its_numbers_are_measured() -> None:
    for name, chip in CHIPS.items():
        measured = "measured" if name == "H200" else "predicted"
        assert chip.name == name
        for field in ("bandwidth", "matrix", "launch_s", "softmax_gradient_kernel"):
            assert chip.source(field) == measured
        assert chip.source("shared_bytes") == "data sheet"
        assert chip.source("project_kernel") == "predicted"  # rewritten since the measurement
        assert all(0 < share <= 1 for share in chip.shares.values())
    slow = dataclasses.replace(CHIPS["H200"], name="mine", shares={"project_kernel": 0.01})
    chosen = planned(device=slow)
    assert chosen.machine == "mine"
    assert chosen.cost.graph_seconds > planned(device="H200").cost.graph_seconds


def test_a_plan_is_quick() -> None:
    """Every forward pass makes a plan in tens of microseconds; the bound here is 1 ms."""
    times = timeit.repeat(lambda: planned(device="H200", training=True), number=10, repeat=9)
    assert min(times) / 10 < 1e-3


@pytest.mark.parametrize("strategy", ["cached", "absorbed"])
@pytest.mark.parametrize("device", [CPUS[0], "H200"], ids=str)
def test_what_is_asked_for_beyond_the_forward_pass_costs(strategy: str, device) -> None:
    def seconds(**options: Any) -> float:
        return planned(device=device, **options).costs[strategy].seconds

    plain, training = seconds(), seconds(training=True)
    assert plain < training
    assert seconds(weights=True) > plain
    assert seconds(dropout=0.1) == plain  # costs in training only
    assert seconds(training=True, dropout=0.1) > training
    assert seconds(training=True, tokens_need_grad=True) >= training
    assert seconds(layers=4) > plain
    assert seconds(layers=4, weight_sets=4) >= seconds(layers=4)


@pytest.mark.parametrize("device", ["cpu", "H200"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("strategy", "tokens", "longest"),
    [("nothing", 0, None), ("nothing", 0, 0), ("one token", 8, 1), ("one token", 3, 1)],
)
def test_degenerate_cases(strategy, tokens: int, longest, training: bool, device: str) -> None:
    chosen = planned(tokens, longest=longest, training=training, device=device)
    assert chosen.strategy == strategy
    assert tuple(chosen.costs) == (strategy,)
    assert "no bag has" in chosen.reason
    assert strategy in str(chosen)
    assert chosen.cost.seconds < planned(8, device=device, training=training).cost.seconds


def test_a_longest_bag_of_two_tokens_is_no_degenerate_case() -> None:
    assert planned(8, longest=2).strategy in ("cached", "absorbed")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_asked_for_is_chosen(strategy) -> None:
    chosen = planned(strategy=strategy, device="H200")
    assert (chosen.strategy, chosen.reason) == (strategy, "set by strategy=")
    assert chosen.costs == planned(device="H200").costs


@pytest.mark.parametrize("backend", ["auto", "triton", "compile", "eager"])
def test_it_prints_why(backend) -> None:
    for strategy in (None, *STRATEGIES):
        chosen = planned(strategy=strategy, backend=backend, device="H200")
        first, *rows = str(chosen).splitlines()
        assert first == f"{chosen.strategy} on H200, backend {backend}: {chosen.reason}"
        assert [row[2:].split()[0] for row in rows] == list(STRATEGIES)
        assert [row[0] for row in rows] == [
            "*" if name == chosen.strategy else " " for name in STRATEGIES
        ]
        for row, cost in zip(rows, chosen.costs.values(), strict=True):
            _, flop, _, moved, _, ms, *_ = row[2:].split()
            assert float(flop) == pytest.approx(cost.flop / 1e9, abs=0.01)
            assert float(moved) == pytest.approx(cost.bytes / 1e9, abs=0.001)
            assert float(ms) == pytest.approx(1e3 * cost.seconds, abs=0.001)


def test_a_plan_is_a_value() -> None:
    chosen = planned(device="H200")
    assert chosen == planned(device="H200")
    assert isinstance(chosen.cost, Cost)
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.strategy = "cached"  # pyright: ignore


def test_a_machine_of_ones_own() -> None:
    slow = dataclasses.replace(CPUS[0], name="mine", flops=dict.fromkeys(CPUS[0].flops, 1e9))
    chosen = planned(device=slow)
    assert chosen.machine == "mine"
    assert chosen.cost.seconds > planned(device=CPUS[0]).cost.seconds


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("strategy: expected None, 'cached', 'absorbed' or 'reference'", {"strategy": "fast"}),
        ("backend: expected 'auto', 'triton', 'compile' or 'eager'", {"backend": "cuda"}),
        ("device: expected one of 'cpu', 'cuda', 'A100'", {"device": "tpu"}),
        ("device: expected one of", {"device": "nvidia h200"}),
        ("dtype: expected", {"dtype": torch.int64}),
    ],
)
def test_refusals(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        planned(**options)
