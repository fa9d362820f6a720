"""What any conditional model must beat: ridge regression on the condition, the nearest training member, the mean.

Fitted with every model of a space that has conditions. Conditions come as they are, and are standardised here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.errors import FormatError, MismatchError, quote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np
    from torch import Tensor

    Parts = Callable[[], Iterator[tuple[slice, np.ndarray]]]  # features of some members at a time

MOST_FOR_SQUARES = 64  # numbers of a condition, up to which their squares and products are features, too
_PENALTIES = (1e-6, 1e6, 37)  # of the mean eigenvalue of the features: from, to, and how many
_CHUNK = 4096  # members whose features are held at a time


@dataclass(frozen=True, slots=True, eq=False)
class Standard:
    """Mean and deviation of each number of a condition, float64 [c]; a number that never changes has deviation 1."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Standard:
        import numpy as np

        mean, deviation = values.mean(0), values.std(0)
        unchanged = deviation <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
        return cls(mean, np.where(unchanged, 1.0, deviation))

    def __call__(self, values: np.ndarray | Tensor) -> np.ndarray:
        """[..., c], in units of deviations. Raises MismatchError for conditions of another size."""
        import numpy as np

        found = np.asarray(values, dtype=np.float64)
        if found.shape[-1:] != self.mean.shape:
            what = f"found {found.shape[-1] if found.ndim else 0:,} numbers, expected {len(self.mean):,}"
            raise MismatchError("condition", what)
        made: np.ndarray = (found - self.mean) / self.deviation
        return made


# ------------------------------------------------------------------------------------------------ ridge regression


@dataclass(frozen=True, slots=True, eq=False)
class Ridge:
    """Latents as a linear function of features: a condition's numbers and, where they are few, their products.

    standard: of conditions; features: Standard of the features; weights [p, m]; intercept [m]. penalty: λ, chosen by
    the squared error of predicting each training member from the others; left_out: that error, as a share of the
    latents' variance (1: no better than the mean).
    """

    standard: Standard
    features: Standard
    weights: np.ndarray
    intercept: np.ndarray
    penalty: float
    left_out: float

    @property
    def is_quadratic(self) -> bool:
        return len(self.features.mean) > len(self.standard.mean)

    def predict(self, conditions: np.ndarray | Tensor) -> Tensor:
        """Latents [n, m] of conditions [n, c], float32."""
        import torch

        made = self.features(expanded(self.standard(conditions), quadratic=self.is_quadratic))
        return torch.from_numpy(made @ self.weights + self.intercept).float()

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        import torch

        held = {
            "condition-mean": self.standard.mean, "condition-deviation": self.standard.deviation,
            "feature-mean": self.features.mean, "feature-deviation": self.features.deviation,
            "weights": self.weights, "intercept": self.intercept,
        }  # fmt: skip
        return {name: torch.from_numpy(value.copy()) for name, value in held.items()}

    def settings(self) -> dict[str, Any]:
        """For a file's metadata."""
        return {"penalty": self.penalty, "left_out": self.left_out}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], *, where: str = "ridge") -> Ridge:
        """What `tensors` and `settings` gave. Raises FormatError where they are of no ridge regression."""
        try:
            t = {name: tensor.numpy() for name, tensor in tensors.items()}
            made = Ridge(
                Standard(t["condition-mean"], t["condition-deviation"]),
                Standard(t["feature-mean"], t["feature-deviation"]),
                t["weights"], t["intercept"], float(settings["penalty"]), float(settings["left_out"]),
            )  # fmt: skip
            wanted = (made.features.mean.shape[0], made.intercept.shape[0])
            if made.weights.shape != wanted or wanted[0] not in _widths(len(made.standard.mean)):
                raise ValueError(f"its weights are {list(made.weights.shape)}, expected {list(wanted)}")
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise FormatError(where, f"is no whole ridge regression: {quote(str(e))}") from None
        return made


def _widths(c: int) -> tuple[int, int]:
    return c, c + c * (c + 1) // 2


def expanded(standardised: np.ndarray, *, quadratic: bool) -> np.ndarray:
    """The features [n, p] of standardised conditions [n, c]: these, and with `quadratic` each product of two."""
    import numpy as np

    if not quadratic:
        return standardised
    first, second = np.triu_indices(standardised.shape[-1])
    return np.concatenate([standardised, standardised[..., first] * standardised[..., second]], -1)


def fit_ridge(conditions: np.ndarray, latents: Tensor) -> Ridge:
    """Ridge regression of latents [n, m] on conditions [n, c], n ≥ 2, in float64; the intercept is not penalised.

    λ is the best of 37 by leave-one-out: the residual over 1 − h, h the leverage. By eigenvectors of the features'
    p×p products or, with more features than members, of the members' n×n.
    Source: Allen 1974 (PRESS); Golub, Heath & Wahba 1979.
    """
    import numpy as np

    standard = Standard.of(conditions)
    quadratic = conditions.shape[1] <= MOST_FOR_SQUARES
    n = len(conditions)

    def made(rows: slice) -> np.ndarray:
        return expanded(standard(conditions[rows]), quadratic=quadratic)

    features = _standard_of_parts(made, n)

    def parts() -> Iterator[tuple[slice, np.ndarray]]:
        for rows in _slices(n):
            yield rows, features(made(rows))

    target = latents.double().numpy()
    intercept = target.mean(0)
    target = target - intercept
    values, right = _decomposed(parts, n, len(features.mean))
    turned = np.zeros((len(values), target.shape[1]))
    for rows, part in parts():
        turned += (part @ right).T @ target[rows]  # S Uᵀ Y
    low, high, count = _PENALTIES
    penalties = np.geomspace(low, high, count) * (values.mean() if len(values) else 1.0)
    errors = _left_out(parts, target, values, right, turned, penalties)
    best = int(errors.argmin())
    total = float((target**2).sum())
    weights = right @ (turned / (values + penalties[best])[:, None])
    left_out = float(errors[best]) / total if total > 0 else 1.0
    return Ridge(standard, features, weights, intercept, float(penalties[best]), left_out)


def _decomposed(parts: Parts, n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """S² and V [p, r] of the features X = U S Vᵀ, by the smaller of the two Gram matrices."""
    import numpy as np

    if width <= n:
        gram = np.zeros((width, width))
        for _, part in parts():
            gram += part.T @ part
        return _eigen(gram)
    whole = np.concatenate([part for _, part in parts()])
    values, left = _eigen(whole @ whole.T)
    return values, whole.T @ (left / np.sqrt(values))


def _left_out(
    parts: Parts, target: np.ndarray, values: np.ndarray, right: np.ndarray, turned: np.ndarray, penalties: np.ndarray
) -> np.ndarray:
    """The squared error of predicting each member from the others, for each penalty."""
    import numpy as np

    errors = np.zeros(len(penalties))
    for rows, part in parts():
        scores = part @ right  # U S
        for i, penalty in enumerate(penalties):
            shrunk = values + penalty
            left_over = target[rows] - scores @ (turned / shrunk[:, None])
            leverage = 1 / len(target) + (scores**2 / shrunk).sum(1)
            errors[i] += float(((left_over / np.maximum(1 - leverage, 1e-12)[:, None]) ** 2).sum())
    return errors


def _eigen(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues that are more than rounding, and their vectors."""
    import numpy as np

    values, vectors = np.linalg.eigh(gram)
    kept = values > 1e-12 * max(float(values[-1]), 0.0)
    return values[kept], vectors[:, kept]


def _slices(n: int) -> Iterator[slice]:
    for start in range(0, n, _CHUNK):
        yield slice(start, min(start + _CHUNK, n))


def _standard_of_parts(made: Any, n: int) -> Standard:
    """Standard.of the features, of which a part is made at a time: once for the mean, once for the deviation."""
    import numpy as np

    mean = sum(made(rows).sum(0) for rows in _slices(n)) / n
    variance = sum(((made(rows) - mean) ** 2).sum(0) for rows in _slices(n)) / n
    deviation = np.sqrt(variance)
    return Standard(mean, np.where(deviation <= 1e-12 * np.maximum(np.abs(mean), 1e-300), 1.0, deviation))


# ------------------------------------------------------------------------------------------------ nearest neighbour


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """The training members' conditions, standardised [n, c] float64, among which the nearest is sought."""

    standard: Standard
    points: np.ndarray

    def nearest(self, conditions: np.ndarray | Tensor) -> np.ndarray:
        """For each condition [n, c] the position, among the trained, of the member with the nearest one [n]."""
        import numpy as np

        asked = self.standard(conditions)
        found = np.zeros(len(asked), dtype=np.int64)
        for i, point in enumerate(asked):
            # Not by |a|² − 2ab + |b|²: that loses which is nearer where members nearly coincide.
            distances = [((self.points[rows] - point) ** 2).sum(1) for rows in _slices(len(self.points))]
            found[i] = np.concatenate(distances).argmin()
        return found

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        import torch

        held = {
            "condition-mean": self.standard.mean, "condition-deviation": self.standard.deviation, "points": self.points
        }  # fmt: skip
        return {name: torch.from_numpy(value.copy()) for name, value in held.items()}

    def settings(self) -> dict[str, Any]:
        """For a file's metadata."""
        return {}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], *, where: str = "nearest") -> Nearest:
        """What `tensors` gave. Raises FormatError where they are not of one."""
        try:
            t = {name: tensor.numpy() for name, tensor in tensors.items()}
            made = Nearest(Standard(t["condition-mean"], t["condition-deviation"]), t["points"])
            if made.points.ndim != 2 or made.points.shape[1:] != made.standard.mean.shape:
                raise ValueError(f"its points are {list(made.points.shape)}")
        except (KeyError, TypeError, ValueError) as e:
            raise FormatError(where, f"holds no conditions of training members: {quote(str(e))}") from None
        return made


def fit_nearest(conditions: np.ndarray) -> Nearest:
    """Of the trained members' conditions [n, c]."""
    standard = Standard.of(conditions)
    return Nearest(standard, standard(conditions))
