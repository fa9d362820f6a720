"""How a pipeline of diffusers is called for images, whichever it is: its own words, seeds of our own, pixels checked.

What a pipeline can be told follows from its signature. A word that it has no place for is refused, and so is one that
it would take and do nothing with. Writes no file.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.diffusion.extras import hushed
from weightops.diffusion.schedulers import is_flow, scheduler_named
from weightops.errors import MemoryRefused, MismatchError, UsageError, WeightopsError, quote

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from weightops.diffusion.prompts import Prompt

# Pipelines by whose names it shows that they begin with an image.
_BEGINS_WITH_AN_IMAGE = re.compile(r"Img2Img|ImageToVideo|Inpaint|ControlNet|Upscale|Edit|Depth|InstructPix2Pix")
_WEIGHTED = re.compile(r"\([^()]+:\d+(\.\d+)?\)")
_LORA_TAG = re.compile(r"<lora:[^<>]+>")


@dataclass(frozen=True, slots=True)
class Sampled:
    """An image, [height, width, 3] of bytes. black: every pixel is. finite: no NaN was among its values.

    blanked: the model's own safety checker took the image away.
    """

    pixels: np.ndarray
    black: bool
    finite: bool
    blanked: bool


@dataclass(frozen=True, slots=True)
class Sampling:
    """A pipeline, and what its images are made with beside prompt and seed.

    own: the scheduler that the model brings. scheduler: a name of ours for another, None: its own. true_guidance: where
    the pipeline has a second scale, for guidance by a negative prompt.
    """

    pipe: Any
    where: str
    own: Any
    scheduler: str | None = None
    true_guidance: float | None = None

    def default(self, word: str) -> Any:
        """What the pipeline itself says of a word; None where it has no such word."""
        found = self._words.get(word)
        return None if found is None or found.default is inspect.Parameter.empty else found.default

    def knows(self, word: str) -> bool:
        return word in self._words

    @property
    def _words(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(type(self.pipe).__call__).parameters)

    def steps(self, prompt: Prompt) -> int:
        return prompt.steps if prompt.steps is not None else int(self.default("num_inference_steps") or 50)

    def guidance(self, prompt: Prompt) -> float | None:
        """The scale that is told to the pipeline; None where it takes none."""
        found = prompt.guidance if prompt.guidance is not None else self.default("guidance_scale")
        return None if found is None or not self._takes_guidance() else float(found)

    def true_scale(self) -> float | None:
        """Of pipelines whose guidance by a negative prompt has a scale of its own; None for all others."""
        if not self.knows("true_cfg_scale"):
            return None
        return float(self.default("true_cfg_scale") if self.true_guidance is None else self.true_guidance)

    def _takes_guidance(self) -> bool:
        """Has the network a place for it? Flux's schnell has none, though the pipeline takes the word."""
        transformer = getattr(self.pipe, "transformer", None)
        embeds = None if transformer is None else transformer.config.get("guidance_embeds")
        return self.knows("guidance_scale") and (embeds is not False or not self.knows("true_cfg_scale"))

    def check(self, prompt: Prompt) -> None:
        """Refuse what this pipeline cannot do, or would not do though it was told. Raises WeightopsError."""
        name = type(self.pipe).__name__
        if not self.knows("prompt") or not hasattr(self.pipe, "vae") or _BEGINS_WITH_AN_IMAGE.search(name):
            hint = "weightops generate video makes videos of images" if "Video" in name else None
            raise MismatchError(self.where, f"is a {name}, which makes no images from text alone", hint)
        for option, word, said in (
            ("--prompt-2", "prompt_2", prompt.prompt_2),
            ("--negative", "negative_prompt", prompt.negative),
            ("--negative-2", "negative_prompt_2", prompt.negative_2),
            ("--guidance", "guidance_scale", prompt.guidance),
            ("--true-guidance", "true_cfg_scale", self.true_guidance),
        ):
            if said is not None and not self.knows(word):
                raise UsageError(option, f"{name} takes no such word: it has no {word}")
        if prompt.guidance is not None and not self._takes_guidance():
            raise UsageError("--guidance", f"{self.where} was trained without a scale of guidance, and ignores it")
        self._check_negative(prompt)
        if prompt.size is not None:
            side = self._multiple()
            if any(length % side for length in prompt.size):
                found = f"{prompt.size[0]}x{prompt.size[1]}"
                raise UsageError("--size", f"found {found}, expected multiples of {side} for {self.where}")

    def check_steps(self, steps: int) -> list[str]:
        """Refuse numbers of steps that the scheduler cannot count; what is to be known of one. Raises UsageError."""
        made = scheduler_named(self.scheduler, self.own)
        if is_flow(made):  # any number does
            return []
        name, trained = type(made).__name__, int(made.config.get("num_train_timesteps", 1000))
        try:
            with hushed():
                made.set_timesteps(steps)
        except (ValueError, IndexError) as e:
            raise UsageError("--steps", f"{name} refuses {steps}: {' '.join(str(e).split())[:200]}") from None
        first = float(made.timesteps.max())
        if first > trained - 1:
            what = f"found {steps}, which {name} would count beyond the model's {trained} times of noise"
            raise UsageError("--steps", what, "fewer do as well")
        if steps >= 10 and first < 0.8 * trained:
            # Times that are whole multiples of something, from 0 up: 600 of them end at 600.
            return [f"{steps} steps: {name} begins them at time {first:g} of {trained}, which is not all noise"]
        return []

    def _check_negative(self, prompt: Prompt) -> None:
        """Refuse negative prompts that the pipeline would take and not read."""
        scale = self.true_scale()
        if prompt.negative is None and prompt.negative_2 is None:
            if self.true_guidance is not None and scale is not None and scale > 1:
                raise UsageError("--true-guidance", "needs a --negative to guide away from; it may be empty")
            return
        if scale is None:
            guidance = self.guidance(prompt)
            if guidance is not None and guidance <= 1:
                what = f"found --guidance {guidance:g}, with which no negative prompt is read"
                raise UsageError("--negative", what, "--guidance above 1 reads it")
        elif scale <= 1:
            what = f"{type(self.pipe).__name__} has its guidance distilled, and reads no negative prompt"
            raise UsageError("--negative", what, "--true-guidance 2 reads it, and takes twice as long")

    def _multiple(self) -> int:
        factor = int(getattr(self.pipe, "vae_scale_factor", 8))
        return 2 * factor if getattr(self.pipe, "transformer", None) is not None else factor

    def notes(self, prompt: Prompt) -> list[str]:
        """What the pipeline reads otherwise than its author may have meant."""
        found = []
        for text in dict.fromkeys(t for t in (prompt.prompt, prompt.prompt_2, prompt.negative) if t):
            if _LORA_TAG.search(text):
                found.append(f"{quote(text, 60)}: <lora:…> is read as plain words; --lora FILE puts one on the model")
            if _WEIGHTED.search(text):
                found.append(f"{quote(text, 60)}: (words:1.2) is read as plain words, without the weight")
            limit, count = self._tokens(text)
            if count > limit:
                found.append(
                    f"{quote(text, 60)}: takes {count} tokens, and the model reads {limit}: the end is not seen"
                )
        return found

    def _tokens(self, text: str) -> tuple[int, int]:
        """How many tokens the text encoder of the longest reach reads, and how many the text takes."""
        tokenizers = [
            found for name in ("tokenizer", "tokenizer_2", "tokenizer_3")
            if (found := getattr(self.pipe, name, None)) is not None
        ]  # fmt: skip
        if not tokenizers:
            return 0, 0
        said = self.default("max_sequence_length")
        # Where a length is said it is T5's, which comes last and reads on where CLIP has stopped.
        read = tokenizers[-1] if said is not None else tokenizers[0]
        limit = int(said) if said is not None else int(read.model_max_length)
        with hushed():
            return limit, len(read(text).input_ids)

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], on_step: Callable[[float], None]
    ) -> list[Sampled]:
        """An image of each prompt with its seed, all at once; prompts alike in steps, guidance and size.

        Each draws from a generator of its own, on the CPU, so that it is the same on every device but for rounding.
        on_step: is told the share that is done. Raises MemoryRefused, and UsageError for what the pipeline refuses.
        """
        import torch

        first = prompts[0]
        words: dict[str, Any] = {
            "prompt": [p.prompt for p in prompts],
            "num_inference_steps": self.steps(first),
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            "output_type": "np",
        }
        if self.guidance(first) is not None:
            words["guidance_scale"] = self.guidance(first)
        if self.true_guidance is not None:
            words["true_cfg_scale"] = self.true_guidance
        if first.size is not None:
            words["width"], words["height"] = first.size
        texts = {
            "prompt_2": [p.prompt_2 for p in prompts],
            "negative_prompt": [p.negative for p in prompts],
            "negative_prompt_2": [p.negative_2 for p in prompts],
        }
        words |= {word: said for word, said in texts.items() if said[0] is not None}
        if self.knows("callback_on_step_end"):
            words["callback_on_step_end"] = _telling(on_step)
        self.pipe.scheduler = scheduler_named(self.scheduler, self.own)
        try:
            with hushed():
                result = self.pipe(**words)
        except Exception as e:
            size = "" if first.size is None else f" of {first.size[0]}x{first.size[1]}"
            what = f"{len(prompts)} image{'' if len(prompts) == 1 else 's'}{size} at once"
            raise refused(e, self.where, what) from None
        flags = getattr(result, "nsfw_content_detected", None) or [False] * len(prompts)
        return [_checked(image, bool(flag)) for image, flag in zip(result.images, flags, strict=True)]


def _telling(on_step: Callable[[float], None]) -> Callable[..., dict[str, Any]]:
    def on_step_end(pipe: Any, step: int, _timestep: Any, found: dict[str, Any]) -> dict[str, Any]:
        total = int(getattr(pipe, "num_timesteps", 0) or 0)
        on_step(min(1.0, (step + 1) / total) if total else 0.0)
        return found

    return on_step_end


def _checked(image: np.ndarray, blanked: bool) -> Sampled:
    """The pixels as diffusers itself rounds them, and what is the matter with them."""
    import numpy as np

    finite = bool(np.isfinite(image).all())
    pixels = (np.nan_to_num(image, nan=0.0, posinf=1.0, neginf=0.0) * 255).round().astype(np.uint8)
    return Sampled(pixels, not pixels.any(), finite, blanked)


def refused(error: Exception, where: str, what: str) -> Exception:
    """What to raise for what a library has raised: a sentence where it is the user's, else the error itself.

    what: was to be made; "" while a model is loaded.
    """
    import torch

    if isinstance(error, WeightopsError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        hint = "less is needed with --dtype fp16 or bf16, --offload, --tiling, --batch 1, or a smaller --size"
        return MemoryRefused(where, f"not enough memory{' for ' if what else ''}{what}", hint)
    if isinstance(error, ValueError):
        return UsageError(where, f"diffusers refuses it: {text[:300]}")
    return error
