"""Scripts that are stopped, in whatever phase: one line, the shell's code, no traceback."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from scripts import doctor, export, report, visualize
from ssl_vit.core.front import Stopped, spell_out, stoppable, warning_once
from ssl_vit.evaluation import command as evaluation
from ssl_vit.evaluation.extract import ExtractConfig
from ssl_vit.training import ending, setup
from ssl_vit.training.config import parse_run
from ssl_vit.training.loop import main
from tests.conftest import OBJECTIVES, ROOT
from tests.processes import Launch
from tests.test_resume import command

Patch, Capture = pytest.MonkeyPatch, pytest.CaptureFixture[str]
GOES_ON = "Stopped by Ctrl-C. The same command goes on from the newest checkpoint, or begins anew where there is none."


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_ends_a_script_in_one_line(number: int, code: int, name: str, capsys: Capture) -> None:
    @stoppable("Nothing is lost.")
    def wait() -> int:
        os.kill(os.getpid(), number)
        time.sleep(9)
        return 0

    before = signal.getsignal(number)
    assert wait() == code
    assert capsys.readouterr().err == f"Stopped by {name}. Nothing is lost.\n"
    assert signal.getsignal(number) is before


def test_only_the_main_process_says_so(monkeypatch: Patch, capsys: Capture) -> None:
    @stoppable()
    def stopped() -> int:
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", "1")
    assert stopped() == 130
    assert capsys.readouterr().err == ""


def stop(*_: object, **__: object) -> None:
    raise Stopped(signal.SIGINT)


PHASES = {
    "opening the data": (setup, "open_images", None),
    "looking for labels": (ending, "prepare", None),
    "decoding beforehand": (setup, "open_decoded", None),
    "looking at headers": (setup, "look_beforehand", None),
    "reading a checkpoint": (setup, "build_optimizer", "stopped"),
    "compiling": (setup, "resolve_compile", "stopped"),
    "noting the start": (setup, "note_session", "stopped"),
    "exporting": (ending, "export_backbone", "stopped"),
    "drawing": (ending, "draw", "stopped"),
    "scoring": (ending, "_evaluate", "stopped"),
    "writing results": (ending, "write_results", "stopped"),
}


@pytest.mark.usefixtures("_fresh_state", "quick_scores")
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_is_stopped_outside_its_loop(
    photo_folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture, phase: str
) -> None:
    module, name, state = PHASES[phase]
    monkeypatch.setattr(module, name, stop)
    words = command(photo_folder, tmp_path / "run", "--steps=1", "--data.label_column=null")
    monkeypatch.setattr(sys, "argv", words)
    assert main(OBJECTIVES["mae"][0]) == 130
    assert [line for line in capsys.readouterr().err.splitlines() if line] == [GOES_ON]
    heartbeat = tmp_path / "run" / "heartbeat.json"
    assert (json.loads(heartbeat.read_text())["state"] if heartbeat.exists() else None) == state


@pytest.mark.usefixtures("_fresh_state")
@pytest.mark.parametrize("name", ["doctor", "export", "report", "visualize", "evaluate"])
def test_other_scripts_are_stopped(tmp_path: Path, monkeypatch: Patch, capsys: Capture, name: str) -> None:
    monkeypatch.setattr(doctor, "examine", stop)
    monkeypatch.setattr(export, "export", stop)
    monkeypatch.setattr(report, "write_report", stop)
    monkeypatch.setattr(visualize, "visualize", stop)
    start = {
        "doctor": lambda: doctor.main([str(tmp_path)]),
        "export": lambda: export.main([str(tmp_path)]),
        "report": lambda: report.main([str(tmp_path)]),
        "visualize": lambda: visualize.main([str(tmp_path)]),
        "evaluate": lambda: evaluation.main(stop, {"": evaluation.LabelledConfig()}, None, [str(tmp_path)]),
    }
    assert start[name]() == 130
    assert capsys.readouterr().err == "Stopped by Ctrl-C.\n"


def test_every_script_heeds_signals_before_it_imports_torch() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        before, found, _ = path.read_text().partition('if __name__ == "__main__":\n    handle_signals()\n')
        assert found, path
        assert "from ssl_vit.core.front import" in before
        imported = [line for line in before.splitlines() if line.startswith(("import", "from"))]
        assert not any("torch" in line or ("ssl_vit" in line and "ssl_vit.core.front" not in line) for line in imported)
    code = "import sys, ssl_vit.core.front; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_ctrl_c_while_scripts_import(photo_folder: Path, tmp_path: Path) -> None:
    """At once after the start; the whole group gets it, as from a terminal."""
    words = [sys.executable, *command(photo_folder, tmp_path / "run", "--steps=100000")]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stderr is not None
        while not caught(process.pid):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 130
    assert errors == b"Stopped by Ctrl-C.\n"


def test_ctrl_c_twice_while_workers_decode(photo_folder: Path, tmp_path: Path) -> None:
    with Launch(command(photo_folder, tmp_path / "run", "--data.num_workers=2", "--steps=100000")) as launched:
        launched.wait_for("step 2/")
        for _ in range(2):
            launched.send(signal.SIGINT, to_group=True)
        assert launched.join() == [130]
        assert "Traceback" not in launched.errors()
        assert launched.errors().count("Stopping after this step. Ctrl-C again ends at once") == 1


def caught(process: int) -> bool:
    """Whether a process has a handler of its own for SIGTERM, which Python has none for."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(mask >> (signal.SIGTERM - 1) & 1)


def test_what_a_library_says_of_each_image_comes_once(monkeypatch: Patch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    record = logging.LogRecord("tifffile", logging.WARNING, "tifffile.py", 9, "page %s is odd", (0,), None)
    assert logging.lastResort is not None
    with warning_once(), warnings.catch_warnings():
        warnings.simplefilter("always")
        for number in range(3):
            warnings.warn(f"image {number}: corrupt EXIF data", stacklevel=1)
        warnings.warn("another line's", stacklevel=1)
        assert [bool(logging.lastResort.filter(record)) for _ in range(3)] == [True, False, False]
    assert shown == ["image 0: corrupt EXIF data", "another line's"]
    assert logging.lastResort.filter(record)


def test_a_worker_that_was_just_forked_is_left_alone(capfd: Capture) -> None:
    @stoppable()
    def fork() -> int:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert fork() == 7
    assert capfd.readouterr().err == ""


def test_a_terminal_that_cannot_show_a_name_shows_it_escaped() -> None:
    code = "from ssl_vit.core.front import stoppable; stoppable()(lambda: print('caf\\xe9 \\udce9'))()"
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert shown.stdout == b"caf\\xe9 \\udce9\n"


@pytest.mark.parametrize(
    ("words", "spelled"),
    [
        (["--fresh", "x"], ["--fresh=true", "x"]),
        (["--fresh", "true", "x"], ["--fresh=true", "x"]),
        (["x", "--fresh", "False"], ["x", "--fresh=False"]),
        (["--fresh=false", "true"], ["--fresh=false", "true"]),
        (["--fresh", "--fresh", "no"], ["--fresh=true", "--fresh=no"]),
        (["--name", "true", "--steps", "3"], ["--name", "true", "--steps", "3"]),
    ],
)
def test_flags_that_are_on_or_off_are_spelled_out(words: list[str], spelled: list[str]) -> None:
    assert spell_out(words, {"fresh"}) == spelled


SWITCHES = {
    "pretrain": (lambda words: parse_run(OBJECTIVES["mae"][0], words).fresh, ["--data.source=x"], "--fresh"),
    "pretrain, extend": (lambda words: parse_run(OBJECTIVES["mae"][0], words).extend, ["--data.source=x"], "--extend"),
    "export": (lambda words: seen(export, "export", words).overwrite, ["x"], "--overwrite"),
    "visualize": (lambda words: seen(visualize, "visualize", words).foreground, ["x"], "--foreground"),
    "doctor": (lambda words: seen(doctor, "examine", words)["as_json"], ["x"], "--json"),
    "extract": (lambda words: extracted(words).fresh, ["x", "--output=x.parquet"], "--fresh"),
}


def seen(script: Any, name: str, words: list[str]) -> Any:
    """What a script hands to the function that does its work."""
    with pytest.MonkeyPatch.context() as patch:
        found: list[Any] = []
        patch.setattr(script, name, lambda *args, **settings: found.append(settings or args[0]) or 0)
        assert script.main(words) == 0
    return found[0]


def extracted(words: list[str]) -> Any:
    found: list[Any] = []
    assert evaluation.main(lambda _, config: found.append(config), {"": ExtractConfig}, None, words) == 0
    return found[0]


@pytest.mark.parametrize("front", SWITCHES)
def test_every_front_reads_flags_the_same_way(front: str) -> None:
    read, words, flag = SWITCHES[front]
    assert read(words) is False
    for on in ([flag], [flag, "true"], [f"{flag}=true"]):
        assert read([*words, *on]) is True
    for off in ([flag, "false"], [f"{flag}=false"]):
        assert read([*words, *off]) is False


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (export.main, ["x", "--overwrit"], "--overwrit: no such flag; did you mean --overwrite?"),
        (report.main, ["x", "--panel_image=3"], "--panel_image: no such flag; did you mean --panel_images?"),
        (visualize.main, ["x", "--seeed", "1"], "--seeed: no such flag; did you mean --seed?"),
        (visualize.main, ["x", "--seed", "one"], "argument --seed: invalid int value: 'one'"),
        (visualize.main, ["film", "x", "--wide=3"], "--wide: no such flag; did you mean --width?"),
        (export.main, [], "the following arguments are required: path"),
        (lambda words: 2 * (extracted(words) is None), ["x", "--outputs=x.parquet"], "did you mean --output?"),
    ],
)
def test_what_no_flag_takes_ends_in_one_line(main: Any, words: list[str], message: str, capsys: Capture) -> None:
    with pytest.raises((SystemExit, AssertionError)) as stopped:
        main(words)
    assert not isinstance(stopped.value, SystemExit) or stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
