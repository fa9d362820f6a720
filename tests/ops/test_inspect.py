"""inspect: what a file is, from its header; statistics and hashes from one pass over it."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import save, save_raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weightops
from weightops.engine.chunks import BLOCK_VALUES
from weightops.errors import UsageError
from weightops.lora import dialects

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weightops.ops.inspect import Inspection

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
FIXTURES = Path(__file__).parents[2] / "fixtures" / "headers"


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
        "variant": None,
        "possible": [],
        "container": "safetensors",
        "tensors": 4,
        "parameters": 16 + 4 + 6 + 77,
        "bytes": Path("a.safetensors").stat().st_size,
        "dtypes": {"F16": 2, "F32": 1, "I64": 1},
        "components": {
            "text_encoder": {
                "tensors": 1, "parameters": 77, "bytes": 616, "dtypes": {"I64": 1}, "network": "clip",
                "spelling": "transformers",
            },
            "unet": {
                "tensors": 2, "parameters": 20, "bytes": 48, "dtypes": {"F32": 1, "F16": 1}, "network": "sd15_unet",
                "spelling": "original",
            },
            "vae": {"tensors": 1, "parameters": 6, "bytes": 12, "dtypes": {"F16": 1}},
        },
        "metadata": {"a": "1", "z": "2"},
        "left_out": [],
    }  # fmt: skip


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
    ("path", "kind", "architecture", "count"),
    [
        ("loras/pickle/cloneofsimo_lora_kiriko2.text_encoder.pt", "lora", None, 96),
        ("loras/pickle/cloneofsimo_lora_kiriko2.ti.pt", "embedding", None, 1),
        ("loras/pickle/cloneofsimo_lora_pop.pt", "lora", None, 256),
        ("checkpoints/taef2_decoder.pth", "unknown", None, 79),
        ("checkpoints/taef2_encoder.pth", "unknown", None, 79),
        ("loras/catundchat_sd15.safetensors", "lora", "sd15", 256),
        ("loras/cloneofsimo_lora_disney.safetensors", "lora", None, 386),
        ("loras/hyper07_peft.safetensors", "lora", "sd15", 256),
        ("loras/lycoris_smart_falcon_16_lokr.safetensors", "lora", "sd15", 1750),
    ],
)
def test_real_files_are_described(path: str, kind: str, architecture: str | None, count: int) -> None:
    found = weightops.inspect(SHARED / path, stats=True)
    assert (found.kind, found.architecture, found.count) == (kind, architecture, count)
    assert found.stats is not None
    assert not any(s.nan or s.inf for s in found.stats.values())


# ------------------------------------------------------------------------------------------------ models


def sparse(path: str, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of half floats that are all zero, and that take no room."""
    head: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    stop = 0
    for key, shape in shapes.items():
        start, stop = stop, stop + 2 * math.prod(shape)
        head[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(head).encode()
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + stop)
    return Path(path)


@functools.cache
def fixture(name: str) -> dict[str, list[int]]:
    path = FIXTURES / f"{name}.json.gz"
    if not path.is_file():
        pytest.skip("the fixture is not here")
    return {key: shape for key, (_, shape) in json.loads(gzip.decompress(path.read_bytes())).items()}


def test_a_whole_checkpoint_is_described_with_the_network_of_each_component() -> None:
    found = weightops.inspect(sparse("a.safetensors", fixture("sdxl")))
    assert (found.kind, found.architecture, found.spelling, found.variant) == ("checkpoint", "sdxl", "original", "sdxl")
    assert {name: (entry["network"], entry["spelling"]) for name, entry in found.components.items()} == {
        "unet": ("sdxl", "original"),
        "vae": ("sd_vae", "original"),
        "text_encoder": ("clip_l", "transformers"),
        "text_encoder_2": ("clip_bigg", "openclip"),
    }
    assert "strangers" not in found.to_dict()
    assert "lora" not in found.to_dict()


def test_strange_keys_of_a_known_model_are_named() -> None:
    strange = "model.diffusion_model.input_blocks.4.1.adapter.weight"
    found = weightops.inspect(sparse("a.safetensors", {**fixture("sdxl"), strange: [4, 4]})).to_dict()
    assert (found["architecture"], found["strangers"]) == ("sdxl", [strange])


def test_what_names_and_shapes_cannot_tell_is_said() -> None:
    shapes = {f"transformer_blocks.{i}.attn.to_q.weight": [3072, 3072] for i in range(3)}
    found = weightops.inspect(sparse("a.safetensors", shapes)).to_dict()
    assert found["architecture"] is found["spelling"] is found["variant"] is None
    assert found["possible"] == ["chroma", "flux", "flux2", "hunyuan_video", "qwen_image"]


# ------------------------------------------------------------------------------------------------ adapters

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def sd15_lora() -> dict[str, Tensor]:
    """A made-up LoRA for Stable Diffusion 1, of rank 4 and 2, with an alpha each."""
    return {
        f"{UNET}.lora_down.weight": torch.zeros(4, 768),
        f"{UNET}.lora_up.weight": torch.zeros(320, 4),
        f"{UNET}.alpha": torch.tensor(2.0),
        f"{TEXT}.lora_down.weight": torch.zeros(2, 768).half(),
        f"{TEXT}.lora_up.weight": torch.zeros(3072, 2).half(),
        f"{TEXT}.alpha": torch.tensor(1.5).half(),
    }


def test_an_adapter_is_described_by_dialect_families_ranks_and_alphas() -> None:
    save(Path("a.safetensors"), sd15_lora(), {"ss_network_dim": "4"})
    found = weightops.inspect("a.safetensors").to_dict()
    assert {k: found[k] for k in ("kind", "architecture", "spelling", "variant", "possible")} == {
        "kind": "lora", "architecture": "sd15", "spelling": "diffusers", "variant": None, "possible": [],
    }  # fmt: skip
    size = 4 * (4 * 1088 + 1) + 2 * (2 * 3840 + 1)
    assert found["components"] == {
        "adapter": {"tensors": 6, "parameters": 4 * 1088 + 2 * 3840 + 2, "bytes": size, "dtypes": {"F32": 3, "F16": 3}}
    }
    assert found["lora"] == {
        "dialect": "kohya",
        "dialects": {"kohya": 4},
        "families": {"lora": 2},
        "ranks": {"2": 1, "4": 1},
        "alphas": {"1.5": 1, "2": 1},
        "modules": 2,
        "targets": {"text_encoder": 1, "unet": 1},
        "unresolved": [],
        "embeddings": [],
        "problems": [],
        "unknown": [],
    }


def test_a_real_list_of_a_lora_is_known() -> None:
    found = weightops.inspect(sparse("a.safetensors", fixture("flux_lora_kohya")))
    assert (found.kind, found.architecture, found.spelling, found.variant) == ("lora", "flux", "original", None)
    assert found.lora is not None
    assert (found.lora["dialect"], found.lora["families"], found.lora["ranks"], found.lora["modules"]) == (
        "kohya", {"lora": 304}, {"16": 304}, 304,
    )  # fmt: skip


def test_a_module_of_two_families_is_one_module_with_one_alpha() -> None:
    tensors = sd15_lora()
    del tensors[f"{TEXT}.alpha"]
    save(Path("a.safetensors"), {**tensors, f"{UNET}.diff_b": torch.zeros(320)})
    lora = weightops.inspect("a.safetensors").lora
    assert lora is not None
    assert (lora["modules"], lora["families"], lora["alphas"]) == (2, {"lora": 2, "full": 1}, {"2": 1})


def test_alphas_that_are_written_alike_are_counted_together() -> None:
    alphas = {f"{UNET}.alpha": torch.tensor(1.0), f"{TEXT}.alpha": torch.tensor(1.0000001)}
    save(Path("a.safetensors"), sd15_lora() | alphas)
    lora = weightops.inspect("a.safetensors").lora
    assert lora is not None
    assert lora["alphas"] == {"1": 2}


def test_an_alpha_may_stand_in_diffusers_header_or_in_pefts_file() -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {"lora_A.weight": torch.zeros(4, 768), "lora_B.weight": torch.zeros(320, 4)}
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    save(Path("d.safetensors"), {f"unet.{name}.{leaf}": t for leaf, t in factors.items()}, header)
    Path("p").mkdir()
    tensors = {f"base_model.model.{name}.{leaf}": t for leaf, t in factors.items()}
    save(Path("p/adapter_model.safetensors"), tensors)
    Path("p/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6}))
    for path, dialect, alphas in (("d.safetensors", "diffusers", {"8": 1}), ("p", "peft", {"6": 1})):
        lora = weightops.inspect(path).lora
        assert lora is not None
        assert (lora["dialect"], lora["alphas"]) == (dialect, alphas)


@pytest.mark.parametrize(
    ("more", "metadata", "name", "what"),
    [
        ({f"{UNET}.alpha": torch.tensor([True])}, {}, "a.safetensors",
         f"'{UNET}.alpha' is BOOL [1], expected one number"),
        ({f"{UNET}.alpha": torch.ones(3)}, {}, UNET, "has an alpha of shape [3], expected one number"),
        ({}, {"lora_adapter_metadata": "{"}, "a.safetensors", "'lora_adapter_metadata' in its header is no JSON"),
        ({f"{UNET}.lora_down.weight": torch.zeros(5, 768)}, {}, UNET,
         "has factors that do not meet: up [320, 4], down [5, 768]"),
        ({f"{UNET}.hada_w1_a": torch.zeros(2, 2)}, {}, UNET, None),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_adapter_is_said_and_is_no_error(
    more: dict[str, Tensor], metadata: dict[str, str], name: str, what: str | None
) -> None:
    save(Path("a.safetensors"), sd15_lora() | more, metadata)
    lora = weightops.inspect("a.safetensors").lora
    assert lora is not None
    assert {"name": name, "what": what} in lora["problems"] or (what is None and name in str(lora["problems"]))


def test_what_is_none_of_an_adapters_known_keys_is_named() -> None:
    more = {
        "<my-token>": torch.zeros(768),
        "lora_unet_no_such_module.lora_down.weight": torch.zeros(4, 8),
        "lora_unet_no_such_module.lora_up.weight": torch.zeros(8, 4),
        "lora_unet_mangled_lora_down.weight": torch.zeros(4, 8),
        "what": torch.zeros(1),
    }
    names = [f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn{i}_to_{x}" for i in (1, 2) for x in "qkv"]
    names += [f"lora_unet_up_blocks_3_attentions_0_transformer_blocks_0_attn{i}_to_{x}" for i in (1, 2) for x in "qkv"]
    for name in names:
        width = 768 if "attn2_to_k" in name or "attn2_to_v" in name else 320
        more |= {f"{name}.lora_down.weight": torch.zeros(4, width), f"{name}.lora_up.weight": torch.zeros(320, 4)}
    save(Path("a.safetensors"), more)
    found = weightops.inspect("a.safetensors")
    assert found.architecture == "sd15"
    assert found.lora is not None
    assert found.lora["unresolved"] == ["lora_unet_no_such_module"]
    assert found.lora["embeddings"] == ["<my-token>"]
    assert found.lora["unknown"] == ["lora_unet_mangled_lora_down.weight", "what"]


@functools.cache
def adapter_lists() -> dict[str, dict[str, list[int]]]:
    """Real lists of adapters: all there are, or else the fixture alone."""
    found = {"fixture": fixture("flux_lora_kohya")}
    for path in sorted([*(SHARED / "keys").glob("invoke_*.json.gz"), *(SHARED / "keys").glob("toolkit_LoRA*.json.gz")]):
        shapes = {key: entry["shape"] for key, entry in json.loads(gzip.decompress(path.read_bytes())).items()}
        found[path.name] = {key: [abs(d) for d in shape] for key, shape in shapes.items()}
    return found


ENDINGS = sorted({ending.text for ending in dialects.ENDINGS})
BEGINNINGS = sorted({beginning.text for beginning in dialects.BEGINNINGS})


@st.composite
def odd_adapters(draw: st.DrawFn) -> dict[str, list[int]]:
    """A few keys of a real adapter, some with other endings, beginnings, or shapes."""
    lists = adapter_lists()
    shapes = lists[draw(st.sampled_from(sorted(lists)))]
    any_shape = st.lists(st.sampled_from([0, 1, 2, 3, 4, 16, 320]), max_size=5)
    found: dict[str, list[int]] = {}
    for key in draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, max_size=12, unique=True)):
        stem = key.rpartition(".lora")[0] or key.rpartition(".")[0]
        name = draw(
            st.one_of(
                st.just(key),
                st.sampled_from(ENDINGS).map(stem.__add__),
                st.sampled_from(BEGINNINGS).map(lambda text, key=key: text + key),
                st.integers(0, len(key)).map(lambda stop, key=key: key[:stop]),
                st.just(key.replace("0", draw(st.sampled_from(["#", "{}", "007", "²", ""])))),
            )
        )
        found[name] = draw(st.one_of(st.just(shapes[key]), any_shape))
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(odd_adapters())
def test_an_odd_adapter_is_described_whatever_it_holds(shapes: dict[str, list[int]]) -> None:
    found = weightops.inspect(sparse("odd.safetensors", shapes)).to_dict()
    json.dumps(found, allow_nan=False)
    assert found["tensors"] == len(shapes)
    assert found["architecture"] is None or found["possible"] == []
    if found["kind"] == "lora":
        lora = found["lora"]
        assert sum(lora["targets"].values()) + len(lora["unresolved"]) == sum(lora["families"].values())


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
