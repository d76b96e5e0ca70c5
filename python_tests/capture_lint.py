"""Find on the CPU the operators that a CUDA graph cannot hold: those that wait for the device."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# They read a value on the host, or the number of their result's rows depends on the data.
WAITS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.item,
    aten.is_nonzero,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.argwhere,
    aten.masked_select,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.unique_dim_consecutive,
    aten._unique,
    aten._unique2,
    aten.bincount,
    aten.histc,
    aten.masked_scatter,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class CaptureLint(TorchDispatchMode):
    """Raise at the first operator that a CUDA graph cannot hold.

    It does not look inside motet's operators: `test_triton_launchers.py` runs their code for GPUs.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        why = reason(func, args, kwargs)
        if why:
            raise AssertionError(f"{func} {why}")
        return func(*args, **kwargs)


def reason(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return why a CUDA graph cannot hold a call; empty if it can."""
    packet = func.overloadpacket
    if packet in WAITS:
        return "waits for a value"
    if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
        return "waits for the size of its result"
    if packet is aten.lift_fresh:
        return "copies numbers from the host"
    if packet in INDEXING:
        places = [x for x in args[1] if isinstance(x, Tensor)]
        if any(x.dtype in (torch.bool, torch.uint8) for x in places):
            return "waits for the number of True in its index"
        # torch reads the largest index before it adds at indices. In torch's own derivatives it
        # does not, although this mode sees the same operator there.
        adds = packet is not aten.index and (kwargs.get("accumulate") or True in args[3:4])
        if adds and torch._C._current_graph_task_id() == -1:
            return "waits for the largest index"
    devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    device = kwargs.get("device")
    if packet is aten._to_copy and device is not None and torch.device(device).type not in devices:
        return "copies between devices"
    return "" if len(devices) <= 1 else "mixes devices"
