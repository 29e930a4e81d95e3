"""The pickle inside a .pth file, read by a machine that knows only what a table of dense tensors needs.

Nothing a file says can run: a name it asks for becomes an entry of a fixed table or an error, never a Python object,
and an instruction outside `_Machine` is an error. (Python's own unpickler, limited to safe names, could still be made
to reserve gigabytes with one instruction, overflow the C stack, or change the stand-ins it was given.)
"""

import enum
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from infctx.errors import CheckpointError

# About 40 instructions a tensor; a second of reading.
MAX_INSTRUCTIONS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageReference:
    """A run of `num_elements` numbers kept in the record `data/KEY`. Its fields are as the file gave them."""

    dtype: torch.dtype
    key: str
    num_elements: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """How the file describes a tensor. Nothing here has been checked but the number of fields."""

    storage: object
    offset: object
    size: object
    stride: object


class _Callable(enum.Enum):
    ORDERED_DICT = "collections.OrderedDict"
    REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
    REBUILD_PARAMETER = "torch._utils._rebuild_parameter"


_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_ADMITTED: dict[str, _Callable | torch.dtype] = {
    **{one.value: one for one in _Callable},
    **{f"{module}.{name}": dtype for module in ("torch", "torch.storage") for name, dtype in _STORAGES.items()},
}

_LITERALS = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
)


def read_tensor_pickle(pickled: bytes, path: Path) -> object:
    """Read a pickle of nested dicts, lists, tuples, plain values and tensors.

    Returns: what was pickled, with a `TensorRecord` in the place of each tensor.
    Raises: CheckpointError for a forbidden name, an instruction no tensor file needs, or a malformed pickle.
    """
    machine = _Machine(path)
    done_bytes: int | None = 0
    try:
        for count, (instruction, argument, position) in enumerate(pickletools.genops(pickled)):
            done_bytes = position
            if count >= MAX_INSTRUCTIONS:
                raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions")
            if instruction.name == "STOP":
                return machine.pop()
            machine.run(instruction.name, argument)
    except (ValueError, IndexError, TypeError, OverflowError, MemoryError) as error:
        # The text of the error can quote the file: keep it short and on one line.
        what = repr(str(error) or type(error).__name__)[1:161]
        raise CheckpointError(
            f"{path}: not a file of tensors, or damaged: data.pkl at byte {done_bytes}: {what}. "
            "Expected what torch.save writes for a dict of name -> tensor. Fetch the file again."
        ) from error
    raise AssertionError("genops ends with STOP or raises")


class _Machine:
    """The stack and the memo of a pickle being read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack: list[object] = []
        self._outer: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self._actions: dict[str, Callable[[], None]] = {
            "MARK": self._mark,
            "TUPLE": lambda: self._push(tuple(self._pop_mark())),
            "TUPLE1": lambda: self._push(self._pop_many(1)),
            "TUPLE2": lambda: self._push(self._pop_many(2)),
            "TUPLE3": lambda: self._push(self._pop_many(3)),
            "EMPTY_TUPLE": lambda: self._push(()),
            "EMPTY_LIST": lambda: self._push([]),
            "EMPTY_DICT": lambda: self._push({}),
            "NONE": lambda: self._push(None),
            "NEWTRUE": lambda: self._push(True),
            "NEWFALSE": lambda: self._push(False),
            "APPEND": lambda: self._append(self._pop_many(1)),
            "APPENDS": lambda: self._append(tuple(self._pop_mark())),
            "SETITEM": lambda: self._set_items(self._pop_many(2)),
            "SETITEMS": lambda: self._set_items(tuple(self._pop_mark())),
            "MEMOIZE": lambda: self._remember(len(self._memo)),
            "STACK_GLOBAL": lambda: self._push(self._admit(*self._pop_many(2))),
            "REDUCE": self._reduce,
            "BUILD": self._build,
            "BINPERSID": self._refer_to_storage,
        }

    def run(self, name: str, argument: object) -> None:
        """Carry out one instruction; ValueError if it is not one of ours or does not fit the stack."""
        if name in ("PROTO", "FRAME"):
            return
        if name in self._actions:
            self._actions[name]()
        elif name in _LITERALS:
            self._push(argument)
        elif name in ("BINPUT", "LONG_BINPUT") and isinstance(argument, int):
            self._remember(argument)
        elif name in ("BINGET", "LONG_BINGET") and isinstance(argument, int):
            if argument not in self._memo:
                raise ValueError(f"value {argument} is used before it is given")
            self._push(self._memo[argument])
        elif name == "GLOBAL":
            self._push(self._admit(*str(argument).rsplit(" ", 1)))
        else:
            if name == "INST":
                # Protocol 0 names and calls in one instruction: refuse it, with the name where that is forbidden too.
                self._admit(*str(argument).rsplit(" ", 1))
            raise ValueError(f"pickle instruction {name}, which no file of tensors needs")

    def pop(self) -> object:
        """Take the topmost value."""
        return self._pop_many(1)[0]

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop_many(self, count: int) -> tuple[object, ...]:
        if len(self._stack) < count:
            raise ValueError("a value is missing from the stack")
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        return values

    def _top(self, kind: type, what: str) -> object:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise ValueError(f"{what} where there is no {kind.__name__}")
        return self._stack[-1]

    def _mark(self) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[object]:
        if not self._outer:
            raise ValueError("a mark is missing from the stack")
        values, self._stack = self._stack, self._outer.pop()
        return values

    def _remember(self, index: int) -> None:
        if not self._stack:
            raise ValueError("nothing to remember")
        self._memo[index] = self._stack[-1]

    def _append(self, values: tuple[object, ...]) -> None:
        target = self._top(list, "an item")
        assert isinstance(target, list)
        target.extend(values)

    def _set_items(self, flat: tuple[object, ...]) -> None:
        target = self._top(dict, "a key and value")
        assert isinstance(target, dict)
        if len(flat) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            # Only text: hashing a tuple nested a million deep would overflow the C stack.
            if type(key) is not str:
                raise ValueError(f"a key of type {type(key).__name__}; expected text")
            if key in target:
                raise ValueError(f"two values for the key {key[:80]!r}")
            target[key] = value

    def _admit(self, *words: object) -> object:
        """Look a global name up in the fixed table."""
        name = ".".join(str(word)[:80] if isinstance(word, str) else type(word).__name__ for word in words)
        if name not in _ADMITTED or not all(isinstance(word, str) for word in words):
            raise CheckpointError(
                f"{self._path}: refused: the file asks to run `{ascii(name)[1:-1]}`. A model file may hold dense "
                "tensors only, and nothing of it was run. Take the file from its authors; if you trust this one, load "
                "it elsewhere and save its tensors again with torch.save({name: tensor})."
            )
        return _ADMITTED[name]

    def _reduce(self) -> None:
        call, arguments = self._pop_many(2)
        if type(arguments) is not tuple:
            raise ValueError("a call without a tuple of arguments")
        if call is _Callable.ORDERED_DICT and not arguments:
            self._push({})
        elif call is _Callable.REBUILD_TENSOR and len(arguments) in (6, 7):
            if len(arguments) == 7 and arguments[6]:
                raise ValueError("a tensor with a pending conjugation or negation")
            storage, offset, size, stride = arguments[:4]
            self._push(TensorRecord(storage=storage, offset=offset, size=size, stride=stride))
        elif call is _Callable.REBUILD_PARAMETER and len(arguments) == 3 and type(arguments[0]) is TensorRecord:
            self._push(arguments[0])
        else:
            name = call.value if isinstance(call, _Callable) else type(call).__name__
            raise ValueError(f"a call of {name} with {len(arguments)} arguments of the wrong kind")

    def _build(self) -> None:
        # Module.state_dict() hangs `_metadata` (version numbers of layers) on its OrderedDict: read it and drop it.
        self.pop()
        self._top(dict, "attributes")

    def _refer_to_storage(self) -> None:
        reference = self.pop()
        if type(reference) is tuple and len(reference) == 5:
            kind, dtype, key, device, num_elements = reference
            named = kind == "storage" and type(key) is str and type(device) is str
            if named and isinstance(dtype, torch.dtype) and type(num_elements) is int:
                self._push(StorageReference(dtype=dtype, key=key, num_elements=num_elements))
                return
        raise ValueError("a storage that is not ('storage', kind, record, device, number of elements)")
