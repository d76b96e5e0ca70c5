"""How many kernels a training step starts on a GPU, counted without one.

A GPU waits for Python between small kernels: a launch costs the host 54 to 76 us, most kernels of a
step the GPU less than 10. Forward, loss, backward and fused Adam run on CPU tensors that say that
they are on a GPU; Triton's launches are recorded, not run, and torch's operators are counted unless
they are views or allocate. What a GPU starts beside that, fills and second kernels of cuBLAS, is 5
to 10 % more.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import motet
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if torch.cuda.is_available():
    pytest.skip("the interpreter would take the GPU's kernels over", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # as the other tests of kernels, which share their modules
pytest.importorskip("triton")

from benchmarks.launches import LAUNCHERS
from motet.cli.measure import CONFIGS, Config
from motet.fusion import attention_forms
from motet.kernels import backends, plan
from motet.kernels.absorbed_attention import heads as heads_operator
from motet.kernels.absorbed_attention import operator as absorbed
from motet.kernels.context_kv import operator as context
from motet.kernels.fold_norm import operator as fold
from motet.kernels.harmonic_merge import operator as merge
from motet.kernels.head import operator as head
from motet.kernels.latent_attention import checks, records
from motet.kernels.latent_attention import operator as attention
from motet.kernels.lego_pass import operator as lego
from motet.kernels.plan import Strategy
from motet.kernels.row_statistics import operator as rows
from triton.runtime.interpreter import InterpretedFunction

OPERATORS: dict[str, Callable[..., Any]] = {
    "absorbed_attention": absorbed._forward,
    "absorbed_attention_backward": absorbed._backward_of,
    "absorbed_heads": heads_operator._forward,
    "absorbed_heads_backward": heads_operator._backward_of,
    "context_kv": context._forward,
    "context_kv_backward": context._backward_rows,
    "fold_norm": fold._forward,
    "fold_norm_backward": fold._backward_of,
    "head": head._forward,
    "head_backward": head._backward_of,
    "harmonic_merge": merge._forward,
    "harmonic_merge_backward": merge._backward_of,
    "kv_records": records._forward,
    "kv_records_backward": records._backward_of,
    "latent_attention": attention._forward,
    "latent_attention_backward": attention._backward_of,
    "latent_attention_kv": attention._forward_kv,
    "latent_attention_kv_backward": attention._backward_of_kv,
    "latent_self_attention": attention._forward_self,
    "latent_self_attention_backward": attention._backward_of_self,
    "lego_pass": lego._forward,
    "lego_pass_backward": lego._backward_of,
    "row_statistics": rows._forward,
}
FREE = ("detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "_unsafe_view")
ROWS, PATCHES, WIDTH = 8, 300, 2048


class Launches(TorchDispatchMode):
    """Collects the names of the kernels that a GPU would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "motet":
            with self:  # counts the operators that it calls
                return OPERATORS[name](*args)
        if not (func.is_view or name in FREE or name.startswith("_record_function")):
            self.names.append(name)
        if func is torch.ops.aten.mm.dtype:  # which CUDA alone has
            return args[0].to(args[2]) @ args[1].to(args[2])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Let CPU tensors pass for those of a Hopper GPU, and record what they would launch."""
    mode = Launches()

    def record(self, *args, grid, warmup, **kwargs):
        mode.names.append(f"triton {self.fn.__name__}")

    monkeypatch.setattr(InterpretedFunction, "run", record)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    monkeypatch.setattr(backends, "_why_not", lambda *_: "")
    for launchers in LAUNCHERS:
        for name, value in (("capability", 90), ("multiprocessors", 132)):
            if hasattr(launchers, name):
                monkeypatch.setattr(launchers, name, lambda _, value=value: value)
    monkeypatch.setattr(merge, "native", lambda: None)
    # These read offsets of CPU tensors.
    monkeypatch.setattr(checks, "check_offsets", lambda *_, **__: None)
    for operator in (absorbed, context, heads_operator, rows):
        monkeypatch.setattr(operator, "check_rows", lambda *_, **__: None)
    monkeypatch.setattr(
        attention_forms, "plan", lambda *a, **options: plan(*a, **(options | {"device": "H200"}))
    )
    filling = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # which fill new tensors
    yield mode
    torch.use_deterministic_algorithms(filling)


def step(mode: Launches, model: nn.Module, call: Callable[[], Tensor]) -> dict[str, list[str]]:
    """Return the launches of the forward pass, the loss, the backward pass and the optimiser."""
    optimiser = torch.optim.Adam(model.parameters(), fused=True)
    targets, counts = torch.zeros(ROWS, dtype=torch.int64), [0]
    for _ in range(2):  # Adam's state is made at its first step
        mode.names, counts[:] = [], [0]
        optimiser.zero_grad()
        with mode:
            with torch.autocast("cpu", torch.bfloat16):
                logits = call()
                counts.append(len(mode.names))
                loss = nn.functional.cross_entropy(logits, targets)
            counts.append(len(mode.names))
            loss.backward()
            counts.append(len(mode.names))
            optimiser.step()
        counts.append(len(mode.names))
    names = ("forward", "loss", "backward", "optimiser")
    parts = zip(names, counts[:-1], counts[1:], strict=True)
    return {name: mode.names[start:stop] for name, start, stop in parts}


def print_row(name: str, launched: dict[str, list[str]]) -> int:
    """Print a row of the table (shown by `pytest -s`), and return the number of launches."""
    total = sum(map(len, launched.values()))
    print(f"{name:34} {total:4}", {part: len(names) for part, names in launched.items()})
    for part, names in launched.items():
        print(
            f"    {part}:", ", ".join(f"{n} {kernel}" for kernel, n in Counter(names).most_common())
        )
    return total


def healnet(config: Config, dropout: float = 0.0, **options: Any) -> motet.HEALNet:
    return motet.HEALNet(
        options.pop("modalities", {"wsi": motet.Bag(WIDTH)}), out_features=4, depth=2,
        num_latents=config.latents, latent_dim=config.latent_dim, heads=config.heads,
        head_dim=config.head_dim, attn_dropout=dropout, ff_dropout=dropout, **options,
    )  # fmt: skip


def bag() -> Tensor:
    return torch.randn(ROWS, PATCHES, WIDTH, dtype=torch.bfloat16)


# The counts reached today; the goal is at most 60. `pytest -s` lists them.
MOST = {"cached": 44, "absorbed": 59}


OTHERS = {
    "HEALNet with a table": 63, "HEALNet with self-attention": 100, "LegoMerge": 137,
    "LegoFuse": 119, "LegoBlock": 76,
}  # fmt: skip


@pytest.mark.parametrize("strategy", ["cached", "absorbed"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_healnet(launches: Launches, name: str, strategy: Strategy, dropout: float) -> None:
    """The four cohorts at depth 2, a bag of patches for each of 8 patients."""
    model, x = healnet(CONFIGS[name], dropout), bag()
    launched = step(launches, model, lambda: model({"wsi": x}, strategy=strategy))
    total = print_row(f"{name} {strategy} dropout {dropout}", launched)
    totals = Counter(name for names in launched.values() for name in names)
    # Passes: the first queries, and one update after each of two attentions. Only a pass with
    # attention has an update_backward, and only a pass with queries a query_backward.
    assert totals["triton pass_kernel"] == totals["triton gradients_kernel"] == 3
    assert totals["triton update_backward_kernel"] == totals["triton query_backward_kernel"] == 2
    assert totals["randint"] == (dropout > 0)  # for all masks of the step
    assert total <= MOST[strategy] + (dropout > 0)


def test_other_models(launches: Launches) -> None:
    """Launches with a table beside the bag, with latent self-attention, and of the Lego models."""
    config = CONFIGS["blca"]
    both = {"omic": motet.Tabular(300), "wsi": motet.Bag(WIDTH)}
    inputs = {"omic": torch.randn(ROWS, 300), "wsi": bag()}
    sizes: dict[str, Any] = {"num_latents": 17, "latent_dim": 126, "out_features": 4, "depth": 2}
    blocks = {
        name: motet.LegoBlock(modality, fft="latents", normalise=True, **sizes)
        for name, modality in both.items()
    }
    models = {
        "HEALNet with a table": healnet(config, modalities=both),
        "HEALNet with self-attention": healnet(config, modalities=both, self_attention=1),
        "LegoMerge": motet.LegoMerge(blocks),
        "LegoFuse": motet.LegoFuse(blocks),
        "LegoBlock": motet.LegoMerge({"wsi": blocks["wsi"]}),
    }
    for name, model in models.items():
        given = {key: inputs[key] for key in inputs if name != "LegoBlock" or key == "wsi"}
        launched = step(launches, model, lambda m=model, x=given: m(x, strategy="cached"))
        assert print_row(name, launched) <= OTHERS[name]
