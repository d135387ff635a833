"""Where the operations of a compiled program come from, read from its text."""

import re
from dataclasses import dataclass
from typing import NamedTuple

CONTAINERS = ("while", "call", "conditional")


class Frame(NamedTuple):
    """A place in a source file."""

    file: str
    function: str
    line: int


@dataclass(frozen=True)
class Operation:
    """An instruction of the program.

    path: JAX's name for it, modules and transformations included. frames: the Python
    stack that made it, innermost first.
    """

    name: str
    shape: str
    opcode: str
    path: str
    frames: tuple[Frame, ...]

    def source(self, package: str = "/relax/") -> Frame | None:
        """Returns the innermost frame in `package`."""
        return next((f for f in self.frames if package in f.file), None)


def parse(text: str) -> dict[str, Operation]:
    """Returns a program's instructions by name; `text` is the optimised HLO."""
    files = _table(text, "FileNames", r'"(.*)"')
    functions = _table(text, "FunctionNames", r'"(.*)"')
    locations = _table(
        text, "FileLocations", r"\{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"
    )
    parents = _table(
        text, "StackFrames", r"\{file_location_id=(\d+)(?: parent_frame_id=(\d+))?"
    )

    def frames(index: int):
        while index in parents:
            location, parent = (int(x or 0) for x in parents[index])
            file, function, line = (int(x) for x in locations[location])
            yield Frame(files[file][0], functions[function][0], line)
            # Parents are numbered from 1 too, and 1 stands for none.
            index = parent - 1

    operations = {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            path, frame = _PATH.search(line), _FRAME.search(line)
            operations[match["name"]] = Operation(
                name=match["name"],
                shape=match["shape"],
                opcode=match["opcode"],
                path=path[1] if path else "",
                frames=tuple(frames(int(frame[1]))) if frame else (),
            )
    return operations


_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|[^ ]+?)(?:\{[^ ]*\})? "
    r"(?P<opcode>[\w-]+)\("
)
_PATH = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")


def _table(text: str, title: str, row: str) -> dict[int, tuple[str, ...]]:
    """Returns the numbered rows of one of the tables at the top of the program."""
    section = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    rows = re.finditer(rf"^(\d+) {row}", section[1] if section else "", re.MULTILINE)
    return {int(match[1]): match.groups()[1:] for match in rows}
