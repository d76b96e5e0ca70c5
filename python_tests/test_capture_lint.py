"""All that StepGraphs and CudaGraphs capture passes the lint.

For what they do not capture, see `test_what_is_not_captured_says_why` in test_graphs.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import motet
import pytest
import torch
from motet.fusion.capture import Recording
from motet.fusion.objectives import Classification, CoxSurvival, DiscreteSurvival
from motet.fusion.survival import TimeBins
from motet.kernels.absorbed_attention import operator as absorbed_attention
from motet.kernels.latent_attention import operator as latent_attention
from torch import Tensor

from .capture_lint import CaptureLint
from .fake_capture import FakeCapture
from .graph_helpers import MODELS, batch_of, lego, loss_of, only, rename


class LintingCapture(FakeCapture):
    """A FakeCapture that raises for operators that a CUDA graph cannot hold."""

    def __call__(self, run: Callable[[], Any], state: Sequence[Tensor]) -> Recording:
        def linted() -> Any:
            with CaptureLint():
                return run()

        return super().__call__(linted, state)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the checks that read values only on the CPU."""
    for operator in (latent_attention, absorbed_attention):
        monkeypatch.setattr(operator, "check_counts", lambda *_: None)


@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_steps(name: str, training: bool, scale: float | None) -> None:
    """Steps with L1, dropout, missing tables, empty bags and positions pass the lint."""
    make, of = MODELS[name]
    model, capture = make().train(training), LintingCapture()
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.3
    complete = name in ("a table alone", "an encoder")
    batch = of(batch_of(9, 0, 30, coords="weights" in name, missing=not complete))
    steps = motet.StepGraphs(model, loss_of, l1=0.1, capture=capture)
    factor = {} if scale is None else {"scale": torch.tensor(scale)}
    for _ in range(2):
        steps(batch, **factor)
    assert capture.captured == 1


@pytest.mark.parametrize("name", MODELS)
def test_predictions(name: str) -> None:
    make, of = MODELS[name]
    model, capture = make().eval(), LintingCapture()
    batch = of(batch_of(9, 0, 30, coords="weights" in name, missing=False))
    inputs, options = batch.arguments()
    graphs = motet.CudaGraphs(model, capture=capture)
    with torch.no_grad():
        for _ in range(2):
            graphs(rename(model, inputs), **rename(model, options, deep=True))
    assert capture.captured == 1


@pytest.mark.parametrize("method", ["harmonic", "mean", "sum", "product", "upstream-harmonic"])
def test_merges_of_whole_rows(method: str) -> None:
    model, capture = (
        motet.LegoMerge(dict(lego("merge").blocks.items()), method=method).eval(),
        LintingCapture(),
    )
    graphs = motet.CudaGraphs(model, capture=capture)
    inputs = {"omic": torch.randn(3, 7).double(), "wsi": torch.randn(3, 9, 6).double()}
    with torch.no_grad():
        for _ in range(2):
            graphs(inputs)
    assert capture.captured == 1


OBJECTIVES = {
    "nll": (DiscreteSurvival(TimeBins((1.0, 2.0)), 9.0, (1.0, 2.0, 3.0), 0.4),
            {"bins": torch.tensor([0, 2, 1]), "events": torch.tensor([True, False, True])}),
    "cox": (CoxSurvival(), {"times": torch.tensor([2.0, 2.0, 1.0]).double(),
                            "events": torch.tensor([True, True, False])}),
    "classes": (Classification(3, (1.0, 2.0, 3.0)), {"labels": torch.tensor([0, 2, 1])}),
}  # fmt: skip


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_objectives(kind: str, dtype: torch.dtype | None) -> None:
    objective, target = OBJECTIVES[kind]
    width = objective.out_features
    model = motet.HEALNet({"omic": motet.Tabular(7)}, out_features=width, num_latents=4).train()
    capture = LintingCapture()
    steps = motet.StepGraphs(model, objective.loss, autocast=dtype, capture=capture)
    batch = only(batch_of(9, 0, 30, missing=False), "omic")
    batch.x["omic"] = batch.x["omic"].float()
    batch.target.clear()
    batch.target.update(target)
    losses = [steps(batch) for _ in range(2)]
    torch.testing.assert_close(*losses)
    assert capture.captured == 1


X = torch.randn(4)


@pytest.mark.parametrize(
    ("why", "call"),
    [
        ("waits for a value", lambda: X.sum().item()),
        ("waits for a value", lambda: bool((X > 0).all())),
        ("waits for a value", lambda: torch.equal(X, X)),
        ("waits for a value", lambda: X.nonzero()),
        ("waits for a value", lambda: X.masked_select(X > 0)),
        ("waits for a value", lambda: X.unique()),
        ("waits for a value", lambda: X.unique_consecutive()),
        ("waits for the number of True", lambda: X[X > 0]),
        ("waits for the number of True", lambda: X.index_put((X > 0,), X[:1])),
        ("waits for the largest", lambda: X.index_put((torch.arange(2),), X[:2], accumulate=True)),
        ("waits for the size", lambda: X.repeat_interleave(torch.ones(4).long())),
        ("copies numbers", lambda: torch.tensor([1.0])),
        ("copies numbers", lambda: torch.as_tensor((1.0, 2.0))),
        ("copies between devices", lambda: X.to("meta")),
        ("mixes devices", lambda: torch.empty(4, device="meta").copy_(X)),
    ],
)  # fmt: skip
def test_the_lint_finds(why: str, call: Callable[[], Any]) -> None:
    with pytest.raises(AssertionError, match=why), CaptureLint():
        call()


def test_the_lint_lets_pass() -> None:
    with CaptureLint():
        x = X.clone().requires_grad_()
        y = x[torch.arange(3)] + x.new_full((), 2.0) + x.repeat_interleave(
            torch.ones(4).long(), output_size=4
        )[:3]  # fmt: skip
        torch.autograd.grad(y.masked_fill(y > 0, 0).sum(), x)
