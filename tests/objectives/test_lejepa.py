import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.lejepa import (
    LeJEPA,
    LeJEPAConfig,
    distance_to_globals,
    draw_directions,
    sigreg,
    visreg,
)
from ssl_vit.objectives.objective import RunSize
from tests.conftest import GOLDEN, TINY
from tests.processes import run_two
from tests.specs import spec

SMALL = {"hidden_dim": 48, "projection_dim": 16, "num_directions": 32, "num_local_crops": 2, "local_crop_size": 16}


def build(**settings) -> LeJEPA:
    return LeJEPAConfig(**{**SMALL, **settings}).build(EncoderConfig(image_size=32, **TINY).build())


def random_batch(images: int = 4, num_global: int = 2, num_local: int = 2) -> dict[str, Tensor]:
    crops = {"global_crops": torch.randn(images, num_global, 3, 32, 32)}
    return crops | ({"local_crops": torch.randn(images, num_local, 3, 16, 16)} if num_local else {})


def waves(shape: tuple[int, ...], frequency: float, phase: float) -> Tensor:
    count = torch.arange(np.prod(shape), dtype=torch.float64)
    return torch.sin(frequency * count + phase).float().reshape(shape)


class TestAgainstThePapersCode:
    @pytest.fixture
    def golden(self) -> dict[str, Tensor]:
        found = load_file(GOLDEN / "lejepa_reference.safetensors")
        found["features"].requires_grad_()
        return found

    def test_statistic_of_each_view(self, golden: dict[str, Tensor]) -> None:
        found = sigreg(golden["features"], golden["slices"])
        torch.testing.assert_close(found, golden["statistic_per_view_and_slice"].mean(dim=1), rtol=1e-5, atol=1e-6)
        assert found[0].item() == pytest.approx(golden["sigreg_first_view"].item(), rel=1e-5)
        assert found.mean().item() == pytest.approx(golden["sigreg_per_view"].item(), rel=1e-5)
        found.mean().backward()
        expected = golden["grad_norm.sigreg_per_view"].item()
        assert golden["features"].grad.norm().item() == pytest.approx(expected, rel=1e-5)

    def test_statistic_of_all_views_together(self, golden: dict[str, Tensor]) -> None:
        """The form of stable-pretraining, and its loss."""
        found = sigreg(golden["features"].flatten(0, 1)[None], golden["slices"])
        assert found.item() == pytest.approx(golden["sigreg_flattened"].item(), rel=1e-5)
        loss = distance_to_globals(golden["features"], 2) + 0.05 * found
        assert loss.item() == pytest.approx(golden["loss_stable_pretraining"].item(), rel=1e-5)

    @pytest.mark.parametrize(("name", "num_global"), [("all", 4), ("global", 2)])
    def test_both_centres(self, golden: dict[str, Tensor], name: str, num_global: int) -> None:
        found = distance_to_globals(golden["features"], num_global)
        assert found.item() == pytest.approx(golden[f"invariance_{name}_views"].item(), rel=1e-5)
        found.backward()
        expected = golden[f"grad_norm.invariance_{name}_views"].item()
        assert golden["features"].grad.norm().item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(("name", "num_global"), [("minimal", 4), ("paper", 2)])
    def test_loss_and_gradient(
        self, golden: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, name: str, num_global: int
    ) -> None:
        """Of the objective as a whole, whose projections are the reference's features."""
        features, objective = golden["features"], build(regulariser="sigreg", projection_dim=16)
        monkeypatch.setattr("ssl_vit.objectives.lejepa.draw_directions", lambda *_: golden["slices"])
        objective.projector.forward = lambda _: features
        loss = objective(random_batch(24, num_global, 4 - num_global), 0.5)["loss"]
        assert loss.item() == pytest.approx(golden[f"loss_{name}"].item(), rel=1e-5)
        loss.backward()
        assert features.grad.norm().item() == pytest.approx(golden[f"grad_norm.loss_{name}"].item(), rel=1e-5)
        if name == "paper":
            torch.testing.assert_close(features.grad, golden["grad_loss_paper"], rtol=1e-5, atol=1e-8)


def test_values_of_the_sheet() -> None:
    features, directions = waves((2, 6, 5), 0.91, 0.2), waves((5, 256), 0.73, 0.5)
    assert sigreg(features, directions).mean().item() == pytest.approx(0.487156, abs=1e-6)
    assert visreg(features, directions).mean().item() == pytest.approx(0.199165, abs=1e-6)


@pytest.mark.parametrize("num", [64, 512])
def test_null_values(num: int) -> None:
    directions = torch.randn(8, 64)
    assert sigreg(torch.zeros(1, num, 8), directions).item() == pytest.approx(0.4020476 * num, rel=1e-6)
    normal = sigreg(torch.randn(200, num, 8), directions)  # independent draws in the place of views
    assert normal.mean().item() == pytest.approx(1.052464, abs=0.05)


@pytest.mark.parametrize("regulariser", [sigreg, visreg])
def test_a_normal_distribution_is_best(regulariser) -> None:
    torch.manual_seed(0)
    normal, directions = torch.randn(1, 512, 8), torch.randn(8, 64)
    spoiled = [normal + 0.5, 1.5 * normal, 0.5 * normal, normal.sign(), normal[..., :1].expand(-1, -1, 8)]
    best = regulariser(normal, directions).item()
    assert all(regulariser(features, directions).item() > 1.5 * best for features in spoiled)


def test_deviations_that_visreg_divides_by_have_no_gradient() -> None:
    features = torch.randn(1, 64, 4, requires_grad=True)
    directions = torch.randn(4, 32)
    visreg(features, directions).sum().backward()
    scaled = features.detach().clone().requires_grad_()
    deviation = (scaled - scaled.mean(dim=1)).square().mean(dim=1).sqrt() + 1e-6
    unit = (scaled - scaled.mean(dim=1)) / deviation.detach()
    along = unit[0] @ (directions / directions.norm(dim=0))
    quantiles = np.sqrt(2) * torch.erfinv(2 * torch.arange(1, 65) / 65 - 1)
    shape = sum(((values.sort().values - quantiles) ** 2).mean() for values in along.T) / 32
    (scaled.mean(dim=1).square().mean() + (deviation - 1).square().mean() + shape).backward()
    torch.testing.assert_close(features.grad, scaled.grad, rtol=1e-4, atol=1e-7)


def test_directions_follow_from_progress_alone() -> None:
    first = draw_directions(4, 8, 0.25)
    torch.manual_seed(5)
    assert torch.equal(first, draw_directions(4, 8, 0.25))
    # Halves and quarters differ in the highest bits alone.
    assert len({draw_directions(4, 8, step / 64)[0, 0].item() for step in range(64)}) == 64


def _gradients_of_a_share(environment: dict[str, str], folder: Path) -> None:
    """What one process of a launch does: the average of all processes' losses and gradients, into a file."""
    os.environ.update(environment)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {}
    for regulariser in ("visreg", "sigreg"):
        objective, batch = seeded(regulariser)
        found |= gradients(objective, {name: crops[rank::size] for name, crops in batch.items()})
    for value in found.values():
        dist.all_reduce(value)
    if rank == 0:
        save_file({name: value / size for name, value in found.items()}, folder / "found.safetensors")
    dist.destroy_process_group()


def seeded(regulariser: str) -> tuple[LeJEPA, dict[str, Tensor]]:
    torch.manual_seed(0)
    return build(regulariser=regulariser), random_batch(8)


def gradients(objective: LeJEPA, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = objective(batch, 0.5)["loss"]
    loss.backward()
    name = objective.config.regulariser
    found = {f"{name} {key}": p.grad for key, p in objective.named_parameters() if p.grad is not None}
    return {f"{name} loss": loss.detach()[None], **found}


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    run_two(_gradients_of_a_share, tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    for regulariser in ("visreg", "sigreg"):
        for name, expected in gradients(*seeded(regulariser)).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5 * float(expected.norm()) + 1e-6)


@pytest.mark.parametrize(("num_global", "num_local"), [(1, 3), (2, 0), (3, 1)])
def test_any_number_of_views(num_global: int, num_local: int) -> None:
    losses = build()(random_batch(4, num_global, num_local), 0.5)
    assert all(value.isfinite() for value in losses.values())


def test_a_single_view_is_refused() -> None:
    with pytest.raises(ValueError, match="an image has 1 view"):
        build()(random_batch(4, 1, 0), 0.5)


@pytest.mark.parametrize("regulariser", ["visreg", "sigreg"])
def test_steps_bring_views_together_and_spread_images(regulariser: str) -> None:
    objective = build(regulariser=regulariser, projection_dim=4)
    patterns = torch.randn(32, 1, 3, 16, 16)  # an image's views are its pattern with other noise
    batch = {"global_crops": patterns.repeat(1, 2, 1, 2, 2), "local_crops": patterns.repeat(1, 2, 1, 1, 1)}
    batch = {name: crops + 0.3 * torch.randn_like(crops) for name, crops in batch.items()}
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    before = objective(batch, 0.0)
    for step in range(40):
        loss = objective(batch, step / 40)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = objective(batch, 0.0)
    assert after["loss"] < 0.7 * before["loss"], (before, after)
    assert after["view_cosine"] > 0.8
    assert objective.diagnostics()["projection_rank"] > 0.8


def test_the_weight_is_the_published_one_of_the_regulariser() -> None:
    size = RunSize(1000, 64, 100)
    found = {name: LeJEPAConfig(regulariser=name).resolve(size)["weight"].value for name in ("visreg", "sigreg")}
    assert found == {"visreg": 0.6, "sigreg": 0.05}
    assert LeJEPAConfig(weight=0.1).resolve(size) == {}
    with pytest.raises(ValueError, match=r"weight=1\.0"):
        LeJEPAConfig(weight=1.0)


def test_collapses_are_told_apart() -> None:
    objective = build()
    healthy = {"feature_std": 0.6, "projection_rank": 0.7}
    assert objective.diagnose(healthy) is None
    for values, words in (
        ({"feature_std": 0.01}, r"^All images get nearly the same features \(spread 0.010 of 1\)\. Try a higher obj"),
        ({"projection_rank": 0.05}, r"^The projections use few dimensions \(5\.0%"),
    ):
        assert re.search(words, objective.diagnose({**healthy, **values}) or "")
    small = objective.diagnose({**healthy, "feature_std": 0.01}, {"batch": {"size": 32}})
    assert "batch.size 32 is small: 64 or more, without accumulation. Else try" in (small or "")


def test_equal_images_look_collapsed() -> None:
    objective = build()
    batch = {name: crops[:1].expand(8, *crops.shape[1:]) for name, crops in random_batch(1).items()}
    objective.eval()(batch, 0.5)
    values = {name: value.item() for name, value in objective.diagnostics().items()}
    assert "nearly the same features" in (objective.diagnose(values) or "")


def test_two_global_and_six_local_crops_by_default() -> None:
    sample = LeJEPAConfig(local_crop_size=32).build_transform(spec(64))(
        torch.randint(0, 256, (3, 80, 90), dtype=torch.uint8), np.random.default_rng(0)
    )
    assert (len(sample["global_crops"]), len(sample["local_crops"])) == (2, 6)
