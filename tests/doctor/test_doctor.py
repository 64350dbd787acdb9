"""The page, its JSON, exit codes and the written config; no test looks at a rate."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.doctor import main
from scripts.pretrain_dino import DEFAULTS as DINO_DEFAULTS
from scripts.pretrain_mae import DEFAULTS as MAE_DEFAULTS
from ssl_vit.data.sources.source import DataConfig, open_source
from ssl_vit.doctor.cost import build_on_meta, measure_step, model_memory, pace
from ssl_vit.doctor.diagnose import adopt, diagnose, suggest_settings
from ssl_vit.doctor.findings import warnings_of_pictures
from ssl_vit.doctor.images import count_labels, read_pictures
from ssl_vit.doctor.page import as_text
from ssl_vit.training.config import parse_run
from tests.conftest import ROOT, SMALL_DINO, SMALL_RUN

QUICK = [*SMALL_RUN, "--step=false"]
RATES = {"decode_rate", "input_rate", "load_per_core", "step"}


def examine(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, dict[str, Any]]:
    code = main([*map(str, args), "--json=true"])
    return code, json.loads(capsys.readouterr().out)


def save(folder: Path, count: int, shape: tuple[int, ...], seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number:03d}.png")
    return folder


def without_rates(facts: Any) -> Any:
    if isinstance(facts, dict):
        return {key: without_rates(value) for key, value in facts.items() if key not in RATES}
    return facts


def warned(facts: dict[str, Any]) -> set[str]:
    return {text.partition(":")[0] for text in facts["warnings"]}


def test_page_and_json_say_the_same(photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts = examine(capsys, photo_folder, *QUICK)
    assert code == 0
    assert facts["problems"] == []
    page = as_text(facts)
    for text in (
        "40, all looked at",
        "40 x 48",
        "100% are not square",
        "40 PNG, RGB of 8 bits",
        "2 classes of 20 images",
    ):
        assert text in page
    assert f"mean: {facts['settings']['data']['mean']}" in page
    assert "not measured; --step true does it" in page
    assert "No problem found." in page
    assert max(map(len, page.splitlines())) <= 130  # but for long paths
    assert main([str(photo_folder), *QUICK]) == 0
    assert page.partition("machine")[0] == capsys.readouterr().out.partition("machine")[0]


def test_the_same_arguments_give_the_same_facts(photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, other = (
        examine(capsys, photo_folder, *QUICK, "--sample=10", f"--seed={seed}")[1] for seed in (1, 1, 2)
    )
    assert without_rates(first) == without_rates(second)
    assert first["num_read"] == 10
    assert first["unreadable"]["interval"][1] > 0
    assert first["pixels"]["mean"] != other["pixels"]["mean"]


@pytest.mark.parametrize(("shape", "channels"), [((20, 20), 1), ((20, 20, 3), 3)])
def test_the_written_config_is_taken_by_pre_training(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    channels: int,
) -> None:
    folder, file = save(tmp_path / "pictures", 10, shape), tmp_path / "new" / "mine.yaml"
    monkeypatch.chdir(tmp_path)
    code, facts = examine(capsys, "pictures", *QUICK, f"--write_config={file}")
    assert code == 0
    config = parse_run(MAE_DEFAULTS, [*SMALL_RUN, f"--config={file}"])
    assert config.data.source == str(folder)
    assert config.encoder.in_chans == channels
    assert list(config.data.mean) == facts["settings"]["data"]["mean"]
    assert len(open_source(config.data)) == 10
    config, _ = config.resolve(10)
    config.build_transform(config.build_objective().encoder)
    assert main([str(folder), *QUICK, f"--write_config={file}"]) == 2
    assert "is there already" in capsys.readouterr().err


def save_arrays(folder: Path, count: int, channels: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        np.save(folder / f"{number}.npy", rng.integers(0, 256, (40, 40, channels), dtype=np.uint8))
    return folder


def test_the_written_config_keeps_what_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, given, file = save(tmp_path / "a", 9, (40, 40, 3)), tmp_path / "given.yaml", tmp_path / "b c" / "new.yaml"
    given.write_text("optim: {base_lr: 2.0e-3, warmup: auto}\nbatch: {per_device: 4}\nepochs: 7\n")
    flags = [*SMALL_DINO, f"--config={given}", "--objective.num_prototypes=640", "--data.split=train", "--seed=5"]
    code, facts = examine(capsys, folder, *flags, "--objective=dino", "--step=false", f"--write_config={file}")
    assert code == 0
    config = parse_run(DINO_DEFAULTS, [f"--config={file}"])
    settings = parse_run(DINO_DEFAULTS, [*flags, f"--data.source={folder}"])
    assert config == adopt(settings, facts["settings"])
    text = file.read_text()
    assert text.startswith(f"# accelerate launch scripts/pretrain_dino.py --config '{file}'\n")
    assert "output_dir" not in text
    assert "center_momentum" not in text  # not given
    # Judged again, it is as good.
    code, again = examine(capsys, folder, f"--config={file}", "--objective=dino", "--step=false")
    assert (code, again["problems"]) == (0, [])
    assert "normalisation" not in warned(again)
    assert again["settings"] == facts["settings"]
    main(
        [
            str(folder),
            *flags,
            "--objective=dino",
            "--output_dir=mine",
            "--step=false",
            f"--write_config={tmp_path / 'x'}",
        ]
    )
    assert parse_run(DINO_DEFAULTS, [f"--config={tmp_path / 'x'}"]).output_dir == "mine"


def test_means_that_were_just_measured_are_no_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = save_arrays(tmp_path / "a", 9, channels=5), tmp_path / "new.yaml"
    flags = [*QUICK, "--encoder.in_chans=5"]
    assert examine(capsys, folder, *flags)[0] == 1  # as it stands, the run has three means for five channels
    assert examine(capsys, folder, *flags, f"--write_config={file}")[0] == 0
    config, _ = parse_run(MAE_DEFAULTS, [f"--config={file}"]).resolve(9)
    config.build_transform(config.build_objective().encoder)
    code, facts = examine(capsys, folder, "--step=false", f"--config={file}")
    assert (code, facts["problems"], "normalisation" in warned(facts)) == (0, [], False)


def test_weights_to_start_from_keep_their_normalisation(tmp_path: Path) -> None:
    config = parse_run(
        MAE_DEFAULTS, [*SMALL_RUN, f"--data.source={save(tmp_path, 3, (9, 9, 3))}", "--data.std=[.1,.1,.1]"]
    )
    pictures = read_pictures(open_source(config.data), np.arange(3), 3)
    started = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, pretrained="x"))
    assert suggest_settings(started, pictures) == {"data": {"mean": [0.485, 0.456, 0.406], "std": [0.1] * 3}}
    assert suggest_settings(config, pictures)["data"]["mean"] == [round(value, 4) for value in pictures.mean]


def test_black_pictures_are_not_far_from_their_own_normalisation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    for number in range(8):
        Image.new("RGB", (40, 40), (0, 0, number)).save(tmp_path / "a" / f"{number}.png")
    file = tmp_path / "new.yaml"
    examine(capsys, tmp_path / "a", *QUICK, f"--write_config={file}")
    assert "normalisation" not in warned(examine(capsys, tmp_path / "a", "--step=false", f"--config={file}")[1])


def test_notes_of_the_source_are_shown(photo_folder: Path) -> None:
    config = parse_run(MAE_DEFAULTS, [*SMALL_RUN, f"--data.source={photo_folder}"])
    source = dataclasses.replace(open_source(config.data), notes=("3 files with .txt were left aside",))
    facts = diagnose(config, source, sample=2, step="false")
    assert facts["notes"] == ["3 files with .txt were left aside"]
    assert "note          3 files with .txt were left aside" in as_text(facts)


def test_greyscale_pictures_are_offered_one_channel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, facts = examine(capsys, save(tmp_path / "xray", 9, (40, 40)), *QUICK)
    assert "greyscale" in warned(facts)
    assert facts["settings"]["encoder"] == {"in_chans": 1}
    assert "in_chans: 1" in as_text(facts)


def save_tiffs(folder: Path, shape: tuple[int, ...], dtype: str = "uint16", **how: Any) -> Path:
    tifffile = pytest.importorskip("tifffile")
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype)
        tifffile.imwrite(folder / f"{number}.tif", pixels, photometric="minisblack", **how)
    return folder


def test_channels_that_cannot_be_converted_are_read_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiffs(tmp_path / "a", (40, 40, 12), planarconfig="contig")
    code, facts = examine(capsys, folder, *QUICK)
    assert code == 1
    assert facts["problems"] == [
        "channels: the images hold 12 channels and encoder.in_chans is 3: use the settings above, a value of "
        "data.mean and data.std for each channel"
    ]
    assert facts["files"] == {"TIFF, 12 channels of 16 bits": 8}
    assert facts["settings"]["encoder"] == {"in_chans": 12}
    assert len(facts["settings"]["data"]["mean"]) == 12
    assert "8 TIFF, 12 channels of 16 bits" in as_text(facts)
    assert "8 hold 16 bits a channel, which are rounded to 8" in as_text(facts)
    assert examine(capsys, folder, *QUICK, f"--write_config={tmp_path / 'x.yaml'}")[0] == 0
    code, facts = examine(capsys, folder, "--step=false", f"--config={tmp_path / 'x.yaml'}")
    assert (code, facts["problems"], facts["run"]["image_size"]) == (0, [], [32, 32])


def test_pages_that_are_not_used_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiffs(tmp_path / "a", (7, 40, 40), dtype="uint8")
    _, facts = examine(capsys, folder, *QUICK)
    assert facts["files"] == {"TIFF, 7 pages of greyscale of 8 bits": 8}
    assert "encoder" not in facts["settings"]  # one channel would be that of the first page
    [pages] = [text for text in facts["warnings"] if text.startswith("pages")]
    assert pages == (
        "pages: 8 of 8 pictures hold several pages or frames, of which the first is used; if they are channels, "
        "--data.pages channels and 7 values in data.mean; if each is an image, --data.pages images"
    )
    code, facts = examine(capsys, folder, *QUICK, "--data.pages=channels", f"--write_config={tmp_path / 'x.yaml'}")
    assert (code, facts["settings"]["encoder"], "pages" in warned(facts)) == (0, {"in_chans": 7}, False)
    assert parse_run(MAE_DEFAULTS, [f"--config={tmp_path / 'x.yaml'}"]).data.pages == "channels"
    _, facts = examine(capsys, folder, *QUICK, "--data.pages=images")
    assert (facts["num_images"], facts["files"]) == (56, {"TIFF, greyscale of 8 bits": 56})
    assert (facts["duplicates"]["count"], facts["settings"]["encoder"]) == (0, {"in_chans": 1})


def test_alpha_and_frames_that_are_not_used_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 4, (40, 40, 4))
    frames = [Image.new("L", (40, 40), shade) for shade in (0, 90, 200)]
    frames[0].save(tmp_path / "z.gif", save_all=True, append_images=frames[1:])
    _, facts = examine(capsys, tmp_path, *QUICK)
    assert facts["dropped"] == {
        "transparency, which is laid on white": 4,
        "3 pages or frames, of which the first is used (see --data.pages)": 1,
    }
    assert "if they are channels" not in "".join(facts["warnings"])


def test_a_channel_mismatch_stops_a_run(photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts = examine(capsys, photo_folder, *QUICK, "--encoder.in_chans=1")
    assert code == 1
    assert "data.mean=" in facts["problems"][0]
    assert len(facts["settings"]["data"]["mean"]) == 1
    code, facts = examine(capsys, photo_folder, *QUICK, "--encoder.in_chans=5")
    assert code == 1
    assert "5 channels were asked for and the picture has 3" in facts["problems"][0]
    assert facts["settings"] is None
    assert "40 of 40, 100.00%" in as_text(facts)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["--batch.size=64"], "fewer than batch.size 64: a step would see the same picture more than once; lower it"),
        (["--encoder.image_size=33"], "encoder.image_size"),
        (["--objective.mask_ratio=0.01"], "objective.mask_ratio"),
    ],
)
def test_what_stops_a_run_is_code_1(
    photo_folder: Path, capsys: pytest.CaptureFixture[str], settings: list[str], problem: str
) -> None:
    code, facts = examine(capsys, photo_folder, *QUICK, *settings)
    assert code == 1
    assert problem in facts["problems"][0]
    assert "problems\n  - " in as_text(facts)


def test_unreadable_pictures_are_a_problem_above_one_percent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "pictures", 99, (33, 33, 3))
    (folder / "page.png").write_bytes(b"<html>")
    code, facts = examine(capsys, folder, *QUICK)
    assert (code, facts["unreadable"]["count"]) == (0, 1)
    assert "unreadable" in warned(facts)
    (folder / "empty.png").write_bytes(b"")
    code, facts = examine(capsys, folder, *QUICK)
    assert code == 1
    assert "2.0% of the pictures cannot be read" in facts["problems"][0]


def test_nothing_readable_writes_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.png").write_bytes(b"<html>")
    code, facts = examine(capsys, tmp_path, *QUICK, "--batch.size=1")
    assert (code, facts["sizes"], facts["settings"]) == (1, None, None)
    assert "none of the 1 pictures" in facts["problems"][0]
    assert main([str(tmp_path), *QUICK, f"--write_config={tmp_path / 'x.yaml'}"]) == 1
    assert not (tmp_path / "x.yaml").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere/here/at/all"], "data.source='nowhere/here/at/all': no such file or folder"),
        ([".", "--mask_ratio=0.5"], "--mask_ratio: no such flag; did you mean --objective.mask_ratio?"),
        ([".", "--objective.num_prototypes=512"], "--objective names another"),
    ],
)
def test_what_cannot_be_used_is_code_2(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    assert main(args) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("sample", ["0", "some", "-1"])
def test_a_sample_is_a_number_or_all(sample: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([".", f"--sample={sample}"])
    assert "give a number of pictures of at least 1, or all" in capsys.readouterr().err


class TestWarnings:
    def test_few_images(self, photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        _, facts = examine(capsys, photo_folder, *QUICK)
        assert warned(facts) >= {"few images", "normalisation"}  # the noise is dark

    def test_small_and_elongated(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        save(tmp_path, 8, (96, 20, 3))
        _, facts = examine(capsys, tmp_path, *QUICK)
        assert warned(facts) >= {"small pictures", "elongated pictures"}
        assert "8 of 8 pictures" in facts["warnings"][1]
        assert "the most 4.8 times" in facts["warnings"][2]
        _, facts = examine(capsys, tmp_path, *QUICK, "--encoder.image_size=[96,24]")
        assert "elongated pictures" not in warned(facts)

    def test_copies(self, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name, seed in {"a": 0, "b": 0, "c": 1}.items():
            save(tmp_path / name, 5, (40, 40, 3), seed)
        _, facts = examine(capsys, tmp_path, *QUICK)
        assert (facts["duplicates"]["count"], facts["duplicates"]["groups"]) == (5, 5)
        assert (facts["near_duplicates"]["count"], "near-duplicates" in warned(facts)) == (0, False)
        assert "duplicates" in warned(facts)
        for number in range(4):  # of three images, one of them twice
            with Image.open(tmp_path / "c" / f"00{number % 3}.png") as image:
                image.save(tmp_path / "c" / f"again{number}.jpg", quality=80 + number)
        _, facts = examine(capsys, tmp_path, *QUICK)
        assert (facts["near_duplicates"]["count"], facts["near_duplicates"]["groups"]) == (4, 3)
        assert facts["near_duplicates"]["examples"][0]["same_as"]["path"] == str(tmp_path / "c" / "000.png")
        assert "near-duplicates" in warned(facts)
        page = as_text(facts)
        assert "nearly so     4 copies of 3 images" in page
        assert f"({tmp_path / 'c' / 'again0.jpg'}) looks the same as row 10" in " ".join(page.split())
        assert not {"duplicates", "near-duplicates"} & warned(
            examine(capsys, tmp_path, *QUICK, "--data.drop_duplicates=true")[1]
        )
        _, facts = examine(capsys, photo_folder, *QUICK)
        assert "duplicates" not in warned(facts)

    def test_one_class(self, photo_folder: Path) -> None:
        source = open_source(DataConfig(source=str(photo_folder))).subset(np.arange(20))
        pictures = read_pictures(source, np.arange(3), 3)
        assert warnings_of_pictures(pictures, count_labels(source), 20)[0].startswith("labels: all labelled pictures")
        assert warnings_of_pictures(pictures, None, 20) == []

    def test_local_crops_and_prototypes(self, photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        dino = [*SMALL_DINO, "--step=false", "--objective=dino"]
        _, facts = examine(capsys, photo_folder, *dino, "--objective.num_prototypes=65536")
        assert "prototypes" in warned(facts)
        crops = "\n".join(text for text in facts["warnings"] if text.startswith("local crops"))
        assert "only 2 x 2 patches" in crops
        assert "enlarged" not in crops  # 16 pixels from 10 x 10
        _, facts = examine(capsys, photo_folder, *dino, "--objective.local_crop_scale=[0.001,0.4]")
        assert "prototypes" not in warned(facts)
        assert any("enlarged" in text for text in facts["warnings"] if text.startswith("local crops"))


def test_memory_is_that_of_the_built_model() -> None:
    config, _ = parse_run(DINO_DEFAULTS, [*SMALL_DINO, "--data.source=x", "--steps=10"]).resolve(100)
    memory, built = model_memory(build_on_meta(config)), config.build_objective()
    held = sum(parameter.numel() for parameter in built.parameters())
    learns = sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
    teacher = [built.teacher_encoder, built.teacher_head]
    assert memory.parameters * 2**20 == 4 * held
    assert memory.gradients * 2**20 == 4 * learns
    assert memory.optimizer == 2 * memory.gradients
    assert memory.teacher * 2**20 == 4 * sum(p.numel() for module in teacher for p in module.parameters())


@pytest.mark.parametrize(("defaults", "settings"), [(MAE_DEFAULTS, SMALL_RUN), (DINO_DEFAULTS, SMALL_DINO)])
def test_a_step_is_measured(defaults: Any, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_vit.doctor.cost._SECONDS", 0.0)
    config, _ = parse_run(defaults, [*settings, "--data.source=x", "--steps=10"]).resolve(100)
    cost = measure_step(config, torch.device("cpu"))
    assert cost.num_images == 8
    assert cost.activations > 0
    assert cost.rate > 0


def test_a_micro_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssl_vit.doctor import cost

    monkeypatch.setattr(cost, "_SECONDS", 0.0)
    prepare, tried = cost.prepare_step, []

    def prepare_if_it_fits(config: Any, objective: Any, num_images: int, device: torch.device) -> Any:
        tried.append(num_images)
        if num_images > 2:
            raise torch.OutOfMemoryError
        return prepare(config, objective, num_images, device)

    monkeypatch.setattr(cost, "prepare_step", prepare_if_it_fits)
    config = parse_run(MAE_DEFAULTS, [*SMALL_RUN, "--data.source=x", "--steps=10"])
    assert cost.measure_step(config, torch.device("cpu")).num_images == 2
    assert tried == [8, 4, 2]


def test_workers_keep_up_as_far_as_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_vit.doctor.cost.num_cpus", lambda: 8)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert vars(pace(900.0, 200.0, cuda)) == {"num_workers": 5, "rate": 900.0, "input_rate": 1000.0}
    assert vars(pace(9000.0, 200.0, cuda)) == {"num_workers": 7, "rate": 1400.0, "input_rate": 1400.0}
    assert vars(pace(300.0, 600.0, cpu)) == {"num_workers": 0, "rate": pytest.approx(200.0), "input_rate": 600.0}


def test_the_script_prints_json_and_nothing_else(photo_folder: Path) -> None:
    words = [sys.executable, "scripts/doctor.py", str(photo_folder), *SMALL_RUN, "--step=true", "--json=true"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    step = json.loads(done.stdout)["run"]["step"]
    assert step["num_images"] == 8
    assert step["hours"] > 0
    assert step["num_workers"] == 0 or torch.cuda.is_available()
