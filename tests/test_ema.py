import pytest
import torch
from torch import nn

from ssl_vit.ema import update_ema


def test_parameters_are_averaged_and_buffers_copied() -> None:
    average, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.running_mean.fill_(7.0)
    update_ema(average, model, 0.75)
    assert average.weight.tolist() == pytest.approx([2.0] * 3)
    assert average.running_mean.tolist() == [7.0] * 3


def test_other_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot average"):
        update_ema(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.9)
