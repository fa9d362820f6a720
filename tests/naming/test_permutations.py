"""Channels that may trade places: on tiny models of the real classes, and the tables against the lists of real ones."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from shuffled import groups_of, shuffled, take
from tagged import needs_lists, shapes_of

from weightops.naming.keymap import NETWORKS
from weightops.naming.permutations import Axis, Channels, Group, inputs, outputs, resolve, within

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    _EAGER = (transformers.CLIPTextModel, diffusers.UNet2DConditionModel, diffusers.AutoencoderKL)
torch.set_num_threads(1)

# At least two channels in the groups of norms, where there are more than at the first level.
SD1 = {
    "block_out_channels": (32, 64, 64, 64), "attention_head_dim": 8, "cross_attention_dim": 12, "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SDXL = {
    "block_out_channels": (64, 64, 128), "attention_head_dim": (1, 1, 2), "cross_attention_dim": 12,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 2,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 3), "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
}  # fmt: skip


def unet(config: dict[str, Any]) -> tuple[Any, Callable[[Any], Tensor]]:
    words, sample = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    added = {"text_embeds": torch.randn(2, 8, dtype=torch.float64), "time_ids": torch.ones(2, 2, dtype=torch.float64)}
    more = {"added_cond_kwargs": added} if "addition_embed_type" in config else {}
    model = diffusers.UNet2DConditionModel(sample_size=8, **config)
    return model, lambda m: m(sample, torch.tensor([7, 500]), words, **more).sample


def text(kind: str) -> tuple[Any, Callable[[Any], Tensor]]:
    config = transformers.CLIPTextConfig(
        hidden_size=192, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, vocab_size=30,
        max_position_embeddings=9, projection_dim=16, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    words = torch.tensor([[0, 5, 7, 9, 2], [0, 8, 2, 1, 1]])
    model = getattr(transformers, kind)(config)
    return model, lambda m: m(words)[0]


def vae() -> tuple[Any, Callable[[Any], Tensor]]:
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=32,
    )  # fmt: skip
    picture = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    return model, lambda m: m(picture).sample


MODELS: dict[str, tuple[str, Callable[[], tuple[Any, Callable[[Any], Tensor]]]]] = {
    "sd15_unet": ("sd15_unet", lambda: unet(SD1)),
    "sdxl_unet": ("sdxl_unet", lambda: unet(SDXL)),
    "clip": ("clip", lambda: text("CLIPTextModel")),
    "clip with a projection": ("clip", lambda: text("CLIPTextModelWithProjection")),
    "autoencoder_kl": ("autoencoder_kl", vae),
}


def made(name: str) -> tuple[Any, Callable[[Any], Tensor], tuple[Channels, ...]]:
    """A model whose weights, biases and norms are all random, what it computes, and the groups of its network."""
    network, make = MODELS[name]
    torch.manual_seed(0)
    model, compute = make()
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, compute, groups_of(network, weights_of(model))


def canonical(key: str) -> str:
    return f"text_model.{key}" if key.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")) else key


def weights_of(model: Any) -> dict[str, Tensor]:
    """Under their canonical names."""
    return {canonical(key): value.clone() for key, value in model.state_dict().items()}


def fill(model: Any, weights: dict[str, Tensor]) -> None:
    model.load_state_dict({key: weights[canonical(key)] for key in model.state_dict()})


@pytest.mark.parametrize("name", MODELS)
def test_any_member_of_all_groups_leaves_what_a_network_computes(name: str) -> None:
    model, compute, groups = made(name)
    weights = weights_of(model)
    other = shuffled(MODELS[name][0], weights, seed=1)
    with torch.no_grad():
        before = compute(model)
        fill(model, other)
        after = compute(model)
    held = {axis.name for group in groups for lane in group.lanes for axis in lane}
    assert held == {key for key, value in weights.items() if not torch.equal(value, other[key])}
    assert before.std() > 1e-3
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9 * float(before.std()))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("sd15_unet", "down_blocks.1.resnets.0"),
        ("sd15_unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1"),
        ("sdxl_unet", "mid_block.resnets.0"),
        ("sdxl_unet", "mid_block.attentions.0.transformer_blocks.2.attn2"),
        ("clip", "text_model.encoder.layers.1.self_attn"),
        ("autoencoder_kl", "decoder.up_blocks.1.resnets.0"),
    ],
)
def test_channels_that_leave_their_block_change_what_a_network_computes(name: str, group: str) -> None:
    model, compute, groups = made(name)
    found = next(g for g in groups if g.name == group)
    assert found.blocks > 1
    weights = weights_of(model)
    take(weights, found, [[*range(1, size), 0] for size in found.sizes])
    with torch.no_grad():
        before = compute(model)
        fill(model, weights)
        assert not torch.allclose(compute(model), before, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ real sizes

# list -> network, and how many groups there are of each (channels, blocks).
LISTS = {
    "diffusers_sd15_unet": ("sd15_unet", {
        ((320,), 32): 5, ((640,), 32): 5, ((1280,), 32): 12, ((320, 320), 8): 10, ((640, 640), 8): 10,
        ((1280, 1280), 8): 12, ((320,), 1): 5, ((640,), 1): 5, ((1280,), 1): 5 + 6 + 2, ((2560,), 1): 5,
        ((5120,), 1): 6,
    }),
    "diffusers_sdxl_unet": ("sdxl_unet", {
        ((320,), 32): 5, ((640,), 32): 5, ((1280,), 32): 7, ((640, 640), 10): 20, ((1280, 1280), 20): 120,
        ((640,), 1): 5, ((1280,), 1): 6 + 3, ((2560,), 1): 10, ((5120,), 1): 60,
    }),
    "diffusers_sd_vae": ("autoencoder_kl", {
        ((128,), 32): 5, ((256,), 32): 5, ((512,), 32): 14, ((512, 512), 1): 2,
    }),
}  # fmt: skip


@needs_lists
@pytest.mark.parametrize("name", LISTS)
def test_every_group_of_a_table_is_there_in_the_real_model(name: str) -> None:
    network, expected = LISTS[name]
    groups, left = resolve(NETWORKS.get(network).permutations, shapes_of(name))
    assert not left
    assert Counter((g.sizes, g.blocks) for g in groups) == expected
    assert len({g.name for g in groups}) == len(groups)


@needs_lists
@pytest.mark.parametrize("name", LISTS)
def test_no_axis_of_a_tensor_lies_in_two_groups_and_no_tensor_twice_in_one(name: str) -> None:
    groups, _ = resolve(NETWORKS.get(LISTS[name][0]).permutations, shapes_of(name))
    axes = Counter((a.name, a.axis) for g in groups for lane in g.lanes for a in lane)
    assert set(axes.values()) == {1}
    assert all(n == 1 for g in groups for n in Counter(a.name for lane in g.lanes for a in lane).values())


def test_the_text_encoders_of_sdxl_have_all_groups() -> None:
    for width, hidden, layers in ((768, 3072, 12), (1280, 5120, 32)):
        shapes: dict[str, tuple[int, ...]] = {}
        for n in range(layers):
            stem = f"text_model.encoder.layers.{n}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= {f"{stem}.self_attn.{part}.weight": (width, width), f"{stem}.self_attn.{part}.bias": (width,)}
            shapes |= {f"{stem}.mlp.fc1.weight": (hidden, width), f"{stem}.mlp.fc1.bias": (hidden,)}
            shapes |= {f"{stem}.mlp.fc2.weight": (width, hidden), f"{stem}.mlp.fc2.bias": (width,)}
        groups, left = resolve(NETWORKS.get("clip").permutations, shapes)
        assert not left
        expected = {((width, width), width // 64): layers, ((hidden,), 1): layers}
        assert Counter((g.sizes, g.blocks) for g in groups) == expected


# ------------------------------------------------------------------------------------------------ reading a table


TABLE = (
    Group("rests.{}", ((*outputs("rests.{}.in"), *inputs("rests.{}.layers.{}.out")),)),
    Group("head", ((Axis("head.weight", 0, copies=2), Axis("tail.weight", 1)),), width=3),
)
SHAPES: dict[str, tuple[int, ...]] = {
    "rests.0.in.weight": (6, 2), "rests.0.in.bias": (6,),
    "rests.0.layers.0.out.weight": (4, 6), "rests.0.layers.1.out.weight": (5, 6),
    "head.weight": (12, 7), "tail.weight": (7, 6), "elsewhere.weight": (6, 6),
}  # fmt: skip


def test_placeholders_after_those_of_a_group_stand_for_any_number() -> None:
    (rest, head), left = resolve(TABLE, SHAPES)
    assert not left
    assert rest == Channels(
        "rests.0",
        (
            (
                Axis("rests.0.in.weight"), Axis("rests.0.in.bias"),
                Axis("rests.0.layers.0.out.weight", 1), Axis("rests.0.layers.1.out.weight", 1),
            ),
        ),
        (6,), 1,
    )  # fmt: skip
    assert (head.sizes, head.blocks) == ((6,), 2)


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        ({"rests.0.in.bias": None}, "rests.0", "there is no rests.0.in.bias"),
        (
            {"rests.0.layers.0.out.weight": None, "rests.0.layers.1.out.weight": None},
            "rests.0", "there is no rests.0.layers.*.out.weight",
        ),
        ({"rests.0.in.bias": (5,)}, "rests.0", "rests.0.in.weight has 6 channels, and rests.0.in.bias 5"),
        ({"rests.0.in.weight": (6,), "rests.0.layers.1.out.weight": (5,)}, "rests.0",
         "rests.0.layers.1.out.weight [5] has no such channels"),
        ({"head.weight": (13, 7)}, "head", "head.weight [13, 7] has no such channels"),
        ({"head.weight": (8, 7), "tail.weight": (7, 4)}, "head", "4 channels do not lie in blocks of 3"),
        ({"head.weight": (4, 7), "tail.weight": (7, 2)}, "head", "2 channels do not lie in blocks of 3"),
    ],
)  # fmt: skip
def test_a_group_that_does_not_work_out_is_left_with_its_reason(
    change: dict[str, tuple[int, ...] | None], name: str, why: str
) -> None:
    shapes = {key: shape for key, shape in {**SHAPES, **change}.items() if shape is not None}
    groups, left = resolve(TABLE, shapes)
    assert left == {name: why}
    assert name not in {g.name for g in groups}


def test_a_block_that_lacks_what_the_others_have_leaves_the_group() -> None:
    table = within("x", (Group("", ((*outputs("in"), *inputs("layers.{}.a"), *inputs("layers.{}.b")),)),))
    shapes = {"x.in.weight": (4, 2), "x.in.bias": (4,)}
    shapes |= {f"x.layers.{n}.{part}.weight": (3, 4) for n in range(2) for part in "ab"}
    assert resolve(table, shapes)[0][0].sizes == (4,)
    del shapes["x.layers.1.b.weight"]
    assert resolve(table, shapes) == ((), {"x": "not every block has x.layers.*.a.weight and x.layers.*.b.weight"})


def test_a_number_of_a_table_is_not_any_number() -> None:
    shapes = {"a.net.0.weight": (4, 3), "a.net.0.bias": (4,), "a.net.1.weight": (4, 3), "a.net.2.weight": (3, 4)}
    table = (Group("a", ((*outputs("a.net.0"), *inputs("a.net.2")),)),)
    (found,), left = resolve(table, shapes)
    assert not left
    assert [axis.name for axis in found.lanes[0]] == ["a.net.0.weight", "a.net.0.bias", "a.net.2.weight"]


def test_blocks_of_a_network_without_the_groups_are_nothing_to_report() -> None:
    assert resolve(TABLE, {"other.weight": (3, 3)}) == ((), {})
