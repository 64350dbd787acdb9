"""Run folders of strangers: nothing in them leads out, hangs, takes the memory, or ends in a traceback."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure

from scripts import export, report, visualize
from ssl_vit.core.writing import JsonLines, forget_after, replace_json
from ssl_vit.data.bad_images import BAD_IMAGES_FILE
from ssl_vit.evaluation.cache import cached_features
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.weights.backbone import export_backbone, load_backbone
from ssl_vit.models.weights.pretrained import open_pretrained
from ssl_vit.runs.checkpoint import (
    CheckpointConfig,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    remove_unfinished,
    save_checkpoint,
)
from ssl_vit.runs.folder import is_finished, lock_folder, write_heartbeat, write_results
from ssl_vit.runs.record import read_run
from ssl_vit.runs.trained import open_trained
from ssl_vit.training.config import write_config
from ssl_vit.training.continuing import check_run_folder, open_run_folder
from ssl_vit.training.observe import tracking
from ssl_vit.training.observe.metrics import last_value
from ssl_vit.visualize.film import list_frames, write_film
from ssl_vit.visualize.grid import save_figure
from ssl_vit.visualize.report import write_report
from tests import hostile
from tests.conftest import TINY
from tests.hostile import PLANTED, SECRET, guarded, plant, small_run
from tests.specs import GREY
from tests.training.test_continuing import config

Plants = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "step-00000001").mkdir(parents=True)
    (folder / "step-00000001" / "state.json").write_text("{}")
    (folder / "secret.txt").write_bytes(SECRET)
    (folder / "step-00000009.webp").write_bytes(SECRET)
    return folder


def save(run: Path) -> None:
    model = torch.nn.Linear(2, 2)
    save_checkpoint(run, 7, model, torch.optim.AdamW(model.parameters()), {})


def draw(run: Path) -> None:
    save_figure(Figure(), run / "pictures" / "step-00000007.webp")


def encode(run: Path) -> None:
    cached_features(run / "features", "key", 1, lambda: {"cls": torch.ones(2, 1, 3)})


def write_backbone(run: Path) -> None:
    encoder = EncoderConfig(image_size=32, **{**TINY, "depth": 1}).build()
    export_backbone(encoder, run, normalization=GREY, provenance={})


# What a run writes by each name. Of folders below it, a link in their place counts as well.
WRITERS: dict[str, Callable[[Path], object]] = {
    "results.json": lambda run: write_results(run, {"step": 3}),
    "heartbeat.json": lambda run: write_heartbeat(run, "training", 1, 3),
    "provenance.json": lambda run: replace_json(run / "provenance.json", {}),
    "config.yaml": lambda run: write_config(config(run), run / "config.yaml"),
    "metrics.jsonl": lambda run: JsonLines(run / "metrics.jsonl").append([{"step": 4}]),
    BAD_IMAGES_FILE: lambda run: forget_after(run / BAD_IMAGES_FILE, 0),
    "run.lock": lock_folder,
    "tracking.json": lambda run: tracking._note_id("wandb", run, type("Started", (), {"id": "x"})),
    "report.html": lambda run: write_report([run], run / "report.html", num_images=0),
    "pictures/film.gif": lambda run: write_film(run, run / "pictures" / "film.gif"),
    "pictures/step-00000007.webp": draw,
    "checkpoints/step-00000007": save,
    "checkpoints/step-00000003": lambda run: prune_checkpoints(run, CheckpointConfig(keep=1)),
    "checkpoints": remove_unfinished,
    "features/key.safetensors": encode,
    "features": encode,
    "pictures": lambda run: open_run_folder(config(run)),
    "backbone.safetensors": write_backbone,
    "config.json": write_backbone,
    "unfinished-export": write_backbone,
    "mlflow": lambda run: tracking._arguments("mlflow", run, 0),
    "mlflow/mlflow.db": lambda run: tracking._arguments("mlflow", run, 0),
    "tensorboard": lambda run: tracking._arguments("tensorboard", run, 0),
}


@pytest.mark.parametrize("plants", PLANTED)
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_planted_where_a_run_writes_is_replaced_or_refused(
    run: Path, outside: Path, name: str, plants: Plants, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plant(plants, run / name, outside)
    if not name.startswith("unfinished"):
        half = (run / name).with_name(f"unfinished-{Path(name).name}")
        plant(plants, half, outside)
    with guarded(outside):
        try:
            WRITERS[name](run)
        except (OSError, ValueError) as error:
            assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "name",
    [
        "results.json",
        "heartbeat.json",
        "config.yaml",
        "report.html",
        "pictures/film.gif",
        "backbone.safetensors",
    ],
)
def test_a_link_is_replaced_by_what_is_written(run: Path, outside: Path, name: str) -> None:
    plant(hostile.to_file, run / name, outside)
    if name == "config.yaml":
        WRITERS[name](run)
    else:
        with guarded(outside):
            WRITERS[name](run)
    assert not (run / name).is_symlink()
    assert (run / name).read_bytes() != SECRET


def test_another_name_of_a_log_keeps_what_it_has(run: Path, outside: Path) -> None:
    """A hard link is as good as the file, and a backup may be made of them."""
    for name in ("metrics.jsonl", "run.lock"):
        (outside / name).write_text('{"step": 1}\n{"step": 9}\n')
        (run / name).unlink(missing_ok=True)
        os.link(outside / name, run / name)
    with guarded(outside):
        forget_after(run / "metrics.jsonl", 5)
        JsonLines(run / "metrics.jsonl").append([{"step": 6}])
        lock_folder(run)
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 6}\n'


# What is read of a run by each name, and by whom.
READERS: dict[str, list[Callable[[Path], object]]] = {
    "config.yaml": [read_run, open_trained, lambda run: check_run_folder(config(run))],
    "metrics.jsonl": [read_run, lambda run: last_value(run / "metrics.jsonl", "loss"), open_trained],
    "results.json": [read_run, lambda run: is_finished(run, 3), open_trained],
    "knn.json": [read_run],
    "config.json": [read_run, load_backbone, lambda run: open_trained(run / "backbone.safetensors")],
    "backbone.safetensors": [load_backbone],
    "pictures": [read_run, list_frames],
    "pictures/step-00000003.webp": [
        lambda run: write_report([run], run / "report.html", num_images=0),
        lambda run: write_film(run, run / "film.png"),
    ],
    "checkpoints": [newest_checkpoint, open_trained],
    "checkpoints/step-00000003": [newest_checkpoint, open_trained],
    "checkpoints/step-00000003/manifest.json": [newest_checkpoint, open_trained],
    "checkpoints/step-00000003/state.json": [newest_checkpoint, open_trained],
    "checkpoints/step-00000003/model.safetensors": [newest_checkpoint, open_trained],
    "tracking.json": [tracking._read_ids],
    "features/key.safetensors": [encode],
}


@pytest.mark.parametrize("plants", PLANTED)
@pytest.mark.parametrize("name", READERS)
def test_what_is_planted_where_a_run_is_read_is_not_read(run: Path, outside: Path, name: str, plants: Plants) -> None:
    plant(plants, run / name, outside)
    with guarded(outside):
        for read in READERS[name]:
            try:
                read(run)
            except (OSError, ValueError) as error:
                assert "\n" not in str(error)  # noqa: PT017
                assert "swordfish" not in str(error)  # noqa: PT017
    page = run / "report.html"
    assert not page.exists() or SECRET not in page.read_bytes()


def test_an_image_of_another_format_is_not_embedded(run: Path) -> None:
    (run / "pictures" / "step-00000003.webp").write_bytes(SECRET)
    with pytest.raises(ValueError, match=r"step-00000003.webp: is no WebP or PNG"):
        write_report([run], run / "report.html", num_images=0)
    assert not (run / "report.html").exists()


def test_a_run_may_be_reached_through_a_link_and_its_own_files_are_no_links(run: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(run)
    assert newest_checkpoint(tmp_path / "latest") is not None
    assert write_report([tmp_path / "latest"], tmp_path / "latest" / "report.html", num_images=0) == []
    assert (run / "report.html").is_file()


def test_checkpoints_that_are_links_are_passed_over_and_never_deleted(run: Path, outside: Path) -> None:
    for number in (1, 2, 4):
        (run / "checkpoints" / f"step-{number:08d}").symlink_to(outside / "step-00000001")
    (run / "checkpoints" / "step-9x9").mkdir()
    with guarded(outside):
        prune_checkpoints(run, CheckpointConfig(keep=1))
        assert newest_checkpoint(run) == run / "checkpoints" / "step-00000003"
    assert len(list_checkpoints(run)) == 4


def edit(file: Path, key: str, value: Any) -> None:
    """Set a dotted key of a JSON or YAML file, of a log in each line."""
    is_yaml = file.suffix == ".yaml"
    texts = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    written = []
    for text in texts:
        content = found = yaml.safe_load(text) if is_yaml else json.loads(text)
        *parents, last = key.split(".")
        for name in parents:
            found = found[name]
        found[last] = value
        written.append(yaml.safe_dump(content) if is_yaml else json.dumps(content))
    file.write_text("\n".join(written) + "\n")
    if (manifest := file.with_name("manifest.json")).exists():
        manifest.unlink()  # as in checkpoints of versions before it


WRONG = [
    *("text", 10**7, None, {"a": {}}, [[]], float("nan")),
    *(True, -1, 2**70, 1.5, float("inf"), "", "/etc/passwd", [], [1], {}),
]
KEYS = {
    "config.yaml": [
        "encoder", "encoder.depth", "encoder.embed_dim", "encoder.num_heads", "encoder.image_size",
        "encoder.patch_size", "encoder.arch", "encoder.in_chans", "encoder.mlp_ratio", "data", "data.mean", "data.std",
        "data.source",
        "objective", "objective.mask_ratio", "objective.decoder_depth", "optim", "optim.warmup", "batch",
        "batch.size",
        "evaluation", "evaluation.crop_pct", "seed",
    ],
    "checkpoints/step-00000003/state.json": ["objective", "backbone", "step", "num_images", "class_names"],
    "config.json": [
        "ssl_vit", "ssl_vit.encoder", "ssl_vit.encoder.depth", "ssl_vit.encoder.embed_dim", "ssl_vit.objective",
        "ssl_vit.encoder.image_size", "ssl_vit.weights_sha256", "pretrained_cfg", "pretrained_cfg.mean",
        "pretrained_cfg.crop_pct",
    ],
    "results.json": ["step", "scores", "scores.trained", "scores.trained.knn", "scores.trained.knn.accuracy"],
    "metrics.jsonl": ["step", "loss", "progress", "images_per_second"],
}  # fmt: skip


def wrong_values() -> list[Any]:
    """Of each key one wrong value, another one each time; all of them where there is time."""
    pairs = [(name, key) for name, keys in KEYS.items() for key in keys]
    return [
        pytest.param(name, key, value, marks=() if (number - place) % len(WRONG) == 0 else pytest.mark.slow)
        for number, (name, key) in enumerate(pairs)
        for place, value in enumerate(WRONG)
    ]


@pytest.mark.parametrize(("name", "key", "value"), wrong_values())
def test_wrong_values_end_in_one_line(run: Path, outside: Path, name: str, key: str, value: Any) -> None:
    edit(run / name, key, value)

    def write(run: Path) -> None:
        write_report([run], run / "report.html", num_images=0)

    readers: dict[str, list[Callable[[Path], object]]] = {
        "config.json": [write, load_backbone, lambda run: open_pretrained(str(run)).tensors()],
        "config.yaml": [write, open_trained],
        "checkpoints/step-00000003/state.json": [write, open_trained],
    }
    with guarded(outside):
        for read in readers.get(name, [write]):
            try:
                read(run)
            except ValueError as error:
                assert "\n" not in str(error)  # noqa: PT017
                assert len(str(error)) < 1000  # noqa: PT017


def test_the_scripts_say_it_in_a_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run / "config.yaml", "encoder.depth", 10**7)
    for main in (export.main, visualize.main):
        assert main([str(run)]) == 2
        error = capsys.readouterr().err
        assert error == "error: encoder.depth=10000000: must lie in [0, 1000]\n"
    (run / "config.yaml").unlink()
    (run / "config.yaml").mkdir()
    assert report.main([str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
