"""Reads an optimised HLO module as text: what it moves between chips and through memory, loops counted as often as they run.

XLA's own cost analysis counts the body of a loop once. Grammar: openxla.org/xla/operation_semantics and hlo text as printed by
`compiled.as_text()` of jax 0.10 and 0.11.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

WIDTH = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
"""Bytes of types whose name does not say it."""
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "add-dependency", "async-update", "broadcast",
}  # fmt: skip
"""Operations that move nothing by themselves."""
SHAPE = re.compile(r"\b(pred|bf16|c64|c128|[suf]\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
NAME = re.compile(r"%([\w.\-]+)")
SPACE = re.compile(r"S\((\d+)\)")


@dataclass(frozen=True)
class Part:
    """One array of an operation's result."""

    type: str
    shape: tuple[int, ...]
    in_memory: bool
    """Whether it lies in main memory (HBM), not in a chip's fast one."""

    @property
    def bytes(self) -> float:
        """Its size."""
        bits = re.match(r"[suf](\d+)", self.type)
        return prod(self.shape) * (WIDTH[self.type] if self.type in WIDTH else int(bits[1]) / 8 if bits else 4)


@dataclass(frozen=True)
class Operation:
    """A line of a computation."""

    name: str
    kind: str
    parts: tuple[Part, ...]
    operands: tuple[str, ...]
    text: str
    """The line from its operands on."""
    root: bool

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return found[1] if found else None


@dataclass
class Computation:
    """Operations by name, in order."""

    name: str
    operations: dict[str, Operation] = field(default_factory=dict)

    @property
    def root(self) -> Operation:
        """Whose result is the computation's."""
        return next((op for op in self.operations.values() if op.root), list(self.operations.values())[-1])


@dataclass(frozen=True)
class Collective:
    """One exchange between chips."""

    kind: str
    bytes: float
    """Bytes that leave each chip, each time."""
    parts: tuple[Part, ...]
    """What it makes."""
    times: float
    where: str
    """`op_name` of the program, or nothing."""


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the first that runs."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif line.endswith("{") and not line.startswith((" ", "HloModule")):
            header = NAME.search(line) or re.search(r"([\w.\-]+)\s*\(", line)
            if header is None:
                continue
            current = Computation(header[1])
            computations[header[1]] = current
            if line.startswith("ENTRY"):
                entry = header[1]
        elif current is not None and " = " in line:
            operation = _operation(line)
            if operation is not None:
                current.operations[operation.name] = operation
    return computations, entry


def _operation(line: str) -> Operation | None:
    head, _, rest = line.strip().partition(" = ")
    root = head.startswith("ROOT ")
    name = head.removeprefix("ROOT ").lstrip("%")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if end <= 0 or kind is None:
        return None
    begin = end + kind.end() - 1
    until = _closing(rest, begin)
    parts = tuple(
        Part(t, tuple(int(n) for n in shape.split(",") if n), not (m := SPACE.search(layout)) or m[1] == "0")
        for t, shape, layout in SHAPE.findall(rest[:end])
    )
    return Operation(name, kind[1], parts, tuple(NAME.findall(rest[begin:until])), rest[begin:], root)


def _closing(text: str, at: int) -> int:
    depth = 0
    for place in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


class Module:
    """A parsed module with how often each computation runs."""

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        found = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
        self.chips = int(found[1]) if found else 1
        self.unknown_loops: list[str] = []
        """Loops whose count depends on data; they are counted once."""
        self.times = dict.fromkeys(self.computations, 0.0)
        self._run(self.entry, 1.0)

    def _run(self, name: str, times: float) -> None:
        self.times[name] += times
        for op in self.computations[name].operations.values():
            if op.kind == "while":
                body, condition = op.attribute("body"), op.attribute("condition")
                count = self._trips(op, name)
                for part in (body, condition):
                    if part is not None:
                        self._run(part, times * count)
            elif op.kind == "conditional":
                for branch in self._branches(op):
                    self._run(branch, times)
            elif op.kind == "call" and (called := op.attribute("to_apply")):
                self._run(called, times)

    def _branches(self, op: Operation) -> list[str]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", op.text)
        if listed:
            return NAME.findall(listed[1])
        return [b for b in (op.attribute("true_computation"), op.attribute("false_computation")) if b]

    def _trips(self, loop: Operation, within: str) -> float:
        """How often a loop's body runs."""
        known = re.search(r'known_trip_count[^\d]*"?(\d+)', loop.text)
        if known:
            return float(known[1])
        condition = self.computations[loop.attribute("condition") or ""]
        constants = {
            op.name: int(m[1])
            for op in condition.operations.values()
            if (m := re.match(r"\((-?\d+)\)", op.text)) and op.kind == "constant"
        }
        elements = {
            op.name: int(m[1])
            for op in condition.operations.values()
            if op.kind == "get-tuple-element" and (m := re.search(r"index=(\d+)", op.text))
        }
        root = condition.root
        bound = [constants[o] for o in root.operands if o in constants]
        index = [elements[o] for o in root.operands if o in elements]
        if len(bound) != 1 or len(index) != 1 or "direction=LT" not in self._with_called(root):
            self.unknown_loops.append(loop.name)
            return 1.0
        first = self._constant(within, loop.operands[0], index[0], 0)
        step = self._step(loop.attribute("body") or "", index[0])
        return max(0.0, -(-(bound[0] - first) // step))

    def _with_called(self, op: Operation) -> str:
        called = op.attribute("calls")
        inside = "" if called is None else " ".join(o.text for o in self.computations[called].operations.values())
        return f"{op.text} {inside}"

    def _constant(self, within: str, name: str, index: int, default: int) -> int:
        """The constant that is element `index` of a tuple."""
        operations = self.computations[within].operations
        made = operations.get(name)
        if made is None or made.kind != "tuple" or index >= len(made.operands):
            return default
        value = operations.get(made.operands[index])
        while value is not None and value.kind in ("copy", "bitcast", "copy-done", "copy-start") and value.operands:
            value = operations.get(value.operands[0])
        found = re.match(r"\((-?\d+)\)", value.text) if value is not None and value.kind == "constant" else None
        return int(found[1]) if found else default

    def _step(self, body: str, index: int) -> int:
        """By how much a loop's counter grows each time."""
        operations, root = self.computations[body].operations, self.computations[body].root
        if root.kind == "tuple" and index < len(root.operands):
            grown = operations.get(root.operands[index])
            if grown is not None and grown.kind == "add":
                for operand in grown.operands:
                    made = operations.get(operand)
                    if made is not None and made.kind == "constant" and (m := re.match(r"\((\d+)\)", made.text)):
                        return max(1, int(m[1]))
        return 1

    def collectives(self) -> list[Collective]:
        """All exchanges between chips. Pieces of one that is spread over fusions have its channel, and count once."""
        found: list[Collective] = []
        for name, computation in self.computations.items():
            seen: set[str] = set()
            for op in self._within(computation) if self.times[name] else ():
                kind = op.kind.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                channel = re.search(r"channel_id=(\d+)", op.text)
                key = channel[1] if channel else op.name
                if key in seen:
                    continue
                seen.add(key)
                where = re.search(r'op_name="([^"]*)"', op.text)
                # A start has what goes in and what comes out, then flags.
                parts = op.parts if op.kind == kind else op.parts[len(op.operands) : 2 * len(op.operands)]
                found.append(
                    Collective(kind, _sent(kind, parts, op.text, self.chips), parts, self.times[name], where[1] if where else "")
                )
        return found

    def _within(self, computation: Computation) -> Iterator[Operation]:
        """Operations of a computation and of the fusions that it starts."""
        for op in computation.operations.values():
            called = op.attribute("calls") if op.kind in ("fusion", "async-start") else None
            if called in self.computations:
                yield from self._within(self.computations[called])
            yield op

    def collective_bytes(self) -> dict[str, float]:
        """Bytes that leave each chip, by kind."""
        total: dict[str, float] = {}
        for one in self.collectives():
            total[one.kind] = total.get(one.kind, 0.0) + one.bytes * one.times
        return total

    def memory_bytes(self) -> float:
        """Bytes that one chip reads from and writes to main memory: an estimate from operands and results.

        Slices count as what they take, and not as what they are taken from.
        """
        return sum(
            self.times[name] * sum(self._moved(op, computation) for op in computation.operations.values())
            for name, computation in self.computations.items()
            if self.times[name]
        )

    def _moved(self, op: Operation, computation: Computation) -> float:
        if op.kind in FREE or op.kind.endswith("-done"):
            return 0.0
        if op.kind.endswith("-start"):  # a copy or a slice under way: where to, where from (or the other way round), flags
            ends = op.parts[:2]
            return min((p.bytes for p in ends), default=0.0) * sum(p.in_memory for p in ends)
        carried = _carried(op)  # buffers of an exchange under way, which computing fusions only hand on
        out = sum(p.bytes for at, p in enumerate(op.parts) if p.in_memory and at not in carried)
        called = op.attribute("calls") if op.kind == "fusion" else None
        inner = self.computations.get(called or "")
        if op.kind == "dynamic-update-slice":
            return 2 * self._size(op.operands[1], computation)
        if op.kind in ("dynamic-slice", "slice", "gather"):
            return out + min(out, self._size(op.operands[0], computation)) if out else self._result(op)
        moved = out
        if inner is not None and inner.root.kind == "dynamic-update-slice":
            moved = 2 * self._size(inner.root.operands[1], inner, anywhere=True)
        for place, operand in enumerate(op.operands):
            if place not in carried.values() and operand not in op.operands[:place]:
                moved += self._read(operand, place, computation, inner)
        return moved

    def _read(self, operand: str, place: int, computation: Computation, inner: Computation | None) -> float:
        """Bytes of an operand that a fusion (or another operation) reads."""
        size = self._size(operand, computation)
        if inner is None or not size:
            return size
        parameter = _parameter(inner, place)
        return size if parameter is None else min(size, self._taken(parameter, inner, size))

    def _taken(self, name: str, inner: Computation, whole: float) -> float:
        """Bytes of a value that its users in a fusion take: of one that is only sliced, the slices."""
        taken = 0.0
        for op in inner.operations.values():
            for place, operand in enumerate(op.operands):
                if operand != name:
                    continue
                called = self.computations.get(op.attribute("calls") or "") if op.kind == "fusion" else None
                deeper = None if called is None else _parameter(called, place)
                if op.kind in ("dynamic-slice", "slice", "gather"):
                    taken += self._result(op) if place == 0 else 0.0
                elif op.kind == "dynamic-update-slice" and place == 0:
                    continue  # written over in place
                elif called is not None and deeper is not None:
                    taken += self._taken(deeper, called, whole)
                elif op.kind in ("bitcast", "reshape", "transpose", "convert", "copy") and not op.root:
                    taken += self._taken(op.name, inner, whole)
                else:
                    return whole
        return taken

    def _result(self, op: Operation) -> float:
        return sum(p.bytes for p in op.parts)

    def _size(self, name: str, computation: Computation, anywhere: bool = False) -> float:
        op = computation.operations.get(name)
        return 0.0 if op is None else sum(p.bytes for p in op.parts if anywhere or p.in_memory)


def _parameter(computation: Computation, place: int) -> str | None:
    """The name of a computation's parameter."""
    return next(
        (o.name for o in computation.operations.values() if o.kind == "parameter" and o.text.startswith(f"({place})")), None
    )


def _carried(op: Operation) -> dict[int, int]:
    """Results that are operands, by place, as `output_to_operand_aliasing` says."""
    listed = re.search(r"output_to_operand_aliasing=\{(.*?\})\)\}", op.text)
    return {int(k or 0): int(i) for k, i in re.findall(r"\{(\d*)\}: \((\d+), ", listed[1])} if listed else {}


def _sent(kind: str, parts: tuple[Part, ...], text: str, chips: int) -> float:
    """Bytes that leave each chip of a group of n: of a whole of size s, (n - 1) / n of it, twice for all-reduce."""
    size = sum(p.bytes for p in parts)
    if kind == "collective-permute":
        return size
    n = group_size(text, chips)
    if kind == "reduce-scatter":
        return size * (n - 1)
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def group_size(text: str, chips: int) -> int:
    """Chips that exchange with each other, from `replica_groups` in any of its notations; `chips`: all there are.

    Raises: ValueError for a notation that is not known.
    """
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        # An axis as a whole, or a part of it: 'axis':(before)size.
        return prod(int(part or sizes[axis]) for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{(\{[\d,]*\})?", text)
    if not listed:
        raise ValueError(f"replica_groups in an unknown notation: {text[:200]}")
    return len(listed[1].split(",")) if listed[1] else chips
