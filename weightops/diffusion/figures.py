"""Draws curves against steps, and bars of blocks, as PNG or SVG of the same bytes each time. Knows no weights.

matplotlib is imported inside the functions only; pyplot and its windows never are.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
from typing import TYPE_CHECKING, Any, Literal

from weightops.diffusion.extras import need
from weightops.diffusion.tables import write_whole
from weightops.errors import UsageError, printable, quote

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Kind = Literal["png", "svg"]

# What each kind of file would say of the program, and of the hour at which it was made.
_UNSAID: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}

# Of Okabe & Ito's palette, without its yellow: told apart by all kinds of eyes.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
_LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))

# Characters of a name; what is longer loses its middle.
_LONGEST = 60

# Twice the pixels of a page that shows it 100 to the inch.
_STYLE = {
    "figure.dpi": 200, "savefig.dpi": 200, "figure.constrained_layout.use": True, "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#E4E4E4", "grid.linewidth": 0.6, "axes.edgecolor": "#9A9A9A", "xtick.color": "#4D4D4D",
    "ytick.color": "#4D4D4D", "legend.frameon": False, "lines.solid_capstyle": "round", "svg.hashsalt": "weightops",
}  # fmt: skip


def curve(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x: str,
    y: str,
    log: bool = False,
    smooth: int = 0,
    kind: Kind = "png",
    path: Path | None = None,
) -> bytes:
    """Lines by name, each of (xs, ys); NaN and Inf leave a gap.

    log: a logarithmic axis of y, where what is not positive is a gap. smooth: over a faint line of the values, one of
    the means of as many neighbours, half before and half behind. path: written there as well, in the kind of its name.
    Raises UsageError, OutputError.
    """
    for name, (xs, ys) in series.items():
        if len(xs) != len(ys):
            raise ValueError(f"{name}: {len(xs)} values of x, {len(ys)} of y")
    named = len(series) > 1 or (smooth > 1 and len(series) > 0)
    columns = max(1, min(len(series), 90 // (8 + max((min(len(name), _LONGEST) for name in series), default=0))))
    height = 4.2 + 0.165 * max(0, -(-len(series) // columns) - 1)
    with _figure(title, 7, height, _kind(kind, path), path) as (figure, made):
        axes = figure.subplots()
        axes.set(xlabel=_text(x), ylabel=_text(y))
        _whole(axes, all(float(number).is_integer() for xs, _ in series.values() for number in xs))
        if log:
            _logarithmic(axes)
        styles = itertools.product(_LINES, _COLOURS)
        for (name, (xs, ys)), (line, colour) in zip(series.items(), itertools.cycle(styles)):
            _line(axes, _label(name), xs, _drawable(ys, log=log), smooth, {"color": colour, "linestyle": line})
        if named:
            figure.legend(loc="outside lower center", ncols=columns, fontsize=8)
    return made.getvalue()


def bars(
    values: Mapping[str, float], *, title: str, x: str, kind: Kind = "png", path: Path | None = None
) -> bytes:  # fmt: skip
    """A horizontal bar for each name, from above as they are given, with its number; path: as for `curve`."""
    import numpy as np

    with _figure(title, 7, min(0.9 + 0.21 * max(len(values), 2), 60), _kind(kind, path), path) as (figure, made):
        axes = figure.subplots()
        numbers = _drawable(list(values.values()), log=False)
        drawn = axes.barh(range(len(values)), np.nan_to_num(numbers), height=0.7, color=_COLOURS[0])
        axes.bar_label(drawn, [_plain(value) for value in values.values()], padding=3, fontsize=7, color="#4D4D4D")
        axes.set_yticks(range(len(values)), [_text(name) for name in values], fontsize=8)
        axes.set(xlabel=_text(x), ylim=(max(len(values), 1) - 0.4, -0.6))
        axes.margins(x=0.12)
        axes.axvline(0, color="#9A9A9A", linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
    return made.getvalue()


# ------------------------------------------------------------------------------------------------ one picture


@contextlib.contextmanager
def _figure(
    title: str, width: float, height: float, kind: Kind, path: Path | None
) -> Iterator[tuple[Figure, io.BytesIO]]:
    """An empty figure to draw on, and where its bytes are once it is drawn."""
    need("plot", "matplotlib")
    from matplotlib import style
    from matplotlib.figure import Figure

    made = io.BytesIO()
    # Not the user's own style: the picture is the same everywhere.
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height))
        figure.suptitle(_text(title, 70), x=0.01, ha="left", fontsize=10, fontweight="bold")
        yield figure, made
        figure.savefig(made, format=kind, metadata=_UNSAID[kind])
    if path is not None:
        write_whole(path, made.getvalue())


def _kind(kind: Kind, path: Path | None) -> Kind:
    if path is None:
        return kind
    for known in ("png", "svg"):
        if path.suffix.lower() == f".{known}":
            return known
    raise UsageError(str(path), f"found the name {quote(path.name)}, expected one that ends in .png or .svg")


def _text(name: str, limit: int = _LONGEST) -> str:
    """A name as it is: no formula, nothing that cannot be shown, a box for what the font lacks, of bounded length."""
    shown = printable(name)
    if len(shown) > limit:
        shown = f"{shown[: limit // 2 - 1]} … {shown[-(limit // 2 - 2) :]}"
    known = _characters()
    shown = "".join(c if ord(c) in known else "□" for c in shown)
    return shown.replace("$", r"\$")


@functools.cache
def _characters() -> frozenset[int]:
    """What matplotlib's own font can draw; of anything else it would warn."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap())


# ------------------------------------------------------------------------------------------------ what is drawn


def _line(axes: Axes, name: str, xs: Sequence[float], ys: NDArray[Any], smooth: int, look: Mapping[str, Any]) -> None:
    few: dict[str, Any] = {"marker": "o", "markersize": 4} if len(ys) <= 40 else {}
    if smooth > 1:
        axes.plot(xs, ys, linewidth=0.8, alpha=0.3, **look)
        axes.plot(xs, _smoothed(ys, smooth), linewidth=1.8, label=f"{name}, mean of {smooth:,}", **look)
    else:
        axes.plot(xs, ys, linewidth=1.6, label=name, **few, **look)


def _label(name: str) -> str:
    """A name for the legend, which leaves out whatever begins with an underscore."""
    return _text(f" {name}" if name.startswith("_") else name)


def _whole(axes: Axes, whole: bool) -> None:
    """No half of a step on the axis of steps."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=whole))


def _logarithmic(axes: Axes) -> None:
    """1, 2, 5, 10, 20 …, as numbers and not as powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def _drawable(values: Sequence[float], *, log: bool) -> NDArray[Any]:
    import numpy as np

    numbers = np.array(values, dtype=np.float64)
    numbers[~np.isfinite(numbers) | ((numbers <= 0) if log else False)] = np.nan
    return numbers


def _smoothed(values: NDArray[Any], count: int) -> NDArray[Any]:
    """Of each value the mean of it and its neighbours, `count` of them where there are so many; a gap stays one."""
    import numpy as np

    there = np.isfinite(values)
    sums = np.concatenate([[0.0], np.nan_to_num(values).cumsum()])
    counts = np.concatenate([[0], there.cumsum()])
    places = np.arange(len(values))
    first = np.maximum(places - (count - 1) // 2, 0)
    last = np.minimum(places + count // 2 + 1, len(values))
    means = (sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1)
    return np.where(there, means, np.nan)


def _plain(value: float) -> str:
    return "not a number" if value != value else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
