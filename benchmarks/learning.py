#!/usr/bin/env python3
"""Does training learn? The held-out denoising loss of a tiny model, without an adapter and with trained ones.

    python benchmarks/learning.py --folder learning      four minutes on one thread; the curve is learning/learning.png

A base is made first: the tiny SD1.5, whose UNet learns sprites of one style ("plain") from nothing. Its autoencoder is
made by hand, for random weights would forget the colours: the mean colour of 8 x 8 pixels, and how much their quarters
differ crosswise. Then LoRAs are trained on it, by `weightops train`, on 64 sprites of each of two other styles, with
three seeds; as each goes on, the loss is measured on 16 sprites that were in no run, at 8 timesteps, always on the same
noise: of the adapter's own style, and at the end of the other one.

It ends with exit code 1 where an adapter's loss is not 20 % below the base's on its own style, or not below that of
each adapter that was trained on the other style.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from weightops.diffusion.adapters import wear
from weightops.diffusion.dataset import Framing, read_examples
from weightops.diffusion.encoding import encode, encoding_of
from weightops.diffusion.extras import hushed
from weightops.diffusion.figures import curve
from weightops.diffusion.models import load
from weightops.diffusion.objectives import choose, draw, held_out_loss, loss, noised, objective_of
from weightops.diffusion.tiny import sprites, tiny_model
from weightops.diffusion.train import train

if TYPE_CHECKING:
    from weightops.diffusion.models import Loaded

PLAIN, STYLES = "plain", ("striped", "dusk")
FRAMING = Framing((64, 64), center_crop=True)
GOAL = 0.2  # of the base's loss, that an adapter must take away

# Found on another seed of the base: attention alone, at these rates, takes away 13 to 16 %.
LORA: dict[str, Any] = {
    "rank": 8, "conv_rank": 8, "lr": 8e-3, "betas": (0.9, 0.99), "schedule": "cosine", "batch": 8, "resolution": 64,
    "center_crop": True, "device": "cpu",
}  # fmt: skip


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the files, and keep them (default: temporary)")
    parser.add_argument("--pretrain", type=int, default=300, help="steps in which the base learns (default: 300)")
    parser.add_argument("--steps", type=int, default=100, help="steps of each adapter (default: 100)")
    parser.add_argument("--seeds", type=int, default=3, help="runs for each style (default: 3)")
    parser.add_argument("--images", type=int, default=64, help="sprites to learn from (default: 64)")
    parser.add_argument("--held-out", type=int, default=16, help="sprites to measure on (default: 16)")
    parser.add_argument("--pairs", type=int, default=8, help="timesteps to measure at (default: 8)")
    args = parser.parse_args(words)
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return bench(folder, args)


def bench(folder: Path, args: argparse.Namespace) -> int:
    began = time.perf_counter()
    for style in (PLAIN, *STYLES):
        sprites(folder / style, count=args.images, seed=1, style=style)
    for style in STYLES:
        sprites(folder / f"{style}-held-out", count=args.held_out, seed=2, style=style)
    base = make_base(folder, args.pretrain)
    print(f"the base has learnt {PLAIN} sprites for {args.pretrain} steps ({time.perf_counter() - began:.0f} s)")
    loaded = load(base, where="learning", device="cpu")
    measured = Measure(loaded, folder, args.pairs)
    without = {style: measured(style, None) for style in STYLES}
    own: dict[str, list[dict[int, float]]] = {style: [] for style in STYLES}
    other: dict[str, list[float]] = {style: [] for style in STYLES}
    for seed in range(args.seeds):
        for style, elsewhere in zip(STYLES, reversed(STYLES), strict=True):
            output = folder / f"{style}-{seed}.safetensors"
            report = train(
                "text-to-image", folder / style, model=base, output=output, steps=args.steps, seed=seed, force=True,
                checkpoint_every=max(1, args.steps // 2), cache=folder / "cache", **LORA,
            )  # fmt: skip
            losses = {0: without[style]}
            for path in report.checkpoints[:-1]:
                losses[int(path.rpartition("-")[2])] = measured(style, Path(path, "lora.safetensors"))
            losses[args.steps] = measured(style, output)
            own[style].append(losses)
            other[elsewhere].append(measured(elsewhere, output))
            print(f"{style}, seed {seed}: {losses[args.steps]:.4f}, {percent(losses[args.steps], without[style])}")
    picture = folder / "learning.png"
    series = {
        f"{style}, seed {seed}": (list(losses), list(losses.values()))
        for style in STYLES
        for seed, losses in enumerate(own[style])
    }
    for style in STYLES:
        ends = [without[style], statistics.mean(other[style])]
        series[f"{style}, adapters of the other style"] = ([0, args.steps], ends)
    title = "Held-out denoising loss on two styles, by the steps of an adapter"
    curve(series, title=title, x="step", y="mean squared error", path=picture)
    verdict = show(without, own, other, args.steps)
    figures = {"base": without, "own": own, "other": other, "seconds": time.perf_counter() - began}
    (folder / "learning.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{time.perf_counter() - began:.0f} s; {picture}")
    return 0 if verdict else 1


def show(
    without: dict[str, float], own: dict[str, list[dict[int, float]]], other: dict[str, list[float]], steps: int
) -> bool:
    """A row for each style; and is the goal reached?"""
    print(f"\n{'held-out loss on':20}{'base':>8}{'own adapter (of seeds)':>36}{'of the other style':>28}")
    reached = True
    for style, base in without.items():
        ends = [losses[steps] for losses in own[style]]
        mine = f"{statistics.mean(ends):.4f} ({percent(max(ends), base)} to {percent(min(ends), base)})"
        theirs = f"{statistics.mean(other[style]):.4f} ({percent(statistics.mean(other[style]), base)})"
        print(f"{style:20}{base:8.4f}{mine:>36}{theirs:>28}")
        reached = reached and max(ends) <= (1 - GOAL) * base and max(ends) < min(other[style])
    return reached


def percent(found: float, base: float) -> str:
    return f"{100 * (found / base - 1):+.1f} %"


class Measure:
    """The held-out loss on a style's pictures, with an adapter's file on the model or without."""

    def __init__(self, loaded: Loaded, folder: Path, pairs: int) -> None:
        self.loaded = loaded
        self.pairs = pairs
        self.worn: Path | None = None
        self.encoding, self.objective = encoding_of(loaded, where="learning"), objective_of(loaded)
        self.encoded = {
            style: encode(loaded, read_examples(folder / f"{style}-held-out", where=style).examples, FRAMING)
            for style in STYLES
        }

    def __call__(self, style: str, adapter: Path | None) -> float:
        if adapter != self.worn:
            wear(self.loaded, [] if adapter is None else [adapter])
            self.worn = adapter
        found = held_out_loss(
            self.loaded, self.encoding, self.encoded[style], self.objective, pairs=self.pairs, seed=3, batch=16
        )  # fmt: skip
        return found.mean


# ------------------------------------------------------------------------------------------------ the base


def make_base(folder: Path, steps: int, batch: int = 8) -> Path:
    """A tiny SD1.5 that makes plain sprites, as well as it learns to in so many steps."""
    import torch

    loaded = load(tiny_model("sd15", folder / "random"), where="learning", device="cpu")
    average(loaded.pipe.vae)
    encoding, objective = encoding_of(loaded, where="learning"), objective_of(loaded)
    encoded = encode(loaded, read_examples(folder / PLAIN, where=PLAIN).examples, FRAMING)
    unet = loaded.pipe.unet.requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        indices = choose(len(encoded), seed=0, step=step, slots=range(batch), per_step=batch)
        drawn = draw(objective, seed=0, step=step, slots=range(batch), shape=encoded.shape)
        given = encoded.batch(indices, drawn.flips)
        noisy = noised(objective, given["mean"], drawn)
        answer = encoding.predict(loaded.pipe, noisy, drawn.timesteps, given, given["sizes"])
        optimizer.zero_grad()
        loss(objective, answer, given["mean"], drawn).mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with hushed():
        loaded.pipe.save_pretrained(folder / "base")
    return folder / "base"


def average(vae: Any) -> None:
    """Have the encoder average: red, green and blue of 8 x 8 pixels; and of their luminance the quarters, crosswise.

    What a residual block adds is zero, so that each value passes them by. Each feature stands there with its negative:
    a group norm of two channels then takes no mean away, and a difference undoes the SiLU: SiLU(x) - SiLU(-x) = x.
    """
    import torch

    encoder, features = vae.encoder, 4
    colours = torch.cat([torch.eye(3), torch.tensor([[0.299, 0.587, 0.114]])])
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if any(part in name for part in ("conv2", "to_out", "conv_in", "conv_out", "downsamplers", "shortcut")):
                parameter.zero_()
        encoder.conv_norm_out.weight.fill_(1)
        encoder.conv_norm_out.bias.zero_()
        for feature in range(features):
            plus, minus = 2 * feature, 2 * feature + 1
            encoder.conv_in.weight[plus, :, 1, 1] = colours[feature]
            encoder.conv_in.weight[minus, :, 1, 1] = -colours[feature]
            encoder.conv_out.weight[feature, plus, 1, 1] = 1
            encoder.conv_out.weight[feature, minus, 1, 1] = -1
        halves = [block.downsamplers[0].conv for block in encoder.down_blocks if block.downsamplers]
        for number, half in enumerate(halves):
            for channel in range(2 * features):
                crosswise = number == len(halves) - 1 and channel >= 2 * (features - 1)
                quarters = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) if crosswise else torch.ones(2, 2)
                half.weight[channel, channel, :2, :2] = quarters / 4
        for block in encoder.down_blocks:
            for residual in block.resnets:
                if residual.conv_shortcut is not None:
                    for channel in range(2 * features):
                        residual.conv_shortcut.weight[channel, channel] = 1
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias.zero_()
        for feature in range(features):
            vae.quant_conv.weight[feature, feature] = 1 / vae.config.scaling_factor
        vae.quant_conv.bias[features:] = -14  # the logarithm of next to no variance


if __name__ == "__main__":
    sys.exit(main())
