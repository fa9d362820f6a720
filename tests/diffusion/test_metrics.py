"""PSNR and SSIM are scikit-image's, CLIP's cosine is transformers', LPIPS is the package's; each refusal in words."""

from __future__ import annotations

import importlib
import math
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from weightops.diffusion import metrics
from weightops.diffusion.metrics import clip_similarity, lpips, psnr, ssim
from weightops.diffusion.tiny import letters
from weightops.errors import FormatError, MismatchError, NetworkError, UsageError, ValueRefused, WeightopsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    Image = NDArray[Any]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    pillow = pytest.importorskip("PIL.Image")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

SIZES = [(11, 11, 3), (11, 40, 3), (12, 17, 1), (33, 64, 4), (65, 48, 3), (97, 101, 2)]
every_size = pytest.mark.parametrize("shape", SIZES, ids=lambda s: "x".join(map(str, s)))


def noise(shape: tuple[int, ...], seed: int = 0, low: int = 0, high: int = 256) -> Image:
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.uint8)


# Of a size, two images: unrelated, alike, at the ends of the range, flat.
CONTENTS: dict[str, Callable[[tuple[int, ...]], tuple[Image, Image]]] = {
    "unrelated": lambda s: (noise(s), noise(s, 1)),
    "one value off": lambda s: (noise(s, high=255), noise(s, high=255) + np.eye(*s[:2], dtype=np.uint8)[:, :, None]),
    "grey against noise": lambda s: (noise(s, low=120, high=130), noise(s, 1)),
    "black and white": lambda s: (noise(s, high=2) * 255, noise(s, 1, high=2) * 255),
    "all black, all white": lambda s: (np.zeros(s, np.uint8), np.full(s, 255, np.uint8)),
    "all white, noise": lambda s: (np.full(s, 255, np.uint8), noise(s)),
    "equal": lambda s: (noise(s), noise(s)),
}
every_content = pytest.mark.parametrize("content", CONTENTS.values(), ids=list(CONTENTS))


def refusal(kind: type[WeightopsError], call: Callable[[], object]) -> str:
    with pytest.raises(WeightopsError) as told:
        call()
    assert type(told.value) is kind
    return str(told.value)


# ------------------------------------------------------------------------------------------------ PSNR, SSIM


@every_content
@every_size
def test_ssim_is_that_of_scikit_image(shape: tuple[int, ...], content: Any) -> None:
    oracle = pytest.importorskip("skimage.metrics").structural_similarity
    words = {"channel_axis": -1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    a, b = content(shape)
    assert ssim(a, b) == pytest.approx(oracle(a, b, data_range=255, **words), rel=0, abs=1e-10)
    a, b = a / 255, b / 255
    assert ssim(a, b) == pytest.approx(oracle(a, b, data_range=1, **words), rel=0, abs=1e-10)


@every_content
@every_size
def test_psnr_is_that_of_scikit_image(shape: tuple[int, ...], content: Any) -> None:
    oracle = pytest.importorskip("skimage.metrics").peak_signal_noise_ratio
    a, b = content(shape)
    if np.array_equal(a, b):
        assert psnr(a, b) == math.inf
        return
    assert psnr(a, b) == pytest.approx(oracle(a, b, data_range=255), rel=0, abs=1e-10)
    assert psnr(a / 255, b / 255) == pytest.approx(oracle(a / 255, b / 255, data_range=1), rel=0, abs=1e-10)


def test_the_numbers_of_known_images_are_known() -> None:
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert psnr(black, white) == 0
    assert psnr(black, black) == math.inf
    assert psnr(black.astype(float), black + 0.1) == pytest.approx(20)
    assert ssim(white, white) == 1
    # Nothing varies: what is left is the constant against the difference of brightness.
    assert ssim(black, white) == pytest.approx(1e-4 / (1 + 1e-4))


def test_the_dtype_in_which_an_image_comes_changes_no_number() -> None:
    a, b = noise((20, 30, 3)), noise((20, 30, 3), 1)
    for measure in (psnr, ssim):
        expected = measure(a, b)
        assert measure(a / 255, b) == pytest.approx(expected, rel=1e-14)
        assert measure((a / 255).astype(np.float32), (b / 255).astype(np.float32)) == pytest.approx(expected, rel=1e-6)
        assert measure(pillow.fromarray(a), b) == expected
        assert measure(b, a) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_what_is_no_pair_of_images_is_refused_in_words(name: str) -> None:
    measure, image = getattr(metrics, name), np.zeros((16, 20, 3))
    start = f"{name}: "
    differ = f"{start}the images differ in size: 20x16 pixels with 3 channels and "
    assert refusal(MismatchError, lambda: measure(image, image[:, :12])) == f"{differ}12x16 pixels with 3 channels"
    assert refusal(MismatchError, lambda: measure(image, image[:, :, :1])) == f"{differ}20x16 pixels with 1 channel"
    shape = refusal(UsageError, lambda: measure(image, image[0]))
    assert shape == f"{start}found an array of shape [20, 3], expected an image [H, W, C]"
    empty = refusal(UsageError, lambda: measure(image[:0], image))
    assert empty == f"{start}found an array of shape [0, 20, 3], expected an image [H, W, C]"
    dtype = refusal(UsageError, lambda: measure(image, image.astype(np.int64)))
    assert dtype == f"{start}found an image of int64, expected uint8, or floats from 0 to 1"
    for bad, shown in ((image - 1, "-1 to -1"), (image + 255, "255 to 255"), (image + np.nan, "nan to nan")):
        text = refusal(ValueRefused, lambda bad=bad: measure(image, bad))  # type: ignore[misc]
        assert text == f"{start}found values from {shown}, expected floats from 0 to 1, or uint8"


@pytest.mark.parametrize("shape", [(10, 64, 3), (64, 10, 3), (1, 1, 3)])
def test_ssim_refuses_an_image_smaller_than_its_window(shape: tuple[int, ...]) -> None:
    image = np.zeros(shape)
    text = refusal(UsageError, lambda: ssim(image, image))
    found = f"ssim: found images of {shape[1]}x{shape[0]} pixels with 3 channels"
    assert text == f"{found}, expected at least 11x11 pixels, the size of its window"
    assert psnr(image, image) == math.inf


# ------------------------------------------------------------------------------------------------ CLIP


def _save_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 514, "max_position_embeddings": 77, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_clip(tmp_path_factory.mktemp("clip") / "model")


TEXTS = ["a red square", "blue", "a very long description of nothing at all " * 5, "", "猫"]


def test_clip_similarity_is_the_cosine_of_the_library_s_embeddings(clip: Path) -> None:
    shapes = [(32, 32, 3), (48, 40, 3), (20, 60, 3), (64, 64, 3), (33, 32, 3)]
    images = [noise(shape, n) for n, shape in enumerate(shapes)]
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor).from_pretrained(clip)
    expected = []
    for image, text in zip(images, TEXTS, strict=True):
        words = tokenizer([text], truncation=True, max_length=77, return_tensors="pt")
        pixels = processor(images=[pillow.fromarray(image)], return_tensors="pt")
        with torch.inference_mode():
            logits = model(**words, **pixels).logits_per_image / model.logit_scale.exp()
        expected.append(float(logits))
    found = clip_similarity(images, TEXTS, model=str(clip), device="cpu")
    assert found == pytest.approx(expected, abs=1e-6)
    assert len({round(cosine, 5) for cosine in found}) == len(found)
    # Floats and PIL images are the same images, and a batch changes no number.
    again = [images[0] / 255, *map(pillow.fromarray, images[1:])]
    assert clip_similarity(again, TEXTS, model=str(clip), device="cpu") == pytest.approx(found, abs=1e-6)
    many = clip_similarity(images * 7, TEXTS * 7, model=str(clip), device="cpu")
    assert many == pytest.approx(found * 7, abs=1e-6)
    assert clip_similarity([], [], model=str(clip), device="cpu") == ()


def test_what_clip_cannot_see_or_read_is_refused(clip: Path) -> None:
    def found(kind: type[WeightopsError], images: list[Image], texts: list[str]) -> str:
        return refusal(kind, lambda: clip_similarity(images, texts, model=str(clip), device="cpu"))

    image = noise((32, 32, 3))
    text = found(MismatchError, [image], ["a", "b"])
    assert text == "clip: the numbers of images and of texts differ: 1 and 2"
    text = found(UsageError, [image[:, :, :1]], ["a"])
    assert text == "clip: found an image of 32x32 pixels with 1 channel, expected 3 channels: red, green, blue"
    assert found(ValueRefused, [image.astype(float)], ["a"]).startswith("clip: found values from 0 to 255")


def test_a_model_that_is_no_clip_is_refused_in_one_line(clip: Path, tmp_path: Path) -> None:
    def found(kind: type[WeightopsError], model: object) -> str:
        text = refusal(kind, lambda: clip_similarity([noise((32, 32, 3))], ["a"], model=str(model), device="cpu"))
        assert "\n" not in text
        return text

    assert found(UsageError, tmp_path / "none") == f"{tmp_path / 'none'}: is no folder, and no name on the hub"
    assert found(UsageError, clip / "config.json").endswith("is no folder, and no name on the hub")
    assert found(UsageError, "hf://a/b/c") == "hf://a/b/c: expected hf://owner/name[@revision], without a path"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert found(FormatError, empty).startswith(f"{empty}: cannot be loaded as a CLIP model: ")
    text_alone = tmp_path / "bert"
    transformers.BertConfig().save_pretrained(text_alone)
    assert found(MismatchError, text_alone) == f"{text_alone}: found a model of the type 'bert', expected a CLIP model"


def test_a_clip_that_is_not_whole_is_refused(clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def found(kind: type[WeightopsError]) -> str:
        return refusal(kind, lambda: clip_similarity([noise((32, 32, 3))], ["a"], model=str(broken), device="cpu"))

    broken = _save_clip(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert found(MismatchError) == f"{broken}: lacks 1 of the tensors of a CLIP model: 'visual_projection.weight'"
    (broken / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes()[:5000])
    assert found(FormatError).startswith(f"{broken}: cannot be loaded as a CLIP model: ")


def test_a_hub_without_an_answer_is_a_network_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fails(name: str, **given: object) -> None:
        asked.append((name, given))
        raise OSError("We couldn't connect\n to the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fails)
    for model, given in (("owner/clip", {}), ("hf://owner/clip@main", {"revision": "main"})):
        text = refusal(NetworkError, lambda m=model: clip_similarity([], [], model=m, device="cpu"))  # type: ignore[misc]
        assert text == f"{model}: cannot be loaded as a CLIP model: We couldn't connect to the hub"
        assert asked.pop() == ("owner/clip", given)


# ------------------------------------------------------------------------------------------------ LPIPS


class Perceptual(torch.nn.Module):
    """In the place of the package's class: keeps what it is given, and answers with a mean."""

    made: list[Perceptual] = []  # noqa: RUF012

    def __init__(self, *, net: str, verbose: bool) -> None:
        super().__init__()
        self.net, self.verbose, self.given = net, verbose, ()
        self.scale = torch.nn.Parameter(torch.ones(()))
        Perceptual.made.append(self)

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        self.given = given
        return self.scale * (given[0] - given[1]).abs().mean().reshape(1, 1, 1, 1)


@pytest.fixture(autouse=True)
def _no_network_is_kept() -> Iterator[None]:
    metrics._perceptual.cache_clear()
    Perceptual.made.clear()
    yield
    metrics._perceptual.cache_clear()


@pytest.fixture
def _package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("lpips")
    module.LPIPS = Perceptual  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)


@pytest.mark.usefixtures("_package")
def test_lpips_is_asked_of_its_package_with_tensors_from_minus_one_to_one() -> None:
    a, b = noise((31, 40, 3)), noise((31, 40, 3), 1)
    a[0, 0], a[30, 39] = (0, 128, 255), (255, 0, 0)
    assert lpips(a, b) == pytest.approx(np.abs(a / 255 - b / 255).mean() * 2, rel=1e-5)
    network = Perceptual.made[0]
    assert (network.net, network.verbose, network.training) == ("alex", False, False)
    for given, image in zip(network.given, (a, b), strict=True):
        assert given.shape == (1, 3, 31, 40)
        assert given.dtype == torch.float32
        assert torch.equal(given, torch.from_numpy(image / 127.5 - 1).float().permute(2, 0, 1)[None])
    assert network.given[0].min() == -1
    assert network.given[0].max() == 1
    assert lpips(a / 255, a / 255) == 0
    assert len(Perceptual.made) == 1, "the network is made once"
    lpips(a, b, network="vgg")
    assert [made.net for made in Perceptual.made] == ["alex", "vgg"]


@pytest.mark.usefixtures("_package")
def test_lpips_refuses_what_it_cannot_see() -> None:
    image = noise((40, 30, 3))
    expected = "expected 3 channels and at least"
    assert refusal(UsageError, lambda: lpips(image, image)) == (
        f"lpips: found images of 30x40 pixels with 3 channels, {expected} 31x31 pixels for alex"
    )
    assert lpips(image, image, network="squeeze") == 0
    grey = np.zeros((40, 40, 1))
    assert refusal(UsageError, lambda: lpips(grey, grey, network="vgg")) == (
        f"lpips: found images of 40x40 pixels with 1 channel, {expected} 16x16 pixels for vgg"
    )
    text = refusal(UsageError, lambda: lpips(image, image, network="resnet"))
    assert text == "lpips: found the network 'resnet', expected alex, vgg, squeeze"
    assert refusal(MismatchError, lambda: lpips(image, image[1:])).startswith("lpips: the images differ in size")


@pytest.mark.parametrize("missing", ["lpips", "torchvision"])
def test_lpips_says_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name == "lpips":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    image = noise((40, 40, 3))
    with pytest.raises(UsageError) as told:
        lpips(image, image)
    assert str(told.value) == f"lpips: needs {missing}, which is not installed"
    assert told.value.hint == f"pip install {missing}"


@pytest.mark.usefixtures("_package")
def test_lpips_without_its_weights_is_a_network_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(sys.modules["lpips"], "LPIPS", fails)
    image = noise((40, 40, 3))
    assert refusal(NetworkError, lambda: lpips(image, image)) == (
        "lpips: the weights of its network alex cannot be fetched: <urlopen error [Errno -2] Name or service not known>"
    )


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision.*")
def test_lpips_is_what_the_package_says_of_images_from_zero_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("lpips", reason="the package lpips is not installed")
    torch.manual_seed(0)
    network = package.LPIPS(net="alex", verbose=False, pnet_rand=True)  # random: no weights are fetched
    monkeypatch.setattr(package, "LPIPS", lambda **_: network)
    a, b = noise((40, 40, 3)), noise((40, 40, 3), 1)
    given = [torch.from_numpy(image / 255).float().permute(2, 0, 1)[None] for image in (a, b)]
    assert lpips(a, b) == pytest.approx(float(network(*given, normalize=True).detach()), rel=1e-4)
    assert lpips(a, a) == 0
