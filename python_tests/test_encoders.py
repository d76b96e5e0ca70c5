"""The papers' encoders: masks, shapes, the pooling equation."""

import motet
import torch

from .conftest import randomised


def test_abmil_equals_its_equation() -> None:
    model = randomised(motet.ABMIL(6, hidden=8, attention=5).double())
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    h = torch.relu(model.embed[0](x))
    gated = torch.tanh(model.value[0](h)) * torch.sigmoid(model.gate[0](h))
    weights = torch.softmax(model.score(gated), dim=1)
    expected = torch.relu(model.out[0]((weights * h).sum(1)))
    assert torch.allclose(model(x), expected, atol=1e-12)


def test_abmil_ignores_what_is_masked() -> None:
    model = randomised(motet.ABMIL(6, hidden=8, attention=5).double())
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    assert torch.allclose(model(x, mask=mask)[0], model(x[:1, :4])[0], atol=1e-12)
    assert torch.allclose(model(x, mask=mask)[1], model(x)[1], atol=1e-12)


def test_abmil_never_reads_padding() -> None:
    model = motet.ABMIL(6, hidden=8, attention=5)
    x = torch.full((2, 7, 6), float("nan"))
    x[0, :3] = torch.randn(3, 6)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, :3] = True
    out = model(x, mask=mask)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_snn_keeps_unit_variance() -> None:
    model = motet.SNN(500, hidden=(400, 300), dropout=0.0)
    out = model(torch.randn(200, 500))
    assert out.shape == (200, 300)
    assert 0.3 < out.std() < 1.5
    assert model.config == {"features": 500, "hidden": [400, 300], "dropout": 0.0}
