"""The command `ssl-vit`, in this process and from a wheel in an environment of its own."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
import yaml

from ssl_vit import __version__, cli
from ssl_vit.core.shipped import find_config, folder, load_front
from tests.conftest import ROOT, SMALL_RUN

Capture = pytest.CaptureFixture[str]
VARIABLES = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(autouse=True)
def _own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_vit.core.front.program", None)
    monkeypatch.setattr("ssl_vit.core.front.handle_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", sys.argv)


def call(*words: str) -> int:
    """Exit code of a command; a front ends with SystemExit."""
    try:
        return cli.main(words)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0


def test_the_overview_names_every_command_and_fits_a_screen(capsys: Capture) -> None:
    assert call() == call("--help") == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) // 2 <= 24
    for name in cli.FRONTS:
        assert all(word in shown for word in name.split())
    assert call("--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_every_front_is_a_command() -> None:
    fronts = {path.stem for path in folder("scripts").glob("*.py")}
    assert set(cli.FRONTS.values()) == fronts - {"benchmark"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretran", "mae"], "pretran: no such command; did you mean pretrain?"),
        (["train"], "train: no such command"),
        (["pretrain"], "one of dino"),
        (["pretrain", "mea"], "pretrain mea: no such kind of pretrain; one of dino"),
        (["probe", "svm"], "one of knn, linear, attentive"),
        (["configs", "quickstart_ma"], "quickstart_ma: no such file, and no config of this name; did you mean quickst"),
        (["configs", "a", "b"], "takes one name"),
        (["report", "runs/a", "--num_processes", "2"], "--num_processes=2: report runs in one process"),
        (["--completion", "elvish"], "--completion=elvish: give one of"),
    ],
)
def test_wrong_words_end_in_one_line(words: list[str], said: str, capsys: Capture) -> None:
    assert call(*words) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("number", ["0", "two"])
def test_a_number_of_processes_is_a_count(number: str, capsys: Capture) -> None:
    assert call("pretrain", "mae", "--num_processes", number) == 2
    assert f"{number}: give a number of at least 1" in capsys.readouterr().err


def test_configs_are_listed_with_a_sentence_and_shown(capsys: Capture) -> None:
    assert call("configs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in folder("configs").glob("*.yaml"))
    assert all(len(line.split()) > 3 for line in lines)
    assert call("configs", "quickstart_mae") == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["source"] == "openmoji"


def test_a_config_is_found_by_name_and_a_path_stays_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_config("quickstart_mae") == folder("configs") / "quickstart_mae.yaml"
    assert find_config("mine/quickstart_mae") == Path("mine/quickstart_mae")
    assert find_config("quickstart_mae.yaml") == Path("quickstart_mae.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart_mae").touch()
    assert find_config("quickstart_mae") == Path("quickstart_mae")


def test_a_run_by_the_command_is_that_of_the_script(photo_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = [*SMALL_RUN, f"--data.source={photo_folder}", f"--output_dir={tmp_path / 'run'}", "--steps=3"]
    assert call("pretrain", "mae", *flags) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (tmp_path / "run" / "backbone.safetensors").exists()
    assert results
    assert load_front("pretrain_mae").DEFAULTS.objective.mask_ratio == 0.75


@pytest.mark.parametrize("words", [["pretrain", "mae"], ["probe", "knn"], ["finetune"], ["extract"]])
def test_help_fits_a_screen_and_help_all_has_every_flag(words: list[str], capsys: Capture) -> None:
    assert call(*words, "--help") == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 50
    assert "--help-all" in short
    assert short.startswith(f"usage: ssl-vit {' '.join(words)} ")
    assert call(*words, "--help-all") == 0
    whole = capsys.readouterr().out
    flags = json.loads((ROOT / "scripts" / "flags.json").read_text())[cli.FRONTS[" ".join(words)]]
    assert all(flag in whole for flag in flags)


def test_several_processes_are_started_by_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def execv(program: str, words: list[str]) -> None:
        started.append(words)
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    call("pretrain", "mae", "--num_processes", "2", "--steps", "3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    call("probe", "knn", "runs/a", "--num_processes=8")
    front = str(folder("scripts") / "pretrain_mae.py")
    assert started[0][1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        front,
        "--steps",
        "3",
    ]
    front = str(folder("scripts") / "evaluate_knn.py")
    assert started[1][2:] == ["accelerate.commands.launch", "--multi_gpu", "--num_processes=8", front, "runs/a"]


def test_completion_knows_commands_and_flags(capsys: Capture) -> None:
    assert call("--completion", "bash") == 0
    shown = capsys.readouterr().out
    assert "--objective.mask_ratio" in shown
    assert "quickstart_mae" in shown


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts' folder of a new environment that holds the wheel, and this environment's libraries behind it."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("ssl_vit", "scripts", "configs"):
        copytree(ROOT / name, place / "source" / name, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        copy(ROOT / name, place / "source")
    run = {"env": VARIABLES, "check": True, "capture_output": True, "timeout": 900}
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place)]
    subprocess.run([*build, str(place / "source")], **run)
    venv.create(place / "environment", with_pip=True)
    pip = [str(place / "environment" / "bin" / "pip"), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(next(place.glob("*.whl")))], **run)
    found = next((place / "environment" / "lib").glob("python*/site-packages"))
    (found / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return place / "environment" / "bin"


def test_the_wheel_alone_runs_the_quickstart(installed: Path, tmp_path: Path) -> None:
    run = {"cwd": tmp_path, "env": VARIABLES, "capture_output": True, "text": True, "timeout": 900}
    where = subprocess.run([installed / "python", "-c", "import ssl_vit; print(ssl_vit.__file__)"], **run)
    assert where.stdout.startswith(str(installed.parent)), where.stderr
    listed = subprocess.run([installed / "ssl-vit", "configs"], **run)
    assert "quickstart_mae" in listed.stdout, listed.stderr
    words = [
        "pretrain",
        "mae",
        "--config",
        "quickstart_mae",
        "--steps",
        "20",
        "--output_dir",
        "mine",
        "--evaluation.max_images",
        "90",
    ]
    done = subprocess.run([installed / "ssl-vit", *words], **run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trained" in done.stdout
    assert (tmp_path / "mine" / "backbone.safetensors").exists()
