"""What a compiled program does: its loops with their trip counts, its collectives with their bytes.

Read from `compiled.as_text()` of TPU, GPU and CPU. XLA prints one instruction a line; the lines
between that are none (a Pallas call prints attributes over several, some of which begin with `}}`
as if a computation ended there) are passed over, so a computation ends where the next begins.
"""

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ouro_jax.errors import RunError

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
MAX_TRIPS = 10**6

_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(?:, (.*))?$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|called_computations|branch_computations|true_computation|false_computation)"
    r"=(\{[^}]*\}|%[\w.-]+)"
)
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([\w',]*)\}"
)
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


class HloError(RunError):
    """The text holds something that this reader does not know; it says so and does not guess."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal transfers: `count` instructions of one payload, each executed `trips` times.

    `payload_bytes` is the whole array of one execution: the gathered one of an all-gather, the
    unreduced one of a reduce-scatter, the array of any other kind; per chip. `axes` are the mesh
    axes along which the members of a group differ; `where` names one such instruction.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    count: int
    trips: int
    payload_bytes: int
    where: str

    @property
    def total_bytes(self) -> int:
        """Payload of all executions in one run of the program."""
        return self.count * self.trips * self.payload_bytes


@dataclasses.dataclass(frozen=True)
class Loop:
    """A `while` of the program: trip count (None: not to be found), whiles around it, its name."""

    name: str
    trips: int | None
    depth: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.arguments)

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.attributes)
        if not found:
            raise HloError(f"{self.name}: {self.opcode} without {name}=")
        return found[1]


@dataclasses.dataclass
class _Computation:
    name: str
    root: str = ""
    instructions: dict[str, _Instruction] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Visit:
    """One computation as it is executed: how often, inside which whiles, with what arguments."""

    computation: _Computation
    bind: Callable[[int, int | None], int]
    trips: int | None = 1
    depth: int = 0
    loop: Loop | None = None
    unknown: str = ""


class _Unknown(Exception):
    """A value is not a constant of the program."""


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every transfer between chips in one run of the program, equal ones together.

    `mesh_shape`: sizes of the mesh's axes in its order; XLA numbers a program's devices by their
    place in the mesh, so no physical ids are needed. An asynchronous transfer counts once, at its
    start; a group of one chip moves nothing; of a conditional every branch counts.

    Raises HloError where a transfer lies in a loop whose trip count is not a constant.
    """
    found: dict[tuple, list[str]] = {}
    for visit, kind, instruction in _Program(text).transfers():
        members = _members(instruction, mesh_shape)
        axes = _axes(members, mesh_shape)
        if not axes:
            continue
        if visit.trips is None:
            raise HloError(
                f"{instruction.name}: the trip count of the loop {visit.unknown} around this "
                f"{kind} is not a constant of the program"
            )
        shapes = visit.computation.instructions
        payload = sum(_num_bytes(shapes[name].shape) for name in instruction.operands)
        size = math.prod(mesh_shape[axis] for axis in axes)
        if kind != "collective-permute":
            size = members.shape[1]
        payload *= size if kind == "all-gather" else 1
        key = (kind, axes, size, visit.trips, payload)
        found.setdefault(key, []).append(_op_name(instruction) or visit.computation.name)
    rows = [
        Collective(kind, axes, size, len(names), trips, payload, names[0])
        for (kind, axes, size, trips, payload), names in found.items()
    ]
    return sorted(rows, key=lambda row: (-row.total_bytes, row.kind, row.axes, row.trips))


def loops(text: str) -> list[Loop]:
    """The whiles of the program in the order of the text, each before those inside it."""
    return [visit.loop for visit in _Program(text).visits() if visit.loop]


def facts(text: str, mesh_shape: Mapping[str, int]) -> str:
    """Loops, collectives and Pallas calls as a small stable text, for golden files."""
    lines = ["loops (trips, nested by indentation)"]
    lines += [f"{'  ' * (loop.depth + 1)}{loop.trips}" for loop in loops(text)]
    lines.append("collectives: kind, axes, instructions × trips × bytes")
    rows = sorted(collectives(text, mesh_shape), key=lambda row: (row.kind, row.axes, row.trips,
                                                                  row.payload_bytes))  # fmt: skip
    lines += [
        f"  {row.kind} {'+'.join(row.axes)} {row.count} × {row.trips} × {row.payload_bytes}"
        for row in rows
    ]
    pallas = text.count('custom_call_target="tpu_custom_call"')
    lines.append(f"Pallas calls: {pallas}")
    return "\n".join(lines) + "\n"


class _Program:
    """The computations of a module, and a walk through them in the order of calls."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, _Computation] = {}
        self.entry = ""
        current = None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations[header[2]] = _Computation(header[2])
                self.entry = current.name if header[1] else self.entry
            elif current and (match := _INSTRUCTION.match(line)):
                instruction = _Instruction(match[2], match[3], match[4], match[5], match[6] or "")
                current.instructions[instruction.name] = instruction
                current.root = instruction.name if match[1] else current.root
        if not self.entry:
            raise HloError("no ENTRY computation: this is not the text of a compiled program")

    def visits(self) -> Iterator[_Visit]:
        """Every execution of a computation, the entry first, each caller before what it calls."""
        stack = [_Visit(self.computations[self.entry], _no_argument)]
        while stack:
            visit = stack.pop()
            yield visit
            inner = []
            for instruction in visit.computation.instructions.values():
                inner += self._calls(instruction, visit)
            stack += reversed(inner)

    def transfers(self) -> Iterator[tuple[_Visit, str, _Instruction]]:
        """(visit, kind, instruction) of every collective, asynchronous ones at their start."""
        for visit in self.visits():
            instructions = visit.computation.instructions.values()
            starts = {
                name
                for instruction in instructions
                if "AsyncCollectiveStart" in instruction.attributes
                for name in instruction.operands
            }
            for instruction in instructions:
                # One chain of start, steps and done: each of them prints the collective.
                later = "chain_id=" in instruction.attributes and instruction.name not in starts
                if (kind := _kind(instruction)) and not later:
                    # TPU's reduce-scatter: an all-reduce of the whole in a fusion of this name.
                    fused = visit.computation.name.startswith("all-reduce-scatter")
                    yield visit, "reduce-scatter" if fused else kind, instruction

    def _calls(self, instruction: _Instruction, visit: _Visit) -> Iterator[_Visit]:
        if instruction.opcode == "while":
            trips = self._trips(instruction, visit)
            total = None if trips is None or visit.trips is None else trips * visit.trips
            name = _op_name(instruction) or instruction.name
            yield _Visit(
                self.computations[instruction.attribute("body")],
                self._invariants(instruction, visit),
                total,
                visit.depth + 1,
                Loop(name, trips, visit.depth),
                visit.unknown or (name if trips is None else ""),
            )
        elif instruction.opcode not in ("async-update", "async-done"):
            names = _CALLED.findall(instruction.attributes)
            if instruction.opcode == "call":
                names = ["%" + instruction.attribute("to_apply")]
            passes_on = instruction.opcode in ("fusion", "call", "async-start")
            bind = self._arguments(instruction, visit) if passes_on else _no_argument
            for name in re.findall(r"%([\w.-]+)", " ".join(names)):
                called = self.computations[name]
                yield dataclasses.replace(visit, computation=called, bind=bind, loop=None)

    def _trips(self, loop: _Instruction, visit: _Visit) -> int | None:
        """The trip count: as the program states it, or by running the condition's few integers.

        TPU programs do not state it. None where the condition depends on more than constants.
        """
        if stated := re.search(r'known_trip_count"?[:=]\{"n":"(\d+)"', loop.attributes):
            return int(stated[1])
        condition = self.computations[loop.attribute("condition")]
        body = self.computations[loop.attribute("body")]
        state: dict[int | None, int] = {}

        def bind(_: int, index: int | None) -> int:
            if index not in state:
                state[index] = self._value(visit, loop.operands[0], index)
            return state[index]

        try:
            for count in range(MAX_TRIPS):
                if not self._value(_Visit(condition, bind), condition.root, None):
                    return count
                # Computing the next value of one element may read further ones: go on till all.
                following: dict[int | None, int] = {}
                while missing := state.keys() - following.keys():
                    for index in missing:
                        following[index] = self._value(_Visit(body, bind), body.root, index)
                state = following
        except _Unknown:
            pass
        return None

    def _invariants(self, loop: _Instruction, visit: _Visit) -> Callable[[int, int | None], int]:
        """What the body of `loop` knows of its argument: the elements that never change."""
        body = self.computations[loop.attribute("body")]

        def bind(_: int, index: int | None) -> int:
            initial = self._value(visit, loop.operands[0], index)

            def itself(_: int, element: int | None) -> int:
                if element != index:
                    raise _Unknown
                return initial

            # A value that the body maps to itself, whatever else it reads, stays for ever.
            if self._value(_Visit(body, itself), body.root, index) != initial:
                raise _Unknown
            return initial

        return bind

    def _arguments(self, call: _Instruction, visit: _Visit) -> Callable[[int, int | None], int]:
        return lambda number, index: self._value(visit, call.operands[number], index)

    def _value(self, visit: _Visit, name: str, index: int | None) -> int:
        """The integer `name` (its element `index` if it is a tuple), where constants decide it."""
        instruction = visit.computation.instructions[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments):
            return int(instruction.arguments)
        if opcode == "parameter":
            return visit.bind(int(instruction.arguments), index)
        if opcode == "get-tuple-element" and index is None:
            return self._value(visit, operands[0], int(instruction.attribute("index")))
        if opcode == "tuple" and index is not None:
            return self._value(visit, operands[index], None)
        if opcode in _SAME:
            return self._value(visit, operands[0], index)
        if opcode == "while":
            return self._invariants(instruction, visit)(0, index)
        if opcode in ("fusion", "call"):
            name = instruction.attribute("calls" if opcode == "fusion" else "to_apply")
            called = self.computations[name]
            return self._value(
                _Visit(called, self._arguments(instruction, visit)), called.root, index
            )
        if opcode == "compare":
            opcode = instruction.attribute("direction")
        if opcode not in _ARITHMETIC:
            raise _Unknown
        return int(_ARITHMETIC[opcode](*(self._value(visit, x, None) for x in operands)))


_SAME = {"copy", "copy-start", "copy-done", "bitcast", "reshape", "convert", "opt-barrier"}
_ARITHMETIC = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul,
    "minimum": min, "maximum": max, "LT": operator.lt, "LE": operator.le, "GT": operator.gt,
    "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip


def _no_argument(number: int, index: int | None) -> int:
    raise _Unknown


def _kind(instruction: _Instruction) -> str | None:
    """The kind of a collective, None for any other instruction."""
    if instruction.opcode == "send":
        # What chips of one slice send to the hosts for those of another, in one of our kinds.
        between = _MEGASCALE.search(instruction.attributes)
        kind = between[1].lower().replace("_", "-") if between else None
        if kind and kind not in KINDS:
            raise HloError(f"{instruction.name}: unknown kind of transfer between slices: {kind}")
        return kind
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _op_name(instruction: _Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def _num_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape's text, layouts and padding aside."""
    bits = 0
    for dtype, sizes in _ARRAY.findall(shape):
        width = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        bits += width * math.prod(_integers(sizes))
    return bits // 8


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _members(instruction: _Instruction, mesh_shape: Mapping[str, int]) -> np.ndarray:
    """Groups of devices that exchange data, [groups, size]; pairs for a permutation."""
    text, num_devices = instruction.attributes, math.prod(mesh_shape.values())
    if _MEGASCALE.search(text):
        ids = np.arange(num_devices).reshape(tuple(mesh_shape.values()))
        slices = np.moveaxis(ids, list(mesh_shape).index("slice"), -1)
        return slices.reshape(-1, mesh_shape["slice"])
    lists = r"=\{((?:\{[\d,]*\},?)*)\}"
    if pairs := re.search("source_target_pairs" + lists, text):
        return np.array(_integers(pairs[1])).reshape(-1, 2)
    if groups := re.search("replica_groups" + lists, text):
        if not groups[1]:
            return np.arange(num_devices)[None]
        return np.array(_integers(groups[1])).reshape(groups[1].count("{"), -1)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _transposed(iota[2], iota[3]).reshape(_integers(iota[1]))
    if mesh := _MESH_GROUPS.search(text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = _transposed(mesh[2] or str(num_devices), mesh[3]).reshape(tuple(sizes.values()))
        inside = [name in re.findall(r"'(\w+)'", mesh[4]) for name in sizes]
        order = sorted(range(len(sizes)), key=inside.__getitem__)
        size = math.prod(n for n, member in zip(sizes.values(), inside, strict=True) if member)
        return ids.transpose(order).reshape(-1, size)
    raise HloError(f"{instruction.name}: unknown form of groups in {text[:200]}")


def _transposed(shape: str, permutation: str | None) -> np.ndarray:
    """The iota of `shape` with its axes permuted: `[4,2]T(1,0)`."""
    ids = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return ids.transpose(_integers(permutation)) if permutation else ids


def _axes(members: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ; none if they are all alone."""
    coordinates = np.unravel_index(members, tuple(mesh_shape.values()))
    return tuple(
        axis
        for axis, place in zip(mesh_shape, coordinates, strict=True)
        if (place != place[:, :1]).any()
    )
