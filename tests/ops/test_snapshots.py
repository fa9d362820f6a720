"""--ema: the weights of a training's snapshots against a running average and an integral; and the average itself."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from combining import OUT, combined, matrices, weighted
from locon import MODULES, locon, off
from loras import metadata_of, save

from weightops.errors import UsageError
from weightops.ops.snapshots import ema_weights

if TYPE_CHECKING:
    from collections.abc import Sequence


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def nothing_told(count: int) -> list[dict[str, str]]:
    return [{} for _ in range(count)]


def steps(*found: object) -> list[dict[str, str]]:
    return [{"ss_steps": str(step)} for step in found]


def width(power: float) -> float:
    """The standard deviation of a profile t^power of training's time from 0 to 1, by the midpoints of many pieces."""
    times = [(n + 0.5) / 4000 for n in range(4000)]
    mass = math.fsum(t**power for t in times)
    mean = math.fsum(t * t**power for t in times) / mass
    return math.sqrt(math.fsum((t - mean) ** 2 * t**power for t in times) / mass)


def power_of(sigma: float) -> float:
    """The power whose profile has this width, by halving."""
    low, high = 0.0, 200.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if width(middle) > sigma else (low, middle)
    return low


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_a_decay_is_a_running_average(decay: float, count: int) -> None:
    """Of snapshots that are unit vectors, the average is the weights."""
    average = [0.0] * count
    average[0] = 1.0
    for n in range(1, count):
        average = [decay * a for a in average]
        average[n] += 1 - decay
    found = ema_weights(str(decay), nothing_told(count))
    assert found == pytest.approx(average, abs=1e-12)
    assert math.fsum(found) == pytest.approx(1)
    assert ema_weights(str(decay), steps(*(n * n for n in range(1, count + 1)))) == found  # how far apart is no matter
    with pytest.raises(UsageError, match=r"--ema: found snapshots of steps .* expected them in order"):
        ema_weights(str(decay), steps(*range(count, 0, -1)))


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.25])
@pytest.mark.parametrize("told", [None, (100, 150, 400, 1000), (1, 2, 3, 4)], ids=str)
def test_sigma_is_the_integral_of_a_power_between_snapshots(sigma: float, told: Sequence[int] | None) -> None:
    """Of a profile of that width: each snapshot stands for the time since the one before it."""
    found = ema_weights(f"sigma:{sigma}", nothing_told(4) if told is None else steps(*told))
    times = [0, *(told or (1, 2, 3, 4))]
    power = power_of(sigma)
    shares = []
    for before, now in itertools.pairwise(times):
        pieces = 2000
        middle = (before + (n + 0.5) * (now - before) / pieces for n in range(pieces))
        shares.append(math.fsum(t**power for t in middle) * (now - before) / pieces)
    assert found == pytest.approx([share / math.fsum(shares) for share in shares], rel=1e-3, abs=1e-6)
    assert math.fsum(found) == pytest.approx(1)
    assert found[-1] == max(found)


@pytest.mark.parametrize("sigma", [0.05, 0.15, 0.28])
def test_the_weights_of_many_snapshots_have_the_width_that_was_asked_for(sigma: float) -> None:
    weights = ema_weights(f"sigma:{sigma}", nothing_told(2000))
    times = [(n + 0.5) / 2000 for n in range(2000)]
    mean = math.fsum(w * t for w, t in zip(weights, times, strict=True))
    spread = math.fsum(w * (t - mean) ** 2 for w, t in zip(weights, times, strict=True))
    assert math.sqrt(spread) == pytest.approx(sigma, rel=1e-3)


def test_steps_count_where_all_files_have_them() -> None:
    equal = ema_weights("sigma:0.1", nothing_told(3))
    assert ema_weights("sigma:0.1", steps(500, 1000, 1500)) == pytest.approx(equal)
    assert ema_weights("sigma:0.1", [*steps(500, 600), {}]) == equal
    assert ema_weights("sigma:0.1", steps(500, 600, "many")) == equal
    assert ema_weights("sigma:0.1", steps(500, 600, 1500)) != pytest.approx(equal)


@pytest.mark.parametrize(
    ("found", "shown"),
    [((100, 300, 200), "100, 300, 200"), ((100, 100), "100, 100"), ((0, 5), "0, 5"), ((5, "inf"), "5, inf"),
     ((5, "nan"), "5, nan")],
)  # fmt: skip
def test_snapshots_out_of_order_are_refused(found: tuple[Any, ...], shown: str) -> None:
    with pytest.raises(UsageError) as caught:
        ema_weights("sigma:0.1", steps(*found))
    assert str(caught.value) == f"--ema: found snapshots of steps {shown} (ss_steps), expected them in order"


@pytest.mark.parametrize(
    "said",
    ["0", "1", "1.5", "-0.5", "nan", "much", "sigma:0", "sigma:0.289", "sigma:nan", "sigma:", "sigma", "width:0.1",
     ":0.5", ""],
)  # fmt: skip
def test_what_is_no_decay_and_no_width_is_refused(said: str) -> None:
    with pytest.raises(UsageError) as caught:
        ema_weights(said, nothing_told(2))
    assert str(caught.value) == (f"--ema: found {said!r}, expected a decay such as 0.9, or sigma:S with 0 < S < 0.288")


# ------------------------------------------------------------------------------------------------ the average


def snapshots(*told: int) -> list[Path]:
    return [
        save(Path(f"{n}.safetensors"), locon(rank=3, seed=n), {"ss_steps": str(step), "ss_epoch": str(n)})
        for n, step in enumerate(told)
    ]


@pytest.mark.parametrize("said", ["0.7", 0.7, "sigma:0.12"])
def test_the_average_is_of_the_changes_and_not_of_factors(said: str | float) -> None:
    paths = snapshots(100, 250, 300)
    weights = ema_weights(str(said), steps(100, 250, 300))
    report = combined(*paths, ema=said, exact=True)
    goal = weighted(*zip(paths, weights, strict=True))
    assert all(off(goal[name], delta) < 1e-6 for name, delta in matrices().items())
    assert {row["rank"] for row in report.details["modules"]} == {9, 4}  # conv_out has four outputs
    recipe = json.loads(metadata_of(OUT)["weightops"])
    assert recipe["ema"] == str(said)
    assert recipe["strengths"] == pytest.approx(weights)
    assert "ss_steps" not in metadata_of(OUT)
    by_default = combined(*paths, ema=said)
    assert {row["rank"] for row in by_default.details["modules"]} == {3}


def test_an_average_has_no_strengths_and_no_methods() -> None:
    a, b = snapshots(1, 2)
    for words in ({"method": "ties"}, {"compat": "sd-scripts"}):
        with pytest.raises(UsageError, match=r"^--ema: is an average, and stands with no --method and no --compat$"):
            combined(a, b, ema="0.9", **words)
    with pytest.raises(UsageError, match=r"^--ema: makes the strengths, and some are given with the files$"):
        combined(a, (b, 0.5), ema="0.9")
    with pytest.raises(UsageError, match=r"^--ema: found snapshots of steps 2, 1"):
        combined(b, a, ema="sigma:0.1")
    assert not OUT.exists()
    assert len(combined(a, b, ema="0.9").details["modules"]) == len(MODULES)
