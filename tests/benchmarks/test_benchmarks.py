"""Tables say what was measured, and wrong words are refused beforehand. No test looks at a time."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.loader import compare_loader, pillow_mae, pillow_views
from benchmarks.memory import head_and_loss, pairwise_loss
from benchmarks.rounds import alternate, ratios
from benchmarks.step import compare_attention
from benchmarks.step_memory import peak_of
from scripts import benchmark
from scripts.pretrain_dino import DEFAULTS
from ssl_vit.objectives.dino import dino_loss
from ssl_vit.training.config import parse_run
from tests.conftest import SMALL_DINO


def test_contenders_take_turns_and_ratios_are_within_a_round() -> None:
    calls: list[str] = []
    rates = alternate({name: lambda name=name: calls.append(name) or 3 for name in "ab"}, rounds=2)
    assert "".join(calls) == "ab" + "abba"  # once to warm up
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())
    found = ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 12.0]}, "a")["b"]
    assert (found.median, found.low, found.high) == (2.0, 1.0, 3.0)


def test_both_losses_are_the_same_number() -> None:
    logits, probs = torch.randn(5, 3, 17), torch.randn(2, 3, 17).softmax(dim=-1)
    torch.testing.assert_close(pairwise_loss(logits, probs), dino_loss(logits, probs))


def test_the_loss_without_pairs_needs_less_memory() -> None:
    peaks = {
        kind: peak_of(
            head_and_loss(kind, batch=64, num_local_crops=8, num_prototypes=8192, device="cpu"), torch.device("cpu")
        )
        for kind in ("pairwise", "ssl_vit")
    }
    assert peaks["ssl_vit"] < 0.5 * peaks["pairwise"]


def test_loader_rates_are_of_each_pipeline_of_an_objective(photo_folder: Path) -> None:
    result = compare_loader(str(photo_folder), num_images=3, batch_size=2, rounds=1, num_local_crops=1)
    own = ("crops alone", "whole, colours on cpu")
    kinds = ("paper (Pillow)", *own, *(f"{kind}, cache" for kind in own))
    assert list(result["rates"]) == [f"{name}: {kind}" for name in ("MAE", "DINO") for kind in kinds]
    assert result["ratios"]["MAE: paper (Pillow)"]["median"] == result["ratios"]["DINO: paper (Pillow)"]["median"] == 1
    assert len(pillow_views(8)) == 10
    assert pillow_mae()(Image.new("RGB", (300, 260))).shape == (3, 224, 224)


def test_a_training_step_is_measured_with_both_kinds_of_attention() -> None:
    config, _ = parse_run(DEFAULTS, [*SMALL_DINO, "--data.source=x", "--steps=10"]).resolve(100)
    result = compare_attention(config, steps=1, rounds=1)
    assert set(result["rates"]) == {"fused attention", "plain attention"}
    assert "training step of DINO" in result["what"]


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs the script in this process and returns its exit code."""

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
        monkeypatch.setattr(sys, "orig_argv", ["python", "benchmark.py", *words])
        return benchmark.main()

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["empty", "nowhere"])
def test_a_folder_without_images_ends_in_one_line(
    run_script: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert run_script("loader", "--data", str(tmp_path / name)) == 2
    error = capsys.readouterr().err.strip()
    assert error == f"error: --data={tmp_path / name}: holds no .jpg or .png file"


def test_the_script_prints_a_table_and_writes_json(
    run_script: Callable[..., int], photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--rounds=1", f"--json={tmp_path / 'r.json'}"]
    words += ["loader", f"--data={photo_folder}", "--num_images=2", "--num_local_crops=1"]
    assert run_script(*words) == 0
    assert "crops alone" in capsys.readouterr().out
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert torch.__version__.startswith(written["versions"]["torch"])
    assert written["command"][-4:] == words[-4:]
    assert written["rounds"] == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("step mae --json nowhere/r.json", "error: --json nowhere/r.json: there is no folder nowhere"),
        ("--json tests step mae", "error: --json tests: is a folder"),
        ("scaling mae --plot x.txt", "error: --plot x.txt: ends in none of .png, .webp, .svg, .pdf"),
        ("step mae --rounds 0", "error: argument --rounds: 0 is too few; at least 1"),
        ("loader --data x --num_local_crops=-1", "argument --num_local_crops: -1 is too few; at least 0"),
        ("step mae --steps_per_round x", "argument --steps_per_round: invalid int value: 'x'"),
        ("step mae --kinds fp32", "--kinds: is of --peers and --beside"),
        ("memory --steps --peers", "--peers: not with --steps"),
        ("memory --steps --rounds 2", "--rounds: --steps has none"),
        ("memory --archs vit_tiny_patch16_224", "--archs: is of --steps"),
        ("memory --batch.size 8", "--batch.size: no such flag"),
        ("memory --peers", '--peers: lightly not installed; pip install -e ".[bench]"'),
    ],
)
def test_words_that_cannot_work_are_refused_before_anything_is_measured(
    words: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words.split()])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(benchmark, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


@pytest.mark.parametrize(("error", "code"), [(ValueError, 2), (ChildProcessError, 1)])
def test_what_fails_on_the_way_ends_in_one_line(
    error: type[Exception], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error("a run in 2 processes failed")

    monkeypatch.setattr(sys, "argv", ["benchmark.py", "scaling", "mae"])
    monkeypatch.setattr(benchmark, "_measure", fail)
    assert benchmark.main() == code
    assert capsys.readouterr().err == "error: a run in 2 processes failed\n"
