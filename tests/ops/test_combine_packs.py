"""combine of files that pack projections and of files that do not, and of files with other names of one model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from combining import OUT, ROUNDING, accounted, combined, matrices, rows
from conftest import save as save_plain
from locon import off
from loras import Maker, delta, deltas, modules_of, named, save, tensors_of
from test_dialect_packs import Pack as Packed

from weightops.errors import MismatchError

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))
from tagged import needs_lists, shapes_of

if TYPE_CHECKING:
    from torch import Tensor

H = 8


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Pack(Packed):
    """And what its parts are together; rows that no part has are zeros."""

    def joined(self, parts: dict[str, Tensor]) -> Tensor:
        zero = torch.zeros(1, self.features, dtype=torch.float64)
        return torch.cat([parts.get(name, zero.expand(height, -1)) for name, height in self.parts.items()])


_DOUBLE, _SINGLE = "transformer.transformer_blocks.0.attn", "transformer.single_transformer_blocks.1"
_LAYER = "transformer.layers.3.attention"
_QKV = {f"{_DOUBLE}.to_q": H, f"{_DOUBLE}.to_k": H, f"{_DOUBLE}.to_v": H}
_ADDED = {f"{_DOUBLE}.add_q_proj": H, f"{_DOUBLE}.add_k_proj": H, f"{_DOUBLE}.add_v_proj": H}
_LINEAR1 = {
    f"{_SINGLE}.attn.to_q": H,
    f"{_SINGLE}.attn.to_k": H,
    f"{_SINGLE}.attn.to_v": H,
    f"{_SINGLE}.proj_mlp": 4 * H,
}
PACKS = {
    "Flux, image": Pack("flux", "kohya", "lora_unet_double_blocks_0_img_attn_qkv", _QKV),
    "Flux, text": Pack("flux", "kohya", "lora_unet_double_blocks_0_txt_attn_qkv", _ADDED),
    "Flux, single": Pack("flux", "kohya", "lora_unet_single_blocks_1_linear1", _LINEAR1),
    "Flux, ComfyUI": Pack("flux", "comfy", "diffusion_model.single_blocks.1.linear1", _LINEAR1),
    "HunyuanVideo": Pack("hunyuan_video", "kohya", "lora_unet_double_blocks_0_img_attn_qkv", _QKV),
    "Z-Image": Pack("z_image", "comfy", "diffusion_model.layers.3.attention.qkv",
                    {f"{_LAYER}.to_q": H, f"{_LAYER}.to_k": H, f"{_LAYER}.to_v": H}),
    "Lumina 2": Pack(  # 24 heads of queries, 8 of keys and of values
        "lumina2", "comfy", "diffusion_model.layers.3.attention.qkv",
        {"transformer.layers.3.attn.to_q": 3 * H, "transformer.layers.3.attn.to_k": H,
         "transformer.layers.3.attn.to_v": H}, 3 * H,
    ),
    "SD3": Pack("sd3", "kohya", "lora_unet_joint_blocks_0_x_block_attn_qkv", _QKV),
}  # fmt: skip
every_pack = pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
ONE, SINGLE = PACKS["Flux, image"], PACKS["Flux, single"]


def endings(dialect: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """kohya's endings, or PEFT's where the dialect has those."""
    if dialect in ("kohya", "onetrainer"):
        return parts
    return {k.replace("lora_up", "lora_B").replace("lora_down", "lora_A"): t for k, t in parts.items()}


def packed(pack: Pack, name: str, dtype: torch.dtype = torch.float32, *, blocks: bool = False) -> Path:
    """A LoRA of the packed module: all share down, or else each has ranks of its own (up is block-diagonal)."""
    t = Maker(len(name), dtype)
    rank = 2 * len(pack.parts) if blocks else 3
    parts = t.lora(pack.rows(), pack.features, rank, 2.0)
    if blocks:
        heights = torch.repeat_interleave(torch.arange(len(pack.parts)), torch.tensor(list(pack.parts.values())))
        parts[".lora_up.weight"] *= heights[:, None] == torch.arange(rank)[None] // 2
    return save(Path(f"{name}.safetensors"), named({pack.module: endings(pack.dialect, parts)}))


def split(pack: Pack, name: str, dtype: torch.dtype = torch.float32, *, lacks: str = "") -> Path:
    """A LoRA of its own for each module that is packed, of ranks 2, 3, 4, …, in diffusers' names."""
    t = Maker(7 + len(name), dtype)
    modules = {
        part: endings("diffusers", t.lora(height, pack.features, 2 + n, 1.0 + n))
        for n, (part, height) in enumerate(pack.parts.items()) if not (lacks and part.endswith(lacks))
    }  # fmt: skip
    return save(Path(f"{name}.safetensors"), named(modules))


def in_parts(pack: Pack, path: Path) -> dict[str, Tensor]:
    """ΔW of each canonical module, of a file that packs them or not."""
    found = {name: change.flatten(1) for name, change in deltas(path).items()}
    return pack.cut(found[pack.module]) if pack.module in found else found


def added(pack: Pack, *loras: tuple[Path, float]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, strength in loras:
        for name, change in in_parts(pack, path).items():
            found[name] = found.get(name, 0.0) + strength * change
    return found


# ------------------------------------------------------------------------------------------------ packed and split


@every_pack
@pytest.mark.parametrize("first", ["packed", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_and_split_files_add_up_in_either_spelling(pack: Pack, first: str, dtype: torch.dtype) -> None:
    a, b = (packed(pack, "a", dtype), 0.7), (split(pack, "b", dtype), -1.2)
    loras = (a, b) if first == "packed" else (b, a)
    goal = added(pack, *loras)
    total = 3 + sum(2 + n for n in range(len(pack.parts)))
    for to in (None, pack.dialect, "diffusers"):
        words: dict[str, Any] = {} if to is None else {"dialect": to}
        report = combined(*loras, exact=True, architecture=pack.architecture, **words)
        dialect = to or (pack.dialect if first == "packed" else "diffusers")
        found = in_parts(pack, OUT)
        assert found.keys() == goal.keys()
        assert all(off(change, found[name]) <= 2 * ROUNDING[dtype] for name, change in goal.items())
        accounted(report, a[0], b[0])
        ranks = {name: row["rank"] for name, row in rows(report).items()}
        if dialect == "diffusers":
            assert ranks == {name: min(5 + n, pack.features, h) for n, (name, h) in enumerate(pack.parts.items())}
        else:
            assert ranks == {pack.module: min(total, pack.features)}


@every_pack
def test_the_default_rank_is_the_largest_that_a_file_has_in_the_module(pack: Pack) -> None:
    """Of a module that is packed here, that of its parts together: a file alone comes out whole."""
    one, other = split(pack, "a"), split(pack, "bb")
    most = min(sum(2 + n for n in range(len(pack.parts))), pack.features)
    report = combined((one, 1.0), (other, 0.0), dialect=pack.dialect, architecture=pack.architecture)
    assert {row["rank"] for row in rows(report).values()} == {most}
    assert all(off(change, in_parts(pack, OUT)[name]) < 1e-6 for name, change in in_parts(pack, one).items())
    report = combined(one, other, dialect="diffusers", architecture=pack.architecture)
    assert {name: row["rank"] for name, row in rows(report).items()} == {
        name: 2 + n for n, name in enumerate(pack.parts)
    }  # fmt: skip


@every_pack
def test_blocks_of_their_own_come_apart_exactly(pack: Pack) -> None:
    a, b = packed(pack, "a", blocks=True), split(pack, "b")
    for to in (pack.dialect, "diffusers"):
        combined((a, -0.6), b, exact=True, dialect=to, architecture=pack.architecture)
        found = in_parts(pack, OUT)
        assert all(off(change, found[name]) < 1e-6 for name, change in added(pack, (a, -0.6), (b, 1.0)).items())


@every_pack
@pytest.mark.parametrize("words", [{"exact": True}, {}, {"rank": 4}], ids=str)
def test_modules_of_a_pack_that_no_file_changes_stay_zero(pack: Pack, words: dict[str, Any]) -> None:
    lacks = next(iter(pack.parts)).rpartition(".")[2].replace("q", "k")
    a, b = split(pack, "a", lacks=lacks), split(pack, "bb", lacks=lacks)
    combined(a, b, dialect=pack.dialect, architecture=pack.architecture, **words)
    found = in_parts(pack, OUT)
    (gone,) = (name for name in pack.parts if name.endswith(lacks))
    up = next(parts["up"] for parts, _ in modules_of(OUT).values())
    if "exact" in words:
        assert not pack.cut(up)[gone].any()
    assert float(found.pop(gone).norm()) < 1e-6
    if "exact" in words:
        assert all(off(change, found[name]) < 1e-6 for name, change in added(pack, (a, 1.0), (b, 1.0)).items())


FAMILIES = {
    "loha": {".hada_w1_a": (24, 2), ".hada_w1_b": (2, H), ".hada_w2_a": (24, 2), ".hada_w2_b": (2, H), ".alpha": ()},
    "lokr": {".lokr_w1": (4, 2), ".lokr_w2": (6, 4)},  # whose rows do not meet the parts'
    "lokr of products": {".lokr_w1_a": (3, 2), ".lokr_w1_b": (2, 4), ".lokr_w2_a": (8, 1), ".lokr_w2_b": (1, 2)},
    "full": {".diff": (24, H)},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_of_a_packed_module_adds_to_its_parts(family: str) -> None:
    t = Maker(4)
    tensors = {ending: t(*shape) for ending, shape in FAMILIES[family].items()}
    a = save(Path("a.safetensors"), named({ONE.module: tensors}))
    b = split(ONE, "b")
    for to in ("kohya", "diffusers"):
        report = combined((a, 0.3), (b, -1.0), exact=True, dialect=to, architecture="flux")
        found = in_parts(ONE, OUT)
        assert all(off(change, found[name]) < 1e-6 for name, change in added(ONE, (a, 0.3), (b, -1.0)).items()), to
        accounted(report, a, b)


def test_biases_of_packed_modules_go_to_their_parts() -> None:
    t = Maker(12)
    parts = t.lora(24, H, 2, 1.0) | {".lora_up.bias": t(24)}
    a = save(Path("a.safetensors"), named({ONE.module: parts}))
    own = {f"{name}.lora_B.bias": t(H) for name in list(_QKV)[:2]}
    b = save(Path("b.safetensors"), {**tensors_of(split(ONE, "b")), **own})
    goal = dict(zip(_QKV, (0.5 * 0.5 * parts[".lora_up.bias"]).split(H), strict=True))
    for n, name in enumerate(list(_QKV)[:2]):
        goal[name] = goal[name] - 2.0 * own[f"{name}.lora_B.bias"] * (1.0 + n) / (2 + n)
    report = combined((a, 0.5), (b, -2.0), exact=True, dialect="diffusers", architecture="flux")
    found = {k.removesuffix(".lora_B.bias"): t for k, t in tensors_of(OUT).items() if k.endswith(".bias")}
    assert found.keys() == goal.keys()
    for name, bias in goal.items():
        torch.testing.assert_close(found[name], bias, rtol=0, atol=1e-6)
    accounted(report, a, b)
    report = combined((a, 0.5), (b, -2.0), exact=True, dialect="kohya", architecture="flux")
    written = tensors_of(OUT)[f"{ONE.module}.diff_b"]
    torch.testing.assert_close(written, torch.cat(list(goal.values())), rtol=0, atol=1e-6)
    accounted(report, a, b)


def test_a_dropped_part_of_a_packed_module_leaves_its_keys_used() -> None:
    """Of three parts one has no rank: the tensors of all three are the same."""
    parts = Maker(1).lora(24, H, 2, 1.0)
    parts[".lora_up.weight"][H : 2 * H] = 0
    a = save(Path("a.safetensors"), named({ONE.module: parts}))
    b = save(Path("b.safetensors"), named({ONE.module: Maker(2).lora(24, H, 1, 0.0)}))
    report = combined(a, b, rank="energy:0.9", dialect="diffusers", architecture="flux")
    assert {name.rpartition(".")[2] for name in deltas(OUT)} == {"to_q", "to_v"}
    assert report.account.unused == []
    accounted(report, a, b)


def test_onetrainers_names_are_of_the_same_modules() -> None:
    """Which are diffusers' with underscores, and T5 is the second text encoder."""
    t = Maker(6)
    own = {f"lora_transformer_transformer_blocks_0_attn_to_{n}": t.lora(H, H, 2, 1.0) for n in "qkv"}
    a = save(Path("a.safetensors"), named(own | {"lora_te2_encoder_block_3_layer_0_SelfAttention_q": t.lora(H, H, 2)}))
    b = save(Path("b.safetensors"), named({
        ONE.module: t.lora(24, H, 3, 2.0), "lora_te3_encoder_block_3_layer_0_SelfAttention_q": t.lora(H, H, 1),
    }))  # fmt: skip
    report = combined((a, 0.5), (b, -1.0), exact=True, dialect="kohya", architecture="flux")
    theirs, ours = deltas(a), deltas(b)
    assert off(0.5 * torch.cat([theirs[name] for name in own]) - ours[ONE.module], matrices()[ONE.module]) < 1e-6
    encoder = "lora_te{}_encoder_block_3_layer_0_SelfAttention_q"
    goal = 0.5 * theirs[encoder.format(2)] - ours[encoder.format(3)]
    assert off(goal, matrices()[encoder.format(3)]) < 1e-6
    accounted(report, a, b)


def test_xlabs_and_kohya_are_of_one_module() -> None:
    t = Maker(3)
    down, up = t(2, H), t(24, 2)
    stem = "double_blocks.0.processor.qkv_lora1"
    a = save(Path("a.safetensors"), {f"{stem}.down.weight": down, f"{stem}.up.weight": up})
    b = packed(ONE, "b")
    report = combined((a, 0.5), b, exact=True, dialect="kohya", architecture="flux")
    goal = 0.5 * up.double() @ down.double() + deltas(b)[ONE.module]
    assert off(goal, matrices()[ONE.module]) < 1e-6
    accounted(report, a, b)


def test_rows_of_the_mlp_are_the_architectures_or_refused() -> None:
    """As trainers of attentions alone leave it."""

    def attentions(width: int, name: str) -> Path:
        t = Maker(len(name))
        modules = {part: t.lora(width, width, 1) for part in list(_LINEAR1)[:3]}
        return save(Path(f"{name}.safetensors"), named({k: endings("diffusers", v) for k, v in modules.items()}))

    combined(attentions(3072, "a"), attentions(3072, "bb"), dialect="kohya", architecture="flux", verify=False)
    up = tensors_of(OUT)[f"{SINGLE.module}.lora_up.weight"]
    assert up.shape == (21504, 3)
    assert float(up[9216:].abs().max()) < 1e-5
    with pytest.raises(MismatchError) as caught:
        combined(attentions(40, "a"), attentions(40, "bb"), dialect="kohya", architecture="flux")
    assert str(caught.value) == (
        f"a.safetensors: {SINGLE.module!r} packs modules that no file changes, and their sizes are not known"
    )
    assert caught.value.hint == "--dialect diffusers needs no packing"


# ------------------------------------------------------------------------------------------------ halves


FINAL = "lora_unet_final_layer_adaLN_modulation_1"
NORM_OUT = "transformer.norm_out.linear"


@pytest.mark.parametrize("family", ["lora", "loha", "full"])
def test_shift_and_scale_of_the_final_layer_trade_places(family: str) -> None:
    t = Maker(8)
    shapes = {
        "lora": {".lora_up.weight": (16, 2), ".lora_down.weight": (2, H), ".lora_up.bias": (16,)},
        "loha": {".hada_w1_a": (16, 2), ".hada_w1_b": (2, H), ".hada_w2_a": (16, 2), ".hada_w2_b": (2, H)},
        "full": {".diff": (16, H), ".diff_b": (16,)},
    }[family]
    tensors = {ending: t(*shape) for ending, shape in shapes.items()}
    a = save(Path("a.safetensors"), named({FINAL: tensors}))
    own = endings("diffusers", t.lora(16, H, 3)) | {".lora_B.bias": t(16)}
    b = save(Path("b.safetensors"), named({NORM_OUT: own}))
    bias = next((x for e, x in tensors.items() if e.endswith(("bias", "diff_b"))), torch.zeros(16))
    theirs, ours = deltas(a)[FINAL].flatten(1), deltas(b)[NORM_OUT].flatten(1)
    for to, name, goal, goal_b in (
        ("kohya", FINAL, 0.5 * theirs - ours.roll(8, 0), 0.5 * bias - own[".lora_B.bias"].roll(8)),
        ("diffusers", NORM_OUT, 0.5 * theirs.roll(8, 0) - ours, 0.5 * bias.roll(8) - own[".lora_B.bias"]),
    ):
        report = combined((a, 0.5), (b, -1.0), exact=True, dialect=to, architecture="flux")
        assert off(goal, matrices()[name]) < 1e-6, to
        key = f"{name}.diff_b" if to == "kohya" else f"{name}.lora_B.bias"
        torch.testing.assert_close(tensors_of(OUT)[key], goal_b, rtol=0, atol=1e-6)
        accounted(report, a, b)


def test_halves_that_may_trade_places_and_do_not_tell_are_refused() -> None:
    """SD3's last block has a context of two parts, the others of six: a bias alone does not say which it is."""
    t = Maker(1)
    block = "lora_transformer_transformer_blocks_0_{}"
    modules = {block.format("attn_to_q"): t.lora(H, H, 2), block.format("norm1_context_linear"): {".diff_b": t(6 * H)}}
    a, b = (save(Path(f"{name}.safetensors"), named(modules)) for name in "ab")
    combined(a, b, architecture="sd3")
    bias = tensors_of(OUT)[f"{block.format('norm1_context_linear')}.diff_b"]
    torch.testing.assert_close(bias, 2 * modules[block.format("norm1_context_linear")][".diff_b"])
    with pytest.raises(MismatchError, match="its halves may have to trade places, and its shapes do not tell"):
        combined(a, b, architecture="sd3", dialect="kohya")


# ------------------------------------------------------------------------------------------------ SDXL

# diffusers' name, and SGM's, of a component; kohya writes SDXL in SGM's.
NAMES = (
    ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
     "input_blocks.4.1.transformer_blocks.0.attn1.to_q", (16, 16)),
    ("unet", "down_blocks.1.resnets.0.conv1", "input_blocks.4.0.in_layers.2", (16, 8, 3, 3)),
    ("unet", "mid_block.attentions.0.proj_in", "middle_block.1.proj_in", (24, 24)),
    ("unet", "up_blocks.0.attentions.2.transformer_blocks.9.ff.net.2",
     "output_blocks.2.1.transformer_blocks.9.ff.net.2", (16, 64)),
    ("unet", "add_embedding.linear_1", "label_emb.0.0", (32, 24)),
    ("text_encoder", "text_model.encoder.layers.3.self_attn.k_proj", None, (12, 12)),
    ("text_encoder_2", "text_model.encoder.layers.3.self_attn.k_proj", None, (20, 20)),
    ("text_encoder_2", "text_model.encoder.layers.31.mlp.fc1", None, (80, 20)),
)  # fmt: skip


def sdxl(scheme: str, component: str, name: str, original: str | None) -> str:
    encoder = {"text_encoder": "1", "text_encoder_2": "2"}.get(component)
    if scheme == "diffusers":
        return f"{component}.{name}"
    if scheme == "peft":
        return f"{component}/base_model.model.{name}"
    if scheme == "comfy":
        beginning = {"1": "text_encoders.clip_l.transformer", "2": "text_encoders.clip_g.transformer"}.get(
            encoder or ""
        )
        return f"{beginning or 'diffusion_model'}.{original or name}"
    own = name if scheme == "kohya, diffusers' names" else original or name
    return (f"lora_te{encoder}_" if encoder else "lora_unet_") + own.replace(".", "_")


@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfy", "peft"])
def test_sdxl_is_one_model_in_all_its_names(to: str) -> None:
    """Modules of the two text encoders are called alike within a PEFT folder, and are two."""
    schemes = ("kohya", "kohya, diffusers' names", "diffusers", "comfy")
    loras, goal = [], {}
    for n, scheme in enumerate(schemes):
        t, modules = Maker(20 + n), {}
        strength = (0.5, -1.0, 2.0, 0.7)[n]
        for component, name, original, (out, features, *kernel) in NAMES:
            parts = t.lora(out, features, 2 + n % 2, None, kernel)
            modules[sdxl(scheme, component, name, original)] = endings(scheme[:5], parts)
            plain = {"up": parts[".lora_up.weight"], "down": parts[".lora_down.weight"]}
            key = sdxl(to, component, name, original)
            goal[key] = goal.get(key, 0.0) + strength * delta(plain, None).flatten(1)
        loras.append((save(Path(f"{n}.safetensors"), named(modules)), strength))
    out = Path("out") if to == "peft" else OUT
    report = combined(*loras, exact=True, dialect=to, architecture="sdxl", output=out)
    found = matrices(out)
    assert found.keys() == goal.keys()
    assert all(off(change, found[name]) < 1e-6 for name, change in goal.items())
    accounted(report, *(path for path, _ in loras))
    assert len(rows(report)) == len(NAMES) == len(report.details["interference"]["modules"])
    report = combined(*loras, rank="energy:0.8", dialect=to, architecture="sdxl", output=out)
    assert matrices(out).keys() == goal.keys()


def test_a_component_of_which_nothing_is_left_has_no_folder() -> None:
    t = Maker(1)
    modules = {sdxl("diffusers", *entry[:3]): endings("diffusers", t.lora(*entry[3][:2], 2, None, entry[3][2:]))
               for entry in NAMES}  # fmt: skip
    for name, tensors in modules.items():
        if name.startswith("text_encoder."):
            tensors[".lora_B.weight"] *= 0
    a, b = (save(Path(f"{name}.safetensors"), named(modules)) for name in "ab")
    report = combined(a, b, rank="energy:0.9", dialect="peft", architecture="sdxl", output="out")
    assert {p.name for p in Path("out").iterdir()} == {"unet", "text_encoder_2"}
    assert len(report.account.unused) == 4
    accounted(report, a, b)


# ------------------------------------------------------------------------------------------------ with a base


@needs_lists
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_magnitude_over_a_packed_module_becomes_its_parts_with_a_base(to: str) -> None:
    """Whose norms run over all its rows, for each input; the base is in the original's names."""
    shapes = {k: tuple(n if n <= 8 else n // 32 for n in s) for k, s in shapes_of("orig_flux_dev_bfl").items()}
    shapes = {k: s for k, s in shapes.items() if not any(f"_blocks.{n}." in k for n in range(2, 40)) and all(s)}
    t = Maker(2)
    base = {k: 0.1 * t(*s) for k, s in shapes.items()}
    save_plain(Path("base.safetensors"), base)
    width = shapes["double_blocks.0.img_attn.qkv.weight"][1]
    scaled = t.lora(3 * width, width, 2, 1.0) | {".dora_scale": t(1, width).abs() + 0.5}
    a = save(Path("a.safetensors"), named({ONE.module: scaled}))
    b = save(Path("b.safetensors"), named({n: endings("diffusers", t.lora(width, width, 2)) for n in _QKV}))
    weight = base["double_blocks.0.img_attn.qkv.weight"].double()
    v = weight + 0.5 * scaled[".lora_up.weight"].double() @ scaled[".lora_down.weight"].double()
    turned = v * scaled[".dora_scale"].double() / v.norm(dim=0, keepdim=True) - weight
    goal = 0.8 * turned + 1.5 * torch.cat([deltas(b)[n] for n in _QKV])
    report = combined((a, 0.8), (b, 1.5), exact=True, base="base.safetensors", dialect=to, architecture=None)
    found = matrices()
    whole = found[ONE.module] if to == "kohya" else torch.cat([found[name] for name in _QKV])
    assert off(goal, whole) < 1e-6
    accounted(report, a, b)


# ------------------------------------------------------------------------------------------------ other hands


def test_peft_and_diffusers_load_what_was_combined() -> None:
    """A tiny Flux: both of their own readers make the sum of the files."""
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pack = ONE._replace(parts=dict.fromkeys(_QKV, 32), features=32)
    single = SINGLE._replace(parts={n: h * 4 for n, h in _LINEAR1.items()}, features=32)
    t = Maker(5)
    a = save(Path("a.safetensors"), named({p.module: t.lora(p.rows(), 32, 3, 2.0) for p in (pack, single)}))
    b = split(pack, "b")
    goal = {n: 0.7 * x for p in (pack, single) for n, x in p.cut(matrices(a)[p.module]).items()}
    for name, change in in_parts(pack, b).items():
        goal[name] = goal[name] - change
    combined((a, 0.7), (b, -1.0), exact=True, dialect="diffusers", architecture="flux")
    before = {n: x.clone() for n, x in model.state_dict().items()}
    model.load_lora_adapter(str(OUT), prefix="transformer")
    model.fuse_lora()
    model.unload_lora()
    for name, change in goal.items():
        key = name.removeprefix("transformer.") + ".weight"
        assert off(change, model.state_dict()[key].double() - before[key].double()) < 1e-5, name
    combined((a, 0.7), (b, -1.0), exact=True, dialect="peft", architecture="flux", output="out")
    loaded = peft.PeftModel.from_pretrained(model, "out")
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)}
    found = {n.replace("base_model.model", "transformer"): m.get_delta_weight("default") for n, m in layers.items()}
    assert found.keys() == goal.keys()
    assert all(off(change, found[name].detach().double()) < 1e-6 for name, change in goal.items())
    assert json.loads(Path("out/adapter_config.json").read_text())["peft_type"] == "LORA"
