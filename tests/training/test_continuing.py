import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ssl_vit.core.writing import UNFINISHED
from ssl_vit.data.config import DataConfig
from ssl_vit.data.decode.bounds import MAX_IMAGE_BYTES
from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.training.config import RunConfig
from ssl_vit.training.continuing import check_run_folder, go_on_as_before, open_run_folder
from ssl_vit.training.optim import OptimConfig
from tests.processes import SERVER
from tests.runs.test_lock import hold


def config(folder: Path, **settings) -> RunConfig:
    return RunConfig(objective=MAEConfig(), output_dir=str(folder), steps=3, **settings)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_that_is_working_is_neither_joined_nor_moved_aside(tmp_path: Path, fresh: bool) -> None:
    run = tmp_path / "run"
    open_run_folder(config(run))
    (run / "metrics.jsonl").write_text("{}\n")
    # This process has the lock, which is as good as none to itself: another one takes a copy of the folder.
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text((run / "config.yaml").read_text())
    ours, theirs = SERVER.Pipe()
    holder = SERVER.Process(target=hold, args=(other, theirs))
    holder.start()
    assert ours.poll(60)
    child = ours.recv()
    with pytest.raises(ValueError, match=f"another run uses this folder, process {holder.pid} on"):
        open_run_folder(config(other, fresh=fresh))
    for pid in (holder.pid, child):
        os.kill(pid, signal.SIGKILL)
    holder.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run"]
    open_run_folder(config(other, fresh=fresh))
    assert len(list(tmp_path.iterdir())) == 2 + fresh


def test_a_run_that_was_killed_before_it_wrote_its_settings_can_be_started(tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_run_folder(config(run))
    (run / "config.yaml").rename(run / f"{UNFINISHED}config.yaml")
    check_run_folder(config(run))
    assert open_run_folder(config(run))[1] is None
    (run / "notes.txt").touch()
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match="holds files but no run"):
        check_run_folder(config(run))


def test_a_folder_whose_weights_could_not_be_read_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^output_dir='.*\\udce9': safetensors reads UTF-8 names alone"):
        check_run_folder(config(tmp_path / "run\udce9"))


def test_what_a_killed_run_had_half_written_is_removed(tmp_path: Path) -> None:
    unfinished = tmp_path / "run" / "checkpoints" / f"{UNFINISHED}step-00000003"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").touch()
    open_run_folder(config(tmp_path / "run"))
    assert not unfinished.exists()


def test_settings_are_only_written_where_they_changed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_run_folder(config(run))
    before = (run / "config.yaml").stat()
    open_run_folder(config(run))
    assert (run / "config.yaml").stat().st_ino == before.st_ino
    open_run_folder(config(run, log_every=7))
    assert (run / "config.yaml").stat().st_ino != before.st_ino
    assert "pid" in json.loads((run / "run.lock").read_text())


def test_a_precision_that_was_given_is_not_left_to_the_machine_later(tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_run_folder(config(run, precision="no"))
    with pytest.raises(ValueError, match=r"precision 'no' -> 'auto'"):
        check_run_folder(config(run))


def test_auto_is_what_a_run_began_with_and_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_run_folder(config(run, optim=OptimConfig(base_lr=1e-4)))
    asked = config(run, optim=OptimConfig(optimizer="auto", base_lr="auto"))
    check_run_folder(asked)
    kept, _, reasons = go_on_as_before(asked, 100)
    assert (kept.optim.optimizer, kept.optim.base_lr) == ("adamw", 1e-4)
    assert reasons == ["optim.optimizer adamw: as this run has it", "optim.base_lr 0.0001: as this run has it"]


def test_a_run_with_a_limit_of_pixels_goes_on_with_one_of_bytes(tmp_path: Path) -> None:
    """As older versions wrote it, whose default is what is now the default."""
    run = tmp_path / "run"
    open_run_folder(config(run))
    text = (run / "config.yaml").read_text()
    new = f"  max_image_bytes: {MAX_IMAGE_BYTES}\n  max_pixels: null\n"
    assert new in text
    (run / "config.yaml").write_text(text.replace(new, "  max_pixels: 178956970\n"))
    check_run_folder(config(run))
    (run / "config.yaml").write_text(text.replace(new, "  max_pixels: 1000\n"))
    with pytest.raises(ValueError, match=r"data.max_image_bytes 3002 -> 536870912"):
        check_run_folder(config(run))
    check_run_folder(config(run, data=DataConfig(max_pixels=1000)))


def test_a_folder_that_is_read_later_is_not_moved_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    open_run_folder(config(run))
    (run / "backbone.safetensors").touch()
    for path in (run, run / "backbone.safetensors"):
        with pytest.raises(ValueError, match=r"fresh=True: would move away .*encoder.pretrained=.* is read from there"):
            check_run_folder(config(run, fresh=True, encoder=EncoderConfig(pretrained=str(path))))
    monkeypatch.chdir(run)  # where the name of published weights looks like a path in the run
    check_run_folder(config(run, fresh=True, encoder=EncoderConfig(pretrained="vit_tiny_patch16_224")))


def test_settings_that_no_run_wrote_are_told_from_a_run_of_other_settings(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 3\ndata: {source: images}\n")
    with pytest.raises(ValueError, match=r"its config.yaml was written by no run; choose another --output_dir"):
        check_run_folder(config(tmp_path))


def test_a_finished_run_keeps_the_settings_that_it_was_scored_with(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def max_images() -> int:
        return yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["evaluation"]["max_images"]

    assert start("--evaluation.max_images=30", steps=1) == 0
    capsys.readouterr()
    assert start("--evaluation.max_images=20", "--log_every=2", steps=1) == 0
    text = capsys.readouterr().out
    assert "these are not applied: evaluation.max_images 30 -> 20; `ssl-vit probe` scores it" in text
    assert max_images() == 30
    assert start("--evaluation.max_images=20", "--extend=true", steps=2) == 0
    assert "not applied" not in capsys.readouterr().out
    assert max_images() == 20
