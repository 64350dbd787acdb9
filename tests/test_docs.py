"""Commands and code of README and the site are run as they stand, on small data; their flags and links exist."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from ssl_vit import cli
from ssl_vit.core import front as core_front
from tests.conftest import ROOT
from tests.processes import SERVER, redirect_output

FLAGS = {front: set(flags) for front, flags in json.loads((ROOT / "scripts" / "flags.json").read_text()).items()}
ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
LANGUAGES = {"bash", "python", "yaml", "text"}
PATIENCE = 900  # seconds for one command, where other work shares the cores
MOST_LINES = 180  # of README: what a newcomer reads
# What makes a command short, by its front: the flags that stand last win.
_TRAINED = ["--steps=2", "--batch.size=2", "--log_every=1", "--evaluation.max_images=8"]
SHORT = {
    "pretrain": [*_TRAINED, "--evaluation.folds=2"],
    "pretrain_mae": ["--objective.decoder_depth=1"],
    "pretrain_lejepa": ["--data.cache=none"],
    "pretrain_dino": ["--objective.num_prototypes=64", "--objective.num_local_crops=1"],
    "distill": [*_TRAINED, "--evaluation.folds=2"],
    "attentive": _TRAINED,
    "finetune": _TRAINED,
    "linear_probe": ["--probe.epochs=1", "--folds=2", "--shots=[1]", "--draws=1"],
    "doctor": ["--batch.size=8", "--epochs=1", "--step=false"],  # of a few images
    "evaluate_segmentation": ["--steps=2", "--batch_size=2"],
}
OF_LAUNCHERS = {"--standalone", "--nproc_per_node", "--num_processes", "--config", "--help-all", "--completion"}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str
    not_run: str
    """Why it cannot run here, as a comment before it says; "" where it can."""


class Command(NamedTuple):
    """A line of a shell that starts one of our fronts."""

    words: tuple[str, ...]
    front: str
    flags: tuple[str, ...]
    launcher: tuple[str, ...]
    """What stands before the front's script: `accelerate launch --multi_gpu`."""


def pages() -> list[Path]:
    """README, the pages of the site in the order in which they are read, and those that are in no menu; not the log."""
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = re.findall(r"'([\w/]+\.md)'", str(menu))
    listed = [path for name in named if (path := ROOT / "docs" / name).exists()]
    others = sorted(path for path in (ROOT / "docs").rglob("*.md") if path not in listed)
    return [ROOT / "README.md", *(path for path in (*listed, *others) if path.name != "log.md")]


def find_blocks(path: Path) -> list[Block]:
    pattern = r"(?:<!-- not run: ([^\n]+) -->\n)?^ *```([^\n]*)\n(.*?)^ *```$"
    found = re.findall(pattern, path.read_text(), flags=re.DOTALL | re.MULTILINE)
    name = str(path.relative_to(ROOT))
    return [Block(name, language, text, reason) for reason, language, text in found]


BLOCKS = [block for path in pages() for block in find_blocks(path)]


def commands(blocks: list[Block]) -> list[str]:
    lines = [line for block in blocks if block.language == "bash" for line in block.text.strip().splitlines()]
    parts = [part.partition(" #")[0].strip() for line in lines for part in line.split(" && ")]
    return [part for part in parts if part]


def parse(command: str) -> Command | None:
    """Front and flags of a command; None if it starts none of ours: pip, pytest, mkdocs."""
    words = shlex.split(command)
    if words[0] == "ssl-vit":
        name = next((text for text in (" ".join(words[1:3]), words[1]) if text in cli.FRONTS), None)
        assert name is not None, command
        return Command(tuple(words), cli.FRONTS[name], tuple(words[1 + len(name.split()) :]), ())
    if words[0] not in ("python", "accelerate", "torchrun", "sbatch"):
        assert words[0] in ("pip", "pytest", "mkdocs"), command
        return None
    script = next(number for number, word in enumerate(words) if word.startswith("scripts/"))
    front = Path(words[script]).stem
    return Command(tuple(words), front, tuple(words[script + 1 :]), tuple(words[:script]))


def to_run() -> list[Command]:
    """Each command that can run here, once, however many pages name it and in whichever way."""
    found: dict[tuple[str, tuple[str, ...]], Command] = {}
    for text in commands([block for block in BLOCKS if not block.not_run]):
        command = parse(text)
        if command is not None:
            found.setdefault((command.front, command.flags), command)
    return list(found.values())


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
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _in_folder(words: list[str], folder: Path, out: Path) -> None:
    """In a process of its own: a command, as its front or `ssl-vit` runs it."""
    redirect_output(out, out)
    os.chdir(folder)
    core_front.program = None
    if words[0] == "ssl-vit":
        sys.exit(cli.main(words[1:]))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def start(command: Command, folder: Path, *, by_launcher: bool) -> None:
    """Run a command to its end, with what makes it short; forked, which saves imports, where no launcher is needed."""
    short = [flag for name, flags in SHORT.items() if command.front.startswith(name) for flag in flags]
    if "--extend" in command.flags:
        short.append("--steps=4")
    words = [*command.words, *short]
    if by_launcher:
        run(words, folder)
        return
    if words[0] != "ssl-vit":
        words = words[len(command.launcher) :]
    out = folder / "output.txt"
    out.write_text("")
    process = SERVER.Process(target=_in_folder, args=(words, folder, out))
    process.start()
    process.join(PATIENCE)
    process.kill()
    assert process.exitcode == 0, f"{words}\n{out.read_text()}"


def test_the_first_two_commands_install_and_run_the_quickstart_and_the_tests() -> None:
    first, second = (block.text.strip() for block in [b for b in BLOCKS if b.language == "bash"][:2])
    assert first.startswith('pip install -e ".[demo]" && accelerate launch scripts/pretrain_lejepa.py')
    assert second == 'pip install -e ".[demo,test]" && pytest'


def test_readme_can_be_read_at_once() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


def test_blocks_say_what_they_are() -> None:
    """So that none escapes: every command is in a block of bash, and is run or says why not."""
    assert len(BLOCKS) > 60
    for block in BLOCKS:
        assert block.language in LANGUAGES, block
        if block.language == "text":
            starts = re.findall(r"^(?:accelerate launch|python scripts|ssl-vit|torchrun) .*", block.text, re.MULTILINE)
            assert not starts, block
    assert all(block.language == "bash" for block in BLOCKS if block.not_run)
    for path in pages():
        comments = len(re.findall(r"<!-- not run: ", path.read_text()))
        assert comments == sum(bool(block.not_run) for block in find_blocks(path)), path  # each stands before a block


def test_every_flag_of_every_command_exists() -> None:
    launch = pytest.importorskip("accelerate.commands.launch").launch_command_parser()._option_string_actions
    known = 0
    for text in commands(BLOCKS):
        command = parse(text)
        if command is None or command.front == "benchmark":
            continue
        flags = [word.partition("=")[0] for word in command.flags if word.startswith("--")]
        training = FLAGS["pretrain_mae"] if command.front == "doctor" else set()  # which takes a run's flags
        for flag in flags:
            assert flag in FLAGS[command.front] | training | OF_LAUNCHERS, text
        for flag in (word for word in command.launcher if word.startswith("--")):
            assert flag in launch or flag in OF_LAUNCHERS, text
        for word in (*command.launcher, *command.flags):
            if word.startswith("configs/"):
                assert (ROOT / word).exists(), text
        known += len(flags)
    assert known > 100


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.stem)
def test_settings_named_in_the_docs_exist(path: Path) -> None:
    every = {flag for flags in FLAGS.values() for flag in flags}
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    launchers = OF_LAUNCHERS | {"--multi_gpu", "--machine_rank", "--strict", "--nodes", "--ntasks-per-node"}
    benchmarks = path.parent.name == "benchmarks"
    for flag in re.findall(r"`(--[a-z_.]+(?:-[a-z]+)*)", text):
        assert flag in every | launchers or benchmarks or flag.startswith("--encoder.model_args."), flag
    sections = "encoder|data|batch|optim|objective|checkpoint|evaluation"
    for name in re.findall(rf"`((?:{sections})\.[a-z_0-9]+)`", text):
        assert f"--{name}" in every or name.endswith((".json", ".py")), name


@pytest.mark.parametrize("path", [*map(ROOT.joinpath, ROOT_PAGES), *pages()[1:]], ids=lambda path: path.stem)
def test_links_and_files_named_in_the_docs_exist(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        generated = (path.parent / target).name in ("configs.md", "index.md")
        assert target.startswith("https://") or generated or (path.parent / target).exists(), target
    for name in re.findall(r"`((?:configs|scripts|tests|docs|ssl_vit)/[\w/.]+)`", text):
        assert "NAME" in name or (ROOT / name).exists(), name


def test_images_exist_are_described_and_stay_small() -> None:
    shown: set[Path] = set()
    for path in pages():
        for text, target in re.findall(r"!\[([^]]*)\]\(([\w./-]+\.webp)\)", path.read_text()):
            assert len(text) > 40, target
            shown.add((path.parent / target).resolve())
    stored = [file for folder in ("images", "benchmarks") for file in (ROOT / "docs" / folder).glob("*.webp")]
    assert shown >= set(stored)
    assert all(file.exists() for file in shown)
    assert sum(file.stat().st_size for file in stored) < 500_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a dead link, a missing anchor or a page in no menu is an error."""
    pytest.importorskip("mkdocs", reason='pip install -e ".[docs]"')
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_tells_every_setting(site: Path) -> None:
    text = (site / "settings" / "index.html").read_text()
    named = set(re.findall(r'<td><code class="name">([\w.]+)</code></td>', text))
    fronts = [name for name in FLAGS if name not in ("doctor", "export", "report", "visualize", "benchmark")]
    flags = {flag[2:] for name in fronts for flag in FLAGS[name]}
    sections = {flag for flag in flags if any(other.startswith(f"{flag}.") for other in flags)}
    of_the_parser = {"help", "config", "print_config"}
    assert flags - named - sections <= of_the_parser
    assert "Learning rate" in text


def test_the_site_asks_nobody_else(site: Path) -> None:
    pattern = r'<(?:script|img|iframe)[^>]*src="([^"]+)"|<link[^>]*rel="stylesheet"[^>]*href="([^"]+)"'
    for page in site.rglob("*.html"):
        loaded = [address for pair in re.findall(pattern, page.read_text()) for address in pair if address]
        assert loaded
        assert not [address for address in loaded if address.startswith(("http", "//"))], page


@pytest.mark.slow
def test_commands_and_code_run(desk: Path) -> None:
    """All of them, in their order, since each builds on those before."""
    found, seconds = to_run(), time.monotonic()
    assert len(found) >= 40
    for number, command in enumerate(found):
        start(command, desk, by_launcher=number == 0 or command.words[0] == "torchrun")
        print(f"{time.monotonic() - seconds:6.1f} s  {shlex.join(command.words)}")
    # Python: a name space for each page, one process for all.
    short = "steps=2, batch={'size': 2}, evaluation={'max_images': 8, 'folds': 2}"
    code = ["import matplotlib; matplotlib.use('agg')"]
    for path in pages():
        blocks = [block.text for block in find_blocks(path) if block.language == "python"]
        if blocks:
            text = "\n".join(blocks).replace("steps=100", short)
            code.append(f"print({path.name!r}); exec(compile({text!r}, {path.name!r}, 'exec'), {{}})")
    assert len(code) > 3
    run([sys.executable, "-c", "\n".join(code)], desk)
    assert (desk / "runs" / "lejepa_vit_tiny_r_s16_p8_224_openmoji" / "backbone.safetensors").exists()
    exported = ["onnx", "timm", "torch_export", "torchvision", "transformers"]
    assert sorted(path.name for path in (desk / "exported").iterdir()) == exported
    for name in ("knn", "linear", "retrieval", "segmentation"):
        assert (desk / "runs" / "mine" / f"{name}.json").exists()
