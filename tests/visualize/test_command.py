"""scripts/visualize.py on runs, exports and files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.visualize import main
from ssl_vit.data.augment.evaluation import centre_crop
from ssl_vit.data.sources.source import DataConfig, open_source
from ssl_vit.runs.trained import open_trained
from ssl_vit.visualize import neighbours
from ssl_vit.visualize.film import list_frames
from ssl_vit.visualize.inputs import open_shown_images
from ssl_vit.visualize.neighbours import nearest, short_lines


def draw(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert main([str(word) for word in words]) == 0
    return [Path(line).name for line in capsys.readouterr().out.splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_all_that_an_mae_can_show(mae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = draw(capsys, mae_run, "--open_source", "--out", tmp_path, "--num_images", 2, "--mask", "random", "block")
    assert files == [
        "reconstructions_random.png",
        "reconstructions_block.png",
        "patch_attention_10.png",
        "pca.png",
        "similarity.png",
        "positions.png",
    ]
    for file in files:
        with Image.open(tmp_path / file) as figure:
            assert figure.format == "PNG"
            assert len(np.unique(np.asarray(figure.convert("L")))) > 20


def test_all_that_dino_can_show_as_webp(dino_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what = ["attention", "patch_attention", "pca", "neighbours"]
    files = draw(
        capsys, dino_run, "--open_source=true", "--out", tmp_path, "--num_images", 2, "--format", "webp",
        "--patches", 0, 15, "--foreground",
        "--what", *what,
    )  # fmt: skip
    names = ["attention", "attention_60", "patch_attention_0", "patch_attention_15", "pca", "neighbours"]
    assert files == [f"{name}.webp" for name in names]
    with Image.open(tmp_path / "neighbours.webp") as figure:
        assert figure.format == "WEBP"


def test_files_and_an_exported_backbone(
    mae_run: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = tmp_path / "export"
    export.mkdir()
    for name in ("backbone.safetensors", "config.json"):
        shutil.copy(mae_run / name, export)
    files = [photo_folder / "disc" / "00.png", photo_folder / "square" / "00.png"]
    assert draw(capsys, export, *files, "--what", "similarity", "--image_size", 48, 64) == ["similarity.png"]
    assert (export / "pictures" / "similarity.png").exists()
    assert "holds no decoder" in refused(capsys, export, *files, "--what", "reconstructions")
    assert "does not say where its training images lie" in refused(capsys, export, "--what", "similarity")
    assert "config.yaml: cannot be shown" in refused(capsys, mae_run, mae_run / "config.yaml", "--what", "pca")
    assert "no such file" in refused(capsys, mae_run, tmp_path / "nothing.png", "--what", "pca")
    message = refused(capsys, mae_run, *files, "--what", "pca", "--image_size", 32, 99, 48)
    assert "--image_size 32 99 48: give one number, or height and width" in message


def test_a_mask_given_by_hand_hides_these_patches(
    mae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hide = ["--open_source", "true", "--what", "reconstructions", "--num_images", 1, "--out", tmp_path, "--hide"]
    assert draw(capsys, mae_run, *hide, "0-7") == ["reconstructions_hidden.png"]
    with Image.open(tmp_path / "reconstructions_hidden.png") as figure:
        grey = (np.asarray(figure.convert("RGB")) == 217).all(axis=-1)
    top, bottom = np.flatnonzero(grey.sum(axis=1) > 100)[[0, -1]]
    cell = (bottom - top + 1) * 2
    assert grey.sum() == pytest.approx(cell * cell / 2, rel=0.02)  # half of a square image
    assert "--hide 16: there are 16 patches" in refused(capsys, mae_run, *hide, "16")


def test_the_same_seed_shows_the_same_figures(mae_run: Path, photo_folder: Path) -> None:
    trained = open_trained(mae_run)
    first, again, other = (open_shown_images(trained, [], number=4, seed=seed, asked=True) for seed in (1, 1, 2))
    assert first.rows == again.rows != other.rows
    assert torch.equal(first.images, again.images)
    assert open_shown_images(trained, [str(photo_folder)], number=4, seed=1).rows == first.rows


def test_names_below_panels_do_not_meet() -> None:
    assert short_lines("Smileys & Emotion") == "Smileys &\nEmotion"
    assert short_lines("disc") == "disc"
    lines = short_lines("a long name that no panel is wide enough for").split("\n")
    assert len(lines) == 2
    assert all(len(line) <= 16 for line in lines)
    assert lines[1].endswith("…")


def test_neighbours_are_ordered_and_no_variant_of_the_query() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.7, 0.7], [-1.0, 0.0]])
    groups = np.array([0, 0, 1, 2, -1])
    similarity, places = nearest(gallery[:1], gallery, 3, query_groups=groups[:1], gallery_groups=groups)
    assert places.tolist() == [[3, 2, 4]]
    torch.testing.assert_close(similarity, torch.tensor([[0.5**0.5, 0.0, -1.0]]))
    assert nearest(gallery[:1], gallery, 2)[1].tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="too few images for 4 neighbours"):
        nearest(gallery[:1], gallery, 4, query_groups=groups[:1], gallery_groups=groups)


def test_an_image_is_no_neighbour_of_itself_by_another_path(
    mae_run: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = replace(open_trained(mae_run), crop_pct=0.8)
    inputs = open_shown_images(trained, [str(photo_folder)], number=2, seed=0)
    found, cropped = [], []
    monkeypatch.setattr(neighbours, "draw_grid", lambda *args, cells, **rest: found.append(cells))
    monkeypatch.setattr(neighbours, "centre_crop", lambda *args: cropped.append(args[-1]) or centre_crop(*args))
    monkeypatch.chdir(photo_folder.parent)
    (tmp_path / "link").symlink_to(photo_folder)
    for name in (str(photo_folder), photo_folder.name, str(tmp_path / "link")):
        gallery = open_source(DataConfig(name))
        neighbours.draw_neighbours(trained, inputs, gallery, tmp_path / "drawn.png", most=100, seed=0, k=3)
    assert found[0] == found[1] == found[2]
    assert set(cropped) == {0.8}


def test_figures_are_drawn_in_training_at_their_steps(mae_run: Path, dino_run: Path) -> None:
    for run in (mae_run, dino_run):
        assert [frame.step for frame in list_frames(run)] == [0, 2, 4, 6]
    first, last = (np.asarray(Image.open(list_frames(mae_run)[place].path)) for place in (0, -1))
    assert first.shape == last.shape
    assert (first != last).any()


def test_a_film_shows_them_in_their_order(mae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("film.gif", "film.webp"):
        assert draw(capsys, "film", mae_run, "--out", tmp_path / name) == [f"{name}   4 figures"]
        with Image.open(tmp_path / name) as film:
            assert film.n_frames == 4
            assert film.width == 900
    draw(capsys, "film", mae_run, "--out", tmp_path / "strip.png", "--width", 300)
    with Image.open(tmp_path / "strip.png") as strip, Image.open(tmp_path / "film.gif") as film:
        assert strip.height == pytest.approx(4 * (28 + (film.height - 28) / 3), abs=4)
    assert "pictures_every_steps N" in refused(capsys, "film", tmp_path)
    assert "name a .gif" in refused(capsys, "film", mae_run, "--out", tmp_path / "film.mp4")
    for seconds in (-1, 0, 200, "nan"):
        message = refused(capsys, "film", mae_run, "--out", tmp_path / "film.gif", f"--seconds={seconds}")
        assert f"--seconds {seconds}: must be above 0 and at most 130" in message
    draw(capsys, "film", mae_run, "--out", tmp_path / "slow.gif", "--seconds=130")


def test_a_tracker_is_given_the_numbers_and_the_figures_of_the_run(mae_run: Path) -> None:
    lines = map(json.loads, (mae_run / "metrics.jsonl").read_text().splitlines())
    records = {line["step"]: line for line in lines if "loss" in line}
    read = EventAccumulator(str(mae_run / "tensorboard"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == set(records[6]) - {"step"}
    for name in ("loss", "lr", "images_per_second"):
        events = read.Scalars(name)
        assert [event.step for event in events] == list(records)
        assert [event.value for event in events] == pytest.approx([line[name] for line in records.values()], rel=1e-6)
    assert [image.step for image in read.Images("pictures")] == [frame.step for frame in list_frames(mae_run)]
