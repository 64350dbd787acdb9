import pytest
import torch
from torch import nn

from ssl_vit.objectives.teacher import MovingAverage


def test_parameters_are_averaged_and_buffers_copied() -> None:
    average, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.running_mean.fill_(7.0)
    MovingAverage(average, model).update(0.75)
    assert average.weight.tolist() == pytest.approx([2.0] * 3)
    assert average.running_mean.tolist() == [7.0] * 3


def test_other_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot average"):
        MovingAverage(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))


@pytest.mark.parametrize("taken", [True, False])
def test_a_step_that_was_not_taken_moves_nothing(taken: bool) -> None:
    average, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.running_mean.fill_(7.0)
    MovingAverage(average, model).update(0.75, torch.tensor(taken))
    assert average.weight.tolist() == [2.0 if taken else 1.0] * 3
    assert average.running_mean.tolist() == [7.0 if taken else 0.0] * 3
