"""ssl_vit from Python: runs, results, features, images in memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ssl_vit
from ssl_vit.data.sources.in_memory import as_rows, store
from tests.conftest import ROOT, SMALL_RUN

SMALL: dict[str, Any] = {
    "encoder": {
        "arch": "vit_tiny_patch16_224",
        "image_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "drop_path_rate": 0.1,
    },
    "batch": {"size": 8},
    "precision": "no",
    "log_every": 1,
    "evaluation": {"folds": 2},
    "optim": {"base_lr": 0.032},
    "objective": {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
}


class Discs(torch.utils.data.Dataset):
    """A torch dataset of pairs, which has no iterator."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (40, 40), (number * 60, 0, 0)), number % 2


class Frame:
    """What a DataFrame looks like."""

    columns = ("path", "label")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def run(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ssl_vit.Result:
    folder = tmp_path_factory.mktemp("api") / "run"
    return ssl_vit.pretrain("mae", photo_folder, output_dir=folder, steps=3, **SMALL)


def test_importing_loads_neither_torch_nor_matplotlib() -> None:
    code = "import sys, ssl_vit; dir(ssl_vit); print({'torch', 'matplotlib', 'timm', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        ssl_vit.train  # noqa: B018


def test_a_run_from_python_learns_what_the_script_learns(
    run: ssl_vit.Result, photo_folder: Path, tmp_path: Path
) -> None:
    words = [*SMALL_RUN, f"--data.source={photo_folder}", f"--output_dir={tmp_path / 'script'}", "--steps=3"]
    script = [sys.executable, str(ROOT / "scripts" / "pretrain_mae.py"), *words]
    subprocess.run(script, check=True, capture_output=True, timeout=300)
    theirs, ours = load_file(tmp_path / "script" / "backbone.safetensors"), load_file(run.backbone)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_result_tells_scores_weights_and_figure(run: ssl_vit.Result) -> None:
    assert run.finished
    stored = json.loads((run.folder / "results.json").read_text())["scores"]
    assert run.scores["trained"]["knn"] == stored["trained"]["knn"]["accuracy"]
    assert set(run.scores) == {"raw pixels", "untrained", "trained"}
    score = {"accuracy": 0.5, "low": 0.25, "high": 0.75, "n": 40}
    (run.folder / "knn.json").write_text(json.dumps({"backbone": {"k=20": score}, "trained": {"knn": score}}))
    assert ssl_vit.Result(run.folder, 0).scores == run.scores  # those of an evaluation are no scores of its end
    (run.folder / "knn.json").unlink()
    assert run.encoder().embed_dim == 32
    figure = run.figure()
    assert figure is not None
    assert figure.size[0] > 100
    shown = run._repr_html_()
    assert f"{100 * run.scores['trained']['linear']:.1f}" in shown
    assert "data:image/png;base64," in shown


def test_the_same_call_goes_on_and_another_precision_starts_in_the_same_process(
    run: ssl_vit.Result, photo_folder: Path, tmp_path: Path
) -> None:
    again = ssl_vit.pretrain("mae", photo_folder, output_dir=run.folder, steps=3, **SMALL)
    assert again.finished
    other = ssl_vit.pretrain("mae", photo_folder, output_dir=tmp_path / "b", steps=1, **{**SMALL, "precision": "bf16"})
    assert other.finished


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ssl_vit.pretrain("mea", "x"), "'mea': there is no objective of this name"),
        (lambda: ssl_vit.pretrain("mae", "x", epoch=3), "--epoch: no such flag; did you mean --epochs"),
        (lambda: ssl_vit.pretrain("mae", "x", encoder={"archh": 1}), "did you mean --encoder.arch"),
        (lambda: ssl_vit.pretrain("mae", []), "holds no images"),
        (lambda: ssl_vit.pretrain("mae", 3), "source=int: give a path"),
        (lambda: ssl_vit.pretrain("mae", [3]), "item 0 is int; give paths, PIL images or arrays"),
        (
            lambda: ssl_vit.pretrain("mae", [(Image.new("L", (9, 9)), Image.new("L", (9, 9)))]),
            "class of item 0 is Image",
        ),
        (lambda: ssl_vit.pretrain("mae", [Image.new("CMYK", (9, 9))]), "item 0 cannot be kept as PNG"),
        (
            lambda: ssl_vit.pretrain("mae", datasets.DatasetDict(train=Discs())),
            "give one of its splits, as source.'train'",
        ),
        (lambda: ssl_vit.pretrain("mae", Frame()), "source=Frame: give one column"),
        (lambda: ssl_vit.pretrain("mae", "no_such_folder", config="quickstart_mea"), "did you mean quickstart_mae"),
    ],
)
def test_errors_are_the_lines_of_the_scripts(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as found:
        call()
    assert "\n" not in str(found.value)


def test_features_of_files_images_and_arrays_are_those_of_the_evaluation(
    run: ssl_vit.Result, photo_folder: Path, tmp_path: Path
) -> None:
    paths = sorted(photo_folder.rglob("*.png"))[:5]
    features = ssl_vit.embed(paths, run.folder)
    assert features.shape == (5, 32)
    assert features.dtype == np.float32
    images = [Image.open(path) for path in paths]
    np.testing.assert_array_equal(features, ssl_vit.embed(images, run.folder))
    np.testing.assert_array_equal(features, ssl_vit.embed([np.asarray(image) for image in images], run.folder))
    turned = Image.open(paths[0]).transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned back
    np.testing.assert_array_equal(features[:1], ssl_vit.embed(turned, run.folder))
    np.testing.assert_array_equal(
        features, ssl_vit.embed(np.stack([np.asarray(image) for image in images]), run.folder)
    )
    other_name = datasets.Dataset.from_dict({"photo": [str(path) for path in paths]})
    np.testing.assert_array_equal(
        features, ssl_vit.embed(other_name.cast_column("photo", datasets.Image()), run.folder)
    )
    np.testing.assert_allclose(features[:1], ssl_vit.embed(str(paths[0]), run.backbone), atol=1e-6)
    assert ssl_vit.embed(paths, run.folder, feature="cls4+mean").shape == (5, 32 * 2 + 32)
    out = tmp_path / "features.safetensors"
    words = ["extract_features.py", str(run.folder), "--source", str(photo_folder), "--output", str(out)]
    script = [sys.executable, str(ROOT / "scripts" / words[0]), *words[1:]]
    subprocess.run(script, check=True, capture_output=True, timeout=300)
    stored = load_file(out)
    np.testing.assert_allclose(stored["embeddings"][:5].float().numpy(), features, atol=1e-5)
    with pytest.raises(ValueError, match=r"no_such\.png"):
        ssl_vit.embed("no_such.png", run.folder)


def test_images_in_memory_are_stored_once_with_their_classes(photo_folder: Path, tmp_path: Path) -> None:
    paths = sorted(photo_folder.rglob("*.png"))
    pairs = [(path, path.parent.name) for path in paths]
    rows = as_rows(pairs)
    assert rows.features["label"].names == ["disc", "square"]
    assert rows[-1]["label"] == 1
    assert store(pairs) == store(list(pairs)) != store(pairs[1:])
    assert as_rows(Discs())["label"] == [0, 1, 0]
    assert as_rows(datasets.Dataset.from_dict({"image": ["a"]})).num_rows == 1
    with pytest.raises(ValueError, match="some images have a class"):
        as_rows([paths[0], (paths[1], 3)])
    result = ssl_vit.pretrain("mae", pairs, output_dir=tmp_path / "run", steps=1, **SMALL)
    assert set(result.scores) == {"raw pixels", "untrained", "trained"}


def test_a_mixture_may_name_paths(photo_folder: Path, tmp_path: Path) -> None:
    mixture = {photo_folder / "disc": np.float64(1), photo_folder / "square": 2}
    settings = {**SMALL, "data": {"label_column": "none"}}
    assert ssl_vit.pretrain("mae", mixture, output_dir=tmp_path / "run", steps=1, **settings).finished


def test_a_run_distils_into_another_backbone(run: ssl_vit.Result, photo_folder: Path, tmp_path: Path) -> None:
    small = {name: value for name, value in SMALL.items() if name != "objective"}
    encoder = {**SMALL["encoder"], "embed_dim": 16}
    result = ssl_vit.distill(
        run.folder, photo_folder, output_dir=tmp_path / "student", steps=2, **{**small, "encoder": encoder}
    )
    assert result.finished
    assert result.encoder().embed_dim == 16
