"""What leaves with a result names no folder of its user and no key."""

import json
from pathlib import Path
from typing import Any

import pytest

from ssl_vit.core.privacy import public, without_secrets
from ssl_vit.export import export_backbone
from ssl_vit.export.targets import export_to, proof_images
from ssl_vit.models.config import EncoderConfig
from tests.conftest import TINY
from tests.export.test_targets import build
from tests.specs import GREY


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--tracking_key", "abc"], ["--tracking_key", "***"]),
        (["--auth=abc"], ["--auth=***"]),
        (["--hub.accessToken", "abc"], ["--hub.accessToken", "***"]),
        (["--db-passwd=a b"], ["--db-passwd=***"]),
        (["env", "WANDB_API_KEY=0123abc", "python"], ["env", "WANDB_API_KEY=***", "python"]),
        (["--env=AWS_SECRET_ACCESS_KEY=a/b+c"], ["--env=AWS_SECRET_ACCESS_KEY=***"]),
        (["--options={'key': 'abc', 'anon': False}"], ["--options={'key': '***', 'anon': False}"]),
        (['{"client_secret":"abc","x":1}'], ['{"client_secret":"***","x":1}']),
        (["Authorization: Bearer abcdef123456"], ["Authorization: *** ***"]),
        (["sk-proj-0123456789"], ["***"]),
        (["AKIAIOSFODNN7EXAMPLE"], ["***"]),
        (["a,glpat-0123456789ab"], ["a,***"]),
        (["xoxb-0123456789-abc"], ["***"]),
        (["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln"], ["***"]),
        (["s3://key:pass@word/1@bucket/x"], ["s3://***@bucket/x"]),
        (["ftp://me@host/x"], ["ftp://***@host/x"]),
        (["--mean=[0.5]", "task_abcdefghijk", "monkey.png"], ["--mean=[0.5]", "task_abcdefghijk", "monkey.png"]),
        (["https://host:80/a=1"], ["https://host:80/a=1"]),
    ],
)  # fmt: skip
def test_what_looks_like_a_key_is_hidden(given: list[str], shown: list[str]) -> None:
    assert without_secrets(given) == shown


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/alice/photos/", "photos"),
        ("~/photos", "photos"),
        ("../alice/photos", "photos"),
        ("file:///home/alice/x.parquet", "x.parquet"),
        ("/home/alice/*.tar", "*.tar"),
        ("work/alice/photos", "photos"),
        ("owner/name", "owner/name"),
        ("openmoji", "openmoji"),
        ("vit_small_patch16_224.dino", "vit_small_patch16_224.dino"),
        ("s3://me:pw@bucket/x", "s3://***@bucket/x"),
        ("Images by A (CC BY 4.0), https://a.b/c/d", "Images by A (CC BY 4.0), https://a.b/c/d"),
        ("/", "/"),
        ("a\0b", "a\0b"),
        ("x" * 5000, "x" * 5000),
        ({"/home/a/x": 0.5, "/home/b/x": 0.25, "o/n": 0.25}, {"x": 0.5, "x (2)": 0.25, "o/n": 0.25}),
        ([{"teacher": "/home/alice/t.pth"}, 3, None], [{"teacher": "t.pth"}, 3, None]),
    ],
)
def test_of_local_paths_the_last_part_is_published(given: Any, shown: Any) -> None:
    assert public(given) == shown


def test_a_relative_folder_that_is_there_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alice" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public("alice/photos") == "photos"


KNOWN = {
    "objective": "DINO",
    "source": {"/home/alice/a": 0.5, "/home/alice/b": 0.5},
    "pretrained": "/home/alice/old.pth",
    "objective_config": {"teacher": "/home/alice/t"},
    "steps": 3,
}


def test_an_export_names_no_folder(tmp_path: Path) -> None:
    encoder = EncoderConfig(image_size=32, pretrained="/home/alice/old.pth", **TINY).build()
    export_backbone(encoder, tmp_path / "out", normalization=GREY, provenance=KNOWN)
    text = (tmp_path / "out" / "config.json").read_text()
    assert "alice" not in text
    own = json.loads(text)["ssl_vit"]
    assert own["source"] == {"a": 0.5, "b": 0.5}
    assert own["pretrained"] == own["encoder"]["pretrained"] == "old.pth"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("target", ["timm", "transformers", "torchvision", "onnx", "torch_export"])
def test_no_file_of_any_library_names_a_folder(tmp_path: Path, target: str) -> None:
    """Neither settings nor the stack traces that graphs are stored with."""
    trained = build(EncoderConfig(image_size=32, **{**TINY, "depth": 1}), "DINO")
    trained.provenance.update(KNOWN)
    folder = export_to(trained, target, tmp_path, proof_images(trained)).folder
    here = [str(Path(__file__).parents[2]).encode(), b"site-packages", b"alice", str(tmp_path).encode()]
    for file in folder.iterdir():
        content = file.read_bytes()
        assert [text for text in here if text in content] == [], file.name
