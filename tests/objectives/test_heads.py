import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from ssl_vit.objectives.heads import BatchNorm, DINOHead, Prototypes
from tests.processes import run_two


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


def test_batch_norm_is_torchs_in_training_mode() -> None:
    head = DINOHead(6, num_prototypes=9, hidden_dim=8, bottleneck_dim=4, batch_norm=True)
    reference = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 4)
    )
    with torch.no_grad():
        for parameter in head.mlp.parameters():
            parameter.uniform_(-1.0, 1.0)
    reference.load_state_dict(head.mlp.state_dict(), strict=False)  # running averages are left over
    features = torch.randn(2, 5, 6, requires_grad=True)
    expected = reference(features.flatten(0, 1))
    found = head.eval().mlp(features)  # the teacher's, too, is over its rows
    torch.testing.assert_close(found.flatten(0, 1), expected)
    [ours], [theirs] = (torch.autograd.grad((out * out).sum(), features) for out in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _normed(rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows.clone().requires_grad_()
    out = BatchNorm(4)(rows)
    (out**3).sum().backward()
    assert rows.grad is not None
    return out.detach(), rows.grad


def _norm_a_share(environment: dict[str, str], folder: Path) -> None:
    os.environ.update(environment)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    out, grad = _normed(_rows()[slice(0, 3) if rank == 0 else slice(3, 8)])
    save_file({"out": out, "grad": grad}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


def _rows() -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def test_batch_norm_is_over_the_rows_of_all_processes(tmp_path: Path) -> None:
    """Of which masked patches give each another number."""
    run_two(_norm_a_share, tmp_path)
    shares = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    expected = dict(zip(("out", "grad"), _normed(_rows()), strict=True))
    for name, value in expected.items():
        torch.testing.assert_close(torch.cat([share[name] for share in shares]), value, rtol=1e-4, atol=1e-5)
