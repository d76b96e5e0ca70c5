"""What Triton makes of the loops of a kernel for sm_90: races, and detours of operands.

A product of the matrix units (wgmma) reads its operands from shared memory while the program goes
on. Triton gives an operand that the program itself reads too, say for a sum, one buffer less than
others, and yet copies as many steps ahead (3.6.0 to 3.7.1; triton issue 6691): the copy for a later
step then goes where the product of an earlier one may still read.

To find it, the loop is played: copies, products and waits in the order of the program, the buffers
of an operand in turns; once with what a step does under a condition, such as the stores of a tile
of which it is the last, and once without.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

_ALLOCATION = re.compile(r"(%\S+) = ttg\.local_alloc\s*: \(\) -> !ttg\.memdesc<(\d+)x")
_VIEW = re.compile(r"(%\S+) = ttg\.memdesc_(?:index|trans|subslice|reinterpret)\w* (%[\w.#-]+)")
_COPY = re.compile(
    r"(?:async_copy_global_to_local \S+, |async_tma_copy_global_to_local .*?\] )(%[\w.#-]+)"
)
_PRODUCT = re.compile(r"warp_group_dot (%\S+), (%\S+),")
_DETOUR = re.compile(r"= ttg\.(local_load|convert_layout) ")
_PENDING = re.compile(r"warp_group_dot_wait.*?pendings = (\d+)")
# Steps that are played: more than any operand has buffers.
_STEPS = 32


class _Event(NamedTuple):
    """What a line does with memory, which is named by the line that allocates it."""

    kind: str
    """copy, product or wait."""
    memory: tuple[int, ...] = ()
    """Where a copy goes; the operands of a product."""
    running: int = 0
    """How many products may still run after a wait."""


def uses_wgmma(ttgir: str) -> bool:
    """Return whether a kernel has products that run beside the program."""
    return "warp_group_dot " in ttgir


def detours(ttgir: str) -> list[str]:
    """Return what loops over products do that nothing is gained by, in words.

    Every loop with a product is to copy its operands by the tensor memory accelerator and to
    multiply from shared memory, without a way through registers.
    """
    lines, found = ttgir.splitlines(), []
    for start, end in _loops(lines):
        body = [line for line, conditional in _by_condition(lines[start:end]) if not conditional]
        if not any(_PRODUCT.search(line) or "tt.dot " in line for line in body):
            continue
        if not any(_PRODUCT.search(line) for line in body):
            found.append("a product without wgmma")
        if not any("async_tma_copy" in line for line in body):
            found.append("operands that are not copied by the tensor memory accelerator")
        found += [f"a {m[1]} in every step" for line in body if (m := _DETOUR.search(line))]
    return found


def races(ttgir: str) -> list[str]:
    """Return what races in Triton's intermediate form of a kernel for sm_90, in words."""
    lines = ttgir.splitlines()
    buffers, events = _read(lines)
    found = []
    for start, end in _loops(lines):
        body = [
            (event, conditional)
            for i, (_, conditional) in enumerate(_by_condition(lines[start:end]), start)
            for event in events.get(i, ())
        ]
        ahead = Counter(
            event.memory[0]
            for i in range(start)
            for event in events.get(i, ())
            if event.kind == "copy"
        )
        always = [event for event, conditional in body if not conditional]
        for part in (always, [event for event, _ in body]):
            found += [
                f"{lines[memory].split()[0]}: {buffers[memory]} buffers, {ahead[memory]} copies "
                f"ahead, {pending} products pending"
                for memory, pending in _played(part, buffers, ahead).items()
            ]
    return list(dict.fromkeys(found))


def _read(lines: list[str]) -> tuple[dict[int, int], dict[int, list[_Event]]]:
    """Return how many buffers each allocation has, and what each line does with memory.

    A name stands for what was last given it: regions of a kernel use the same ones.
    """
    buffers: dict[int, int] = {}
    events: dict[int, list[_Event]] = {}
    names: dict[str, int] = {}
    for i, line in enumerate(lines):
        if m := _ALLOCATION.search(line):
            names[m[1]], buffers[i] = i, int(m[2])
        elif m := _VIEW.search(line):
            names[m[1]] = names.get(m[2], -1)
        elif m := _COPY.search(line):
            events[i] = [_Event("copy", (names.get(m[1], -1),))]
        elif m := _PRODUCT.search(line):
            operands = tuple(names.get(name, -1) for name in m.groups())
            events[i] = [_Event("product", operands)]
            if "isAsync = true" not in line:
                events[i].append(_Event("wait"))
        elif m := _PENDING.search(line):
            events[i] = [_Event("wait", running=int(m[1]))]
    return buffers, events


def _played(events: list[_Event], buffers: dict[int, int], ahead: Counter[int]) -> dict[int, int]:
    """Return the memories that a copy refills too early, and how many products were pending."""
    copies, wrong = ahead.copy(), {}
    running: list[tuple[int, tuple[int, ...]]] = []  # products: their step, and what they read
    for step in range(_STEPS):
        for kind, memory, left in events:
            if kind == "wait":
                running = running[max(len(running) - left, 0) :]
            elif kind == "product":
                running.append((step, memory))
            elif count := buffers.get(memory[0]):
                place = copies[memory[0]] % count
                copies[memory[0]] += 1
                if any(memory[0] in read and at % count == place for at, read in running):
                    wrong[memory[0]] = len(running)
    return wrong


def _by_condition(body: list[str]) -> Iterator[tuple[str, bool]]:
    """Yield the lines of a loop, each with whether it stands under a condition."""
    closes = ""
    for line in body:
        if "scf.if" in line and not closes:
            closes = " " * (len(line) - len(line.lstrip())) + "}"
        elif closes and line.startswith(closes) and "else" not in line:
            closes = ""
        yield line, bool(closes)


def _loops(lines: list[str]) -> list[tuple[int, int]]:
    """Return the first line of every loop, and that which closes it."""
    found = []
    for i, line in enumerate(lines):
        if "scf.for" in line:
            close = " " * (len(line) - len(line.lstrip())) + "}"
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith(close))
            found.append((i, end))
    return found
