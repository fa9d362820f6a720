"""resize, law 2: what is taken beside inputs and outputs is no more than the plan says, as torch counts it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save
from test_fuse_memory import taken
from torch import Tensor

from weightops.engine.chunks import LARGEST_DEFAULT, smallest_memory
from weightops.errors import MemoryRefused
from weightops.files.checkpoint import open_checkpoint
from weightops.ops.adapter_modules import Base, modules_of, read_own
from weightops.ops.factor_plan import build, scans
from weightops.ops.resize import resize
from weightops.plan import Plan

torch.set_num_threads(1)

MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
KERNEL = "lora_unet_down_blocks_0_resnets_0_conv1"
WEIGHTS = {
    MODULE: "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
    KERNEL: "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
}
TALL, WIDE, KERNELS = (8192, 1536), (640, 2560), (640, 160, 3, 3)

# Large enough that what is the same for every shape, 16 MiB of bands, hides nothing; what takes long, smaller.
CASES = (
    ("lora", TALL), ("lora of many ranks", TALL), ("lora of more ranks than sides", (512, 1280)), ("loha", TALL),
    ("loha of many ranks", (1280, 512)), ("lokr", (512, 1280)), ("factors of lokr", TALL), ("full", WIDE),
    ("dora", (4096, 1280)), ("dora", (4096, 1024)), ("dora", WIDE),
    ("dora of inputs", WIDE), ("dora of loha", WIDE), ("dora of lokr", WIDE),
    ("dora of full", WIDE), ("dora of tucker", KERNELS), ("glora", WIDE), ("oft", WIDE), ("ia3", WIDE),
    ("lora", KERNELS), ("lora of many ranks", KERNELS), ("tucker", KERNELS), ("tucker loha", KERNELS),
    ("tucker lokr", KERNELS), ("full", KERNELS), ("dora", KERNELS), ("dora of inputs", KERNELS),
)  # fmt: skip
NEEDS_BASE = ("dora", "glora", "oft", "ia3")


def adapter(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    out, features, *kernel = shape

    def made(*axes: int) -> Tensor:
        return (0.05 * torch.randn(axes)).to(dtype)

    def lora(rank: int) -> dict[str, Tensor]:
        return {"lora_up.weight": made(out, rank, *[1] * len(kernel)), "lora_down.weight": made(rank, *shape[1:])}

    def loha(rank: int) -> dict[str, Tensor]:
        return {"hada_w1_a": made(out, rank), "hada_w1_b": made(rank, features), "hada_w2_a": made(out, rank),
                "hada_w2_b": made(rank, features)}  # fmt: skip

    def turned(rank: int) -> dict[str, Tensor]:
        return {k: t.mT.contiguous() if k.endswith("_a") else t for k, t in loha(rank).items()}

    first, second = {"lokr_w1": made(8, 8)}, (out // 8, features // 8)
    ones = [1] * len(kernel)
    kinds = {
        "lora": lambda: lora(16),
        "lora of many ranks": lambda: lora(128),
        "lora of more ranks than sides": lambda: lora(800),
        "loha": lambda: loha(6),
        "loha of many ranks": lambda: loha(32),
        "lokr": lambda: {**first, "lokr_w2": made(*second, *kernel)},
        "factors of lokr": lambda: {**first, "lokr_w2_a": made(second[0], 6), "lokr_w2_b": made(6, second[1])},
        "full": lambda: {"diff": made(*shape)},
        "dora": lambda: {**lora(16), "dora_scale": 1 + made(out, 1, *ones)},
        "dora of inputs": lambda: {**lora(16), "dora_scale": 1 + made(1, features, *ones)},
        "dora of lokr": lambda: {**first, "lokr_w2": made(*second), "dora_scale": 1 + made(out, 1)},
        "dora of full": lambda: {"diff": made(*shape), "dora_scale": 1 + made(out, 1)},
        "dora of tucker": lambda: {**kinds["tucker"](), "dora_scale": 1 + made(out, 1, *ones)},
        "dora of loha": lambda: {**loha(6), "dora_scale": 1 + made(out, 1)},
        "glora": lambda: {"a1.weight": made(features, 16), "a2.weight": made(16, features), "b1.weight": made(out, 16),
                          "b2.weight": made(16, features)},
        "oft": lambda: {"oft_blocks": made(out // 64, 64, 64)},
        "ia3": lambda: {"weight": made(1, features), "on_input": torch.tensor(True)},
        "tucker": lambda: {"lora_up.weight": made(out, 16, 1, 1), "lora_down.weight": made(16, features, 1, 1),
                           "lora_mid.weight": made(16, 16, *kernel)},
        "tucker loha": lambda: {**turned(6), "hada_t1": made(6, 6, *kernel), "hada_t2": made(6, 6, *kernel)},
        "tucker lokr": lambda: {**first, "lokr_w2_a": made(6, second[0]), "lokr_w2_b": made(6, second[1]),
                                "lokr_t2": made(6, 6, *kernel)},
    }  # fmt: skip
    name = KERNEL if kernel else MODULE
    return {f"{name}.{part}": tensor for part, tensor in kinds[kind]().items()}


def others() -> dict[str, Tensor]:
    """What tells the architecture."""
    return {"model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.ones(64, 64, 1, 1),
            "model.diffusion_model.input_blocks.0.0.weight": torch.ones(64, 4, 3, 3)}  # fmt: skip


def told(refused: MemoryRefused) -> int:
    """The bytes that would do."""
    found = re.search(r"alone takes ([\d,]+)", str(refused))
    assert found is not None
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize(
    ("kind", "shape", "dtype"),
    [(*case, torch.float16) for case in CASES]
    + [(*case, torch.float32) for case in CASES if case[0] in ("lora of many ranks", "lokr", "full", "dora", "tucker")]
    + [(kind, shape, torch.float8_e4m3fn) for kind, shape in (("lora", TALL), ("tucker", KERNELS), ("full", WIDE))],
    ids=str,
)
def test_working_copies_are_no_more_than_the_plan_says(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of cuts to few ranks and to many, of copies, of what is written whole or side by side, and of the scans."""
    monkeypatch.chdir(tmp_path)
    save(Path("lora.safetensors"), adapter(kind, shape, dtype))
    weight = WEIGHTS[KERNEL if len(shape) > 2 else MODULE]
    save(Path("base.safetensors"), {weight: torch.randn(shape).to(torch.float16)} | others())
    with open_checkpoint("lora.safetensors") as opened, open_checkpoint("base.safetensors") as base:
        model = Base.of(base, 1) if kind.startswith(NEEDS_BASE) else None
        own = modules_of(opened, read_own(opened, architecture="sd15"), base=model)
        (module,), sources = own.modules, (opened, base)
        assert module.of.shape == shape
        own_rank = module.settled(module.of.most)
        variants = [(module, rank) for rank in sorted({8, min(200, module.of.most), own_rank})]
        variants.append((replace(module, exact=True), module.of.most))
        for variant, rank in variants:
            for out in ("keep", "bf16") if rank == own_rank else ("keep",):
                built = build([variant], [rank], sources, dtype=out, seed=0, together=False)
                task = built.tasks[0]
                most = taken(Plan(sources, built.outputs, tuple(built.tasks)), task)
                assert 0 < most <= task.work_nbytes, (rank, variant.exact, out)
        (scan,) = scans([module], sources, "keep")
        assert 0 < taken(Plan(sources, {}, (scan,)), scan) <= scan.work_nbytes


@pytest.mark.parametrize("kind", ["dora", "dora of inputs", "oft"])
def test_the_largest_matrices_of_sdxl_are_cut_in_the_memory_that_is_taken_by_default(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shape = (10240, 1280)
    save(Path("lora.safetensors"), adapter(kind, shape, torch.float16))
    save(Path("base.safetensors"), {WEIGHTS[MODULE]: torch.zeros(shape, dtype=torch.float16)} | others())
    with open_checkpoint("lora.safetensors") as opened, open_checkpoint("base.safetensors") as base:
        own = modules_of(opened, read_own(opened, architecture="sd15"), base=Base.of(base, 1))
        (module,), sources = own.modules, (opened, base)
        for rank in (8, 64, module.of.most - 1):
            built = build([module], [rank], sources, dtype="keep", seed=0, together=False)
            assert smallest_memory(Plan(sources, built.outputs, tuple(built.tasks)))[0] <= LARGEST_DEFAULT
        assert smallest_memory(Plan(sources, {}, tuple(scans([module], sources, "keep"))))[0] <= LARGEST_DEFAULT


@pytest.mark.parametrize("rule", ["energy:1", "energy:0.999999", "8", "size:100KiB"])
@pytest.mark.parametrize("kind", ["lora of many ranks", "dora"])
def test_the_memory_that_is_told_first_suffices(
    kind: str, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all passes, whatever ranks the data ask for; and a dry run tells the same."""
    monkeypatch.chdir(tmp_path)
    shape = (40, 2000)
    save(Path("lora.safetensors"), adapter(kind, shape, torch.float16))
    save(Path("base.safetensors"), {WEIGHTS[MODULE]: torch.randn(shape).half()} | others())
    base = "base.safetensors" if kind == "dora" else None

    def resized(memory: int, *, dry_run: bool) -> None:
        resize("lora.safetensors", rank=rule, base=base, output="out.safetensors", memory=memory, dry_run=dry_run)

    with pytest.raises(MemoryRefused) as refused:
        resized(1, dry_run=True)
    enough = told(refused.value)
    for dry_run in (True, False):
        with pytest.raises(MemoryRefused) as refused:
            resized(enough - 1, dry_run=dry_run)
        assert told(refused.value) == enough
        resized(enough, dry_run=dry_run)
