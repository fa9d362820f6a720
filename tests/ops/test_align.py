"""Models that spell the same tensors otherwise merge as if they did not; the output is spelled as the first."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import save
from safetensors.torch import load_file
from torch import Tensor

import weightops
from weightops.files.checkpoint import open_checkpoint
from weightops.naming.identify import identify

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))

from tagged import from_canonical, needs_lists, shapes_of, to_canonical

NOT_WEIGHTS = ("alphas", "betas", "sqrt", "log_", "posterior", "model_ema", "edm", "v_pred", "ztsnr")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# A run of blocks that are all alike, and the number of one.
ALIKE = re.compile(
    r"(.*(?:transformer_blocks|resblocks|double_blocks|single_blocks|joint_blocks|\blayers|^blocks))\.(\d+)\."
)


def tiny(name: str) -> dict[str, tuple[int, ...]]:
    """The list's names, of blocks that are alike the first two and the last, every width a 64th of the real one."""
    shapes = {k: tuple(n if n <= 8 else n // 64 for n in s) for k, s in shapes_of(name).items()}
    shapes = {k: s for k, s in shapes.items() if not k.startswith(NOT_WEIGHTS) and "logit_scale" not in k and all(s)}
    numbers = {k: (found[1], int(found[2])) for k in shapes if (found := ALIKE.match(k))}
    last: dict[str, int] = {}
    for run, number in numbers.values():
        last[run] = max(number, last.get(run, 0))
    return {k: s for k, s in shapes.items() if k not in numbers or numbers[k][1] in (0, 1, last[numbers[k][0]])}


def random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).half() for key, shape in shapes.items()}


def respelled(path: str, spelling: dict[str, str]) -> dict[str, dict[str, Tensor]]:
    """The components of a file, each in another spelling, by the tests' own arithmetic."""
    tensors, found = load_file(path), {}
    with open_checkpoint(path) as opened:
        for component, part in identify(opened.tensors).parts.items():
            assert part.match is not None
            name = part.match.network.name
            own = {body: tensors[key] for key, body in part.bodies.items()}
            canonical = to_canonical(name, part.match.spelling, own)
            target = spelling.get(component, part.match.network.canonical)
            found[component] = {k: t.contiguous() for k, t in from_canonical(name, target, canonical).items()}
    return found


def folder(name: str, components: dict[str, dict[str, Tensor]]) -> str:
    index = {"_class_name": "Pipeline"} | {component: ["diffusers", "AModel"] for component in components}
    for component, tensors in components.items():
        (Path(name) / component).mkdir(parents=True)
        save(Path(name) / component / "model.safetensors", tensors)
    (Path(name) / "model_index.json").write_text(json.dumps(index))
    return name


def alike(found: str, expected: str, *, but: str = "\0") -> None:
    a, b = load_file(found), load_file(expected)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key]) and not key.startswith(but)] == []


@needs_lists
@pytest.mark.parametrize("name", ["sdmecha_sdxl-sgm", "sdmecha_sd1-ldm"])
def test_a_diffusers_folder_merges_into_a_single_file_as_its_twin_would(name: str) -> None:
    """Packed in_proj, the transposed projection, 1x1 convolutions and blocks of other numbers among them."""
    for label, seed in (("a", 1), ("b", 2)):
        save(Path(f"{label}.safetensors"), random(tiny(name), seed))
    folder("f", respelled("b.safetensors", {}))
    weightops.merge("a.safetensors", "b.safetensors", alpha=0.3, output="ab.safetensors")
    report = weightops.merge("a.safetensors", "f", alpha=0.3, output="af.safetensors", verify=True)
    alike("af.safetensors", "ab.safetensors")
    assert report.account.kept == []
    assert {u.asked for u in report.account.unused} == {True}  # the VAE, which is the first model's
    weightops.merge("a.safetensors", "b.safetensors", vae=2, output="ab2.safetensors")
    weightops.merge("a.safetensors", "f", vae=2, output="af2.safetensors")
    alike("af2.safetensors", "ab2.safetensors")
    weightops.merge("a.safetensors", "b.safetensors", vae="b.safetensors", output="ab3.safetensors")
    weightops.merge("a.safetensors", "b.safetensors", vae="f", output="ab4.safetensors")
    alike("ab4.safetensors", "ab3.safetensors")


@needs_lists
@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("orig_flux_dev_bfl", "diffusers"),
        ("orig_flux_dev_bfl", "comfy"),
        ("diffusers_flux_dev", "original"),
        ("orig_sd3_medium", "diffusers"),
        ("orig_wan21_t2v_1_3b", "diffusers"),
        ("orig_comfy_z_image", "diffusers"),
        ("diffusers_z_image", "comfy"),
        ("orig_comfy_lumina2", "diffusers"),
        ("orig_hunyuan_video_tencent", "comfy"),
        ("orig_wan21_vae", "diffusers"),
        ("toolkit_VAE-v1-SD", "diffusers"),
    ],
)
def test_one_network_merges_with_itself_in_another_spelling(name: str, spelling: str) -> None:
    """Packed projections of either side, swapped halves and bands of uneven heights among them."""
    for label, seed in (("a", 1), ("b", 2)):
        save(Path(f"{label}.safetensors"), random(tiny(name), seed))
    (component,) = respelled("b.safetensors", {})
    other = respelled("b.safetensors", {component: spelling})[component]
    save(Path("c.safetensors"), other)
    assert other.keys() != load_file("b.safetensors").keys()
    weightops.merge("a.safetensors", "b.safetensors", alpha=0.3, output="ab.safetensors")
    report = weightops.merge("a.safetensors", "c.safetensors", alpha=0.3, output="ac.safetensors", verify=True)
    alike("ac.safetensors", "ab.safetensors")
    assert (report.account.kept, report.account.unused) == ([], [])


@needs_lists
def test_a_difference_takes_three_spellings_and_any_memory_and_threads() -> None:
    for label, seed in (("a", 1), ("b", 2), ("c", 3)):
        save(Path(f"{label}.safetensors"), random(tiny("orig_flux_dev_bfl"), seed))
    (component,) = respelled("b.safetensors", {})
    save(Path("d.safetensors"), respelled("b.safetensors", {component: "diffusers"})[component])
    save(Path("e.safetensors"), respelled("c.safetensors", {component: "comfy"})[component])
    weightops.merge("a.safetensors", "b.safetensors", base="c.safetensors", alpha=0.5, output="abc.safetensors")
    for memory, threads in ((64 << 20, 1), (256 << 20, 3)):
        weightops.merge(
            "a.safetensors", "d.safetensors", base="e.safetensors", alpha=0.5, output="ade.safetensors",
            memory=memory, threads=threads, force=True,
        )  # fmt: skip
        alike("ade.safetensors", "abc.safetensors")


@needs_lists
def test_a_band_that_one_model_lacks_keeps_the_packed_tensor_of_the_first() -> None:
    for label, seed in (("a", 1), ("b", 2)):
        save(Path(f"{label}.safetensors"), random(tiny("orig_flux_dev_bfl"), seed))
    (component,) = respelled("b.safetensors", {})
    other = respelled("b.safetensors", {component: "diffusers"})[component]
    del other["transformer_blocks.1.attn.to_k.weight"]
    save(Path("c.safetensors"), other)
    report = weightops.merge("a.safetensors", "c.safetensors", output="ac.safetensors")
    assert report.account.kept == [("double_blocks.1.img_attn.qkv.weight", "not in c.safetensors")]
    assert {u.key: u.reason for u in report.account.unused} == {
        "transformer_blocks.1.attn.to_q.weight": "kept from a.safetensors",
        "transformer_blocks.1.attn.to_v.weight": "kept from a.safetensors",
    }


@needs_lists
def test_a_diffusers_folder_that_comes_first_makes_a_folder() -> None:
    """Its settings, scheduler and tokenizers go with it, byte for byte; a file is made where one is named."""
    for label, seed in (("a", 1), ("b", 2)):
        save(Path(f"{label}.safetensors"), random(tiny("sdmecha_sd1-ldm"), seed))
    folder("f", respelled("a.safetensors", {}))
    Path("f/unet/config.json").write_text('{"x": 1}\n')
    for part in ("scheduler", "tokenizer"):
        Path("f", part).mkdir()
    Path("f/scheduler/scheduler_config.json").write_text('{"y": 2}')
    Path("f/tokenizer/vocab.json").write_text("{}")
    index = json.loads(Path("f/model_index.json").read_text())
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    Path("f/model_index.json").write_text(json.dumps(index))
    weightops.merge("f", "b.safetensors", alpha=0.3, output="one.safetensors")
    report = weightops.merge("f", "b.safetensors", alpha=0.3, verify=True)
    assert report.output == "f+b-0.3"
    assert sorted(p.relative_to("f+b-0.3").as_posix() for p in Path("f+b-0.3").rglob("*") if p.is_file()) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    for small in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"):
        assert Path("f+b-0.3", small).read_bytes() == Path("f", small).read_bytes()
    one = load_file("one.safetensors")
    for component in ("unet", "vae", "text_encoder"):
        (path,) = Path("f+b-0.3", component).glob("*.safetensors")
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, one.pop(f"{component}.{name}"))
    assert one == {}
