from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from ssl_vit.visualize.attention import draw_attention, frame, keep_mass
from tests.specs import grey


def test_a_frame_surrounds_its_patch() -> None:
    framed = frame(torch.zeros(1, 1, 32, 48, 3), 7, (8, 8))[0, 0]  # second row, second column of six
    red = (framed == torch.tensor([0.85, 0.1, 0.1])).all(dim=-1)
    assert red[8, 8:16].all()
    assert red[15, 8:16].all()
    assert red[8:16, 8].all()
    assert red[8:16, 15].all()
    assert not red[9:15, 9:15].any()
    assert red.sum() == 28


def test_kept_patches_are_the_fewest_that_hold_the_mass() -> None:
    attention = torch.tensor([[0.1, 0.4], [0.3, 0.2]])
    assert keep_mass(attention, 0.6).tolist() == [[False, True], [True, False]]
    assert keep_mass(attention, 0.4).tolist() == [[False, True], [False, False]]
    assert keep_mass(attention, 1.0).all()
    maps = torch.rand(3, 2, 7, 7)
    kept = keep_mass(maps, 0.6)
    mass = (maps * kept).sum(dim=(-2, -1)) / maps.sum(dim=(-2, -1))
    assert (mass >= 0.6 - 1e-6).all()
    smallest = torch.where(kept, maps, torch.inf).amin(dim=(-2, -1))
    assert ((maps * kept).sum(dim=(-2, -1)) - smallest < 0.6 * maps.sum(dim=(-2, -1))).all()
    with pytest.raises(ValueError, match=r"mass=0.0: must lie in \(0, 1\]"):
        keep_mass(attention, 0.0)


@pytest.mark.parametrize("mass", [None, 0.6])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_figure_shows_image_mean_and_heads(tmp_path: Path, channels: int, mass: float | None) -> None:
    images, attention = torch.zeros(2, channels, 16, 24), torch.rand(2, 3, 2, 3)
    path = tmp_path / "new" / "attention.png"
    draw_attention(images, attention, normalization=grey(channels, std=0.25), path=path, mass=mass)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[1] > 5 * 280
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_every_map_is_scaled_to_its_own_maximum(tmp_path: Path) -> None:
    attention = torch.tensor([[[[1e-3, 0.0]], [[0.5, 0.0]]]])
    path = tmp_path / "attention.png"
    draw_attention(torch.zeros(1, 3, 8, 16), attention, normalization=grey(std=0.25), path=path)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    top, bottom = (np.round(np.array(colormaps["inferno"](end)[:3]) * 255) for end in (1.0, 0.0))
    maps = (pixels == bottom).all(axis=-1).sum(axis=1) > 100  # rows of the maps, and not of the scale below
    brightest, darkest = ((pixels[maps] == colour).all(axis=-1).sum() for colour in (top, bottom))
    assert brightest == darkest > 0
