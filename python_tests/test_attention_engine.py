"""HEALNet gives the same results with every strategy, in any precision, layout and mode."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import motet
import pytest
import torch
from motet.fusion.attention import Attention
from motet.fusion.attention_forms import (
    AbsorbedKeys,
    BatchedAbsorbedKeys,
    BatchedKeys,
    CachedKeys,
    OneTokenKeys,
    ReferenceKeys,
    prepare,
)
from motet.fusion.context import Context
from torch import Tensor
from torch.func import functional_call

from .comparison import EXACT, Function, assert_as_good_as, with_gradients
from .conftest import ROWS, assert_leaves_no_trace, offsets_of, randomised, rows_of
from .upstream_helpers import HEALNETS, TOLERANCE, load

STRATEGIES = ["cached", "absorbed", None]
NAMES = {None: "planned"}.get
LAYOUTS = ["dense", "masked", "jagged"]
OPERATORS = ["context_kv", "latent_attention", "absorbed_attention"]
WIDE = {"dtype": torch.float64}


def named(strategy: str | None) -> str:
    return strategy or "planned"


def model_of(dtype: torch.dtype = torch.float64, **options: Any) -> motet.HEALNet:
    modalities = {
        "omic": motet.Tabular(7),
        "genes": motet.Tabular(5, tokens="features"),
        "wsi": motet.Bag(6),
        "cells": motet.Bag(4, coords=2, extent=100.0),
        "mri": motet.Grid(1, axes=2),
    }
    options = {"num_latents": 5, "latent_dim": 12, "heads": 2, "head_dim": 4, **options}
    return randomised(motet.HEALNet(modalities, out_features=3, **options).to(dtype))


def inputs_of(
    layout: str = "dense", dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return inputs of three rows and their options; unless dense, row 1 has no slide."""
    shapes = {"omic": (3, 7), "genes": (3, 5), "wsi": (3, 9, 6), "cells": (3, 4, 4)}
    inputs = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    inputs["mri"] = torch.randn(3, 2, 3, 1).to(dtype)
    described: dict[str, Any] = {"coords": {"cells": 100 * torch.rand(3, 4, 2).to(dtype)}}
    if layout == "masked":
        described["masks"] = {"wsi": torch.arange(9) < torch.tensor([9, 0, 1])[:, None]}
        described["present"] = {"omic": torch.tensor([True, False, True])}
    return inputs, described


def run_of(
    model: motet.HEALNet, layout: str = "dense", autocast: torch.dtype | None = None, **options: Any
) -> tuple[Function, list[Tensor]]:
    """Return a function of all parameters and inputs, and the tensors to call it with."""
    parameters = dict(model.named_parameters())
    inputs, described = inputs_of(layout, model.latents.dtype)

    def run(*tensors: Tensor) -> Tensor:
        weights = dict(zip(parameters, tensors, strict=False))
        features = dict(zip(inputs, tensors[len(weights) :], strict=True))
        if layout == "jagged":
            bags = [features["wsi"][0], features["wsi"][1, :0], features["wsi"][2, :1]]
            features["wsi"] = torch.nested.as_nested_tensor(bags, layout=torch.jagged)
        dtype = tensors[0].dtype
        fields = {**described, "coords": {"cells": described["coords"]["cells"].to(dtype)}}
        low = autocast and dtype != torch.float64
        with torch.autocast("cpu", autocast) if low else nullcontext():
            return functional_call(model, weights, (features,), {**fields, **options})

    return run, [*(p.detach() for p in parameters.values()), *inputs.values()]


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("strategy", STRATEGIES, ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 3, "share_weights": False},
        {"depth": 3, "share_weights": "all-but-first", "self_attention": 1, "temperature": 0.5},
    ],
    ids=["shared", "unshared", "all but first"],
)
def test_every_strategy_is_the_reference(options, layout: str, strategy) -> None:
    """Outputs and the gradients of all parameters and inputs equal the reference's."""
    model = model_of(**options)
    torch.manual_seed(0)
    actual, args = run_of(model, layout, strategy=strategy)
    torch.manual_seed(0)
    expected, _ = run_of(model, layout, strategy="reference")
    torch.testing.assert_close(
        with_gradients(actual)(*args), with_gradients(expected)(*args), **EXACT
    )


@pytest.mark.parametrize("strategy", STRATEGIES, ids=named)
@pytest.mark.parametrize("name", HEALNETS)
def test_every_strategy_is_the_authors_code(name: str, strategy) -> None:
    """Outputs, latents and every gradient equal those of the golden files."""
    golden = load(name)
    model = golden.model()
    masks = [golden.tensors["mask"]] if "mask" in golden.tensors else None
    out = model(golden.inputs, masks=masks, return_latents=True, strategy=strategy)
    close = {"rtol": 0, "atol": TOLERANCE}
    torch.testing.assert_close(out.logits, golden.tensors["logits"], **close)
    torch.testing.assert_close(out.latents, golden.tensors["latents"], **close)
    (out.logits * golden.tensors["r"]).sum().backward()
    holder = copy.deepcopy(model)
    for held, parameter in zip(holder.parameters(), model.parameters(), strict=True):
        held.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = motet.to_upstream(holder)
    for key, value in golden.tensors.items():
        if key.startswith("grad."):
            torch.testing.assert_close(gradients[key[5:]], value, **close)


@pytest.fixture
def _compiled_in_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run functions without compiling them: compilation takes half a minute per model."""
    for name in OPERATORS:
        module = import_module(f"motet.kernels.{name}.operator")
        monkeypatch.setattr(module, "compiled", lambda function: function)


@pytest.mark.usefixtures("_compiled_in_name_only")
@pytest.mark.parametrize("strategy", ["cached", "absorbed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_every_backend_is_the_reference(backend: str, layout: str, strategy: str) -> None:
    model = model_of(depth=2, share_weights=False)
    torch.manual_seed(0)
    actual, args = run_of(model, layout, strategy=strategy, backend=backend)
    torch.manual_seed(0)
    expected, _ = run_of(model, layout, strategy="reference")
    torch.testing.assert_close(
        with_gradients(actual)(*args), with_gradients(expected)(*args), **EXACT
    )


@pytest.mark.parametrize("strategy", STRATEGIES, ids=named)
def test_what_is_chosen(strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The requested strategy is used, except if every row has at most one token."""
    torch.manual_seed(0)
    attentions = [
        Attention(12, 6, heads=2, head_dim=4).double(),
        Attention(12, 6, heads=2, head_dim=4).double(),
    ]
    several = Context(torch.randn(3, 5, 6, **WIDE))
    one = Context(torch.randn(3, 1, 6, **WIDE), single=True)

    def kinds(context: Context, strategy) -> set[type]:
        return {type(key) for key in prepare(context, attentions, latents=5, strategy=strategy)}

    expected = {"cached": {CachedKeys}, "absorbed": {AbsorbedKeys}}
    if strategy:
        assert kinds(several, strategy) == expected[strategy]
    else:
        assert kinds(several, None) <= {BatchedKeys, BatchedAbsorbedKeys}
        offsets = offsets_of([20, 0, 7])
        assert kinds(Context(torch.randn(27, 6, **WIDE), offsets=offsets), None) <= {
            CachedKeys,
            AbsorbedKeys,
        }
        assert kinds(Context(torch.randn(3, 300, 6, **WIDE)), None) <= {CachedKeys, AbsorbedKeys}
    assert kinds(one, strategy) == {OneTokenKeys}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("form", [BatchedKeys, BatchedAbsorbedKeys])
def test_short_bags_together(form: Any, counted: bool, shared: bool) -> None:
    """The heads' output, the weights and all gradients equal those of the equation."""
    attention = randomised(Attention(12, 6, heads=2, head_dim=4).double())
    queries = torch.randn(1 if shared else 3, 5, 8, **WIDE)
    counts = torch.randint(1, 4, (3, 9)).double() if counted else None
    parameters = [
        p for name, p in attention.named_parameters() if "context" in name or "kv" in name
    ]

    def run(literal: bool, tokens: Tensor, queries: Tensor) -> list[Tensor]:
        context, row_queries = Context(tokens, counts=counts), queries
        if literal:
            keys: Any = ReferenceKeys(context, attention)
            row_queries = queries.expand(3, -1, -1)
        elif form is BatchedKeys:
            keys = BatchedKeys(context, attention)
        else:
            keys = BatchedAbsorbedKeys(context, torch.nn.functional.layer_norm(tokens, (6,)))
        out = keys.attend(attention, row_queries)
        grads = torch.autograd.grad(
            (out * out.detach().cos()).sum(), [tokens, queries, *parameters], retain_graph=True
        )
        if counted:
            return [out, *grads]
        return [out, *grads, keys.weights(attention, row_queries.detach())]

    tokens = torch.randn(3, 9, 6, **WIDE).requires_grad_()
    expected = run(True, tokens, queries.requires_grad_())
    torch.testing.assert_close(run(False, tokens, queries), expected, rtol=0, atol=1e-12)


def test_the_reference_is_literal_everywhere() -> None:
    """The reference takes no shortcut, even for single tokens: fast forms are tested against it."""
    attention = Attention(12, 6, heads=2, head_dim=4).double()
    latents = torch.randn(5, 12, **WIDE)
    for context in (
        Context(torch.randn(3, 9, 6, **WIDE)),
        Context(torch.randn(3, 1, 6, **WIDE), single=True),
        Context(torch.randn(0, 6, **WIDE), offsets=offsets_of([0, 0, 0])),
    ):
        (keys,) = prepare(context, [attention], latents=latents.shape[-2], strategy="reference")
        assert isinstance(keys, ReferenceKeys)


MODELS = 4


def models_of(
    dtype: torch.dtype, kind: float | str, autocast: torch.dtype | None = None, **options: Any
) -> tuple[Function, list[Tensor]]:
    """Return several models' logits as a function of their stacked parameters, and these."""
    torch.manual_seed(0)
    modalities = {"wsi": motet.Bag(32), "cells": motet.Bag(16, coords=2, extent=100.0)}
    sizes = {"num_latents": 6, "latent_dim": 24, "heads": 2, "head_dim": 8, "snn": False}
    model = motet.HEALNet(modalities, out_features=4, share_weights=False, **sizes)
    names = [name for name, _ in model.named_parameters()]
    copies = [randomised(copy.deepcopy(model), seed).to(dtype) for seed in range(MODELS)]
    stacked = [torch.stack([m.get_parameter(name) for m in copies]).detach() for name in names]
    inputs = {"wsi": rows_of(kind, MODELS, 3, 40, 32, dtype=dtype)}
    inputs["cells"] = rows_of(kind, MODELS, 3, 20, 16, dtype=dtype)
    coords = 100 * torch.rand(3, 20, 2).to(dtype)
    masks = {"wsi": torch.arange(40) < torch.tensor([40, 0, 17])[:, None]}

    def run(*weights: Tensor) -> Tensor:
        run_dtype = weights[0].dtype
        options_ = {**options, "masks": masks, "coords": {"cells": coords.to(run_dtype)}}
        low = autocast and run_dtype != torch.float64
        logits = []
        for i in range(MODELS):
            one = dict(zip(names, (weight[i] for weight in weights), strict=True))
            features = {name: x[i].to(run_dtype) for name, x in inputs.items()}
            with torch.autocast("cpu", autocast) if low else nullcontext():
                logits.append(functional_call(model, one, (features,), options_))
        return torch.stack(logits)

    return run, stacked


PRECISIONS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast to bfloat16": (torch.float32, torch.bfloat16),
    "autocast to float16": (torch.float32, torch.float16),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("strategy", ["cached", "absorbed"])
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_strategy_is_as_good_as_the_reference(
    precision: str, kind, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and the gradients of all parameters, with a missing and a partly masked bag.

    LeakyReLU and SELU are left out: at their kink, rounding decides between two slopes.
    """
    monkeypatch.setattr("torch.nn.functional.leaky_relu", lambda x: x)
    dtype, autocast = PRECISIONS[precision]
    actual, stacked = models_of(dtype, kind, autocast, strategy=strategy)
    expected, _ = models_of(dtype, kind, autocast, strategy="reference")
    functions = (with_gradients(actual), with_gradients(expected))
    assert_as_good_as(*functions, *stacked, worked_in=autocast or dtype, rms=True)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_is_the_references_and_changes_no_logit(layout: str, strategy) -> None:
    model = model_of(depth=3, share_weights=False)
    torch.manual_seed(0)
    plain, args = run_of(model, layout, strategy=strategy)
    torch.manual_seed(0)
    returning, _ = run_of(model, layout, strategy=strategy, return_attention=True)
    torch.manual_seed(0)
    reference, _ = run_of(model, layout, strategy="reference", return_attention=True)
    logits, out, expected = plain(*args), returning(*args), reference(*args)
    assert torch.equal(out.logits, logits)
    assert out.attention.keys() == expected.attention.keys()
    for name, layers in out.attention.items():
        assert len(layers) == 3
        for layer, reference_layer in zip(layers, expected.attention[name], strict=True):
            pairs = zip(parts(layer), parts(reference_layer), strict=True)
            for actual_rows, expected_rows in pairs:
                torch.testing.assert_close(actual_rows, expected_rows, **EXACT)
            assert not layer.requires_grad


def parts(weights: Tensor) -> list[Tensor]:
    return list(weights.detach().unbind()) if weights.is_nested else [weights.detach()]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_sums_to_1_over_the_tokens_of_a_row(layout: str, strategy) -> None:
    run, args = run_of(model_of(), layout, strategy=strategy, return_attention=True)
    for name, layers in run(*args).attention.items():
        for weights in layers:
            ragged = weights.is_nested
            for i, row in enumerate(weights.unbind() if ragged else weights):
                sums = row.sum(0 if ragged else -1)
                missing = i == 1 and {"masked": name in ("wsi", "omic")}.get(
                    layout, layout == "jagged" and name == "wsi"
                )
                torch.testing.assert_close(sums, torch.full_like(sums, not missing), **EXACT)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_state_survives_a_call(layout: str, strategy) -> None:
    run, args = run_of(model_of(depth=2), layout, strategy=strategy)
    assert_leaves_no_trace(run, *args)
    with torch.no_grad():
        expected = run(*args)
    with torch.inference_mode():
        assert torch.equal(run(*args), expected)
    needed = [a.clone().requires_grad_() for a in args]
    torch.testing.assert_close(run(*needed).detach(), expected, **EXACT)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "reference"], ids=named)
def test_the_smallest_batches(strategy) -> None:
    """Batches without rows, without tokens, and with one row of one token are computed."""
    model = model_of()
    run, args = run_of(model, strategy=strategy)
    count = len(list(model.parameters()))
    inputs, described = inputs_of()
    nobody = {name: x[:0] for name, x in inputs.items()}
    coords = {"cells": described["coords"]["cells"][:0]}
    assert model(nobody, coords=coords, strategy=strategy).shape == (0, 3)
    absent = {name: torch.zeros(3, dtype=torch.bool) for name in inputs}
    out = model(inputs, present=absent, strategy=strategy, **described)
    torch.testing.assert_close(out, model.head(model.latents.expand(3, -1, -1)), **EXACT)
    out.sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert gradients["latents"].any()
    assert all(g is None or not g.any() for n, g in gradients.items() if n.startswith("layers"))
    one = model({"wsi": inputs["wsi"][:1, :1]}, strategy=strategy)
    torch.testing.assert_close(
        one, model({"wsi": inputs["wsi"][:1, :1]}, strategy="reference"), **EXACT
    )
    assert run(*args).shape == (3, 3)
    assert len(args) == count + len(inputs)


def one_attention(dropout: float, single: bool = False):
    torch.manual_seed(1)
    attention = Attention(12, 6, heads=2, head_dim=4, dropout=dropout).double()
    randomised(attention).train()
    context = Context(torch.randn(3, 1 if single else 20, 6, **WIDE), single=single)
    return attention, context, torch.randn(3, 5, 12, **WIDE)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "reference"], ids=named)
def test_dropout_keeps_the_mean(strategy, single: bool) -> None:
    attention, context, latents = one_attention(0.4, single)
    with torch.no_grad():
        (keys,) = prepare(context, [attention], latents=latents.shape[-2], strategy=strategy)
        draws = torch.stack(
            [keys.attend(attention, attention.compute_queries(latents)) for _ in range(400)]
        )
        attention.eval()
        expected = keys.attend(attention, attention.compute_queries(latents))
    error = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)
    assert error.abs().max() < 5
    assert draws.std(0).min() > 0
    assert not torch.equal(draws[0], draws[1])  # each layer has another mask


@pytest.mark.parametrize("strategy", [*STRATEGIES, "reference"], ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_follows_torchs_generator_and_ends_with_training(layout: str, strategy) -> None:
    model = model_of(attn_dropout=0.5)
    run, args = run_of(model, layout, strategy=strategy)
    state = torch.get_rng_state()
    assert torch.equal(run(*args), run(*args))
    assert torch.equal(torch.get_rng_state(), state)
    model.train()

    def drawn(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return with_gradients(run)(*args)

    first, again, other = drawn(3), drawn(3), drawn(4)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


class Update(torch.nn.Module):
    """One attention to one context, as a module for functional_call."""

    def __init__(self, attention: Attention, strategy: str) -> None:
        super().__init__()
        self.attention, self.strategy = attention, strategy

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        context = Context(tokens)
        keys = prepare(context, [self.attention], latents=latents.shape[-2], strategy=self.strategy)
        return self.attention(latents, *keys)


@pytest.mark.parametrize("strategy", ["cached", "absorbed"])
def test_gradients_with_dropout(strategy: str) -> None:
    """Gradients of latents, tokens and all weights match finite differences; the seed is fixed."""
    attention, context, latents = one_attention(0.4)
    module = Update(attention, strategy)
    names = [name for name, _ in module.named_parameters()]

    def update(latents: Tensor, tokens: Tensor, *weights: Tensor) -> Tensor:
        torch.manual_seed(3)
        parameters = dict(zip(names, weights, strict=True))
        return functional_call(module, parameters, (latents, tokens))

    args = (latents, context.tokens, *module.parameters())
    needed = [a.detach().requires_grad_() for a in args]
    assert torch.autograd.gradcheck(update, needed, fast_mode=True)


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(strategy, marks=[] if strategy is None else pytest.mark.slow)
        for strategy in STRATEGIES
    ],
    ids=named,
)
def test_compiles_whole_for_any_number_of_tokens(strategy) -> None:
    modalities = {"cells": motet.Bag(4, coords=2, extent=100.0)}
    sizes = {"num_latents": 5, "latent_dim": 12, "heads": 2, "head_dim": 4, "depth": 1}
    model = randomised(motet.HEALNet(modalities, out_features=3, **sizes).double())
    parameters = list(model.parameters())
    torch.compiler.reset()

    def run(cells: Tensor, coords: Tensor) -> Tensor:
        return model({"cells": cells}, coords={"cells": coords}, strategy=strategy)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (9, 11):
        args = (torch.randn(3, tokens, 4, **WIDE), 100 * torch.rand(3, tokens, 2, **WIDE))
        with torch._dynamo.config.patch(error_on_recompile=tokens == 11):
            outputs = [f(*args) for f in (compiled, run)]
        torch.testing.assert_close(*outputs, **EXACT)
        gradients = [torch.autograd.grad(out.square().sum(), parameters) for out in outputs]
        torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("name", ["genes", "wsi"])
def test_the_reference_has_a_second_derivative_and_the_others_say_so(name: str) -> None:
    model = model_of()
    inputs, _ = inputs_of()

    def slope(strategy: str | None) -> Tensor:
        x = inputs[name].clone().requires_grad_()
        out = model({name: x}, strategy=strategy)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    for strategy in ("cached", "absorbed"):
        with pytest.raises(NotImplementedError, match="use strategy='reference' for it"):
            slope(strategy)
    assert slope("reference").any()


@pytest.mark.parametrize("strategy", ["cached", "absorbed"])
def test_forward_mode_is_refused(strategy: str) -> None:
    model = model_of()
    inputs, _ = inputs_of()
    with pytest.raises(NotImplementedError, match="expected reverse mode, got forward-mode"):
        torch.func.jvp(
            lambda x: model({"wsi": x}, strategy=strategy),
            (inputs["wsi"],), (torch.ones_like(inputs["wsi"]),),
        )  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES, ids=named)
def test_what_cannot_be_had_is_refused(strategy) -> None:
    for dtype, message in (
        (torch.float64, "backend: 'triton' takes float32, bfloat16 and float16"),
        (torch.float32, "backend: 'triton' needs CUDA tensors, got cpu; 'auto' falls back"),
    ):
        inputs, _ = inputs_of(dtype=dtype)
        with pytest.raises(ValueError, match=message):
            model_of(dtype)({"wsi": inputs["wsi"]}, strategy=strategy, backend="triton")
    model, (inputs, _) = model_of(), inputs_of()
    for name in ("wsi", "omic"):
        with pytest.raises(ValueError, match="backend: expected 'auto'"):
            model({name: inputs[name]}, strategy=strategy, backend="cuda")
        with pytest.raises(ValueError, match="strategy: expected None, 'cached'"):
            model({name: inputs[name]}, strategy="fast")


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    yield
    torch.compiler.reset()
