from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.vit import ViT
from ssl_vit.visualize.patches import draw_pca, draw_positions, patch_pca, patch_similarity, position_similarity
from tests.specs import GREY


def object_on_ground(number: int = 2, size: int = 6) -> torch.Tensor:
    """Tokens of `number` images of 6 x 6 patches: an object of 2 x 2 patches far from the ground."""
    tokens = 0.1 * torch.randn(number, size, size, 8)
    tokens[:, 2:4, 2:4, 0] += 5.0
    return tokens.reshape(number, size * size, 8)


def test_components_are_those_of_all_images_together() -> None:
    tokens = object_on_ground()
    found = patch_pca(tokens, (6, 6))
    flat = tokens.reshape(-1, 8) - tokens.reshape(-1, 8).mean(dim=0)
    _, singular, directions = torch.linalg.svd(flat, full_matrices=False)
    first = (flat @ directions[0]).reshape(2, 36)
    shown = found.colours[..., 0]
    correlation = torch.corrcoef(torch.stack([first.flatten(), shown.flatten()]))[0, 1].abs()
    assert correlation > 0.99
    assert found.explained == pytest.approx(float(singular[:3].square().sum() / singular.square().sum()), rel=1e-4)
    assert found.foreground.all()
    assert found.colours.min() == 0
    assert found.colours.max() == 1
    # The same object has the same colour in both images.
    assert (shown.reshape(2, 6, 6)[:, 2:4, 2:4].std(dim=0) < 0.1).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_is_rare_at_the_border(sign: int) -> None:
    found = patch_pca(sign * object_on_ground(), (6, 6), foreground=True)
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[2:4, 2:4] = True
    assert (found.foreground.reshape(2, 6, 6) == expected).all()
    assert (found.colours[~found.foreground] == 0).all()
    assert (found.colours[found.foreground] > 0).any()


def test_too_few_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        patch_pca(torch.randn(1, 1, 8), (1, 1))


def test_similarity_is_the_cosine_to_the_patch_of_the_same_image() -> None:
    tokens = torch.randn(2, 5, 7)
    found = patch_similarity(tokens, 3)
    for image in range(2):
        for patch in range(5):
            expected = torch.cosine_similarity(tokens[image, patch], tokens[image, 3], dim=0)
            torch.testing.assert_close(found[image, patch], expected)
    with pytest.raises(ValueError, match="patch=5: there are 5 patches"):
        patch_similarity(tokens, 5)


def test_positions_are_compared_without_those_of_prefix_tokens(tiny_encoder: ViT) -> None:
    found = position_similarity(tiny_encoder)
    assert found.shape == (16, 16)
    torch.testing.assert_close(found.diagonal(), torch.ones(16))
    table = tiny_encoder.vit.pos_embed[0, 1:].detach()
    torch.testing.assert_close(found[2, 7], torch.cosine_similarity(table[2], table[7], dim=0))


def test_what_is_no_foreground_is_black_and_nothing_else_is(tmp_path: Path) -> None:
    images = torch.full((1, 3, 48, 48), 0.9)
    draw_pca(images, object_on_ground(1), (6, 6), path=tmp_path / "pca.png", foreground=True, normalization=GREY)
    with Image.open(tmp_path / "pca.png") as figure:
        pixels = np.asarray(figure.convert("RGB"))
    panel = pixels[:, -pixels.shape[1] // 3 + 20 :].reshape(-1, 3)
    black = (panel == 0).all(axis=-1)
    cells = black | ((panel.min(axis=-1) >= 50) & (panel.min(axis=-1) < 250))  # of the figure, not of its letters
    assert black.sum() == pytest.approx(32 / 36 * cells.sum(), rel=0.05)


def test_of_many_positions_some_are_drawn(tmp_path: Path) -> None:
    encoder = EncoderConfig(arch="vit_tiny_patch16_224", image_size=320, depth=1).build()
    draw_positions(encoder, tmp_path / "positions.png")
    with Image.open(tmp_path / "positions.png") as figure:
        assert 1100 < figure.width < 1600
