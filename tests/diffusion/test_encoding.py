"""Networks are fed what diffusers' own pipelines feed them; what is made once and kept is what would be made anew."""

from __future__ import annotations

import inspect
import itertools
import logging.handlers
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from weightops.diffusion.dataset import Framing, framed, read_examples
from weightops.diffusion.encoding import ENCODINGS, check_framing, encode, encoding_of
from weightops.diffusion.models import load
from weightops.diffusion.sprites import sprites
from weightops.diffusion.tiny import tiny_model
from weightops.errors import FormatError, UsageError, ValueRefused, WeightopsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from weightops.diffusion.models import Loaded

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    Image = pytest.importorskip("PIL.Image")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

CAPTIONS = ["a small red ball on sky", "a big cup, blue"]
GUIDANCE = 2.5
EVERY = pytest.mark.parametrize("name", ENCODINGS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    """The tiny model of an architecture, loaded once; who changes it puts it back."""
    root = tmp_path_factory.mktemp("tiny")
    found: dict[str, Loaded] = {}

    def made(name: str) -> Loaded:
        if name not in found:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tiny_model(name, root / name)
                found[name] = load(root / name, where="test", device="cpu")
        return found[name]

    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sprites(tmp_path_factory.mktemp("data") / "sprites", count=3, size=64)


@pytest.fixture
def data(folder: Path, tmp_path: Path) -> Path:
    """The pictures in a folder of one's own."""
    made = tmp_path / "data"
    made.mkdir()
    for path in folder.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    return made


def recorded(module: Any, run: Callable[[], object]) -> tuple[list[dict[str, Any]], list[Any]]:
    """What a network was called with, by the names of its own parameters, and what it answered."""
    calls: list[dict[str, Any]] = []
    answers: list[Any] = []
    signature = inspect.signature(module.forward)

    def before(_: Any, args: Any, words: Any) -> None:
        bound = signature.bind(*args, **words)
        calls.append({**bound.arguments})

    def after(_: Any, __: Any, answer: Any) -> None:
        answers.append(answer[0] if isinstance(answer, tuple) else answer)

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls, answers


def same(name: str, one: Any, other: Any) -> None:
    """Tensors are equal; a number for all is that number for each; what is not given is nothing."""
    if isinstance(one, dict) or isinstance(other, dict):
        one, other = one or {}, other or {}
        for key in {*one, *other}:
            same(f"{name}.{key}", one.get(key), other.get(key))
    elif isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        assert one is not None, name
        assert other is not None, name
        if one.ndim < other.ndim:
            one = one.expand(other.shape)
        assert one.shape == other.shape, name
        assert torch.equal(one.to(torch.float64), other.to(torch.float64)), name
    else:
        assert one == other, name


def sampled(pipe: Any, **words: Any) -> None:
    """Two steps of the pipeline itself, without guidance by a second call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe(
            CAPTIONS, height=64, width=32, num_inference_steps=2, output_type="latent",
            generator=torch.Generator().manual_seed(3), **words,
        )  # fmt: skip


def check_as_the_pipeline(loaded: Loaded) -> None:
    """Predict on what the pipeline's network was given, and compare everything."""
    pipe, encoding = loaded.pipe, encoding_of(loaded, where="test")
    network = getattr(pipe, encoding.denoiser)
    told: dict[str, Any] = {"guidance_scale": GUIDANCE if loaded.architecture == "flux" else 1.0}
    if loaded.architecture == "sdxl":
        told |= {"original_size": (100, 81), "crops_coords_top_left": (3, 5), "target_size": (64, 32)}
    theirs, answers = recorded(network, lambda: sampled(pipe, **told))
    assert len(theirs) >= 2
    sizes = torch.tensor([[100.0, 81, 3, 5, 64, 32]] * 2)
    for given, answer in zip(theirs, answers, strict=True):
        noisy = given["sample"] if "sample" in given else given["hidden_states"]
        times = (given["timestep"] * torch.ones(2)).float()
        if loaded.architecture == "flux":
            noisy, times = pipe._unpack_latents(noisy, 64, 32, pipe.vae_scale_factor), times * 1000
            answer = pipe._unpack_latents(answer, 64, 32, pipe.vae_scale_factor)
        made: list[Any] = []

        def ours(noisy: Any = noisy, times: Any = times, made: list[Any] = made) -> None:
            with torch.no_grad():
                texts = encoding.texts(pipe, CAPTIONS)
                made.append(encoding.predict(pipe, noisy, times, texts, sizes, guidance=GUIDANCE))

        (call,), _ = recorded(network, ours)
        for word in {*given, *call} - {"timestep_cond", "cross_attention_kwargs", "joint_attention_kwargs"}:
            if word == "timestep" and loaded.architecture == "flux":
                # Through 1000 and back.
                torch.testing.assert_close(call[word], given[word], atol=1e-7, rtol=0)
            else:
                same(word, given.get(word), call.get(word))
        assert made[0].shape == noisy.shape == (2, pipe.vae.config.latent_channels, 8, 4)
        torch.testing.assert_close(made[0], answer, atol=1e-5 if loaded.architecture == "flux" else 0, rtol=0)


# ------------------------------------------------------------------------------------------------ as the pipelines


@EVERY
def test_a_network_is_given_what_the_pipeline_gives_it(models: Callable[[str], Loaded], name: str) -> None:
    check_as_the_pipeline(models(name))


def test_sd3_without_its_t5_is_given_what_the_pipeline_gives_it(models: Callable[[str], Loaded]) -> None:
    loaded = models("sd3")
    encoder = loaded.pipe.text_encoder_3
    loaded.pipe.text_encoder_3 = None
    try:
        check_as_the_pipeline(loaded)
    finally:
        loaded.pipe.text_encoder_3 = encoder


def test_flux_without_guidance_is_told_none(models: Callable[[str], Loaded], tmp_path: Path) -> None:
    loaded = models("flux")
    guided = loaded.pipe.transformer
    config = {**guided.config, "guidance_embeds": False}
    loaded.pipe.transformer = type(guided).from_config(config).eval()
    try:
        check_as_the_pipeline(loaded)
    finally:
        loaded.pipe.transformer = guided


@EVERY
def test_latents_are_on_the_scale_on_which_the_pipeline_decodes(models: Callable[[str], Loaded], name: str) -> None:
    loaded = models(name)
    pipe, encoding = loaded.pipe, ENCODINGS[name]
    pixels = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, deviation = encoding.latents(pipe, pixels)
    with torch.no_grad():
        found = pipe.vae.encode(pixels).latent_dist
    config = pipe.vae.config
    # What the pipelines do before they decode.
    torch.testing.assert_close(mean / config.scaling_factor + (config.shift_factor or 0), found.mean)
    torch.testing.assert_close(deviation / config.scaling_factor, found.std)
    assert mean.shape == (2, config.latent_channels, 8, 4)


def test_a_vae_that_names_its_own_mean_and_deviation_is_followed(models: Callable[[str], Loaded]) -> None:
    pipe, encoding = models("sdxl").pipe, ENCODINGS["sdxl"]
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = pipe.vae.encode(pixels).latent_dist
    means, deviations = [-1.6, 1.1, 2.0, 0.3], [8.4, 5.9, 7.8, 4.2]
    before = pipe.vae.config
    pipe.vae.register_to_config(latents_mean=means, latents_std=deviations)
    try:
        mean, deviation = encoding.latents(pipe, pixels)
    finally:
        pipe.vae._internal_dict = before
    wide = torch.tensor(deviations).view(1, 4, 1, 1) / 0.13025
    torch.testing.assert_close(mean * wide + torch.tensor(means).view(1, 4, 1, 1), raw.mean)
    torch.testing.assert_close(deviation * wide, raw.std)


def test_a_half_vae_encodes_in_float32_and_stays_half(models: Callable[[str], Loaded]) -> None:
    vae = models("sd15").pipe.vae
    half = type(vae).from_config(vae.config).to(torch.float16).eval()
    half.load_state_dict(vae.state_dict())
    wide = type(vae).from_config(vae.config).eval()
    wide.load_state_dict(half.state_dict())
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    said = logging.handlers.BufferingHandler(100)
    logging.getLogger("diffusers").addHandler(said)
    try:
        mean, _ = ENCODINGS["sd15"].latents(SimpleNamespace(vae=half), pixels)
    finally:
        logging.getLogger("diffusers").removeHandler(said)
    assert said.buffer == []
    expected, _ = ENCODINGS["sd15"].latents(SimpleNamespace(vae=wide), pixels)
    assert mean.dtype == torch.float32
    assert torch.equal(mean, expected)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


# ------------------------------------------------------------------------------------------------ kept


def direct(loaded: Loaded, example: Any, framing: Framing, *, flipped: bool, crop: tuple[float, float]) -> Any:
    pixels, original, place = framed(example.picture, framing, flipped=flipped, crop=crop)
    mean, deviation = ENCODINGS[loaded.architecture].latents(loaded.pipe, pixels[None])
    return mean[0], deviation[0], torch.tensor([*original, *place, *framing.resolution]).float()


@EVERY
@pytest.mark.parametrize("cached", [False, True], ids=["held", "cached"])
def test_what_is_kept_is_what_is_computed_directly_mirrored_or_not(
    models: Callable[[str], Loaded], folder: Path, tmp_path: Path, name: str, cached: bool
) -> None:
    loaded = models(name)
    examples = read_examples(folder, where="test").examples
    framing = Framing((32, 48), center_crop=True, flip=True)
    encoded = encode(loaded, examples, framing, batch=2, cache=tmp_path / "cache" if cached else None)
    assert encoded.shape == (loaded.pipe.vae.config.latent_channels, 4, 6)
    assert (len(encoded), encoded.variants, encoded.warnings) == (3, 2, ())
    indices, flips = [2, 0, 2], [True, False, False]
    got = encoded.batch(indices, torch.tensor(flips))
    for row, (index, flipped) in enumerate(zip(indices, flips, strict=True)):
        mean, deviation, sizes = direct(loaded, examples[index], framing, flipped=flipped, crop=(0.5, 0.5))
        torch.testing.assert_close(got["mean"][row], mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got["std"][row], deviation, atol=1e-6, rtol=1e-4)
        assert torch.equal(got["sizes"][row], sizes)
        with torch.no_grad():
            texts = ENCODINGS[name].texts(loaded.pipe, [examples[index].caption])
        assert {"mean", "std", "sizes", *texts} == set(got)
        for word, tensor in texts.items():
            torch.testing.assert_close(got[word][row], tensor[0], atol=1e-5, rtol=1e-5)
    assert not torch.equal(got["mean"][0], got["mean"][2])
    assert got["mean"].dtype == torch.float32


def test_without_mirrored_variants_a_flip_changes_nothing(models: Callable[[str], Loaded], folder: Path) -> None:
    encoded = encode(models("sd15"), read_examples(folder, where="test").examples, Framing((32, 32), True))
    flipped, plain = encoded.batch([1], [True]), encoded.batch([1], [False])
    assert all(torch.equal(flipped[key], plain[key]) for key in plain)


class Counted:
    """How many pictures and captions the networks were given."""

    def __init__(self, loaded: Loaded) -> None:
        self.pipe = loaded.pipe
        self.pictures = self.captions = 0

    def __enter__(self) -> Counted:
        def picture(_: Any, args: Any) -> None:
            self.pictures += len(args[0])

        def caption(_: Any, args: Any) -> None:
            self.captions += len(args[0])

        self.hooks = [
            self.pipe.vae.encoder.register_forward_pre_hook(picture),
            self.pipe.text_encoder.register_forward_pre_hook(caption),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    @property
    def found(self) -> tuple[int, int]:
        return self.pictures, self.captions


@pytest.fixture
def cached(models: Callable[[str], Loaded], data: Path, tmp_path: Path) -> Callable[..., tuple[tuple[int, int], Any]]:
    """Encodes the folder with a cache: how much was made anew, and what a batch of everything is."""

    def run(framing: Framing | None = None, *, loaded: Loaded | None = None, **words: Any) -> Any:
        loaded = loaded or models("sd15")
        with Counted(loaded) as counted:
            framing = framing or Framing((32, 32), center_crop=True, flip=True)
            examples = read_examples(data, where="test").examples
            encoded = encode(loaded, examples, framing, batch=2, cache=tmp_path / "cache", **words)
            everything = encoded.batch([0, 1, 2, 0, 1, 2], [False] * 3 + [True] * 3)
        return counted.found, everything

    return run


def equal(one: Any, other: Any) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_a_second_run_makes_nothing_anew_and_gives_the_same_bits(cached: Any) -> None:
    made, first = cached()
    assert made == (6, 3)
    again, second = cached()
    assert again == (0, 0)
    assert equal(first, second)


def test_what_was_held_and_what_was_written_are_the_same_bits(
    cached: Any, models: Callable[[str], Loaded], data: Path
) -> None:
    _, written = cached()
    framing = Framing((32, 32), center_crop=True, flip=True)
    held = encode(models("sd15"), read_examples(data, where="test").examples, framing, batch=2)
    assert equal(written, held.batch([0, 1, 2, 0, 1, 2], [False] * 3 + [True] * 3))


def test_a_changed_caption_is_made_anew_and_nothing_else(cached: Any, data: Path) -> None:
    _, first = cached()
    table = data / "metadata.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:-1], "sprite-002.png,something else"]) + "\n")
    made, second = cached()
    assert made == (0, 1)
    assert equal({"mean": first["mean"]}, {"mean": second["mean"]})
    assert torch.equal(first["prompt_embeds"][:2], second["prompt_embeds"][:2])
    assert not torch.equal(first["prompt_embeds"][2], second["prompt_embeds"][2])


def test_a_changed_picture_is_made_anew_in_each_variant_and_nothing_else(cached: Any, data: Path) -> None:
    _, first = cached()
    Image.open(data / "sprite-001.png").rotate(90).save(data / "sprite-001.png")
    made, second = cached()
    assert made == (2, 0)
    changed = [not torch.equal(a, b) for a, b in zip(first["mean"], second["mean"], strict=True)]
    assert changed == [False, True, False, False, True, False]


def test_other_framings_and_weights_are_other_files(cached: Any, models: Callable[[str], Loaded]) -> None:
    cached()
    assert cached(Framing((40, 32), True, True))[0] == (6, 0)
    # Of square pictures a square crop is the whole, wherever it is drawn; but it might be another.
    assert cached(Framing((40, 32), False, True), seed=1)[0] == (6, 0)
    assert cached(Framing((40, 32), False, True), seed=2)[0] == (6, 0)
    assert cached(Framing((40, 32), False, True), seed=1)[0] == (0, 0)
    assert cached(Framing((40, 32), True, True), seed=3)[0] == (0, 0)
    pipe = models("sd15").pipe
    for part, expected in (("vae", (6, 0)), ("text_encoder", (0, 3))):
        weight = next(iter(getattr(pipe, part).parameters()))
        before = weight.data.clone()
        weight.data.view(-1)[0] += 1
        try:
            assert cached()[0] == expected
        finally:
            weight.data.copy_(before)
    before = pipe.vae.config
    pipe.vae.register_to_config(scaling_factor=0.5)
    try:
        assert cached()[0] == (6, 0)
    finally:
        pipe.vae._internal_dict = before
    assert cached()[0] == (0, 0)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "text", "gone"])
def test_a_damaged_file_is_made_anew(cached: Any, tmp_path: Path, damage: str) -> None:
    _, first = cached()
    for kind in ("latents", "texts"):
        path = sorted((tmp_path / "cache").glob(f"{kind}-*"))[0]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes({"flipped": bytes(data), "cut": data[:-5], "empty": b"", "text": b"{}"}[damage])
    made, second = cached()
    assert made == (1, 1)
    for key in first:
        torch.testing.assert_close(first[key], second[key], atol=1e-5, rtol=1e-5)
    assert cached()[0] == (0, 0)


def test_a_file_that_is_damaged_while_it_is_in_use_is_refused(
    models: Callable[[str], Loaded], data: Path, tmp_path: Path
) -> None:
    examples = read_examples(data, where="test").examples
    encoded = encode(models("sd15"), examples, Framing((32, 32), True), cache=tmp_path / "cache")
    for path in (tmp_path / "cache").glob("latents-*"):
        found = bytearray(path.read_bytes())
        found[-3] ^= 16
        path.write_bytes(found)
    with pytest.raises(FormatError, match="holds other bytes than were written"):
        encoded.batch([0], [False])


def test_a_cache_that_cannot_be_made_is_refused_in_one_sentence(
    models: Callable[[str], Loaded], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(WeightopsError, match=r"^\S+/cache: the cache cannot be made: "):
        encode(
            models("sd15"), read_examples(data, where="test").examples, Framing((32, 32)), cache=tmp_path / "cache"
        )  # fmt: skip


def test_a_caption_that_many_pictures_share_is_read_once(models: Callable[[str], Loaded], folder: Path) -> None:
    loaded = models("sd15")
    with Counted(loaded) as counted:
        examples = read_examples(folder, where="test", prompt="a photo of sks").examples
        encoded = encode(loaded, examples, Framing((32, 32), True))
    assert counted.found == (3, 1)
    got = encoded.batch([0, 2], [False, False])["prompt_embeds"]
    assert torch.equal(got[0], got[1])


def test_crops_are_drawn_by_the_seed_and_the_picture_once_for_both_variants(
    models: Callable[[str], Loaded], data: Path
) -> None:
    examples = read_examples(data, where="test").examples

    def crops(seed: int, examples: Any = examples) -> Any:
        encoded = encode(models("sd15"), examples, Framing((64, 24), flip=True), seed=seed, cache_texts=False)
        count = len(examples)
        return [encoded.batch(range(count), [flip] * count)["sizes"][:, 3] for flip in (False, True)]

    plain, mirrored = crops(1)
    assert len(set(plain.tolist())) > 1
    assert torch.equal(plain + mirrored, torch.full((3,), 40.0))
    assert torch.equal(crops(1)[0], plain)
    assert torch.equal(crops(1, examples[1:])[0], plain[1:])
    assert not torch.equal(crops(2)[0], plain)


def test_texts_that_are_not_kept_carry_gradients_where_the_encoder_trains(
    models: Callable[[str], Loaded], folder: Path
) -> None:
    loaded = models("sdxl")
    examples = read_examples(folder, where="test").examples
    kept = encode(loaded, examples, Framing((32, 32), True)).batch([0, 1], [False] * 2)
    encoded = encode(loaded, examples, Framing((32, 32), True), cache_texts=False)
    assert not any(tensor.requires_grad for tensor in encoded.batch([0, 1], [False] * 2).values())
    weight = next(iter(loaded.pipe.text_encoder_2.parameters()))
    weight.requires_grad_(True)
    try:
        fresh = encoded.batch([0, 1], [False] * 2)
    finally:
        weight.requires_grad_(False)
    assert fresh["prompt_embeds"].requires_grad
    assert fresh["pooled_prompt_embeds"].requires_grad
    assert not fresh["mean"].requires_grad
    for key in kept:
        torch.testing.assert_close(fresh[key].detach(), kept[key], atol=1e-5, rtol=1e-5)


def test_progress_counts_up_to_all_there_is(cached: Any) -> None:
    seen: list[tuple[int, int]] = []
    cached(on_progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 9)
    assert seen[-1] == (9, 9)
    assert all(a[0] < b[0] for a, b in itertools.pairwise(seen))
    seen.clear()
    cached(on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(9, 9)]


# ------------------------------------------------------------------------------------------------ said and refused


def test_small_pictures_and_long_captions_are_warned_of(models: Callable[[str], Loaded], data: Path) -> None:
    (data / "metadata.csv").unlink()
    for number, words in enumerate(("a" * 75, "a" * 76, "b" * 600)):  # 77 tokens with those of begin and end
        (data / f"sprite-00{number}.txt").write_text(words)
    examples = read_examples(data, where="test").examples
    told = encode(models("sd15"), examples, Framing((64, 64))).warnings
    assert told == (
        "2 captions are longer than the 77 tokens that are read, and cut there: 'sprite-001.png', 'sprite-002.png'",
    )
    # T5 reads more than CLIP.
    told = encode(models("sd3"), examples, Framing((64, 80)), cache_texts=False).warnings
    assert told == (
        "3 of 3 pictures are smaller than 80 × 64 pixels, and scaled up: "
        "'sprite-000.png', 'sprite-001.png', 'sprite-002.png'",
        "1 caption is longer than the 256 tokens that are read, and cut there: 'sprite-002.png'",
    )


@pytest.fixture
def broken(models: Callable[[str], Loaded]) -> Iterator[Callable[[str, str], None]]:
    """Puts NaN into a part of a model."""
    undo = []

    def put(name: str, part: str) -> None:
        weight = next(iter(getattr(models(name).pipe, part).parameters()))
        undo.append((weight, weight.data.clone()))
        weight.data.fill_(float("nan"))

    yield put
    for weight, before in undo:
        weight.data.copy_(before)


def test_what_is_not_finite_is_refused_by_name(models: Callable[[str], Loaded], folder: Path, broken: Any) -> None:
    loaded = models("sd15")
    examples = read_examples(folder, where="test").examples
    broken("sd15", "text_encoder")
    with pytest.raises(ValueRefused, match="its text encoder makes NaN or Inf of 'a ") as told:
        encode(loaded, examples, Framing((32, 32)))
    assert told.value.hint == "run it with --dtype fp32"
    broken("sd15", "vae")
    with pytest.raises(ValueRefused, match=r"its VAE makes NaN or Inf of 'sprite-000\.png'"):
        encode(loaded, examples, Framing((32, 32)))


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as told:
        call()
    return f"{told.value} | {told.value.hint}"


def test_other_architectures_are_refused_by_name(models: Callable[[str], Loaded]) -> None:
    known = "expected one of sd15, sd2, sdxl, sd3, flux | None"
    loaded = replace(models("sd15"), architecture="wan")
    assert refused(lambda: encoding_of(loaded, where="m")) == f"m: its architecture is wan, {known}"
    loaded = replace(models("sd15"), architecture="")
    assert refused(lambda: encoding_of(loaded, where="m")) == f"m: its architecture is not known, {known}"


def test_a_network_that_reads_more_than_latents_is_refused(models: Callable[[str], Loaded]) -> None:
    loaded = models("sd15")
    before = loaded.pipe.unet.config
    loaded.pipe.unet.register_to_config(in_channels=9)
    try:
        told = refused(lambda: encoding_of(loaded, where="m"))
    finally:
        loaded.pipe.unet._internal_dict = before
    assert told.startswith("m: its unet reads 9 channels, expected 4 | models for inpainting")


@pytest.mark.parametrize(
    ("name", "resolution", "expected"),
    [
        ("sd15", (64, 60), "found 60 × 64 pixels, expected multiples of 8 for sd15 | nearest to 60: 56 or 64"),
        ("sdxl", (4, 64), "found 64 × 4 pixels, expected multiples of 8 for sdxl | nearest to 4: 8"),
        ("flux", (64, 40), "found 40 × 64 pixels, expected multiples of 16 for flux | nearest to 40: 32 or 48"),
        ("sd3", (72, 64), "found 64 × 72 pixels, expected multiples of 16 for sd3 | nearest to 72: 64 or 80"),
        ("sd2", (0, 64), "found 64 × 0 pixels, expected multiples of 8 for sd2 | nearest to 0: 8"),
        ("sd3", (64, 272), "found 272 × 64 pixels, but {label} has places for 256 × 256 alone | None"),
    ],
)
def test_a_size_that_the_model_does_not_take_is_refused(
    models: Callable[[str], Loaded], name: str, resolution: tuple[int, int], expected: str
) -> None:
    loaded = models(name)
    told = refused(lambda: check_framing(loaded, ENCODINGS[name], Framing(resolution)))
    assert told == "--resolution: " + expected.format(label=loaded.label)
    check_framing(loaded, ENCODINGS[name], Framing((64, 256)))
