"""How many threads torch takes: one for what is small. Whoever computes knows how large its matrices are."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from weightops.diffusion.models import networks

if TYPE_CHECKING:
    from collections.abc import Iterator

# Weights of a network, or numbers of a matrix, up to which a second thread gains nothing that is worth its waiting.
SMALL = 1 << 24


@contextlib.contextmanager
def one_thread(size: int = 0) -> Iterator[None]:
    """One thread of torch's where `size` is at most SMALL; afterwards as many as before.

    Threads that share a tiny product wait for each other longer than it takes, and without end where other programs
    want the cores.
    """
    import torch

    before = torch.get_num_threads()
    if size <= SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def weights_of(pipe: Any) -> int:
    """How many weights a pipeline's networks have."""
    return sum(weight.numel() for network in networks(pipe).values() for weight in network.parameters())
