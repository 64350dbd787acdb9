"""Where training deviates from the papers' code, measured: every figure of docs/deviations.md."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.nn import functional as F
from torchvision.transforms import functional as TF

from ssl_vit.core.schedules import warmup_cosine
from ssl_vit.data.augment.crops import draw_crop
from ssl_vit.data.augment.device import JITTER_ORDERS, color_jitter, gaussian_blur, to_unit
from ssl_vit.data.augment.masking import draw_block_mask
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.patches import sincos_positions
from ssl_vit.objectives.dino import DINO, DINOConfig
from tests.conftest import ROOT

SIDE = 96  # of the image that pixels are compared on


def photo() -> Image.Image:
    """Coarse shapes and some noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) + rng.normal(0, 8, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def levels(ours: torch.Tensor, theirs: Image.Image) -> float:
    """Mean difference to Pillow's image in levels of 255, both in whole ones."""
    return ((255 * ours).round() - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs().mean().item()


def local_positions(table: torch.Tensor) -> float:
    """DINO's and DINOv2's code resize to 6 x 6 by the factor 6.1 / 14, bicubic without antialiasing; relative norm."""
    vit = EncoderConfig(arch="vit_small_patch16_224", depth=0).build().vit
    vit.pos_embed.data.copy_(table)
    vit.cls_token.data.zero_()
    ours = vit._pos_embed(torch.zeros(1, 6, 6, 384))[0, 1:]
    grid = table[:, 1:].unflatten(1, (14, 14)).movedim(-1, 1)
    theirs = F.interpolate(grid, scale_factor=6.1 / 14, mode="bicubic").flatten(2)[0].T
    return ((ours - theirs).norm() / theirs.norm()).item()


def smooth_positions() -> float:
    return 100 * local_positions(sincos_positions(384, (14, 14))[None])


def fresh_positions() -> float:
    torch.manual_seed(0)
    return 100 * local_positions(torch.nn.init.trunc_normal_(torch.empty(1, 197, 384), std=0.02))


def warm_up(warm_up_steps: int, num_steps: int) -> float:
    """DINO's code goes from 0 to the peak in W numbers, both included: step i has i / (W - 1); percent of the peak."""
    steps = np.arange(warm_up_steps)
    ours = [warmup_cosine(step / num_steps, warm_up_steps / num_steps, 1.0, 0.0) for step in steps]
    return 100 * np.abs(np.array(ours) - steps / (warm_up_steps - 1)).max()


def dino_warm_up() -> float:
    return warm_up(25_020, 250_200)  # 10 of 100 epochs of 2,502 steps


def dinov2_warm_up() -> float:
    return warm_up(12_500, 125_000)


def teacher_temperature() -> float:
    """DINO's code changes it once an epoch; from .04 to .07 in 30 of 100 epochs."""
    config = DINOConfig(teacher_temp=0.07, teacher_temp_warmup=0.3)
    progress = np.linspace(0, 1, 10_000, endpoint=False)
    theirs = np.append(np.linspace(0.04, 0.07, 30), np.full(70, 0.07))[(100 * progress).astype(int)]
    ours = [DINO.teacher_temp(type("Objective", (), {"config": config})(), at) for at in progress]  # pyright: ignore
    return np.abs(np.array(ours) - theirs).max()


def pillows_blur() -> float:
    """DINO's code blurs with Pillow, by boxes; mean over its range of deviations."""
    image = photo()
    sigmas = torch.linspace(0.1, 2, 8)
    ours = gaussian_blur(to_unit(TF.pil_to_tensor(image)[None]).repeat(8, 1, 1, 1), sigmas, radius=6)
    theirs = [image.filter(ImageFilter.GaussianBlur(sigma)) for sigma in sigmas.tolist()]
    return float(np.mean([levels(*pair) for pair in zip(ours, theirs, strict=True)]))


def dinov2_blur(radius: int = 4, borders: str = "reflect") -> float:
    """DINOv2's code blurs with torchvision, 9 pixels wide, and rounds to uint8."""
    image = photo()
    sigmas = torch.linspace(0.1, 2, 8)
    ours = gaussian_blur(to_unit(TF.pil_to_tensor(image)[None]).repeat(8, 1, 1, 1), sigmas, radius, borders)  # pyright: ignore
    theirs = [TF.gaussian_blur(image, [9, 9], [sigma, sigma]) for sigma in sigmas.tolist()]
    return float(np.mean([levels(*pair) for pair in zip(ours, theirs, strict=True)]))


def default_blur_of_dinov2() -> float:
    return dinov2_blur(6, "replicate")


def colours() -> float:
    """Pillow rounds to 8 bits after each of the four operations, and its hue has 256 values."""
    image, rng, found = photo(), np.random.default_rng(0), []
    operations = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for _ in range(20):
        factors = [*rng.uniform(0.6, 1.4, 2), rng.uniform(0.8, 1.2), rng.uniform(-0.1, 0.1)]
        order = int(rng.integers(24))
        theirs = image
        for operation in JITTER_ORDERS[order]:
            theirs = operations[operation](theirs, factors[operation])
        ours = color_jitter(
            to_unit(TF.pil_to_tensor(image)[None]), torch.tensor([factors], dtype=torch.float32), torch.tensor([order])
        )
        found.append(levels(ours[0], theirs))
    return float(np.mean(found))


def beit_mask(wanted: int, rng: np.random.Generator) -> int:
    """Masked patches of 14 x 14 as BEiT's algorithm leaves them: ten rectangles that do not fit end it."""
    mask = np.zeros((14, 14), dtype=bool)
    while (missing := wanted - int(mask.sum())) > 0:
        for _ in range(10):
            area = rng.uniform(4, max(missing, 4))
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < 14 and 0 < width < 14):
                continue
            top, left = rng.integers(15 - height), rng.integers(15 - width)
            block = mask[top : top + height, left : left + width]
            if 0 < block.size - int(block.sum()) <= missing:
                block[:] = True
                break
        else:
            break
    return int(mask.sum())


def missing_patches() -> float:
    """Percent of the patches to be masked that are not, ratios uniform in .1 to .5; ours mask all of them."""
    rng = np.random.default_rng(0)
    wanted = [int(196 * rng.uniform(0.1, 0.5)) for _ in range(300)]
    assert all(int(draw_block_mask((14, 14), count / 196, rng).sum()) == count for count in wanted)
    return 100 * (1 - sum(beit_mask(count, rng) for count in wanted) / sum(wanted))


def masked_crops() -> float:
    """Deviation of the share of masked crops in a batch of 64 images, in percent; DINOv2's code masks exactly half."""
    return 100 * (np.random.default_rng(0).random((20_000, 128)) < 0.5).mean(axis=1).std()


def kept_bit() -> float:
    """Percent of RandAugment's posterisations at magnitude 9, deviation .5, that would keep no bit of a pixel."""
    return 100 * (1 - 0.5 * (1 + math.erf((10 - 9) / 0.5 / math.sqrt(2))))


def crops_at_the_first_try() -> float:
    """Percent of boxes (area .08 to 1) that do not fit 500 x 375 pixels: MAE's probe clips them, ours draws anew."""
    again = 0
    for seed in range(3000):
        rng, same = np.random.default_rng(seed), np.random.default_rng(seed)
        area, log_aspect = 500 * 375 * rng.uniform(0.08, 1), rng.uniform(math.log(3 / 4), math.log(4 / 3))
        first = round(math.sqrt(area / math.exp(log_aspect))), round(math.sqrt(area * math.exp(log_aspect)))
        again += draw_crop(375, 500, same, (0.08, 1.0))[2:] != first
    return 100 * again / 3000


ROWS = [line for line in (ROOT / "docs" / "deviations.md").read_text().splitlines() if re.search(r"\| `\w+` \|$", line)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("`")[-2])
def test_figures_of_the_docs_are_measured(row: str) -> None:
    """The number in the column before the function's name, to half of its last digit and a twentieth."""
    *_, figure, name, _ = (cell.strip() for cell in row.split("|"))
    measure: Callable[[], float] = globals()[name.strip("`")]
    number = re.match(r"[\d.]+", figure)
    assert number is not None
    places = len(number[0].partition(".")[2])
    assert measure() == pytest.approx(float(number[0]), abs=0.51 * 10**-places, rel=0.05)


def test_every_measurement_stands_in_the_docs() -> None:
    named = {row.split("`")[-2] for row in ROWS}
    helpers = {"photo", "levels", "local_positions", "warm_up", "beit_mask"}
    own = {name for name, value in globals().items() if getattr(value, "__module__", "") == __name__}
    assert named == {name for name in own if not name.startswith("test_")} - helpers
