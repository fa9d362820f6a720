"""What the network of each architecture is fed: latents, text embeddings and its own arguments; made once and kept.

Draws no noise and knows no loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.diffusion.cache import Store, hash_of_network, hash_of_text
from weightops.diffusion.dataset import enlarged, framed
from weightops.diffusion.extras import hushed
from weightops.diffusion.objectives import crop_place
from weightops.engine.run import Progress, ignore
from weightops.errors import UsageError, ValueRefused, listing, quote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from weightops.diffusion.dataset import Example, Framing
    from weightops.diffusion.models import Loaded
    from weightops.diffusion.pictures import Picture

    Tensors = dict[str, Tensor]

# Of what a cache holds: what was written by another is not looked at.
_FORMAT = 1

# ------------------------------------------------------------------------------------------------ architectures


@dataclass(frozen=True, slots=True)
class _Call:
    """What a network is called with; embeds and pooled are what the text encoders made."""

    network: Any
    noisy: Tensor
    timesteps: Tensor
    embeds: Any
    pooled: Any
    sizes: Tensor
    guidance: float


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a network is called. denoiser, text_encoders: parts of the pipeline, the latter those that can carry a LoRA.

    readers: each part that reads the captions, its tokenizer, and how many tokens it reads (None: what the tokenizer
    says). packed: how many pixels of a latent channel are channels of their own to the network.
    """

    name: str
    denoiser: str
    text_encoders: tuple[str, ...]
    readers: Sequence[tuple[str, str, int | None]]
    packed: int
    _texts: Callable[[Any, list[str]], Tensors]
    _predict: Callable[[_Call], Any]

    def latents(self, pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation, float32, of the latents of pixels [n, 3, height, width], as the network knows them."""
        import torch

        vae, config = pipe.vae, pipe.vae.config
        asked = vae.dtype
        # Some VAEs overflow in float16, and say so; once for each picture, float32 costs little.
        wide = asked != torch.float32 and config.get("force_upcast", True)
        with hushed():
            try:
                if wide:
                    vae.to(torch.float32)
                with torch.no_grad():
                    found = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
                    mean, deviation = found.mean.float(), found.std.float()
            finally:
                if wide:
                    vae.to(asked)
        scale: float | Tensor = config.scaling_factor
        shift: float | Tensor = config.get("shift_factor") or 0.0
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            shift = mean.new_tensor(config.latents_mean).view(1, -1, 1, 1)
            scale = scale / mean.new_tensor(config.latents_std).view(1, -1, 1, 1)
        return (mean - shift) * scale, deviation * scale

    def texts(self, pipe: Any, captions: Sequence[str]) -> Tensors:
        """What the text encoders make of the captions, a row for each: with gradients where a text encoder trains."""
        with hushed():
            return self._texts(pipe, list(captions))

    def predict(
        self,
        pipe: Any,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Mapping[str, Tensor],
        sizes: Tensor,
        *,
        guidance: float = 1.0,
    ) -> Tensor:
        """The denoiser's answer to noisy latents [n, channels, height, width], in its own dtype and that shape.

        conditions: what `texts` gives. sizes [n, 6]: height and width of the picture, top and left of its crop, height
        and width asked for. guidance: told to networks that were distilled with it; 1, for learning, is none.
        """
        network = getattr(pipe, self.denoiser)
        embeds, pooled = (
            conditions[name].to(network.dtype) if name in conditions else None
            for name in ("prompt_embeds", "pooled_prompt_embeds")
        )  # fmt: skip
        call = _Call(network, noisy.to(network.dtype), timesteps, embeds, pooled, sizes, guidance)
        answer: Tensor = self._predict(call)
        return answer


def _texts_sd(pipe: Any, captions: list[str]) -> Tensors:
    embeds, _ = pipe.encode_prompt(captions, pipe.device, 1, False)
    return {"prompt_embeds": embeds}


def _texts_sdxl(pipe: Any, captions: list[str]) -> Tensors:
    embeds, _, pooled, _ = pipe.encode_prompt(captions, device=pipe.device, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _texts_sd3(pipe: Any, captions: list[str]) -> Tensors:
    # Without a T5 the pipeline puts zeros in its place.
    embeds, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, device=pipe.device, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _texts_flux(pipe: Any, captions: list[str]) -> Tensors:
    embeds, pooled, _ = pipe.encode_prompt(captions, None, device=pipe.device)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _predict_sd(call: _Call) -> Any:
    return call.network(call.noisy, call.timesteps, encoder_hidden_states=call.embeds, return_dict=False)[0]


def _predict_sdxl(call: _Call) -> Any:
    # The sizes stay in float32, where those of a large picture are exact.
    added = {"text_embeds": call.pooled, "time_ids": call.sizes}
    return call.network(
        call.noisy, call.timesteps, encoder_hidden_states=call.embeds, added_cond_kwargs=added, return_dict=False
    )[0]


def _predict_sd3(call: _Call) -> Any:
    return call.network(
        hidden_states=call.noisy, timestep=call.timesteps, encoder_hidden_states=call.embeds,
        pooled_projections=call.pooled, return_dict=False,
    )[0]  # fmt: skip


def _predict_flux(call: _Call) -> Any:
    """Squares of 2 × 2 latent pixels are packed into channels, and each is told its row and column."""
    import torch

    noisy, embeds = call.noisy, call.embeds
    count, channels, height, width = noisy.shape
    rows, columns = height // 2, width // 2
    squares = noisy.reshape(count, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
    guidance = torch.full((count,), call.guidance, device=noisy.device) if call.network.config.guidance_embeds else None
    answer = call.network(
        hidden_states=squares.reshape(count, rows * columns, channels * 4), guidance=guidance,
        timestep=call.timesteps.to(noisy.dtype) / 1000, pooled_projections=call.pooled, encoder_hidden_states=embeds,
        txt_ids=embeds.new_zeros(embeds.shape[1], 3), img_ids=places.to(noisy), return_dict=False,
    )[0]  # fmt: skip
    return answer.reshape(count, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)


_CLIP = ("text_encoder", "tokenizer", None)
_CLIP_2 = ("text_encoder_2", "tokenizer_2", None)
_T5_2 = ("text_encoder_2", "tokenizer_2", 512)
_T5_3 = ("text_encoder_3", "tokenizer_3", 256)
_BOTH = ("text_encoder", "text_encoder_2")

# Each is called as diffusers' own pipeline calls it.
ENCODINGS: Mapping[str, Encoding] = {
    "sd15": Encoding("sd15", "unet", ("text_encoder",), (_CLIP,), 1, _texts_sd, _predict_sd),
    "sd2": Encoding("sd2", "unet", ("text_encoder",), (_CLIP,), 1, _texts_sd, _predict_sd),
    "sdxl": Encoding("sdxl", "unet", _BOTH, (_CLIP, _CLIP_2), 1, _texts_sdxl, _predict_sdxl),
    "sd3": Encoding("sd3", "transformer", _BOTH, (_CLIP, _CLIP_2, _T5_3), 1, _texts_sd3, _predict_sd3),
    "flux": Encoding("flux", "transformer", ("text_encoder",), (_CLIP, _T5_2), 4, _texts_flux, _predict_flux),
}


def encoding_of(loaded: Loaded, *, where: str) -> Encoding:
    """How this model is called. Raises UsageError for another architecture, and for a network that reads more."""
    encoding = ENCODINGS.get(loaded.architecture)
    if encoding is None:
        found = f"its architecture is {loaded.architecture}" if loaded.architecture else "its architecture is not known"
        raise UsageError(where, f"{found}, expected one of {', '.join(ENCODINGS)}")
    reads = getattr(loaded.pipe, encoding.denoiser).config.in_channels
    expected = loaded.pipe.vae.config.latent_channels * encoding.packed
    if reads != expected:
        what = f"its {encoding.denoiser} reads {reads} channels, expected {expected}"
        raise UsageError(where, what, "models for inpainting, depth or editing read more than the noise")
    return encoding


def check_framing(loaded: Loaded, encoding: Encoding, framing: Framing) -> None:
    """Refuse a size that the model's parts cannot divide, or cannot place. Raises UsageError."""
    height, width = framing.resolution
    network = getattr(loaded.pipe, encoding.denoiser).config
    patch = network.patch_size if encoding.name == "sd3" else 2 if encoding.packed == 4 else 1
    unit = patch * 2 ** (len(loaded.pipe.vae.config.block_out_channels) - 1)
    size = f"found {width} × {height} pixels"
    for found in (height, width):
        if found < unit or found % unit:
            below = found // unit * unit
            near = f"{below} or {below + unit}" if below else f"{unit}"
            what = f"{size}, expected multiples of {unit} for {encoding.name}"
            raise UsageError("--resolution", what, f"nearest to {found}: {near}")
    if encoding.name == "sd3" and max(height, width) > network.pos_embed_max_size * unit:
        limit = network.pos_embed_max_size * unit
        raise UsageError("--resolution", f"{size}, but {loaded.label} has places for {limit} × {limit} alone")


# ------------------------------------------------------------------------------------------------ made once


class Encoded:
    """The examples of a data set as a network takes them: on the CPU, or in the files of a cache.

    shape: [channels, height, width] of the latents. variants: 2 where the mirrored pictures are there as well.
    """

    def __init__(
        self, loaded: Loaded, encoding: Encoding, examples: Sequence[Example], framing: Framing, store: Store,
        latents: Sequence[Sequence[str]], texts: Mapping[str, str], warnings: Sequence[str],
    ) -> None:  # fmt: skip
        self.examples = tuple(examples)
        self.encoding = encoding
        self.framing = framing
        self.variants = framing.variants
        self.warnings = tuple(warnings)
        self.shape = tuple(store.get(latents[0][0])["mean"].shape)
        self._loaded = loaded
        self._store = store
        self._latents = latents  # of each example, the key of each variant
        self._texts = texts  # of each caption, its key; empty where they are not kept

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int], flips: Sequence[bool] | Tensor) -> Tensors:
        """`mean`, `std` and `sizes` (see Encoding.predict) of these examples, and what `texts` gives, on the device.

        flips: which ones are mirrored, if there are mirrored ones. Texts that were not kept are encoded now, with
        gradients where a text encoder trains. Raises FormatError where the cache was damaged in the meantime.
        """
        variants = [int(flip) % self.variants for flip in flips]
        keys = [self._latents[index][variant] for index, variant in zip(indices, variants, strict=True)]
        captions = [self.examples[index].caption for index in indices]
        found = _stacked([self._store.get(key) for key in keys])
        if self._texts:
            found |= _stacked([self._store.get(self._texts[caption]) for caption in captions])
        found = {name: tensor.to(self._loaded.device) for name, tensor in found.items()}
        return found if self._texts else found | self.encoding.texts(self._loaded.pipe, captions)


@dataclass(frozen=True, slots=True)
class _Cut:
    """One variant of a picture."""

    picture: Picture
    flipped: bool
    place: tuple[float, float]


def encode(
    loaded: Loaded,
    examples: Iterable[Example],
    framing: Framing,
    *,
    batch: int = 4,
    cache: Path | None = None,
    on_progress: Progress = ignore,
    cache_texts: bool = True,
    seed: int = 0,
) -> Encoded:
    """Latents of all pictures in all variants, and embeddings of all captions, `batch` at a time.

    cache: a folder of files by hashes of what they were made from (weights, pictures, framing, tokens), which are read
    instead of being made anew, if they are whole. None: all is held in memory. cache_texts: False where a text encoder
    is to change. seed: of the crops, where they are not the middle: one for each picture, for both its variants.
    on_progress counts variants and captions. Raises UsageError for a size that the model does not take; FormatError
    for a picture that cannot be decoded any more; ValueRefused for NaN or Inf; OutputError.
    """
    examples = tuple(examples)
    encoding = encoding_of(loaded, where=loaded.label)
    check_framing(loaded, encoding, framing)
    tokens = _tokens(loaded.pipe, encoding, [example.caption for example in examples])
    warnings = _enlarged(examples, framing) + _truncated(loaded.pipe, encoding, examples, tokens)
    store = Store(cache)
    names = _Names(loaded, encoding, framing, hashed=cache is not None)
    cuts: dict[str, _Cut] = {}
    latents = []
    for example in examples:
        place = (0.5, 0.5) if framing.center_crop else crop_place(seed, example.picture.digest)
        variants = [_Cut(example.picture, flipped, place) for flipped in (False, True)[: framing.variants]]
        latents.append([names.latents(cut) for cut in variants])
        cuts |= zip(latents[-1], variants, strict=True)
    texts = {caption: names.texts(read) for caption, read in tokens.items()} if cache_texts else {}
    captions = {key: caption for caption, key in texts.items()}  # captions may be the same to the tokenizers
    absent = [key for key in cuts if not store.has(key)]
    unsaid = [key for key in captions if not store.has(key)]
    total = len(cuts) + len(captions)
    done = total - len(absent) - len(unsaid)
    on_progress(done, total)
    for keys in _batches(absent, batch):
        _put_latents(loaded, encoding, framing, store, {key: cuts[key] for key in keys})
        on_progress(done := done + len(keys), total)
    for keys in _batches(unsaid, batch):
        _put_texts(loaded, encoding, store, {key: captions[key] for key in keys})
        on_progress(done := done + len(keys), total)
    return Encoded(loaded, encoding, examples, framing, store, latents, texts, warnings)


def _put_latents(loaded: Loaded, encoding: Encoding, framing: Framing, store: Store, cuts: Mapping[str, _Cut]) -> None:
    import torch

    made = [framed(cut.picture, framing, flipped=cut.flipped, crop=cut.place) for cut in cuts.values()]
    mean, deviation = encoding.latents(loaded.pipe, torch.stack([pixels for pixels, _, _ in made]))
    for row, ((key, cut), (_, original, place)) in enumerate(zip(cuts.items(), made, strict=True)):
        _check_finite(loaded, "VAE", cut.picture.name, mean[row], deviation[row])
        sizes = torch.tensor([*original, *place, *framing.resolution], dtype=torch.float32)
        store.put(key, {"mean": mean[row], "std": deviation[row], "sizes": sizes})


def _put_texts(loaded: Loaded, encoding: Encoding, store: Store, captions: Mapping[str, str]) -> None:
    import torch

    with torch.no_grad():
        found = encoding.texts(loaded.pipe, list(captions.values()))
    for row, (key, caption) in enumerate(captions.items()):
        _check_finite(loaded, "text encoder", caption, *(tensor[row] for tensor in found.values()))
        store.put(key, {name: tensor[row] for name, tensor in found.items()})


def _check_finite(loaded: Loaded, part: str, name: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueRefused(loaded.label, f"its {part} makes NaN or Inf of {quote(name)}", "run it with --dtype fp32")


def _batches(keys: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]


def _stacked(rows: Sequence[Tensors]) -> Tensors:
    import torch

    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# ------------------------------------------------------------------------------------------------ said of them


def _tokens(pipe: Any, encoding: Encoding, captions: Sequence[str]) -> dict[str, list[list[int]]]:
    """Of each caption once, its tokens for each of the readers that there are, however many."""
    distinct = list(dict.fromkeys(captions))
    with hushed():
        read = [getattr(pipe, words)(distinct)["input_ids"] for _, words, _ in _readers(pipe, encoding)]
    return {caption: [list(tokens[row]) for tokens in read] for row, caption in enumerate(distinct)}


def _readers(pipe: Any, encoding: Encoding) -> list[tuple[str, str, int]]:
    """Those that the pipeline has: SD3 may be without its T5."""
    return [
        (part, words, limit or getattr(pipe, words).model_max_length)
        for part, words, limit in encoding.readers
        if getattr(pipe, part) is not None
    ]


def _truncated(
    pipe: Any, encoding: Encoding, examples: Sequence[Example], tokens: Mapping[str, Sequence[Sequence[int]]]
) -> list[str]:
    """Names the pictures of whose captions no text encoder reads the end."""
    limits = [limit for _, _, limit in _readers(pipe, encoding)]
    cut = [
        example.picture.name
        for example in examples
        if all(len(read) > limit for read, limit in zip(tokens[example.caption], limits, strict=True))
    ]
    if not cut:
        return []
    what = "1 caption is" if len(cut) == 1 else f"{len(cut):,} captions are"
    return [f"{what} longer than the {max(limits)} tokens that are read, and cut there: {listing(cut)}"]


def _enlarged(examples: Sequence[Example], framing: Framing) -> list[str]:
    small = enlarged(examples, framing)
    if not small:
        return []
    height, width = framing.resolution
    what = "1 picture is" if len(small) == 1 else f"{len(small):,} of {len(examples):,} pictures are"
    return [f"{what} smaller than {width} × {height} pixels, and scaled up: {listing(small)}"]


class _Names:
    """The keys of what is made: by everything that it depends on. hashed: where the model may be another next time."""

    def __init__(self, loaded: Loaded, encoding: Encoding, framing: Framing, *, hashed: bool) -> None:
        pipe = loaded.pipe
        kept = f"{_FORMAT} {encoding.name} {loaded.device.type}"
        parts = ["vae", *(part for part, _, _ in _readers(pipe, encoding))]
        vae, *readers = [hash_of_network(getattr(pipe, part)) for part in parts] if hashed else parts
        self._latents = f"{kept} {vae} {framing.resolution} {framing.center_crop}"
        self._texts = f"{kept} {' '.join(readers)}"

    def latents(self, cut: _Cut) -> str:
        return "latents-" + hash_of_text(f"{self._latents} {cut.picture.digest} {cut.flipped} {cut.place}")

    def texts(self, tokens: Sequence[Sequence[int]]) -> str:
        return "texts-" + hash_of_text(f"{self._texts} {tokens}")
