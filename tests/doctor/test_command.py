"""JSON, page, exit codes and the written config."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.doctor import main
from scripts.pretrain_dino import DEFAULTS as DINO_DEFAULTS
from scripts.pretrain_mae import DEFAULTS as MAE_DEFAULTS
from ssl_vit.data.sources.source import open_source
from ssl_vit.doctor import cost
from ssl_vit.doctor.diagnose import adopt
from ssl_vit.training.config import parse_run
from tests.conftest import ROOT, SMALL_DINO, SMALL_RUN
from tests.doctor.conftest import kinds, look_at, save_noise, save_tiffs

QUICK = [*SMALL_RUN, "--step=false"]
RATES = {"decode_rate", "input_rate", "load_per_core"}


def examine(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, dict[str, Any]]:
    code = main([*map(str, args), "--json=true"])
    return code, json.loads(capsys.readouterr().out)


def without_rates(facts: Any) -> Any:
    if isinstance(facts, dict):
        return {key: without_rates(value) for key, value in facts.items() if key not in RATES}
    return facts


@pytest.mark.parametrize("objective", ["simmim", "fcmae", "lejepa"])
def test_every_objective_with_a_script_is_examined(
    objective: str, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--config={ROOT / 'configs'}/quickstart_{objective}.yaml", "--step=false"]
    code, facts = examine(capsys, photo_folder, *flags, f"--objective={objective}")
    assert code in (0, 1)
    assert facts["run"]["objective"].lower().startswith(objective)


def test_page_and_json_say_the_same(photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts = examine(capsys, photo_folder, *QUICK)
    assert code == 0
    assert facts["problems"] == []
    assert main([str(photo_folder), *QUICK]) == 0
    page = capsys.readouterr().out
    for text in (
        "40, all looked at",
        "40 x 48",
        "100% are not square",
        "40 PNG, RGB of 8 bits",
        "2 classes of 20 images",
        f"mean: {facts['settings']['data']['mean']}",
        "not measured; --step true measures one",
        "No problem found.",
    ):
        assert text in page
    assert max(map(len, page.splitlines())) <= 130  # but for long paths


def test_the_keys_of_the_json_stay(photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, facts = examine(capsys, photo_folder, *QUICK, "--sample=2")
    assert [key for key in facts if key not in ("run", "sizes", "unreadable")] == [
        *("source", "notes", "num_images", "num_read", "files", "formats", "channels", "num_16_bit", "dropped"),
        *("duplicates", "near_duplicates", "pixels", "decode_rate", "labels", "pretrained", "settings"),
        *("load_per_core", "problems", "warnings"),
    ]
    assert facts["sizes"] == {
        **{name: [48, 40] for name in ("smallest", "median", "largest")},
        "num_distinct": 1,
        "share_not_square": 1.0,
    }
    assert list(facts["unreadable"]) == ["count", "share", "interval", "examples"]
    assert facts["labels"]["smallest"] == {"name": "disc", "size": 20}
    assert list(facts["run"]) == [
        *("objective", "arch", "image_size", "patch_size", "num_parameters", "batch_size", "num_steps", "epochs"),
        *("device", "cores", "memory_mib", "input_rate", "step"),
    ]
    assert list(facts["run"]["memory_mib"]) == ["parameters", "teacher", "gradients", "optimizer", "total"]


def test_the_same_arguments_give_the_same_facts(photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, other = (
        examine(capsys, photo_folder, *QUICK, "--sample=10", f"--seed={seed}")[1] for seed in (1, 1, 2)
    )
    assert without_rates(first) == without_rates(second)
    assert first["num_read"] == 10
    assert first["unreadable"]["interval"][1] > 0
    assert first["pixels"]["mean"] != other["pixels"]["mean"]


@pytest.mark.parametrize(("shape", "channels"), [((20, 20), 1), ((20, 20, 3), 3)])
def test_pre_training_takes_the_written_config(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    channels: int,
) -> None:
    folder, file = save_noise(tmp_path / "images", 10, shape), tmp_path / "new" / "mine.yaml"
    monkeypatch.chdir(tmp_path)
    code, facts = examine(capsys, "images", *QUICK, f"--write_config={file}")
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


def test_the_written_config_keeps_what_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = save_noise(tmp_path / "a", 9, (40, 40, 3)), tmp_path / "b c" / "new.yaml"
    given = tmp_path / "given.yaml"
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
    assert "normalisation" not in kinds(again["warnings"])
    assert again["settings"] == facts["settings"]
    file = tmp_path / "x"
    main([str(folder), *flags, "--objective=dino", "--output_dir=mine", "--step=false", f"--write_config={file}"])
    assert parse_run(DINO_DEFAULTS, [f"--config={file}"]).output_dir == "mine"


def test_a_written_config_has_no_problem_of_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    for number in range(9):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 5), dtype=np.uint8)
        np.save(tmp_path / "a" / f"{number}.npy", pixels)
    flags, file = [tmp_path / "a", *QUICK, "--encoder.in_chans=5"], tmp_path / "new.yaml"
    assert examine(capsys, *flags)[0] == 1  # as it stands, the run has three means for five channels
    assert examine(capsys, *flags, f"--write_config={file}")[0] == 0
    config, _ = parse_run(MAE_DEFAULTS, [f"--config={file}"]).resolve(9)
    config.build_transform(config.build_objective().encoder)
    facts = look_at(tmp_path / "a", f"--config={file}")
    assert facts.problems == []
    assert "normalisation" not in kinds(facts.warnings)


def test_black_images_are_not_far_from_their_own_normalisation(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(8):
        Image.new("RGB", (40, 40), (0, 0, number)).save(tmp_path / "a" / f"{number}.png")
    main([str(tmp_path / "a"), *QUICK, f"--write_config={tmp_path / 'new.yaml'}"])
    warnings = look_at(tmp_path / "a", f"--config={tmp_path / 'new.yaml'}").warnings
    assert "normalisation" not in kinds(warnings)


def test_a_written_config_takes_all_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = save_tiffs(tmp_path / "many", (40, 40, 12), planarconfig="contig")
    file = tmp_path / "many.yaml"
    assert examine(capsys, many, *QUICK, f"--write_config={file}")[0] == 0
    code, facts = examine(capsys, many, "--step=false", f"--config={file}")
    assert (code, facts["problems"], facts["run"]["image_size"]) == (0, [], [32, 32])
    pages = save_tiffs(tmp_path / "pages", (7, 40, 40), dtype="uint8")
    file = tmp_path / "pages.yaml"
    code, facts = examine(capsys, pages, *QUICK, "--data.pages=channels", f"--write_config={file}")
    assert (code, facts["settings"]["encoder"]) == (0, {"in_chans": 7})
    assert "pages" not in kinds(facts["warnings"])
    assert parse_run(MAE_DEFAULTS, [f"--config={file}"]).data.pages == "channels"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["--batch.size=64"], "fewer than batch.size 64: a step would see the same image more than once; lower it"),
        (["--encoder.image_size=33"], "encoder.image_size"),
        (["--objective.mask_ratio=0.01"], "objective.mask_ratio"),
    ],
)
def test_a_problem_is_code_1(
    photo_folder: Path, capsys: pytest.CaptureFixture[str], settings: list[str], problem: str
) -> None:
    assert main([str(photo_folder), *QUICK, *settings]) == 1
    problems = capsys.readouterr().out.partition("\nproblems\n  - ")[2].partition("\nwarnings\n")[0]
    assert problem in " ".join(problems.split())


def test_nothing_readable_writes_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.png").write_bytes(b"<html>")
    code, facts = examine(capsys, tmp_path, *QUICK, "--batch.size=1", f"--write_config={tmp_path / 'x.yaml'}")
    assert (code, facts["sizes"], facts["settings"]) == (1, None, None)
    assert facts["pixels"] == {"count": 0, "mean": [], "std": []}
    assert "none of the 1 images" in facts["problems"][0]
    assert not (tmp_path / "x.yaml").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere/here/at/all"], "data.source='nowhere/here/at/all': no such file or folder"),
        ([".", "--mask_ratio=0.5"], "--mask_ratio: no such flag; did you mean --objective.mask_ratio?"),
        ([".", "--objective.num_prototypes=512"], "--objective names another"),
    ],
)
def test_wrong_settings_are_code_2(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    assert main(args) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("sample", ["0", "some", "-1"])
def test_a_sample_is_a_number_or_all(sample: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([".", f"--sample={sample}"])
    assert "at least 1, or all" in capsys.readouterr().err


def test_a_measured_step_is_json_and_nothing_else_is_printed(
    photo_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_SECONDS", 0.0)
    assert main([str(photo_folder), *SMALL_RUN, "--step=true", "--json=true"]) == 0
    step = json.loads(capfd.readouterr().out)["run"]["step"]
    assert list(step) == ["rate", "num_images", "precision", "activations", "num_workers", "run_rate", "hours"]
    assert step["num_images"] == 8
    assert step["hours"] > 0
    assert step["num_workers"] == 0 or torch.cuda.is_available()
