"""Pickles of numpy arrays, as cryoDRGN keeps its parameters in: written, and read without running them.

A pickle is a programme for a machine that can call whatever it can name, and numpy's own pieces of that machine trust
their arguments (a dtype can be given states in which numpy reads memory that is not its own). This reader knows the
dozen instructions that arrays are written with and builds the arrays itself; every other instruction is refused.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emsplat.errors import InputError
from emsplat.io.files import replacing, require_file, require_finite

_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NAMES = ("numpy.ndarray", "numpy.dtype", "multiarray._reconstruct", "numeric._frombuffer", "_codecs.encode")
_TYPE = re.compile(r"[fiubcSU]\d{1,9}")
_NOTHING_RAN = "the file is refused and nothing of it has run; expected a pickle written by cryodrgn"


def write_arrays(path: Path, arrays: NDArray[Any] | tuple[NDArray[Any], ...]) -> None:
    """Arrays of numbers as a pickle that every numpy can read.

    Raises:
        OutputError: it cannot be written.
    """
    for array in arrays if isinstance(arrays, tuple) else (arrays,):
        require_finite(path, "numbers", array)
    # Protocol 2 names numpy's function once, before any data; under its old name every numpy finds it.
    data = pickle.dumps(arrays, protocol=2).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def load_arrays(path: Path) -> Any:
    """What a pickle holds: a number, a text, an array of either, or a tuple or list of such.

    Raises:
        InputError: it is missing, damaged, or asks for anything else; nothing of it has run.
    """
    require_file(path, "a pickle of cryoDRGN")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools' about escape sequences
            return _Machine().run(path.read_bytes())
    except _RefusedError as error:
        raise InputError(f"{path}: asks for {error}, which no array needs; {_NOTHING_RAN}") from error
    except (OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        raise InputError(
            f"{path}: cannot be read as a pickle ({type(error).__name__}: {str(error)[:200]}); expected arrays; was it "
            "cut off?"
        ) from error


class _RefusedError(Exception):
    """A pickle asked for something that is not on the list."""


@dataclass(frozen=True)
class _Name:
    """One of `_NAMES`: it stands for what it names and is never called."""

    name: str


@dataclass
class _Type:
    """A number type whose byte order may yet be said."""

    code: str
    order: str = "="

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


@dataclass
class _Array:
    """An array whose content may yet follow."""

    content: NDArray[Any] | None = None


class _Machine:
    """A stack and a memory, as in pickletools' description of the language."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memory: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            self._step(opcode.name, argument)
        result = self._stack.pop()
        if isinstance(result, (tuple, list)):
            return type(result)(_plain(item) for item in result)
        return _plain(result)

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_named(*(str(argument).rsplit(" ", 1) if name == "GLOBAL" else self._take(2))))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memory[len(self._memory) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memory[argument])
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in ("TUPLE", "LIST"):
            items = self._since_mark()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._take(int(name[-1]))))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("APPEND", "APPENDS"):
            items = self._take(1) if name == "APPEND" else self._since_mark()
            _of(list, stack[-1]).extend(items)
        elif name == "REDUCE":
            function, arguments = self._take(2)
            stack.append(_call(_of(_Name, function).name, _of(tuple, arguments)))
        elif name == "BUILD":
            (state,) = self._take(1)
            _build(stack[-1], _of(tuple, state))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise _RefusedError(f"the instruction {name}")

    def _take(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("the stack is empty")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} where {kind.__name__.lstrip('_')} is needed")
    return value


def _named(module: str, name: str) -> _Name:
    """numpy 1 keeps its inner modules in numpy.core, numpy 2 in numpy._core."""
    short = re.sub(r"^numpy\._?core\.", "", _of(str, module)) + "." + _of(str, name)
    if short not in _NAMES or (short == "multiarray._reconstruct" and not module.startswith("numpy.")):
        raise _RefusedError(f"{module}.{name}"[:100])
    return _Name(short)


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    """What a call would give."""
    if name == "numpy.dtype":
        return _Type(_code(arguments))
    if name == "multiarray._reconstruct":  # an empty array, its content follows as state
        return _Array()
    if name == "numeric._frombuffer":  # protocol 5
        data, kind, shape, order, *axes = arguments  # of late how the axes lie in memory, where that is order "K"
        content = _array(data, kind, shape, order == "F")
        if axes and axes[0] is not None:
            content = content.transpose([_of(int, axis) for axis in _of(tuple, axes[0])])
        return _Array(content)
    if name == "_codecs.encode":  # bytes in protocol 2, which knows only text
        text, encoding = arguments
        if encoding != "latin1":
            raise ValueError("text that is not latin1")
        return _of(str, text).encode("latin1")
    raise _RefusedError(f"a call of {name}")


def _code(arguments: tuple[Any, ...]) -> str:
    code: str = _of(str, arguments[0] if arguments else None)
    if not _TYPE.fullmatch(code):
        raise ValueError(f"arrays of type {code[:50]}; expected numbers")
    return code


def _build(target: Any, state: tuple[Any, ...]) -> None:
    """Gives an array its content, or a number type its byte order."""
    if isinstance(target, _Array):
        _, shape, kind, by_column, data = state
        content = data.encode("latin1") if isinstance(data, str) else data  # text: Python 2
        target.content = _array(content, kind, shape, by_column is True)
    elif len(state) > 1 and isinstance(state[1], str) and state[1] in ("<", ">", "|", "="):
        _of(_Type, target).order = state[1]
    else:
        raise TypeError("a state that is not that of an array or a number type")


def _array(data: Any, kind: Any, shape: Any, by_column: bool) -> NDArray[Any]:
    sizes = [_of(int, size) for size in _of(tuple, shape)]
    if not isinstance(data, (bytes, bytearray)) or min(sizes, default=0) < 0:
        raise TypeError("no bytes where the content of an array is needed")
    return np.frombuffer(data, _of(_Type, kind).dtype()).reshape(sizes, order="F" if by_column else "C")


def _plain(value: Any) -> Any:
    if isinstance(value, (_Type, _Name, tuple, list)) or (isinstance(value, _Array) and value.content is None):
        raise TypeError("an array without content, or lists in lists")
    return value.content if isinstance(value, _Array) else value
