"""The losses from the head's last layer are those of its logits, in value and gradients, whatever the chunks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssl_vit.objectives import prototype_loss
from ssl_vit.objectives.dino import dino_loss
from ssl_vit.objectives.dinov2 import ibot_loss
from ssl_vit.objectives.prototype_loss import dino_prototype_loss, ibot_prototype_loss, masked_patch_weights

MASKS = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]]).bool()


def value_and_gradients(loss: Callable[[Tensor, Tensor], Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [item.clone().requires_grad_() for item in inputs]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(2.5 * value, leaves)


@pytest.mark.parametrize("numbers_at_a_time", [1, 100, 2**22])
@pytest.mark.parametrize(("views", "teachers"), [(2, 2), (6, 2), (3, 1)])
def test_dino(monkeypatch: pytest.MonkeyPatch, views: int, teachers: int, numbers_at_a_time: int) -> None:
    monkeypatch.setattr(prototype_loss, "CHUNK_NUMBERS", numbers_at_a_time)
    features, prototypes = torch.randn(views, 5, 8), torch.randn(33, 8)
    probs = torch.randn(teachers, 5, 33).mul(3).softmax(dim=-1)
    found = value_and_gradients(lambda z, w: dino_prototype_loss(z, w, probs, 0.2), features, prototypes)
    wanted = value_and_gradients(lambda z, w: dino_loss(z @ w.T, probs, 0.2), features, prototypes)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("numbers_at_a_time", [1, 100, 2**22])
def test_ibot(monkeypatch: pytest.MonkeyPatch, numbers_at_a_time: int) -> None:
    monkeypatch.setattr(prototype_loss, "CHUNK_NUMBERS", numbers_at_a_time)
    features, prototypes = torch.randn(7, 8), torch.randn(33, 8)
    probs = torch.randn(7, 33).mul(3).softmax(dim=-1)
    before = probs.clone()
    weights = masked_patch_weights(MASKS, MASKS.flatten().nonzero().flatten())
    found = value_and_gradients(lambda z, w: ibot_prototype_loss(z, w, probs, weights), features, prototypes)
    assert torch.equal(probs, before)
    wanted = value_and_gradients(lambda z, w: ibot_loss(z @ w.T, probs, MASKS), features, prototypes)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_nothing_masked_is_no_loss_and_no_gradient() -> None:
    found = value_and_gradients(
        lambda z, w: ibot_prototype_loss(z, w, torch.zeros(0, 33), torch.zeros(0)),
        torch.zeros(0, 8),
        torch.randn(33, 8),
    )
    assert all(not value.any() for value in found)


def test_half_precision_sums_in_fp32_and_gives_the_gradients_of_autocast() -> None:
    features, prototypes = torch.randn(4, 3, 16), torch.randn(2048, 16)
    probs = torch.randn(2, 3, 2048).softmax(dim=-1)

    def under_autocast(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        def run(z: Tensor, w: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss(z, w)

        return value_and_gradients(run, features, prototypes)

    found = under_autocast(lambda z, w: dino_prototype_loss(z, w, probs))
    wanted = under_autocast(lambda z, w: dino_loss(torch.nn.functional.linear(z, w), probs))
    assert [item.dtype for item in found] == [torch.float32] * 3
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=1e-3)
    for own, other in zip(found[1:], wanted[1:], strict=True):
        assert torch.linalg.norm(own - other) < 0.02 * torch.linalg.norm(other)


def test_scaled_half_precision_gradients_do_not_underflow() -> None:
    """fp16's loss scale comes after this loss, so its own numbers must not need one."""
    features = torch.nn.functional.normalize(torch.randn(10, 64, 32), dim=-1)
    prototypes = torch.nn.functional.normalize(torch.randn(512, 32), dim=-1)
    probs = torch.randn(2, 64, 512).softmax(dim=-1)
    exact = value_and_gradients(lambda z, w: dino_prototype_loss(z, w, probs), features, prototypes)

    def run(z: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return dino_prototype_loss(z, w, probs)

    for own, wanted in zip(value_and_gradients(run, features, prototypes), exact, strict=True):
        assert torch.linalg.norm(own - wanted) < 0.01 * torch.linalg.norm(wanted)
