"""Images that evaluations leave out."""

import numpy as np
import pytest
import torch

from ssl_vit.evaluation import left_out
from ssl_vit.evaluation.left_out import without_bad
from tests.evaluation.test_evaluate import source


def test_the_reason_of_a_bad_image_is_looked_for_once_and_only_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(left_out, "describe_bad", lambda of, row, channels: asked.append(row) or {"reason": "torn"})
    batches = [{"good": torch.tensor([True, row != 1]), "mean": torch.arange(2.0)} for row in range(4)]
    found = without_bad(iter([dict(batch) for batch in batches]), source([0] * 8), np.arange(8), 3, 0.2)
    assert found["places"].tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert asked == []
    with pytest.raises(ValueError, match=r"^max_bad_share=0\.1: 1 or more of the 8 images .*torn"):
        without_bad(iter(batches), source([0] * 8), np.arange(8), 3, 0.1)
    assert asked == [3]
