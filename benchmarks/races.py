"""Finds, in what Triton makes of a loop for sm_90, a copy into a buffer that a product still reads.

A product of the matrix units (wgmma) reads its operands from shared memory while the program goes
on. Triton gives an operand that the program itself reads too, say for a sum, one buffer less than
others, and yet copies as many steps ahead (3.6.0 to 3.7.1; triton issue 6691): the copy for a later
step then goes where the product of an earlier one may still read.
"""

import re
from typing import NamedTuple

_ALLOCATION = re.compile(r"(%\S+) = ttg\.local_alloc\s*: \(\) -> !ttg\.memdesc<(\d+)x")
_VIEW = re.compile(r"(%\S+) = ttg\.memdesc_(?:index|trans|subslice)\w* (%[\w.#-]+)")
_COPY = re.compile(
    r"(?:async_copy_global_to_local \S+, |async_tma_copy_global_to_local .*?\] )(%[\w.#-]+)"
)
_PRODUCT = re.compile(r"warp_group_dot (%\S+), (%\S+),")
_PENDING = re.compile(r"warp_group_dot_wait.*?pendings = (\d+)")


class _Buffers(NamedTuple):
    """Memory that is allocated once, for several steps of a loop."""

    count: int
    line: int


def uses_wgmma(ttgir: str) -> bool:
    """Return whether a kernel has products that run beside the program."""
    return "warp_group_dot " in ttgir


def races(ttgir: str) -> list[str]:
    """Return what races in Triton's intermediate form of a kernel for sm_90, in words.

    With `ahead` copies before a loop and one in each of its steps, a step's copy is for `ahead`
    steps later; the products of the last `pending / uses` steps may still run. All of these steps
    need a buffer of their own.
    """
    lines = ttgir.splitlines()
    allocated, views = {}, {}
    for i, line in enumerate(lines):
        if m := _ALLOCATION.search(line):
            allocated[m[1]] = _Buffers(int(m[2]), i)
        if m := _VIEW.search(line):
            views[m[1]] = m[2]

    def memory(name: str) -> str:
        while name in views:
            name = views[name]
        return name

    def copied(part: list[str]) -> list[str]:
        return [memory(m[1]) for line in part if (m := _COPY.search(line))]

    found = []
    for start, end in _loops(lines):
        body = lines[start:end]
        pending = max(map(int, _PENDING.findall("\n".join(body))), default=0)
        read = [{memory(m[1]), memory(m[2])} for line in body if (m := _PRODUCT.search(line))]
        refilled = set(copied(body))
        for name in sorted(set().union(*read) & refilled & allocated.keys()):
            buffers = allocated[name]
            ahead = copied(lines[buffers.line : start]).count(name)
            uses = sum(name in operands for operands in read)
            if pending and buffers.count < ahead + -(-pending // uses):
                found.append(
                    f"{name}: {buffers.count} buffers, {ahead} copies ahead, {pending} products "
                    "pending"
                )
    return found


def _loops(lines: list[str]) -> list[tuple[int, int]]:
    """Return the first line of every loop, and that which closes it."""
    found = []
    for i, line in enumerate(lines):
        if "scf.for" in line:
            close = " " * (len(line) - len(line.lstrip())) + "}"
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith(close))
            found.append((i, end))
    return found
