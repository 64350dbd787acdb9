import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.transform import Normalization
from ssl_vit.objectives.objective import Reconstruction
from ssl_vit.visualize.reconstructions import draw_reconstructions, reconstruction_panels

MEAN, STD = (0.4, 0.5, 0.6, 0.3, 0.2), (0.2, 0.25, 0.3, 0.1, 0.15)
PATCH_SIZE = (4, 2)  # of images of 8 x 6: two rows of three patches


def random_pixels(channels=3, batch=2):
    return torch.rand(batch, channels, 8, 6, generator=torch.Generator().manual_seed(0))


def normalise(pixels):
    channels = pixels.shape[1]
    return (pixels - torch.tensor(MEAN[:channels]).view(-1, 1, 1)) / torch.tensor(STD[:channels]).view(-1, 1, 1)


def patches_by_hand(images):
    """Row-major patches whose pixels go by row, column, channel."""
    patches = []
    for image in images:
        for row in (0, 4):
            for column in (0, 2, 4):
                patch = image[:, row : row + 4, column : column + 2]
                patches.append([patch[c, y, x] for y in range(4) for x in range(2) for c in range(len(image))])
    return torch.tensor(patches).view(len(images), 6, -1)


def normalization(channels):
    return Normalization(MEAN[:channels], STD[:channels])


def reconstruction(patches, norm_pix_loss=False, title=""):
    return Reconstruction(patches, VISIBLE, PATCH_SIZE, norm_pix_loss, title)


def panels_of(images, patches, norm_pix_loss=False):
    return reconstruction_panels(images, reconstruction(patches, norm_pix_loss), normalization(images.shape[1]))


VISIBLE = torch.zeros(2, 6, dtype=torch.bool).scatter(1, torch.tensor([[4, 0], [2, 5]]), True)


def test_a_perfect_prediction_reproduces_the_image():
    pixels = random_pixels()
    images = normalise(pixels)
    panels = panels_of(images, patches_by_hand(images))
    assert panels.shape == (2, 3, 8, 6, 3)
    for column in (0, 2):
        torch.testing.assert_close(panels[:, column], pixels.permute(0, 2, 3, 1))


def test_masked_patches_are_light_grey_and_visible_ones_untouched():
    pixels = random_pixels()
    images = normalise(pixels)
    masked = panels_of(images, torch.zeros(2, 6, 24))[:, 1].permute(0, 3, 1, 2)
    expected = torch.full_like(pixels, 0.85)
    expected[0, :, 4:8, 2:4] = pixels[0, :, 4:8, 2:4]  # patch 4: second row, second column
    expected[0, :, 0:4, 0:2] = pixels[0, :, 0:4, 0:2]  # patch 0
    expected[1, :, 0:4, 4:6] = pixels[1, :, 0:4, 4:6]  # patch 2
    expected[1, :, 4:8, 4:6] = pixels[1, :, 4:8, 4:6]  # patch 5
    torch.testing.assert_close(masked, expected)


def test_the_last_column_pastes_visible_patches_over_the_prediction():
    pixels = random_pixels()
    images = normalise(pixels)
    panels = panels_of(images, torch.zeros(2, 6, 24))
    predicted = torch.tensor(MEAN[:3]).expand(2, 8, 6, 3)  # zero is the mean colour
    removed = panels[:, 1] == 0.85
    torch.testing.assert_close(panels[:, 2], torch.where(removed, predicted, panels[:, 0]))


def test_normalised_predictions_get_mean_and_contrast_of_their_patch_back():
    images = normalise(random_pixels())
    patches = patches_by_hand(images).numpy()
    mean, variance = patches.mean(-1, keepdims=True), patches.var(-1, ddof=1, keepdims=True)
    target = torch.from_numpy((patches - mean) / np.sqrt(variance + 1e-6))
    panels = panels_of(images, target, norm_pix_loss=True)
    torch.testing.assert_close(panels[:, 2], panels[:, 0])
    flat = panels_of(images, torch.zeros(2, 6, 24), norm_pix_loss=True)
    raw = panels_of(images, torch.from_numpy(mean).expand(2, 6, 24))
    torch.testing.assert_close(flat, raw)


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_any_number_of_channels(channels, shown):
    pixels = random_pixels(channels)
    images = normalise(pixels)
    panels = panels_of(images, patches_by_hand(images))
    for column in (0, 2):
        torch.testing.assert_close(panels[:, column], pixels[:, shown].permute(0, 2, 3, 1))


def test_predictions_out_of_range_are_clipped():
    panels = panels_of(normalise(random_pixels()), torch.full((2, 6, 24), 100.0))
    assert (panels[:, 2][panels[:, 1] == 0.85] == 1).all()


def test_shapes_that_do_not_fit_are_refused():
    images = normalise(random_pixels())
    with pytest.raises(ValueError, match=r"has shape \(2, 6, 20\).*make \(2, 6, 24\)"):
        panels_of(images, torch.zeros(2, 6, 20))
    with pytest.raises(ValueError, match=r"patch_size=\(4, 2\): does not divide.*\(8, 5\)"):
        panels_of(images[..., :5], torch.zeros(2, 4, 24))


def written(path, channels=3, norm_pix_loss=False, title="title") -> np.ndarray:
    images = normalise(random_pixels(channels))
    filled_in = reconstruction(torch.zeros(2, 6, 8 * channels), norm_pix_loss, title)
    draw_reconstructions(images, filled_in, normalization(channels), path)
    return np.array(Image.open(path).convert("RGB"))


def test_every_image_pixel_is_a_square_in_the_file(tmp_path):
    figure = written(tmp_path / "new" / "folder" / "figure.png")
    panels = panels_of(normalise(random_pixels()), torch.zeros(2, 6, 24))
    factor = 47  # the first whole one that makes 6 pixels at least 280 wide
    cells = np.repeat(np.repeat((panels * 255).round().byte().numpy(), factor, axis=2), factor, axis=3)
    removed = np.all(figure == 217, axis=-1)
    top, left = np.argwhere(removed.sum(axis=1, keepdims=True) > 100)[0][0], None
    # Columns lie side by side at one height, those of the second image right of the first one's, with gaps of white.
    for left in range(40):
        if np.array_equal(figure[top : top + 8 * factor, left : left + 6 * factor], cells[0, 0]):
            break
    else:
        pytest.fail("the first original is not in the figure")
    gap = next(g for g in range(40) if removed[top, left + 6 * factor + g + 2 * factor])
    for place, cell in enumerate(cells.reshape(6, *cells.shape[2:])):
        x = left + place * (6 * factor + gap)
        assert np.array_equal(figure[top : top + 8 * factor, x : x + 6 * factor], cell)
    assert (figure[top : top + 8 * factor, left + 6 * factor : left + 6 * factor + gap] == 255).all()


def test_captions_and_titles_get_room_of_their_own(tmp_path):
    heights = [
        len(written(tmp_path / "figure.png", **settings))
        for settings in (
            {"title": ""},
            {"title": "one line with $no math_"},
            {"title": "several lines " * 8},
            {"title": "", "norm_pix_loss": True},
            {"title": "", "norm_pix_loss": True, "channels": 5},
        )
    ]
    assert heights[0] < heights[1] < heights[2]
    assert heights[0] < heights[3] < heights[4]
    small = written(tmp_path / "figure.png", title="", channels=5)
    assert (small[-25:-3] < 128).any()  # the caption is written, at the bottom
    assert not (written(tmp_path / "figure.png", title="")[-10:-3] < 255).any()
