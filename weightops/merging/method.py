"""MergeMethod: a function on tensors, whose signature and docstring are its whole declaration.

Positional parameters are models, keyword-only ones settings: a name, a type, a default. What a model's annotation says
of it: `Tensor`, a model; `Delta`, a difference of two models, or what a LoRA adds; `Either`, one or the other, all of
them alike, and so is the result. Of a setting: the type `Weights` is one number per model of the starred parameter,
`Share` a number above 0 and at most 1. `found`, `random` and `statistics` are no settings: the method is handed them.
From these follow the options, the help, and the contract tests. How a declaration is read and what is given is checked,
methods of other kinds share.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.errors import UsageError, quote
from weightops.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from weightops.plan import Grain

    Delta = Tensor
    Either = Tensor

Weights = Sequence[float]
Share = float

SMALL = 64 * 1024  # values
WORKING_VALUES = 128 * 1024  # at a time: their working copies stay in the cache

METHODS: Registry[MergeMethod] = Registry("merge method", "weightops.merging.methods")


# Of parameters, as they stand in a signature: methods are written under `from __future__ import annotations`.
KINDS = ("float", "int", "bool", "Weights", "Share")
# Of models, and of results.
ROLES = ("Tensor", "Delta", "Either")
# What a method is handed besides: what its looks found, a generator of random numbers, tensors of statistics files.
HANDED = ("found", "random", "statistics")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A setting of a method: `kind` is one of KINDS; `default` is None where one must be given."""

    name: str
    kind: str
    default: Any


@dataclass(frozen=True, slots=True)
class Look:
    """A first look at a tensor of all models, before anything is computed.

    block: `block(*models, found, **parameters)` gives a small value of some values or rows; `found` is what the look
    before this one found, None for the first. together: `together(values, found, **parameters)` makes of the values of
    all parts of the tensor, in their order, what is found. fold: `fold(values)` makes one value of those of
    neighbouring parts, where there are many or they are large. everywhere: `everywhere(found_by_name, **parameters)`
    makes of what is found in every tensor that is merged what each of them is handed, by name: a pass more over all.
    """

    block: Callable[..., Any]
    together: Callable[..., Any]
    fold: Callable[[Sequence[Any]], Any] | None = None
    everywhere: Callable[..., Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """`function(*models, **parameters) -> Tensor`, all models in float32 or better, in one shape.

    models: names of the models it takes, "*models" for any number; roles: of each, one of ROLES, and of the result.
    grain: VALUES, ROWS (of axis 0: a row is seen whole) or TENSOR. shortcut: the same in one operation on the storage
    dtype that rounds once, where there is one; it fills `out` and returns True, or returns False when it does not
    apply. looks: what it must know of a whole tensor first, each after the one before; the function is handed what the
    last one found. linear: with that, it is a linear combination of its models. double: it is computed in float64
    whatever comes in. decides: it chooses between values (by a threshold, a vote), so that the last bit of an input may
    change a result much. copies: working copies of a part that the function makes at most, its result among them; each:
    so many more for each model. beside: `beside(shape)` gives the bytes that it takes beside them, of a tensor of this
    shape, if it has all its statistics. shares: its weights are shares of a whole: doubled, they give the same (as
    those of one with a setting `normalize` do, where that is true).
    refuse: `refuse(count, parameters)` raises UsageError for settings, or a number of models, that make no sense.
    """

    name: str
    function: Callable[..., Tensor]
    grain: Grain
    models: tuple[str, ...]
    roles: tuple[str, ...]
    result: str
    parameters: tuple[Parameter, ...]
    handed: tuple[str, ...]
    summary: str
    shortcut: Callable[..., bool] | None
    looks: tuple[Look, ...]
    linear: bool
    double: bool
    decides: bool
    copies: int
    each: int
    beside: Callable[[Sequence[int]], int] | None
    shares: bool
    refuse: Callable[[int, Mapping[str, Any]], None] | None

    @property
    def needs_base(self) -> bool:
        return "base" in self.models

    @property
    def is_open(self) -> bool:
        """Does it take any number of models?"""
        return self.models[-1].startswith("*")

    @property
    def fixed(self) -> int:
        """How many models it takes by name."""
        return len(self.models) - self.is_open

    @property
    def draws(self) -> bool:
        return "random" in self.handed

    @property
    def needs_statistics(self) -> bool:
        return "statistics" in self.handed

    def role(self, number: int) -> str:
        """Of the model in this place."""
        return self.roles[min(number, len(self.roles) - 1)]

    def check(self, given: Mapping[str, Any], count: int | None = None) -> dict[str, Any]:
        """All parameters with their values, checked; count: of the models that it is to take, where that is known.

        Raises UsageError for an unknown, missing or senseless one, for weights that are not as many as the models, and
        for a number of models that it does not take.
        """
        weights = [p.name for p in self.parameters if p.kind == "Weights" and given.get(p.name) is None]
        if count is not None:  # unless they are said, all alike
            given = {**given, **{name: (1.0,) * max(count - self.fixed, 0) for name in weights}}
        values = checked(self.name, self.parameters, given)
        if count is None:
            return values
        if count < self.fixed + self.is_open or (count > self.fixed and not self.is_open):
            raise UsageError(self.name, f"takes the models {', '.join(self.models)}, found {count}")
        for parameter in self.parameters:
            found = values[parameter.name]
            if parameter.kind == "Weights" and len(found) != count - self.fixed:
                what = f"found {len(found)} weights for {count - self.fixed} models, expected one for each"
                raise UsageError(f"{self.name}, {parameter.name}", what)
        if self.refuse is not None:
            self.refuse(count, values)
        return values


def cancel_out(weights: Weights) -> bool:
    """Do they sum to nothing? 0.1, 0.2 and -0.3 sum to 3e-17: normalised, they would be weights of 3e15."""
    return abs(math.fsum(weights)) <= 1e-9 * math.fsum(map(abs, weights))


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
    grain: Grain, *, shortcut: Callable[..., bool] | None = None, looks: tuple[Look, ...] = (), linear: bool = False,
    double: bool = False, decides: bool = False, copies: int = 3, each: int = 0,
    beside: Callable[[Sequence[int]], int] | None = None,
    shares: bool = False, refuse: Callable[[int, Mapping[str, Any]], None] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:  # fmt: skip
    """Register the decorated function as a merge method, under its name (without an underscore at its end).

    The other arguments are MergeMethod's. Raises TypeError for a signature that is none of a method.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        signature = inspect.signature(function)
        models = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
        roles = tuple(str(p.annotation) for p in models)
        result = str(signature.return_annotation)
        for role in (*roles, result):
            if role not in ROLES:
                raise TypeError(f"{function.__name__}: found {role!r}, expected {ROLES}")
        handed = tuple(name for name in HANDED if name in signature.parameters)
        METHODS.register(
            name := function.__name__.rstrip("_"),
            MergeMethod(
                name=name,
                function=function,
                grain=grain,
                models=tuple(f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name for p in models),
                roles=roles,
                result=result,
                parameters=parameters_of(function, handed=HANDED),
                handed=handed,
                summary=summary_of(function),
                shortcut=shortcut,
                looks=looks,
                linear=linear,
                double=double,
                decides=decides,
                copies=copies,
                each=each,
                beside=beside,
                shares=shares,
                refuse=refuse,
            ),
        )
        return function

    return register
