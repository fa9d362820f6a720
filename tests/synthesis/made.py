"""A space of rows as they are given, without LoRA files: for the tests of what is learnt of rows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch

from weightops.synthesis.layout import Layout, Module
from weightops.synthesis.space import CONDITIONS, INDEX, MEMBERS, Space, open_space, rows_path, torch_dtype

if TYPE_CHECKING:
    from pathlib import Path


def made_space(
    folder: Path, rows: torch.Tensor, *, dtype: str = "fp32", form: str = "svd", conditions: np.ndarray | None = None
) -> Space:
    """Rows of one module of rank 1, [d/2, d/2]."""
    folder.mkdir(parents=True)
    n, d = rows.shape
    layout = Layout("sd15", (Module("unet", "made", (d // 2, d - d // 2), 1),))
    columns = None
    if conditions is not None:
        columns = {"names": [f"c{i}" for i in range(conditions.shape[1])], "source": {"kind": "csv"}}
        np.save(folder / CONDITIONS, conditions)
    index = {
        "format": 1, "members": n, "dtype": dtype, "form": form, "layout": layout.to_json(), "conditions": columns,
    }  # fmt: skip
    stored = rows.to(torch_dtype(dtype)).contiguous()
    rows_path(folder, dtype).write_bytes(stored.view(torch.uint8).numpy().tobytes())
    up, down = stored.double().split([d // 2, d - d // 2], 1)
    lines = [
        {"name": f"member-{i}", "hash": f"{i:032x}", "norm": norm}
        for i, norm in enumerate((up.norm(dim=1) * down.norm(dim=1)).nan_to_num().tolist())
    ]
    (folder / MEMBERS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / INDEX).write_text(json.dumps(index))
    return open_space(folder)


def low_dimensional(n: int, d: int, k: int, noise: float = 0.01, seed: int = 0) -> torch.Tensor:
    """Rows that differ in k directions, and in little else."""
    draw = np.random.default_rng((seed, n, d))
    parts = draw.standard_normal((n, k)) @ draw.standard_normal((k, d)) + noise * draw.standard_normal((n, d))
    return torch.from_numpy(parts + draw.standard_normal(d)).float()
