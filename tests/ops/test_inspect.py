"""inspect: what a file is, from its header; statistics and hashes from one pass over it."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from conftest import save, save_raw

import weightops
from weightops.engine.chunks import BLOCK_VALUES
from weightops.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from weightops.ops.inspect import Inspection

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
FIXTURE = Path(__file__).parents[2] / "fixtures" / "headers" / "sdxl.json.gz"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ from the header


def test_a_file_is_described_from_its_header() -> None:
    tensors = {
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.zeros(4, 4, 1, 1).half(),
        "model.diffusion_model.out.2.bias": torch.zeros(4),
        "first_stage_model.decoder.conv_in.weight": torch.zeros(2, 3).half(),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.zeros(1, 77, dtype=torch.int64),
    }
    save(Path("a.safetensors"), tensors, {"z": "2", "a": "1"})
    found = weightops.inspect("a.safetensors")
    assert found.to_dict() == {
        "path": "a.safetensors",
        "kind": "checkpoint",
        "architecture": "sd15",
        "spelling": "original",
        "container": "safetensors",
        "tensors": 4,
        "parameters": 16 + 4 + 6 + 77,
        "bytes": Path("a.safetensors").stat().st_size,
        "dtypes": {"F16": 2, "F32": 1, "I64": 1},
        "components": {
            "text_encoder": {"tensors": 1, "parameters": 77, "bytes": 616, "dtypes": {"I64": 1}},
            "unet": {"tensors": 2, "parameters": 20, "bytes": 48, "dtypes": {"F32": 1, "F16": 1}},
            "vae": {"tensors": 1, "parameters": 6, "bytes": 12, "dtypes": {"F16": 1}},
        },
        "metadata": {"a": "1", "z": "2"},
        "left_out": [],
    }


def test_every_dtype_of_the_format_is_shown_and_counted() -> None:
    from weightops.files.dtypes import DTYPES

    save_raw(Path("a.safetensors"), {code: (code, [8], b"\0" * d.bits) for code, d in DTYPES.items()})
    found = weightops.inspect("a.safetensors", tensors="*")
    assert found.dtypes == dict.fromkeys(DTYPES, 1)
    assert found.tensors is not None
    assert {name: (s.dtype, s.shape, s.nbytes) for name, s in found.tensors.items()} == {
        code: (code, (8,), d.bits) for code, d in DTYPES.items()
    }
    assert found.parameters == 8 * len(DTYPES)


def test_an_empty_file_of_tensors_is_described() -> None:
    save(Path("a.safetensors"), {})
    found = weightops.inspect("a.safetensors", stats=True)
    assert (found.kind, found.count, found.parameters, found.components, found.stats) == ("unknown", 0, 0, {}, {})


@pytest.mark.skipif(not FIXTURE.is_file(), reason="the fixture is not here")
def test_a_real_header_of_sdxl_is_known() -> None:
    listed = json.loads(gzip.decompress(FIXTURE.read_bytes()))
    shapes = {k: v["shape"] if isinstance(v, dict) else v[-1] for k, v in listed.items() if k != "__metadata__"}
    tiny = {k: ("F16", [min(d, 2) for d in s], b"\0\0" * math.prod(min(d, 2) for d in s)) for k, s in shapes.items()}
    save_raw(Path("a.safetensors"), tiny)
    found = weightops.inspect("a.safetensors")
    assert (found.kind, found.architecture, found.spelling, found.count) == (
        "checkpoint",
        "sdxl",
        "original",
        len(tiny),
    )
    assert found.components.keys() >= {"unet", "vae", "text_encoder", "text_encoder_2"}


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("*", ["A.x", "a.b.x", "a.b.y", "a.x"]),
        ("a.*", ["a.b.x", "a.b.y", "a.x"]),
        ("*.x", ["A.x", "a.b.x", "a.x"]),
        ("a.b.?", ["a.b.x", "a.b.y"]),
        ("[aA].x", ["A.x", "a.x"]),
        ("a.x", ["a.x"]),
    ],
)
def test_a_glob_chooses_tensors_by_name(glob: str, names: list[str]) -> None:
    save(Path("a.safetensors"), {name: torch.zeros(1) for name in ["a.x", "a.b.x", "a.b.y", "A.x"]})
    found = weightops.inspect("a.safetensors", tensors=glob, stats=True)
    assert found.tensors is not None
    assert found.stats is not None
    assert list(found.tensors) == list(found.stats) == names
    assert found.count == 4


def test_a_glob_that_fits_nothing_is_refused() -> None:
    save(Path("a.safetensors"), {"x": torch.zeros(1)})
    with pytest.raises(UsageError) as caught:
        weightops.inspect("a.safetensors", tensors="y*")
    assert str(caught.value) == "--tensors: no tensor of a.safetensors is named like 'y*'"


def test_what_a_pickle_holds_is_described_without_running_it() -> None:
    torch.save({"state_dict": {"model.diffusion_model.x": random(0, 3, 4)}, "epoch": 7}, "a.ckpt")
    found = weightops.inspect("a.ckpt", stats=True)
    assert (found.container, found.kind, found.count, found.parameters) == ("pickle", "checkpoint", 1, 12)
    assert [path for path, _ in found.left_out] == ["epoch"]
    assert found.stats is not None
    assert found.stats["model.diffusion_model.x"].norm == pytest.approx(random(0, 3, 4).double().norm().item())
    torch.save({"w": random(1, 5, 7).T}, "strided.pt")
    stats = weightops.inspect("strided.pt", stats=True).stats
    assert stats is not None
    assert stats["w"].norm == pytest.approx(random(1, 5, 7).double().norm().item())


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize(
    ("path", "kind", "count"),
    [
        ("loras/pickle/cloneofsimo_lora_kiriko2.text_encoder.pt", "unknown", 96),
        ("loras/pickle/cloneofsimo_lora_kiriko2.ti.pt", "embedding", 1),
        ("loras/pickle/cloneofsimo_lora_pop.pt", "unknown", 256),
        ("checkpoints/taef2_decoder.pth", "unknown", 79),
        ("checkpoints/taef2_encoder.pth", "unknown", 79),
        ("loras/catundchat_sd15.safetensors", "lora", 256),
        ("loras/cloneofsimo_lora_disney.safetensors", "lora", 386),
        ("loras/hyper07_peft.safetensors", "lora", 256),
        ("loras/lycoris_smart_falcon_16_lokr.safetensors", "lora", 1750),
    ],
)
def test_real_files_are_described(path: str, kind: str, count: int) -> None:
    found = weightops.inspect(SHARED / path, stats=True)
    assert (found.kind, found.count) == (kind, count)
    assert found.architecture is None
    assert found.stats is not None
    assert not any(s.nan or s.inf for s in found.stats.values())


# ------------------------------------------------------------------------------------------------ statistics


def stats_of(name: str, values: Tensor) -> Inspection:
    save(Path("s.safetensors"), {name: values})
    return weightops.inspect("s.safetensors", stats=True)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 1000, BLOCK_VALUES + 1])
def test_statistics_are_those_of_numpy(dtype: torch.dtype, count: int) -> None:
    values = random(count, count).to(dtype)
    found = stats_of("x", values).stats
    assert found is not None
    array = values.double().numpy()
    s = found["x"]
    assert s.norm == pytest.approx(float(np.linalg.norm(array)), rel=1e-12)
    assert (s.low, s.high, s.nan, s.inf) == (array.min(), array.max(), 0, 0)


def test_statistics_are_of_the_finite_values_alone() -> None:
    values = random(0, 2 * BLOCK_VALUES + 10)
    values[[3, 5, BLOCK_VALUES + 1]] = math.nan
    values[[7, 2 * BLOCK_VALUES + 3]] = math.inf
    values[8] = -math.inf
    found = stats_of("x", values).stats
    assert found is not None
    finite = values[values.isfinite()].double().numpy()
    s = found["x"]
    assert s.norm == pytest.approx(float(np.linalg.norm(finite)), rel=1e-12)
    assert (s.low, s.high, s.nan, s.inf) == (finite.min(), finite.max(), 3, 3)


@pytest.mark.parametrize(("values", "nan", "inf"), [([math.nan] * 3, 3, 0), ([math.inf, -math.inf, math.nan], 1, 2)])
def test_a_tensor_without_a_finite_value_has_no_extremes(values: list[float], nan: int, inf: int) -> None:
    found = stats_of("x", torch.tensor(values)).to_dict()
    assert found["stats"] == {"x": {"norm": 0.0, "min": None, "max": None, "nan": nan, "inf": inf}}
    json.dumps(found, allow_nan=False)


def test_scalars_have_statistics_and_empty_tensors_and_integers_have_none() -> None:
    tensors = {
        "scalar": torch.tensor(-2.0),
        "empty": torch.zeros(0, 3),
        "int": torch.arange(3),
        "bool": torch.ones(2) > 0,
    }
    save(Path("a.safetensors"), tensors)
    found = weightops.inspect("a.safetensors", stats=True).to_dict()
    assert found["stats"] == {"scalar": {"norm": 2.0, "min": -2.0, "max": -2.0, "nan": 0, "inf": 0}}


@pytest.mark.parametrize("size", [1e300, 1e-300, 5e-324])
def test_norms_of_values_whose_squares_leave_float64_are_right(size: float) -> None:
    found = stats_of("x", torch.tensor([3 * size, -4 * size], dtype=torch.float64)).stats
    assert found is not None
    assert found["x"].norm == pytest.approx(5 * size)


def test_a_norm_beyond_float64_is_null_in_json() -> None:
    found = stats_of("x", torch.full((10,), 1.7e308, dtype=torch.float64)).to_dict()
    assert found["stats"]["x"]["norm"] is None
    json.dumps(found, allow_nan=False)


def test_statistics_do_not_depend_on_memory_or_threads() -> None:
    save(Path("a.safetensors"), {f"t{i}": random(i, 700, 1000).half() for i in range(3)})
    found = [
        weightops.inspect("a.safetensors", stats=True, memory=memory, threads=threads).stats
        for memory, threads in [(32 << 20, 1), (64 << 20, 2), (1 << 30, 3)]
    ]
    assert found[0] == found[1] == found[2]


# ------------------------------------------------------------------------------------------------ hashes


@pytest.mark.parametrize("count", [0, 3, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_hashes_are_those_of_hashlib(count: int) -> None:
    save(Path("a.safetensors"), {"x": random(0, count)}, {"k": "v" * 100})
    data = Path("a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    whole, tensors = hashlib.sha256(data).hexdigest(), hashlib.sha256(data[8 + length :]).hexdigest()
    assert weightops.inspect("a.safetensors", hashes=True).hashes == [
        {
            "file": "a.safetensors",
            "sha256": whole,
            "autov2": whole[:10],
            "tensor_data": tensors,
            "autov3": tensors[:12],
        }
    ]


def test_a_header_longer_than_a_buffer_is_left_out_of_the_tensors_hash() -> None:
    save(Path("a.safetensors"), {"x": random(0, 10)}, {"k": "v" * (9 << 20)})
    found = weightops.inspect("a.safetensors", hashes=True).hashes
    assert found is not None
    assert found[0]["tensor_data"] == hashlib.sha256(random(0, 10).numpy().tobytes()).hexdigest()


def test_a_pickle_has_only_the_hashes_of_the_whole_file() -> None:
    torch.save({"x": random(0, 3)}, "a.pt")
    whole = hashlib.sha256(Path("a.pt").read_bytes()).hexdigest()
    assert weightops.inspect("a.pt", hashes=True).hashes == [{"file": "a.pt", "sha256": whole, "autov2": whole[:10]}]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_real_loras_carry_the_hash_that_is_found() -> None:
    checked = 0
    for path in sorted((SHARED / "loras").glob("*.safetensors")):
        found = weightops.inspect(path, hashes=True)
        assert found.hashes is not None
        if "sshs_model_hash" in found.metadata:
            assert found.hashes[0]["tensor_data"] == found.metadata["sshs_model_hash"]
            checked += 1
    assert checked >= 2


def test_each_shard_has_its_hashes() -> None:
    parts = {"one.safetensors": "a", "two.safetensors": "b"}
    for name, key in parts.items():
        save(Path(name), {key: random(0, 3)})
    Path("m.safetensors.index.json").write_text(json.dumps({"weight_map": {k: n for n, k in parts.items()}}))
    found = weightops.inspect("m.safetensors.index.json", hashes=True)
    assert found.hashes is not None
    assert [entry["sha256"] for entry in found.hashes] == [
        hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in parts
    ]
    assert found.container == "shards"
