"""The loop: one step from what the seed says, gradients for the LoRA alone, all of its state to be saved and put back.

Knows no file. A step is made of slots, as many as examples go into it; which process and which part of a batch sees
a slot changes nothing of what is drawn for it.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.diffusion.checkpoints import State
from weightops.diffusion.objectives import choose, draw, loss, noised
from weightops.errors import FormatError, UsageError, ValueRefused

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from torch import Tensor

    from weightops.diffusion.encoding import Encoded, Encoding
    from weightops.diffusion.lora_modules import Lora
    from weightops.diffusion.models import Loaded
    from weightops.diffusion.objectives import Objective
    from weightops.diffusion.processes import Processes
    from weightops.diffusion.training_words import Words

SMOOTH = 0.95  # of the running mean of the loss is what it was before

# Streams of chance beside the first, for the images of the class.
_CLASS = 1


@dataclass(frozen=True, slots=True)
class Course:
    """How long the run is. images: that are learnt, beside `priors` of the class; per_step: slots of a step."""

    images: int
    priors: int
    per_step: int
    steps: int
    steps_per_epoch: int

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch

    def epoch(self, step: int) -> int:
        """In which epoch the last of so many steps was, from 1 on."""
        return max(1, math.ceil(step / self.steps_per_epoch))


@dataclass(frozen=True, slots=True)
class Row:
    """A step that is done, from 1 on, the mean loss of its slots, its learning rate, and the loss's running mean."""

    step: int
    loss: float
    lr: float
    smoothed: float


@dataclass(slots=True)
class Training:
    """A run in progress. step: steps that are done."""

    loaded: Loaded
    encoding: Encoding
    objective: Objective
    encoded: Encoded
    lora: Lora
    words: Words
    course: Course
    processes: Processes
    optimizer: Any
    schedule: Any
    step: int = 0
    smoothed: float | None = None
    scaler: Any = None
    _parameters: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        import torch

        self._parameters = self.lora.parameters()
        if self.words.mixed_precision == "fp16":
            self.scaler = torch.amp.GradScaler(self.loaded.device.type)

    # ------------------------------------------------------------------ a step

    def gradients(self) -> float:
        """The gradients of the next step, the same in all processes, and its loss. Raises ValueRefused for NaN."""
        import torch

        batch, per_step = self._batch, self.course.per_step
        share = batch * self.words.accumulate
        first = self.processes.index * share
        self.optimizer.zero_grad(set_to_none=True)
        found = torch.zeros(per_step, device=self.loaded.device)
        for start in range(first, first + share, batch):
            slots = range(start, start + batch)
            losses = self._losses(slots)
            found[start : start + batch] = losses.detach()
            # The mean over all slots of the step, whoever has them: the sum of what all processes find.
            total = losses.sum() / per_step
            (total if self.scaler is None else self.scaler.scale(total)).backward()
        self._share_gradients()
        mean = float(self.processes.sum(found).double().mean())
        if not math.isfinite(mean):
            raise ValueRefused("train", f"the loss of step {self.step + 1:,} is {mean}")
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        limit = self.words.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, limit))
        if self.scaler is None and not math.isfinite(norm):
            raise ValueRefused("train", f"the gradient of step {self.step + 1:,} is {norm}")
        return mean

    def apply(self, mean: float) -> Row:
        """Make the step of which these are the gradients and the loss. Not to be broken off: see `put_off`."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        if self.scaler is None:
            self._first_step_checked()
            self.schedule.step()
        else:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            # A step whose scaled gradients overflowed is left out, and the schedule stays where it is.
            if self.scaler.get_scale() >= before:
                self.schedule.step()
        self.step += 1
        self.smoothed = mean if self.smoothed is None else SMOOTH * self.smoothed + (1 - SMOOTH) * mean
        return Row(self.step, mean, rate, self.smoothed)

    def _first_step_checked(self) -> None:
        """A class that someone named may want more of a step than there is: its first says so."""
        if self.step:
            self.optimizer.step()
            return
        try:
            self.optimizer.step()
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as e:
            if "memory" in str(e):
                raise
            reason = " ".join(str(e).split())[:200]
            name = type(self.optimizer).__name__
            raise UsageError("--optimizer", f"{name} does not make a plain step: {reason}") from None

    @property
    def _batch(self) -> int:
        return self.words.batch or 1

    def _losses(self, slots: Sequence[int]) -> Tensor:
        """The loss of each slot, with that of an image of the class beside it where there are any: [slots]."""
        import torch

        own = self._drawn(slots, range(self.course.images), 0)
        if not self.course.priors:
            return self._loss_of(*own)
        images = self.course.images
        beside = self._drawn(slots, range(images, images + self.course.priors), _CLASS)
        # Both in one call of the network, as diffusers' own script has it.
        indices, drawn = own[0] + beside[0], _joined(own[1], beside[1])
        both = self._loss_of(indices, drawn)
        learnt, kept = torch.chunk(both, 2)
        return learnt + self.words.prior_weight * kept

    def _drawn(self, slots: Sequence[int], examples: range, stream: int) -> tuple[list[int], Any]:
        seed, per_step = self.words.seed, self.course.per_step
        found = choose(len(examples), seed=seed, step=self.step, slots=slots, per_step=per_step, stream=stream)
        drawn = draw(
            self.objective, seed=seed, step=self.step, slots=slots, shape=self.encoded.shape,
            device=self.loaded.device, noise_offset=self.words.noise_offset, stream=stream,
        )  # fmt: skip
        return [examples[n] for n in found], drawn

    def _loss_of(self, indices: Sequence[int], drawn: Any) -> Tensor:
        with self._autocast():
            given = self.encoded.batch(indices, drawn.flips)
            latents = given["mean"] + given["std"] * drawn.posterior
            noisy = noised(self.objective, latents, drawn)
            answer = self.encoding.predict(self.loaded.pipe, noisy, drawn.timesteps, given, given["sizes"])
        return loss(self.objective, answer, latents, drawn, snr_gamma=self.words.snr_gamma)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        kind = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.words.mixed_precision)
        if kind is None:
            return contextlib.nullcontext()
        return torch.autocast(self.loaded.device.type, kind)

    def _share_gradients(self) -> None:
        """The sum of all processes' gradients, in each of them: as one long row, for few and large messages."""
        import torch

        if self.processes.count == 1:
            return
        # What no loss depends on has no gradient, in no process: an optimizer leaves it alone.
        learning = [parameter for parameter in self._parameters if parameter.grad is not None]
        rows = [parameter.grad for parameter in learning if parameter.grad is not None]
        whole = self.processes.sum(torch.cat([row.reshape(-1) for row in rows]))
        parts = torch.split(whole, [row.numel() for row in rows])
        for parameter, part in zip(learning, parts, strict=True):
            parameter.grad = part.reshape(parameter.shape).clone()

    # ------------------------------------------------------------------ its state

    def state(self) -> State:
        """All that the next step depends on, beside the settings. Raises ValueRefused for a LoRA that is not finite."""
        parameters = self.lora.state()
        wrong = [name for name, tensor in parameters.items() if not tensor.isfinite().all()]
        if wrong:
            raise ValueRefused("train", f"after step {self.step:,} {len(wrong):,} of the LoRA's tensors are not finite")
        return State(
            self.step, self.smoothed, parameters, self.optimizer.state_dict(), self.schedule.state_dict(),
            {} if self.scaler is None else self.scaler.state_dict(),
        )  # fmt: skip

    def restore(self, state: State, *, where: str) -> None:
        """Go on from there, bit for bit. Raises FormatError, MismatchError."""
        self.lora.load(state.parameters, where=where)
        try:
            self.optimizer.load_state_dict(dict(state.optimizer))
            self.schedule.load_state_dict(dict(state.schedule))
            if self.scaler is not None:
                self.scaler.load_state_dict(dict(state.scaler))
        except (KeyError, ValueError, TypeError, RuntimeError) as e:
            reason = " ".join(str(e).split())[:200]
            raise FormatError(where, f"its optimizer's state does not fit: {reason}") from None
        self.step, self.smoothed = state.step, state.smoothed


def _joined(a: Any, b: Any) -> Any:
    """Two draws as one."""
    import torch

    return type(a)(*(torch.cat([getattr(a, name), getattr(b, name)]) for name in a.__dataclass_fields__))


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Ctrl-C and SIGTERM that come within the block act after it: half a step, or half a checkpoint, is none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and callable(signal.getsignal(number)):
            before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)
