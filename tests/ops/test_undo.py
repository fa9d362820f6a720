"""fuse --undo and unfuse: the file that was there before, byte for byte, or a refusal by name; never anything else."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import xxhash
from conftest import CLI, no_workers_left, save, save_raw
from safetensors.torch import load_file

from weightops.engine.tensors import TORCH_DTYPES
from weightops.errors import (
    FormatError,
    Interrupted,
    MismatchError,
    OutputError,
    TruncatedError,
    UsageError,
    WeightopsError,
)
from weightops.files.writer import SafetensorsWriter
from weightops.ops import undo as undo_module
from weightops.ops.fuse import fuse
from weightops.ops.undo_codes import Damaged, decode, encode, itemsize, largest, predict
from weightops.ops.unfuse import unfuse

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))

from tagged import needs_lists, shapes_of
from test_fuse import FLUX, MODULES, flux_lora, tiny, weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from weightops.ops.report import Report

BASE, LORA, OUT, UNDO, BACK = (Path(f"{name}.safetensors") for name in ("base", "lora", "out", "undo", "back"))

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def random(*shape: int, seed: int = 0, size: float = 0.03) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(dtype: torch.dtype, rows: int = 1040) -> dict[str, Tensor]:
    """Of no known architecture: a matrix (by default of two blocks), a convolution, and what no LoRA touches."""
    return {
        "layers.0.proj.weight": random(rows, 1030).to(dtype),
        "layers.0.proj.bias": random(rows, seed=1).to(dtype),
        "layers.1.conv.weight": random(24, 16, 3, 3, seed=2).to(dtype),
        "layers.2.other.weight": random(50, 60, seed=3).to(dtype),
        "norm.scale": random(1, seed=4).reshape(()).to(dtype),
        "nothing": torch.zeros(0, 4, dtype=dtype),
        "counted": torch.arange(30),
        "words": torch.arange(7, dtype=torch.uint8),
    }


def lora(rows: int = 1040, *, size: float = 1e-3) -> dict[str, Tensor]:
    """kohya's names for the matrix and the convolution."""
    proj, conv = "lora_unet_layers_0_proj", "lora_unet_layers_1_conv"
    return {
        f"{proj}.lora_down.weight": random(4, 1030, seed=5, size=size),
        f"{proj}.lora_up.weight": random(rows, 4, seed=6, size=1.0),
        f"{conv}.lora_down.weight": random(4, 16, 3, 3, seed=7, size=size),
        f"{conv}.lora_up.weight": random(24, 4, 1, 1, seed=8, size=1.0),
    }


def save_both(dtype: torch.dtype = torch.float16, rows: int = 40) -> None:
    """A checkpoint, of one block, and its LoRA."""
    save(BASE, model(dtype, rows))
    save(LORA, lora(rows))


def there_and_back(**words: Any) -> Report:
    """Fuse and unfuse; what comes back is the file that was there, and the fused one is what it is without --undo."""
    fuse(BASE, LORA, output=OUT, **words)
    alone = OUT.read_bytes()
    report = fuse(BASE, LORA, output=OUT, undo=UNDO, force=True, **words)
    assert OUT.read_bytes() == alone
    assert report.details["undo"] == {"output": str(UNDO), "bytes_written": UNDO.stat().st_size}
    unfuse(OUT, undo=UNDO, output=BACK)
    assert BACK.read_bytes() == BASE.read_bytes()
    return report


def said(path: Path = UNDO) -> dict[str, Any]:
    """What the undo file says of itself."""
    data = path.read_bytes()
    found = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["weightops-undo"]
    return dict(json.loads(found))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a LoRA, what they become, and its undo."""
    folder = tmp_path_factory.mktemp("fused")
    save(folder / BASE, model(torch.float16))
    save(folder / LORA, lora())
    fuse(folder / BASE, folder / LORA, output=folder / OUT, undo=folder / UNDO)
    return folder


@pytest.fixture
def fused(made: Path) -> None:
    for path in (BASE, LORA, OUT, UNDO):
        shutil.copy(made / path, path)


# ------------------------------------------------------------------------------------------------ back it comes


@pytest.mark.parametrize(
    ("dtype", "rows"), [("F32", 40), ("F16", 1040), ("BF16", 1040), ("F8_E4M3", 40), ("F8_E5M2", 40), ("F64", 40)]
)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_what_was_fused_comes_out_bit_for_bit(dtype: str, rows: int, rounding: str) -> None:
    save(BASE, model(TORCH_DTYPES[dtype], rows))
    save(LORA, lora(rows, size=1e-2))
    there_and_back(rounding=rounding, verify=dtype == "F16" and rounding == "nearest")
    assert set(said()["parts"]) == {"layers.0.proj.weight", "layers.1.conv.weight"}


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("F32", "fp16"), ("F32", "bf16"), ("F16", "bf16"), ("F16", "fp32"), ("BF16", "fp16"), ("BF16", "fp8_e4m3"),
     ("F8_E5M2", "fp16"), ("F64", "fp16")],
)  # fmt: skip
def test_what_a_change_of_dtype_lost_comes_back(stored: str, dtype: str) -> None:
    save_both(TORCH_DTYPES[stored])
    there_and_back(dtype=dtype)
    assert set(said()["parts"]) == set(model(torch.float32)) - {"counted", "words"}


def test_nan_inf_and_zeros_of_both_signs_come_back_with_every_bit() -> None:
    """Arithmetic makes one NaN of all of them; their bits are whole numbers."""
    tensors = model(torch.float16, 40)
    codes = tensors["layers.0.proj.weight"].view(torch.int16)
    codes[3, :8] = torch.tensor([0x7C00, -0x0400, 0x7C01, 0x7E02, -0x01FF, -0x8000, 0, 0x0001], dtype=torch.int16)
    save(BASE, tensors)
    save(LORA, lora(40))
    for dtype in ("keep", "fp32", "bf16"):
        UNDO.unlink(missing_ok=True)
        BACK.unlink(missing_ok=True)
        OUT.unlink(missing_ok=True)
        there_and_back(dtype=dtype, allow_nonfinite=True)


def test_the_header_comes_back_as_it_was_however_odd() -> None:
    """Spaces, an order of its own, tensors that no library would lay out like this, and all of the metadata."""
    weight, rest = random(40, 30).half(), random(9, seed=1)
    data = {"b.weight": ("F16", [40, 30], weight), "z": ("F32", [9], rest), "a": ("U8", [3], torch.arange(3).byte())}
    save_raw(BASE, {k: (d, s, t.numpy().tobytes()) for k, (d, s, t) in data.items()}, {"zz": "1", "aa": "é\n", "x": ""})
    whole = BASE.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    head = whole[8 : 8 + length].replace(b'{"dtype"', b'{ \t"dtype"') + b"   \n "
    BASE.write_bytes(len(head).to_bytes(8, "little") + head + whole[8 + length :])
    save(LORA, {"lora_unet_b.lora_down.weight": random(2, 30), "lora_unet_b.lora_up.weight": random(40, 2, size=1.0)})
    there_and_back()


@needs_lists
@pytest.mark.parametrize("dtype", ["keep", "fp16"])
def test_of_a_packed_projection_the_part_that_changed_is_kept(dtype: str) -> None:
    save(BASE, weights(tiny(FLUX), torch.bfloat16))
    module = "transformer.transformer_blocks.0.attn.to_k"
    save(
        LORA, {f"{module}.lora_A.weight": random(4, 96, size=1e-3), f"{module}.lora_B.weight": random(96, 4, size=1.0)}
    )
    there_and_back(dtype=dtype)
    parts = said()["parts"]["double_blocks.0.img_attn.qkv.weight"]
    rest = "copy" if dtype == "keep" else "difference"
    found = {bands[0][0]: (how, bands[0][1]) for how, bands, _ in parts}
    assert found == {0: (rest, 96), 96: ("difference", 192), 192: (rest, 288)}


@needs_lists
def test_every_kind_of_module_of_flux_comes_back() -> None:
    save(BASE, weights(tiny(FLUX), torch.bfloat16))
    save(LORA, flux_lora(MODULES, size=1e-3))
    there_and_back()


@pytest.mark.parametrize("family", ["dora of inputs", "dora of outputs", "oft", "full"])
def test_what_needs_a_whole_matrix_comes_back(family: str) -> None:
    save(BASE, model(torch.float16))
    name, tensors = "lora_unet_layers_0_proj", lora()
    if family == "oft":
        tensors = {f"{name}.oft_blocks": random(10, 104, 104, size=1e-3), f"{name}.alpha": torch.tensor(0.0)}
    elif family == "full":
        tensors = {f"{name}.diff": random(1040, 1030, size=1e-4), f"{name}.diff_b": random(1040, size=1e-4)}
    else:
        of_inputs = family == "dora of inputs"
        length = model(torch.float32)["layers.0.proj.weight"].norm(dim=0 if of_inputs else 1)
        tensors[f"{name}.dora_scale"] = length.reshape((1, -1) if of_inputs else (-1, 1))
    save(LORA, tensors)
    there_and_back()
    if family == "dora of inputs":  # a block of its own, in two pieces
        assert said()["parts"]["layers.0.proj.weight"] == [["difference", None, 1 << 20]]


@needs_lists
def test_text_encoders_come_back_the_transposed_projection_too() -> None:
    shapes = {k: tuple(n if n <= 8 else n // 32 for n in s) for k, s in shapes_of("sdmecha_sdxl-sgm").items()}
    kept = {k: s for k, s in shapes.items() if not any(f".{n}." in k for n in range(2, 40)) and all(s)}
    save(BASE, weights(kept, torch.float16))
    changed = {"lora_te2_text_projection": 40, "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": 24}
    save(LORA, {
        f"{module}.{leaf}.weight": random(*shape, size=3e-2)
        for module, width in changed.items() for leaf, shape in {"lora_down": (2, width), "lora_up": (width, 2)}.items()
    })  # fmt: skip
    there_and_back(text_encoder=0.7)
    assert "conditioner.embedders.1.model.text_projection" in said()["parts"]


@pytest.mark.parametrize("dtype", ["keep", "fp16"])
def test_scaled_codes_come_back_with_scales_and_marks_that_were_left_out(dtype: str) -> None:
    codes = (random(70, 60, size=100.0)).to(torch.float8_e4m3fn)
    tensors = {
        "a.weight": codes, "a.scale_weight": torch.tensor([3e-4]), "b.weight": codes.clone()[:20],
        "b.scale_weight": torch.tensor([2e-4]), "c": random(5), "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
    }  # fmt: skip
    save(BASE, tensors)
    save(LORA, {"lora_unet_a.lora_down.weight": random(2, 60), "lora_unet_a.lora_up.weight": random(70, 2)})
    there_and_back(dtype=dtype)
    how = {key: parts[0][0] for key, parts in said()["parts"].items()}
    new = {"a.weight": "difference", "a.scale_weight": "difference"}
    gone = {"a.weight": "difference", "b.weight": "difference", "c": "difference"} | dict.fromkeys(
        ("a.scale_weight", "b.scale_weight", "scaled_fp8"), "whole"
    )
    assert how == (new if dtype == "keep" else gone)


def test_a_weight_that_was_widened_comes_back_narrow() -> None:
    save(BASE, {"img_in.weight": random(12, 8).half(), "img_in.bias": random(12).half()})
    save(LORA, {
        "img_in.lora_A.weight": random(2, 16, size=1.0), "img_in.lora_B.weight": random(12, 2),
        "img_in.reshape_weight": torch.tensor([12, 16]),
    })  # fmt: skip
    there_and_back()
    assert load_file(OUT)["img_in.weight"].shape == (12, 16)
    assert said()["parts"] == {"img_in.weight": [["whole", None, 1 << 20]]}


def test_the_checkpoint_may_be_replaced_by_the_fused_file_and_comes_back() -> None:
    save_both(torch.bfloat16)
    before = BASE.read_bytes()
    fuse(BASE, LORA, output=BASE, undo=UNDO, force=True)
    assert BASE.read_bytes() != before
    unfuse(BASE, undo=UNDO, output=BASE, force=True)
    assert BASE.read_bytes() == before


def test_two_fuses_are_taken_back_one_after_the_other() -> None:
    save_both()
    fuse(BASE, LORA, output="one.safetensors", undo="u1.safetensors")
    fuse("one.safetensors", (LORA, -0.5), output="two.safetensors", undo="u2.safetensors")
    with pytest.raises(MismatchError):
        unfuse("two.safetensors", undo="u1.safetensors", output=BACK)
    unfuse("two.safetensors", undo="u2.safetensors", output="one again.safetensors")
    unfuse("one again.safetensors", undo="u1.safetensors", output=BACK)
    assert BACK.read_bytes() == BASE.read_bytes()


# ------------------------------------------------------------------------------------------------ how large, how stable


@pytest.mark.parametrize(("dtype", "share", "most"), [
    ("F16", 1e-2, 0.51), ("F16", 1e-3, 0.29), ("BF16", 1e-2, 0.31), ("BF16", 1e-3, 0.14),
])  # fmt: skip
def test_the_undo_of_a_weak_lora_is_smaller_than_what_it_restores(dtype: str, share: float, most: float) -> None:
    base = random(1000, 1000)
    save(BASE, {"a.weight": base.to(TORCH_DTYPES[dtype])})
    size = share * float(base.norm())
    up, down = random(1000, 8, seed=1, size=1.0), random(8, 1000, seed=2, size=1.0)
    save(LORA, {"a.lora_up.weight": up * size / float((up @ down).norm()), "a.lora_down.weight": down})
    fuse(BASE, LORA, output=OUT, undo=UNDO)
    assert UNDO.stat().st_size < most * BASE.stat().st_size


def test_the_undo_depends_neither_on_memory_nor_on_threads() -> None:
    save(BASE, model(torch.float16))
    save(LORA, lora())
    made = []
    for memory, threads in ((64 << 20, 1), (512 << 20, 3), (None, 2)):
        fuse(BASE, LORA, output=OUT, undo=UNDO, memory=memory, threads=threads, force=True)
        made.append(UNDO.read_bytes())
        for less in (None, 64 << 20):
            unfuse(OUT, undo=UNDO, output=BACK, memory=less, threads=threads, force=True)
            assert BACK.read_bytes() == BASE.read_bytes()
    assert made[0] == made[1] == made[2]


def test_the_format_is_what_it_was() -> None:
    """An undo file made here by hand is what fuse writes: a change that breaks this makes all older ones useless."""
    numbers = torch.arange(1_200_000)
    tensors = {"a.weight": (numbers % 4093).reshape(1200, 1000).half(), "copied": numbers.float()}
    save(BASE, tensors)
    save(LORA, {"a.lora_up.weight": torch.ones(1200, 1), "a.lora_down.weight": torch.ones(1, 1000)})
    fuse(BASE, (LORA, 2.0), output=OUT, undo=UNDO)

    whole, out = BASE.read_bytes(), load_file(OUT)
    head = whole[: 8 + int.from_bytes(whole[:8], "little")]
    before, after = (t["a.weight"].numpy().view(np.uint16).reshape(-1) for t in (tensors, out))
    kept, total = {"header": piece(np.frombuffer(head, np.uint8))}, xxhash.xxh3_128()
    step = (1 << 20) // 1000 * 1000
    for number, part in enumerate((slice(0, step), slice(step, None))):
        kept[f"a.weight.0.{number:05d}"] = piece(before[part] - after[part], of=before[part])
        total.update(b"a.weight\0000\0" + xxhash.xxh3_128_digest(after[part].data))
    for start, stop in ((0, 4 << 20), (4 << 20, 4_800_000)):
        data = out["copied"].numpy().tobytes()[start:stop]
        total.update(f"copied\0{start}\0".encode() + xxhash.xxh3_128_digest(data))
    text = said()
    assert text["original"].pop("hash").startswith("xxh3_128:")
    assert text == {
        "version": 1,
        "original": {"name": "base.safetensors", "bytes": len(whole), "header_bytes": len(head)},
        "fused": {"name": "out.safetensors", "hash": f"xxh3_128:{total.hexdigest()}"},
        "parts": {"a.weight": [["difference", None, step]]},
    }
    assert sorted(load_file(UNDO)) == sorted(kept)
    text["original"]["hash"] = "of no concern"
    held = {key: ("U8", [len(data)], data) for key, data in kept.items()}
    save_raw(Path("hand.safetensors"), held, {"weightops-undo": json.dumps(text)})
    unfuse(OUT, undo="hand.safetensors", output=BACK)
    assert BACK.read_bytes() == whole


def piece(codes: np.ndarray[Any, Any], of: np.ndarray[Any, Any] | None = None) -> bytes:
    """A piece with nothing deflated: the digest of the original, the lengths of the planes, zigzag codes by bytes."""
    signed = codes.view(f"i{codes.itemsize}").astype(np.int64)
    zigzag = np.where(signed < 0, -2 * signed - 1, 2 * signed).astype(np.uint64)
    planes = [(zigzag >> np.uint64(8 * n) & np.uint64(255)).astype(np.uint8).tobytes() for n in range(codes.itemsize)]
    head = [xxhash.xxh3_64_intdigest((codes if of is None else of).data), *map(len, planes)]
    return b"".join([*(n.to_bytes(8, "little") for n in head), *planes])


def test_a_difference_is_kept_as_it_was() -> None:
    """Two planes of zigzag codes, each deflated: what old files hold."""
    original = np.array([5, 65535, 300, 0], np.uint16)
    made = encode(original, np.array([4, 1, 300, 256], np.uint16))
    # 1, −2, 0, −256 → 2, 3, 0, 511: low bytes 2 3 0 255, high bytes 0 0 0 1; too few to become fewer.
    assert made[8:] == bytes([4, *[0] * 7, 4, *[0] * 7, 2, 3, 0, 255, 0, 0, 0, 1])
    assert decode(memoryview(made), 4, 2, np.array([4, 1, 300, 256], np.uint16)).tolist() == original.tolist()


@pytest.mark.parametrize(("stored", "original"), [*itertools.product(FLOATS, FLOATS)])
def test_any_bits_come_back_whatever_is_predicted(stored: str, original: str) -> None:
    chance = np.random.default_rng(0)
    count = 3000
    written = chance.integers(0, 256, count * itemsize(stored), np.uint8).view(f"u{itemsize(stored)}")
    before = chance.integers(0, 256, count * itemsize(original), np.uint8).view(f"u{itemsize(original)}")
    predicted = predict(written, stored, original)
    assert (predicted.dtype, predicted.shape) == (before.dtype, before.shape)
    data = encode(before, predicted)
    assert len(data) <= largest(count, itemsize(original))
    assert (decode(memoryview(data), count, itemsize(original), predicted) == before).all()


@pytest.mark.parametrize(("stored", "original"), [*itertools.product(FLOATS, FLOATS)])
def test_the_prediction_is_the_nearest_value(stored: str, original: str) -> None:
    """As torch casts it, ties apart: they may go either way."""
    values = (0.05 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))).to(TORCH_DTYPES[stored])
    codes = values.view(torch.uint8).numpy().view(f"u{itemsize(stored)}")
    found = torch.from_numpy(predict(codes, stored, original).view(np.uint8).copy()).view(TORCH_DTYPES[original])
    expected = values.to(TORCH_DTYPES[original]).double()
    off = (found.double() - values.double()).abs() - (expected - values.double()).abs()
    # By way of float16, where the dtype is of one byte: the second of two roundings may go the other way.
    assert float((off > 0).double().mean()) < (2e-2 if original.startswith("F8") else 1e-9)
    assert float(off.max()) <= 1e-3


# ------------------------------------------------------------------------------------------------ the wrong file


def changed(path: Path, key: str, into: Path) -> None:
    tensors = load_file(path)
    values = tensors[key].reshape(-1).view(torch.uint8).clone()
    values[len(values) // 2] ^= 1
    tensors[key] = values.view(tensors[key].dtype).reshape(tensors[key].shape)
    save(into, tensors)


@pytest.mark.parametrize("key", ["layers.0.proj.weight", "layers.2.other.weight", "words", "norm.scale"])
@pytest.mark.usefixtures("fused")
def test_a_file_with_one_other_bit_is_refused_by_its_hash(key: str) -> None:
    changed(OUT, key, Path("other.safetensors"))
    with pytest.raises(MismatchError) as caught:
        unfuse("other.safetensors", undo=UNDO, output=BACK)
    start, found, expected = str(caught.value).split("xxh3_128:")
    assert start == f"other.safetensors: is not the file that {UNDO} was made for: found "
    assert found.endswith(", expected ")
    assert len(found) == 32 + len(", expected ")
    assert f"xxh3_128:{expected}" == said()["fused"]["hash"]
    assert caught.value.hint == "that one was written as 'out.safetensors'; any of its tensors may have changed"
    assert not BACK.exists()


@pytest.mark.usefixtures("fused")
def test_a_file_of_other_tensors_is_refused_by_name() -> None:
    tensors = load_file(OUT)
    save(Path("less.safetensors"), {k: t for k, t in tensors.items() if k != "words"})
    save(Path("wide.safetensors"), tensors | {"layers.1.conv.weight": torch.zeros(3)})
    save(Path("cast.safetensors"), tensors | {"layers.2.other.weight": torch.zeros(50, 60)})
    for name, what in (
        ("less", "of 'words' it has none"),
        ("wide", "of 'layers.1.conv.weight' it has F32 [3], in place of F16 [24, 16, 3, 3]"),
        ("cast", "of 'layers.2.other.weight' it has F32 [50, 60], in place of F16 [50, 60]"),
    ):
        for dry_run in (False, True):
            with pytest.raises(MismatchError) as caught:
                unfuse(f"{name}.safetensors", undo=UNDO, output=BACK, dry_run=dry_run)
            assert str(caught.value) == f"{name}.safetensors: is not the file that {UNDO} was made for: {what}"
    with pytest.raises(MismatchError):
        unfuse(BASE, undo=UNDO, output=BACK)
    assert not BACK.exists()


@pytest.mark.usefixtures("fused")
def test_what_is_not_needed_may_change() -> None:
    """Metadata, order and container of the fused file do not matter, nor tensors that were not there before."""
    save(Path("other.safetensors"), load_file(OUT) | {"new": torch.ones(2)}, {"title": "mine"})
    unfuse("other.safetensors", undo=UNDO, output=BACK)
    assert BACK.read_bytes() == BASE.read_bytes()


# ------------------------------------------------------------------------------------------------ damaged undo files


def is_refused(kind: type[WeightopsError] = FormatError) -> WeightopsError:
    with pytest.raises(kind) as caught:
        unfuse(OUT, undo=UNDO, output=BACK)
    assert str(caught.value).startswith(str(UNDO))
    assert not BACK.exists()
    assert no_workers_left()
    return caught.value


@pytest.mark.usefixtures("fused")
def test_any_damage_to_the_undo_file_is_named() -> None:
    whole = UNDO.read_bytes()
    data_start = 8 + int.from_bytes(whole[:8], "little")
    places = np.linspace(data_start, len(whole) - 1, 40, dtype=int)
    for place in [*places.tolist(), data_start + 9]:
        UNDO.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        assert "tensor '" in str(is_refused())
    UNDO.write_bytes(whole)
    unfuse(OUT, undo=UNDO, output=BACK)


@pytest.mark.usefixtures("fused")
def test_an_undo_file_that_is_cut_is_refused() -> None:
    whole = UNDO.read_bytes()
    for size in (7, 300, len(whole) // 2, len(whole) - 1):
        UNDO.write_bytes(whole[:size])
        is_refused(TruncatedError)


@pytest.mark.usefixtures("fused")
def test_another_file_is_no_undo_file() -> None:
    for path in (OUT, LORA):
        with pytest.raises(FormatError) as caught:
            unfuse(OUT, undo=path, output=BACK)
        assert str(caught.value) == f"{path}: is no undo file: its metadata hold no 'weightops-undo'"
        assert caught.value.hint == "fuse --undo FILE writes one"
    torch.save({"a": torch.ones(2)}, "undo.pt")
    with pytest.raises(FormatError, match="is no undo file"):
        unfuse(OUT, undo="undo.pt", output=BACK)


def rewritten(change: Callable[[dict[str, Any], dict[str, np.ndarray[Any, Any]]], None]) -> None:
    """The undo file with something else in it, and no other fault."""
    tensors = {key: tensor.numpy() for key, tensor in load_file(UNDO).items()}
    text = said()
    change(text, tensors)
    held = {key: ("U8", [len(t)], t.tobytes()) for key, t in tensors.items()}
    save_raw(UNDO, held, {"weightops-undo": json.dumps(text)})


def header_of(data: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(encode(np.frombuffer(data, np.uint8), None, text=True), np.uint8)


PROJ = "layers.0.proj.weight"
HUGE = 1 << 61
HOSTILE: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "version": lambda s, t: s.update(version=2),
    "no version": lambda s, t: s.pop("version"),
    "version in words": lambda s, t: s.update(version="1"),
    "no original": lambda s, t: s.pop("original"),
    "original a list": lambda s, t: s.update(original=[]),
    "fused a text": lambda s, t: s.update(fused="x"),
    "hash a number": lambda s, t: s["fused"].update(hash=1),
    "parts a list": lambda s, t: s.update(parts=[1]),
    "parts of nothing": lambda s, t: s["parts"].update({PROJ: []}),
    "a part too short": lambda s, t: s["parts"].update({PROJ: [["difference", None]]}),
    "an unknown part": lambda s, t: s["parts"].update({PROJ: [["magic", None, 5]]}),
    "a tensor that is not there": lambda s, t: s["parts"].update(x=[["copy", None, 1]]),
    "an integer as a difference": lambda s, t: s["parts"].update(counted=[["difference", None, 30]]),
    "steps of nothing": lambda s, t: s["parts"][PROJ][0].__setitem__(2, 0),
    "steps of less": lambda s, t: s["parts"][PROJ][0].__setitem__(2, -5),
    "steps of one": lambda s, t: s["parts"][PROJ][0].__setitem__(2, 1),
    "steps of a half": lambda s, t: s["parts"][PROJ][0].__setitem__(2, 0.5),
    "steps of true": lambda s, t: s["parts"][PROJ][0].__setitem__(2, True),
    "steps of everything": lambda s, t: s["parts"][PROJ][0].__setitem__(2, HUGE),
    "bands of nothing": lambda s, t: s["parts"][PROJ][0].__setitem__(1, []),
    "bands with a gap": lambda s, t: s["parts"][PROJ][0].__setitem__(1, [[0, 5], [6, 1040]]),
    "bands that overlap": lambda s, t: s["parts"][PROJ][0].__setitem__(1, [[0, 500], [400, 1040]]),
    "bands too long": lambda s, t: s["parts"][PROJ][0].__setitem__(1, [[0, 1041]]),
    "bands below zero": lambda s, t: s["parts"][PROJ][0].__setitem__(1, [[-1, 1040]]),
    "bands turned round": lambda s, t: s["parts"][PROJ][0].__setitem__(1, [[1040, 0]]),
    "bands without end": lambda s, t: s["parts"][PROJ][0].__setitem__(1, [[n, n + 1] for n in range(1040)]),
    "bands of a word": lambda s, t: s["parts"][PROJ][0].__setitem__(1, "ab"),
    "a size below zero": lambda s, t: s["original"].update(bytes=-1),
    "a size beyond everything": lambda s, t: s["original"].update(bytes=HUGE),
    "a size without end": lambda s, t: s["original"].update(bytes=1 << 90),
    "a header of nothing": lambda s, t: s["original"].update(header_bytes=0),
    "a header of everything": lambda s, t: s["original"].update(header_bytes=HUGE),
    "a header of more": lambda s, t: s["original"].update(header_bytes=s["original"]["header_bytes"] + 1),
    "no header": lambda s, t: t.update(x=t.pop("header")),
    "a header that is none": lambda s, t: t.update(header=header_of(b"x" * s["original"]["header_bytes"])),
    "a tensor more": lambda s, t: t.update(x=np.zeros(5, np.uint8)),
    "a tensor less": lambda s, t: t.pop(f"{PROJ}.0.00001"),
    "another name": lambda s, t: t.update(x=t.pop(f"{PROJ}.0.00001")),
    "a piece of nothing": lambda s, t: t.update({f"{PROJ}.0.00001": np.zeros(0, np.uint8)}),
    "a piece too long": lambda s, t: t.update({f"{PROJ}.0.00001": np.zeros(9_000_000, np.uint8)}),
    "two pieces exchanged": lambda s, t: t.update(
        {f"{PROJ}.0.00000": t[f"{PROJ}.0.00001"], f"{PROJ}.0.00001": t[f"{PROJ}.0.00000"]}
    ),
    "a name that leaves the folder": lambda s, t: s["original"].update(name="../../\x1b[31m"),
}


@pytest.mark.parametrize("change", [*HOSTILE.values()], ids=[*HOSTILE])
@pytest.mark.usefixtures("fused")
def test_nothing_that_an_undo_file_says_is_believed(change: Callable[[Any, Any], None]) -> None:
    rewritten(change)
    with pytest.raises(FormatError) as caught:
        unfuse(OUT, undo=UNDO)
    assert str(caught.value).startswith(str(UNDO))
    assert len(str(caught.value)) < 500
    assert sorted(path.name for path in Path().iterdir()) == sorted(map(str, (BASE, LORA, OUT, UNDO)))


@pytest.mark.usefixtures("fused")
def test_the_name_that_is_taken_is_a_plain_one() -> None:
    rewritten(lambda s, t: s["original"].update(name="../..\\x/y.ckpt"))
    assert unfuse(OUT, undo=UNDO).output == "y.safetensors"
    assert Path("y.safetensors").read_bytes() == BASE.read_bytes()
    assert unfuse(OUT, undo=UNDO).output == "y-unfused.safetensors"
    with pytest.raises(OutputError, match=r"y-unfused\.safetensors: exists"):
        unfuse(OUT, undo=UNDO)


def test_what_would_become_too_much_is_not_inflated() -> None:
    bomb = encode(np.zeros(1 << 24, np.uint8) + 1, None)
    assert len(bomb) < 20_000
    for values in (1, 1000, (1 << 24) - 1, (1 << 24) + 1):
        with pytest.raises(Damaged, match=r"becomes other than|bytes for"):
            decode(memoryview(bomb), values, 1, None)
    with pytest.raises(Damaged, match="cannot be inflated"):
        decode(memoryview(bomb[:16] + b"\xff" * (len(bomb) - 16)), 1 << 24, 1, None)
    with pytest.raises(Damaged, match="expected at least 24"):
        decode(memoryview(bomb)[:20], 5, 2, None)


# ------------------------------------------------------------------------------------------------ refused at once


@pytest.mark.usefixtures("fused")
def test_an_undo_file_takes_the_place_of_nothing() -> None:
    def refused(undo: object, kind: type[WeightopsError], output: object = "new.safetensors", **words: Any) -> str:
        for dry_run in (True, False):
            with pytest.raises(kind) as caught:
                fuse(BASE, LORA, output=output, undo=undo, dry_run=dry_run, **words)  # type: ignore[arg-type]
        return str(caught.value)

    held = {path: path.read_bytes() for path in (BASE, LORA, OUT, UNDO)}
    (Path("folder")).mkdir()
    Path("link.safetensors").symlink_to(BASE)
    assert refused(UNDO, OutputError) == f"{UNDO}: exists"
    for force in (False, True):
        assert refused(BASE, UsageError, force=force) == "--undo: 'base.safetensors' is also an input"
        assert refused("link.safetensors", UsageError, force=force) == "--undo: 'link.safetensors' is also an input"
        assert refused(LORA, UsageError, force=force) == "--undo: 'lora.safetensors' is also an input"
        assert refused("./new.safetensors", UsageError, force=force) == "--undo: 'new.safetensors' is also the output"
    assert refused(OUT, UsageError, OUT, force=True) == "--undo: 'out.safetensors' is also the output"
    assert refused("u.bin", UsageError) == "--undo: 'u.bin': the name must end in .safetensors"
    assert refused("no/u.safetensors", OutputError) == "no/u.safetensors: the folder 'no' does not exist"
    assert {path: path.read_bytes() for path in held} == held
    assert not Path("new.safetensors").exists()


def test_only_a_safetensors_file_can_be_got_back() -> None:
    tensors = model(torch.float16, 40)
    save(LORA, lora(40))
    torch.save(tensors, "base.pt")
    Path("shards").mkdir()
    save(Path("shards/a.safetensors"), tensors)
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    Path("shards/model.safetensors.index.json").write_text(json.dumps(index))
    for given, held in (("base.pt", "a pickle"), ("shards", "several files")):
        with pytest.raises(UsageError) as caught:
            fuse(given, LORA, output=OUT, undo=UNDO)
        what = f"--undo: {given} is {held}, and only a .safetensors file can be got back byte for byte"
        assert str(caught.value) == what
        assert caught.value.hint == "convert makes one file of it"
    # One file in a folder is one file, and one of another name is what it holds.
    Path("folder").mkdir()
    save(Path("folder/model.safetensors"), tensors)
    shutil.copy("folder/model.safetensors", "base.ckpt")
    for number, given in enumerate(("folder", "base.ckpt")):
        fuse(given, LORA, output=f"out{number}.safetensors", undo=f"u{number}.safetensors")
        name = unfuse(f"out{number}.safetensors", undo=f"u{number}.safetensors").output
        assert name == f"{given.removesuffix('.ckpt')}.safetensors"
        assert Path(name).read_bytes() == Path("folder/model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["keep", "fp8_e5m2"])
def test_a_dry_run_says_the_most_that_it_could_take(dtype: str) -> None:
    generator = np.random.default_rng(0)
    tensors = {key: ("BF16", list(t.shape), generator.bytes(2 * t.numel())) for key, t in model(torch.half, 40).items()}
    save_raw(BASE, tensors)
    save(LORA, lora(40))
    words: dict[str, Any] = {"output": OUT, "undo": UNDO, "allow_nonfinite": True, "dtype": dtype}
    said = fuse(BASE, LORA, dry_run=True, **words).details["undo"]
    assert not UNDO.exists()
    found = fuse(BASE, LORA, **words).details["undo"]
    assert found["bytes_written"] <= said["bytes_written"] < 1.2 * BASE.stat().st_size + 20_000
    assert unfuse(OUT, undo=UNDO, output=BACK, dry_run=True).bytes_written == BASE.stat().st_size
    assert not BACK.exists()


# ------------------------------------------------------------------------------------------------ whatever fails


@pytest.fixture(params=["unnamed", "named"])
def naming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As with O_TMPFILE, and as on a system without it, where files in the making have hidden names."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
        monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", False, raising=False)
    return str(request.param)


def only_inputs_are_left() -> bool:
    assert sorted(path.name for path in Path().iterdir()) == [str(BASE), str(LORA)]
    assert no_workers_left()
    return True


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_write_may_fail_at_any_moment_and_neither_file_is_there(
    naming: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    save(BASE, {"a.weight": random(40, 30).half(), "b": torch.arange(5)})
    save(LORA, {"a.lora_down.weight": random(2, 30), "a.lora_up.weight": random(40, 2)})
    really, lock, writes, fail_at = os.pwrite, threading.Lock(), [0], [-1]

    def pwrite(fd: int, data: Any, offset: int) -> int:
        with lock:
            writes[0] += 1
            if writes[0] == fail_at[0]:
                raise OSError(number, os.strerror(number))
        return really(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    fuse(BASE, LORA, output=OUT, undo=UNDO)
    total = writes[0]
    assert total >= 9  # headers, the pieces, and both files
    for moment in range(1, total + 1):
        OUT.unlink(missing_ok=True)
        UNDO.unlink(missing_ok=True)
        writes[0], fail_at[0] = 0, moment
        with pytest.raises(OutputError, match="no room" if number == errno.ENOSPC else "cannot be written"):
            fuse(BASE, LORA, output=OUT, undo=UNDO, threads=1)
        assert only_inputs_are_left()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "failed"), FileExistsError(), KeyboardInterrupt()])
def test_where_the_output_cannot_appear_the_undo_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    save_both()
    really, seen = SafetensorsWriter._publish, []

    def publish(self: SafetensorsWriter) -> None:
        seen.append((self.path, UNDO.exists()))
        if self.path == OUT:
            raise error
        really(self)

    monkeypatch.setattr(SafetensorsWriter, "_publish", publish)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError):
        fuse(BASE, LORA, output=OUT, undo=UNDO)
    assert seen == [(UNDO, False), (OUT, True)]
    assert only_inputs_are_left()


def test_once_the_output_is_there_the_undo_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is found out later: without it, the checkpoint that was replaced would be lost."""
    save_both()
    before = BASE.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weightops.ops.produce.verify", fail)
    with pytest.raises(Interrupted, match="interrupted while it was verified; it is written, and whole"):
        fuse(BASE, LORA, output=BASE, undo=UNDO, force=True, verify=True)
    unfuse(BASE, undo=UNDO, output=BACK)
    assert BACK.read_bytes() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files without names")
def test_killed_between_the_two_the_undo_is_there_and_the_checkpoint_as_it_was() -> None:
    save_both()
    before = BASE.read_bytes()
    program = (
        "import os, signal, sys; from weightops.files.writer import SafetensorsWriter as W; really = W._publish\n"
        "def publish(self):\n"
        "    if self.path.name == 'base.safetensors': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    really(self)\n"
        "W._publish = publish\n"
        "from weightops import fuse; fuse('base.safetensors', 'lora.safetensors', output='base.safetensors',"
        " undo='undo.safetensors', force=True)"
    )
    environment = {**os.environ, "PYTHONPATH": str(CLI.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert BASE.read_bytes() == before
    assert sorted(path.name for path in Path().iterdir()) == sorted(map(str, (BASE, LORA, UNDO)))
    fuse(BASE, LORA, output=OUT)
    unfuse(OUT, undo=UNDO, output=BACK)
    assert BACK.read_bytes() == before


@pytest.mark.parametrize("moment", ["at work", "while the pieces are put in order"])
def test_ctrl_c_leaves_neither_file(naming: str, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    save_both()

    def interrupt(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    if moment == "at work":
        with pytest.raises(KeyboardInterrupt):
            fuse(BASE, LORA, output=OUT, undo=UNDO, on_progress=interrupt)
    else:
        monkeypatch.setattr(undo_module, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fuse(BASE, LORA, output=OUT, undo=UNDO)
    assert only_inputs_are_left()


@pytest.mark.usefixtures("fused")
def test_what_cannot_be_restored_leaves_nothing(naming: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    before = sorted(path.name for path in Path().iterdir())
    with pytest.raises(KeyboardInterrupt):
        unfuse(OUT, undo=UNDO, output=BACK, on_progress=interrupt)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OutputError, match="cannot be written to the disk"):
        unfuse(OUT, undo=UNDO, output=BACK)
    assert sorted(path.name for path in Path().iterdir()) == before
    assert no_workers_left()
