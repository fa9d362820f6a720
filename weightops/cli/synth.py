"""The command `synth`, whose own commands are in modules of their own, imported when they are used."""

from __future__ import annotations

import click

from weightops.cli.main import Commands, Entry

_ENTRIES: tuple[Entry, ...] = (
    Entry("family", "Start here", "A small base and a family of LoRAs of it, made on the spot."),
    Entry("collect", "The space", "LoRAs of one base as rows of one space, in one gauge."),
    Entry("fit", "The space", "PCA, a VAE or diffusion of a space, with baselines beside them."),
    Entry("evaluate", "The space", "What a space can and cannot do, on LoRAs that it was not fitted on."),
    Entry("fit-images", "New LoRAs", "From a few images: the space's coefficients, learnt through the model."),
    Entry("sample", "New LoRAs", "Drawn, from a condition, between two, or around one."),
    Entry("edit", "New LoRAs", "A LoRA moved along what a label says."),
)


@click.command(
    "synth", cls=Commands, entries=_ENTRIES, subcommand_metavar="COMMAND [ARGS]...",
    short_help="New LoRAs from a space of LoRAs.",
)  # fmt: skip
def command() -> None:
    """New LoRAs from a space of LoRAs: collect many of one base, learn what they share, and make others in seconds.

    \b
    weightops synth collect loras/ --conditions people.csv -o space
    weightops synth fit pca space && weightops synth fit-images photos space/pca.safetensors --model base.safetensors
    """
