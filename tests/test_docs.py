"""README's commands and code are run as they stand, on small data."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, flags=re.DOTALL)
# What makes a command of README short, by its script: the flags that stand last win.
_TRAINED = ["--steps=2", "--batch.size=2", "--log_every=1"]
SHORT = {
    "pretrain": [*_TRAINED, "--evaluation.max_images=8", "--evaluation.folds=2"],
    "attentive": [*_TRAINED, "--evaluation.max_images=8"],
    "finetune": [*_TRAINED, "--evaluation.max_images=8"],
    "linear_probe": ["--probe.epochs=1", "--folds=2", "--shots=[1]", "--draws=1"],
    "doctor": ["--batch.size=8", "--epochs=1"],  # of a few images
    "segmentation": ["--steps=2", "--batch_size=2"],
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Path:
    """A folder as a newcomer's: scripts and configs, and images."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("scripts", "configs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(photo_folder, folder / "my_images")
    (folder / "cifar10").mkdir()
    rng = np.random.default_rng(0)
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {k}" for k in range(10)])}
    for name, count in {"train": 200, "test": 20}.items():
        images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        rows = {"image": images, "label": [number % 10 for number in range(count)]}
        table = datasets.Dataset.from_dict(rows, datasets.Features(kinds))
        table.to_parquet(str(folder / "cifar10" / f"{name}.parquet"))
    (folder / "my_masks").mkdir()
    for path in (folder / "my_images").rglob("*.png"):
        with Image.open(path) as image:
            mask = (np.asarray(image).max(axis=-1) == 255).astype(np.uint8)
        (folder / "my_masks" / path.parent.name).mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / "my_masks" / path.parent.name / path.name)
    return folder


def run(words: list[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def commands() -> list[str]:
    lines = [line for language, text in BLOCKS if language == "bash" for line in text.strip().splitlines()]
    return [part.strip() for line in lines for part in line.split("&&")]


def test_the_first_two_commands_install_and_run_the_quickstart_and_the_tests() -> None:
    first, second = (text.strip() for language, text in BLOCKS[:2] if language == "bash")
    assert first.startswith('pip install -e ".[demo]" && accelerate launch scripts/pretrain_mae.py')
    assert second == 'pip install -e ".[demo,test]" && pytest'


@pytest.mark.slow
def test_commands_and_code_run(desk: Path) -> None:
    """All of them, in their order, since each builds on those before."""
    assert len(commands()) >= 7
    for command in commands():
        if command.startswith("pip install") or command == "pytest":
            continue  # what the closing check does
        words = shlex.split(command)
        assert words[0] in {"accelerate", "python", "ssl-vit"}, command
        script = command.split("--")[0]
        run([*words, *(flag for name, flags in SHORT.items() if name in script for flag in flags)], desk)
    code = "\n".join(text for language, text in BLOCKS if language == "python")
    short = "steps=2, batch={'size': 2}, evaluation={'max_images': 8, 'folds': 2}"
    assert "steps=100" in code
    code = code.replace("steps=100", short)
    shape = "assert features.cls.shape == (1, 192) and features.patches.shape == (1, 196, 192)"
    run([sys.executable, "-c", f"{code}\n{shape}"], desk)
    assert (desk / "runs" / "mae_vit_tiny_patch16_224_openmoji" / "backbone.safetensors").exists()
    exported = ["onnx", "timm", "torch_export", "torchvision", "transformers", "transformers_mae"]
    assert sorted(path.name for path in (desk / "exported").iterdir()) == exported
    for name in ("knn", "linear", "retrieval", "segmentation"):
        assert (desk / "runs" / "mine" / f"{name}.json").exists()


def test_files_named_in_the_docs_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / document).read_text()
        for path in re.findall(r"`((?:configs|scripts|tests|docs|ssl_vit)/[\w/.]+)`", text):
            assert "NAME" in path or (ROOT / path).exists(), f"{document} names {path}"


def test_images_of_readme_exist_are_described_and_stay_small() -> None:
    shown = re.findall(r"!\[([^]]*)\]\((docs/images/[\w-]+\.webp)\)", README)
    assert sorted(path for _, path in shown) == sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "images").iterdir()
    )
    assert all(len(text) > 40 for text, _ in shown)
    assert sum((ROOT / path).stat().st_size for _, path in shown) < 500_000


@pytest.mark.slow
def test_every_setting_named_in_readme_exists() -> None:
    evaluations = ("evaluate_knn", "linear_probe", "extract_features", "evaluate_segmentation")
    scripts = ("pretrain_mae", "pretrain_dino", "distill", "export", "doctor", "visualize", "report", *evaluations)
    text = "".join(run([sys.executable, f"scripts/{name}.py", "--help-all"], ROOT) for name in scripts)
    text += run([sys.executable, "-m", "ssl_vit.cli", "--help"], ROOT)
    for flag in re.findall(r"`(--[a-z_.]+)", README):
        if flag not in ("--multi_gpu", "--standalone", "--config"):
            assert flag in text, flag
