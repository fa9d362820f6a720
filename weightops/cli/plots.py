"""Draws pictures: the sizes and errors of `resize --plan`, the spectra of `inspect --spectrum`. Knows no weights.

matplotlib is the extra weightops[plot], imported inside the functions only; pyplot and its windows never are.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import warnings
from typing import TYPE_CHECKING, Any

from weightops.cli.inspection import shared_start
from weightops.errors import OutputError, UsageError, printable, quote
from weightops.files.writer import appeared, check_target, part_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# What each kind of file would say of the hour at which it was made: one picture, the same bytes.
KINDS: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}

# Of Okabe & Ito's palette: told apart by all kinds of eyes, and in grey.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#767676"

_STYLE = {
    "figure.dpi": 150, "savefig.dpi": 150, "figure.constrained_layout.use": True, "font.size": 9,
    "axes.titlesize": 9, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E4E4E4", "grid.linewidth": 0.6,
    "axes.edgecolor": "#9A9A9A", "xtick.color": "#4D4D4D", "ytick.color": "#4D4D4D", "legend.frameon": False,
    "lines.solid_capstyle": "round", "svg.hashsalt": "weightops",
}  # fmt: skip


def check_plot(path: Path, *, force: bool) -> None:
    """Refuse, before any work, a plot that cannot be drawn or written. Raises UsageError, OutputError."""
    if path.suffix.lower() not in KINDS:
        raise UsageError("--plot", f"found {quote(path.name)}, expected a name that ends in {', '.join(KINDS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot", "needs matplotlib", 'pip install "weightops[plot]"') from None
    check_target(path, 0, force=force, inputs=())


def size_curve(points: Sequence[Mapping[str, Any]], path: Path, *, title: str, force: bool) -> None:
    """Size against error, from `resize --plan`: one rank for all modules, and the ranks shared out."""
    with _figure(path, 7, 4.4, title, force=force) as figure:
        _size_curve(figure.subplots(), points)


def spectrum(found: Mapping[str, Any], path: Path, *, title: str, force: bool) -> None:
    """The spectra of an adapter file, from its `inspect` document: singular values, energy, norms beside weights'."""
    said = found["lora"]["spectrum"]
    modules = [m for m in said["modules"] if m["delta_norm"]]
    panels = 3 if said["relative"] is not None else 2
    with _figure(path, 5 * panels - 1, 4.2, title, force=force) as figure:
        axes = figure.subplots(1, panels, squeeze=False)[0]
        values = _stacked([m["singular_values"] for m in modules])
        _singular_values(axes[0], values)
        _energy(axes[1], values)
        if panels == 3:
            _relative(axes[2], said)


# ------------------------------------------------------------------------------------------------ one file


@contextlib.contextmanager
def _figure(path: Path, width: float, height: float, title: str, *, force: bool) -> Iterator[Figure]:
    """An empty figure; what is drawn into it stands whole at `path` in the end, or nothing does."""
    check_plot(path, force=force)
    from matplotlib import style
    from matplotlib.figure import Figure

    # Not the user's own style: the picture is the same everywhere.
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a title in a script that the font lacks
        figure = Figure(figsize=(width, height))
        figure.suptitle(_text(title), x=0.01, ha="left", fontsize=10, fontweight="bold")
        yield figure
        _save(figure, path, force=force)


def _text(name: str) -> str:
    """A name from a file, as it is: no formula, nothing that cannot be shown."""
    return printable(name).replace("\\", "\\\\").replace("$", r"\$")


def _save(figure: Figure, path: Path, *, force: bool) -> None:
    part = part_name(path)
    try:
        figure.savefig(part, format=path.suffix[1:].lower(), metadata=KINDS[path.suffix.lower()])
        if not force and path.exists():
            raise appeared(str(path))
        os.replace(part, path)  # noqa: PTH105 - atomic, and says so
    except OSError as e:
        raise OutputError(str(path), f"cannot be written: {e.strerror or e}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


# ------------------------------------------------------------------------------------------------ sizes


def _size_curve(axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    # Where nothing is cut the error is rounding alone, or none: that is no point of a curve of sizes.
    cut = [p for p in points if p["error"] > 1e-4]
    whole = points[-1]
    same = [(p["bytes"] / 1e6, 100 * p["error"]) for p in cut]
    shared = [(p["shared_bytes"] / 1e6, 100 * p["shared_error"]) for p in cut if p["shared_error"] > 1e-4]
    for line, colour, mark, label in (
        (same, _BLUE, "o", "one rank for all modules"), (shared, _ORANGE, "s", "ranks shared out (--rank size:…)"),
    ):  # fmt: skip
        if line:
            axes.plot(*zip(*line, strict=True), color=colour, marker=mark, markersize=4, linewidth=1.6, label=label)
    axes.set_xscale("log")
    if same and min(y for _, y in same) < 0.2 * max(y for _, y in same):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.axvline(whole["bytes"] / 1e6, color=_GREY, linewidth=0.8, linestyle=(0, (3, 3)))
    axes.annotate(
        f"rank {whole['rank']}: {_plain(whole['bytes'] / 1e6)} MB, nothing cut ", (whole["bytes"] / 1e6, 1),
        xycoords=("data", "axes fraction"), ha="right", va="top", rotation=90, fontsize=8, color=_GREY,
    )  # fmt: skip
    for n, (point, at) in enumerate(zip(cut, same, strict=True)):
        label = f"{point['rank']}" if n else f"rank {point['rank']}"
        axes.annotate(label, at, textcoords="offset points", xytext=(5, 5), fontsize=8, color=_BLUE)
    axes.set(xlabel="size of the file (MB)", ylabel="relative error of all changes (%)")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    if same:
        axes.legend(loc="lower left")


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, 20 …, as numbers and not as powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ------------------------------------------------------------------------------------------------ spectra


def _stacked(rows: Sequence[Sequence[float]]) -> NDArray[Any]:
    """The singular values [modules, ranks]; NaN where a module has no such rank."""
    import numpy as np

    values = np.full((len(rows), max(map(len, rows), default=1)), np.nan)
    for row, given in zip(values, rows, strict=True):
        row[: len(given)] = given
    return values


def _singular_values(axes: Axes, values: NDArray[Any]) -> None:
    """Each module's relative to its largest, and their median."""
    import numpy as np
    from matplotlib.collections import LineCollection

    axes.set_title("singular values, relative to the largest of their module")
    axes.set(xlabel="number of the singular value", yscale="log")
    if not len(values):
        return
    relative = values / values[:, :1]
    relative[~(relative > 0)] = np.nan
    numbers = np.arange(1, relative.shape[1] + 1)
    lines = [np.column_stack([numbers, row])[np.isfinite(row)] for row in relative]
    axes.add_collection(LineCollection(lines, colors=_BLUE, linewidths=0.5, alpha=max(0.08, 5 / (len(lines) + 20))))
    axes.collections[-1].set_rasterized(True)  # hundreds of lines: as curves they would make a file of megabytes
    axes.plot(numbers, _quantiles(relative, 50)[0], color=_ORANGE, linewidth=2, label="median")
    least = float(np.nanpercentile(relative, 0.5))  # a few that are all but zero would press the rest together
    axes.set_ylim(max(least * 0.5, 1e-7), 1.3)
    _ranks(axes, len(numbers))
    axes.legend(loc="lower left")


def _energy(axes: Axes, values: NDArray[Any]) -> None:
    """The share of Σσ² that each rank keeps: the median of the modules, and where four fifths of them lie."""
    import numpy as np

    axes.set_title("energy that a rank keeps")
    axes.set(xlabel="rank", ylabel="% of ‖ΔW‖²")
    if len(values):
        squares = np.nan_to_num(values) ** 2
        kept = 100 * squares.cumsum(1) / squares.sum(1, keepdims=True)
        numbers = np.arange(1, kept.shape[1] + 1)
        low, middle, high = _quantiles(kept, 10, 50, 90)
        axes.fill_between(numbers, low, high, color=_BLUE, alpha=0.2, linewidth=0, label="80 % of the modules")
        axes.plot(numbers, middle, color=_BLUE, linewidth=2, label="median")
        _ranks(axes, len(numbers))
        axes.legend(loc="lower right")
    axes.set_ylim(0, 102)


def _quantiles(values: NDArray[Any], *percent: float) -> Any:
    """Of each column, among those that have one."""
    import numpy as np

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        return np.nanpercentile(values, percent, axis=0)


def _ranks(axes: Axes, most: int) -> None:
    """An axis of ranks 1, 2, 4, 8 …"""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xlim(1, max(most, 2))
    axes.xaxis.set_major_locator(FixedLocator([2**n for n in range(most.bit_length())]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")


def _relative(axes: Axes, said: Mapping[str, Any]) -> None:
    """‖ΔW‖/‖W‖ of each module, from the first of the model to the last, part by part."""
    rows = [(m["name"], 100 * m["relative"]) for m in said["modules"] if m["relative"]]
    rows.sort(key=lambda row: _natural(row[0]))
    values = [value for _, value in rows]
    whole = 100 * said["relative"]
    axes.set_title("‖ΔW‖ relative to ‖W‖, module by module")
    axes.set(xlabel=f"% (line: all together, {_plain(whole)} %)", ylim=(max(len(rows), 1), -1))
    if values and max(values) > 10 * min(values):
        axes.set_xscale("log")
    else:
        axes.set_xlim(0, 1.15 * max([*values, whole]) or 1)
    axes.plot(values, range(len(values)), ".", color=_BLUE, markersize=5, alpha=0.7, markeredgewidth=0)
    axes.axvline(whole, color=_ORANGE, linewidth=1.2)
    _plain_ticks(axes.xaxis)
    axes.grid(visible=False, axis="y")
    _parts(axes, [_part(name) for name, _ in rows])


def _parts(axes: Axes, parts: Sequence[str]) -> None:
    """Lines between the parts of a model, and the names of those that are large enough for one."""
    shared = len(shared_start(parts))
    ticks, names, start = [], [], 0
    for part, group in itertools.groupby(parts):
        count = len(list(group))
        if start:
            axes.axhline(start - 0.5, color="#C8C8C8", linewidth=0.6)
        if count >= 0.04 * len(parts):
            ticks.append(start + (count - 1) / 2)
            names.append(_text(part[shared:] or "modules"))
        start += count
    axes.set_yticks(ticks, names, fontsize=8)
    axes.tick_params(axis="y", length=0)


def _natural(name: str) -> list[tuple[str, int]]:
    """So that block 10 comes after block 9."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d{0,9})", name)]


def _part(name: str) -> str:
    """What stands before the first number of its own: lora_te1_text_model_encoder_layers, lora_unet_down_blocks."""
    return re.split(r"[._]\d+(?![^._])", name, maxsplit=1)[0]
