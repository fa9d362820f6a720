"""How much variance the first components of pure noise explain: what an explained variance is to be read beside."""

from __future__ import annotations

import math

_POINTS = 1 << 18


def noise_null(n: int, d: int, k: int) -> float:
    """The share of the variance that k components have of n rows of d independent normal features, mean removed.

    The eigenvalues of such a sample covariance lie on [(1 − √r)², (1 + √r)²] by Marchenko and Pastur's law, with r the
    smaller of n − 1 and d over the larger. With λ = 1 + r + 2√r cos φ, the share of the eigenvalues above φ is an
    integral of a smooth function (here by the midpoint rule, inverted), and that of the variance (φ − sin φ cos φ)/π.
    The law is that of large n and d; at n = 100 it is right to a percent.
    Source: Marchenko & Pastur 1967; one row less, for the mean takes a degree of freedom.
    """
    import numpy as np

    if n < 2 or d < 1 or k < 0:
        raise ValueError(f"{k} components of {n} rows of {d} features")
    small, large = min(n - 1, d), max(n - 1, d)
    if k >= small:
        return 1.0
    ratio = small / large
    step = math.pi / _POINTS
    middles = (np.arange(_POINTS) + 0.5) * step
    density = (2 / math.pi) * np.sin(middles) ** 2 / (1 + ratio + 2 * math.sqrt(ratio) * np.cos(middles))
    counted = np.concatenate([[0.0], np.cumsum(density) * step])
    edges = np.arange(_POINTS + 1) * step
    angle = float(np.interp(k / small, counted / counted[-1], edges))
    return (angle - math.sin(angle) * math.cos(angle)) / math.pi
