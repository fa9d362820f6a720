"""Files of torch.save: read as torch reads them, and refused by name when they are more or less than that."""

import argparse
import collections
import io
import itertools
import pickle
import random
import re
import subprocess
import sys
import tarfile
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from weightops.errors import TruncatedError, UnsafeError, WeightopsError
from weightops.files.dtypes import DTYPES
from weightops.files.pickled import Pickled, read_pickled
from weightops.files.source import LocalFile, read
from weightops.files.strided import read_strided
from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.files.unpickle import MAX_INSTRUCTIONS

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
REAL = sorted([*SHARED.glob("loras/pickle/*.pt"), *SHARED.glob("checkpoints/*.pth")])

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def load(path: Path) -> Pickled:
    source = LocalFile(path, "bad.ckpt")
    try:
        return read_pickled(source)
    finally:
        source.close()


def logical(path: Path, info: TensorInfo) -> bytes:
    """The tensor's bytes in row-major order."""
    source, out = LocalFile(path), bytearray(info.spec.nbytes)
    if info.strides is None:
        assert info.stop - info.start == info.spec.nbytes
        out[:] = read(source, info.start, info.spec.nbytes)
    else:
        read_strided(source, info, 0, len(out), memoryview(out))
    source.close()
    return bytes(out)


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def check(path: Path, expected: dict[str, torch.Tensor]) -> Pickled:
    """What is read is what torch holds: names and their order, dtypes, shapes, bytes."""
    found = load(path)
    assert list(found.tensors) == list(expected)
    for name, tensor in expected.items():
        info = found.tensors[name]
        assert (TORCH[info.spec.dtype], info.spec.shape) == (tensor.dtype, tuple(tensor.shape)), name
        assert logical(path, info) == raw(tensor), name
    return found


@pytest.fixture(params=["zip", "legacy"])
def save(request, tmp_path):
    """Saves an object in either container and gives the path."""

    def save(value: object, protocol: int = 2) -> Path:
        path = tmp_path / "model.ckpt"
        zipped = request.param == "zip"
        torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
        return path

    return save


# ------------------------------------------------------------------------------------------------ what torch writes


@pytest.mark.skipif(not REAL, reason="the shared folder with real checkpoints is not beside this repository")
@pytest.mark.parametrize("path", REAL, ids=lambda p: p.name)
def test_real_files_equal_torch_load(path):
    value = torch.load(path, map_location="cpu", weights_only=True)
    expected = {str(i): t for i, t in enumerate(value)} if isinstance(value, list) else value
    assert check(path, expected).left_out == []


def test_neither_torch_nor_numpy_is_imported(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(2, 3).T, "b": torch.ones(2), "c": np.float64(1)}, path)
    code = (
        "import sys\n"
        "from weightops.files.pickled import read_pickled\n"
        "from weightops.files.source import LocalFile\n"
        f"assert len(read_pickled(LocalFile({str(path)!r})).tensors) == 2\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_protocol_is_read(save, protocol):
    tensors = {"a": torch.arange(4.0), "ü": torch.arange(2), "set": {1, 2}, "bytes": b"x", "array": bytearray(b"y")}
    found = check(save(tensors, protocol), {"a": tensors["a"], "ü": tensors["ü"]})
    assert [path for path, _ in found.left_out] == ["set", "bytes", "array"]


@pytest.mark.parametrize("dtype", TORCH.values(), ids=TORCH)
def test_every_dtype_keeps_its_bytes(tmp_path, dtype):
    bits = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 8), dtype=torch.uint8)
    path = tmp_path / "model.pt"
    torch.save({"a": bits.view(dtype), "b": bits.view(dtype)[1:]}, path)
    check(path, {"a": bits.view(dtype), "b": bits.view(dtype)[1:]})


def test_views_of_all_kinds(save):
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    matrix = base.reshape(10, 12)
    tensors = {
        "whole": base,
        "tied": base,
        "transposed": matrix.T,
        "rows": matrix[2:5],
        "columns": matrix[:, 3:7],
        "stepped": matrix[1::3, ::2],
        "permuted": base.permute(3, 1, 0, 2),
        "expanded": matrix[0, 0].expand(7, 5),
        "diagonal": matrix.diagonal(),
        "scalar": matrix[3, 4],
        "empty": matrix[:0],
        "empty and strided": matrix[:, :0].T,
        "one row": matrix.T[:, 2:3].T,
    }
    found = check(save(tensors), tensors).tensors
    assert found["tied"] == found["whole"]
    assert {n for n, i in found.items() if i.strides} == {
        "transposed", "columns", "stepped", "permuted", "expanded", "diagonal"
    }  # fmt: skip
    assert found["transposed"].strides == (1, 12)
    assert found["columns"].start - found["whole"].start == 12


def test_parameters_and_subclasses_are_tensors(save):
    weight = torch.nn.Parameter(torch.randn(3))
    weight.note = "an attribute"
    buffer = torch.nn.Buffer(torch.ones(2))
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    check(save({"w": weight, "b": buffer}), {"w": weight, "b": buffer})
    check(save(module.state_dict()), module.state_dict())


def test_an_ordered_dict_of_pairs_is_read(tmp_path):
    pair = b"](" + text("a") + tensor() + b"e"
    path = archive(tmp_path, name("collections", "OrderedDict") + b"](" + pair + b"e\x85R", b"\1" * 16)
    assert list(load(path).tensors) == ["a"]


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "params_ema", "params"])
def test_the_weights_of_a_checkpoint_stand_alone(save, wrapper):
    value = {
        "epoch": 3,
        "lr": 1e-4,
        wrapper: {"a": torch.ones(2), "n": {"b": torch.zeros(1)}, "note": "x"},
        "optimizer": {"state": {0: {"step": torch.ones(1), "m": torch.ones(2)}}, "names": ["a"]},
        "none": None,
    }
    found = check(save(value), {"a": value[wrapper]["a"], "n.b": value[wrapper]["n"]["b"]})
    assert found.left_out == [
        ("epoch", "an int, no tensor"),
        ("lr", "a float, no tensor"),
        ("optimizer", f"a dict with 2 tensors of its own, outside {wrapper!r}"),
        ("none", "None, no tensor"),
        ("note", "a str, no tensor"),
    ]


def test_ema_weights_come_before_others(save):
    ema, plain = {"a": torch.ones(2)}, {"a": torch.zeros(2)}
    found = check(save({"params": plain, "params_ema": ema}), ema)
    assert found.left_out == [("params", "a dict with 1 tensor of its own, outside 'params_ema'")]


def test_a_name_of_a_wrapper_among_tensors_is_a_name(save):
    value = {"model": {"a": torch.ones(2)}, "b": torch.ones(1)}
    check(save(value), {"model.a": value["model"]["a"], "b": value["b"]})


def test_lists_and_numbers_become_names(save):
    up, down = torch.randn(4, 2), torch.randn(2, 4)
    check(save([up, down]), {"0": up, "1": down})
    check(save({0: up, "layers": (down, {1: up})}), {"0": up, "layers.0": down, "layers.1.1": up})
    check(save(up), {"tensor": up})


def test_textual_inversion_with_its_module_is_read(save):
    vectors = torch.nn.ParameterDict({"*": torch.randn(2, 4)})
    value = {"string_to_token": {"*": 265}, "string_to_param": vectors, "name": "cat", "step": 500}
    found = check(save(value), {"string_to_param.*": vectors["*"]})
    assert found.left_out == [
        ("string_to_token", "a dict without tensors"),
        ("name", "a str, no tensor"),
        ("step", "an int, no tensor"),
    ]


def test_classes_of_old_checkpoints_are_never_imported(save, monkeypatch):
    full = "pytorch_lightning.callbacks.model_checkpoint"
    for package in itertools.accumulate(full.split("."), lambda a, b: f"{a}.{b}"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    hooked = type("ModelCheckpoint", (dict,), {"__module__": full})
    sys.modules[full].ModelCheckpoint = hooked
    callback = hooked(best=torch.ones(1))
    callback.monitor = "loss"
    value = {
        "state_dict": collections.OrderedDict(a=torch.ones(2)),
        "callbacks": {hooked: {"best_model_score": torch.zeros(1)}, "other": callback},
        "hyper_parameters": argparse.Namespace(lr=1.0, path=Path("x")),
        "loss": np.float32(0.5),
        "history": np.arange(3),
        "epochs": collections.defaultdict(int, a=1),
    }
    path = save(value)
    monkeypatch.undo()
    before = set(sys.modules)
    assert check(path, value["state_dict"]).left_out == [
        ("callbacks", "a dict with 2 tensors of its own, outside 'state_dict'"),
        ("hyper_parameters", "an object of 'argparse.Namespace', no tensor"),
        ("loss", f"an object of '{np.float32(0).__reduce__()[0].__module__}.scalar', no tensor"),
        ("history", f"an object of '{np.float32(0).__reduce__()[0].__module__}._reconstruct', no tensor"),
        ("epochs", "a dict without tensors"),
    ]
    assert set(sys.modules) == before
    assert full not in sys.modules


def test_tensors_within_objects_are_named(save):
    value = {"options": argparse.Namespace(mean=torch.ones(3)), "a": torch.ones(1)}
    assert check(save(value), {"options.state.mean": value["options"].mean, "a": value["a"]}).left_out == []


def test_keys_that_are_no_texts_are_left_out(save):
    found = check(save({None: torch.ones(1), ("a", 1): 2, 0.5: {"x": 1}, "a": torch.ones(2)}), {"a": torch.ones(2)})
    assert found.left_out == [
        ("None", "a tensor under a key that is None, expected a text"),
        ("builtins.tuple", "an int under a key that is an object of 'builtins.tuple', expected a text"),
        ("builtins.float", "a dict under a key that is an object of 'builtins.float', expected a text"),
    ]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_that_are_no_plain_bytes_are_left_out(tmp_path):
    path = tmp_path / "model.pt"
    value = {
        "a": torch.ones(1),
        "complex128": torch.ones(1, dtype=torch.complex128),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.empty(3, device="meta"),
        "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    }
    torch.save(value, path)
    assert check(path, {"a": value["a"]}).left_out == [
        ("complex128", "values of torch.complex128, which are not read"),
        ("sparse", "a sparse tensor"),
        ("meta", "a meta tensor, which has no values"),
        ("conjugated", "a conjugated or negated view, whose bytes are not its values"),
        ("quantised", "a quantised tensor"),
    ]


def test_containers_that_hold_themselves_are_entered_once(save):
    inner = {"a": torch.ones(1)}
    inner["again"] = inner
    value = {"x": inner, "y": inner}
    assert check(save(value), {"x.a": inner["a"]}).left_out == [
        ("x.again", "a dict that stands at 'x' too"),
        ("y", "a dict that stands at 'x' too"),
    ]


def test_lists_of_lists_that_share_take_no_time(save):
    value: list = [torch.ones(1)]
    for _ in range(100):
        value = [value, value]
    found = load(save(value))
    assert len(found.tensors) == 1
    assert len(found.left_out) == 100


# ------------------------------------------------------------------------------------------------ refusals


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def tup(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def name(module: str, what: str) -> bytes:
    return f"c{module}\n{what}\n".encode()


def tensor(size=(4,), stride=(1,), offset=0, key="0", values=4, kind="FloatStorage") -> bytes:
    storage = tup(text("storage"), name("torch", kind), text(key), text("cpu"), number(values)) + b"Q"
    dims = tup(*map(number, size)) + tup(*map(number, stride))
    hooks = name("collections", "OrderedDict") + b")R"
    return name("torch._utils", "_rebuild_tensor_v2") + tup(storage, number(offset), dims, b"\x89", hooks) + b"R"


def items(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(k) + v for k, v in values.items()) + b"u"


def archive(folder: Path, body: bytes, *storages: bytes, top="m", more=(), compression=zipfile.ZIP_STORED) -> Path:
    """An archive as torch.save writes, of a pickle written by hand; the pickle begins at byte 40."""
    path = folder / "model.ckpt"
    with zipfile.ZipFile(path, "w", compression) as f:
        f.writestr(f"{top}/data.pkl", b"\x80\x02" + body + b".")
        for key, data in enumerate(storages):
            f.writestr(f"{top}/data/{key}", data)
        for entry, data in more:
            f.writestr(entry, data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(WeightopsError) as e:
        load(path)
    return str(e.value).removeprefix("bad.ckpt: ")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (name("os", "system") + tup(text("true")) + b"R", "os.system"),
        (name("posix", "system") + tup(text("true")) + b"R", "posix.system"),
        (name("builtins", "eval") + tup(text("1")) + b"R", "builtins.eval"),
        (name("__builtin__", "getattr"), "__builtin__.getattr"),
        (name("torch", "load"), "torch.load"),
        (name("torch.storage", "_load_from_bytes"), "torch.storage._load_from_bytes"),
        (name("torchvision", "x"), "torchvision.x"),
        (name("typing_extensions", "Any"), "typing_extensions.Any"),
        (text("os") + text("system") + b"\x93", "os.system"),
        (b"(" + name("subprocess", "Popen") + text("true") + b"o", "subprocess.Popen"),
    ],
)
@pytest.mark.parametrize("container", ["zip", "plain"])
def test_a_name_beyond_tensors_is_refused(tmp_path, body, named, container):
    path = archive(tmp_path, body)
    if container == "plain":
        path.write_bytes(b"\x80\x02" + body + b".")
    with pytest.raises(UnsafeError) as e:
        load(path)
    assert str(e.value) == f"bad.ckpt: refers to '{named}', which rebuilding tensors never needs"
    assert e.value.hint == "loaded elsewhere, this file may run code; use a safetensors release of these weights"


def test_a_whole_module_is_refused_with_the_way_out(save):
    path = save(torch.nn.Linear(1, 1))
    with pytest.raises(UnsafeError) as e:
        load(path)
    assert str(e.value) == "bad.ckpt: refers to 'torch.nn.modules.linear.Linear', which rebuilding tensors never needs"
    assert e.value.hint == "it holds a whole module rather than weights; save its state_dict()"


def test_a_long_or_hostile_name_is_quoted(tmp_path):
    message = refusal(archive(tmp_path, name("a" * 500, "b")))
    assert message == f"refers to '{'a' * 46} ... {'a' * 44}.b', which rebuilding tensors never needs"
    message = refusal(archive(tmp_path, name("os\x1b[31m", "x")))
    assert message == r"a damaged pickle: byte 42: 'os\x1b[31m.x', which is no name of a class"


NESTED = b")" + b"\x85" * 100_000
ORDERED, REBUILD = name("collections", "OrderedDict"), name("torch._tensor", "_rebuild_from_type_v2")
ITSELF = REBUILD * 2 + b"N" + (REBUILD + b"N") * 2000 + b")" + b"\x87" * 2001 + b"R"
DAMAGED = {
    "a deep tuple as a key": (b"}" + NESTED + b"Ns", "a tuple as the key of a dict, expected a text or a number"),
    "a list as a key": (b"}]Ns", "a list as the key of a dict, expected a text or a number"),
    "a key twice": (b"}(" + text("a") + b"N" + text("a") + b"Nu", "key 'a' twice in one dict"),
    "a key without a value": (b"}(" + text("a") + b"u", "1 keys and values put into a dict"),
    "items into a list": (b"](NNu", "2 keys and values put into a list"),
    "values into a dict": (b"}(NNe", "2 values added to a dict"),
    "a pair of three": (ORDERED + b"](NNNla\x85R", "a list as an item of a dict, expected a pair"),
    "an extension": (b"\x82\x01", r"instruction b'\x82', which torch.save never writes"),
    "a buffer": (b"\x97", r"instruction b'\x97', which torch.save never writes"),
    "a memo in text": (b"Np123\n", "instruction b'p', which torch.save never writes"),
    "an unknown byte": (b"\xff", r"instruction b'\xff', which torch.save never writes"),
    "an empty stack": (b"a", "takes a value where there is none"),
    "no result": (b"N0", "takes a value where there is none"),
    "an empty memo": (b"h\x05", "Memo value not found at index 5"),
    "a broken text": (b"X\x01\0\0\0\xff", "a text that is not UTF-8"),
    "a long number": (b"I" + b"9" * 900 + b"x\n", "a value that cannot be read"),
    "a line without an end": (b"I" + b"9" * 5000 + b"\n", "a line of more than 1,024 bytes"),
    "a call of a value": (b"N)R", "a call of None"),
    "a call without arguments": (name("torch._utils", "_rebuild_tensor_v2") + b")R", "a call with the wrong arguments"),
    "a call within itself": (ITSELF, "nested too deeply"),
    "a persistent id": (b"NQ", "a persistent id that names no storage"),
    "a negative stride": (tensor(stride=(-1,)), "a tensor with strides that are not whole numbers from 0 to 2**63"),
    "a negative size": (tensor(size=(-4,)), "a tensor with sizes that are not whole numbers from 0 to 2**63"),
    "a negative offset": (tensor(offset=-4), "a tensor with offsets that are not whole numbers from 0 to 2**63"),
    "a huge size": (tensor(size=(2**80,)), "a tensor with sizes that are not whole numbers from 0 to 2**63"),
    "a size that is a bool": (
        tensor().replace(b"(K\4t", b"(\x88t"), "a tensor with sizes that are not whole numbers from 0 to 2**63"
    ),
    "too many sizes": (tensor(size=(1,) * 33), "a tensor with sizes that are no tuple of at most 32 numbers"),
    "too many values": (tensor(size=(2**62, 2), stride=(0, 0)), "a tensor of 2**63 values or more"),
    "too few strides": (tensor(stride=()), "a tensor with 1 sizes and 0 strides"),
    "two sizes of one storage": (
        b"](" + tensor() + tensor(values=8) + b"e", "storage '0', which has another size or dtype elsewhere"
    ),
    "too many instructions": (
        b"N" * (MAX_INSTRUCTIONS + 1), f"more than {MAX_INSTRUCTIONS:,} instructions, the most that weightops follows"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_pickle_is_refused(tmp_path, body, reason):
    message = refusal(archive(tmp_path, body))
    assert re.sub(r"byte [0-9,]+:", "byte N:", message) == f"a damaged pickle: byte N: {reason}"


def test_a_damaged_pickle_names_the_byte_of_its_instruction(tmp_path):
    path = archive(tmp_path, b"N" * 100 + b"\xff")
    assert refusal(path) == r"a damaged pickle: byte 142: instruction b'\xff', which torch.save never writes"
    assert path.read_bytes()[142:143] == b"\xff"


@pytest.mark.parametrize(
    ("body", "wanted", "at"),
    [
        (b"\x8e" + (2**62).to_bytes(8, "little") + b"x", 2**62, 51),
        (b"\x8d" + (2**40).to_bytes(8, "little") + b"x", 2**40, 51),
        (b"\x96" + (2**63).to_bytes(8, "little") + b"x", 2**63, 51),
        (b"B" + (2**32 - 1).to_bytes(4, "little") + b"x", 2**32 - 1, 47),
        (b"\x8b" + (2**31 - 1).to_bytes(4, "little") + b"x", 2**31 - 1, 47),
    ],
    ids=["bytes", "text", "bytearray", "short bytes", "number"],
)
def test_a_giant_size_allocates_nothing(tmp_path, body, wanted, at):
    path = archive(tmp_path, body)
    tracemalloc.start()
    message = refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    end = 40 + 2 + len(body) + 1
    assert message == f"a damaged pickle: byte {at}: wants {wanted:,} bytes, but its end is at {end}"


def test_a_giant_memo_index_allocates_nothing(tmp_path):
    path = archive(tmp_path, b"]" + b"r\xfe\xff\xff\xff")
    tracemalloc.start()
    assert load(path) == ({}, [], {})
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_copies_of_a_long_list_are_counted(tmp_path):
    pairs = b"](" + b"".join(tup(number(i), b"N") for i in range(2000)) + b"eq\0"
    copies = b"".join([name("collections", "OrderedDict") + b"h\0\x85R0"] * 1200)
    message = refusal(archive(tmp_path, pairs + copies + b"N"))
    assert message.endswith(f"more than {MAX_INSTRUCTIONS:,} instructions, the most that weightops follows")


def test_one_long_key_above_many_is_refused(tmp_path):
    many = b"}(" + b"".join(text(f"{i}") + b"N" for i in range(2000)) + text("t") + tensor() + b"u"
    path = archive(tmp_path, b"}" + text("k" * 60_000) + many + b"s", b"\0" * 16)
    assert refusal(path) == (
        "its names take more than 100,000,000 characters, the most that a safetensors header holds"
    )


def test_numbers_chosen_to_share_a_hash_share_no_slot(tmp_path):
    keys = b"".join(number(i * (2**61 - 1)) + b"N" for i in range(1, 20_000))
    found = load(archive(tmp_path, b"}" + text("a") + b"}(" + keys + b"us"))
    assert found.left_out == [("a", "a dict without tensors")]


def test_a_deep_tuple_is_never_hashed(tmp_path):
    found = load(
        archive(tmp_path, b"}(" + text("a") + b"(" + NESTED + b"\x91" + text("b") + b"\x8f(" + NESTED + b"\x90u")
    )
    assert [path for path, _ in found.left_out] == ["a", "b"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (tensor(offset=1), "tensor 'tensor' reaches byte 20 of a storage that holds 16"),
        (tensor(size=(2, 2), stride=(3, 1)), "tensor 'tensor' reaches byte 20 of a storage that holds 16"),
        (tensor(size=(2**40,), stride=(0,)), "tensor 'tensor' is a view that repeats 4 bytes into 4,398,046,511,104"),
        (tensor(key="1"), "storage '1' is missing: no zip entry 'm/data/1'"),
        (tensor(key="../x\x1b"), r"storage '../x\x1b' is missing: no zip entry 'm/data/../x\x1b'"),
        (tensor(values=5), "storage '0' holds 16 bytes, expected 20"),
        (tensor(kind="DoubleStorage"), "storage '0' holds 16 bytes, expected 32"),
        (items(a=items(b=tensor()), **{"a.b": tensor()}), "tensor 'a.b' stands twice"),
        (items(**{"\ud800": tensor()}), r"tensor '\ud800' has a lone surrogate in its name, which is no character"),
        (b"K\x05", "holds an int, expected tensors"),
        (text("x"), "holds a str, expected tensors"),
        (name("argparse", "Namespace") + b")\x81", "holds an object of 'argparse.Namespace', expected tensors"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(tmp_path, body, message):
    assert refusal(archive(tmp_path, body, b"\0" * 16)) == message


def test_a_view_of_a_storage_is_where_the_storage_says(tmp_path):
    storage = tup(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(8))
    view = tup(text("v"), number(2), number(4))
    moved = tensor(offset=1, size=(3,)).replace(
        tup(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(4)),
        storage[:-1] + view + b"t",
    )
    path = archive(tmp_path, moved, np.arange(8, dtype=np.float32).tobytes())
    assert np.frombuffer(logical(path, load(path).tensors["tensor"]), np.float32).tolist() == [3, 4, 5]
    path = archive(tmp_path, moved.replace(view, tup(text("v"), number(6), number(4))), b"\0" * 32)
    assert (
        re.sub(r"byte \d+", "byte N", refusal(path))
        == "a damaged pickle: byte N: a view of storage '0' to value 10 of 8"
    )


# ------------------------------------------------------------------------------------------------ containers

GOOD = tensor()
DATA = b"\0" * 16


def test_the_hand_made_archive_is_read(tmp_path):
    info = load(archive(tmp_path, GOOD, DATA)).tensors["tensor"]
    assert info.spec == TensorSpec("F32", (4,))


def test_a_compressed_entry_is_refused(tmp_path):
    path = archive(tmp_path, GOOD, DATA, compression=zipfile.ZIP_DEFLATED)
    assert refusal(path) == "zip entry 'm/data.pkl' is compressed or encrypted, which torch.save never does"


def test_an_entry_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = archive(tmp_path, GOOD, DATA, more=[("m/data/0", b"\1" * 16)])
    assert refusal(path) == "zip entry 'm/data/0' stands twice"


@pytest.mark.parametrize(
    ("entry", "data", "message"),
    [
        ("m/byteorder", b"big", "its byte order is 'big', expected 'little'"),
        ("m/byteorder", b"", "its byte order is '', expected 'little'"),
        ("m/constants.pkl", b"", "a TorchScript archive, a program rather than weights"),
        ("m/code/__torch__.py", b"", "a TorchScript archive, a program rather than weights"),
        ("n/data.pkl", b"", "a zip archive with 2 pickles, expected one: 'm/data.pkl', 'n/data.pkl'"),
    ],
)
def test_an_archive_that_says_otherwise_is_refused(tmp_path, entry, data, message):
    assert refusal(archive(tmp_path, GOOD, DATA, more=[(entry, data)])) == message


@pytest.mark.parametrize("inner", ["data.pkl", "a/b/data.pkl", "readme.txt"])
def test_an_archive_without_a_pickle_is_refused(tmp_path, inner):
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(path, "w") as f:
        f.writestr(inner, b"")
    assert refusal(path) == "a zip archive without data.pkl, expected one written by torch.save"


def test_a_cut_archive_is_refused(tmp_path):
    path = archive(tmp_path, GOOD, DATA)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(TruncatedError) as e:
        load(path)
    assert str(e.value) == "bad.ckpt: a zip archive without a readable directory at its end"
    assert e.value.hint == "the download may have been cut off; fetch the file again"


def test_an_entry_that_is_elsewhere_is_refused(tmp_path):
    path = archive(tmp_path, GOOD, DATA)
    data = bytearray(path.read_bytes())
    second = data.index(b"PK\3\4", 1)
    data[second + 2] = 0
    path.write_bytes(data)
    assert refusal(path) == f"zip entry 'm/data/0' does not begin at byte {second}, as the directory says"
    data[second + 2], data[second + 29] = 3, 255  # its own header names a longer padding
    path.write_bytes(data)
    stop = second + 30 + len("m/data/0") + 255 * 256 + 16
    assert refusal(path) == f"zip entry 'm/data/0' ends at byte {stop:,}, but the file holds {len(data)}"


def test_the_padding_of_an_entry_is_not_in_the_directory(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.arange(100.0)}, path)
    with zipfile.ZipFile(path) as f:
        (info,) = [i for i in f.infolist() if i.filename.endswith("data/0")]
    assert load(path).tensors["a"].start != info.header_offset + 30 + len(info.filename) + len(info.extra)
    check(path, {"a": torch.arange(100.0)})


MAGIC, SYSTEM = 0x1950A86A20F9469CFC6C, {"protocol_version": 1001, "little_endian": True}


def legacy(
    path: Path, *values: object, body=b"\x80\2" + GOOD + b".", keys=("0",), data=b"\4" + bytes(7) + DATA
) -> Path:
    head = values or (MAGIC, 1001, SYSTEM)
    path.write_bytes(b"".join(pickle.dumps(v, 2) for v in head) + body + pickle.dumps(list(keys), 2) + data)
    return path


@pytest.mark.parametrize(
    ("values", "changed", "message"),
    [
        ((5,), {}, "a pickle that holds an int, expected one of torch.save, with its magic number"),
        (({"a": 1},), {}, "a pickle that holds a dict, expected one of torch.save, with its magic number"),
        ((MAGIC, 1002), {}, "a file of torch.save with an unknown protocol, expected 1001"),
        ((MAGIC, 1001, {"little_endian": False}), {}, "was written on a big-endian machine, expected little-endian"),
        ((), {"data": bytes(24)}, "storage '0' holds 0 values, expected 4"),
        ((), {"keys": [5]}, "its storages are listed in a list, expected a list of texts"),
        ((), {"keys": []}, "storage '0' is missing: the file lists 0 others"),
        ((), {"keys": ["0", "0"]}, "storage '0' is listed twice"),
        ((), {"keys": ["1"]}, "storage '1' is listed, but nothing refers to it"),
        ((), {"data": (5).to_bytes(8, "little") + DATA}, "storage '0' holds 5 values, expected 4"),
        ((), {"data": bytes(8) + DATA[:8]}, "storage '0' ends at byte 243, but the file holds 235"),
        ((), {"body": b"\x80\2K\5.", "keys": []}, "holds an int, expected tensors"),
    ],
)
def test_a_legacy_file_that_says_otherwise_is_refused(tmp_path, values, changed, message):
    assert refusal(legacy(tmp_path / "model.ckpt", *values, **changed)) == message


def test_a_cut_legacy_file_is_refused_at_every_length(tmp_path):
    path = legacy(tmp_path / "model.ckpt")
    whole = path.read_bytes()
    assert list(load(path).tensors) == ["tensor"]
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(TruncatedError):
            load(path)


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as f:
        f.addfile(tarfile.TarInfo("storages"))
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file, expected one of torch.save"),
        (b"\0" * 600, "holds only zero bytes at its beginning, expected one of torch.save"),
        (b"<!DOCTYPE html>", "a web page, expected one of torch.save"),
        (
            b"version https://git-lfs.github.com/spec/v1",
            "a git-LFS pointer, not the file itself, expected one of torch.save",
        ),
        (b"GGUF\3\0\0\0", "a GGUF file, expected one of torch.save"),
        (b"\x02\0\0\0\0\0\0\0{}", "a safetensors file, expected one of torch.save"),
        (tar(), "a tar archive, as the earliest versions of torch.save wrote"),
        (b"hello world", "begins with 'hello wo', expected a file of torch.save"),
        (b"checkpoint one\nof two\n", "begins with 'checkpoi', expected a file of torch.save"),
        (b"\x1b[31mred", r"begins with '\x1b[31mred', expected a file of torch.save"),
        (b"\x80\x02", "a damaged pickle: byte 2: wants 1 bytes, but its end is at 2"),
        (b"PK\5\6" + bytes(18), r"begins with 'PK\x05\x06\x00\x00\x00\x00', expected a file of torch.save"),
        (b"PK\3\4", "a zip archive without a readable directory at its end"),
    ],
)
def test_what_is_no_file_of_torch_is_named(tmp_path, data, message):
    path = tmp_path / "model.ckpt"
    path.write_bytes(data)
    assert refusal(path) == message


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_random_damage_ends_in_a_refusal_or_in_tensors(tmp_path, zipped):
    value = {"state_dict": {"a": torch.ones(2, 3).T, "b": torch.zeros(3)}, "n": [1, 2.5, None, {"x": {1}}]}
    path, rng = tmp_path / "model.ckpt", random.Random(5)
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    whole, shown = path.read_bytes(), []
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 255, rng.randrange(256)])
        path.write_bytes(data)
        try:
            found = load(path)
        except WeightopsError as e:
            shown.append(str(e))
            continue
        assert all(0 <= i.start <= i.stop <= len(data) for i in found.tensors.values())
    assert len(shown) > 500
    assert all(message.isprintable() for message in shown)


# ------------------------------------------------------------------------------------------------ strided values


@pytest.mark.parametrize("seed", range(60))
def test_any_range_of_any_strides_equals_numpy(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    if seed % 2:
        monkeypatch.setattr("weightops.files.strided._READ_BYTES", rng.choice([16, 64, 1000]))
        monkeypatch.setattr("weightops.files.strided._GAP_BYTES", rng.choice([8, 100]))
    dtype = rng.choice(["U8", "F16", "F32", "F64"])
    size = DTYPES[dtype].bits // 8
    shape = tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 5)))
    strides = tuple(rng.choice([0, 1, 2, 3, 7, rng.randint(0, 5000)]) for _ in shape)
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    stored = np.random.default_rng(seed).integers(0, 256, (span + 3) * size, np.uint8)
    path = tmp_path / "data"
    path.write_bytes(stored.tobytes())
    values = stored.view(f"u{size}")[3:]
    whole = np.lib.stride_tricks.as_strided(values, shape, [s * size for s in strides]).tobytes()
    info = TensorInfo(TensorSpec(dtype, shape), 0, 3 * size, (3 + span) * size, strides)
    source = LocalFile(path)
    for _ in range(20):
        begin, end = sorted(rng.randint(0, info.spec.values) * size for _ in range(2))
        out = bytearray(end - begin)
        read_strided(source, info, begin, end, memoryview(out))
        assert out == whole[begin:end]
    source.close()


def test_strided_reading_takes_little_memory(tmp_path):
    rows, columns = 2048, 8192
    path = tmp_path / "data"
    with path.open("wb") as f:
        f.truncate(rows * columns * 4)
        f.seek(5 * columns * 4)
        f.write(np.arange(columns, dtype=np.uint32).tobytes())
    info = TensorInfo(TensorSpec("U32", (columns, rows)), 0, 0, rows * columns * 4, (1, columns))
    source, out = LocalFile(path), bytearray(8 << 20)
    begin = 100 * rows * 4 + 12
    read_strided(source, info, begin, begin + 4, memoryview(out)[:4])  # numpy's own first allocations
    tracemalloc.start()
    read_strided(source, info, begin, begin + len(out), memoryview(out))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    source.close()
    got = np.frombuffer(out, np.uint32)
    assert got[2::rows].tolist() == list(range(100, 100 + len(got) // rows))
    assert np.count_nonzero(got) == len(got) // rows
