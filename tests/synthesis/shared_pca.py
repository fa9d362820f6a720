"""What each of several processes runs for test_pca: components of rows of which it reads its share, and a fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weightops.diffusion.processes import Processes, join
from weightops.synthesis.fit import fit_pca
from weightops.synthesis.pca import ROUTES, principal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Rows:
    """Rows in memory, given in blocks as a space gives them."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def blocks(self, indices: Sequence[int], nbytes: int) -> Iterator[tuple[slice, torch.Tensor]]:
        height = max(1, nbytes // (4 * self.rows.shape[1]))
        for start in range(0, len(indices), height):
            part = indices[start : start + height]
            yield slice(start, start + len(part)), self.rows[list(part)].float()


class Pair(Processes):
    """The first two processes, as if there were no others."""

    __slots__ = ("group",)

    def __init__(self, index: int, group: Any) -> None:
        super().__init__(index, 2, index)
        object.__setattr__(self, "group", group)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        found = tensor.clone()
        torch.distributed.all_reduce(found, group=self.group)  # type: ignore[attr-defined]
        return found


def found_by(processes: Processes, folder: Path) -> None:
    rows = Rows(torch.from_numpy(np.load(folder / "rows.npy")))
    for route in ROUTES:
        # As little memory as will do, for many blocks and tiles.
        found, _, _ = principal(
            rows, range(len(rows.rows)), rows.rows.shape[1], 5, route=route, processes=processes, memory=3 << 20
        )
        made = {"basis": found.basis, "variances": found.variances, "mean": found.mean, "total": found.total}
        np.savez(folder / f"{route}-{processes.count}-{processes.index}.npz", **made)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    processes = join(cpu=True)
    found_by(processes, folder)
    group = torch.distributed.new_group([0, 1])
    if processes.index < 2:
        found_by(Pair(processes.index, group), folder)
    for geometry in ("rows", "delta"):
        output = folder / f"{geometry}.safetensors"
        report = fit_pca(folder / "space", components=4, geometry=geometry, output=output, device="cpu")
        said = [report.process, report.processes, report.explained, report.explained_held_out, report.bytes_written]
        (folder / f"{geometry}-{report.process}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
