import json
from pathlib import Path

import pytest

from ssl_vit.export.card import _scores, measured_on

SETTINGS = {"split": "train[:20%]", "test_split": "test"}


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (
            {"judged_on": {"source": "/home/me/photos/", "split": "train", "num_test": 40, "num_classes": 2}},
            "`photos` (train), 40 images of 2 classes, each by what was learned from others",
        ),
        (
            {
                "source": "a/x.parquet",
                "test_source": "b/y.parquet",
                "num_train": 9,
                "num_test": 1234,
                "settings": SETTINGS,
            },
            "`y.parquet` (test), 1,234 images; learned from `x.parquet` (train[:20%]), 9 images",
        ),
        (
            {"source": "{/a/b: 0.5, c: 2}", "test_source": "a held-out 20% of /d/e", "num_test": 5},
            "a held-out 20% of `e`, 5 images; learned from `{b: 0.5, c: 2}`",
        ),
        ({"test": "masks", "num_classes": 3}, "`masks` of 3 classes"),
        ({"step": 4}, "not recorded"),
    ],
)
def test_a_score_says_what_it_was_measured_on(result: dict, words: str, tmp_path: Path) -> None:
    assert measured_on(result) == words
    score = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 40}
    (tmp_path / "results.json").write_text(json.dumps({**result, "scores": {"trained": {"knn": score}}}))
    assert list(_scores(tmp_path))[1].endswith(f"| {words} |")
