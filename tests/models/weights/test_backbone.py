import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from ssl_vit.data.transform import Normalization
from ssl_vit.export import export_backbone, load_backbone
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.vit import ViT
from ssl_vit.models.weights.pretrained import load_pretrained, open_pretrained
from tests.conftest import TINY
from tests.specs import GREY

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def export(encoder: ViT, folder: Path) -> Path:
    return export_backbone(
        encoder, folder, normalization=Normalization(MEAN, STD), provenance={"objective": "MAE", "pooled": "mean"}
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"image_size": 32, "pos_embed": "sincos"},
        {"image_size": 32, "pos_embed": "learned"},
        {"image_size": (16, 48), "in_chans": 1, "pos_embed": "sincos"},
        {"image_size": 32, "in_chans": 5},
        {"image_size": 32, "mlp_ratio": 2.0},
        {"arch": "vit_small_patch14_reg4_dinov2", "image_size": 32},
        {"arch": "vit_medium_patch16_gap_256", "image_size": 32},
    ],
)
def test_what_is_loaded_is_what_was_exported(tmp_path: Path, settings: dict) -> None:
    config = EncoderConfig(**{**TINY, **settings})
    encoder = config.build().eval()
    means = (0.5,) * config.in_chans
    export_backbone(encoder, tmp_path, normalization=Normalization(means, means), provenance={})
    loaded = load_backbone(tmp_path)
    images = torch.randn(2, config.in_chans, *encoder.image_size)
    with torch.no_grad():
        for expected, found in zip(encoder(images), loaded(images), strict=True):
            assert torch.equal(expected, found)
    assert not loaded.training


def test_timm_loads_the_file_with_its_ordinary_call(tmp_path: Path, tiny_encoder: ViT) -> None:
    path = export(tiny_encoder, tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    model = timm.create_model(
        description["architecture"],
        num_classes=0,
        checkpoint_path=str(path),
        **description["model_args"],
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = tiny_encoder.eval()(images).patches.mean(dim=1)  # of an MAE
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert timm.data.resolve_data_config(description["pretrained_cfg"])["mean"] == MEAN


def test_timm_reads_how_images_are_prepared_from_a_loaded_encoder(tmp_path: Path) -> None:
    encoder = EncoderConfig(image_size=(16, 24), in_chans=2, **TINY).build()
    export_backbone(encoder, tmp_path, normalization=Normalization((0.1, 0.2), (0.3, 0.4)), provenance={}, crop_pct=0.9)
    found = timm.data.resolve_model_data_config(load_backbone(tmp_path))
    assert (tuple(found["input_size"]), found["crop_pct"]) == ((2, 16, 24), 0.9)
    assert (tuple(found["mean"]), tuple(found["std"])) == ((0.1, 0.2), (0.3, 0.4))
    described = json.loads((tmp_path / "config.json").read_text())
    del described["pretrained_cfg"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert load_backbone(tmp_path).pretrained_cfg == {}


def test_a_standard_architecture_needs_no_arguments(tmp_path: Path) -> None:
    encoder = EncoderConfig(arch="vit_tiny_patch16_224", pos_embed="sincos").build().eval()
    path = export(encoder, tmp_path)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(path)).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images), encoder(images).cls, rtol=1e-4, atol=1e-5)


def test_the_description_says_where_it_comes_from(tmp_path: Path, tiny_encoder: ViT) -> None:
    export(tiny_encoder, tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["ssl_vit"]["objective"] == "MAE"
    assert description["ssl_vit"]["encoder"]["depth"] == 2
    assert description["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert description["global_pool"] == "avg"


class TestRefusals:
    @pytest.fixture
    def file(self, tmp_path: Path, tiny_encoder: ViT) -> Path:
        return export(tiny_encoder, tmp_path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"backbone.safetensors: no such file"):
            load_backbone(tmp_path)

    def test_no_description(self, file: Path) -> None:
        (file.parent / "config.json").unlink()
        with pytest.raises(ValueError, match=r"config.json: cannot be read"):
            load_backbone(file)

    def test_a_file_that_fills_nothing(self, file: Path) -> None:
        save_file({f"module.{name}": value for name, value in load_file(file).items()}, file)
        with pytest.raises(ValueError, match=r"30 missing: blocks.0.*30 unexpected: module.blocks.0"):
            load_backbone(file)

    def test_a_file_that_lacks_one_tensor(self, file: Path) -> None:
        tensors = load_file(file)
        del tensors["norm.weight"]
        save_file(tensors, file)
        with pytest.raises(ValueError, match=r"1 missing: norm.weight"):
            load_backbone(file)

    def test_another_shape(self, file: Path) -> None:
        save_file({**load_file(file), "norm.weight": torch.ones(7)}, file)
        with pytest.raises(ValueError, match=r"1 of another shape: norm.weight \(7,\) instead of \(32,\)"):
            load_backbone(file)

    def test_a_truncated_file(self, file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match="is no whole safetensors file"):
            load_backbone(file)

    def test_a_foreign_description(self, file: Path) -> None:
        (file.parent / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
        with pytest.raises(ValueError, match=r"has no ssl_vit.encoder section"):
            load_backbone(file)

    def test_a_setting_of_a_newer_version(self, file: Path) -> None:
        description = json.loads((file.parent / "config.json").read_text())
        description["ssl_vit"]["encoder"]["rope"] = True
        (file.parent / "config.json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match=r"config.json: ssl_vit.encoder.rope: no such setting"):
            load_backbone(file)

    @pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8, torch.complex64])
    def test_weights_of_a_dtype_that_weights_do_not_have(self, file: Path, kind: torch.dtype) -> None:
        save_file({**load_file(file), "norm.bias": torch.zeros(32).to(kind)}, file)
        with pytest.raises(ValueError, match=r"of a dtype that weights do not have: norm.bias"):
            load_backbone(file)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64])
    def test_weights_that_are_not_finite(self, file: Path, value: float, kind: torch.dtype) -> None:
        spoiled = load_file(file)["blocks.0.attn.qkv.weight"].to(kind)
        spoiled[3, 4] = value
        save_file({**load_file(file), "blocks.0.attn.qkv.weight": spoiled}, file)
        for load in (
            load_backbone,
            lambda file: load_pretrained(EncoderConfig(image_size=32, **TINY).build(), str(file)),
        ):
            with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.weight holds NaN or infinity"):
                load(file)

    def test_weights_of_another_export_of_the_same_sizes(self, file: Path, tmp_path: Path) -> None:
        torch.manual_seed(7)
        export(EncoderConfig(image_size=32, **TINY).build(), tmp_path / "other")
        (tmp_path / "other" / "backbone.safetensors").replace(file)
        for load in (load_backbone, lambda file: open_pretrained(str(file)).tensors()):
            with pytest.raises(ValueError, match=r"holds other weights than .*config.json was written with"):
                load(file)

    def test_a_flipped_bit(self, file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match="holds other weights than"):
            load_backbone(file)

    def test_exports_of_versions_before_it_have_no_hash_and_load(self, file: Path) -> None:
        described = json.loads((file.parent / "config.json").read_text())
        assert len(described["ssl_vit"].pop("weights_sha256")) == 64
        (file.parent / "config.json").write_text(json.dumps(described))
        assert load_backbone(file).embed_dim == 32

    def test_sizes_that_are_not_those_of_the_weights_are_refused_before_they_are_built(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        described = json.loads((file.parent / "config.json").read_text())
        described["ssl_vit"]["encoder"] |= {"embed_dim": 16384, "num_heads": 4}
        (file.parent / "config.json").write_text(json.dumps(described))
        with pytest.raises(ValueError, match=r"of another shape: "):
            load_backbone(file)  # 20 GB, were it built


def test_a_backbone_that_does_not_come_back_equal_is_not_handed_over(
    tmp_path: Path, tiny_encoder: ViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_vit.models.weights.backbone.load_strictly", lambda *args: None)
    with pytest.raises(RuntimeError, match="differ from the trained ones"):
        export(tiny_encoder, tmp_path)
    assert not (tmp_path / "backbone.safetensors").exists()


def test_whoever_may_read_the_description_may_read_the_weights(tmp_path: Path, tiny_encoder: ViT) -> None:
    file = export_backbone(tiny_encoder, tmp_path, normalization=GREY, provenance={})
    assert file.stat().st_mode == (tmp_path / "config.json").stat().st_mode
