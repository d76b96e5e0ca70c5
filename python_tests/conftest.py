"""What the tests share: where data lies, how close is close enough, deterministic properties."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

ROOT = Path(__file__).parent.parent
IN_CI = os.environ.get("CI") == "true"
MODELS = Path(__file__).parent / "golden"

# The seeds of a property are fixed, so that a run never fails by chance; `make soak` explores.
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("soak", parent=settings.get_profile("fixed"), derandomize=False,
                          max_examples=2000)  # fmt: skip
settings.load_profile(os.environ.get("MOTET_HYPOTHESIS", "fixed"))

torch.set_num_threads(1)  # pytest-xdist runs one worker per core


def data_path(*parts: str) -> Path:
    """Find shared data in $MOTET_DATA, else ../shared; skip without it, but fail in CI."""
    base = Path(os.environ.get("MOTET_DATA", ROOT.parent / "shared"))
    path = base.joinpath(*parts)
    if not path.exists():
        if IN_CI:
            pytest.fail(f"{path} is missing; CI needs the shared data")
        pytest.skip(f"{path} is not on this machine; set MOTET_DATA to the shared data")
    return path


def golden_path(name: str) -> Path:
    """Find a parity vector: the copy in the repository, else the shared data."""
    copied = MODELS / f"{name}.safetensors"
    return copied if copied.exists() else data_path("golden", f"{name}.safetensors")


# Absolute error that a comparison may always have, by the dtype that was worked in.
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12}


def assert_as_good_as(
    fast: Callable[..., Tensor], reference: Callable[..., Tensor], *args: Tensor
) -> None:
    """Check that err(fast) <= 2 err(reference in the working dtype) + floor, against float64."""
    wide = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    gold = reference(*(a.to(wide.get(a.dtype, a.dtype)) for a in args))
    own, theirs = fast(*args), reference(*args)
    real = own.real.dtype if own.is_complex() else own.dtype
    allowed = 2 * (theirs - gold).abs().max().item() + FLOOR[real] * max(1, gold.abs().max().item())
    error = (own - gold).abs().max().item()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter away from its initial value, norms' included; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * noise)
    return model.eval()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
