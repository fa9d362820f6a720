"""A family made on the spot: a base that has learnt its creatures, and a LoRA of each."""

from __future__ import annotations

import csv
import inspect
import json
import shutil
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import weightops
from weightops.cli import synth_family
from weightops.diffusion.dataset import read_examples
from weightops.diffusion.models import load
from weightops.errors import FormatError, Interrupted, OutputError, UsageError
from weightops.synthesis import family as family_module
from weightops.synthesis.conditions import read_conditions
from weightops.synthesis.embedders import embedder_of
from weightops.synthesis.family import FamilyReport, family
from weightops.synthesis.family_base import encoded
from weightops.synthesis.family_embedder import make_embedder
from weightops.synthesis.family_loras import at_once
from weightops.synthesis.family_pictures import NAMES, SIDE, draw, generator, identities
from weightops.synthesis.gauge import delta_gram
from weightops.synthesis.members import Reader, layout_of, read_member
from weightops.synthesis.stacked import Stacked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

WORDS: dict[str, Any] = {"count": 4, "seed": 3, "images": 3, "held_out": 2, "steps": 5, "base_steps": 6}
LORAS = [f"creature-{number:03d}" for number in range(4)]


@pytest.fixture(scope="module", autouse=True)
def small_groups() -> Iterator[None]:
    """So that there are several, as of a large family."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family_module, "GROUP", 2)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_groups: None) -> tuple[Path, FamilyReport]:
    """A whole family of four, quickly and badly taught."""
    folder = tmp_path_factory.mktemp("family") / "toy"
    return folder, family(folder, random_gauge=True, **WORDS)


def copied(made: tuple[Path, FamilyReport], folder: Path) -> Path:
    return shutil.copytree(made[0], folder / "copy")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("which", range(len(NAMES)), ids=NAMES)
def test_each_number_shows_and_changes_a_picture_little_by_little(which: int) -> None:
    who = np.full((41, len(NAMES)), 0.5)
    who[:, which] = np.linspace(0, 1, 41)
    # The same chance for all: the pose stays.
    drawn = np.concatenate([draw(each[None], generator(0, 5)) for each in who]).astype(float)
    steps = np.abs(np.diff(drawn, axis=0)).mean((1, 2, 3))
    assert np.abs(drawn[-1] - drawn[0]).mean() > 1.5
    assert steps.max() < 1.5
    assert steps.min() > 0


def test_pictures_of_one_creature_differ_in_what_its_numbers_do_not_say() -> None:
    who = identities(1, generator(0, 1))
    drawn = draw(np.repeat(who, 6, 0), generator(0, 2))
    assert drawn.shape == (6, SIDE, SIDE, 3)
    assert len({picture.tobytes() for picture in drawn}) == 6
    assert np.array_equal(drawn, draw(np.repeat(who, 6, 0), generator(0, 2)))
    # And less than they differ from those of others.
    others = draw(identities(6, generator(0, 3)), generator(0, 2))
    assert drawn.std(0).mean() < 0.75 * others.std(0).mean()


# ------------------------------------------------------------------------------------------------ what is there


def test_a_family_is_what_the_other_commands_take(made: tuple[Path, FamilyReport]) -> None:
    folder, report = made
    assert sorted(path.name for path in folder.iterdir()) == [
        "base", "conditions.csv", "embedder.safetensors", "family.json", "held-out", "images", "loras",
        "loras-random-gauge",
    ]  # fmt: skip
    for name in ("loras", "loras-random-gauge"):
        assert sorted(path.name for path in (folder / name).iterdir()) == [f"{lora}.safetensors" for lora in LORAS]
    conditions = read_conditions(folder / "conditions.csv")
    assert conditions.names == NAMES
    assert sorted(conditions.rows) == LORAS
    for name, count in (("images", 3), ("held-out", 2)):
        assert sorted(path.name for path in (folder / name).iterdir()) == LORAS
        for lora in LORAS:
            found = read_examples(folder / name / lora, where="test")
            assert [example.caption for example in found.examples] == ["a creature"] * count
            assert not found.warnings
    digests = {example.picture.digest for name in ("images", "held-out") for lora in LORAS
               for example in read_examples(folder / name / lora, where="test").examples}  # fmt: skip
    assert len(digests) == 4 * 5
    assert report.bytes_written == sum(map(len, contents(folder).values()))


def test_a_lora_is_an_ordinary_one_of_the_base(made: tuple[Path, FamilyReport]) -> None:
    folder, report = made
    member = read_member(folder / "loras" / "creature-000.safetensors")
    layout = layout_of([member])
    assert layout.architecture == "sd15"
    assert (len(layout.modules), layout.width) == (report.modules, report.features) == (100, 12704)
    assert {module.rank for module in layout.modules} == {2}
    assert any(len(module.shape) == 4 for module in layout.modules)
    said = weightops.inspect(folder / "loras" / "creature-000.safetensors")
    assert said.lora is not None
    assert (said.architecture, said.lora["dialect"]) == ("sd15", "kohya")


def test_the_base_loads_and_draws_with_a_lora_fused_as_with_it_stacked(
    made: tuple[Path, FamilyReport], tmp_path: Path
) -> None:
    folder, _ = made
    lora = folder / "loras" / "creature-001.safetensors"
    weightops.fuse(folder / "base", (lora, 3.0), output=tmp_path / "fused")
    base = load(folder / "base", where="test", device="cpu")
    fused = load(tmp_path / "fused", where="test", device="cpu", like=folder / "base")
    assert base.architecture == fused.architecture == "sd15"
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    texts = base.pipe.encode_prompt("a creature", "cpu", 1, do_classifier_free_guidance=False)[0].expand(2, -1, -1)
    given = noise, torch.tensor([100, 700]), texts
    layout = layout_of([read_member(lora)])
    factors, _ = Reader("sd15").factors(lora, layout)
    with torch.no_grad(), Stacked({"unet": base.pipe.unet}, layout) as stacked:
        alone = base.pipe.unet(*given).sample
        stacked.put([(up.float()[None], down.float()[None]) for up, down in factors], 3.0)
        found = base.pipe.unet(*given).sample
        wanted = fused.pipe.unet(*given).sample
    assert (wanted - alone).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    image = base.pipe("a creature", num_inference_steps=2, guidance_scale=1.0, output_type="np").images[0]
    assert image.shape == (SIDE, SIDE, 3)
    assert np.isfinite(image).all()


def test_latents_have_mean_0_and_deviation_1_in_each_channel(made: tuple[Path, FamilyReport]) -> None:
    vae = load(made[0] / "base", where="test", device="cpu").pipe.vae
    numbers = generator(1, 1)
    pictures = draw(identities(400, numbers), numbers)
    latents = encoded(vae, pictures)
    assert latents.shape == (400, 4, 8, 8)
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1
    # What training draws about the mean is a twentieth of that.
    spread = vae.encode(torch.zeros(1, 3, SIDE, SIDE)).latent_dist.std * vae.config.scaling_factor
    torch.testing.assert_close(spread, torch.full_like(spread, 0.05))


def test_training_lowers_the_loss_on_held_out_pictures(made: tuple[Path, FamilyReport]) -> None:
    _, report = made
    assert report.trained_loss < report.base_loss
    assert report.gain == 1 - report.trained_loss / report.base_loss
    assert 0 < report.vae_error < 0.5


def test_the_embedder_reads_the_numbers_off_pictures_that_it_has_not_seen(made: tuple[Path, FamilyReport]) -> None:
    from PIL import Image

    folder, report = made
    embedder = embedder_of(str(folder / "embedder.safetensors"))
    assert embedder.names == NAMES
    numbers = generator(99, 1)
    who = identities(300, numbers)
    read = embedder.embed([Image.fromarray(picture) for picture in draw(who, numbers)])
    found = 1 - np.square(read - who).mean(0) / who.var(0)
    assert found == pytest.approx([report.embedder[name] for name in NAMES], abs=0.12)
    assert found.min() > 0.3
    assert found.mean() > 0.65


def test_the_embedder_is_the_same_bytes_each_time(made: tuple[Path, FamilyReport], tmp_path: Path) -> None:
    folder, report = made
    assert make_embedder(tmp_path / "again.safetensors", seed=WORDS["seed"]) == report.embedder
    assert (tmp_path / "again.safetensors").read_bytes() == (folder / "embedder.safetensors").read_bytes()


def test_another_gauge_is_other_factors_of_the_same_changes(made: tuple[Path, FamilyReport]) -> None:
    folder, _ = made
    name = "creature-002.safetensors"
    layout = layout_of([read_member(folder / "loras" / name)])
    reader = Reader("sd15")
    one, other = (reader.factors(folder / place / name, layout)[0] for place in ("loras", "loras-random-gauge"))
    turned = 0
    for (up, down), (up2, down2) in zip(one, other, strict=True):
        torch.testing.assert_close(up2 @ down2, up @ down, rtol=0, atol=1e-6 * float((up @ down).norm()) + 1e-12)
        gauge = torch.linalg.lstsq(up, up2).solution
        assert torch.linalg.cond(gauge) <= 10.001
        turned += int(torch.linalg.matrix_norm(gauge - torch.eye(2, dtype=torch.float64)) > 0.1)
    assert turned == len(layout.modules)
    norms = [delta_gram([(u[None], d[None]) for u, d in f], [(u[None], d[None]) for u, d in f]) for f in (one, other)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------ kept, refused


def test_an_interrupted_family_goes_on_and_is_the_same(
    made: tuple[Path, FamilyReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(made, tmp_path)
    state = json.loads((folder / "family.json").read_text())
    state["losses"] = {}
    (folder / "family.json").write_text(json.dumps(state))
    for name in ("loras", "loras-random-gauge", "images/creature-002"):
        shutil.rmtree(folder / name)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("what is there is not made again")

    monkeypatch.setattr(family_module, "make_base", never)
    monkeypatch.setattr(family_module, "make_embedder", never)

    def stop(done: int, total: int, title: str) -> None:
        if title == "training LoRAs" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        family(folder, on_progress=stop, random_gauge=True, **WORDS)
    assert str(caught.value) == f"synth family: interrupted; what is done is kept in {folder}"
    assert caught.value.hint == "the same command goes on from there"
    assert len(list((folder / "loras").iterdir())) == 2
    report = family(folder, random_gauge=True, **WORDS)
    assert report.trained_before == 2
    assert (report.base_loss, report.trained_loss) == (made[1].base_loss, made[1].trained_loss)
    assert contents(folder) == contents(made[0])


def test_a_gauge_is_added_to_a_family_that_is_whole(made: tuple[Path, FamilyReport], tmp_path: Path) -> None:
    folder = copied(made, tmp_path)
    shutil.rmtree(folder / "loras-random-gauge")
    assert family(folder, random_gauge=True, **WORDS).trained_before == 4
    assert contents(folder) == contents(made[0])


def test_a_family_of_other_words_is_refused_and_left_alone(made: tuple[Path, FamilyReport]) -> None:
    folder, _ = made
    before = contents(folder)
    with pytest.raises(UsageError) as caught:
        family(folder, **{**WORDS, "seed": 4, "base_steps": 9})
    assert str(caught.value) == f"{folder}: holds a family that was made with other words: 'seed', 'base-steps'"
    assert caught.value.hint == "the same words go on with it; --force makes it anew"
    with pytest.raises(OutputError) as whole:
        family(folder, random_gauge=True, **WORDS)
    assert str(whole.value) == f"{folder}: holds this family already, whole"
    assert contents(folder) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputError) as caught:
            family(tmp_path, force=force, **WORDS)
        assert str(caught.value) == f"{tmp_path}: is a folder of something else"
    with pytest.raises(OutputError, match=r"notes.txt: exists, and is no folder"):
        family(tmp_path / "notes.txt", **WORDS)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_damaged_state_is_refused_and_force_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "toy"
    (folder / "loras").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    for text in ("{", "[]", '{"words": 3}', '{"version": "1", "words": {}, "learnt": 5, "losses": {}, "embedder": {}}'):
        (folder / "family.json").write_text(text)
        with pytest.raises(FormatError) as caught:
            family(folder, **WORDS)
        assert str(caught.value) == f"{folder / 'family.json'}: cannot be read as the state of a family"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        family(folder, force=True, on_progress=stop, **WORDS)
    assert json.loads((folder / "family.json").read_text())["losses"] == {}
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "loras").exists()


@pytest.mark.parametrize(
    ("word", "value", "said"),
    [
        ("count", 1, "--count: found 1, expected 2 or more"),
        ("held_out", 0, "--held-out: found 0, expected 1 or more"),
        ("seed", -1, "--seed: found -1, expected 0 or more"),
        ("seed", 2**63, "--seed: found 9223372036854775808, expected less than 2^63"),
        ("rank", 17, "--rank: found 17, but the base's narrowest modules have 16 channels"),
    ],
)
def test_words_that_cannot_be_are_refused_before_a_folder_is_made(
    tmp_path: Path, word: str, value: int, said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        family(tmp_path / "toy", **{**WORDS, word: value})
    assert str(caught.value) == said
    assert not (tmp_path / "toy").exists()


# ------------------------------------------------------------------------------------------------ threads


class FakeTrainer:
    """Of a Trainer what `at_once` uses."""

    def __init__(self, stopped: threading.Event | None = None) -> None:
        self.stopped = stopped or threading.Event()

    def copy(self) -> FakeTrainer:
        return FakeTrainer(self.stopped)


def test_groups_come_in_their_order_and_no_two_share_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightops.synthesis.family_loras.usable_cores", lambda: 3)
    busy: set[int] = set()
    first: Any = FakeTrainer()

    def learnt(trainer: Any, group: list[int]) -> int:
        assert id(trainer) not in busy
        busy.add(id(trainer))
        threading.Event().wait(0.02 if group[0] % 2 else 0.001)
        busy.discard(id(trainer))
        return group[0]

    assert list(at_once(first, learnt, [[n] for n in range(12)])) == list(range(12))
    assert first.stopped.is_set()


def test_a_group_that_fails_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightops.synthesis.family_loras.usable_cores", lambda: 2)
    first: Any = FakeTrainer()
    begun = []

    def learnt(trainer: Any, group: list[int]) -> int:
        begun.append(group[0])
        if group[0] == 0:
            raise ValueError("broken")
        assert trainer.stopped.wait(10)
        return group[0]

    with pytest.raises(ValueError, match="broken"):
        list(at_once(first, learnt, [[n] for n in range(50)]))
    assert len(begun) < 5


# ------------------------------------------------------------------------------------------------ command line


def test_every_word_is_an_option_with_its_default() -> None:
    given = synth_family.command.make_context("family", ["folder"]).params
    words = {word: p.default for word, p in inspect.signature(family).parameters.items() if word != "on_progress"}
    assert given == {**words, "output": "folder", "as_json": False, "quiet": False}


def test_the_command_says_what_it_has_made(made: tuple[Path, FamilyReport], tmp_path: Path) -> None:
    folder = copied(made, tmp_path)
    lora = folder / "loras" / "creature-003.safetensors"
    wanted = lora.read_bytes()
    words = [f"--{name.replace('_', '-')}={value}" for name, value in WORDS.items()]
    for option in ("--json", ""):
        lora.unlink()
        state = json.loads((folder / "family.json").read_text())
        del state["losses"]["creature-003"]
        (folder / "family.json").write_text(json.dumps(state))
        done = CliRunner().invoke(synth_family.command, [str(folder), *words, *filter(None, [option])])
        assert done.exit_code == 0, done.output
        if option:
            said = json.loads(done.stdout)
            assert (said["command"], said["count"], said["trained_before"]) == ("synth family", 4, 3)
            assert said["gain"] == 1 - said["trained_loss"] / said["base_loss"]
            assert list(said["embedder_r2_by_number"]) == list(NAMES)
        else:
            assert "4 LoRAs of rank 2 on a base of their own" in done.output
            assert "100 modules, by 12,704 numbers" in done.output
    assert lora.stat().st_size == len(wanted)
    with (folder / "conditions.csv").open() as file:
        assert next(csv.reader(file)) == ["name", *NAMES]
