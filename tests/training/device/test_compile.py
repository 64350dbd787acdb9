"""Compiled blocks learn what blocks as they are written learn."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_vit.models.blocks import CompilableDropPath
from ssl_vit.runs.checkpoint import list_checkpoints
from ssl_vit.training.device.prepare import LEAST_STEPS, compile_blocks, resolve_compile
from tests.compiled import objective_and_batch
from tests.conftest import ROOT, SMALL_RUN, last_weights, losses
from tests.families import FAMILIES

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs")
# Families, each with its class of blocks; the hybrid's CNN has blocks of its own in larger models.
COMPILED = {
    "distilled": "Block",
    "hybrid": "Block",
    "dinov3": "EvaBlock",
    "eva02": "EvaBlock",
    "swin": "SwinTransformerBlock",
    "swinv2": "SwinTransformerV2Block",
    "convnext": "ConvNeXtBlock",
    "convnextv2": "ConvNeXtBlock",
}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@needs_compiler
@pytest.mark.parametrize("kind", ["mae", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dino", *COMPILED))])
def test_compiled_blocks_have_the_loss_and_gradients_of_eager_ones(kind: str) -> None:
    """In a process of its own: what checks shapes here cannot be compiled."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled", kind], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr


def test_what_is_compiled_are_the_blocks_and_what_an_objective_adds() -> None:
    objective, _ = objective_and_batch("mae", drop_path_rate=0.0)
    assert objective.compilable() == [*objective.encoder.vit.blocks, *objective.decoder_blocks, objective.patch_error]
    dino, _ = objective_and_batch("dino", drop_path_rate=0.0)
    assert dino.compilable() == [*dino.encoder.vit.blocks, *dino.teacher_encoder.vit.blocks]


@pytest.mark.parametrize("family", COMPILED)
def test_the_blocks_of_every_family_are_compiled_and_sharded(family: str) -> None:
    objective, _ = objective_and_batch(family, drop_path_rate=0.0)
    depths = FAMILIES[family].model_args.get("depths", [FAMILIES[family].depth])
    assert [type(block).__name__ for block in objective.compilable()] == [COMPILED[family]] * 2 * sum(depths)
    assert objective._no_split_modules == [COMPILED[family]]


def test_drop_path_keeps_its_rate_and_mean() -> None:
    drop = CompilableDropPath(0.25, CPU).train()
    values = drop(torch.ones(20_000, 2, 3))
    assert values.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (values == values[:, :1, :1]).all()
    assert values.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(drop.eval()(values), values)
    assert drop.state_dict() == {}


def test_compiling_replaces_drop_path_and_deep_copies_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda self, **settings: None)
    objective, batch = objective_and_batch("dino", drop_path_rate=0.3)
    compile_blocks(objective)
    block = objective.encoder.vit.blocks[1]
    assert isinstance(block.drop_path1, CompilableDropPath)
    assert block.drop_path1.keep_prob.item() == pytest.approx(0.7)
    again = copy.deepcopy(objective)
    torch.manual_seed(1)
    loss = objective(batch, 0.5)["loss"]
    torch.manual_seed(1)
    assert torch.equal(again(batch, 0.5)["loss"], loss)


@pytest.mark.parametrize(
    ("setting", "device", "steps", "sharded", "wanted"),
    [
        ("auto", CPU, 10**6, False, False),
        ("auto", GPU, LEAST_STEPS, False, True),
        ("auto", GPU, LEAST_STEPS - 1, False, False),
        ("auto", GPU, LEAST_STEPS, True, False),
        (True, CPU, 1, False, True),
        (False, GPU, 10**6, False, False),
    ],
)
def test_auto_compiles_long_runs_on_gpus(
    monkeypatch: pytest.MonkeyPatch,
    setting: bool | str,
    device: torch.device,
    steps: int,
    sharded: bool,
    wanted: bool,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("ssl_vit.training.device.prepare._is_able_to_compile", lambda device: True)
    assert resolve_compile(setting, device, steps, sharded) is wanted  # pyright: ignore[reportArgumentType]
    other = resolve_compile(setting, device, steps, sharded, has_plain_blocks=False)  # pyright: ignore[reportArgumentType]
    assert other is (setting is True)


def test_auto_goes_on_without_where_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch, "compile", fail)
    with pytest.warns(UserWarning, match=r"^compile=auto: torch.compile does not work here.*Failed to find C compiler"):
        assert resolve_compile("auto", GPU, LEAST_STEPS, is_sharded=False) is False


def test_sharded_blocks_are_not_compiled() -> None:
    with pytest.raises(ValueError, match=r"^compile=True: blocks that FSDP shards"):
        resolve_compile(True, GPU, 10, True)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_that_goes_on_ends_with_the_same_weights(photo_folder: Path, tmp_path: Path) -> None:
    flags = ["--checkpoint.every_steps=2", "--checkpoint.keep=9", "--encoder.drop_path_rate=0", "--steps=5"]
    flags += [f"--data.source={photo_folder}", "--data.label_column=none"]

    def start(name: str, setting: str) -> None:
        script = [sys.executable, "scripts/pretrain_mae.py", *SMALL_RUN, *flags, f"--compile={setting}"]
        script.append(f"--output_dir={tmp_path / name}")
        done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        assert (", compiled" in done.stdout) == (setting == "true")

    start("whole", "true")
    start("eager", "auto")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for checkpoint in list_checkpoints(tmp_path / "again")[1:]:
        shutil.rmtree(checkpoint)
    start("again", "true")
    whole, again = last_weights(tmp_path / "whole"), last_weights(tmp_path / "again")
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
