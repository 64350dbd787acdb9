"""Extractions that were killed, or whose parts were damaged, go on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssl_vit.evaluation import extract
from tests.conftest import ROOT
from tests.evaluation.test_extract import build_backbone, embeddings, expected, remember_rows, run
from tests.processes import Launch, finish

SCRIPT = ROOT / "scripts" / "extract_features.py"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_backbone(tmp_path_factory.mktemp("backbone"))


class Killed(BaseException):
    """Ends an extraction as SIGKILL does; what catches Ctrl-C does not see it."""


class Stop:
    """Ends the extraction at a part, as a kill would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.save, self.number = extract._save_part, number
        monkeypatch.setattr(extract, "_save_part", self)

    def __call__(self, part: Path, tensors: dict[str, torch.Tensor], key: str) -> None:
        if part.stem.endswith(str(self.number)):
            part.with_suffix(".unfinished").write_bytes(b"half a part")
            raise Killed
        self.save(part, tensors, key)


def test_a_fresh_extraction_goes_on_when_it_was_killed(
    backbone: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, flags = tmp_path / "features.parquet", ["--rows_per_part=7", "--batch_size=4"]
    assert run(backbone, photo_folder, file, *flags) == 0
    for first, feature in ((0, "cls"), (14, "cls"), (0, "mean"), (14, "mean")):
        with monkeypatch.context() as patch:
            encoded = remember_rows(patch)
            if first == 0:  # parts of other settings are of no use, and with the same ones nothing is left over
                Stop(patch, 2)
                with pytest.raises(Killed):
                    run(backbone, photo_folder, file, *flags, f"--feature={feature}", "--fresh=true")
            else:
                assert run(backbone, photo_folder, file, *flags, f"--feature={feature}", "--fresh=true") == 0
            assert encoded == list(range(first, 40))
    torch.testing.assert_close(embeddings(file), expected(backbone, photo_folder, "mean"), rtol=1e-4, atol=1e-5)


def test_a_fresh_extraction_takes_no_part_of_other_settings(
    backbone: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, flags = tmp_path / "features.parquet", ["--rows_per_part=7", "--batch_size=4"]
    with monkeypatch.context() as patch:
        Stop(patch, 2)
        with pytest.raises(Killed):
            run(backbone, photo_folder, file, *flags)
    encoded = remember_rows(monkeypatch)
    assert run(backbone, photo_folder, file, *flags, "--feature=mean", "--fresh=true") == 0
    assert encoded == list(range(40))
    torch.testing.assert_close(embeddings(file), expected(backbone, photo_folder, "mean"), rtol=1e-4, atol=1e-5)


def test_what_was_written_is_known_by_its_content_not_by_how_paths_are_typed(
    backbone: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "features.parquet"
    with monkeypatch.context() as patch:
        Stop(patch, 2)
        with pytest.raises(Killed):
            run(backbone, photo_folder, file, "--rows_per_part=7", "--batch_size=4")
    encoded = remember_rows(monkeypatch)
    monkeypatch.chdir(backbone.parent)
    monkeypatch.setattr("ssl_vit.__version__", "9.9.9")
    again = Path(backbone.name), f"{photo_folder}/", file, "--rows_per_part=7"
    assert run(*again) == 0
    assert encoded == list(range(14, 40))
    assert run(*again) == 0
    assert "is finished" in capsys.readouterr().out
    assert run(backbone, photo_folder / "disc", file) == 2
    assert f"source '{photo_folder}/' -> '{photo_folder / 'disc'}', num_rows 40 -> 20" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
@pytest.mark.parametrize("failing", [0, 2, 5])
def test_what_was_done_before_a_crash_is_not_done_again(
    backbone: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, failing: int
) -> None:
    flags = ["--rows_per_part=7", "--batch_size=4"]
    assert run(backbone, photo_folder, tmp_path / f"whole.{suffix}", *flags) == 0
    file = tmp_path / f"features.{suffix}"
    with monkeypatch.context() as patch:
        Stop(patch, failing)
        with pytest.raises(Killed):
            run(backbone, photo_folder, file, *flags)
    assert not file.exists()
    encoded = remember_rows(monkeypatch)
    assert run(backbone, photo_folder, file, *flags) == 0
    assert encoded == list(range(7 * failing, 40))
    torch.testing.assert_close(embeddings(file), embeddings(tmp_path / f"whole.{suffix}"), rtol=1e-4, atol=1e-5)


def test_a_damaged_part_is_done_again(
    backbone: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "features.parquet"
    monkeypatch.setattr(extract, "write_parquet", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(backbone, photo_folder, file, "--rows_per_part=7")
    monkeypatch.undo()
    part = tmp_path / "features.parquet.parts" / "part-00000002.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert run(backbone, photo_folder, file, "--rows_per_part=7") == 0
    torch.testing.assert_close(embeddings(file), expected(backbone, photo_folder, "cls"), rtol=1e-4, atol=1e-5)


def test_killed_without_warning_it_goes_on(
    backbone: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, flags = tmp_path / "features.safetensors", ["--rows_per_part=1", "--batch_size=1"]
    given = [f"--source={photo_folder}", f"--output={file}", "--precision=no", *flags]
    with Launch([str(SCRIPT), str(backbone), *given]) as launched:
        while not (tmp_path / "features.safetensors.parts" / "part-00000003.safetensors").exists():
            assert launched.processes[0].is_alive(), launched.errors()
        launched.kill()
    assert not file.exists()
    assert run(backbone, photo_folder, file, *flags) == 0
    assert "Going on from row" in capsys.readouterr().out
    torch.testing.assert_close(embeddings(file), expected(backbone, photo_folder, "cls"), rtol=1e-4, atol=1e-5)


def test_two_processes_write_what_one_writes(backbone: Path, photo_folder: Path, tmp_path: Path) -> None:
    flags = ["--rows_per_part=9", "--batch_size=3"]
    assert run(backbone, photo_folder, tmp_path / "one.safetensors", *flags) == 0
    output = tmp_path / "two.safetensors"
    given = [str(backbone), f"--source={photo_folder}", f"--output={output}", "--precision=no", *flags]
    assert finish([str(SCRIPT), *given], num_processes=2).count("Wrote 40 rows") == 1
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(one["embeddings"], two["embeddings"], rtol=1e-4, atol=1e-5)
    assert torch.equal(one["labels"], two["labels"])


def flipped(part: Path, other: Path) -> None:
    content = bytearray(part.read_bytes())
    content[-2] ^= 1
    part.write_bytes(content)


def another_part(part: Path, other: Path) -> None:
    part.write_bytes(other.read_bytes())


def unsealed(part: Path, other: Path) -> None:
    save_file(load_file(part), part)


@pytest.mark.parametrize("damage", [flipped, another_part, unsealed])
def test_a_finished_part_that_has_changed_is_done_again(
    backbone: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage
) -> None:
    file, flags = tmp_path / "x.safetensors", ["--rows_per_part=10", "--batch_size=10", "--num_workers=0"]
    with monkeypatch.context() as patched:
        Stop(patched, 3)
        with pytest.raises(Killed):
            run(backbone, photo_folder, file, *flags)
    parts = sorted((tmp_path / "x.safetensors.parts").glob("part-*.safetensors"))
    damage(parts[1], parts[0])
    assert run(backbone, photo_folder, file, *flags) == 0
    torch.testing.assert_close(embeddings(file), expected(backbone, photo_folder, "cls"), rtol=1e-4, atol=1e-5)
