"""Backbones to other libraries: what they load gives our features, or the export is refused and nothing is left."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.augment.device import normalize
from ssl_vit.data.augment.evaluation import centre_crop
from ssl_vit.data.decode.decode import decode
from ssl_vit.data.transform import Normalization
from ssl_vit.export import targets
from ssl_vit.export.targets import TARGETS, Proof, export_to, proof_images
from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.runs.trained import Trained
from tests.conftest import TINY
from tests.families import CONVOLUTIONS, FAMILIES

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own

SQUARE_ONLY, THREE_CHANNELS, NO_REGISTERS = "takes square images", "takes 3 channels", "knows no registers"
OTHER_FAMILY = "only plain Vision Transformers .* of another family; export to timm"
ENCODERS = {
    "learned positions": EncoderConfig(image_size=32, **TINY),
    "sin-cos positions": EncoderConfig(image_size=32, pos_embed="sincos", **TINY),
    "LayerScale": EncoderConfig(image_size=32, layer_scale=0.1, **TINY),
    "one channel": EncoderConfig(image_size=32, in_chans=1, **TINY),
    "not square": EncoderConfig(image_size=(16, 48), pos_embed="sincos", **TINY),
    "not square, LayerScale": EncoderConfig(image_size=(16, 48), layer_scale=0.1, **TINY),
    "registers": EncoderConfig(arch="vit_small_patch14_reg4_dinov2", image_size=42, depth=2, embed_dim=32, num_heads=4),
    "registers, not square": EncoderConfig(
        arch="vit_small_patch14_reg4_dinov2", image_size=(42, 28), depth=1, embed_dim=32, num_heads=4
    ),
    "SwiGLU": EncoderConfig(arch="vit_giant_patch14_dinov2", image_size=42, depth=1, embed_dim=96, num_heads=4),
    "no class token": EncoderConfig(arch="vit_medium_patch16_gap_256", image_size=64, depth=1),
    "convnext, norm before pooling": EncoderConfig("convnext_tiny_hnf", 64, model_args=CONVOLUTIONS),
    **FAMILIES,
}
OF_FAMILIES = ("convnext, norm before pooling", *FAMILIES)
REFUSED = {
    ("transformers_mae", "not square"): SQUARE_ONLY,
    ("transformers_mae", "not square, LayerScale"): SQUARE_ONLY,
    ("transformers_mae", "registers"): "without registers",
    ("transformers_mae", "registers, not square"): SQUARE_ONLY,
    ("transformers_mae", "SwiGLU"): "without registers or SwiGLU",
    ("transformers_mae", "no class token"): "no class token",
    ("torchvision", "one channel"): THREE_CHANNELS,
    ("torchvision", "not square"): SQUARE_ONLY,
    ("torchvision", "not square, LayerScale"): SQUARE_ONLY,
    ("torchvision", "registers"): NO_REGISTERS,
    ("torchvision", "registers, not square"): SQUARE_ONLY,
    ("torchvision", "SwiGLU"): "knows no SwiGLU",
    ("torchvision", "no class token"): "no class token",
    **{("torchvision", name): OTHER_FAMILY for name in OF_FAMILIES},
    ("torchvision", "distilled"): "it has a distillation token; export to timm",
    **{("transformers_mae", name): "only a run of MAE has a decoder" for name in OF_FAMILIES},
}
CLASSES = {
    "distilled": "DeiTModel",
    "hybrid": "TimmWrapperModel",
    "dinov3": "DINOv3ViTModel",
    "eva02": "TimmWrapperModel",
    "swin": "SwinModel",
    "swinv2": "TimmWrapperModel",  # not square
    "convnext": "ConvNextModel",
    "convnextv2": "ConvNextV2Model",
    "convnext, overlapping stem": "TimmWrapperModel",
    "convnext, norm before pooling": "TimmWrapperModel",
    "registers, not square": "TimmWrapperModel",
    "no class token": "TimmWrapperModel",
    "learned positions": "ViTModel",
    "LayerScale": "Dinov2Model",
}
"""Of transformers."""
SLOW_TARGETS = ("onnx", "torch_export")  # seconds each
SLOW_ENCODERS = ("learned positions", "registers, not square")


def build(config: EncoderConfig, objective: str = "MAE") -> Trained:
    """A backbone none of whose parameters is left at a value that would hide it."""
    torch.manual_seed(0)
    encoder = config.build()
    mae = None
    if objective == "MAE":
        mae = MAEConfig(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2).build(encoder)
    for parameter in (mae or encoder).parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    (mae or encoder).eval()
    means = (0.5,) * encoder.in_chans
    known = {"objective": objective, "pooled": "mean" if mae else "cls", "steps": 3}
    return Trained(encoder, Normalization(means, means), 0.875, known, Path("none"), mae)


def cases() -> list[Any]:
    """Of every family those whose export takes seconds are marked slow, but for one."""
    found = []
    for target in TARGETS:
        for name in ENCODERS if target not in SLOW_TARGETS else (*SLOW_ENCODERS, *OF_FAMILIES):
            is_slow = target in SLOW_TARGETS and name in OF_FAMILIES and (target, name) != ("torch_export", "swin")
            found.append(pytest.param(target, name, marks=[pytest.mark.slow] if is_slow else []))
    return found


@pytest.mark.parametrize(("target", "name"), cases())
def test_every_library_gives_our_features_or_says_why_not(tmp_path: Path, target: str, name: str) -> None:
    trained = build(ENCODERS[name], "DINO" if name in OF_FAMILIES else "MAE")
    proof = proof_images(trained)
    if (target, name) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[target, name]):
            export_to(trained, target, tmp_path, proof)
        assert list(tmp_path.iterdir()) == []
        return
    found = export_to(trained, target, tmp_path, proof)
    assert found.difference <= 1e-5
    assert [path.name for path in tmp_path.iterdir()] == [target]
    if target == "transformers" and name in CLASSES:
        described = json.loads((found.folder / "config.json").read_text())
        assert described["architectures"] == [CLASSES[name]]
    assert oct((found.folder / "README.md").stat().st_mode) == oct((found.folder / "config.json").stat().st_mode)


@pytest.mark.parametrize("target", [name for name in TARGETS if name not in SLOW_TARGETS])
def test_another_backbone_is_found_out_and_nothing_is_left(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = build(ENCODERS["LayerScale"])
    write = TARGETS[target].write

    def write_wrongly(trained: Trained, folder: Path) -> str:
        code = write(trained, folder)
        with torch.no_grad():
            trained.encoder.vit.blocks[1].mlp.fc2.bias += 1e-3
        return code

    monkeypatch.setitem(targets.TARGETS, target, TARGETS[target]._replace(write=write_wrongly))
    with pytest.raises(RuntimeError, match="differ from the trained ones by"):
        export_to(trained, target, tmp_path, proof_images(trained))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_only_where_it_is_said(tmp_path: Path) -> None:
    trained = build(ENCODERS["learned positions"], "DINO")
    proof = proof_images(trained)
    folder = export_to(trained, "timm", tmp_path, proof).folder
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        export_to(trained, "timm", tmp_path, proof)
    assert (folder / "mine.txt").exists()
    export_to(trained, "timm", tmp_path, proof, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_library_that_is_not_installed_is_named(tmp_path: Path) -> None:
    trained = build(ENCODERS["learned positions"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"onnx, onnxscript, onnxruntime: not installed; pip install"):
            export_to(trained, "onnx", tmp_path, proof_images(trained))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three smooth images, larger than the encoders' size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        coarse.resize((90, 110), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


FRESH = """
import os
import sys
import numpy as np
import torch
from PIL import Image

photos = [Image.open(f"{photos}/{{number}}.png") for number in range(3)]
for name in {names!r}:
    for target, encode in {encode!r}.items():
        os.chdir(f"{out}/{{name}}/{{target}}")
        given = torch.from_numpy(np.load("../images.npy"))
        exec(open("code.py").read())
        with torch.inference_mode():
            pixels, features = eval(encode)
        np.savez("found.npz", pixels=pixels.numpy(), features=features.numpy())
assert not any(name.split(".")[0] == "ssl_vit" for name in sys.modules)
"""
ENCODE = {
    "timm": "torch.stack([transform(photo) for photo in photos]), model(given)",
    "transformers": 'processor(photos, return_tensors="pt")["pixel_values"], model(given).pooler_output',
}


def code_of(folder: Path) -> str:
    """The Python of a card."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)[0]


def run_fresh(script: str, folder: Path) -> str:
    """Run Python where ssl_vit has not been imported, and return what it said of errors."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_cards_code_gives_our_features_in_a_process_without_us(tmp_path: Path, photos: Path) -> None:
    names = ("sin-cos positions", "LayerScale", "registers", "hybrid", "dinov3", "swin", "convnext")
    expected = {}
    for name in names:
        trained = build(ENCODERS[name], "DINO")
        encoder = trained.encoder
        cropped = [
            centre_crop(decode((photos / f"{n}.png").read_bytes(), 3), encoder.image_size, 0.875) for n in range(3)
        ]
        images = normalize(torch.stack(cropped), trained.normalization)
        for target in ENCODE:
            folder = export_to(trained, target, tmp_path / name, Proof(images, "photos")).folder
            (folder / "code.py").write_text(code_of(folder))
        np.save(tmp_path / name / "images.npy", images.numpy())
        with torch.inference_mode():
            expected[name] = encoder(images).cls.numpy()
    script = FRESH.format(photos=photos, names=names, out=tmp_path, encode=ENCODE)
    assert "newly initialized" not in run_fresh(script, tmp_path)
    for name, features in expected.items():
        images = np.load(tmp_path / name / "images.npy")
        for target in ENCODE:
            found = np.load(tmp_path / name / target / "found.npz")
            np.testing.assert_allclose(found["features"], features, atol=1e-5, rtol=0)
            # Pillow and torchvision round differently: within three grey levels of 255, at a deviation of .5.
            np.testing.assert_allclose(found["pixels"], images, atol=3 / 255 / 0.5, rtol=0)


SCORED = [
    ("learned positions", target, objective, scored)
    for target in TARGETS
    for objective, scored in (("MAE", "mean"), ("DINO", "cls"), ("DINO", "mean"))
    if target != "transformers_mae" and (target not in SLOW_TARGETS or (objective, scored) != ("DINO", "mean"))
]
SCORED += [
    (name, target, "DINO", scored)
    for name in ("no class token", *OF_FAMILIES)
    for target, scored in (("timm", "cls"), ("timm", "mean"), ("transformers", "cls"))
]


@pytest.mark.parametrize(("name", "target", "objective", "scored"), SCORED)
def test_the_cards_code_gives_the_scored_feature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, target: str, objective: str, scored: str
) -> None:
    trained = build(ENCODERS[name], objective)
    trained.provenance["feature"] = scored
    folder = export_to(trained, target, tmp_path, proof_images(trained)).folder
    monkeypatch.chdir(folder)
    assert "ssl_vit" not in code_of(folder)
    found: dict[str, Any] = {}
    exec(code_of(folder), found)
    features = trained.encoder(torch.as_tensor(found["images"]))
    expected = features.cls if scored == "cls" else features.patches.mean(dim=1)
    for key, value in (("features", expected), *features._asdict().items()):
        torch.testing.assert_close(torch.as_tensor(found[key]), value, atol=1e-5, rtol=0)
    words = {"cls": trained.encoder.cls_in_words, "mean": "the mean of the patch tokens"}
    assert f"; {words[scored]} stands for an image" in (folder / "README.md").read_text()


def test_the_card_of_an_mae_with_its_decoder_predicts_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = build(ENCODERS["learned positions"])
    monkeypatch.chdir(export_to(trained, "transformers_mae", tmp_path, proof_images(trained)).folder)
    found: dict[str, Any] = {}
    exec(code_of(Path.cwd()), found)
    assert found["patches"].shape == (1, 16, 192)


def test_a_run_of_mae_is_pooled_by_its_patches(tmp_path: Path) -> None:
    for objective, pooling in (("MAE", "avg"), ("DINO", "token")):
        trained = build(ENCODERS["learned positions"], objective)
        folder = export_to(trained, "timm", tmp_path / objective, proof_images(trained)).folder
        assert json.loads((folder / "config.json").read_text())["global_pool"] == pooling


def test_torchvisions_own_names_are_used_where_they_fit(tmp_path: Path) -> None:
    trained = build(EncoderConfig(arch="vit_base_patch32_224", image_size=64), "DINO")
    folder = export_to(trained, "torchvision", tmp_path, proof_images(trained)).folder
    assert json.loads((folder / "config.json").read_text())["architecture"] == "vit_b_32"


def test_the_images_of_a_proof_are_the_runs_own_or_the_named_ones(photos: Path) -> None:
    trained = build(ENCODERS["learned positions"])
    assert proof_images(trained).name == "3 generated images"
    own = replace(trained, provenance={"source": str(photos)})
    assert proof_images(own, asked=True).name == "3 images of `photos`"
    assert proof_images(own, asked=True).images.shape == (3, 3, 32, 32)
    with pytest.raises(ValueError, match=r"^--images='nowhere.parquet'"):
        proof_images(own, "nowhere.parquet")


def test_a_proof_takes_the_next_good_images_and_says_why_it_has_none(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(next(photos.rglob("*.png")).read_bytes() if number != 0 else b"broken")
    own = replace(build(ENCODERS["learned positions"]), provenance={"source": str(folder)})
    assert proof_images(own, asked=True).name == "2 images of `bad`"  # of rows 0, 1 and 3 the first is bad
    assert proof_images(own, asked=True).why == ""
    for file in folder.iterdir():
        file.write_bytes(b"broken")
    assert proof_images(own, asked=True).name == "3 generated images"
    assert "nor can any of the next" in proof_images(own, asked=True).why


def test_pushing_says_what_the_hub_said_and_keeps_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def create_repo(self, repo: str, **settings: object) -> str:
            raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi", Refusing)
    with pytest.raises(ValueError, match=r"--push_to_hub me/mine: no network; .* is written"):
        targets.push(tmp_path, "me/mine", private=False)


def test_pushing_uploads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object, object]] = []

    class Hub:
        def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
            calls.append(("create", repo, private))
            return f"https://hub/{repo}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            calls.append(("upload", repo_id, folder_path))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert targets.push(tmp_path, "me/mine", private=True) == "https://hub/me/mine"
    assert calls == [("create", "me/mine", True), ("upload", "me/mine", tmp_path)]
