"""Pictures and tables of spectra and sizes: what is drawn, what is refused before the work, nothing half-written."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from commandline import harmful, weightops_here
from loras import MODULE, Maker, kohya_file, named, save

import weightops
from weightops.cli import plots, render
from weightops.cli.inspection import fitted, shared_start
from weightops.errors import OutputError, UsageError
from weightops.ops.report import Account, Report

if TYPE_CHECKING:
    from collections.abc import Mapping

STARTS = {"a.png": b"\x89PNG\r\n\x1a\n", "a.svg": b"<?xml", "a.pdf": b"%PDF-", "A.PNG": b"\x89PNG\r\n\x1a\n"}
every_kind = pytest.mark.parametrize("name", STARTS)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def points() -> list[dict[str, Any]]:
    """As `resize --plan` has them."""
    return [
        {"rank": rank, "bytes": 40_000 * rank, "error": error, "shared_error": error * 0.8,
         "shared_bytes": 39_000 * rank, "shared_ranks": [0 if rank == 1 else rank, 2 * rank if rank < 8 else rank]}
        for rank, error in ((1, 0.6), (2, 0.3), (4, 0.05), (8, 1e-8))
    ]  # fmt: skip


def found(parts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An inspection with a spectrum, and relative norms."""
    make = Maker()
    parts = parts or {MODULE.format(name): make.lora(16, 16, 4, 2.0) for name in "qkv"}
    document = weightops.inspect(save(Path("lora.safetensors"), named(parts)), spectrum=True).to_dict()
    said = document["lora"]["spectrum"]
    for number, row in enumerate(said["modules"]):
        row["weight_norm"], row["relative"] = 1.0, row["delta_norm"] * 10.0**-number
    said["relative"] = 0.5
    return document


# ------------------------------------------------------------------------------------------------ pictures


@every_kind
def test_a_plot_is_of_the_kind_that_its_name_says_and_the_same_each_time(name: str) -> None:
    path = Path(name)
    plots.size_curve(points(), path, title="a $x^2$ \\ 猫 \x1b[31m.safetensors", force=False)
    first = path.read_bytes()
    assert first.startswith(STARTS[name])
    plots.size_curve(points(), path, title="a $x^2$ \\ 猫 \x1b[31m.safetensors", force=True)
    assert path.read_bytes() == first
    plots.spectrum(found(), path, title="$", force=True)
    assert path.read_bytes().startswith(STARTS[name])
    assert sorted(p.name for p in Path().iterdir()) == sorted([name, "lora.safetensors"])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_curve_of_few_points_is_drawn(count: int) -> None:
    plots.size_curve(points()[-count:], Path("a.png"), title="few", force=False)
    assert Path("a.png").read_bytes().startswith(STARTS["a.png"])


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_unet_a": Maker().lora(8, 8, 1)},
        {"lora_unet_a": {".diff": Maker()(3, 500)}, "lora_unet_1": Maker().lora(8, 8, 3)},
        {"lora_unet_a": {".diff": Maker()(3, 5) * 0}},
        {"lora_unet_$a$": Maker().lora(8, 8, 1), "lora_unet_b_2_c": Maker().lora(8, 8, 1)},
    ],
    ids=["one rank", "several sizes", "zeros", "odd names"],
)
def test_odd_spectra_are_drawn(parts: dict[str, Any]) -> None:
    document = found(parts)
    plots.spectrum(document, Path("a.png"), title="odd", force=False)
    document["lora"]["spectrum"]["relative"] = None
    plots.spectrum(document, Path("a.png"), title="odd", force=True)
    assert Path("a.png").read_bytes().startswith(STARTS["a.png"])


def test_a_plot_that_cannot_be_drawn_or_written_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, *, force: bool = False) -> tuple[type, str, str | None]:
        with pytest.raises((UsageError, OutputError)) as told:
            plots.check_plot(Path(name), force=force)
        return type(told.value), str(told.value), told.value.hint

    Path("a.png").write_bytes(b"mine")
    assert refused("a.jpg") == (
        UsageError, "--plot: found 'a.jpg', expected a name that ends in .png, .svg, .pdf", None,
    )  # fmt: skip
    assert refused("a.png") == (OutputError, "a.png: exists", "choose another name, or replace it with --force")
    assert refused("no/a.png", force=True) == (OutputError, "no/a.png: the folder 'no' does not exist", "make it first")
    plots.check_plot(Path("a.png"), force=True)
    plots.check_plot(Path("new.svg"), force=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused("new.png") == (UsageError, "--plot: needs matplotlib", 'pip install "weightops[plot]"')
    assert Path("a.png").read_bytes() == b"mine"


def test_a_plot_that_fails_leaves_nothing_and_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    Path("a.png").write_bytes(b"mine")

    def fails(_figure: Figure, part: Path, **_: Any) -> None:
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fails)
    for name, force in (("a.png", True), ("b.png", False)):
        with pytest.raises(OutputError, match=f"{name}: cannot be written: No space left on device"):
            plots.size_curve(points(), Path(name), title="t", force=force)
    assert {p.name: p.read_bytes() for p in Path().iterdir()} == {"a.png": b"mine"}


# ------------------------------------------------------------------------------------------------ the command


def test_inspect_draws_the_table_and_the_picture() -> None:
    kohya_file(Path("a.safetensors"), [4, 8, 2], [2.0, 8.0, 1.0], {})
    done = weightops_here("inspect", "a.safetensors", "--spectrum", "--plot", "a.png")
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    at = next(n for n, line in enumerate(lines) if line[:1] == ["module"])
    assert lines[at] == ["module", "rank", "effective", "%", "in", "4", "‖ΔW‖"]
    norms = [float(line[-1]) for line in lines[at + 1 : at + 4]]
    assert norms == sorted(norms, reverse=True)
    assert lines[at + 4][:2] == ["all", "3"]
    assert any(line[:3] == ["medians:", "effective", "rank"] for line in lines)
    assert lines[-1][:2] == ["wrote", "a.png"]
    assert Path("a.png").read_bytes().startswith(STARTS["a.png"])
    assert harmful(done.out) == set()
    done = weightops_here("inspect", "a.safetensors", "--spectrum", "--json")
    assert len(json.loads(done.out)["lora"]["spectrum"]["modules"]) == 3


def test_of_many_modules_the_table_has_those_that_change_most_unless_all_are_asked_for() -> None:
    make = Maker()
    save(Path("a.safetensors"), named({f"lora_unet_blocks_{n}": make.lora(8, 8, 2, n + 1.0) for n in range(30)}))
    done = weightops_here("inspect", "a.safetensors", "--spectrum")
    assert done.out.count("lora_unet_blocks_") == 20 + 5  # and five that no known model has, by name
    assert "(the 20 that change most; -v shows all 30)" in done.out
    assert weightops_here("inspect", "a.safetensors", "--spectrum", "-v").out.count("lora_unet_blocks_") == 30 + 30


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--plot", "a.png"], "--plot: draws what --spectrum finds"),
        (["--base", "b.safetensors"], "--base: is what --spectrum measures by"),
        (["b.safetensors", "--spectrum", "--plot", "a.png"], "--plot: draws one file, found 2"),
        (["--spectrum", "--plot", "a.gif"], "--plot: found 'a.gif', expected a name that ends in .png, .svg, .pdf"),
        (["--spectrum", "--plot", "there.png"], "there.png: exists"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_wrong_use_is_refused_before_the_file_is_read(words: list[str], said: str) -> None:
    Path("there.png").write_bytes(b"mine")
    Path("a.safetensors").write_bytes(b"no weights")
    done = weightops_here("inspect", "a.safetensors", *words)
    assert done.code == (1 if "exists" in said else 2)
    assert done.err.splitlines()[0] == f"error: {said}"
    assert [p.name for p in Path().glob("*.png")] == ["there.png"]


def test_names_that_are_too_long_lose_what_all_have_and_then_their_middle() -> None:
    names = ["lora_unet_down_blocks_0_attn_to_q", "lora_unet_up_blocks_1_attn_to_k"]
    assert fitted(names, 40, whole=False) == names
    assert fitted(names, 23, whole=False) == ["down_blocks_0_attn_to_q", "up_blocks_1_attn_to_k"]
    assert fitted(names, 13, whole=False) == ["down_b…n_to_q", "up_blo…n_to_k"]
    assert fitted(names, 13, whole=True) == names
    assert fitted(["a_long_name"], 7, whole=False) == ["a_l…ame"]
    assert shared_start(["a.b.c", "a.b.d", "a.b.cd"]) == "a.b."
    assert shared_start([]) == shared_start(["a.b", "a.b"]) == shared_start(["ab", "ac"]) == ""


def test_a_plan_of_sizes_is_a_table_and_says_nothing_of_a_file_that_was_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    inputs = [{"path": "a.safetensors", "hash": None, "bytes": 320_000}]
    report = Report("resize", inputs, None, Account(), "a: 3 modules", [], [], dry_run=True, details={"plan": points()})
    render.report(report, verbose=False)
    out = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    at = rows.index("rank for all size error shared out: error ranks")
    assert rows[at + 1 : at + 5] == [
        "1 40.0 kB 60.00 % 48.00 % 0 to 2",
        "2 80.0 kB 30.00 % 24.00 % 2 to 4",
        "4 160.0 kB 5.00 % 4.00 % 4 to 8",
        "8 320.0 kB 0.00 % 0.00 % 8",
    ]
    assert not any(word in out for word in ("wrote", "would", "unused"))
