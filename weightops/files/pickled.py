"""Files of torch.save (.ckpt, .pt, .pth, .bin): where their tensors lie. Runs nothing and imports nothing.

A pickle is a program. The machine here knows only the instructions that build plain values; a class is a name,
an object is a record of what it was given, and a name outside the tables below is refused.

Source: torch 2.13, serialization.py and _utils.py; the pickle opcodes of CPython 3.11, pickletools.py.
"""

from __future__ import annotations

import functools
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from weightops.errors import FormatError, TruncatedError, UnsafeError, WeightopsError, listing, printable, quote
from weightops.files.dtypes import DTYPES
from weightops.files.header import MAX_HEADER_BYTES, MAX_TENSORS, impostor
from weightops.files.source import ByteSource, read
from weightops.files.tensor import TensorInfo, TensorSpec

if TYPE_CHECKING:
    from zipfile import ZipInfo

    from numpy.typing import NDArray

MAX_PICKLE_BYTES = 128 << 20  # of the pickle alone, which holds names and sizes; 2,500 tensors take 400 kB
MAX_DIRECTORY_BYTES = 32 << 20  # of a zip archive's directory; 250,000 tensors take 20 MB
MAX_INSTRUCTIONS = 2_000_000  # of the pickle; 2,500 tensors take 80,000
MAX_REPEATED_BYTES = 16 << 20  # of a tensor that shows few stored bytes many times
_CUT_OFF = "the download may have been cut off; fetch the file again"


class Pickled(NamedTuple):
    """A file's `tensors` under dotted names, and in `left_out` the (dotted path, reason) of everything else in it."""

    tensors: dict[str, TensorInfo]
    left_out: list[tuple[str, str]]
    metadata: dict[str, str]


def read_pickled(source: ByteSource, shard: int = 0) -> Pickled:
    """Find the tensors of a file of torch.save. Raises FormatError; UnsafeError when it asks for more than tensors."""
    start = read(source, 0, min(source.size, 512))
    if start.startswith(b"PK\x03\x04"):
        root, locate = _read_zip(source)
    else:
        _refuse_impostor(source.label, start)
        root, locate = _read_legacy(source, start)
    return _Flattening(source.label, shard, locate).run(root)


# ------------------------------------------------------------------------------------------------ values


class _Malformed(Exception):
    """What is wrong with a pickle; the machine adds the file and the position."""


@dataclass(frozen=True, slots=True, eq=False)
class _Dtype:
    """A torch dtype: `code` is the format's, None where it has none; `nbytes` of one value."""

    name: str
    code: str | None
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """Values `first` to `first + values` of the stored bytes called `key`, which are `nbytes` in all."""

    key: str
    dtype: _Dtype
    nbytes: int
    first: int
    values: int


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    storage: _Storage
    dtype: _Dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Absent:
    """A tensor that cannot be given as plain bytes, and why."""

    reason: str


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Global:
    """The name of a class or function. `build` is what we do when it is called; None: record the call."""

    name: str
    build: Callable[..., object] | None = None

    def __repr__(self) -> str:
        return self.name


class _Inert:
    """Stands for an object of a class that is never imported: keeps what it is given and does nothing."""

    __slots__ = ("args", "items", "name", "state", "values")

    def __init__(self, name: str, args: tuple[object, ...] = ()) -> None:
        self.name = name
        self.args = args
        self.items: dict[object, object] | None = None
        self.values: list[object] | None = None
        self.state: object = None

    def __repr__(self) -> str:
        return self.name


def _members(value: Any) -> Iterable[tuple[object, object]]:
    """Keys and values of what a container holds; nothing for anything else."""
    if type(value) is dict:
        return value.items()
    if type(value) in (list, tuple):
        return enumerate(value)
    if not isinstance(value, _Inert):
        return ()
    # Arguments and state may be another object's too: one member each, so that they are entered once.
    shared = [(key, member) for key, member in (("args", value.args), ("state", value.state)) if member]
    return itertools.chain((value.items or {}).items(), enumerate(value.values or ()), shared)


def _words(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, _Inert | _Global | _Dtype):
        return f"{'an object of' if isinstance(value, _Inert) else 'the name'} {quote(value.name)}"
    if isinstance(value, _Storage):
        return "a storage"
    if isinstance(value, _Tensor | _Absent):
        return "a tensor"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


# ------------------------------------------------------------------------------------------------ tables

_DTYPES: dict[str, _Dtype] = {
    "float64": _Dtype("torch.float64", "F64", 8),
    "float32": _Dtype("torch.float32", "F32", 4),
    "float16": _Dtype("torch.float16", "F16", 2),
    "bfloat16": _Dtype("torch.bfloat16", "BF16", 2),
    "int64": _Dtype("torch.int64", "I64", 8),
    "int32": _Dtype("torch.int32", "I32", 4),
    "int16": _Dtype("torch.int16", "I16", 2),
    "int8": _Dtype("torch.int8", "I8", 1),
    "uint64": _Dtype("torch.uint64", "U64", 8),
    "uint32": _Dtype("torch.uint32", "U32", 4),
    "uint16": _Dtype("torch.uint16", "U16", 2),
    "uint8": _Dtype("torch.uint8", "U8", 1),
    "bool": _Dtype("torch.bool", "BOOL", 1),
    "complex64": _Dtype("torch.complex64", "C64", 8),
    "float8_e5m2": _Dtype("torch.float8_e5m2", "F8_E5M2", 1),
    "float8_e4m3fn": _Dtype("torch.float8_e4m3fn", "F8_E4M3", 1),
    "float8_e8m0fnu": _Dtype("torch.float8_e8m0fnu", "F8_E8M0", 1),
    "float8_e5m2fnuz": _Dtype("torch.float8_e5m2fnuz", "F8_E5M2FNUZ", 1),
    "float8_e4m3fnuz": _Dtype("torch.float8_e4m3fnuz", "F8_E4M3FNUZ", 1),
    # The format's F4 counts halves of a byte, this dtype counts bytes: strides and shapes would need translation.
    "float4_e2m1fn_x2": _Dtype("torch.float4_e2m1fn_x2", None, 1),
    "complex128": _Dtype("torch.complex128", None, 16),
    "complex32": _Dtype("torch.complex32", None, 4),
    "qint8": _Dtype("torch.qint8", None, 1),
    "qint32": _Dtype("torch.qint32", None, 4),
    "quint8": _Dtype("torch.quint8", None, 1),
    "quint4x2": _Dtype("torch.quint4x2", None, 1),
    "quint2x4": _Dtype("torch.quint2x4", None, 1),
}

_STORAGES: dict[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QInt32Storage": "qint32",
    "QUInt8Storage": "quint8",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
    "_UntypedStorage": "uint8",  # its name in torch 1.11 and 1.12
}


def _dims(value: object, what: str) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 32:  # numpy's own limit before 2.0
        raise _Malformed(f"a tensor with {what} that are no tuple of at most 32 numbers")
    for n in value:
        if type(n) is not int or not 0 <= n < 2**63:
            raise _Malformed(f"a tensor with {what} that are not whole numbers from 0 to 2**63")
    return value


def _rebuild_tensor(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _grad: object = None,
    _hooks: object = None,
    flags: object = None,
    dtype: object = None,
) -> object:
    """Versions 1 and 2: the dtype is the storage's."""
    if not isinstance(storage, _Storage):
        raise _Malformed("a tensor without a storage")
    dtype = dtype or storage.dtype
    if not isinstance(dtype, _Dtype):
        raise _Malformed("a tensor without a dtype")
    if type(flags) is dict and any(flags.values()):
        return _Absent("a conjugated or negated view, whose bytes are not its values")
    if dtype.code is None:
        return _Absent(f"values of {dtype.name}, which are not read")
    (first,) = _dims((offset,), "offsets")
    sizes, steps = _dims(shape, "sizes"), _dims(strides, "strides")
    if len(sizes) != len(steps):
        raise _Malformed(f"a tensor with {len(sizes)} sizes and {len(steps)} strides")
    if prod(sizes) >= 2**63:
        raise _Malformed("a tensor of 2**63 values or more")
    return _Tensor(storage, dtype, first, sizes, steps)


def _rebuild_tensor_v3(
    storage: object, offset: object, shape: object, strides: object, _grad: object, _hooks: object, *rest: object
) -> object:
    """Version 3: the storage is bytes, and the dtype stands beside it."""
    dtype, *flags = rest
    return _rebuild_tensor(storage, offset, shape, strides, None, None, flags[0] if flags else None, dtype)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def _rebuild_from_type(func: object, _type: object, args: tuple[object, ...], *_: object) -> object:
    if not isinstance(func, _Global) or func.build is None:
        raise _Malformed("a tensor rebuilt by what rebuilds no tensor")
    return func.build(*args)


_FUNCTIONS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._utils._rebuild_qtensor": lambda *_: _Absent("a quantised tensor"),
    "torch._utils._rebuild_sparse_tensor": lambda *_: _Absent("a sparse tensor"),
    "torch._utils._rebuild_nested_tensor": lambda *_: _Absent("a nested tensor"),
    "torch._utils._rebuild_wrapper_subclass": lambda *_: _Absent("a tensor subclass without values of its own"),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda *_: _Absent("a meta tensor, which has no values"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda *_: _Absent("a tensor of an XLA device"),
    "torch._utils._rebuild_device_tensor_from_numpy": lambda *_: _Absent("a tensor stored as a numpy array"),
    "torch._utils._rebuild_xla_tensor": lambda *_: _Absent("a tensor stored as a numpy array"),
    "torch.Size": lambda sizes=(): sizes,
}

# Modules by their older names: Python 2's, and torch's before 1.9.
_RENAMED: dict[str, str] = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.tensor": "torch._tensor"}

_DICTS = frozenset({"collections.OrderedDict", "collections.defaultdict", "builtins.dict"})

# Names that real checkpoints mention; none is ever imported.
_INERT = frozenset({
    "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer",
    "torch.nn.modules.container.ParameterDict", "torch.nn.modules.container.ParameterList",
    "torch.storage.TypedStorage", "torch.storage._TypedStorage", "torch.serialization._get_layout",
    "torch.per_tensor_affine", "torch.per_tensor_symmetric", "torch.per_channel_affine",
    "torch.per_channel_symmetric", "torch.per_channel_affine_float_qparams", "torch.torch_version.TorchVersion",
    "builtins.set", "builtins.frozenset", "builtins.list", "builtins.tuple", "builtins.bytearray", "builtins.bytes",
    "builtins.str", "builtins.unicode", "builtins.int", "builtins.long", "builtins.float", "builtins.bool",
    "builtins.complex", "builtins.slice", "builtins.range", "builtins.xrange", "builtins.object",
    "collections.Counter", "collections.deque", "copyreg._reconstructor", "_codecs.encode",
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer",
    "argparse.Namespace", "types.SimpleNamespace", "datetime.datetime", "datetime.date", "datetime.timedelta",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePath", "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
})  # fmt: skip

# A dict of tensors in the form of a module, as textual inversion saves its vectors.
_PARAMETERS = "torch.nn.modules.container.ParameterDict"

_INERT_PACKAGES = (
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "lightning_utilities.",
    "omegaconf.",
    "torch.optim.",
    "typing.",
)


# ------------------------------------------------------------------------------------------------ the machine


class _Stream:
    """A source read forward from `at` to `stop`. No size that a pickle names is believed before it is compared."""

    BLOCK = 1 << 16

    def __init__(self, source: ByteSource, at: int, stop: int) -> None:
        self.source, self.at, self.stop = source, at, stop
        self._block, self._first = b"", at

    def _ahead(self, n: int) -> int:
        """Where in the block the next `n` bytes are, or as many of them as there are."""
        if self.at + n > self._first + len(self._block):
            self._block, self._first = read(self.source, self.at, min(self.BLOCK, self.stop - self.at)), self.at
        return self.at - self._first

    def _cut(self, wanted: str) -> TruncatedError:
        what = f"a damaged pickle: byte {self.at:,}: wants {wanted}, but its end is at {self.stop:,}"
        return TruncatedError(self.source.label, what, _CUT_OFF)

    def read(self, n: int) -> bytes:
        if n > self.stop - self.at:
            raise self._cut(f"{n:,} bytes")
        if n > self.BLOCK:
            data = read(self.source, self.at, n)
        else:
            begin = self._ahead(n)
            data = self._block[begin : begin + n]
        self.at += n
        return data

    def readline(self) -> bytes:
        begin = self._ahead(1024)
        end = self._block.find(b"\n", begin, begin + 1024) + 1
        if not end:
            raise self._cut("a line") if self.stop - self.at < 1024 else _Malformed("a line of more than 1,024 bytes")
        self.at += end - begin
        return self._block[begin:end]


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> NoReturn:
        raise _Malformed(f"instruction {bytes([code])!r}, which torch.save never writes")


def _key(key: object) -> object:
    """A dict's key as it is safe to hash: a deep tuple overflows the C stack, chosen numbers make a dict quadratic."""
    if key is None or type(key) in (str, bytes, bool) or (type(key) is int and abs(key) < 2**60):
        return key
    if isinstance(key, _Global | _Inert | _Dtype | _Tensor | _Absent):
        return key  # by identity
    parts = key if type(key) is tuple else (key,)
    if len(parts) <= 8 and all(p is None or type(p) in (str, bytes, bool, int, float) for p in parts):
        return _Inert(f"builtins.{type(key).__name__}", parts)
    raise _Malformed(f"{_words(key)} as the key of a dict, expected a text or a number")


class _Machine(pickle._Unpickler):
    """The standard library's machine in Python, less every instruction that could import, call or hash the unknown."""

    # The C machine keeps its memo in an array, which one instruction can ask to be gigabytes large; this is a dict.
    stack: list[Any]
    metastack: list[list[Any]]
    append: Callable[[object], None]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]

    dispatch = _Instructions(
        (code[0], pickle._Unpickler.dispatch[code[0]])
        for code in (
            pickle.PROTO, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP,
            pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2,
            pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT,
            pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE,
            pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8,
            pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
            pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_DICT,
            pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.MEMOIZE,
            pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID, pickle.OBJ,
        )
    )  # fmt: skip

    def __init__(self, stream: _Stream) -> None:
        # Texts of Python 2 are bytes; a file must not be refused for a word in Latin-1 among its settings.
        super().__init__(stream, encoding="utf-8", errors="backslashreplace")
        self.stream, self.read, self.readline = stream, stream.read, stream.readline
        self.instructions = 0
        self.storages: dict[str, tuple[_Dtype, int]] = {}

    def load(self) -> object:
        self.stack, self.metastack = [], []
        self.append = self.stack.append
        at = self.stream.at
        try:
            while (code := self.read(1)) != pickle.STOP:
                self.spend(1)
                self.dispatch[code[0]](self)
                at = self.stream.at
            return self.stack.pop()
        except WeightopsError:
            raise
        except Exception as e:
            raise FormatError(self.stream.source.label, f"a damaged pickle: byte {at:,}: {_reason(e)}") from None

    def spend(self, instructions: int) -> None:
        self.instructions += instructions
        if self.instructions > MAX_INSTRUCTIONS:
            raise _Malformed(f"more than {MAX_INSTRUCTIONS:,} instructions, the most that weightops follows")

    def find_class(self, module: str, name: str) -> object:
        full = f"{_RENAMED.get(module, module)}.{name}"
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _DTYPES[_STORAGES[name]]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if full in _FUNCTIONS:
            return _Global(full, _FUNCTIONS[full])
        if full in _DICTS or full in _INERT or f"{module}.".startswith(_INERT_PACKAGES):
            return _Global(full)
        if not all(part.isidentifier() for part in full.split(".")):
            raise _Malformed(f"{quote(full)}, which is no name of a class")
        raise UnsafeError(
            self.stream.source.label,
            f"refers to {quote(f'{module}.{name}')}, which rebuilding tensors never needs",
            "it holds a whole module rather than weights; save its state_dict()"
            if full.startswith("torch.nn.")
            else "loaded elsewhere, this file may run code; use a safetensors release of these weights",
        )

    def persistent_load(self, pid: object) -> object:
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], _Global):
            return pid[1]  # a class of torch.nn, which files before torch 1.6 give with its source
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise _Malformed("a persistent id that names no storage")
        _, dtype, key, _, values, *view = pid
        if not isinstance(dtype, _Dtype) or type(key) is not str:
            raise _Malformed("a storage without a dtype or a key")
        (size,) = _dims((values,), "storage sizes")
        if self.storages.setdefault(key, (dtype, size)) != (dtype, size):
            raise _Malformed(f"storage {quote(key)}, which has another size or dtype elsewhere")
        first, count = 0, size
        if view and view[0] is not None:
            _, first, count = view[0]
            first, count = _dims((first, count), "storage views")
            if first + count > size:
                raise _Malformed(f"a view of storage {quote(key)} to value {first + count:,} of {size:,}")
        return _Storage(key, dtype, size * dtype.nbytes, first, count)

    def _call(self, func: object, args: object) -> object:
        if not isinstance(func, _Global) or type(args) is not tuple:
            raise _Malformed(f"a call of {_words(func)}")
        if func.name in _DICTS:
            return self._dict(args[-1] if args else None)
        return _Inert(func.name, args) if func.build is None else func.build(*args)

    def _dict(self, content: object) -> dict[object, object]:
        pairs = list(content.items()) if type(content) is dict else content if type(content) is list else []
        self.spend(len(pairs))  # one instruction each may copy the same long list
        made: dict[object, object] = {}
        for pair in pairs:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise _Malformed(f"{_words(pair)} as an item of a dict, expected a pair")
            self._put(made, list(pair))
        return made

    def _put(self, target: object, items: list[object]) -> None:
        if isinstance(target, _Inert) and target.items is None:
            target.items = {}
        into = target.items if isinstance(target, _Inert) else target
        if type(into) is not dict or len(items) % 2:
            raise _Malformed(f"{len(items)} keys and values put into {_words(target)}")
        for given, value in zip(items[::2], items[1::2], strict=True):
            key = _key(given)
            if key in into:
                raise _Malformed(f"key {quote(key)} twice in one dict")
            into[key] = value

    def _extend(self, target: object, items: list[object]) -> None:
        if isinstance(target, _Inert) and target.values is None:
            target.values = []
        into = target.values if isinstance(target, _Inert) else target
        if type(into) is not list:
            raise _Malformed(f"{len(items)} values added to {_words(target)}")
        into.extend(items)

    def _instantiate(self, func: object, args: list[object]) -> None:  # the base class's, for OBJ
        self.append(self._call(func, tuple(args)))

    def load_frame(self) -> None:
        self.stream.read(8)  # a frame's length only helps a reader to read ahead

    def load_bytearray(self) -> None:
        self.append(bytearray(self.stream.read(int.from_bytes(self.stream.read(8), "little"))))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments
        self.load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()
        # A state_dict's own attribute holds the versions of its modules: nothing that loads as a weight.
        top = self.stack[-1]
        if isinstance(top, _Inert):
            top.state = state
            if top.name == _PARAMETERS and type(state) is dict and type(state.get("_parameters")) is dict:
                self.stack[-1] = state["_parameters"]

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._extend(self.stack[-1], items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._put(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        made: dict[object, object] = {}
        self._put(made, items)
        self.append(made)

    def load_empty_set(self) -> None:
        self.append(_Inert("builtins.set"))  # nothing to hash

    def load_frozenset(self) -> None:
        members = tuple(self.pop_mark())  # before `append` is looked up: the stack changes
        self.append(_Inert("builtins.frozenset", members))


_Machine.dispatch.update({
    pickle.FRAME[0]: _Machine.load_frame,
    pickle.BYTEARRAY8[0]: _Machine.load_bytearray,
    pickle.REDUCE[0]: _Machine.load_reduce,
    pickle.NEWOBJ[0]: _Machine.load_reduce,  # cls.__new__(cls, *args), cls(*args): to us the same record
    pickle.NEWOBJ_EX[0]: _Machine.load_newobj_ex,
    pickle.BUILD[0]: _Machine.load_build,
    pickle.APPEND[0]: _Machine.load_append,
    pickle.APPENDS[0]: _Machine.load_appends,
    pickle.ADDITEMS[0]: _Machine.load_appends,
    pickle.SETITEM[0]: _Machine.load_setitem,
    pickle.SETITEMS[0]: _Machine.load_setitems,
    pickle.DICT[0]: _Machine.load_dict,
    pickle.EMPTY_SET[0]: _Machine.load_empty_set,
    pickle.FROZENSET[0]: _Machine.load_frozenset,
})  # fmt: skip


_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (IndexError, "takes a value where there is none"),
    (UnicodeDecodeError, "a text that is not UTF-8"),
    (MemoryError, "needs more memory than there is"),
    (RecursionError, "nested too deeply"),
    (TypeError, "a call with the wrong arguments"),
)


def _reason(e: Exception) -> str:
    if isinstance(e, _Malformed | pickle.UnpicklingError):
        return printable(str(e)[:300])
    return next((words for kind, words in _REASONS if isinstance(e, kind)), "a value that cannot be read")


# ------------------------------------------------------------------------------------------------ the two containers

# Where the storage of a key and a size in bytes begins in the file.
_Locate = Callable[[str, int], int]


def _refuse_impostor(label: str, start: bytes) -> None:
    if not start:
        raise FormatError(label, "an empty file, expected one of torch.save")
    if start[257:262] == b"ustar":
        raise FormatError(
            label, "a tar archive, as the earliest versions of torch.save wrote", "load it with torch and save it again"
        )
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
        raise FormatError(label, "a safetensors file, expected one of torch.save", "name it .safetensors")
    if start[:1] != b"\x80" and (other := impostor(start)):
        raise FormatError(label, f"{other[0]}, expected one of torch.save", other[1])


class _File:
    """A source as the file that zipfile asks for."""

    def __init__(self, source: ByteSource) -> None:
        self._source, self._at = source, 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._source.size)[whence]
        if self._at < 0:
            raise OSError("before the beginning")
        return self._at

    def read(self, n: int = -1) -> bytes:
        left = max(self._source.size - self._at, 0)
        n = left if n < 0 else min(n, left)
        if n > MAX_DIRECTORY_BYTES:
            what = f"a zip archive with a directory of {n:,} bytes, expected at most {MAX_DIRECTORY_BYTES:,}"
            raise FormatError(self._source.label, what)
        self._at += n
        return read(self._source, self._at - n, n)


def _entries(source: ByteSource) -> dict[str, ZipInfo]:
    """The archive's entries by name; all of them stored, none of them twice."""
    import zipfile  # draws in every compressor of the standard library

    try:
        with zipfile.ZipFile(_File(source)) as archive:
            infos = archive.infolist()
    except WeightopsError:
        raise
    except Exception:
        raise TruncatedError(source.label, "a zip archive without a readable directory at its end", _CUT_OFF) from None
    entries: dict[str, ZipInfo] = {}
    for info in infos:
        what = f"zip entry {quote(info.filename)}"
        if info.filename in entries:
            raise FormatError(source.label, f"{what} stands twice", "which of the two is meant cannot be known")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise FormatError(source.label, f"{what} is compressed or encrypted, which torch.save never does")
        entries[info.filename] = info
    return entries


def _data_start(source: ByteSource, info: ZipInfo) -> int:
    """Where an entry's bytes begin. Only its own header knows: torch pads there, and not in the directory."""
    what = f"zip entry {quote(info.filename)}"
    if not 0 <= info.header_offset <= source.size - 30:
        raise TruncatedError(source.label, f"{what} begins outside the file, at byte {info.header_offset:,}", _CUT_OFF)
    header = read(source, info.header_offset, 30)
    if not header.startswith(b"PK\x03\x04"):
        raise FormatError(source.label, f"{what} does not begin at byte {info.header_offset:,}, as the directory says")
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + info.file_size > source.size:
        what += f" ends at byte {start + info.file_size:,}, but the file holds {source.size:,}"
        raise TruncatedError(source.label, what, _CUT_OFF)
    return start


def _read_zip(source: ByteSource) -> tuple[object, _Locate]:
    label, entries = source.label, _entries(source)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if not pickles:
        raise FormatError(label, "a zip archive without data.pkl, expected one written by torch.save")
    if len(pickles) > 1:
        raise FormatError(label, f"a zip archive with {len(pickles)} pickles, expected one: {listing(pickles)}")
    top = pickles[0].removesuffix("data.pkl")
    if f"{top}constants.pkl" in entries or any(name.startswith(f"{top}code/") for name in entries):
        hint = "load it with torch.jit and save its state_dict()"
        raise FormatError(label, "a TorchScript archive, a program rather than weights", hint)
    if order := entries.get(f"{top}byteorder"):
        found = read(source, _data_start(source, order), min(order.file_size, 16))
        if found != b"little":
            raise FormatError(label, f"its byte order is {quote(found.decode('latin-1'))}, expected 'little'")
    info = entries[pickles[0]]
    if info.file_size > MAX_PICKLE_BYTES:
        raise FormatError(label, f"its pickle holds {info.file_size:,} bytes, expected at most {MAX_PICKLE_BYTES:,}")
    start = _data_start(source, info)

    @functools.cache
    def locate(key: str, nbytes: int) -> int:
        info = entries.get(f"{top}data/{key}")
        if info is None:
            raise FormatError(label, f"storage {quote(key)} is missing: no zip entry {quote(f'{top}data/{key}')}")
        if info.file_size < nbytes:
            raise FormatError(label, f"storage {quote(key)} holds {info.file_size:,} bytes, expected {nbytes:,}")
        return _data_start(source, info)

    return _Machine(_Stream(source, start, start + info.file_size)).load(), locate


_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def _read_legacy(source: ByteSource, beginning: bytes) -> tuple[object, _Locate]:
    """Before torch 1.6: magic number, protocol, system, object, list of keys, each a pickle; then the storages."""
    label, stream = source.label, _Stream(source, 0, min(source.size, MAX_PICKLE_BYTES))
    try:
        magic = _Machine(stream).load()
    except FormatError:
        if beginning[:1] == b"\x80":
            raise
        shown = quote(beginning[:8].decode("latin-1"))
        raise FormatError(label, f"begins with {shown}, expected a file of torch.save") from None
    if type(magic) is not int or magic != _MAGIC:
        what = f"a pickle that holds {_words(magic)}, expected one of torch.save, with its magic number"
        raise FormatError(label, what, "save its tensors with torch.save")
    protocol = _Machine(stream).load()
    if type(protocol) is not int or protocol != _PROTOCOL:
        raise FormatError(label, f"a file of torch.save with an unknown protocol, expected {_PROTOCOL}")
    system = _Machine(stream).load()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise FormatError(label, "was written on a big-endian machine, expected little-endian")
    machine = _Machine(stream)
    root = machine.load()
    keys = _Machine(stream).load()
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise FormatError(label, f"its storages are listed in {_words(keys)}, expected a list of texts")
    starts = _storage_starts(source, stream.at, keys, machine.storages)

    def locate(key: str, nbytes: int) -> int:
        if key not in starts:
            raise FormatError(label, f"storage {quote(key)} is missing: the file lists {len(starts)} others")
        return starts[key]

    return root, locate


def _storage_starts(
    source: ByteSource, at: int, keys: list[str], storages: dict[str, tuple[_Dtype, int]]
) -> dict[str, int]:
    """Where each storage begins: they follow each other from `at` on, each behind its number of values."""
    starts: dict[str, int] = {}
    for key in keys:
        what = f"storage {quote(key)}"
        if key in starts or key not in storages:
            wrong = "is listed twice" if key in starts else "is listed, but nothing refers to it"
            raise FormatError(source.label, f"{what} {wrong}")
        dtype, values = storages[key]
        starts[key] = at + 8
        stop = at + 8 + values * dtype.nbytes
        if stop > source.size:
            what = f"{what} ends at byte {stop:,}, but the file holds {source.size:,}"
            raise TruncatedError(source.label, what, _CUT_OFF)
        found = int.from_bytes(read(source, at, 8), "little", signed=True)
        if found != values:
            raise FormatError(source.label, f"{what} holds {found:,} values, expected {values:,}")
        at = stop
    return starts


# ------------------------------------------------------------------------------------------------ names

# Where weights stand among other things, in the order of preference.
_WRAPPERS = ("state_dict", "model", "params_ema", "params")


def _is_tensor(value: object) -> bool:
    return isinstance(value, _Tensor | _Absent)


def _edges(value: object, seen: set[int]) -> Iterator[tuple[object, object]]:
    """Each container under `value` with each of its members; a container in `seen` is not entered again."""
    todo = [value]
    while todo:
        parent = todo.pop()
        if id(parent) not in seen:
            seen.add(id(parent))
            for _, child in _members(parent):
                yield parent, child
                if isinstance(child, dict | list | tuple | _Inert):
                    todo.append(child)


def _holders(root: object) -> set[int]:
    """The containers, by identity, from which a tensor can be reached."""
    parents: dict[int, list[int]] = {}
    todo: list[int] = []
    for parent, child in _edges(root, set()):
        if _is_tensor(child):
            todo.append(id(parent))
        elif isinstance(child, dict | list | tuple | _Inert):
            parents.setdefault(id(child), []).append(id(parent))
    holders: set[int] = set()
    while todo:
        holder = todo.pop()
        if holder not in holders:
            holders.add(holder)
            todo.extend(parents.pop(holder, []))
    return holders


class _Flattening:
    """From nested containers to dotted names. No recursion, and no container twice: a pickle may hold itself."""

    def __init__(self, label: str, shard: int, locate: _Locate) -> None:
        self.label, self.shard, self.locate = label, shard, locate
        self.found = Pickled({}, [], {})
        self.characters = 0

    def run(self, root: object) -> Pickled:
        if _is_tensor(root):
            root = {"tensor": root}
        holders = _holders(root)
        if id(root) not in holders and type(root) not in (dict, list, tuple):
            raise FormatError(self.label, f"holds {_words(root)}, expected tensors")
        self._walk(self._unwrap(root, holders), holders)
        return self.found

    def _unwrap(self, root: object, holders: set[int]) -> object:
        """The weights of a checkpoint that names them so; what stands beside them is left out, in words."""
        beside = any(_is_tensor(value) for _, value in _members(root))
        for wrapper in _WRAPPERS[:1] if beside else _WRAPPERS:
            weights = next((value for key, value in _members(root) if key == wrapper and id(value) in holders), None)
            if weights is None:
                continue
            seen = {id(root), id(weights)}
            for key, value in _members(root):
                why = f" outside {wrapper!r}" if _is_tensor(value) else ""
                if id(value) in holders:
                    count = sum(_is_tensor(child) for _, child in _edges(value, seen))
                    why = f" with {count:,} tensor{'s' * (count != 1)} of its own, outside {wrapper!r}"
                if key != wrapper:
                    self._leave(self._path(None, key), value, why)
            return weights
        return root

    def _walk(self, root: object, holders: set[int]) -> None:
        entered: dict[int, str] = {id(root): ""}
        todo: list[tuple[str | None, Iterator[tuple[object, object]]]] = [(None, iter(_members(root)))]
        while todo:
            prefix, members = todo[-1]
            for key, value in members:
                path = self._path(prefix, key)
                if type(key) not in (str, int):
                    self._leave(path, value, f" under a key that is {_words(key)}, expected a text")
                elif isinstance(value, _Tensor):
                    self._add(path, value)
                elif id(value) not in holders:
                    self._leave(path, value)
                elif id(value) in entered:
                    self._leave(path, value, f" that stands at {quote(entered[id(value)])} too")
                else:
                    entered[id(value)] = path
                    todo.append((path, iter(_members(value))))
                    break
            else:
                todo.pop()

    def _path(self, prefix: str | None, key: object) -> str:
        part = key if type(key) is str else str(key) if type(key) is int else quote(key)
        # One long key may stand above many short ones: bound what all paths hold together, not each.
        self.characters += len(part) + len(prefix or "") + 1
        if self.characters > MAX_HEADER_BYTES:
            what = f"its names take more than {MAX_HEADER_BYTES:,} characters, the most that a safetensors header holds"
            raise FormatError(self.label, what)
        return part if prefix is None else f"{prefix}.{part}"

    def _leave(self, path: str, value: object, why: str = "") -> None:
        if len(self.found.left_out) == MAX_TENSORS:
            raise FormatError(self.label, f"holds more than {MAX_TENSORS:,} things that are no tensors")
        if isinstance(value, _Absent):
            reason = value.reason
        else:
            container = type(value) in (dict, list, tuple)
            reason = _words(value) + (why or (" without tensors" if container else ", no tensor"))
        self.found.left_out.append((path, reason))

    def _add(self, name: str, t: _Tensor) -> None:
        what = f"tensor {quote(name)}"
        if name in self.found.tensors:
            raise FormatError(self.label, f"{what} stands twice", "which of the two is meant cannot be known")
        if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
            raise FormatError(self.label, f"{what} has a lone surrogate in its name, which is no character")
        if len(self.found.tensors) == MAX_TENSORS:
            raise FormatError(self.label, f"holds more than {MAX_TENSORS:,} tensors, the most that weightops reads")
        assert t.dtype.code is not None
        size, spec = t.dtype.nbytes, TensorSpec(t.dtype.code, t.shape)
        have = t.storage.values * t.storage.dtype.nbytes
        span = _span(t.shape, t.strides)
        if span and (t.offset + span) * size > have:
            raise FormatError(
                self.label, f"{what} reaches byte {(t.offset + span) * size:,} of a storage that holds {have:,}"
            )
        if spec.nbytes > max(have, MAX_REPEATED_BYTES):
            raise FormatError(self.label, f"{what} is a view that repeats {span * size:,} bytes into {spec.nbytes:,}")
        start = self.locate(t.storage.key, t.storage.nbytes) + t.storage.first * t.storage.dtype.nbytes
        start += t.offset * size if span else 0
        strides = None
        if not _is_row_major(t.shape, t.strides):
            strides = tuple(step if n > 1 else 0 for n, step in zip(t.shape, t.strides, strict=True))
        self.found.tensors[name] = TensorInfo(spec, self.shard, start, start + span * size, strides)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Stored values from the first to the last of a view, both included; 0 for a view of nothing."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if prod(shape) else 0


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and step != expected:
            return not prod(shape)
        expected *= n
    return True


# ------------------------------------------------------------------------------------------------ strided values

_READ_BYTES = 4 << 20  # of one read, and of the only memory that is taken
_GAP_BYTES = 64 << 10  # a shorter read costs more than the unwanted bytes in it


def read_strided(source: ByteSource, info: TensorInfo, begin: int, end: int, out: memoryview) -> None:
    """Fill `out` with the row-major bytes `begin` to `end` of a tensor, both multiples of its value's size.

    Takes at most 4 MiB, whatever the strides.
    """
    if info.strides is None or begin == end:
        source.read_into(info.start + begin, out)
        return
    import numpy as np

    size = DTYPES[info.spec.dtype].bits // 8
    values = np.frombuffer(out, f"u{size}")
    buffer = memoryview(bytearray(min(_READ_BYTES, info.stop - info.start)))
    done = 0
    while done < len(values):
        first, shape = _block(info.spec.shape, info.strides, begin // size + done, end // size)
        block = values[done : done + prod(shape)].reshape(shape)
        _fill(source, info.start, info.strides, first, block, buffer)
        done += block.size


def _fill(
    source: ByteSource, start: int, strides: tuple[int, ...], first: int, into: NDArray[Any], buffer: memoryview
) -> None:
    """Read a block whose first value is number `first` of the stored ones.

    The block is cut along its longest stride until the stored values that it spans are few, or mostly wanted.
    """
    import numpy as np

    size = into.itemsize
    span = _span(into.shape, strides) * size
    dense = span <= 8 * size * prod(n for n, step in zip(into.shape, strides, strict=True) if step)
    if span <= len(buffer) and (dense or span <= _GAP_BYTES):
        source.read_into(start + first * size, buffer[:span])
        into[...] = np.ndarray(into.shape, into.dtype, buffer[:span], strides=[step * size for step in strides])
        return
    axis = max(range(into.ndim), key=lambda a: strides[a] if into.shape[a] > 1 else -1)
    n, step = into.shape[axis], strides[axis]
    room = (len(buffer) if dense else _GAP_BYTES) - span + (n - 1) * step * size
    count = max(1, min(n - 1, room // (step * size) + 1))
    for i in range(0, n, count):
        part = into[(slice(None),) * axis + (slice(i, i + count),)]
        _fill(source, start, strides, first + i * step, part, buffer)


def _block(shape: tuple[int, ...], strides: tuple[int, ...], at: int, end: int) -> tuple[int, tuple[int, ...]]:
    """The largest block of whole indices from value `at` on that ends by `end`: its first stored value, its shape."""
    axis, inner = len(shape) - 1, 1
    while axis > 0 and at % (inner * shape[axis]) == 0 and at + inner * shape[axis] <= end:
        inner *= shape[axis]
        axis -= 1
    count = min((end - at) // inner, shape[axis] - at // inner % shape[axis])
    first, rest = 0, at
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        first += rest % n * step
        rest //= n
    return first, (*(1 for _ in shape[:axis]), count, *shape[axis + 1 :])
