from pathlib import Path

import pytest
import torch

from ssl_vit.data.loader import Batches
from ssl_vit.data.sampler import StepSampler
from ssl_vit.data.sources.source import DataConfig, open_source
from ssl_vit.objectives.mae import MAEConfig
from tests.specs import spec

CPU = torch.device("cpu")


def batches(folder: Path, *, num_workers: int = 0, start_step: int = 0, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    source = open_source(DataConfig(source=str(folder)))
    transform = MAEConfig().build_transform(spec(32))
    sampler = StepSampler(num_samples=len(source), batch_size=8, num_steps=12, seed=seed, start_step=start_step)
    return list(Batches(source, transform, sampler, num_channels=3, num_workers=num_workers, device=CPU))


def equal(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def test_batches_do_not_depend_on_the_number_of_workers(photo_folder: Path) -> None:
    plain = batches(photo_folder)
    assert plain[0]["images"].shape == (8, 3, 32, 32)
    assert plain[0]["keep"].shape == (8, 4)
    assert equal(plain, batches(photo_folder, num_workers=2))


def test_starting_in_the_middle_of_an_epoch_gives_the_same_batches(photo_folder: Path) -> None:
    assert equal(batches(photo_folder)[7:], batches(photo_folder, start_step=7))


def test_crops_and_masks_change_from_epoch_to_epoch_and_with_the_seed(photo_folder: Path) -> None:
    plain = batches(photo_folder)
    assert not equal(plain[:5], plain[5:10])
    assert not equal(plain, batches(photo_folder, seed=1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named(tmp_path: Path, num_workers: int) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^data.source='.*': row 0 \(.*broken.jpg\): .*") as raised:
        batches(tmp_path, num_workers=num_workers)
    assert len(str(raised.value).splitlines()) == 1
