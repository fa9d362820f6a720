"""fuse, law 2: what a block takes beside its inputs and outputs is no more than the plan says, as torch counts it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import save
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from weightops.engine.chunks import block_rows, slot_span, task_rows
from weightops.engine.tensors import as_tensor
from weightops.files.checkpoint import open_checkpoint
from weightops.ops.fuse_plan import Wish, plan_fuse
from weightops.plan import Block, Grain, Plan, Task

torch.set_num_threads(1)

N, RANK = 768, 32
KERNEL = ("convolution", "tucker", "tucker loha")


def adapter(kind: str, n: int) -> dict[str, Tensor]:
    """Of a square matrix, or of a 3 × 3 kernel."""

    def made(*shape: int) -> Tensor:
        return (0.01 * torch.randn(shape)).half()

    up_down = {"lora_up": made(n, RANK), "lora_down": made(RANK, n)}
    kinds = {
        "lora": lambda: up_down,
        "dora": lambda: {**up_down, "dora_scale": 1 + made(n, 1)},
        "dora of inputs": lambda: {**up_down, "dora_scale": 1 + made(1, n)},
        "loha": lambda: {"hada_w1_a": made(n, RANK), "hada_w1_b": made(RANK, n),
                         "hada_w2_a": made(n, RANK), "hada_w2_b": made(RANK, n)},
        "lokr": lambda: {"lokr_w1": made(8, 8), "lokr_w2": made(n // 8, n // 8)},
        "factors of lokr": lambda: {"lokr_w1": made(8, 8), "lokr_w2_a": made(n // 8, 4), "lokr_w2_b": made(4, n // 8)},
        "full": lambda: {"diff": made(n, n)},
        "glora": lambda: {"a1": made(RANK, n), "a2": made(n, RANK), "b1": made(RANK, n), "b2": made(n, RANK)},
        "oft": lambda: {"oft_blocks": made(n // 64, 64, 64)},
        "boft": lambda: {"oft_blocks": made(3, n // 64, 64, 64)},
        "convolution": lambda: {"lora_up": made(n, RANK, 1, 1), "lora_down": made(RANK, n, 3, 3)},
        "tucker": lambda: {"lora_up": made(n, RANK, 1, 1), "lora_down": made(RANK, n, 1, 1),
                           "lora_mid": made(RANK, RANK, 3, 3)},
        "tucker loha": lambda: {"hada_w1_a": made(RANK, n), "hada_w1_b": made(RANK, n), "hada_w2_a": made(RANK, n),
                                "hada_w2_b": made(RANK, n), "hada_t1": made(RANK, RANK, 3, 3),
                                "hada_t2": made(RANK, RANK, 3, 3)},
    }  # fmt: skip
    weighted = ("lora_up", "lora_down", "lora_mid", "a1", "a2", "b1", "b2")
    return {f"lora_unet_proj.{k}{'.weight' if k in weighted else ''}": t for k, t in kinds[kind]().items()}


def taken(plan: Plan, task: Task) -> int:
    """The most bytes of torch's that are alive at once while the first block is computed."""
    rows = task_rows(task)
    block = Block(0, 0, min(block_rows(task), rows))
    inputs, outputs = [], []
    for entry in task.inputs:
        start, stop = slot_span(task, entry.slot, 0, block.stop, shared=entry.shared)
        data = memoryview(bytearray(stop - start))
        plan.sources[entry.source].read_bytes(entry.slot, start, stop, data)
        inputs.append(as_tensor(data, entry.slot.spec, None if entry.shared or task.grain is Grain.TENSOR else rows))
    for slot in task.outputs:
        start, stop = slot_span(task, slot, 0, block.stop, shared=False)
        outputs.append(as_tensor(memoryview(bytearray(stop - start)), slot.spec))
    assert task.compute is not None
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        task.compute(inputs, outputs, block)  # type: ignore[arg-type]
    now = most = 0
    for event in found.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


CASES = [
    *((kind,) for kind in ("lora", "dora", "dora of inputs", "loha", "lokr", "factors of lokr", "full", "glora", "oft",
                           "boft", *KERNEL)),
    ("lora", "lora", "lora"), ("lora", "lokr", "dora"), ("loha", "loha"), ("glora", "glora"),
    ("dora of inputs", "dora of inputs"), ("oft", "full"), ("tucker", "convolution"),
]  # fmt: skip


@pytest.mark.parametrize("seed", [None, 1], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("kinds", CASES, ids=" + ".join)
def test_working_copies_are_no_more_than_the_plan_says(
    kinds: tuple[str, ...], seed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    n = 256 if set(kinds) & set(KERNEL) else N
    shape = (n, n, 3, 3) if set(kinds) & set(KERNEL) else (n, n)
    loras = [save(Path(f"{number}.safetensors"), adapter(kind, n)) for number, kind in enumerate(kinds)]
    scaled = {"proj.scale_weight": torch.tensor(0.01)}
    for stored, dtype, beside in (
        (torch.float16, "keep", {}), (torch.bfloat16, "fp8_e4m3", {}), (torch.float32, "keep", {}),
        (torch.float8_e4m3fn, "keep", scaled), (torch.float8_e4m3fn, "fp16", scaled),
    ):  # fmt: skip
        save(Path("base.safetensors"), {"proj.weight": (0.02 * torch.randn(shape)).to(stored), **beside})
        opened = open_checkpoint("base.safetensors")
        with opened:
            planned, _ = plan_fuse(opened, [open_checkpoint(f) for f in loras], Wish(lambda *_: 0.7, dtype, seed))
            task = next(task for task in planned.plan.tasks if task.needs_torch)
            assert math.prod(shape) > 1 << 18  # several bands
            most = taken(planned.plan, task)
            assert 0 < most <= task.work_nbytes, (stored, dtype)
            for source in planned.plan.sources:
                source.close()
