"""How much LoRAs change a model, and where: the Frobenius norms of their ΔW, by block, beside those of the weights.

The norms follow from the factors, by the same reckoning as `inspect --spectrum`, wherever a family has any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from weightops.diffusion.compared import curves
from weightops.diffusion.figures import bars, curve
from weightops.diffusion.findings import Finding
from weightops.diffusion.page import Drawing
from weightops.diffusion.tables import Table
from weightops.engine.run import ignore
from weightops.errors import MismatchError, UsageError, listing, printable
from weightops.files.checkpoint import open_checkpoint
from weightops.files.held import Held
from weightops.ops.blocks import blocks
from weightops.ops.fuse import fuse
from weightops.ops.spectra import spectra_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weightops.diffusion.compared import Compared
    from weightops.diffusion.findings import Tick
    from weightops.files.checkpoint import Named

NORMS = "adapter norms"
_MOST_DRAWN = 4  # LoRAs whose blocks are drawn: the last of each run

_SAYS = (
    "‖ΔW‖ is the Frobenius norm of what a LoRA adds to the weights that it changes, at its strength, alpha and rank, "
    "and ‖ΔW‖/‖W‖ the share of those weights' own. It says how much is changed, and where, and not how well: a large "
    "norm may be a strong style or an overtrained LoRA, and a small one in the right place may do all. Of several runs "
    "on one model it shows which went further, and whether a run still moves from checkpoint to checkpoint."
)


@dataclass(slots=True)
class Norm:
    """Of one LoRA or one block of it: how many modules, Σ‖ΔW‖², and Σ‖W‖² where it is known of all of them."""

    modules: int = 0
    delta: float = 0.0
    weight: float | None = 0.0

    def add(self, delta: float, weight: float | None) -> None:
        self.modules += 1
        self.delta += delta**2
        self.weight = None if weight is None or self.weight is None else self.weight + weight**2

    @property
    def delta_norm(self) -> float:
        return math.sqrt(self.delta)

    @property
    def weight_norm(self) -> float | None:
        return None if self.weight is None else math.sqrt(self.weight)

    @property
    def percent(self) -> float | None:
        return None if not self.weight else 100 * math.sqrt(self.delta / self.weight)


@dataclass(slots=True)
class Norms:
    """Of one LoRA: all of it, its blocks in the model's order, and its ranks."""

    whole: Norm = field(default_factory=Norm)
    blocks: dict[str, Norm] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)


def norms_of(one: Compared, base: Named | None, architecture: str | None, warnings: list[str]) -> Norms:
    """The norms of a LoRA at its strength. base: the model, without which no ‖W‖ is known.

    What has no ΔW of a rank is named in `warnings`. Raises MismatchError for a LoRA of another model, FormatError.
    """
    found = Norms()
    if base is not None:
        # Says what is wrong with a LoRA of another model, which one module of it alone cannot.
        fuse(base, (one.file, one.strength), output=Held(one.label), dry_run=True)
    try:
        with open_checkpoint(one.file) as opened:
            # A model that is held in memory is opened as a file is.
            spectra = spectra_of(opened, cast("Any", base), memory=None, threads=None, on_progress=ignore)
    except UsageError as e:
        if e.where != "--spectrum":
            raise
        warnings.append(f"{printable(one.label)}: no norm is known: {e.what}")
        return found
    except MismatchError as e:
        if base is None or e.where != "--base":
            raise
        warnings.append(f"{printable(one.label)}: its norms stand alone: {e.what}")
        return norms_of(one, None, architecture, warnings)
    homes = _homes(one.file, architecture)
    found.blocks = {name: Norm() for name in homes.values()}
    for row in spectra["modules"]:
        delta = abs(one.strength) * row["delta_norm"]
        found.whole.add(delta, row["weight_norm"])
        found.blocks[homes[row["name"]]].add(delta, row["weight_norm"])
        found.ranks.add(row["rank"])
    found.blocks = {name: norm for name, norm in found.blocks.items() if norm.modules}
    if spectra["left_out"]:
        names = listing(entry["name"] for entry in spectra["left_out"])
        reason = spectra["left_out"][0]["reason"]
        warnings.append(f"{printable(one.label)}: modules without a norm: {names}: {reason}")
    return found


def _homes(file: str, architecture: str | None) -> dict[str, str]:
    """Of each module, as the file calls it, its block; blocks in the order of the model."""
    table = blocks(file, architecture=architecture or None)
    return {
        module: holding.name or f"{held.component}, in no block"
        for held in table.components for holding in held.blocks for module in sorted(holding.modules)
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ said


def adapter_norms(
    compared: Sequence[Compared], base: Named | None, architecture: str | None, tick: Tick
) -> Finding:  # fmt: skip
    """Norms of all LoRAs: of each as a whole, and by block. tick: of LoRAs."""
    warnings: list[str] = []
    norms: dict[str, Norms] = {}
    for one in compared:
        norms[one.label] = norms_of(one, base, architecture, warnings)
        tick(1)
    known = base is not None and any(n.whole.percent is not None for n in norms.values())
    note = "At the strengths that were asked for. ‖W‖ is of the weights that a LoRA changes."
    note = note if known else "At the strengths that were asked for. ‖W‖ is not known: --model gives it."
    tables = {"norms": _whole(compared, norms, note)}
    names = _in_order(norms)
    if names:
        tables["norms-by-block"] = _by_block(
            norms, names, "‖ΔW‖ by block", lambda norm: norm.delta_norm, "An empty cell: nothing is changed there."
        )
        if known:
            tables["changes-by-block"] = _by_block(
                norms, names, "‖ΔW‖/‖W‖ by block, in percent", lambda norm: norm.percent,
                "Of the weights of a block that a LoRA changes. An empty cell: nothing is changed there.", 2,
            )  # fmt: skip
    drawings = _drawn(compared, norms, known=known)
    return Finding(NORMS, _SAYS, tables, drawings, {"relative to": "the model" if known else None}, tuple(warnings))


def _whole(compared: Sequence[Compared], norms: Mapping[str, Norms], note: str) -> Table:
    rows = []
    for one in compared:
        found = norms[one.label]
        top = max(found.blocks.items(), key=lambda item: item[1].percent or item[1].delta_norm, default=None)
        there = found.whole.modules > 0
        rows.append((
            one.label, one.strength, found.whole.modules, _ranks(found.ranks),
            found.whole.delta_norm if there else None, found.whole.weight_norm if there else None,
            found.whole.percent, None if top is None else top[0],
        ))  # fmt: skip
    columns = ("LoRA", "strength", "modules", "ranks", "‖ΔW‖", "‖W‖", "‖ΔW‖/‖W‖, %", "most changed block")
    return Table("How much each LoRA changes", columns, tuple(rows), note, 4)


def _ranks(ranks: set[int]) -> str:
    if not ranks:
        return ""
    return str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"


def _in_order(norms: Mapping[str, Norms]) -> list[str]:
    """The blocks of all LoRAs, each LoRA's in the model's order; where they differ, as the first that has them."""
    found: list[str] = []
    for each in norms.values():
        place = 0
        for name in each.blocks:
            if name in found:
                place = found.index(name) + 1
            else:
                found.insert(place, name)
                place += 1
    return found


def _by_block(
    norms: Mapping[str, Norms], names: Sequence[str], title: str, value: Callable[[Norm], float | None], note: str,
    decimals: int = 4,
) -> Table:  # fmt: skip
    rows = [
        (name, *(value(n.blocks[name]) if name in n.blocks else None for n in norms.values())) for name in names
    ]  # fmt: skip
    return Table(title, ("block", *norms), tuple(rows), note, decimals)


def _drawn(compared: Sequence[Compared], norms: Mapping[str, Norms], *, known: bool) -> dict[str, Drawing]:
    """Bars of the blocks of each run's last LoRA; the norms against steps, where these are known."""
    found = {}
    last = {one.run: one for one in sorted(compared, key=lambda c: -1 if c.step is None else c.step)}
    drawable = [one for one in last.values() if norms[one.label].blocks]
    for number, one in enumerate(drawable[:_MOST_DRAWN], 1):
        values = {
            name: (norm.percent if known else norm.delta_norm) or 0.0 for name, norm in norms[one.label].blocks.items()
        }
        x = "‖ΔW‖/‖W‖ in percent" if known else "‖ΔW‖"
        words = f"What {one.label} changes, by block"
        found[f"changes-{number}"] = Drawing(bars(values, title=words, x=x), words)
    lines = curves(compared, lambda c: norms[c.label].whole.delta_norm if norms[c.label].blocks else None, 0.0)
    if lines:
        words = "‖ΔW‖ by steps"
        found["norms"] = Drawing(curve(lines, title=words, x="steps", y="‖ΔW‖"), words)
    return found
