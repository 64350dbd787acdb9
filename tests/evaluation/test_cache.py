import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ssl_vit.core.manifest import hash_file
from ssl_vit.data.augment.evaluation import EvalTransform
from ssl_vit.data.sources.source import DataConfig, open_source
from ssl_vit.evaluation import cache
from ssl_vit.evaluation.cache import cached_features, feature_key, fingerprint
from tests.specs import GREY

TRANSFORM = EvalTransform((32, 32), GREY)


class Extract:
    """Counts how often features are extracted."""

    def __init__(self, num_layers: int = 1) -> None:
        self.calls, self.num_layers = 0, num_layers

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"cls": torch.full((3, self.num_layers, 2), float(self.calls)), "mean": torch.ones(3, 2)}


def test_features_are_extracted_once(tmp_path: Path) -> None:
    extract = Extract()
    found = [cached_features(tmp_path / "features", "key", 1, extract) for _ in range(3)]
    assert extract.calls == 1
    assert all(torch.equal(item["cls"], found[0]["cls"]) for item in found)
    cached_features(tmp_path / "features", "other", 1, extract)
    cached_features(None, "key", 1, extract)
    assert extract.calls == 3


def test_more_blocks_than_are_kept_are_extracted_anew(tmp_path: Path) -> None:
    one, four = Extract(), Extract(num_layers=4)
    cached_features(tmp_path, "key", 1, one)
    assert cached_features(tmp_path, "key", 4, four)["cls"].shape[1] == 4
    assert cached_features(tmp_path, "key", 1, one)["cls"].shape[1] == 4
    assert (one.calls, four.calls) == (1, 1)


def test_a_damaged_file_is_written_anew(tmp_path: Path) -> None:
    extract = Extract()
    cached_features(tmp_path, "key", 1, extract)
    file = tmp_path / "key.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert cached_features(tmp_path, "key", 1, extract)["cls"][0, 0, 0] == 2
    assert cached_features(tmp_path, "key", 1, extract)["cls"][0, 0, 0] == 2


def test_two_scripts_write_the_same_features_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one begins and ends while the first one writes."""
    first, second, save = Extract(), Extract(), cache.save_sealed

    def interrupted(tensors: dict[str, torch.Tensor], file: Path, key: str) -> None:
        save(tensors, file, key)
        monkeypatch.setattr(cache, "save_sealed", save)
        cached_features(tmp_path, "key", 1, second)

    monkeypatch.setattr(cache, "save_sealed", interrupted)
    cached_features(tmp_path, "key", 1, first)
    cached_features(tmp_path, "key", 1, first)
    assert (first.calls, second.calls) == (1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["key.safetensors"]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    extract = Extract()
    for _ in range(2):
        assert len(cached_features(tmp_path / "file" / "features", "key", 1, extract)["mean"]) == 3
    assert extract.calls == 2
    assert "not kept for the next time" in capsys.readouterr().out


def test_the_key_changes_with_all_that_features_follow_from(photo_folder: Path) -> None:
    source = open_source(DataConfig(source=str(photo_folder)))
    rows = np.arange(5)
    given = {
        "backbone": "a",
        "encoder": {"num_heads": 4},
        "source": source,
        "rows": rows,
        "transform": TRANSFORM,
        "dtype": None,
    }
    first = feature_key(**given)
    assert first == feature_key(**(given | {"source": open_source(DataConfig(source=str(photo_folder)))}))
    changes: list[dict[str, Any]] = [
        {"backbone": "b"},
        {"encoder": {"num_heads": 2}},
        {"rows": rows + 1},
        {"rows": rows[::-1]},
        {"transform": replace(TRANSFORM, crop_pct=1.0)},
        {"transform": replace(TRANSFORM, view=0)},
        {"dtype": torch.bfloat16},
    ]
    assert len({first, *(feature_key(**(given | change)) for change in changes)}) == 8


def test_images_that_change_are_noticed(photo_folder: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes((photo_folder / "disc" / "00.png").read_bytes())
    source = open_source(DataConfig(source=str(tmp_path)))
    first = fingerprint(source, np.array([0]))
    assert first == fingerprint(source, np.array([0]))
    status = image.stat()
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    assert fingerprint(source, np.array([0])) != first


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert hash_file(tmp_path / "file").startswith("ba7816bf8f01cfea")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def foreign(file: Path) -> None:
    """Features of the same shape, as anybody writes them."""
    save_file({name: torch.randn_like(value) for name, value in load_file(file).items()}, file)


def renamed(file: Path) -> None:
    """Whole features, of another backbone or source."""
    cached_features(file.parent, "other", 1, Extract())
    (file.parent / "other.safetensors").replace(file)


@pytest.mark.parametrize("damage", [flip, foreign, renamed, lambda file: file.write_bytes(b"")])
def test_features_that_are_not_what_was_written_are_extracted_again(tmp_path: Path, damage) -> None:
    extract = Extract()
    for calls in (1, 1):
        cached_features(tmp_path, "key", 1, extract)
        assert extract.calls == calls
    damage(tmp_path / "key.safetensors")
    for _ in range(2):
        cached_features(tmp_path, "key", 1, extract)
        assert extract.calls == 2
