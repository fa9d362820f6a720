"""Adapters of packed projections: taken apart, put together, and back; ΔW stays, and every bit that is not folded."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from loras import Maker, convert, delta, deltas, metadata_of, modules_of, named, raw, save, tensors_of

from weightops.errors import MismatchError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

H = 8


class Pack(NamedTuple):
    """A packed module as a dialect calls it, and the modules that it packs: diffusers' names and heights."""

    architecture: str
    dialect: str
    module: str
    parts: dict[str, int]
    features: int = H

    def rows(self) -> int:
        return sum(self.parts.values())

    def cut(self, tensor: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.parts, tensor.split(list(self.parts.values())), strict=True))


_DOUBLE, _SINGLE = "transformer.transformer_blocks.0.attn", "transformer.single_transformer_blocks.1"
_QKV = {f"{_DOUBLE}.to_q": H, f"{_DOUBLE}.to_k": H, f"{_DOUBLE}.to_v": H}
_ADDED = {f"{_DOUBLE}.add_q_proj": H, f"{_DOUBLE}.add_k_proj": H, f"{_DOUBLE}.add_v_proj": H}
_LINEAR1 = {
    f"{_SINGLE}.attn.to_q": H,
    f"{_SINGLE}.attn.to_k": H,
    f"{_SINGLE}.attn.to_v": H,
    f"{_SINGLE}.proj_mlp": 4 * H,
}
_LAYER = "transformer.layers.3"
PACKS = {
    "Flux, image": Pack("flux", "kohya", "lora_unet_double_blocks_0_img_attn_qkv", _QKV),
    "Flux, text": Pack("flux", "kohya", "lora_unet_double_blocks_0_txt_attn_qkv", _ADDED),
    "Flux, single": Pack("flux", "kohya", "lora_unet_single_blocks_1_linear1", _LINEAR1),
    "Flux, ComfyUI": Pack("flux", "comfy", "diffusion_model.single_blocks.1.linear1", _LINEAR1),
    "HunyuanVideo": Pack("hunyuan_video", "kohya", "lora_unet_double_blocks_0_img_attn_qkv", _QKV),
    "HunyuanVideo, single": Pack("hunyuan_video", "kohya", "lora_unet_single_blocks_1_linear1", _LINEAR1),
    "Z-Image": Pack(
        "z_image", "comfy", "diffusion_model.layers.3.attention.qkv",
        {f"{_LAYER}.attention.to_q": H, f"{_LAYER}.attention.to_k": H, f"{_LAYER}.attention.to_v": H},
    ),
    "Lumina 2": Pack(  # 24 heads of queries, 8 of keys and of values
        "lumina2", "comfy", "diffusion_model.layers.3.attention.qkv",
        {f"{_LAYER}.attn.to_q": 3 * H, f"{_LAYER}.attn.to_k": H, f"{_LAYER}.attn.to_v": H}, 3 * H,
    ),
    "SD3": Pack("sd3", "kohya", "lora_unet_joint_blocks_0_x_block_attn_qkv", _QKV),
}  # fmt: skip
every_pack = pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
ONE = PACKS["Flux, image"]


def through(pack: Pack, tensors: dict[str, Tensor], folder: Path, first: str, second: str) -> tuple[Path, Path]:
    """The file in one dialect, and that in another again."""
    source = save(folder / "source.safetensors", tensors)
    there, back = folder / "there.safetensors", folder / "back.safetensors"
    convert(source, first, there, architecture=pack.architecture, check=True)
    convert(there, second, back, architecture=pack.architecture, check=True)
    return there, back


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert (found[name] - change).abs().max() <= tolerance, name


def endings(pack: Pack, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """kohya's endings, or PEFT's where the dialect has those."""
    if pack.dialect == "kohya":
        return parts
    return {k.replace("lora_up", "lora_B").replace("lora_down", "lora_A"): t for k, t in parts.items()}


@every_pack
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_shared_down_is_copied_and_fuses_back_to_the_bit(pack: Pack, dtype: torch.dtype, tmp_path: Path) -> None:
    parts = Maker(1, dtype).lora(pack.rows(), pack.features, 3, 2.0)
    tensors = named({pack.module: endings(pack, parts)})
    there, back = through(pack, tensors, tmp_path, "diffusers", pack.dialect)
    whole = delta({"up": parts[".lora_up.weight"], "down": parts[".lora_down.weight"]}, 2.0)
    assert_same(deltas(there), pack.cut(whole))
    assert all(torch.equal(p["down"], parts[".lora_down.weight"]) for p, _ in modules_of(there).values())
    assert raw(back) == raw(tmp_path / "source.safetensors")


def split(pack: Pack, ranks: tuple[int, ...], alphas: tuple[float | None, ...], seed: int = 2) -> dict[str, Tensor]:
    """A LoRA of its own for each module that is packed, in diffusers' names with alphas beside."""
    maker = Maker(seed)
    modules = {}
    for number, (name, height) in enumerate(pack.parts.items()):
        rank, alpha = ranks[number % len(ranks)], alphas[number % len(alphas)]
        parts = maker.lora(height, pack.features, rank, alpha)
        modules[name] = {k.replace("lora_up", "lora_B").replace("lora_down", "lora_A"): t for k, t in parts.items()}
    return named(modules)


@every_pack
@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [((2,), (1.0,)), ((2, 4, 1), (1.0, 2.0, 0.5)), ((2, 4, 1), (None,)), ((3, 6), (1.5, 3.0))],
)
def test_equal_strengths_are_joined_and_come_apart_to_the_bit(
    pack: Pack, ranks: tuple[int, ...], alphas: tuple[float | None, ...], tmp_path: Path
) -> None:
    tensors = split(pack, ranks, alphas)
    there, back = through(pack, tensors, tmp_path, pack.dialect, "diffusers")
    (found,) = modules_of(there).items()
    name, (parts, alpha) = found
    assert name == pack.module
    total = sum(ranks[n % len(ranks)] for n in range(len(pack.parts)))
    assert parts["up"].shape == (pack.rows(), total)
    # alpha grows with the rank, so that alpha / rank is what it was.
    strength = 1.0 if alphas[0] is None else alphas[0] / ranks[0]
    assert (1.0 if alpha is None else alpha / total) == strength
    expected = deltas(tmp_path / "source.safetensors")
    assert_same(pack.cut(deltas(there)[pack.module]), expected)
    assert deltas(back).keys() == expected.keys()
    assert_same(deltas(back), expected, 0)
    factors = {k: t for k, t in raw(tmp_path / "source.safetensors").items() if not k.endswith(".alpha")}
    assert raw(back) == factors
    convert(back, "comfy", tmp_path / "again.safetensors", architecture=pack.architecture)
    assert_same({"": next(iter(deltas(tmp_path / "again.safetensors").values()))}, {"": deltas(there)[pack.module]}, 0)


@every_pack
def test_unequal_strengths_are_folded_and_said(pack: Pack, tmp_path: Path) -> None:
    tensors = split(pack, (2, 4, 1), (1.0, 5.0, None))
    source = save(tmp_path / "source.safetensors", tensors)
    report = convert(source, pack.dialect, tmp_path / "there.safetensors", architecture=pack.architecture)
    count = sum(
        alpha != rank for _, (rank, alpha) in zip(pack.parts, [(2, 1.0), (4, 5.0), (1, 1), (2, 1.0)], strict=False)
    )
    assert report.warnings == [
        f"{count} modules that are packed together differ in strength: it is folded into their up"
    ]
    expected = deltas(source)
    assert_same(pack.cut(deltas(tmp_path / "there.safetensors")[pack.module]), expected, 3e-6)
    convert(tmp_path / "there.safetensors", "diffusers", tmp_path / "back.safetensors", architecture=pack.architecture)
    assert_same(deltas(tmp_path / "back.safetensors"), expected, 3e-6)


@every_pack
def test_modules_that_no_adapter_changes_get_rows_of_zeros_and_stay_away(pack: Pack, tmp_path: Path) -> None:
    names = list(pack.parts)
    tensors = {k: t for k, t in split(pack, (2, 1, 3), (None,)).items() if not k.startswith((names[1] + ".",))}
    there, back = through(pack, tensors, tmp_path, pack.dialect, "diffusers")
    found, expected = pack.cut(deltas(there)[pack.module]), deltas(tmp_path / "source.safetensors")
    assert not found.pop(names[1]).any()
    assert_same(found, expected)
    assert raw(back) == raw(tmp_path / "source.safetensors")


# ------------------------------------------------------------------------------------------------ linear1


def without_mlp(width: int, rank: int) -> dict[str, Tensor]:
    maker = Maker(3)
    found = {}
    for name in ("to_q", "to_k", "to_v"):
        stem = f"transformer.single_transformer_blocks.0.attn.{name}"
        found |= {f"{stem}.lora_A.weight": maker(rank, width), f"{stem}.lora_B.weight": maker(width, rank)}
    return found


def test_rows_of_the_mlp_are_the_architectures_where_no_adapter_changes_it(tmp_path: Path) -> None:
    """As trainers of attentions alone leave it; joined, its rows are zeros, and back it is not there."""
    source = save(tmp_path / "source.safetensors", without_mlp(3072, 2))
    convert(source, "kohya", tmp_path / "there.safetensors", architecture="flux")
    found = tensors_of(tmp_path / "there.safetensors")
    up = found["lora_unet_single_blocks_0_linear1.lora_up.weight"]
    assert up.shape == (21504, 6)
    assert not up[9216:].any()
    assert float(found["lora_unet_single_blocks_0_linear1.alpha"]) == 6
    convert(tmp_path / "there.safetensors", "diffusers", tmp_path / "back.safetensors", architecture="flux")
    assert raw(tmp_path / "back.safetensors") == raw(source)


def test_rows_that_no_architecture_tells_are_not_guessed(tmp_path: Path) -> None:
    source = save(tmp_path / "source.safetensors", without_mlp(40, 2))
    with pytest.raises(MismatchError) as caught:
        convert(source, "kohya", tmp_path / "there.safetensors", architecture="flux")
    assert str(caught.value) == (
        f"{source}: 'lora_unet_single_blocks_0_linear1' packs modules that this file does not change, and their sizes "
        "are not known"
    )
    assert caught.value.hint == "--to diffusers needs no packing"


# ------------------------------------------------------------------------------------------------ other families


FAMILIES = {
    "loha": {".hada_w1_a": (24, 2), ".hada_w1_b": (2, H), ".hada_w2_a": (24, 2), ".hada_w2_b": (2, H), ".alpha": ()},
    "lokr": {".lokr_w1": (6, 2), ".lokr_w2": (4, 4)},
    "lokr of products": {
        ".lokr_w1_a": (3, 2), ".lokr_w1_b": (2, 4), ".lokr_w2_a": (8, 1), ".lokr_w2_b": (1, 2), ".alpha": (),
    },
    "full": {".diff": (24, H)},
}  # fmt: skip


def parts_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {ending[1:]: tensor for ending, tensor in tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_cut_by_rows_and_fuse_back_to_the_bit(family: str, tmp_path: Path) -> None:
    maker = Maker(4)
    tensors = {ending: maker(*shape) for ending, shape in FAMILIES[family].items()}
    there, back = through(ONE, named({ONE.module: tensors}), tmp_path, "diffusers", "kohya")
    parts = parts_of(tensors)
    alpha = parts.pop("alpha", None)
    assert_same(deltas(there), ONE.cut(delta(parts, None if alpha is None else float(alpha))))
    assert raw(back) == raw(tmp_path / "source.safetensors")


def test_a_kronecker_product_whose_rows_do_not_meet_the_cut_is_refused(tmp_path: Path) -> None:
    maker = Maker(5)
    tensors = {".lokr_w1": maker(4, 2), ".lokr_w2": maker(6, 4)}
    source = save(tmp_path / "source.safetensors", named({ONE.module: tensors}))
    with pytest.raises(MismatchError) as caught:
        convert(source, "diffusers", tmp_path / "out.safetensors", architecture="flux")
    assert str(caught.value) == (
        f"{source}: {ONE.module!r}: lokr_w1 has 4 rows for 24, which cannot be cut at ((0, 8),)"
    )


@pytest.mark.parametrize("family", ["loha", "lokr"])
def test_different_factors_of_other_families_are_not_joined(family: str, tmp_path: Path) -> None:
    maker = Maker(6)
    shapes = {ending: (shape[0] // 3, *shape[1:]) if "_a" in ending or "w1" in ending else shape
              for ending, shape in FAMILIES[family].items()}  # fmt: skip
    if family == "loha":
        shapes[".hada_w1_b"] = (2, H)
    modules = {name: {ending: maker(*shape) for ending, shape in shapes.items()} for name in ONE.parts}
    source = save(tmp_path / "source.safetensors", named(modules))
    with pytest.raises(MismatchError) as caught:
        convert(source, "kohya", tmp_path / "out.safetensors", architecture="flux")
    assert str(caught.value) == (
        f"{source}: {ONE.module!r} would join 3 adapters of the family {family}, which is not exact"
    )


def test_glora_cannot_be_cut_and_says_so(tmp_path: Path) -> None:
    maker = Maker(7)
    tensors = {
        ".a1.weight": maker(2, H),
        ".a2.weight": maker(H, 2),
        ".b1.weight": maker(2, H),
        ".b2.weight": maker(24, 2),
    }
    source = save(tmp_path / "source.safetensors", named({ONE.module: tensors}))
    with pytest.raises(MismatchError) as caught:
        convert(source, "diffusers", tmp_path / "out.safetensors", architecture="flux")
    assert str(caught.value) == f"{source}: {ONE.module!r} is a glora, which cannot be cut into rows exactly"


# ------------------------------------------------------------------------------------------------ halves


HALVES = {
    "lora": {".lora_up.weight": (16, 2), ".lora_down.weight": (2, H), ".lora_up.bias": (16,)},
    "loha": {".hada_w1_a": (16, 2), ".hada_w1_b": (2, H), ".hada_w2_a": (16, 2), ".hada_w2_b": (2, H)},
    "lokr": {".lokr_w1": (4, 2), ".lokr_w2": (4, 4)},
    "full": {".diff": (16, H), ".diff_b": (16,)},
    "dora": {".lora_up.weight": (16, 2), ".lora_down.weight": (2, H), ".dora_scale": (16, 1)},
    "dora of inputs": {".lora_up.weight": (16, 2), ".lora_down.weight": (2, H), ".dora_scale": (1, H)},
}


@pytest.mark.parametrize("family", HALVES)
def test_shift_and_scale_of_the_final_layer_trade_places_in_every_family(family: str, tmp_path: Path) -> None:
    maker = Maker(8)
    tensors = {ending: maker(*shape) for ending, shape in HALVES[family].items()}
    source = save(tmp_path / "source.safetensors", named({"lora_unet_final_layer_adaLN_modulation_1": tensors}))
    to = "onetrainer" if family.startswith("dora") else "diffusers"
    convert(source, to, tmp_path / "there.safetensors", architecture="flux")
    (found,) = modules_of(tmp_path / "there.safetensors").values()
    parts = parts_of({e.replace(".lora_up.weight", ".up").replace(".lora_down.weight", ".down"): t
                      for e, t in tensors.items() if e != ".lora_up.bias"})  # fmt: skip
    whole = delta({k: t for k, t in parts.items() if k not in ("diff_b", "dora_scale")}, None)
    shown = {k: t for k, t in found[0].items() if k not in ("diff_b", "dora_scale", "bias")}
    assert torch.equal(delta(shown, found[1]), whole.roll(8, 0))
    for name, ending in (("bias", ".lora_up.bias"), ("diff_b", ".diff_b")):
        if ending in tensors:
            assert torch.equal(found[0][name], tensors[ending].roll(8))
    if family == "dora":
        assert torch.equal(found[0]["dora_scale"], tensors[".dora_scale"].roll(8, 0))
    if family == "dora of inputs":  # its norms run over all rows, in any order
        assert torch.equal(found[0]["dora_scale"], tensors[".dora_scale"])
    convert(tmp_path / "there.safetensors", "kohya", tmp_path / "back.safetensors", architecture="flux")
    back = {k: t for k, t in raw(tmp_path / "back.safetensors").items() if not k.endswith(".alpha")}
    assert back == raw(source)


# ------------------------------------------------------------------------------------------------ magnitudes, biases


def test_a_magnitude_for_each_output_is_cut_and_joined(tmp_path: Path) -> None:
    maker = Maker(9)
    parts = maker.lora(24, H, 3, 3.0) | {".dora_scale": maker(24, 1)}
    there, back = through(ONE, named({ONE.module: parts}), tmp_path, "onetrainer", "kohya")
    cut = ONE.cut(parts[".dora_scale"])
    for name, (found, _) in modules_of(there).items():
        part = next(n for n in ONE.parts if n.endswith(name[-4:]))
        assert torch.equal(found["dora_scale"], cut[part])
    assert raw(back) == raw(tmp_path / "source.safetensors")


def test_a_magnitude_for_each_input_is_not_cut(tmp_path: Path) -> None:
    maker = Maker(10)
    parts = maker.lora(24, H, 3) | {".dora_scale": maker(1, H)}
    source = save(tmp_path / "source.safetensors", named({ONE.module: parts}))
    with pytest.raises(MismatchError) as caught:
        convert(source, "onetrainer", tmp_path / "out.safetensors", architecture="flux")
    assert str(caught.value) == (
        f"{source}: {ONE.module!r} has a magnitude for each input, [1, 8]: its norms run over all the rows of the "
        "packed weight, and cannot be taken apart"
    )


def test_magnitudes_for_each_input_are_not_joined(tmp_path: Path) -> None:
    maker = Maker(11)
    modules = {name: maker.lora(H, H, 2) | {".dora_scale": maker(1, H)} for name in ONE.parts}
    source = save(tmp_path / "source.safetensors", named(modules))
    with pytest.raises(MismatchError) as caught:
        convert(source, "kohya", tmp_path / "out.safetensors", architecture="flux")
    assert str(caught.value) == (
        f"{source}: {ONE.module!r} would join magnitudes for each input: their norms would run over the rows of all"
    )


def test_biases_are_cut_and_joined_with_their_ups(tmp_path: Path) -> None:
    maker = Maker(12)
    parts = maker.lora(24, H, 3) | {".lora_up.bias": maker(24)}
    there, back = through(ONE, named({ONE.module: parts}), tmp_path, "diffusers", "kohya")
    cut = ONE.cut(parts[".lora_up.bias"])
    assert {name: found["bias"].tolist() for name, (found, _) in modules_of(there).items()} == {
        name: tensor.tolist() for name, tensor in cut.items()
    }
    found = {k: t for k, t in raw(back).items() if not k.endswith(".alpha")}
    assert found == raw(tmp_path / "source.safetensors")


def test_a_folded_strength_is_the_biases_too(tmp_path: Path) -> None:
    """PEFT multiplies them by alpha / rank, as it does up · down."""
    maker = Maker(13)
    parts = maker.lora(H, H, 4, 1.0) | {".lora_up.bias": maker(H)}
    source = save(tmp_path / "source.safetensors", named({"lora_unet_double_blocks_0_img_attn_proj": parts}))
    convert(source, "comfy", tmp_path / "out.safetensors", architecture="flux", alpha="fold")
    ((found, alpha),) = modules_of(tmp_path / "out.safetensors").values()
    assert alpha is None
    assert torch.equal(found["bias"], parts[".lora_up.bias"] / 4)
    assert torch.equal(found["up"], parts[".lora_up.weight"] / 4)
    assert "lora_adapter_metadata" not in metadata_of(tmp_path / "out.safetensors")


def test_tensors_of_different_dtypes_are_not_joined(tmp_path: Path) -> None:
    tensors = split(ONE, (2,), (None,))
    name = f"{_DOUBLE}.to_k.lora_B.weight"
    source = save(tmp_path / "source.safetensors", {**tensors, name: tensors[name].half()})
    with pytest.raises(MismatchError) as caught:
        convert(source, "kohya", tmp_path / "out.safetensors", architecture="flux")
    assert str(caught.value) == (f"{source}: {ONE.module!r} would join tensors (up) whose dtypes or widths differ")
