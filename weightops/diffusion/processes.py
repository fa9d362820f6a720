"""The processes that train together, as torchrun or accelerate started them; alone, there is one. Knows no model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Processes:
    """index: of this process among `count`, and `local` among those on this machine. The first alone writes."""

    index: int = 0
    count: int = 1
    local: int = 0

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, the same bits in each."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce  # type: ignore[import-untyped]

        found: Tensor = reduce(tensor, reduction="sum")
        return found

    def wait(self) -> None:
        """Go on when all are here."""
        if self.count > 1:
            from accelerate import PartialState  # type: ignore[import-untyped]

            PartialState().wait_for_everyone()


def started() -> int:
    """How many processes the launcher says it started."""
    try:
        return max(1, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError:
        return 1


def is_first() -> bool:
    """Is this the process that speaks, as the launcher numbers them?"""
    return os.environ.get("RANK", "0") == "0"


def join(*, cpu: bool) -> Processes:
    """Meet the others. cpu: on processors, by gloo, even where there is a GPU."""
    if started() == 1:
        return Processes()
    from accelerate import PartialState

    # The first may make images, or fill a cache, while the others wait.
    state = PartialState(cpu=cpu, timeout=timedelta(hours=6))
    return Processes(state.process_index, state.num_processes, state.local_process_index)
