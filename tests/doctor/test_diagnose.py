"""Facts and their page, settings that suit the images, problems and warnings."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import pretrain_dino
from scripts.pretrain_mae import DEFAULTS
from ssl_vit.data.sources.source import DataConfig, open_source
from ssl_vit.doctor.diagnose import diagnose, suggest_settings
from ssl_vit.doctor.findings import warnings_of_images, warnings_of_run
from ssl_vit.doctor.images import count_labels, read_images
from ssl_vit.training.config import RunConfig, parse_run
from tests.conftest import SMALL_DINO, SMALL_RUN
from tests.doctor.conftest import kinds, look_at, save_noise, save_tiffs


def test_a_pretrained_backbone_keeps_its_normalisation(tmp_path: Path) -> None:
    folder = save_noise(tmp_path, 3, (9, 9, 3))
    config = parse_run(DEFAULTS, [*SMALL_RUN, f"--data.source={folder}", "--data.std=[.1,.1,.1]"])
    images = read_images(open_source(config.data), np.arange(3), 3)
    started = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, pretrained="x"))
    assert suggest_settings(started, images) == {"data": {"mean": [0.485, 0.456, 0.406], "std": [0.1] * 3}}
    suggested = suggest_settings(config, images)
    assert suggested is not None
    assert suggested["data"]["mean"] == [round(value, 4) for value in images.pixels.mean]


def test_notes_of_the_source_are_shown(photo_folder: Path) -> None:
    config = parse_run(DEFAULTS, [*SMALL_RUN, f"--data.source={photo_folder}"])
    source = dataclasses.replace(open_source(config.data), notes=("3 files with .txt were left aside",))
    facts = diagnose(config, source, sample=2, step="false")
    assert facts.notes == ["3 files with .txt were left aside"]
    assert "note          3 files with .txt were left aside" in str(facts)


def test_greyscale_images_are_offered_one_channel(tmp_path: Path) -> None:
    facts = look_at(save_noise(tmp_path, 9, (40, 40)))
    assert "greyscale" in kinds(facts.warnings)
    assert facts.settings is not None
    assert facts.settings["encoder"] == {"in_chans": 1}
    assert "in_chans: 1" in str(facts)


def test_channels_that_cannot_be_converted_are_read_as_they_are(tmp_path: Path) -> None:
    facts = look_at(save_tiffs(tmp_path / "a", (40, 40, 12), planarconfig="contig"))
    assert facts.problems == [
        "channels: the images hold 12 channels and encoder.in_chans is 3: use the settings above, a value of "
        "data.mean and data.std for each channel"
    ]
    assert facts.files == {"TIFF, 12 channels of 16 bits": 8}
    assert facts.num_16_bit == 8
    assert facts.settings is not None
    assert facts.settings["encoder"] == {"in_chans": 12}
    assert len(facts.settings["data"]["mean"]) == 12
    assert "8 TIFF, 12 channels of 16 bits" in str(facts)
    assert "8 hold 16 bits a channel, which are rounded to 8" in str(facts)


def test_unused_pages_are_counted(tmp_path: Path) -> None:
    folder = save_tiffs(tmp_path / "a", (7, 40, 40), dtype="uint8")
    facts = look_at(folder)
    assert facts.files == {"TIFF, 7 pages of greyscale of 8 bits": 8}
    assert "encoder" not in (facts.settings or {})  # one channel would be that of the first page
    [pages] = [text for text in facts.warnings if text.startswith("pages")]
    assert pages == (
        "pages: 8 of 8 images hold several pages or frames, of which the first is used; if they are channels, "
        "--data.pages channels and 7 values in data.mean; if each is an image, --data.pages images"
    )
    facts = look_at(folder, "--data.pages=images")
    assert (facts.num_images, facts.files) == (56, {"TIFF, greyscale of 8 bits": 56})
    assert facts.duplicates.count == 0
    assert facts.settings is not None
    assert facts.settings["encoder"] == {"in_chans": 1}


def test_unused_alpha_and_frames_are_counted(tmp_path: Path) -> None:
    save_noise(tmp_path, 4, (40, 40, 4))
    frames = [Image.new("L", (40, 40), shade) for shade in (0, 90, 200)]
    frames[0].save(tmp_path / "z.gif", save_all=True, append_images=frames[1:])
    facts = look_at(tmp_path)
    assert facts.dropped == {
        "transparency, which is laid on white": 4,
        "3 pages or frames, of which the first is used (see --data.pages)": 1,
    }
    assert "if they are channels" not in "".join(facts.warnings)


def test_other_channels_than_the_images_have_stop_a_run(photo_folder: Path) -> None:
    facts = look_at(photo_folder, "--encoder.in_chans=1")
    assert "data.mean=" in facts.problems[0]
    assert facts.settings is not None
    assert len(facts.settings["data"]["mean"]) == 1
    facts = look_at(photo_folder, "--encoder.in_chans=5")
    assert "5 channels were asked for and the image has 3" in facts.problems[0]
    assert facts.settings is None
    assert "40 of 40, 100.00%" in str(facts)


def test_more_than_one_percent_unreadable_is_a_problem(tmp_path: Path) -> None:
    save_noise(tmp_path, 99, (33, 33, 3))
    (tmp_path / "page.png").write_bytes(b"<html>")
    facts = look_at(tmp_path)
    assert (facts.problems, facts.unreadable.count) == ([], 1)
    assert "unreadable" in kinds(facts.warnings)
    (tmp_path / "empty.png").write_bytes(b"")
    facts = look_at(tmp_path)
    assert "2.0% of the images cannot be read" in facts.problems[0]
    assert "unreadable" not in kinds(facts.warnings)


def test_trained_weights_keep_their_patches_whatever_the_size_of_the_images(photo_folder: Path) -> None:
    fresh = parse_run(pretrain_dino.DEFAULTS, [*SMALL_DINO, f"--data.source={photo_folder}", "--encoder.image_size=64"])
    images = read_images(open_source(fresh.data), np.arange(3), 3)
    started = dataclasses.replace(fresh, encoder=dataclasses.replace(fresh.encoder, pretrained="x"))
    encoder = fresh.encoder.build()
    assert any("with encoder.patch_size" in text for text in warnings_of_run(fresh, encoder, images, 40))
    hints = [text for text in warnings_of_run(started, encoder, images, 40) if text.startswith("small images")]
    assert len(hints) == 1
    assert "encoder.image_size 40 costs less" in hints[0]
    coarse = dataclasses.replace(started.encoder, patch_size=32).build()  # four patches are more pixels than it sees
    assert any("larger images would suit" in text for text in warnings_of_run(started, coarse, images, 40))


def test_what_spoils_trained_weights_is_named(photo_folder: Path) -> None:
    fresh = parse_run(pretrain_dino.DEFAULTS, [*SMALL_DINO, f"--data.source={photo_folder}", "--batch.size=256"])
    images = read_images(open_source(fresh.data), np.arange(3), 3)
    encoder = fresh.encoder.build()

    def found(config: RunConfig) -> list[str]:
        warnings = warnings_of_run(config, encoder, images, 40)
        return [text.removeprefix("continuing: ") for text in warnings if text.startswith("continuing")]

    assert found(fresh) == []
    started = dataclasses.replace(fresh, encoder=dataclasses.replace(fresh.encoder, pretrained="x"))
    rate, heads, few = found(started)
    assert rate.startswith("a peak rate of 3.2e-02 suits fresh weights")
    assert "--optim.freeze_backbone_until 0.1 --optim.unfreeze_ramp 0.02" in heads
    assert "--objective.anchor gram" in few
    assert len(found(dataclasses.replace(started, optim=dataclasses.replace(started.optim, base_lr="auto")))) == 2
    careful = dataclasses.replace(
        started,
        optim=dataclasses.replace(started.optim, base_lr=5e-5, freeze_backbone_until=0.1),
        objective=dataclasses.replace(started.objective, anchor="gram"),
    )
    assert found(careful) == []


class TestWarnings:
    def test_few_images(self, photo_folder: Path) -> None:
        assert kinds(look_at(photo_folder).warnings) == {"few images", "normalisation"}  # the noise is dark

    def test_small_and_elongated(self, tmp_path: Path) -> None:
        save_noise(tmp_path, 8, (96, 20, 3))
        warnings = look_at(tmp_path).warnings
        assert kinds(warnings) >= {"small images", "elongated images"}
        assert "8 of 8 images" in warnings[1]
        assert "the most 4.8 times" in warnings[2]
        assert "elongated images" not in kinds(look_at(tmp_path, "--encoder.image_size=[96,24]").warnings)

    def test_copies(self, tmp_path: Path) -> None:
        for name, seed in {"a": 0, "b": 0, "c": 1}.items():
            save_noise(tmp_path / name, 5, (40, 40, 3), seed)
        for number in range(4):  # of three images, one of them twice
            with Image.open(tmp_path / "c" / f"00{number % 3}.png") as image:
                image.save(tmp_path / "c" / f"again{number}.jpg", quality=80 + number)
        facts = look_at(tmp_path)
        near = facts.near_duplicates
        assert near is not None
        assert (facts.duplicates.count, facts.duplicates.groups, near.count, near.groups) == (5, 5, 4, 3)
        assert near.examples[0].same_as.path == str(tmp_path / "c" / "000.png")
        assert kinds(facts.warnings) >= {"duplicates", "near-duplicates"}
        assert "nearly so     4 copies of 3 images" in str(facts)
        assert f"({tmp_path / 'c' / 'again0.jpg'}) looks the same as row 10" in " ".join(str(facts).split())
        dropped = kinds(look_at(tmp_path, "--data.drop_duplicates=true").warnings)
        assert not {"duplicates", "near-duplicates"} & dropped

    def test_one_class(self, photo_folder: Path) -> None:
        source = open_source(DataConfig(source=str(photo_folder))).subset(np.arange(20))
        images = read_images(source, np.arange(3), 3)
        (warning,) = warnings_of_images(images, count_labels(source), 20)
        assert warning.startswith("labels: all labelled images")
        assert list(warnings_of_images(images, None, 20)) == []

    def test_local_crops_and_prototypes(self, photo_folder: Path) -> None:
        warnings = look_at(photo_folder, "--objective.num_prototypes=65536", objective="dino").warnings
        assert "prototypes" in kinds(warnings)
        crops = "\n".join(text for text in warnings if text.startswith("local crops"))
        assert "only 2 x 2 patches" in crops
        assert "enlarged" not in crops  # 16 pixels from 10 x 10
        warnings = look_at(photo_folder, "--objective.local_crop_scale=[0.001,0.4]", objective="dino").warnings
        assert "prototypes" not in kinds(warnings)
        assert any("enlarged" in text for text in warnings if text.startswith("local crops"))


def test_large_images_are_offered_tiles_and_tiles_are_counted(tmp_path: Path) -> None:
    save_noise(tmp_path, 3, (150, 130, 3))
    own = ["--encoder.image_size=32", f"--data.cache_dir={tmp_path / 'cache'}"]
    whole = look_at(tmp_path, *own)
    assert [text for text in whole.warnings if text.startswith("large")] == [
        "large images: the shorter side, 130 pixels at the median, becomes 32, and what is 20 pixels wide becomes 4.9; "
        "if small things matter, --data.tile_size 41 learns from tiles at the images' own scale (docs/tiles.md)"
    ]
    tiled = look_at(tmp_path, *own, "--data.tile_size=41", "--epochs=4", "--batch.size=8", "--steps=null")
    assert not kinds(tiled.warnings) & {"large images", "small images"}
    assert tiled.notes[0] == ("3 images are cut into 48 tiles of 41 x 41 pixels, each of which counts as an image")
    assert tiled.num_images == 3
    assert tiled.run is not None
    assert (tiled.run.num_steps, tiled.run.epochs) == (24, 4)
    assert "small images" in kinds(look_at(tmp_path, *own, "--data.tile_size=24").warnings)


@pytest.mark.parametrize("objective", ["dino", "dinov2", "simdino", "simdinov2", "lejepa"])
def test_a_micro_batch_that_is_too_small_for_a_statistic_is_warned_of(photo_folder: Path, objective: str) -> None:
    has_norm = objective in ("dino", "dinov2")  # without it their losses take no such statistic
    own = ["--objective.head_batch_norm=auto"] if has_norm else []

    def warned(*flags: str) -> list[str]:
        warnings = look_at(photo_folder, *own, *flags, objective=objective).warnings
        return [text for text in warnings if text.startswith("micro-batch:")]

    small = ["--batch.size=128", "--batch.per_device=32"]
    assert "at once on all devices, 32 on one device, and 64 are the fewest" in warned(*small)[0]
    assert warned("--batch.size=128", "--batch.per_device=64") == []
    assert "8 on one device" in warned()[0]
    if has_norm:
        assert warned(*small, "--objective.head_batch_norm=false") == []
