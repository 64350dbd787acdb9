"""What a run's folder or an export names as its images is opened where the user asks for it, and nowhere else."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from scripts import evaluate_knn, export, extract_features, report, visualize
from ssl_vit.evaluation import command, extract, task
from ssl_vit.evaluation.probes import KNNConfig
from ssl_vit.export import targets
from ssl_vit.runs import trained
from ssl_vit.visualize import command as visualize_command
from ssl_vit.visualize import inputs

STRANGE = {
    "a data set of the hub": "someone/beacon",
    "an address": "https://evil.example/beacon.parquet",
    "a chain": "reference://::memory://x",
    "a device": "/dev/zero",
    "files of the user": "/home/*/.ssh/*",
    "a mixture": {"someone/beacon": 0.5, "openmoji": 0.5},
    "nearly what is built in": "openmoji/openmoji",
}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was opened, of data and of the network."""
    found: list[Any] = []

    def note(name: str) -> Callable[..., None]:
        def refuse(*args: Any, **_: Any) -> None:
            found.append((name, args))
            raise ValueError(f"{name} was opened")

        return refuse

    for module in (inputs, visualize_command, task, extract):
        monkeypatch.setattr(module, "open_source", note("source"))
    monkeypatch.setattr(targets, "open_images", note("images"))
    monkeypatch.setattr(datasets, "load_dataset", note("data set"))
    monkeypatch.setattr(socket.socket, "connect", note("network"))
    return found


def strange_run(made: Path, folder: Path, source: Any) -> Path:
    """A run that a stranger made of one of the user's."""
    shutil.copytree(made, folder)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["data"]["source"] = source
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    described = json.loads((folder / "config.json").read_text())
    described["ssl_vit"]["source"] = source
    (folder / "config.json").write_text(json.dumps(described))
    return folder


COMMANDS: dict[str, tuple[Callable[[Path, Path], int], int]] = {
    "report": (lambda run, out: report.main([str(run), f"--out={out}/r.html"]), 0),
    "visualize": (lambda run, out: visualize.main([str(run), f"--out={out}"]), 2),
    "neighbours": (lambda run, out: visualize.main([str(run), f"--out={out}", "--what", "neighbours"]), 2),
    "export": (lambda run, out: export.main([str(run), f"--out={out}", "--to", "timm"]), 0),
    "knn": (lambda run, out: command.main(evaluate_knn.evaluate_knn, {"": KNNConfig()}, None, [str(run)]), 2),
    "extract": (
        lambda run, out: command.main(
            extract_features.extract, {"": extract.ExtractConfig}, None, [str(run), f"--output={out}/f.parquet"]
        ),
        2,
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("source", STRANGE.values(), ids=list(STRANGE))
@pytest.mark.usefixtures("_fresh_state")
def test_nothing_is_opened_unasked(
    mae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], opened: list[Any], name: str, source: Any
) -> None:
    folder = strange_run(mae_run, tmp_path / "strange", source)
    work, code = COMMANDS[name]
    assert work(folder, tmp_path) == code
    assert opened == []
    said = capsys.readouterr()
    assert "--open_source true opens it" in said.out + said.err
    if code == 0:  # done without
        assert (tmp_path / {"report": "r.html", "export": "timm"}[name]).exists()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.usefixtures("_fresh_state")
def test_of_an_export_neither(
    mae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], opened: list[Any], name: str
) -> None:
    folder = strange_run(mae_run, tmp_path / "strange", "someone/beacon")
    (folder / "config.yaml").unlink()
    work, code = COMMANDS[name]
    assert work(folder, tmp_path) == (2 if name == "report" else code)  # which takes runs alone
    assert opened == []
    said = capsys.readouterr()
    assert name == "report" or "--open_source true opens it" in said.out + said.err


@pytest.mark.parametrize("flag", [["--open_source"], ["--open_source", "true"], ["--data.source", "mine"]])
@pytest.mark.parametrize("main", [report.main, visualize.main], ids=["report", "visualize"])
def test_what_the_user_asks_for_is_opened(
    mae_run: Path, tmp_path: Path, opened: list[Any], main: Callable[[list[str]], int], flag: list[str]
) -> None:
    folder = strange_run(mae_run, tmp_path / "strange", "theirs")
    main([str(folder), f"--out={tmp_path / 'out.html'}", *flag])
    (((name, (config,))),) = opened
    assert (name, config.source) == ("source", "mine" if "mine" in flag else "theirs")


def test_what_comes_with_the_package_needs_no_asking(mae_run: Path, tmp_path: Path, opened: list[Any]) -> None:
    folder = strange_run(mae_run, tmp_path / "strange", "openmoji")
    assert report.main([str(folder), f"--out={tmp_path / 'r.html'}"]) == 0
    assert [config.source for _, (config,) in opened] == ["openmoji"]
    assert trained.data_settings(trained.open_trained(folder)).source == "openmoji"


def test_other_words_are_refused(mae_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main([str(mae_run), "--open_source", "perhaps"])
    assert capsys.readouterr().err == "error: perhaps: not expected here; --help shows what is\n"
