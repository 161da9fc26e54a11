"""The pickle inside a `.pth` file, read as data: a small stack machine that cannot run code.

Takes the bytes of `data.pkl`, returns names and descriptions of tensors. Python's own unpickler is
not used: of its opcodes only those that `torch.save` writes for a dict of tensors (protocol 2)
exist here, and a global is a name in a table, never an imported object. Memory is linear in the
input. Knows nothing of the zip around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from mlx_llama.errors import CheckpointError
from mlx_llama_convert.pickle_objects import (
    GLOBALS,
    RefusedError,
    call,
    make_storage,
    unknown_global,
)

MAX_STACK = 100_000  # torch writes dicts in batches of 1000 entries
MAX_INTEGER_NBYTES = 8


def read_pickled_dict(data: bytes, *, where: str) -> dict[str, Any]:
    """Read the pickled dict; tensors come as `PickledTensor`.

    A value that is no tensor is a dict, tuple, str, int, bool, None, Global or PickledStorage.
    Raises: CheckpointError, one line that begins with `where`, for anything else.
    """
    machine = _Machine(data)
    try:
        value = machine.run()
    except RefusedError as error:
        raise CheckpointError(
            f"{where}: data.pkl is no pickled dict of tensors (byte {machine.start}): {error}"
        ) from error
    if type(value) is not dict:
        raise CheckpointError(
            f"{where}: holds {_kind(value)}, expected a dict of names and tensors"
        )
    return value


def _kind(value: object) -> str:
    # Types only: the repr of nested tuples can be exponentially long.
    return f"a value of type {type(value).__name__}"


class _Machine:
    """The pickle stack machine: position, stack, marks and memo."""

    def __init__(self, data: bytes) -> None:
        self.start = 0
        self._data = data
        self._position = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        """Interpret until STOP and return the one value that is left."""
        while True:
            self.start = self._position
            code = self._take(1)[0]
            if code == ord("."):
                break
            step = _STEPS.get(code)
            if step is None:
                raise RefusedError(
                    f"opcode 0x{code:02x} does not occur in one: the file holds more than "
                    "weights, no code of it is run"
                )
            step(self)
            if len(self._stack) > MAX_STACK or len(self._marks) > MAX_STACK:
                raise RefusedError("the stack grows beyond any real checkpoint")
        if len(self._stack) != 1 or self._marks or self._position != len(self._data):
            raise RefusedError("does not end in exactly one value")
        return self._stack[0]

    # Bytes

    def _take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise RefusedError("ends in the middle of an instruction")
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def _unsigned(self, count: int) -> int:
        return int.from_bytes(self._take(count), "little")

    def _line(self) -> str:
        end = self._data.find(b"\n", self._position, self._position + 256)
        if end < 0:
            raise RefusedError("a global has no name")
        line = self._take(end + 1 - self._position)[:-1]
        return line.decode("ascii", errors="backslashreplace")

    # Stack

    def _floor(self) -> int:
        return self._marks[-1] if self._marks else 0

    def _pop(self) -> Any:
        if len(self._stack) <= self._floor():
            raise RefusedError("takes from an empty stack")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise RefusedError("a mark is missing")
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _top_dict(self) -> dict[str, Any]:
        if len(self._stack) <= self._floor() or type(self._stack[-1]) is not dict:
            raise RefusedError("adds entries to something that is not a dict")
        return self._stack[-1]

    def _push(self, value: object) -> None:
        self._stack.append(value)

    # Instructions

    def proto(self) -> None:
        version = self._unsigned(1)
        if version != 2:
            raise RefusedError(f"protocol {version}, expected 2, which torch.save writes")

    def integer(self) -> None:
        count = self._unsigned(1)
        if count > MAX_INTEGER_NBYTES:
            raise RefusedError(f"an integer of {count} bytes, at most {MAX_INTEGER_NBYTES}")
        self._push(int.from_bytes(self._take(count), "little", signed=True))

    def text(self) -> None:
        data = self._take(self._unsigned(4))
        try:
            self._push(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RefusedError("a text is not UTF-8") from error

    def fixed_tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(items)))

    def global_name(self) -> None:
        module, name = self._line(), self._line()
        known = GLOBALS.get((module, name))
        if known is None:
            raise RefusedError(unknown_global(module, name))
        self._push(known)

    def instance(self) -> NoReturn:
        raise RefusedError(unknown_global(self._line(), self._line()))

    def put(self, width: int) -> None:
        value = self._pop()
        self._push(value)
        self._memo[self._unsigned(width)] = value

    def get(self, width: int) -> None:
        index = self._unsigned(width)
        if index not in self._memo:
            raise RefusedError("refers to a value that was never stored")
        self._push(self._memo[index])

    def set_items(self, items: list[Any]) -> None:
        target = self._top_dict()
        if len(items) % 2:
            raise RefusedError("a dict entry has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise RefusedError(f"a dict key is {_kind(key)}, expected a text")
            if key in target:
                raise RefusedError(f"name {key[:80]!r} stands twice")
            target[key] = value

    def set_one(self) -> None:
        value, key = self._pop(), self._pop()
        self.set_items([key, value])

    def build(self) -> None:
        """Drop the attributes of a `state_dict` (`_metadata`): they hold no weights."""
        if type(self._pop()) is not dict:
            raise RefusedError("attributes are not a dict")
        self._top_dict()

    def storage(self) -> None:
        self._push(make_storage(self._pop()))

    def reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        self._push(call(function, arguments))


_STEPS: Mapping[int, Callable[[_Machine], None]] = {
    0x80: _Machine.proto,
    ord("("): lambda machine: machine._marks.append(len(machine._stack)),
    ord("}"): lambda machine: machine._push({}),
    ord(")"): lambda machine: machine._push(()),
    ord("t"): lambda machine: machine._push(tuple(machine._pop_to_mark())),
    0x85: lambda machine: machine.fixed_tuple(1),
    0x86: lambda machine: machine.fixed_tuple(2),
    0x87: lambda machine: machine.fixed_tuple(3),
    0x88: lambda machine: machine._push(True),
    0x89: lambda machine: machine._push(False),
    0x8A: _Machine.integer,
    ord("N"): lambda machine: machine._push(None),
    ord("J"): lambda machine: machine._push(
        int.from_bytes(machine._take(4), "little", signed=True)
    ),
    ord("K"): lambda machine: machine._push(machine._unsigned(1)),
    ord("M"): lambda machine: machine._push(machine._unsigned(2)),
    ord("X"): _Machine.text,
    ord("c"): _Machine.global_name,
    ord("i"): _Machine.instance,
    ord("q"): lambda machine: machine.put(1),
    ord("r"): lambda machine: machine.put(4),
    ord("h"): lambda machine: machine.get(1),
    ord("j"): lambda machine: machine.get(4),
    ord("R"): _Machine.reduce,
    ord("Q"): _Machine.storage,
    ord("s"): _Machine.set_one,
    ord("u"): lambda machine: machine.set_items(machine._pop_to_mark()),
    ord("b"): _Machine.build,
}
