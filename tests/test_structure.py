"""What keeps the house in order: short files, few modules behind a command, flags that somebody decided on."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDERS = ("ssl_vit", "scripts", "benchmarks", "tests")
FLAGS = ROOT / "scripts" / "flags.json"
FRONTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_longer_than_400_lines(folder: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert not {str(path): length for path, length in lengths.items() if length > 400}


def test_a_pre_training_loads_nothing_that_it_does_not_use() -> None:
    code = "import sys, scripts.pretrain_mae; print(*(name for name in sys.modules if name.startswith('ssl_vit.')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    loaded = done.stdout.split()
    assert "ssl_vit.training.loop" in loaded, done.stderr
    others = ("ssl_vit.doctor", "ssl_vit.export", "benchmarks", "ssl_vit.objectives.dino", "ssl_vit.evaluation.command")
    assert not [name for name in loaded if name.startswith(others)]
    packages = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "ssl_vit").rglob("__init__.py")}
    assert len(set(loaded) - packages) <= 99  # a new one is a decision; packages' own files hold a docstring alone


@pytest.mark.parametrize("front", FRONTS)
def test_the_flags_of_a_front_are_those_that_were_decided_on(
    front: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """A new flag is a decision: `pytest -n 0 tests/test_structure.py --write-golden` notes it."""
    monkeypatch.setattr("ssl_vit.core.front.handle_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", [front, "--help-all"])
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / f"{front}.py"), run_name="__main__")
    assert ended.value.code in (0, None)
    found = sorted(set(re.findall(r"^ {2,4}(?:-\w, )?(--[\w.]+)", capsys.readouterr().out, flags=re.MULTILINE)))
    if request.config.getoption("--write-golden"):
        noted = json.loads(FLAGS.read_text()) if FLAGS.exists() else {}
        FLAGS.write_text(json.dumps({**noted, front: found}, indent=1, sort_keys=True) + "\n")
    assert found == json.loads(FLAGS.read_text())[front]


def test_every_package_says_what_it_is_for() -> None:
    for file in (ROOT / "ssl_vit").rglob("__init__.py"):
        assert file.read_text().startswith('"""'), file
    assert Path(ROOT / "docs" / "architecture.md").exists()
