"""Copies from host memory in a compiled program, read off the text of its HLO."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

HOST = "S(5)"
"""How the layout of an array in host memory is marked on a TPU."""
ENTRY = "ENTRY"
# What runs other computations as they are, one after the other.
RUNS_OTHERS = {"while", "conditional", "call"}
# What hands an array on where it is.
MOVES_NOTHING = RUNS_OTHERS | {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "optimization-barrier",
}
PRODUCTS = {"convolution", "dot"}
WIDTHS = {"pred": 8, "bf16": 16}


class Instruction(NamedTuple):
    """An instruction of a computation.

    Attributes:
      name: Its name.
      type: The text of its type, with the layout.
      opcode: Its opcode.
      operands: The names of its operands.
      called: The names of the computations that it runs.
    """

    name: str
    type: str
    opcode: str
    operands: list[str]
    called: list[str]


class Copy(NamedTuple):
    """A copy of an array from host memory to the device.

    Attributes:
      nbytes: Its size; 0 if not known.
      in_loop: Whether it is in a loop.
      asynchronous: Whether it is started and awaited apart.
      hidden: Whether a matrix product runs between the two.
    """

    nbytes: int
    in_loop: bool
    asynchronous: bool = False
    hidden: bool = False


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"no closing parenthesis in {text[start : start + 80]!r}")


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)
    if found is None:
        return None
    begin = found.end()
    end = _closing(line, begin) if line[begin] == "(" else line.index(" ", begin)
    opcode = re.match(r"\s*([\w-]+)\(", line[end:])
    if opcode is None:
        return None
    start = end + opcode.end() - 1
    stop = _closing(line, start)
    called = re.findall(r"(?:calls|body|condition|to_apply)=%?([\w.-]+)", line[stop:])
    for several in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
        called += re.findall(r"%?([\w.-]+)", several)
    operands = re.findall(r"%([\w.-]+)", line[start:stop])
    return Instruction(found[1], line[begin:end], opcode[1], operands, called)


def computations(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each computation, in the order of the schedule."""
    found: dict[str, list[Instruction]] = {}
    inside: list[Instruction] = []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$", line)
        if header:
            inside = found.setdefault(ENTRY if header[1] else header[2], [])
        elif made := _instruction(line):
            inside.append(made)
    return found


def nbytes(type_text: str) -> int:
    """The bytes of an array of this type; without padding."""
    found = re.match(r"([a-z]+)(\d+)?\w*\[([\d,]*)\]", type_text)
    if found is None:
        return 0
    bits = WIDTHS.get(found[1] + (found[2] or ""), int(found[2] or 32))
    size = 1
    for length in filter(None, found[3].split(",")):
        size *= int(length)
    return size * bits // 8


def copies_from_host(text: str) -> Iterator[Copy]:
    """Each copy from host memory, where the program has it: in a loop once, not once a trip."""
    every = computations(text)
    seen: dict[str, bool] = {}

    def has_product(name: str) -> bool:
        if name not in seen:
            seen[name] = any(map(is_product, every.get(name, ())))
        return seen[name]

    def is_product(x: Instruction) -> bool:
        return x.opcode in PRODUCTS or any(map(has_product, x.called))

    def visit(name: str, in_loop: bool) -> Iterator[Copy]:
        # What a fusion or an asynchronous operation consists of is not looked at.
        yield from _copies(every[name], in_loop, is_product)
        for x in every[name]:
            if x.opcode in RUNS_OTHERS:
                for called in x.called:
                    yield from visit(called, in_loop or x.opcode == "while")

    yield from visit(ENTRY, in_loop=False)


def _copies(
    instructions: Sequence[Instruction], in_loop: bool, is_product: Callable[[Instruction], bool]
) -> Iterator[Copy]:
    types = {x.name: x.type for x in instructions}
    for i, x in enumerate(instructions):
        reads_host = any(HOST in types.get(name, "") for name in x.operands)
        if not reads_host or x.opcode in MOVES_NOTHING or x.opcode.endswith("-done"):
            continue
        if x.opcode.endswith("-start"):
            rest = instructions[i + 1 :]
            stop = next((j for j, done in enumerate(rest) if x.name in done.operands), None)
            if stop is None:  # awaited in another computation
                yield Copy(0, in_loop, asynchronous=True)
            elif HOST not in rest[stop].type:
                hidden = any(map(is_product, rest[:stop]))
                yield Copy(nbytes(rest[stop].type), in_loop, asynchronous=True, hidden=hidden)
        elif HOST not in x.type:
            yield Copy(nbytes(x.type), in_loop)


def described(text: str) -> dict[str, int]:
    """How many copies from host memory there are, of which kind, and the bytes of the largest."""
    found = list(copies_from_host(text))
    in_loops = [x for x in found if x.in_loop]
    return {
        "copies": len(found),
        "asynchronous": sum(x.asynchronous for x in found),
        "beside a product": sum(x.hidden for x in found),
        "in loops": len(in_loops),
        "in loops, beside a product": sum(x.hidden for x in in_loops),
        "largest copy": max((x.nbytes for x in found), default=0),
    }
