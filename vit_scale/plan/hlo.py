"""What a compiled program says of itself: cycles of arithmetic, and what is moved between devices.

Pure functions over the text of a scheduled TPU program, and over the log of its scheduler. The
compiler estimates the cycles of its fusions; it has no price for collectives, custom kernels or
transfers between slices, which are counted, in bytes, instead.

Walked are the entry and, as often as they run, the bodies of loops; a branch counts as its dearest.
What a fusion calls is not: its estimate is its own.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all", "send"),
)
BITS = {"pred": 8, "token": 0}  # the number in any other name is its bits: bf16, f8e4m3fn, u32


class Collective(NamedTuple):
    """One transfer, as often as the program makes it."""

    kind: str  # all-gather, all-reduce, reduce-scatter, ...; send: to another slice
    bytes: int  # of the whole array that a device ends with (reduce-scatter: begins with), or sends
    group: int  # devices that take part; 1: nothing is moved
    hidden: int | None  # cycles of arithmetic while it is on its way; None: everything waits
    times: int


class Cost(NamedTuple):
    """What a program, or a part of it, costs a device."""

    cycles: int  # estimated, of arithmetic and copies
    collectives: tuple[Collective, ...]
    unpriced: int  # custom kernels, of which the compiler estimates nothing


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    text: str  # from the opcode on

    def after(self, pattern: str) -> str | None:
        """What the first group of `pattern` finds."""
        found = re.search(pattern, self.text)
        return found[1] if found else None


class Program:
    """A program's computations by name: lists of instructions in the order of their execution."""

    def __init__(self, text: str):
        self.entry = ""
        self.computations: dict[str, list[Instruction]] = {}
        self.cost_of = functools.cache(self._cost_of)
        for name, is_entry, lines in _computations(text):
            self.computations[name] = [found for found in map(_instruction, lines) if found]
            self.entry = name if is_entry else self.entry

    def cost(self) -> Cost:
        """Of one run of the entry."""
        return self.cost_of(self.entry)

    def _cost_of(self, name: str) -> Cost:
        cycles, unpriced, moved = 0, 0, []
        started: dict[str, int] = {}  # at which cycle
        for found in self.computations[name]:
            for part, times in self.called(found):
                cycles += times * part.cycles
                unpriced += times * part.unpriced
                moved += [c._replace(times=times * c.times) for c in part.collectives]
            transfer = self.transfer(found)
            if transfer and transfer.hidden is None:
                moved.append(transfer)
            elif transfer:
                started[found.name] = len(moved)
                moved.append(transfer._replace(hidden=-cycles))
            elif begun := self.begun(found, started):
                index = started.pop(begun)
                moved[index] = moved[index]._replace(hidden=cycles + (moved[index].hidden or 0))
            cycles += int(found.after(r'"estimated_cycles":"(\d+)"') or 0)
            unpriced += 'custom_call_target="tpu_custom_call"' in found.text
        for index in started.values():  # ends elsewhere: nothing is known of what hides it
            moved[index] = moved[index]._replace(hidden=0)
        return Cost(cycles, tuple(moved), unpriced)

    def called(self, found: Instruction) -> list[tuple[Cost, int]]:
        """(cost, times) of the computations that run as part of an instruction."""
        if found.opcode == "while":
            body = found.after(r"body=%([\w.\-~]+)") or ""
            return [(self.cost_of(body), self.trips(found))]
        if found.opcode == "call":
            return [(self.cost_of(found.after(r"to_apply=%([\w.\-~]+)") or ""), 1)]
        if found.opcode == "conditional":
            listed = found.after(r"branch_computations=\{([^}]*)\}") or ""
            names = re.findall(r"%([\w.\-~]+)", listed)
            names += re.findall(r"(?:true|false)_computation=%([\w.\-~]+)", found.text)
            return [(max((self.cost_of(name) for name in names), key=lambda c: c.cycles), 1)]
        return []

    def trips(self, loop: Instruction) -> int:
        """How often a loop's body runs; 1 where that depends on the data."""
        known = loop.after(r'"known_trip_count":\{"n":"(\d+)"\}')
        if known:
            return int(known)
        condition = self.computations[loop.after(r"condition=%([\w.\-~]+)") or ""]
        bounds = [
            found.after(r"^constant\((\d+)\)")
            for found in condition
            if found.opcode == "constant" and re.match(r"[su]32\[\]", found.shape)
        ]
        return int(bounds[0] or 1) if len(bounds) == 1 else 1

    def transfer(self, found: Instruction) -> Collective | None:
        """The collective that an instruction begins, or is; `hidden` is 0 where it only begins."""
        kind = found.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            begins = found.opcode.endswith("-start") or kind == "send"
            return _collective(kind, found, 0 if begins else None)
        if found.opcode not in ("fusion", "async-start"):
            return None
        target = found.after(r"calls=%([\w.\-~]+)") or ""
        inside = [c for c in self.computations.get(target, ()) if c.opcode in COLLECTIVES]
        if not inside:
            return None
        if target.startswith("all-reduce-scatter"):  # how a TPU program says reduce-scatter
            return _collective("reduce-scatter", inside[0], None)
        if found.opcode == "async-start" or found.name.startswith("async-collective-start"):
            return _collective(inside[0].opcode, inside[0], 0)
        return None  # a fusion that carries a step of one, or its end

    def begun(self, found: Instruction, started: dict[str, int]) -> str | None:
        """The started transfer that an instruction ends."""
        if found.name.startswith("async-collective-done"):
            name = found.name.replace("-done", "-start", 1)
        elif found.opcode.endswith("-done"):
            name = found.after(r"\(%([\w.\-~]+)") or ""
        else:
            return None
        return name if name in started else None


def _computations(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """(name, whether it is the entry, lines) of each computation."""
    name, is_entry = "", False
    lines: list[str] = []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%([\w.\-~]+) \(", line)
        if head:
            name, is_entry, lines = head[2], bool(head[1]), []
        elif line.startswith("}") and name:
            yield name, is_entry, lines
            name = ""
        else:
            lines.append(line)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%([\w.\-~]+) = ", line)
    if not head:
        return None
    end = _end_of_shape(line, head.end())
    text = line[end + 1 :]
    return Instruction(head[1], line[head.end() : end], text.partition("(")[0], text)


def _end_of_shape(line: str, start: int) -> int:
    """Where the space after a shape is; a tuple has parentheses and spaces of its own."""
    depth = 0
    for index in range(start, len(line)):
        depth += (line[index] == "(") - (line[index] == ")")
        if line[index] == " " and not depth:
            return index
    return len(line)


def shape_bytes(shape: str) -> int:
    """Bytes of `bf16[8,128]{1,0}`, or of all arrays of a tuple, without padding."""
    return sum(
        math.prod(int(size) for size in sizes.split(",") if size) * _bits(kind) // 8
        for kind, sizes in re.findall(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]", shape)
    )


def _bits(kind: str) -> int:
    return BITS[kind] if kind in BITS else int(re.findall(r"\d+", kind)[0])


def _collective(kind: str, found: Instruction, hidden: int | None) -> Collective:
    """Of an instruction that states its own shape and groups."""
    size = shape_bytes(found.shape)
    if found.opcode in ("all-gather-start", "collective-permute-start"):
        parts = re.findall(r"[a-z]+\d+\[[\d,]*\]", found.shape)  # (what goes in, what comes out)
        size = max(map(shape_bytes, parts[:2]))
    elif found.opcode == "reduce-scatter":  # what comes out is one part
        size *= _group(found.text)
    elif kind == "send":
        size = shape_bytes(found.shape.partition("]")[0] + "]")
    return Collective(kind, size, _group(found.text), hidden, 1)


def _group(text: str) -> int:
    """Devices of a group, in any of the forms that replica_groups has; pairs are 2."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^]]*)\](.*?)\{([^}]*)\}", text):
        sizes = dict(re.findall(r"('[\w]+')=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'[\w]+'", found[3]))
    return 2  # source_target_pairs


def exposed_cycles(log: str) -> float:
    """Cycles that the entry waits for transfers which were to be hidden, as the scheduler says.

    `log` is what it prints at TPU_VMODULE=latency_hiding_scheduler=1. Loops are in the entry's
    number. It prints nothing of a program without asynchronous transfers: 0.
    """
    after = log.rpartition("Statistics after scheduling")[2]
    entry = re.search(r"For computation: main\S*(.*?)(For computation|$)", after, re.S)
    waited = re.search(r"Total wasted cycles: ([\d.e+]+)", entry[1]) if entry else None
    return float(waited[1]) if waited else 0.0
