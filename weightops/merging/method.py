"""MergeMethod: a function on tensors, whose signature and docstring are its whole declaration.

Positional parameters are models; keyword-only parameters are settings: a name, a type, a default. The type
`Weights` is one number per model, `Share` a number above 0 and at most 1. From these follow the options, the help,
and the contract tests. How a declaration is read and what is given is checked, methods of other kinds share.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.errors import UsageError, quote
from weightops.plan import Grain
from weightops.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Weights = Sequence[float]
Share = float

SMALL = 64 * 1024  # values
WORKING_VALUES = 128 * 1024  # at a time: their working copies stay in the cache

METHODS: Registry[MergeMethod] = Registry("merge method", "weightops.merging.methods")


# Of parameters, as they stand in a signature: methods are written under `from __future__ import annotations`.
KINDS = ("float", "int", "bool", "Weights", "Share")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A setting of a method: `kind` is one of KINDS; `default` is None where one must be given."""

    name: str
    kind: str
    default: Any


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """`function(*models, **parameters) -> Tensor`, all models in float32 or better, in one shape.

    models: names of the models it takes, "*models" for any number; needs_base: the first of them is the base.
    shortcut: the same in one operation on the storage dtype that rounds once, where there is one; it fills
    `out` and returns True, or returns False when it does not apply.
    """

    name: str
    function: Callable[..., Tensor]
    grain: Grain
    models: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    summary: str
    shortcut: Callable[..., bool] | None = None

    @property
    def needs_base(self) -> bool:
        return self.models[0] == "base"

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters with their values, checked. Raises UsageError for an unknown, missing or senseless one."""
        return checked(self.name, self.parameters, given)

    def apply(self, models: Sequence[Tensor], out: Tensor, parameters: Mapping[str, Any]) -> None:
        """Fill `out`: computed in float32, or float64 where a float32 is read or written, and rounded once.

        Where any row may be computed apart, flat tensors are computed a part at a time.
        """
        import torch

        small = out.numel() <= SMALL
        if not small and self.shortcut is not None and self.shortcut(models, out, **parameters):
            return
        # Small tensors are the norms and biases, whose values are large and whose time is none.
        wide = small or any(t.dtype in (torch.float32, torch.float64) for t in (*models, out))
        working = torch.float64 if wide else torch.float32
        whole = self.grain is Grain.TENSOR or out.ndim != 1
        step = max(out.numel(), 1) if whole else WORKING_VALUES
        for start in range(0, max(out.numel(), 1), step):
            part = ... if whole else slice(start, start + step)
            result = self.function(*(m[part].to(working) for m in models), **parameters)
            store(result, out[part])

    def work_nbytes(self, models: int, values: int, *, flat: bool) -> int:
        """Bytes of working copies that `apply` makes at most, for blocks of `values` values of so many models."""
        # In float64: each model, the result, and one temporary.
        return 8 * (models + 2) * (min(values, WORKING_VALUES) if flat else values)


def store(result: Tensor, out: Tensor) -> None:
    """Fill `out` with `result`, rounded once; what its dtype cannot hold becomes Inf, or NaN where it has no Inf."""
    import torch

    if out.dtype is torch.float8_e4m3fn:
        # torch 2.13 clips to 448, Inf too, where others before it gave NaN: an overflow nobody would see.
        result = result.masked_fill(result.abs() > 464, math.nan)
    out.copy_(result)


def parameters_of(function: Callable[..., Any], *, handed: Collection[str] = ()) -> tuple[Parameter, ...]:
    """The settings that a function declares: its keyword-only parameters, but for those that it is handed."""
    found = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and p.name not in handed:
            if p.annotation not in KINDS:
                raise TypeError(f"{function.__name__}, {p.name}: found {p.annotation!r}, expected {KINDS}")
            found.append(Parameter(p.name, p.annotation, None if p.default is p.empty else p.default))
    return tuple(found)


def summary_of(function: Callable[..., Any]) -> str:
    """The first paragraph of a function's docstring: its help."""
    return inspect.cleandoc(function.__doc__ or "").split("\n\n")[0]


def checked(method: str, parameters: Sequence[Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters with their values. Raises UsageError for an unknown, missing or senseless one."""
    known = {p.name: p for p in parameters}
    for name in given:
        if name not in known:
            raise UsageError(
                "--set", f"{method} has no parameter {quote(name)}", f"it has {', '.join(known) or 'none'}"
            )
    values: dict[str, Any] = {}
    for name, parameter in known.items():
        value = given.get(name, parameter.default)
        if value is None:
            raise UsageError("--set", f"{method} needs the parameter {name!r}")
        values[name] = _converted(method, parameter, value)
    return values


def _converted(method: str, parameter: Parameter, value: Any) -> Any:
    where = f"{method}, {parameter.name}"
    try:
        if parameter.kind == "Weights":
            numbers = tuple(float(v) for v in (value.split(",") if isinstance(value, str) else value))
            if not all(map(math.isfinite, numbers)):
                raise ValueError
            return numbers
        if parameter.kind == "bool":
            if isinstance(value, str):
                return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]
            return bool(value)
        number = float(value)
        if not math.isfinite(number) or (parameter.kind == "int" and number != int(number)):
            raise ValueError
        if parameter.kind == "Share" and not 0 < number <= 1:
            raise ValueError
        return int(number) if parameter.kind == "int" else number
    except (ValueError, TypeError, KeyError):
        words = {
            "float": "a number",
            "int": "a whole number",
            "bool": "true or false",
            "Weights": "numbers",
            "Share": "a number above 0 and at most 1",
        }
        raise UsageError(where, f"found {quote(value)}, expected {words[parameter.kind]}") from None


def merge_method(
    grain: Grain, *, shortcut: Callable[..., bool] | None = None
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the decorated function as a merge method, under its own name."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        models = tuple(
            f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name
            for p in inspect.signature(function).parameters.values()
            if p.kind is not p.KEYWORD_ONLY
        )
        name, parameters = function.__name__, parameters_of(function)
        METHODS.register(name, MergeMethod(name, function, grain, models, parameters, summary_of(function), shortcut))
        return function

    return register
