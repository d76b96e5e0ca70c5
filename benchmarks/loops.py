"""Faults in the loops that Triton compiles for sm_90: races, and detours of operands.

A race. A product of the matrix units (wgmma) is asynchronous: it reads its operands from shared
memory while the program continues. An operand has several buffers, which are filled in turns, some
steps ahead. If the program itself reads an operand too, say for a sum, Triton 3.6.0 to 3.7.1 gives
that operand one buffer less than others, but still copies as many steps ahead (triton issue 6691).
Then the copy for a later step overwrites the buffer that the product of an earlier step may still
read.

To find races, the loop is simulated: its copies, products and waits happen in the order of the
program, and the buffers of an operand are used in turns. It is simulated twice: with the operations
under a condition, such as the store of a tile after its last step, and without them.

A detour. Operands are to be copied by the tensor memory accelerator and multiplied from shared
memory; a way through registers costs time and gains nothing.
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
# Steps that are simulated: more than any operand has buffers.
_STEPS = 32


class _Event(NamedTuple):
    """An operation on shared memory. A memory is identified by the line that allocates it."""

    kind: str
    """copy, product or wait."""
    memory: tuple[int, ...] = ()
    """The destination of a copy, or the operands of a product."""
    running: int = 0
    """The number of products that may still run after a wait."""


def uses_wgmma(ttgir: str) -> bool:
    """Return whether a kernel has asynchronous products."""
    return "warp_group_dot " in ttgir


def detours(ttgir: str) -> list[str]:
    """Return the detours of operands in every loop with a product, one line each."""
    lines, texts = ttgir.splitlines(), []
    for start, end in _loops(lines):
        body = [line for line, conditional in _by_condition(lines[start:end]) if not conditional]
        if not any(_PRODUCT.search(line) or "tt.dot " in line for line in body):
            continue
        if not any(_PRODUCT.search(line) for line in body):
            texts.append("a product without wgmma")
        if not any("async_tma_copy" in line for line in body):
            texts.append("operands that are not copied by the tensor memory accelerator")
        texts += [f"a {m[1]} in every step" for line in body if (m := _DETOUR.search(line))]
    return texts


def races(ttgir: str) -> list[str]:
    """Return the races in a kernel for sm_90, given as TTGIR, one line each."""
    lines = ttgir.splitlines()
    buffers, events = _read_events(lines)
    texts = []
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
        for step in (always, [event for event, _ in body]):
            texts += [
                f"{lines[memory].split()[0]}: {buffers[memory]} buffers, {ahead[memory]} copies "
                f"ahead, {pending} products pending"
                for memory, pending in _simulate(step, buffers, ahead).items()
            ]
    return list(dict.fromkeys(texts))


def _read_events(lines: list[str]) -> tuple[dict[int, int], dict[int, list[_Event]]]:
    """Return the number of buffers of each allocation, and the events of each line.

    A name refers to its last definition: different regions of a kernel use the same names.
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


def _simulate(events: list[_Event], buffers: dict[int, int], ahead: Counter[int]) -> dict[int, int]:
    """Return the memories that a copy overwrites too early, and the number of pending products.

    Args:
        events: of one step of the loop.
        buffers: number of buffers of each memory.
        ahead: copies into each memory before the loop.
    """
    copies, pending = ahead.copy(), {}
    running: list[tuple[int, tuple[int, ...]]] = []  # products: their step, and their operands
    for step in range(_STEPS):
        for kind, memory, still_running in events:
            if kind == "wait":
                running = running[max(len(running) - still_running, 0) :]
            elif kind == "product":
                running.append((step, memory))
            elif count := buffers.get(memory[0]):
                # The product of step s reads buffer s % count; the n-th copy fills n % count.
                buffer = copies[memory[0]] % count
                copies[memory[0]] += 1
                if any(memory[0] in read and at % count == buffer for at, read in running):
                    pending[memory[0]] = len(running)
    return pending


def _by_condition(body: list[str]) -> Iterator[tuple[str, bool]]:
    """Yield the lines of a loop, and for each whether it is inside an `if`."""
    closes = ""
    for line in body:
        if "scf.if" in line and not closes:
            closes = " " * (len(line) - len(line.lstrip())) + "}"
        elif closes and line.startswith(closes) and "else" not in line:
            closes = ""
        yield line, bool(closes)


def _loops(lines: list[str]) -> list[tuple[int, int]]:
    """Return the numbers of the first and the closing line of every loop."""
    loops = []
    for i, line in enumerate(lines):
        if "scf.for" in line:
            close = " " * (len(line) - len(line.lstrip())) + "}"
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith(close))
            loops.append((i, end))
    return loops
