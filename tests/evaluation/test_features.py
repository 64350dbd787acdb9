from dataclasses import dataclass

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_vit.data.augment.evaluation import EvalTransform, fit_size
from ssl_vit.data.sources.source import Source
from ssl_vit.data.transform import Normalization
from ssl_vit.evaluation.features import (
    EncodeSettings,
    extract_features,
    pixel_features,
    select_feature,
    stream_features,
)
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder, Features
from tests.specs import GREY, grey


@dataclass(frozen=True)
class Images(Source):
    """A source whose images are tensors that need no decoding."""

    images: tuple[Tensor, ...] = ()

    def image(self, index: int, num_channels: int) -> Tensor:
        assert num_channels == self.images[index].shape[0]
        return self.images[index]


def source_of(*images: Tensor) -> Images:
    rows = datasets.Dataset.from_dict({"image": [""] * len(images)})
    return Images("pictures", rows, "image", images=images)


class Averager(Encoder):
    """Patch tokens are the channel means of the four quarters; the class token is their maximum."""

    model_name = "net"

    def __init__(self) -> None:
        super().__init__(nn.Identity(), EncoderConfig(image_size=(8, 16)), {})
        self.embed_dim, self.has_cls_token, self.stride, self.num_last_layers = 3, True, (4, 8), 1
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(3)
        self.frozen.eval()

    def forward(self, images, *, keep=None, mask=None, mask_token=None):
        self.dtype_inside = torch.zeros(1, 1).matmul(torch.zeros(1, 1)).dtype
        quarters = nn.functional.avg_pool2d(images, self.stride).flatten(2).transpose(1, 2)
        return Features(cls=self.dropout(quarters).amax(dim=1), patches=self.dropout(quarters))

    def last_layers(self, images, num_layers):
        return [self(images)]


RAW = grey(mean=0.0, std=1.0)
PLAIN = EvalTransform((8, 16), RAW, crop_pct=1.0)


def settings(transform=PLAIN, num_layers=1, **changes):
    return {
        "transform": transform,
        "settings": EncodeSettings(2, torch.device("cpu"), **changes),
        "num_layers": num_layers,
    }


def plain(*colour: int) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 16)


def test_features_follow_the_indices_and_are_normalised():
    source = source_of(plain(0, 0, 0), plain(51, 102, 153), plain(255, 255, 255))
    indices = np.array([2, 1, 0, 1, 1])
    transform = EvalTransform((8, 16), Normalization((0.2, 0.4, 0.6), (0.1, 0.5, 1.0)), crop_pct=1.0)
    features = extract_features(Averager(), source, indices, **settings(transform=transform))
    expected = torch.tensor([[8.0, 1.2, 0.4], [0, 0, 0], [-2.0, -0.8, -0.6], [0, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(features["mean"], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(features["cls"], expected[:, None], atol=1e-5, rtol=0)


def test_cls_and_mean_are_what_they_say():
    image = torch.zeros(3, 8, 16, dtype=torch.uint8)
    image[:, :4, :8] = 255  # one quarter of four
    features = extract_features(Averager(), source_of(image), np.array([0]), **settings())
    torch.testing.assert_close(features["cls"], torch.ones(1, 1, 3))
    torch.testing.assert_close(features["mean"], torch.full((1, 3), 0.25))


def test_evaluation_leaves_no_trace():
    encoder = Averager().train()
    encoder.frozen.eval()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    features = extract_features(encoder, source_of(plain(9, 9, 9)), np.array([0]), **settings())
    assert torch.rand(1) == expected  # the global generator is where it was
    assert (encoder.training, encoder.dropout.training, encoder.frozen.training) == (True, True, False)
    torch.testing.assert_close(features["mean"], torch.full((1, 3), 9 / 255))  # and dropout was off
    assert not features["cls"].is_inference()
    assert not features["mean"].is_inference()


def test_modes_come_back_after_an_error():
    encoder = Averager().train()
    with pytest.raises(IndexError):
        extract_features(encoder, source_of(plain(9, 9, 9)), np.array([5]), **settings())
    assert encoder.training


def test_autocast_reaches_the_encoder_and_features_stay_fp32():
    encoder = Averager()
    for autocast_dtype, inside in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        features = extract_features(
            encoder, source_of(plain(9, 9, 9)), np.array([0]), **settings(autocast_dtype=autocast_dtype)
        )
        assert encoder.dtype_inside == inside
        assert features["cls"].dtype == features["mean"].dtype == torch.float32


def test_progress_bar_only_on_a_terminal(capsys):
    extract_features(Averager(), source_of(plain(9, 9, 9)), np.array([0]), **settings())
    assert capsys.readouterr() == ("", "")


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match=r"pictures.*nothing to encode"):
        extract_features(Averager(), source_of(plain(9, 9, 9)), np.array([], dtype=np.int64), **settings())


def test_pixel_features_are_the_shrunken_image():
    ramp = torch.arange(16, dtype=torch.uint8).mul(16).expand(3, 16, 16)
    features = pixel_features(source_of(plain(255, 0, 51), ramp), np.array([1, 0]), 3, size=16)["mean"]
    assert features.shape == (2, 3 * 16 * 16)
    torch.testing.assert_close(features[0].view(3, 16, 16) * 255, ramp.float())
    torch.testing.assert_close(features[1].view(3, -1)[:, 0], torch.tensor([1.0, 0.0, 0.2]))


def test_kinds_of_features_are_put_together_from_the_pieces():
    pieces = {"cls": torch.arange(24.0).view(2, 4, 3), "mean": -torch.ones(2, 2)}
    assert torch.equal(select_feature(pieces, "cls"), pieces["cls"][:, 3])
    assert torch.equal(select_feature(pieces, "mean"), pieces["mean"])
    assert torch.equal(select_feature(pieces, "cls4"), torch.arange(24.0).view(2, 12))
    both = select_feature(pieces, "cls4+mean")
    assert torch.equal(both, torch.cat([torch.arange(24.0).view(2, 12), pieces["mean"]], dim=1))
    assert select_feature({**pieces, "cls": pieces["cls"][:, :1]}, "cls4+mean").shape == (2, 5)


def test_class_tokens_of_the_last_blocks_and_patches(tiny_encoder):
    source = source_of(*(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8) for _ in range(3)))
    transform = EvalTransform((32, 32), GREY, crop_pct=1.0)
    given = settings(transform=transform, num_layers=2)
    features = extract_features(tiny_encoder, source, np.arange(3), **given)
    images = torch.stack(source.images).float() / 255 * 2 - 1
    layers = tiny_encoder.eval().last_layers(images, 2)
    torch.testing.assert_close(features["cls"], torch.stack([layer.cls for layer in layers], dim=1))
    torch.testing.assert_close(features["mean"], tiny_encoder(images).patches.mean(dim=1))
    batches = list(stream_features(tiny_encoder, source, np.arange(3), with_patches=True, **given))
    assert [len(batch["mean"]) for batch in batches] == [2, 1]
    torch.testing.assert_close(torch.cat([batch["patches"] for batch in batches]), layers[-1].patches)


def test_views_are_random_crops_that_follow_from_view_and_row():
    source = source_of(*(torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8) for _ in range(2)))
    images = [source.image(row, 3) for row in (0, 1)]
    views = {view: [EvalTransform((8, 16), RAW, view=view)(images[row], row) for row in (0, 1)] for view in (0, 1)}
    again = EvalTransform((8, 16), RAW, view=0)
    assert torch.equal(views[0][1], again(images[1], 1))
    assert views[0][0].shape == (3, 8, 16)
    assert not torch.equal(views[0][0], views[1][0])
    assert not torch.equal(again(images[0], 0), again(images[0], 1))  # the row decides, not the image alone


def test_another_size_and_padding_reach_the_encoder(tiny_encoder):
    image = torch.randint(0, 256, (3, 40, 44), dtype=torch.uint8)
    size, padding = fit_size((40, 44), tiny_encoder.stride, "pad")
    transform = EvalTransform(size, GREY, 1.0, padding)
    found = extract_features(tiny_encoder, source_of(image), np.array([0]), **settings(transform=transform))
    images = torch.zeros(1, 3, 40, 48)
    images[..., :44] = image.float() / 255 * 2 - 1
    torch.testing.assert_close(found["mean"], tiny_encoder.eval()(images).patches.mean(dim=1))
