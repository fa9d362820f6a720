"""Principal components of rows that need not fit the memory, their mean removed: the value, and the way to it.

Three ways, of which a plan takes one that fits: by the inner products of the rows (few rows), by the covariance of the
features (few features), both exact; and by turning a random subspace, pass by pass (`subspace`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.diffusion.processes import Processes
from weightops.errors import MemoryRefused
from weightops.synthesis.gram import NO_VARIANCE
from weightops.synthesis.subspace import Found, iterate, orthonormalised, with_signs
from weightops.synthesis.sweep import Sweep, share, unseen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weightops.synthesis.subspace import Keep
    from weightops.synthesis.sweep import Source, Tick

DEFAULT_MEMORY = 2 << 30
ROUTES = ("gram", "covariance", "iteration")
PASSES = 30
TOLERANCE = 1e-6
_BLOCK = 64 << 20  # bytes of rows in float32, at most
_BAND = 16 << 20
_RECKONED = 12  # passes of the iteration, where it is weighed against an exact way
_FAVOUR = 4  # how much more work an exact way may be


@dataclass(frozen=True, slots=True, eq=False)
class Pca:
    """Rows as mean [d] + coefficients @ basis [k, d], orthonormal rows; float32.

    deviations [k]: of the coefficients over the trained members, float64; total: the whole variance of their rows.
    """

    mean: Tensor
    basis: Tensor
    deviations: Tensor
    total: float

    @property
    def components(self) -> int:
        return len(self.basis)

    @property
    def explained(self) -> Tensor:
        """The share of the variance that the first 1, 2, … components have [k]."""
        return self.deviations.square().cumsum(0) / self.total

    def coefficients(self, rows: Tensor) -> Tensor:
        """[..., k] of rows [..., d]."""
        return (rows - self.mean) @ self.basis.mT

    def rows(self, coefficients: Tensor) -> Tensor:
        """[..., d] of coefficients [..., k]; differentiable."""
        return self.mean + coefficients @ self.basis

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        return {"mean": self.mean, "basis": self.basis, "deviations": self.deviations}

    def settings(self) -> dict[str, Any]:
        """For a file's metadata."""
        return {"total": self.total}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Pca:
        """What `tensors` and `settings` gave. Raises KeyError, ValueError."""
        made = Pca(tensors["mean"], tensors["basis"], tensors["deviations"], float(settings["total"]))
        if made.basis.shape != (len(made.deviations), len(made.mean)) or not len(made.basis):
            raise ValueError(f"a basis {list(made.basis.shape)} for a mean of {len(made.mean)}")
        return made


# ------------------------------------------------------------------------------------------------ the plan


class Plan(NamedTuple):
    """route: gram, covariance or iteration. width: of the subspace, of which only the iteration has one.

    held: rows whose products are made together (gram). block: bytes of rows in float32 that are read at a time; band:
    bytes of a part of a large matrix; nbytes: of memory in all, torch itself not counted.
    """

    route: str
    width: int
    held: int
    block: int
    band: int
    nbytes: int


def plan_pca(n: int, d: int, components: int, memory: int) -> Plan:
    """How k ≤ min(n − 1, d) components of n rows of d features are found. Raises MemoryRefused, with what would do."""
    width = min(components + components // 8 + 16, n - 1, d)
    band = max(min(_BAND, memory // 32), 64 * width)
    work = {
        "gram": 2 * n * n * d + 10 * n**3, "covariance": 2 * n * d * d + 10 * d**3,
        "iteration": _RECKONED * 4 * n * d * width,
    }  # fmt: skip
    # An eigendecomposition takes five matrices of its size; the iteration three of its own, and ten small ones. With
    # the result as float64 and float32, and bands in float64.
    result = 24 * components * d + 32 * d
    fixed = {
        "gram": 40 * n * n + result + 8 * n * components, "covariance": 40 * d * d + result,
        "iteration": 24 * d * width + 80 * width * width + 3 * band + 12 * components * d + 32 * d,
    }  # fmt: skip
    # A block's rows as they are read, in float32 and in float64; of the inner products' own, rows that stay, too.
    row = 24 * d
    least = {"gram": fixed["gram"] + min(n, 64) * 8 * d + row, "covariance": fixed["covariance"] + row}
    least["iteration"] = fixed["iteration"] + row
    fitting = [route for route in work if least[route] <= memory]
    if not fitting:
        what = f"{components:,} components of {n:,} rows of {d:,} features take {_mebibytes(min(least.values()))}"
        hint = f"--memory {_mebibytes(min(least.values())).replace(' ', '').replace(',', '')}, or fewer --components"
        raise MemoryRefused("--memory", f"{what}, found {memory / 2**20:,.0f} MiB", hint)
    exact = [route for route in fitting if route != "iteration"]
    if "iteration" in fitting:
        exact = [route for route in exact if work[route] <= _FAVOUR * work["iteration"]]
    route = min(exact, key=work.__getitem__, default="iteration")
    room = memory - fixed[route]
    held = min(n, room // 2 // (8 * d)) if route == "gram" else 0
    block = max(4 * d, min(_BLOCK, (room - held * 8 * d) // 6))
    nbytes = fixed[route] + held * 8 * d + 6 * block
    return Plan(route, width if route == "iteration" else 0, held, block, band, nbytes)


def _mebibytes(nbytes: int) -> str:
    return f"{-(-nbytes // 2**20):,} MiB"


# ------------------------------------------------------------------------------------------------ finding them


def principal(
    source: Source, members: Sequence[int], d: int, components: int, *, memory: int = DEFAULT_MEMORY,
    tolerance: float = TOLERANCE, passes: int = PASSES, seed: int = 0, device: str = "cpu",
    processes: Processes | None = None, keep: Keep | None = None, route: str | None = None, tick: Tick = unseen,
) -> tuple[Found, Plan, int]:  # fmt: skip
    """The first components of the members' rows, the plan by which they were found, and the values that were read.

    Fewer where fewer have any variance. route: another than the plan's. Raises MemoryRefused.
    """
    together = processes or Processes()
    plan = plan_pca(len(members), d, components, memory)
    if route is not None and route != plan.route:
        width = min(components + components // 8 + 16, len(members) - 1, d)
        plan = plan._replace(route=route, width=width, held=len(members))
    sweep = Sweep(source, share(members, together)[1], plan.block, plan.band, device, together, tick)
    if plan.route == "iteration":
        found = iterate(
            sweep, len(members), d, components, plan.width, tolerance=tolerance, passes=passes, seed=seed, keep=keep
        )  # fmt: skip
    else:
        mean = _mean(sweep, d, len(members))
        exact = _by_gram if plan.route == "gram" else _by_covariance
        found = exact(sweep, list(members), mean, components, plan)
    kept = int((found.variances > NO_VARIANCE * found.variances[:1].clamp_min(0)).sum())
    return found._replace(basis=found.basis[:kept], variances=found.variances[:kept]), plan, sweep.values


def _mean(sweep: Sweep, d: int, n: int) -> Tensor:
    import torch

    total = torch.zeros(d, dtype=torch.float64, device=sweep.device)
    for _, rows in sweep.blocks("the mean"):
        total += rows.sum(0, dtype=torch.float64)
    return sweep.summed(total).div_(n)


def _by_covariance(sweep: Sweep, members: list[int], mean: Tensor, components: int, _plan: Plan) -> Found:
    import torch

    d, n = len(mean), len(members)
    square = torch.zeros(d, d, dtype=torch.float64, device=mean.device)
    for _, rows in sweep.blocks("the covariance"):
        apart = rows.double().sub_(mean)
        square.addmm_(apart.mT, apart)
    square = sweep.summed(square).div_(n - 1)
    values, vectors = (sweep.shared(found) for found in torch.linalg.eigh(square))
    basis = vectors.flip(1)[:, :components].mT.contiguous()
    return _exact(mean, basis, values.flip(0)[:components], float(square.trace()), 2)


def _by_gram(sweep: Sweep, members: list[int], mean: Tensor, components: int, plan: Plan) -> Found:
    """By the eigenvectors u of the rows' inner products: a component is Xᵀu over the root of its eigenvalue."""
    import torch

    d, n = len(mean), len(members)
    square = torch.zeros(n, n, dtype=torch.float64, device=mean.device)
    for number, start in enumerate(range(0, n, plan.held)):
        if number % sweep.processes.count == sweep.processes.index:
            tile = slice(start, min(start + plan.held, n))
            held = torch.empty(tile.stop - start, d, dtype=torch.float64, device=mean.device)
            for where, rows in sweep.blocks("inner products", members[tile]):
                held[where] = rows.double().sub_(mean)
            square[tile, tile] = held @ held.mT
            for where, rows in sweep.blocks("inner products", members[tile.stop :]) if tile.stop < n else ():
                beyond = slice(tile.stop + where.start, tile.stop + where.stop)
                square[tile, beyond] = held @ rows.double().sub_(mean).mT
    square = sweep.summed(square)
    values, vectors = (sweep.shared(found) for found in torch.linalg.eigh(square, UPLO="U"))
    values, vectors = values.flip(0)[:components].clamp_min(0), vectors.flip(1)[:, :components]
    kept = values > NO_VARIANCE * values[0]
    values, weights = values[kept], vectors[:, kept] / values[kept].sqrt()
    basis = torch.zeros(d, len(values), dtype=torch.float64, device=mean.device)
    first, _ = share(members, sweep.processes)
    for where, rows in sweep.blocks("components"):
        basis.addmm_(rows.double().sub_(mean).mT, weights[first + where.start : first + where.stop])
    # What squaring took from the small ones' right angles comes back.
    basis, _ = orthonormalised(sweep, sweep.summed(basis))
    return _exact(mean, basis.mT, values / (n - 1), float(square.trace()) / (n - 1), 3)


def _exact(mean: Tensor, basis: Tensor, values: Tensor, total: float, passes: int) -> Found:
    made = with_signs(basis.contiguous())
    return Found(mean.cpu(), made.cpu(), values.clamp_min(0).cpu(), total, passes, 0.0, 0.0)


def as_pca(found: Found) -> Pca:
    """The value, in float32."""
    return Pca(found.mean.float(), found.basis.float().contiguous(), found.variances.sqrt(), found.total)
