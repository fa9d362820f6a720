"""The optimizer by name or import path, its settings from words, and the schedule of its learning rate."""

from __future__ import annotations

import ast
import importlib
import inspect
from typing import TYPE_CHECKING, Any

from weightops.diffusion.extras import hushed
from weightops.errors import UsageError, listing, quote

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weightops.diffusion.training_words import Words

ADAMW = "adamw"
# The studies', where nothing else is said. Another class has its own.
_OF_ADAMW: Mapping[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


def optimizer_class(name: str) -> Any:
    """`adamw`, or a class by its import path. Raises UsageError."""
    if name.lower() == ADAMW:
        from torch.optim import AdamW

        return AdamW
    module, _, last = name.rpartition(".")
    hint = "adamw, or a class as package.module.Class: torch.optim.SGD, bitsandbytes.optim.AdamW8bit"
    if not module:
        raise UsageError("--optimizer", f"found {quote(name)}, expected adamw or an import path", hint)
    try:
        found = getattr(importlib.import_module(module), last, None)
    except ImportError as e:
        raise UsageError("--optimizer", f"{quote(name)} cannot be imported: {e}", hint) from None
    if not inspect.isclass(found) or not callable(getattr(found, "step", None)):
        what = f"{quote(module)} has no class {quote(last)} that makes steps"
        raise UsageError("--optimizer", what, hint)
    return found


def settings_of(words: Words, made: Any) -> dict[str, Any]:
    """The keyword arguments that the class is called with, beside parameters and rate. Raises UsageError."""
    own = {"betas": words.betas, "eps": words.eps, "weight_decay": words.weight_decay}
    given = {name: value for name, value in own.items() if value is not None}
    given |= {name: _value(text) for name, text in words.optimizer_set.items()}
    parameters = inspect.signature(made).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in given if name not in parameters or name in ("params", "lr")]
    if "lr" in unknown or "params" in unknown:
        raise UsageError("--optimizer-set", f"found {listing(unknown)}", "the learning rate is --lr")
    if unknown and not takes_all:
        known = ", ".join(name for name in parameters if name not in ("params", "lr", "self"))
        option = f"--{unknown[0].replace('_', '-')}" if unknown[0] in own else "--optimizer-set"
        raise UsageError(option, f"{made.__name__} takes no {quote(unknown[0])}", f"it takes {known}")
    return {**_OF_ADAMW, **given} if words.optimizer.lower() == ADAMW else given


def make_optimizer(words: Words, groups: Sequence[tuple[list[Tensor], float]]) -> Any:
    """An optimizer over groups of parameters, each with its learning rate. Raises UsageError."""
    made = optimizer_class(words.optimizer)
    settings = settings_of(words, made)
    listed = [{"params": parameters, "lr": rate} for parameters, rate in groups]
    try:
        return made(listed, lr=groups[0][1], **settings)
    except (TypeError, ValueError, AssertionError, RuntimeError, ImportError, NotImplementedError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UsageError("--optimizer", f"{made.__name__} refuses its settings: {reason}") from None


def make_schedule(words: Words, optimizer: Any, steps: int) -> Any:
    """The schedule of the learning rate over the run, as diffusers has it."""
    with hushed():
        from diffusers.optimization import get_scheduler

        return get_scheduler(words.schedule, optimizer, num_warmup_steps=words.warmup, num_training_steps=steps)


def _value(text: str) -> Any:
    """A number, a truth value, a tuple of such; else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
