"""What a fit of components reports, and what it warns of."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.synthesis.null import noise_null
from weightops.synthesis.space import WIDTHS

if TYPE_CHECKING:
    from pathlib import Path

    from weightops.synthesis.fitted import Fitted
    from weightops.synthesis.space import Space

_NEAR_NOISE = 1.1  # times the null: what is less is hardly more than noise


@dataclass(slots=True)
class FitReport:
    """What was fitted, and how well. explained: of the trained members' variance; noise_null: what as many components
    explain of pure noise of this size; explained_held_out: of the held-out members' distance from the trained mean.

    route: gram, covariance (exact) or iteration, of `passes` over the rows; reached: a bound of the sine of the angle
    to the true subspace; change: of `explained` in the last pass, as a share. left_out: the share of the latents'
    variance that ridge regression on the condition leaves, each member predicted from the others. process: 0, or
    which of several this was: the first one alone wrote.
    """

    kind: str
    space: str
    output: str
    geometry: str
    form: str
    members: int
    trained: int
    held_out: int
    features: int
    components: int
    explained: float
    noise_null: float
    explained_held_out: float | None
    route: str
    passes: int
    reached: float
    change: float
    left_out: float | None
    seed: int
    resumed_at: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    warnings: list[str] = field(default_factory=list)
    device: str = ""
    processes: int = 1
    process: int = 0
    memory_bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that scripts may rely on."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "process"}
        return {"command": "synth fit", "version": __version__, "inputs": [{"path": self.space}], **found}


@dataclass(frozen=True, slots=True)
class Course:
    """How the components came about: see FitReport."""

    route: str
    passes: int
    reached: float
    change: float
    total_values: int
    memory: int
    explained_held_out: float | None


def reported(
    space: Space, fitted: Fitted, course: Course, target: Path, asked: int, tolerance: float
) -> FitReport:  # fmt: skip
    n, components = len(fitted.trained), fitted.components
    # ΔW has as many numbers as the weights; of noise in all of them the components would explain less than of rows.
    features = space.width
    if fitted.geometry == "delta":
        features = sum(module.out * module.n for module in space.layout.modules)
    report = FitReport(
        "pca", space.label, str(target), fitted.geometry, space.form, len(space), n, len(fitted.held_out), features,
        components, float(fitted.explained[-1]), noise_null(n, features, components), course.explained_held_out,
        course.route, course.passes, course.reached, course.change,
        None if fitted.ridge is None else fitted.ridge.left_out, fitted.seed,
        bytes_read=course.total_values * WIDTHS[space.dtype], memory_bytes=course.memory,
    )  # fmt: skip
    report.warnings = _warnings(report, asked, tolerance)
    return report


def _warnings(report: FitReport, asked: int, tolerance: float) -> list[str]:
    said = []
    if report.components < asked:
        what = f"only {report.components:,} of {asked:,} components have any variance: the rest is left out"
        said.append(f"{report.space}: {what}")
    if report.explained < _NEAR_NOISE * report.noise_null:
        what = f"{report.explained:.3f} of the variance is explained, and pure noise of this size has "
        what += f"{report.noise_null:.3f}: these components are hardly more than noise"
        said.append(f"{report.space}: {what}")
    if report.form == "raw" and report.geometry == "rows":
        what = "its rows are as the files have them: explained variance says nothing across gauges, and means of "
        what += "rows may be no LoRA at all; collect with --form aligned"
        said.append(f"{report.space}: {what}")
    if report.reached > tolerance:
        what = f"after {report.passes} passes the components are sure to {report.reached:.1e} (a sine), asked "
        what += f"{tolerance:.1e}; explained variance changed by {report.change:.1e} of itself in the last one. "
        what += "More --passes bring it nearer, where the variances fall behind the last component"
        said.append(f"{report.space}: {what}")
    return said
