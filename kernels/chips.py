"""What GPUs can do: one place for every number that belongs to a chip.

Data sheets give a chip's peak rates. The rates here are what copies and a library's largest
products reach: measured on an H200; other chips are assumed to reach the same share of their data
sheets. `Chip.source` says of each number whether it is measured, predicted or from a data sheet.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

# Shares of the roofline that kernels must reach with bags of 8,000 tokens or more: goals, not
# measurements; `make gpu-profile` compares the two. The time of the roofline is the larger of
# bytes / bandwidth and FLOP / matrix rate.
DEMANDED = {
    "project_kernel": 0.75,
    "pool_kernel": 0.65,
    "attend_kernel": 0.60,
    "dq_kernel": 0.60,
    "dkv_kernel": 0.60,
    "mm": 0.70,
}
# Shares that benchmarks/fit_planner.py found in measurements on an H200 at revision 7918d87. The
# times of launches and of the host below are of that revision too. The kernels of products and of
# attention have been rewritten since: for these the demanded shares are assumed.
_FITTED = {
    "softmax_statistics_kernel": 0.48,
    "softmax_weights_kernel": 0.48,
    "softmax_gradient_kernel": 0.48,
}
# Assumed shares of kernels that have not been measured.
_EXPECTED = {"row_statistics_kernel": 0.75, "scale_gradient_kernel": 0.60}
# The assumed share of kernels that are not listed: small ones, and torch's.
_ANY_SHARE = 0.50
# Seconds of a launch of kernels whose few programs each do long chains of small products: the time
# does not depend on the number of tokens. Estimates, not measured.
_LATENCIES = {
    "pass_kernel": 12e-6,
    "update_backward_kernel": 12e-6,
    "query_backward_kernel": 7e-6,
    "gradients_kernel": 7e-6,
}

Source = Literal["measured", "data sheet", "predicted"]


@dataclass(frozen=True)
class Chip:
    """What a GPU can do, and what it is expected to do with motet's kernels."""

    name: str
    capability: int
    """90 for compute capability 9.0."""
    multiprocessors: int
    l2_bytes: int
    shared_bytes: int
    """Shared memory that one program may have."""
    bandwidth: float
    """Bytes/s that a copy reaches."""
    matrix: Mapping[torch.dtype, float]
    """FLOP/s that a library's products reach, by dtype; float32 by three products of TF32."""
    exponentials: float
    """Exponentials/s of the special function units."""
    random_numbers: float
    """Dropout decisions/s, of the time that a kernel with dropout takes longer than one without."""
    shares: Mapping[str, float]
    """Share of its roofline that a kernel reaches, by name."""
    latencies: Mapping[str, float]
    """Seconds of a launch by the kernel's name, of kernels that take more than `launch_s`."""
    launch_s: float = 3.3e-6
    """Seconds of a small launch in a CUDA graph, or while another kernel runs."""
    host_launch_s: float = 49e-6
    """Seconds that Python takes for one launch in eager mode, with autograd and autocast."""
    host_s: float = 1.26e-3
    """Seconds that Python takes for a pass of any size, besides its launches."""
    measured: frozenset[str] = frozenset()

    def share(self, kernel: str) -> float:
        """Return the share of its roofline that a kernel reaches."""
        return self.shares.get(kernel, _ANY_SHARE)

    def source(self, name: str) -> Source:
        """Return where a field, or the share of a kernel, comes from."""
        if name in self.measured:
            return "measured"
        sheet = ("name", "capability", "multiprocessors", "l2_bytes", "shared_bytes")
        return "data sheet" if name in sheet else "predicted"


# Measured on an H200: a copy reaches 4.1 of 4.8 TB/s, a large bf16 product 740 of 989 TFLOP/s.
_REACHED_BANDWIDTH, _REACHED_MATRIX = 4.1 / 4.8, 740 / 989


def _chip(
    name: str,
    capability: int,
    multiprocessors: int,
    l2_mib: int,
    shared_kib: int,
    *,
    bandwidth: float,
    half: float,
    tf32: float,
    double: float,
    ghz: float,
    measured: frozenset[str] = frozenset(),
) -> Chip:
    """Return a chip, given its data sheet: bytes/s, dense FLOP/s, and the clock in GHz."""
    matrix = {
        torch.bfloat16: _REACHED_MATRIX * half,
        torch.float16: _REACHED_MATRIX * half,
        torch.float32: _REACHED_MATRIX * tf32 / 3,
        torch.float64: _REACHED_MATRIX * double,
    }
    units = 16 * ghz * 1e9 * multiprocessors  # special function units: 16 a clock
    # Fitted on an H200 (132 multiprocessors, 1.8 GHz), and scaled to this chip.
    drawn = 2.9e11 * multiprocessors * ghz / (132 * 1.8)
    return Chip(
        name, capability, multiprocessors, l2_mib << 20, shared_kib << 10,
        _REACHED_BANDWIDTH * bandwidth, matrix, units, drawn,
        {**DEMANDED, **_FITTED, **_EXPECTED}, _LATENCIES, measured=measured,
    )  # fmt: skip


_ON_H200 = frozenset(
    (*_FITTED, "bandwidth", "matrix", "random_numbers", "launch_s", "host_launch_s", "host_s")
)
CHIPS = {
    chip.name: chip
    for chip in (
        _chip("A100", 80, 108, 40, 163, bandwidth=2.0e12, half=312e12, tf32=156e12, double=19.5e12,
              ghz=1.41),
        _chip("H100", 90, 132, 50, 227, bandwidth=3.35e12, half=989e12, tf32=494e12, double=67e12,
              ghz=1.8),
        _chip("H200", 90, 132, 50, 227, bandwidth=4.8e12, half=989e12, tf32=494e12, double=67e12,
              ghz=1.8, measured=_ON_H200),
        _chip("B200", 100, 148, 126, 227, bandwidth=8.0e12, half=2250e12, tf32=1100e12,
              double=40e12, ghz=1.8),
    )
}  # fmt: skip
SHARED_BYTES = {chip.capability: chip.shared_bytes for chip in CHIPS.values()}
"""Shared memory that one program may have, by compute capability."""
