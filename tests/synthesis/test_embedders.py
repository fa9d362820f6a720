"""An embedder makes of an image what its file says, whoever computes it; what is none is refused in a sentence."""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from weightops.errors import FormatError, MismatchError, UsageError, ValueRefused
from weightops.synthesis.embedders import condition_similarity, embedder_of, pixels, squared

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning"
)


def image(seed: int, width: int = 20, height: int = 14) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def linear(path: Path, *, side: int = 5, count: int = 2, **metadata: str) -> Path:
    drawn = np.random.default_rng(0)
    weight = drawn.normal(size=(count, 3 * side * side)).astype(np.float32)
    said = {"weightops_embedder": "linear", "size": str(side)} | metadata
    save_file({"weight": weight, "bias": np.arange(count, dtype=np.float32)}, path, said)
    return path


# ------------------------------------------------------------------------------------------------ pictures


def test_a_picture_is_cut_about_its_middle_and_scaled() -> None:
    wide = Image.new("RGB", (30, 10), (0, 0, 255))
    wide.paste((255, 0, 0), (10, 0, 20, 10))
    found = pixels([squared(wide, 4)], 4)
    assert found.shape == (1, 3, 4, 4)
    assert found[0, :, 1, 1] == pytest.approx([1, -1, -1], abs=1e-6)
    assert np.asarray(squared(image(0, 8, 8), 8)).tolist() == np.asarray(image(0, 8, 8)).tolist()


def test_similarity_is_the_cosine() -> None:
    a, b = np.array([[1.0, 0], [3, 4], [0, 0]]), np.array([[2.0, 0], [-4, 3], [1, 1]])
    assert condition_similarity(a, b) == pytest.approx([1, 0, 0], abs=1e-15)
    assert condition_similarity(a, np.array([1.0, 0])) == pytest.approx([1, 0.6, 0], abs=1e-15)


# ------------------------------------------------------------------------------------------------ a linear map


def test_a_linear_map_is_weight_times_pixels_and_bias(tmp_path: Path) -> None:
    found = embedder_of(str(linear(tmp_path / "map.safetensors", names='["hue", "size"]')))
    images = [image(n) for n in range(20)]
    flat = pixels(images, 5).reshape(20, -1).astype(np.float64)
    weight = np.random.default_rng(0).normal(size=(2, 75)).astype(np.float32)
    assert found.embed(images) == pytest.approx(flat @ weight.T + [0, 1], abs=1e-5)
    assert found.embed(images).dtype == np.float32
    assert found.mean(images[:3]) == pytest.approx(found.embed(images[:3]).astype(np.float64).mean(0), abs=1e-12)
    assert (found.size, found.names, found.unit) == (2, ("hue", "size"), False)
    assert found.embed([]).shape == (0, 2)


def test_names_are_numbers_where_a_map_gives_none(tmp_path: Path) -> None:
    assert embedder_of(str(linear(tmp_path / "map.safetensors"))).names == ("c1", "c2")


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    first = linear(tmp_path / "first.safetensors")
    (tmp_path / "second.safetensors").write_bytes(first.read_bytes())
    digests = [embedder_of(str(tmp_path / f"{name}.safetensors")).digest for name in ("first", "second")]
    assert digests[0] == digests[1] != embedder_of(str(linear(tmp_path / "third.safetensors", side=4))).digest


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"weightops_embedder": "cubic"}, "is no linear map of images: its metadata has no weightops_embedder"),
        ({"size": "four"}, "says size 'four' and names None, expected pixels of a side and a JSON list of names"),
        ({"size": "4"}, "its weight is [2, 75] and its bias [2], expected [c, 48] and [c] for 4 × 4 pixels"),
        ({"names": '["one"]'}, "names 1 numbers, and makes 2"),
        ({"names": "red"}, "says size '5' and names 'red', expected pixels of a side and a JSON list of names"),
    ],
)
def test_a_map_that_contradicts_itself_is_refused(metadata: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as refused:
        embedder_of(str(linear(tmp_path / "map.safetensors", **metadata)))
    assert refused.value.what == said


def test_a_map_with_nan_or_without_a_tensor_is_refused(tmp_path: Path) -> None:
    said = {"weightops_embedder": "linear", "size": "1"}
    bad = {"weight": np.full((1, 3), np.nan, np.float32), "bias": np.zeros(1, np.float32)}
    save_file(bad, tmp_path / "a.safetensors", said)
    with pytest.raises(ValueRefused, match="holds NaN or Inf"):
        embedder_of(str(tmp_path / "a.safetensors"))
    save_file({"weight": np.zeros((1, 3), np.float32)}, tmp_path / "b.safetensors", said)
    with pytest.raises(FormatError, match="has no tensor bias in float32"):
        embedder_of(str(tmp_path / "b.safetensors"))


def test_what_is_no_embedder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        embedder_of(str(tmp_path / "none.onnx"))
    (tmp_path / "a.txt").write_text("no")
    with pytest.raises(UsageError, match="is no embedder that is known by its name"):
        embedder_of(str(tmp_path / "a.txt"))
    with pytest.raises(FormatError, match=r"holds no config\.json of a model"):
        embedder_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(MismatchError, match="holds a model of the type 'bert', expected CLIP"):
        embedder_of(str(tmp_path))


# ------------------------------------------------------------------------------------------------ ONNX


class Session:
    """onnxruntime's, as far as it is used: the mean of each colour, times three and shifted."""

    shape: tuple[Any, ...] = ("n", 3, 6, 6)
    type = "tensor(float)"
    seen: list[tuple[int, ...]] = []  # noqa: RUF012 - of the class

    def __init__(self, path: str, _settings: object, providers: list[str]) -> None:
        if Path(path).read_bytes() == b"broken":
            raise RuntimeError("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF")
        assert providers == ["CPUExecutionProvider"]

    def get_inputs(self) -> list[Any]:
        return [types.SimpleNamespace(name="input.1", shape=list(self.shape), type=self.type)]

    def run(self, outputs: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert outputs is None
        (images,) = given.values()
        assert images.dtype == np.float32
        self.seen.append(images.shape)
        return [3 * images.mean((2, 3)) + 0.5]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> type[Session]:
    """onnxruntime, where it is not installed."""
    import importlib.machinery

    made: Any = types.ModuleType("onnxruntime")
    made.__spec__ = importlib.machinery.ModuleSpec("onnxruntime", None)
    made.SessionOptions = types.SimpleNamespace
    made.InferenceSession = type("InferenceSession", (Session,), {"seen": []})
    monkeypatch.setitem(sys.modules, "onnxruntime", made)
    return made.InferenceSession  # type: ignore[no-any-return]


def test_an_onnx_model_gets_squares_and_its_numbers_are_a_direction(tmp_path: Path, runtime: type[Session]) -> None:
    (tmp_path / "face.onnx").write_bytes(b"model")
    found = embedder_of(str(tmp_path / "face.onnx"))
    images = [image(n) for n in range(18)]
    wanted = 3 * pixels(images, 6).mean((2, 3)) + 0.5
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert found.embed(images) == pytest.approx(wanted, abs=1e-6)
    assert np.linalg.norm(found.mean(images)) == pytest.approx(1, abs=1e-12)
    assert (found.size, found.names, found.unit) == (3, ("e1", "e2", "e3"), True)
    assert runtime.seen[1:3] == [(16, 3, 6, 6), (2, 3, 6, 6)]


@pytest.mark.parametrize(("shape", "fed"), [((4, 3, 6, 6), (4, 3, 6, 6)), ((None, 3, "h", "w"), (5, 3, 112, 112))])
def test_a_fixed_batch_is_filled_and_a_size_that_is_not_said_is_that_of_faces(
    shape: tuple[Any, ...], fed: tuple[int, ...], tmp_path: Path, runtime: type[Session],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(runtime, "shape", shape)
    (tmp_path / "face.onnx").write_bytes(b"model")
    found = embedder_of(str(tmp_path / "face.onnx"))
    images = [image(n) for n in range(5)]
    together = found.embed(images)
    assert set(runtime.seen[1:]) == {fed}
    assert together == pytest.approx(np.concatenate([found.embed([one]) for one in images]), abs=1e-7)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((1, 112, 112, 3), "tensor(float)"), ((1, 3, 8, 9), "tensor(float)"), ((1, 3), "tensor(float)"),
     ((1, 3, 8, 8), "tensor(uint8)")],
)  # fmt: skip
def test_an_input_that_is_no_image_is_refused(
    shape: tuple[int, ...], kind: str, tmp_path: Path, runtime: type[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "shape", shape)
    monkeypatch.setattr(runtime, "type", kind)
    (tmp_path / "face.onnx").write_bytes(b"model")
    with pytest.raises(MismatchError, match=r"expected tensor\(float\) \[n, 3, s, s\]: RGB images, channels first"):
        embedder_of(str(tmp_path / "face.onnx"))


def test_a_broken_onnx_file_and_a_missing_package_are_said(
    tmp_path: Path, runtime: type[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "face.onnx").write_bytes(b"broken")
    with pytest.raises(FormatError, match=r"cannot be loaded as an ONNX model: \[ONNXRuntimeError\]"):
        embedder_of(str(tmp_path / "face.onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(UsageError, match="needs onnxruntime, which is not installed") as refused:
        embedder_of(str(tmp_path / "face.onnx"))
    assert refused.value.hint == "pip install 'weightops[synthesis]'"


def test_the_true_runtime_computes_the_model_that_a_file_holds(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    make = onnx.helper
    floats = onnx.TensorProto.FLOAT
    nodes = [
        make.make_node("GlobalAveragePool", ["image"], ["mean"]),
        make.make_node("Flatten", ["mean"], ["flat"]),
        make.make_node("Gemm", ["flat", "weight"], ["embedding"]),
    ]
    weight = np.arange(12, dtype=np.float32).reshape(3, 4) - 5
    graph = make.make_graph(
        nodes, "face", [make.make_tensor_value_info("image", floats, ["n", 3, 6, 6])],
        [make.make_tensor_value_info("embedding", floats, ["n", 4])], [onnx.numpy_helper.from_array(weight, "weight")],
    )  # fmt: skip
    onnx.save(make.make_model(graph, ir_version=8, opset_imports=[make.make_opsetid("", 13)]), tmp_path / "face.onnx")
    found = embedder_of(str(tmp_path / "face.onnx"))
    images = [image(n) for n in range(3)]
    wanted = pixels(images, 6).mean((2, 3)) @ weight
    assert found.embed(images) == pytest.approx(wanted / np.linalg.norm(wanted, axis=1, keepdims=True), abs=1e-5)
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "face.onnx").read_bytes()[:60])
    with pytest.raises(FormatError, match="cannot be loaded as an ONNX model"):
        embedder_of(str(tmp_path / "cut.onnx"))


# ------------------------------------------------------------------------------------------------ CLIP


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP image encoder of random weights."""
    folder = tmp_path_factory.mktemp("clip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers: Any = pytest.importorskip("transformers")
        torch = pytest.importorskip("torch")
        torch.set_num_threads(1)
        config = transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8,
            patch_size=4, projection_dim=6,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
        processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        processor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def test_clip_makes_what_transformers_makes(clip: Path) -> None:
    import torch
    import transformers

    found = embedder_of(str(clip))
    assert (found.size, found.unit, found.kind, found.names[0]) == (6, True, "clip", "e1")
    images = [image(n) for n in range(3)]
    network: Any = transformers.CLIPVisionModelWithProjection.from_pretrained(clip)
    processor: Any = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    given = processor.from_pretrained(clip)(images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted = network(pixel_values=given).image_embeds.numpy()
    wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    assert found.embed(images) == pytest.approx(wanted, abs=1e-5)
    assert condition_similarity(found.embed(images[:1]), found.embed(images[:1])) == pytest.approx([1], abs=1e-6)


def test_a_clip_without_its_projection_is_refused(clip: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((clip / name).read_bytes())
    held = load_file(clip / "model.safetensors")
    save_file({k: v for k, v in held.items() if "visual_projection" not in k}, tmp_path / "model.safetensors")
    with pytest.raises((MismatchError, FormatError), match="lacks 1 tensors of CLIP's image encoder"):
        embedder_of(str(tmp_path))
