"""Reads lists and arrays of numbers out of pickle files without executing them.

Published preference labels are pickles. `pickle.load` would run whatever code a file names; this reader walks the opcodes (`pickletools.genops`,
which only parses), never imports or calls anything, and understands nothing but numbers, lists, tuples and NumPy arrays or scalars of
numbers.
"""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from rlkit2.errors import CorruptDatasetError

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *(
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "UNICODE",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "BINSTRING",
        "SHORT_BINSTRING",
    ),
}
_SKIPPED = {"PROTO", "FRAME"}
_ROOTS = ("numpy", *(f"numpy.{core}.{part}" for core in ("core", "_core") for part in ("multiarray", "numeric")))


class _Name(str):
    """A global that a file mentions; only ever compared with the names below."""


class _Array:
    """An array or dtype under construction: what it was called with, then its state."""

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self.kind, self.arguments = kind, arguments
        self.state: tuple[Any, ...] = ()

    def value(self) -> Any:
        if self.kind == "dtype":
            name = str(self.arguments[0])
            order: Any = self.state[1] if len(self.state) > 1 else "="
            return np.dtype(name).newbyteorder(order)
        if self.kind == "scalar":
            return np.frombuffer(_bytes(self.arguments[1]), self.arguments[0].value())[0]
        if self.kind == "_frombuffer":  # protocol 5
            data, dtype, shape, order = self.arguments
        else:
            _, shape, dtype, fortran, data = self.state
            order = "F" if fortran else "C"
        found = dtype.value()
        if found.kind not in "biuf":
            raise ValueError(f"array of {found}")
        return np.frombuffer(_bytes(data), found).reshape(shape, order=order)


def read_inert_pickle(path: str | Path) -> Any:
    """The numbers in a pickle: nested lists and tuples, or a NumPy array.

    Raises:
        CorruptDatasetError: no pickle, or one that holds (or would do) anything else.
    """
    try:
        return _finish(_walk(Path(path).read_bytes()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise CorruptDatasetError(
            f"{path} is not a plain pickle of numbers ({error}); nothing in it was executed"
        ) from error


def _walk(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    opcode: pickletools.OpcodeInfo
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "STOP":
            return stack.pop()
        if name in _SKIPPED:
            continue
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("LIST", "TUPLE"):
            items = _to_mark(stack)
            stack.append(items if name == "LIST" else tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            stack[-size:] = [tuple(stack[-size:])]
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif name == "APPENDS":
            items = _to_mark(stack)
            stack[-1].extend(items)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_Name(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_Name(f"{stack[-2]}.{stack[-1]}")]
        elif name == "REDUCE":
            stack[-2:] = [_called(stack[-2], stack[-1])]
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], _Array):
                raise ValueError("it sets the state of an object")
            stack[-1].state = state
        else:
            raise ValueError(f"it holds {name}")
    raise ValueError("it has no end")


def _to_mark(stack: list[Any]) -> list[Any]:
    place = len(stack) - 1 - stack[::-1].index(_MARK)
    items = stack[place + 1 :]
    del stack[place:]
    return items


def _called(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What a call of a known constructor stands for; nothing is called."""
    if not isinstance(function, _Name):
        raise ValueError("it calls something that is not a name")
    if function == "_codecs.encode" and arguments[1] == "latin1":  # how protocol 2 writes bytes
        return str(arguments[0]).encode("latin1")
    root, _, kind = str(function).rpartition(".")
    if root in _ROOTS and kind in ("_reconstruct", "_frombuffer", "scalar", "dtype"):
        return _Array(kind, arguments)
    raise ValueError(f"it calls {function}")


def _bytes(data: Any) -> bytes:
    return bytes(data) if isinstance(data, bytes | bytearray) else str(data).encode("latin1")


def _finish(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_finish(item) for item in value]
    if isinstance(value, _Array):
        return value.value()
    if isinstance(value, int | float):
        return value
    raise ValueError(f"it holds {type(value).__name__}")
