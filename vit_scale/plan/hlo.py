"""Parser of compiled TPU programs: cycles of arithmetic, and bytes moved between devices.

Pure functions over the text of a scheduled program and over the log of its scheduler. The compiler
estimates the cycles of its fusions, but not collectives, custom kernels or transfers between
slices, which are counted in bytes instead.

The walk covers the entry computation and the bodies of loops, as often as they run; a conditional
counts as the mean of its branches, as RandAugment draws its operations. A fusion's estimate
includes what it calls.
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
BITS = {"pred": 8, "token": 0}  # other names contain their bits: bf16, f8e4m3fn, u32


class Collective(NamedTuple):
    """A transfer, and how often the program executes it."""

    kind: str  # all-gather, all-reduce, reduce-scatter, ...; send: to another slice
    bytes: int  # of the whole array: the output (reduce-scatter: the input), or what is sent
    group: int  # participating devices; 1: nothing is moved
    hidden: int | None  # cycles of arithmetic during the transfer; None: it blocks
    times: int


class Cost(NamedTuple):
    """The cost of a program, or of a part of it, per device."""

    cycles: int  # estimated, of arithmetic and copies
    collectives: tuple[Collective, ...]
    unpriced: int  # custom kernels, for which the compiler has no estimate


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    text: str  # from the opcode on

    def search(self, pattern: str) -> str | None:
        """Return the first group of `pattern` in the text, None without a match."""
        match = re.search(pattern, self.text)
        return match[1] if match else None


class Program:
    """A program's computations by name: lists of instructions in order of execution."""

    def __init__(self, text: str):
        self.entry = ""
        self.computations: dict[str, list[Instruction]] = {}
        self.cost_of = functools.cache(self._cost_of)
        for name, is_entry, lines in _computations(text):
            self.computations[name] = [line for line in map(_instruction, lines) if line]
            self.entry = name if is_entry else self.entry

    def cost(self) -> Cost:
        """Return the cost of one execution of the program."""
        return self.cost_of(self.entry)

    def _cost_of(self, name: str) -> Cost:
        cycles, unpriced, moved = 0, 0, []
        started: dict[str, int] = {}  # name -> index in moved
        for instruction in self.computations[name]:
            for part, times in self.called(instruction):
                cycles += times * part.cycles
                unpriced += times * part.unpriced
                moved += [c._replace(times=times * c.times) for c in part.collectives]
            transfer = self.transfer(instruction)
            if transfer and transfer.hidden is None:
                moved.append(transfer)
            elif transfer:
                started[instruction.name] = len(moved)
                moved.append(transfer._replace(hidden=-cycles))
            elif completed := self.completed(instruction, started):
                index = started.pop(completed)
                moved[index] = moved[index]._replace(hidden=cycles + (moved[index].hidden or 0))
            cycles += int(instruction.search(r'"estimated_cycles":"(\d+)"') or 0)
            unpriced += 'custom_call_target="tpu_custom_call"' in instruction.text
        for index in started.values():  # it ends in another computation: its overlap is unknown
            moved[index] = moved[index]._replace(hidden=0)
        return Cost(cycles, tuple(moved), unpriced)

    def called(self, instruction: Instruction) -> list[tuple[Cost, int]]:
        """Return (cost, times) of the computations that an instruction executes."""
        if instruction.opcode == "while":
            body = instruction.search(r"body=%([\w.\-~]+)") or ""
            return [(self.cost_of(body), self.trips(instruction))]
        if instruction.opcode == "call":
            return [(self.cost_of(instruction.search(r"to_apply=%([\w.\-~]+)") or ""), 1)]
        if instruction.opcode == "conditional":
            listed = instruction.search(r"branch_computations=\{([^}]*)\}") or ""
            names = re.findall(r"%([\w.\-~]+)", listed)
            names += re.findall(r"(?:true|false)_computation=%([\w.\-~]+)", instruction.text)
            costs = [self.cost_of(name) for name in names]
            mean = sum(cost.cycles for cost in costs) // len(costs)
            return [(max(costs, key=lambda cost: cost.cycles)._replace(cycles=mean), 1)]
        return []

    def trips(self, loop: Instruction) -> int:
        """Return how often a loop's body runs; 1 if that depends on data."""
        trip_count = loop.search(r'"known_trip_count":\{"n":"(\d+)"\}')
        if trip_count:
            return int(trip_count)
        condition = self.computations[loop.search(r"condition=%([\w.\-~]+)") or ""]
        bounds = [
            instruction.search(r"^constant\((\d+)\)")
            for instruction in condition
            if instruction.opcode == "constant" and re.match(r"[su]32\[\]", instruction.shape)
        ]
        return int(bounds[0] or 1) if len(bounds) == 1 else 1

    def transfer(self, instruction: Instruction) -> Collective | None:
        """Return the collective that an instruction is, or starts; then `hidden` is 0."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            begins = instruction.opcode.endswith("-start") or kind == "send"
            return _collective(kind, instruction, 0 if begins else None)
        if instruction.opcode not in ("fusion", "async-start"):
            return None
        target = instruction.search(r"calls=%([\w.\-~]+)") or ""
        inside = [c for c in self.computations.get(target, ()) if c.opcode in COLLECTIVES]
        if not inside:
            return None
        if target.startswith("all-reduce-scatter"):  # a reduce-scatter on TPU
            return _collective("reduce-scatter", inside[0], None)
        if instruction.opcode == "async-start" or instruction.name.startswith(
            "async-collective-start"
        ):
            return _collective(inside[0].opcode, inside[0], 0)
        return None  # a fusion with a later step of a collective, or its end

    def completed(self, instruction: Instruction, started: dict[str, int]) -> str | None:
        """Return the name of the started transfer that an instruction completes."""
        if instruction.name.startswith("async-collective-done"):
            name = instruction.name.replace("-done", "-start", 1)
        elif instruction.opcode.endswith("-done"):
            name = instruction.search(r"\(%([\w.\-~]+)") or ""
        else:
            return None
        return name if name in started else None


def _computations(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """Yield (name, whether it is the entry, lines) of each computation."""
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
    """Return the index of the space after a shape; a tuple contains spaces in parentheses."""
    depth = 0
    for index in range(start, len(line)):
        depth += (line[index] == "(") - (line[index] == ")")
        if line[index] == " " and not depth:
            return index
    return len(line)


def shape_bytes(shape: str) -> int:
    """Return the bytes of `bf16[8,128]{1,0}`, or of all arrays of a tuple, without padding."""
    return sum(
        math.prod(int(size) for size in sizes.split(",") if size) * _bits(kind) // 8
        for kind, sizes in re.findall(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]", shape)
    )


def _bits(kind: str) -> int:
    return BITS[kind] if kind in BITS else int(re.findall(r"\d+", kind)[0])


def _collective(kind: str, instruction: Instruction, hidden: int | None) -> Collective:
    """Build a Collective from an instruction's shape and groups."""
    size = shape_bytes(instruction.shape)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        parts = re.findall(r"[a-z]+\d+\[[\d,]*\]", instruction.shape)  # (inputs, outputs)
        size = max(map(shape_bytes, parts[:2]))
    elif instruction.opcode == "reduce-scatter":  # the output is one part
        size *= _group(instruction.text)
    elif kind == "send":
        size = shape_bytes(instruction.shape.partition("]")[0] + "]")
    return Collective(kind, size, _group(instruction.text), hidden, 1)


def _group(text: str) -> int:
    """Return the devices per group, in any notation of replica_groups; 2 for pairs."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^]]*)\](.*?)\{([^}]*)\}", text):
        sizes = dict(re.findall(r"('[\w]+')=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'[\w]+'", match[3]))
    return 2  # source_target_pairs


def exposed_cycles(log: str) -> float:
    """Return the cycles that the program waits for overlapped transfers, by the scheduler's log.

    The scheduler logs with TPU_VMODULE=latency_hiding_scheduler=1; the entry's figure includes its
    loops. It logs nothing for a program without asynchronous transfers: 0.
    """
    after = log.rpartition("Statistics after scheduling")[2]
    entry = re.search(r"For computation: main\S*(.*?)(For computation|$)", after, re.S)
    waited = re.search(r"Total wasted cycles: ([\d.e+]+)", entry[1]) if entry else None
    return float(waited[1]) if waited else 0.0
