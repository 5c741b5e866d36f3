"""A pickle read as data: its instructions are followed, and nothing that it names is ever looked up or called.

A pickle is a program for a stack machine: it names functions and classes ("globals") and calls them. Python's own
unpickler runs it, and can be made to hang or to fill the memory even where every call is refused (tuples of tuples as
keys are hashed for ever; a memo index of 2**31 reserves 16 GB). This machine knows strings, numbers, lists, tuples and
dictionaries; a call yields what the caller's ``call`` says, or OPAQUE. Time and memory are bounded by the pickle's size
and by ``MAX_INSTRUCTIONS``. The instructions: Python's ``pickletools``.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from pickle import UnpicklingError
from typing import IO, Any

MAX_INSTRUCTIONS = 1_000_000  # a published 5B has 50,000, at some 60 a tensor
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_NOTHING = {"PROTO", "FRAME", "STOP"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Name(str):
    """A global: "torch._utils._rebuild_tensor_v2"."""

    __slots__ = ()


class _Opaque:
    """Stands for every object that is none of ours."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "OPAQUE"


OPAQUE = _Opaque()


def read_pickle(
    file: IO[bytes],
    call: Callable[[Name, tuple[Any, ...]], Any],
    persistent: Callable[[Any], Any],
) -> tuple[Any, list[str]]:
    """The object that a pickle holds, and every global that it names, in order; ``file`` is left behind its end.

    call: (global, arguments) -> what stands for the result. persistent: what stands for a persistent id. Dictionaries
    keep the entries whose keys are strings; sets and objects are OPAQUE; state given to an object (BUILD) is dropped.
    Raises UnpicklingError, ValueError or IndexError for what is no pickle, and for one that goes on for too long.
    """
    machine = _Machine(call, persistent)
    for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        if count > MAX_INSTRUCTIONS:
            raise UnpicklingError(
                f"more than {MAX_INSTRUCTIONS:,} instructions, far beyond any model's: refused"
            )
        machine.follow(instruction.name, argument, count)
    return machine.stack.pop(), list(machine.names)


class _Machine:
    def __init__(self, call: Callable[[Name, tuple[Any, ...]], Any], persistent: Callable[[Any], Any]):
        self.call, self.persistent = call, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[str, None] = {}  # an ordered set

    def follow(self, name: str, argument: Any, count: int) -> None:
        """One instruction, the ``count``-th."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            # Picklers count up; other numbers could be chosen to fall into one slot of the dictionary.
            index = len(self.memo) if argument is None else argument
            if not 0 <= index <= count:
                raise UnpicklingError(f"a memo index of {index}")
            self.memo[index] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif name in _TUPLES:
            stack.append(tuple(self._take(_TUPLES[name])))
        elif name not in _NOTHING:
            handler = getattr(self, f"_{name.lower()}", None)
            if handler is None:
                raise UnpicklingError(f"the instruction {name}, of which weights have no need")
            handler(argument)

    def _take(self, number: int) -> list[Any]:
        if len(self.stack) < number:
            raise UnpicklingError("an empty stack")
        popped = self.stack[len(self.stack) - number :]
        del self.stack[len(self.stack) - number :]
        return popped

    def _take_to_mark(self) -> list[Any]:
        return self._take(len(self.stack) - self.marks.pop())

    # ---------------------------------------------------------------------------------------------- the stack itself

    def _mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def _pop_mark(self, _: Any) -> None:
        self._take_to_mark()

    def _pop(self, _: Any) -> None:
        self._take(1)

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    # ---------------------------------------------------------------------------------------------------- containers

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._take_to_mark()))

    def _list(self, _: Any) -> None:
        self.stack.append(self._take_to_mark())

    def _append(self, _: Any) -> None:
        self._extend(self._take(1))

    def _appends(self, _: Any) -> None:
        self._extend(self._take_to_mark())

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _dict(self, _: Any) -> None:
        self.stack.append(_entries(self._take_to_mark()))

    def _setitem(self, _: Any) -> None:
        self._update(self._take(2))

    def _setitems(self, _: Any) -> None:
        self._update(self._take_to_mark())

    def _update(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(_entries(items))

    def _empty_set(self, _: Any) -> None:
        self.stack.append(OPAQUE)

    def _additems(self, _: Any) -> None:
        self._take_to_mark()

    def _frozenset(self, _: Any) -> None:
        self._take_to_mark()
        self.stack.append(OPAQUE)

    # --------------------------------------------------------------------------------------------- names and objects

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_name(module, name)

    def _stack_global(self, _: Any) -> None:
        self._push_name(*self._take(2))

    def _push_name(self, module: Any, name: Any) -> None:
        full = Name(f"{module}.{name}") if type(module) is str is type(name) else None
        if full is None:
            raise UnpicklingError("a global whose name is no text")
        self.names[full] = None
        self.stack.append(full)

    def _reduce(self, _: Any) -> None:
        function, arguments = self._take(2)
        self._push_result(function, arguments)

    def _newobj(self, _: Any) -> None:
        self._reduce(_)

    def _newobj_ex(self, _: Any) -> None:
        function, arguments, _keywords = self._take(3)
        self._push_result(function, arguments)

    def _inst(self, argument: str) -> None:
        arguments = self._take_to_mark()
        self._global(argument)
        self._push_result(self.stack.pop(), tuple(arguments))

    def _obj(self, _: Any) -> None:
        function, *arguments = self._take_to_mark()
        self._push_result(function, tuple(arguments))

    def _push_result(self, function: Any, arguments: Any) -> None:
        known = isinstance(function, Name) and isinstance(arguments, tuple)
        self.stack.append(self.call(function, arguments) if known else OPAQUE)

    def _build(self, _: Any) -> None:
        self._take(1)

    def _binpersid(self, _: Any) -> None:
        self.stack.append(self.persistent(self.stack.pop()))


def _entries(items: list[Any]) -> dict[str, Any]:
    """Keys and values in turn -> the entries whose keys are text."""
    if len(items) % 2:
        raise UnpicklingError("a key without a value")
    # Only text is hashed: its hash is cached, and salted against collisions chosen on purpose.
    return {key: value for key, value in zip(items[::2], items[1::2], strict=True) if isinstance(key, str)}
