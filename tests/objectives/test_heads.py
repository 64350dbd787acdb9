import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ssl_vit.objectives.heads import DINOHead, Prototypes


def test_prototypes_are_torchs_weight_norm() -> None:
    prototypes = Prototypes(5, 7, trainable_norm=True)
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7, bias=False), dim=0)
    with torch.no_grad():
        prototypes.weight_g.uniform_(0.5, 2.0)
        reference.parametrizations.weight.original0.copy_(prototypes.weight_g)
        reference.parametrizations.weight.original1.copy_(prototypes.weight_v)
    features = torch.randn(3, 5)
    torch.testing.assert_close(prototypes(features), reference(features))


def test_logits_are_cosines() -> None:
    head = DINOHead(6, num_prototypes=9, hidden_dim=8, bottleneck_dim=4)
    features = torch.randn(2, 3, 6)
    expected = F.cosine_similarity(head.mlp(features)[..., None, :], head.last_layer.weight_v, dim=-1)
    torch.testing.assert_close(head(features), expected)


def test_initial_weights() -> None:
    head = DINOHead(64, num_prototypes=16, hidden_dim=256, bottleneck_dim=64)
    for layer in (head.mlp[0], head.mlp[2], head.mlp[4]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))
    # The last layer as torch makes a linear one (uniform within 1 / sqrt(inputs)), under norms of 1.
    directions = head.last_layer.weight_v
    assert directions.abs().max().item() == pytest.approx(64**-0.5, rel=0.01)
    assert directions.std().item() == pytest.approx((64 * 3) ** -0.5, rel=0.1)
    assert torch.equal(head.last_layer.weight_g, torch.ones(16, 1))
