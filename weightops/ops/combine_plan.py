"""LoRAs lined up: what each changes of every module, under the names of one dialect. From headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops.errors import MismatchError, UsageError, quote
from weightops.lora.adapters import Adapter, AdapterFile, read_adapters, strengths
from weightops.lora.dialects import DIALECTS, Dialect
from weightops.lora.units import Target
from weightops.naming.keymap import ARCHITECTURES, Architecture, heights
from weightops.ops.adapter_modules import Base, check_held, endings_of
from weightops.ops.combine_modules import combine_module, needs_base, shape_of, swaps_of, warn_of_peer
from weightops.ops.lined_up import LinedUp, Share, Wish
from weightops.ops.report import Unused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightops.files.checkpoint import Checkpoint
    from weightops.lora.pieces import Bands


def line_up(files: Sequence[Checkpoint], wish: Wish, base: Base | None) -> LinedUp:
    """What is written of these files, module by module. Raises WeightopsError.

    base: the model that they are for; without one, what depends on its weights (DoRA, OFT, …) is refused.
    """
    found = [read_adapters(file, architecture=wish.architecture) for file in files]
    for one, file in zip(found, files, strict=True):
        check_held(file, one)
    known = _architecture(files, found, wish, base)
    if known is not None:  # one file may tell what another leaves open
        found = [
            one if one.architecture == known.name else read_adapters(file, architecture=known.name)
            for one, file in zip(found, files, strict=True)
        ]
    for one in found:
        if known is not None or one.indexed or one.problems or one.left:
            one.check()
    dialect = _dialect(found, wish, known)
    endings = dialect.endings if dialect is not None else endings_of(found[0])
    lined = LinedUp(files, wish, found, dialect, known, endings)
    lined.values = [strengths(file, one) for file, one in zip(files, found, strict=True)]
    if known is None:
        _by_own_names(lined, base)
    else:
        _by_canonical_names(lined, base)
    if not lined.modules:
        raise MismatchError(", ".join(file.label for file in files), "change no matrix, and have no ranks to combine")
    if wish.compat is not None:
        warn_of_peer(lined)
    _account(lined)
    _embeddings(lined)
    return lined


def _architecture(
    files: Sequence[Checkpoint], found: Sequence[AdapterFile], wish: Wish, base: Base | None
) -> Architecture | None:
    """The one that all are for; None where no known one has modules of these names."""
    told: dict[str, Checkpoint] = {}
    for one, file in zip(found, files, strict=True):
        if one.architecture is not None:
            told.setdefault(one.architecture, file)
    if base is not None and base.architecture is not None:
        told.setdefault(base.architecture, base.opened)
    if len(told) > 1:
        (a, first), (b, second) = list(told.items())[:2]
        raise MismatchError(second.label, f"is for {b}, but {first.label} is for {a}")
    name = next(iter(told), None)
    if name is None:
        open_ = [one for one in found if one.possible]
        if not open_:
            return None
        possible = ", ".join(open_[0].possible)
        raise MismatchError(
            open_[0].label, f"cannot tell which model it is for: {possible} have modules of these names and sizes",
            f"--architecture {open_[0].possible[0]} says which",
        )  # fmt: skip
    for one in found:
        if one.architecture is None and one.possible and name not in one.possible:
            raise MismatchError(one.label, f"is for one of {', '.join(one.possible)}, and not for {name}")
    return ARCHITECTURES.get(name)


def _dialect(found: Sequence[AdapterFile], wish: Wish, known: Architecture | None) -> Dialect | None:
    """The dialect that was asked for, or the first file's, or the nearest to it that is written."""
    if wish.dialect is not None and wish.dialect not in DIALECTS:
        raise UsageError("--dialect", f"unknown dialect {quote(wish.dialect)}", f"known are {', '.join(DIALECTS)}")
    if known is None:
        if wish.dialect is not None:
            raise UsageError("--dialect", f"{found[0].label} is for a model that is not known, and keeps its names")
        return None
    if wish.dialect is not None:
        return DIALECTS[wish.dialect]
    own = found[0].dialect or ""
    nearest = {"lycoris": "kohya", "bare, kohya endings": "kohya"}
    return DIALECTS.get(own) or DIALECTS[nearest.get(own, "diffusers")]


# ------------------------------------------------------------------------------------------------ names


def _by_own_names(lined: LinedUp, base: Base | None) -> None:
    """Modules of a model that is not known: those that are called alike."""
    if base is not None:
        raise MismatchError(base.opened.label, f"cannot be lined up with {lined.opened.label}, whose names none has")
    groups: dict[str, list[Share]] = {}
    for file, one in enumerate(lined.found):
        for adapter in one.adapters:
            shape = shape_of(adapter)
            if not shape:
                raise needs_base(one.label, adapter)
            groups.setdefault(adapter.name, []).append(Share(file, adapter, ((0, shape[0]),)))
    named: set[str] = set()
    for number, one in enumerate(lined.found):
        names = {adapter.name for adapter in one.adapters}
        if number and not named & names:
            before = f"{lined.opened.label} has" if number == 1 else "those before it have"
            raise MismatchError(one.label, f"has no module of a name that {before}, and no known model has them")
        named |= names
    for shares in groups.values():
        first = shares[0].adapter
        component = first.beginning.text.partition(".")[0]
        combine_module(lined, component, first.beginning.text, first.body, [shares], None, base)


def _by_canonical_names(lined: LinedUp, base: Base | None) -> None:
    shares: dict[tuple[str, str], list[Share]] = {}
    order = [c.name for c in lined.architecture.components]
    for file, one in enumerate(lined.found):
        for adapter in one.adapters:
            assert adapter.target is not None
            for name, bands in _bands(adapter, one.label, base):
                shares.setdefault((adapter.component or "", name), []).append(Share(file, adapter, bands))
    assert lined.dialect is not None
    variant = next((one.variant for one in lined.found if one.variant is not None), None)
    target = Target(lined.dialect, lined.architecture, variant, lined.opened.label)
    done: set[tuple[str, str]] = set()
    for component, name in sorted(shares, key=lambda key: order.index(key[0])):
        if (component, name) in done:
            continue
        place = target.place(component)
        spelled = target.table(place).spelled_module(name)
        if spelled is None:
            what = f"{name} of the {component} has no name in {lined.dialect.name}'s spelling"
            raise MismatchError(lined.opened.label, what, "--dialect names another")
        rule, module, names = spelled
        module = module.replace(".", "_") if lined.dialect.flat else module
        done |= {(component, n) for n in names}
        packed = [shares.get((component, n), []) for n in names]
        combine_module(lined, component, target.prefix(place), module, packed, (target, rule, names), base)


def _bands(adapter: Adapter, label: str, base: Base | None) -> list[tuple[str, Bands]]:
    """Which of the adapter's rows are those of each canonical module that it changes."""
    assert adapter.target is not None
    names, rule = adapter.target.names, adapter.target.rule
    shape = shape_of(adapter)
    if not shape:  # OFT and its like tell nothing of the weight
        if base is None:
            raise needs_base(label, adapter)
        frame = base.frame(adapter)
        shape = (sum(slot.spec.rows for slot in frame), *frame[0].spec.shape[1:])
    rows, features = shape[0], shape[1] if len(shape) > 1 else None
    if len(names) == 1:
        swapped = swaps_of(rule, adapter, rows, features, label)
        return [(names[0], ((rows // 2, rows), (0, rows // 2)) if swapped else ((0, rows),))]
    tall = heights(rule, rows, features)
    if tall is None:
        what = f"{quote(adapter.name)} changes {rows} rows, which cannot be shared out to {', '.join(names)}"
        raise MismatchError(label, what)
    found: list[tuple[str, Bands]] = []
    start = 0
    for name, height in zip(names, tall, strict=True):
        found.append((name, ((start, start + height),)))
        start += height
    return found


def _account(lined: LinedUp) -> None:
    """Every key of every adapter, once."""
    for number, one in enumerate(lined.found):
        for key in (key for adapter in one.adapters for key in adapter.keys.values()):
            if (number, key) in lined.lost:
                lined.account.unused.append(Unused(key, one.label, lined.lost[number, key], asked=False))
            else:
                assert (number, key) in lined.used, key
                lined.account.used.append(key)


def _embeddings(lined: LinedUp) -> None:
    """Embeddings that files carry along: copied, the first of a name."""
    for number, (file, one) in enumerate(zip(lined.files, lined.found, strict=True)):
        for key in one.embeddings:
            label = file.label
            if lined.is_folder:
                why = "an embedding has no place in a PEFT folder"
            elif key in lined.embeddings:
                why = f"{lined.files[lined.embeddings[key]].label} has one of its name"
            else:
                lined.embeddings[key] = number
                lined.account.copied.append(key)
                continue
            lined.account.unused.append(Unused(key, label, why, asked=False))
        lined.account.unused += [Unused(path, file.label, why, asked=True) for path, why in file.left_out]
