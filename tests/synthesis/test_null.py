"""The explained variance of noise: the law against drawn noise, and the figure of the source's size."""

from __future__ import annotations

import numpy as np
import pytest

from weightops.synthesis.null import noise_null


@pytest.mark.parametrize(("n", "d", "k"), [(101, 100, 10), (60, 300, 5), (400, 50, 5), (100, 100, 1), (200, 200, 64)])
def test_it_is_what_drawn_noise_shows(n: int, d: int, k: int) -> None:
    found = []
    for seed in range(12):
        noise = np.random.default_rng((seed, n, d)).standard_normal((n, d))
        sizes = np.linalg.svd(noise - noise.mean(0), compute_uv=False) ** 2
        found.append(sizes[:k].sum() / sizes.sum())
    assert noise_null(n, d, k) == pytest.approx(np.mean(found), rel=0.02)


def test_at_the_sources_size_noise_explains_more_than_a_third() -> None:
    assert noise_null(64_974, 99_648, 10_000) == pytest.approx(0.38, abs=0.005)


def test_all_components_explain_all_and_none_nothing() -> None:
    assert noise_null(20, 30, 19) == noise_null(20, 30, 50) == noise_null(50, 3, 3) == 1
    assert noise_null(20, 30, 0) == 0
    grown = [noise_null(20, 30, k) for k in range(20)]
    assert grown == sorted(grown)
    with pytest.raises(ValueError, match="5 components of 1 rows"):
        noise_null(1, 30, 5)
