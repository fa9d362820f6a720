"""A pickle's plain values, where its tensors lie, and a record of every call in it. Imports nothing and calls nothing.

A pickle is a program. The machine here knows only the instructions that build plain values; a class is a name,
an object is a record of what it was given, and a name outside the tables below is refused. Knows no containers.

Source: torch 2.13, serialization.py and _utils.py; the pickle opcodes of CPython 3.11, pickletools.py.
"""

from __future__ import annotations

import itertools
import pickle
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

from weightops.errors import FormatError, TruncatedError, UnsafeError, WeightopsError, quote
from weightops.files.tensor import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_INSTRUCTIONS = 2_000_000  # 2,500 tensors take 80,000
CUT_OFF = "the download may have been cut off; fetch the file again"
_Malformed = pickle.UnpicklingError  # what is wrong; the machine adds the file and the position


# ------------------------------------------------------------------------------------------------ values


@dataclass(frozen=True, slots=True, eq=False)
class TorchDtype:
    """`code` is the format's, None where it has none; `nbytes` of one value; `storage`: its class of storages."""

    name: str
    code: str | None
    nbytes: int
    storage: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Bytes `start` to `stop` of the stored bytes called `key`."""

    key: str
    dtype: TorchDtype
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor: from value `offset` of a storage on, `strides` (in values) apart."""

    storage: Storage
    spec: TensorSpec
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Absent:
    """A tensor that cannot be given as plain bytes, and why."""

    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A class or function, of which only the name is known."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(slots=True, eq=False)
class Inert:
    """Stands for what calling `name` would have made: keeps what it is given, and does nothing."""

    name: str
    args: tuple[object, ...]
    content: dict[object, object] | list[object] | None = None
    state: object = None

    def __repr__(self) -> str:
        return self.name


def members(value: Any) -> Iterable[tuple[object, object]]:
    """Keys and values of what a container holds; nothing for anything else."""
    if type(value) is dict:
        return value.items()
    if type(value) in (list, tuple):
        return enumerate(value)
    if isinstance(value, Inert):
        # Arguments and state may be another object's too: one member each, so that they are entered once.
        shared = [(key, member) for key, member in (("args", value.args), ("state", value.state)) if member]
        return itertools.chain(members(value.content), shared)
    return ()


def words(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, Inert | Global | TorchDtype):
        return f"{'an object of' if isinstance(value, Inert) else 'the name'} {quote(value.name)}"
    kind = "tensor" if isinstance(value, View | Absent) else type(value).__name__.lower()
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


# ------------------------------------------------------------------------------------------------ tables

_DTYPES = {
    dtype.name: dtype
    for dtype in (
        TorchDtype("torch.float64", "F64", 8, "DoubleStorage"),
        TorchDtype("torch.float32", "F32", 4, "FloatStorage"),
        TorchDtype("torch.float16", "F16", 2, "HalfStorage"),
        TorchDtype("torch.bfloat16", "BF16", 2, "BFloat16Storage"),
        TorchDtype("torch.int64", "I64", 8, "LongStorage"),
        TorchDtype("torch.int32", "I32", 4, "IntStorage"),
        TorchDtype("torch.int16", "I16", 2, "ShortStorage"),
        TorchDtype("torch.int8", "I8", 1, "CharStorage"),
        TorchDtype("torch.uint64", "U64", 8),
        TorchDtype("torch.uint32", "U32", 4),
        TorchDtype("torch.uint16", "U16", 2),
        TorchDtype("torch.uint8", "U8", 1, "ByteStorage"),
        TorchDtype("torch.bool", "BOOL", 1, "BoolStorage"),
        TorchDtype("torch.complex64", "C64", 8, "ComplexFloatStorage"),
        TorchDtype("torch.complex128", None, 16, "ComplexDoubleStorage"),
        TorchDtype("torch.float8_e5m2", "F8_E5M2", 1),
        TorchDtype("torch.float8_e4m3fn", "F8_E4M3", 1),
        TorchDtype("torch.float8_e8m0fnu", "F8_E8M0", 1),
        TorchDtype("torch.float8_e5m2fnuz", "F8_E5M2FNUZ", 1),
        TorchDtype("torch.float8_e4m3fnuz", "F8_E4M3FNUZ", 1),
        TorchDtype("torch.qint8", None, 1, "QInt8Storage"),
        TorchDtype("torch.quint8", None, 1, "QUInt8Storage"),
        TorchDtype("torch.qint32", None, 4, "QInt32Storage"),
    )
}

_STORAGES = {dtype.storage: dtype for dtype in _DTYPES.values() if dtype.storage} | {
    "UntypedStorage": _DTYPES["torch.uint8"],
    "_UntypedStorage": _DTYPES["torch.uint8"],  # its name in torch 1.11 and 1.12
}


def _numbers(value: object, what: str) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 32:  # numpy's own limit before 2.0
        raise _Malformed(f"a tensor with {what} that are no tuple of at most 32 numbers")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in value):
        raise _Malformed(f"a tensor with {what} that are not whole numbers from 0 to 2**63")
    return value


def _rebuild_tensor(
    storage: object, offset: object, shape: object, strides: object, *rest: object, dtype: object = None
) -> object:
    """Versions 1 and 2, whose dtype is the storage's; `rest`: whether it has a gradient, hooks, flags."""
    if not isinstance(storage, Storage) or not isinstance(dtype := dtype or storage.dtype, TorchDtype):
        raise _Malformed("a tensor without a storage or a dtype")
    if any(type(flags) is dict and any(flags.values()) for flags in rest[2:]):
        return Absent("a conjugated or negated view, whose bytes are not its values")
    if dtype.code is None:
        return Absent(f"values of {dtype.name}, which are not read")
    (first,) = _numbers((offset,), "offsets")
    sizes, steps = _numbers(shape, "sizes"), _numbers(strides, "strides")
    if len(sizes) != len(steps):
        raise _Malformed(f"a tensor with {len(sizes)} sizes and {len(steps)} strides")
    if prod(sizes) >= 2**63:
        raise _Malformed("a tensor of 2**63 values or more")
    return View(storage, TensorSpec(dtype.code, sizes), first, steps)


_FUNCTIONS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": lambda *args: _rebuild_tensor(*args[:6], *args[7:], dtype=args[6]),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type": lambda func, _type, args, *_: _FUNCTIONS[func.name](*args),
    "torch._tensor._rebuild_from_type_v2": lambda func, _type, args, *_: _FUNCTIONS[func.name](*args),
    "torch._utils._rebuild_qtensor": lambda *_: Absent("a quantised tensor"),
    "torch._utils._rebuild_sparse_tensor": lambda *_: Absent("a sparse tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda *_: Absent("a meta tensor, which has no values"),
    "torch._utils._rebuild_device_tensor_from_numpy": lambda *_: Absent("a tensor stored as a numpy array"),
}

# Modules by their older names: Python 2's, and torch's before 1.9.
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.tensor": "torch._tensor"}

_DICTS = frozenset({"collections.OrderedDict", "collections.defaultdict", "builtins.dict"})

# Names that real checkpoints mention; none is ever imported.
_INERT = frozenset({
    "torch.device", "torch.Size", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer",
    "torch.nn.modules.container.ParameterDict", "torch.nn.modules.container.ParameterList",
    "torch.storage.TypedStorage", "torch.storage._TypedStorage", "torch.serialization._get_layout",
    "torch.per_tensor_affine", "torch.per_channel_affine", "torch.torch_version.TorchVersion",
    "builtins.set", "builtins.frozenset", "builtins.list", "builtins.tuple", "builtins.bytearray", "builtins.bytes",
    "builtins.str", "builtins.unicode", "builtins.int", "builtins.long", "builtins.float", "builtins.bool",
    "builtins.complex", "builtins.range", "builtins.slice", "builtins.object", "copyreg._reconstructor",
    "_codecs.encode", "collections.Counter", "collections.deque", "argparse.Namespace", "types.SimpleNamespace",
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer",
})  # fmt: skip

_INERT_PACKAGES = (
    "pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.", "omegaconf.", "torch.optim.",
    "datetime.", "pathlib.", "typing.",
)  # fmt: skip

# A dict of tensors in the form of a module, as textual inversion saves its vectors.
_PARAMETERS = "torch.nn.modules.container.ParameterDict"


# ------------------------------------------------------------------------------------------------ the machine

_REASONS: dict[type[Exception], str] = {
    IndexError: "takes a value where there is none",
    UnicodeDecodeError: "a text that is not UTF-8",
    RecursionError: "nested too deeply",
    TypeError: "a call with the wrong arguments",
}


def _key(key: object) -> object:
    """A dict's key as it is safe to hash: a deep tuple overflows the C stack, chosen numbers make a dict quadratic."""
    if key is None or type(key) in (str, bytes, bool) or (type(key) is int and abs(key) < 2**60):
        return key
    if isinstance(key, Global | Inert | TorchDtype | View | Absent):
        return key  # by identity
    parts = key if type(key) is tuple else (key,)
    if len(parts) <= 8 and all(p is None or type(p) in (str, bytes, bool, int, float) for p in parts):
        return Inert(f"builtins.{type(key).__name__}", parts)
    raise _Malformed(f"{words(key)} as the key of a dict, expected a text or a number")


def _content(target: object, kind: type) -> object:
    """What `target` keeps its items in: itself or, for an object, a dict or a list of its own."""
    if not isinstance(target, Inert):
        return target
    target.content = kind() if target.content is None else target.content
    return target.content


class Machine(pickle._Unpickler):
    """The standard library's machine in Python, less every instruction that could import, call or hash the unknown.

    Reads `file` from `at` to `stop`, a pickle at each `load`. Believes no size before it is compared with the end.
    """

    # The C machine keeps its memo in an array, which one instruction can ask to be gigabytes large; this is a dict.
    memo: dict[int, object]
    stack: list[Any]
    metastack: list[list[Any]]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, label: str, file: BinaryIO, at: int, stop: int) -> None:
        # Texts of Python 2 are bytes; a file must not be refused for a word in Latin-1 among its settings.
        super().__init__(self, encoding="utf-8", errors="backslashreplace")
        self.label, self.file, self.at, self.stop = label, file, file.seek(at), stop
        self.instructions = 0
        self.storages: dict[str, tuple[TorchDtype, int]] = {}

    def load(self) -> object:
        self.memo, self.stack, self.metastack = {}, [], []
        self.append = self.stack.append
        at = self.at
        try:
            while (code := self.read(1)) != pickle.STOP:
                self.spend(1)
                if code[0] not in _INSTRUCTIONS:
                    raise _Malformed(f"instruction {code!r}, which torch.save never writes")
                _INSTRUCTIONS[code[0]](self)
                at = self.at
            return self.stack.pop()
        except WeightopsError:
            raise
        except Exception as e:
            why = _REASONS.get(type(e), "a value that cannot be read")
            why = str(e) if isinstance(e, pickle.UnpicklingError) else why
            raise FormatError(self.label, f"a damaged pickle: byte {at:,}: {why}") from None

    def _cut(self, wanted: str) -> TruncatedError:
        what = f"a damaged pickle: byte {self.at:,}: wants {wanted}, but its end is at {self.stop:,}"
        return TruncatedError(self.label, what, CUT_OFF)

    def read(self, n: int) -> bytes:
        if n > self.stop - self.at:
            raise self._cut(f"{n:,} bytes")
        self.at += n
        return self.file.read(n)

    def readline(self) -> bytes:
        line = self.file.readline(min(1024, self.stop - self.at))
        if not line.endswith(b"\n"):
            raise self._cut("a line") if self.stop - self.at < 1024 else _Malformed("a line of more than 1,024 bytes")
        self.at += len(line)
        return line

    def spend(self, instructions: int) -> None:
        self.instructions += instructions
        if self.instructions > MAX_INSTRUCTIONS:
            raise _Malformed(f"more than {MAX_INSTRUCTIONS:,} instructions, the most that weightops follows")

    def find_class(self, module: str, name: str) -> object:
        full = f"{_RENAMED.get(module, module)}.{name}"
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if full in _DTYPES:
            return _DTYPES[full]
        if full in _FUNCTIONS or full in _DICTS or full in _INERT or full.startswith(_INERT_PACKAGES):
            return Global(full)
        if not all(part.isidentifier() for part in full.split(".")):
            raise _Malformed(f"{quote(full)}, which is no name of a class")
        raise UnsafeError(
            self.label,
            f"refers to {quote(f'{module}.{name}')}, which rebuilding tensors never needs",
            "it holds a whole module rather than weights; save its state_dict()"
            if full.startswith("torch.nn.")
            else "loaded elsewhere, this file may run code; use a safetensors release of these weights",
        )

    def persistent_load(self, pid: Any) -> object:
        match pid:
            case ("module", Global() as named, _, _):
                return named  # a class of torch.nn, which files before torch 1.6 give with its source
            case ("storage", TorchDtype() as dtype, str(key), _, count, *view):
                (values,) = _numbers((count,), "storage sizes")
            case _:
                raise _Malformed("a persistent id that names no storage")
        if self.storages.setdefault(key, (dtype, values)) != (dtype, values):
            raise _Malformed(f"storage {quote(key)}, which has another size or dtype elsewhere")
        if not view or view[0] is None:
            return Storage(key, dtype, 0, values * dtype.nbytes)
        start, n = _numbers(view[0][1:], "storage views")
        if start + n > values:
            raise _Malformed(f"a view of storage {quote(key)} to value {start + n:,} of {values:,}")
        return Storage(key, dtype, start * dtype.nbytes, (start + n) * dtype.nbytes)

    def _call(self, args: object) -> None:
        func = self.stack[-1]
        if not isinstance(func, Global) or type(args) is not tuple:
            raise _Malformed(f"a call of {words(func)}")
        if func.name in _DICTS:
            self.stack[-1] = self._dict(args[-1] if args else None)
        else:
            build = _FUNCTIONS.get(func.name)
            self.stack[-1] = build(*args) if build else Inert(func.name, args)

    def _dict(self, content: object) -> dict[object, object]:
        pairs = list(content.items()) if type(content) is dict else content if type(content) is list else []
        self.spend(len(pairs))  # one instruction each may copy the same long list
        made: dict[object, object] = {}
        for pair in pairs:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise _Malformed(f"{words(pair)} as an item of a dict, expected a pair")
            self._put(list(pair), made)
        return made

    def _put(self, items: list[object], target: object) -> None:
        into = _content(target, dict)
        if type(into) is not dict or len(items) % 2:
            raise _Malformed(f"{len(items)} keys and values put into {words(target)}")
        for given, value in zip(items[::2], items[1::2], strict=True):
            key = _key(given)
            if key in into:
                raise _Malformed(f"key {quote(key)} twice in one dict")
            into[key] = value

    def _extend(self, items: list[object], target: object) -> None:
        into = _content(target, list)
        if type(into) is not list:
            raise _Malformed(f"{len(items)} values added to {words(target)}")
        into.extend(items)

    def _build(self, state: object) -> None:
        # A state_dict's own attribute holds the versions of its modules: nothing that loads as a weight.
        top = self.stack[-1]
        if isinstance(top, Inert):
            top.state = state
            if top.name == _PARAMETERS and type(state) is dict and type(state.get("_parameters")) is dict:
                self.stack[-1] = state["_parameters"]


_STANDARD = pickle._Unpickler.dispatch

_INSTRUCTIONS: dict[int, Callable[[Any], object]] = {
    code[0]: _STANDARD[code[0]]
    for code in (
        pickle.PROTO, pickle.MARK, pickle.POP, pickle.POP_MARK,
        pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2,
        pickle.LONG1, pickle.LONG4, pickle.BINFLOAT, pickle.BINSTRING, pickle.SHORT_BINSTRING,
        pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8,
        pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8,
        pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
        pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_DICT,
        pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.MEMOIZE,
        pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID,
    )
} | {
    pickle.FRAME[0]: lambda m: m.read(8),  # a frame's length only helps a reader to read ahead
    pickle.BYTEARRAY8[0]: lambda m: m.append(bytearray(m.read(int.from_bytes(m.read(8), "little")))),
    pickle.REDUCE[0]: lambda m: m._call(m.stack.pop()),
    pickle.NEWOBJ[0]: lambda m: m._call(m.stack.pop()),  # cls.__new__(cls, *args): to us the same record
    pickle.BUILD[0]: lambda m: m._build(m.stack.pop()),
    pickle.APPEND[0]: lambda m: m._extend([m.stack.pop()], m.stack[-1]),
    pickle.APPENDS[0]: lambda m: m._extend(m.pop_mark(), m.stack[-1]),
    pickle.SETITEM[0]: lambda m: m._put([m.stack.pop(-2), m.stack.pop()], m.stack[-1]),
    pickle.SETITEMS[0]: lambda m: m._put(m.pop_mark(), m.stack[-1]),
    # A set is a list to us, a frozen one a tuple: nothing to hash.
    pickle.EMPTY_SET[0]: _STANDARD[pickle.EMPTY_LIST[0]],
    pickle.ADDITEMS[0]: lambda m: m._extend(m.pop_mark(), m.stack[-1]),
    pickle.FROZENSET[0]: _STANDARD[pickle.TUPLE[0]],
}  # fmt: skip
