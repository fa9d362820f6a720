"""Many LoRAs at once on one network."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from weightops.errors import MismatchError
from weightops.synthesis.layout import Layout, Module
from weightops.synthesis.stacked import Stacked

if TYPE_CHECKING:
    from torch import Tensor

# Linear layers; convolutions of 3×3 with and without a stride, and of 1×1; a layer that sees no pixels.
NAMES = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.attentions.0.proj_in",
    "up_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.1.resnets.0.time_emb_proj",
    "conv_out",
)


@pytest.fixture(scope="module")
def unet() -> Any:
    from weightops.diffusion.extras import hushed
    from weightops.diffusion.tiny import UNETS

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with hushed():
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(**UNETS["sd15"]).eval().requires_grad_(False)


def layout_of(network: nn.Module, names: tuple[str, ...], rank: int = 2) -> Layout:
    weights = [network.get_submodule(name).weight for name in names]
    pairs = zip(names, weights, strict=True)
    return Layout("sd15", tuple(Module("unet", name, tuple(weight.shape), rank) for name, weight in pairs))


def random_factors(layout: Layout, count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(seed)
    return [
        (0.1 * torch.randn(count, m.out, m.rank, generator=made), torch.randn(count, m.rank, m.n, generator=made))
        for m in layout.modules
    ]


def fused(network: nn.Module, layout: Layout, factors: list[tuple[Tensor, Tensor]], which: int, strength: float) -> Any:
    made = copy.deepcopy(network)
    for module, (up, down) in zip(layout.modules, factors, strict=True):
        made.get_submodule(module.name).weight += strength * (up[which] @ down[which]).reshape(module.shape)
    return made


def inputs(samples: int) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(2)
    times = torch.randint(0, 1000, (samples,), generator=made)
    return torch.randn(samples, 4, 8, 8, generator=made), times, torch.randn(samples, 5, 64, generator=made)


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_each_sample_goes_through_its_own_lora_as_if_it_were_fused(unet: Any, strength: float) -> None:
    layout = layout_of(unet, NAMES)
    factors = random_factors(layout, 3)
    noisy, times, texts = inputs(6)
    base = unet(noisy, times, texts).sample
    with Stacked({"unet": unet}, layout) as stacked:
        stacked.put(factors, strength)
        found = unet(noisy, times, texts).sample
    for which in range(3):
        part = slice(2 * which, 2 * which + 2)
        wanted = fused(unet, layout, factors, which, strength)(noisy[part], times[part], texts[part]).sample
        assert (wanted - base[part]).abs().max() > 1e-2
        torch.testing.assert_close(found[part], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_module_alone_is_as_fused(unet: Any, name: str) -> None:
    layout = layout_of(unet, (name,))
    factors = random_factors(layout, 2)
    module = unet.get_submodule(name)
    size = (4, 4, 4) if module.weight.ndim == 4 else (4, 7)
    shape = (size[0], module.weight.shape[1], *size[1:]) if module.weight.ndim == 4 else (*size, module.weight.shape[1])
    given = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    with Stacked({"unet": unet}, layout) as stacked:
        stacked.put(factors)
        found = module(given)
    for which in range(2):
        part = slice(2 * which, 2 * which + 2)
        wanted = fused(unet, layout, factors, which, 1.0).get_submodule(name)(given[part])
        torch.testing.assert_close(found[part], wanted, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_factors_alone_and_of_each_lora_its_own(unet: Any) -> None:
    layout = layout_of(unet, NAMES)
    factors = [(up.requires_grad_(), down.requires_grad_()) for up, down in random_factors(layout, 2)]
    noisy, times, texts = inputs(4)
    with Stacked({"unet": unet}, layout) as stacked:
        stacked.put(factors)
        unet(noisy, times, texts).sample[:2].square().sum().backward()
    for up, down in factors:
        assert up.grad is not None
        assert down.grad is not None
        assert up.grad[0].abs().max() > 0
        assert down.grad[0].abs().max() > 0
        assert up.grad[1].abs().max() == down.grad[1].abs().max() == 0
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_the_network_is_untouched_and_free_of_hooks_after_it(unet: Any) -> None:
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    layout = layout_of(unet, NAMES)
    noisy, times, texts = inputs(2)
    base = unet(noisy, times, texts).sample
    with Stacked({"unet": unet}, layout) as stacked:
        assert torch.equal(unet(noisy, times, texts).sample, base)
        stacked.put(random_factors(layout, 2))
        assert not torch.equal(unet(noisy, times, texts).sample, base)
        stacked.put(None)
        assert torch.equal(unet(noisy, times, texts).sample, base)
        stacked.put(random_factors(layout, 2))
    assert torch.equal(unet(noisy, times, texts).sample, base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert not any(module._forward_hooks for module in unet.modules())


def test_convolutions_of_one_and_of_three_dimensions_are_as_fused() -> None:
    network = nn.Sequential(nn.Conv1d(3, 5, 3, padding=1, dilation=2), nn.Conv3d(3, 4, (3, 1, 5), padding="same"))
    network.requires_grad_(False)
    layout = layout_of(network, ("0", "1"))
    factors = random_factors(layout, 3)
    made = torch.Generator().manual_seed(4)
    for name, given in (
        ("0", torch.randn(6, 3, 9, generator=made)), ("1", torch.randn(6, 3, 4, 5, 3, generator=made)),
    ):  # fmt: skip
        with Stacked({"unet": network}, layout) as stacked:
            stacked.put(factors)
            found = network.get_submodule(name)(given)
        for which in range(3):
            part = slice(2 * which, 2 * which + 2)
            wanted = fused(network, layout, factors, which, 1.0).get_submodule(name)(given[part])
            torch.testing.assert_close(found[part], wanted, rtol=0, atol=1e-5)


def test_a_text_encoders_modules_are_found_under_both_of_their_names() -> None:
    network = nn.Sequential()
    network.encoder = nn.Linear(3, 4)
    wanted = Layout("sd15", (Module("text_encoder", "text_model.encoder", (4, 3), 1),))
    with torch.no_grad(), Stacked({"text_encoder": network}, wanted) as stacked:
        stacked.put([(torch.ones(2, 4, 1), torch.ones(2, 1, 3))])
        found = network.encoder(torch.ones(2, 3)) - (network.encoder.weight.sum(1) + network.encoder.bias)
    torch.testing.assert_close(found, torch.full((2, 4), 3.0))


def test_a_model_that_the_loras_are_not_of_is_refused() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 1, groups=2))

    def refused(component: str, name: str, *shape: int) -> str:
        with pytest.raises(MismatchError) as caught:
            Stacked({"unet": network}, Layout("sd15", (Module(component, name, shape, 1),)))
        return str(caught.value)

    assert refused("vae", "0", 4, 3) == "vae: the model has no such network, which '0' is of"
    assert refused("unet", "7", 4, 3) == "unet: the model has no module '7'"
    assert refused("unet", "1", 4, 4) == "unet: '1' is a LayerNorm, which carries no LoRA"
    assert refused("unet", "0", 5, 3) == "unet: '0' is [4, 3] in the model, but [5, 3] in the LoRAs"
    assert refused("unet", "2", 4, 2, 1, 1) == "unet: '2' is a convolution in groups, or padded otherwise"
    assert not any(module._forward_hooks for module in network.modules())


def test_factors_and_batches_that_do_not_fit_are_refused() -> None:
    network = nn.Linear(3, 4)
    module = Module("unet", "", (4, 3), 1)
    with Stacked({"unet": network}, Layout("sd15", (module,))) as stacked:
        with pytest.raises(ValueError, match="factors of 0 modules, expected 1"):
            stacked.put([])
        with pytest.raises(ValueError, match=r"expected \[L, 4, r\], \[L, r, 3\]"):
            stacked.put([(torch.ones(2, 4, 1), torch.ones(2, 2, 3))])
        with pytest.raises(ValueError, match="one number for all modules"):
            stacked.put([(torch.ones(2, 4, 1), torch.ones(3, 1, 3))])
        stacked.put([(torch.ones(2, 4, 1), torch.ones(2, 1, 3))])
        with pytest.raises(ValueError, match="a batch of 3 cannot be shared out to 2 LoRAs"):
            network(torch.ones(3, 3))
