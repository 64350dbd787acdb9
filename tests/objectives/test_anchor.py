import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ssl_vit.evaluation.untrained import untrained_encoder
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.objectives.anchor import AnchorConfig, gram_loss, paka_loss
from ssl_vit.objectives.dino import DINOConfig
from ssl_vit.objectives.dinov2 import DINOv2Config
from ssl_vit.objectives.lejepa import LeJEPAConfig
from ssl_vit.objectives.views import ViewsObjective
from ssl_vit.runs.checkpoint import list_checkpoints
from tests.conftest import GOLDEN, TINY, last_weights
from tests.families import FAMILIES

SMALL_HEAD = {"num_prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8}
CONFIGS = {
    "dino": DINOConfig(**SMALL_HEAD, num_local_crops=0),
    "dinov2": DINOv2Config(**SMALL_HEAD, num_local_crops=0, ibot_weight=0),
    "masked": DINOv2Config(**SMALL_HEAD, num_local_crops=0, mask_prob=1.0),
    "lejepa": LeJEPAConfig(hidden_dim=16, projection_dim=8, num_directions=16, num_local_crops=0),
}


def waves(frequency: float, phase: float) -> Tensor:
    return torch.sin(frequency * torch.arange(60, dtype=torch.float64) + phase).float().reshape(2, 6, 5)


def encoder(**settings) -> Encoder:
    built = EncoderConfig(image_size=32, **{**TINY, "drop_path_rate": 0.5, "pretrained": "start", **settings}).build()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return built


def build(name: str, kind: str, **settings) -> ViewsObjective:
    config = CONFIGS[name]
    anchored = type(config)(**{**vars(config), "anchor": kind, "anchor_weight": 2.0})
    return anchored.build(encoder(**settings)).train()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"global_crops": torch.randn(4, 2, 3, 32, 32), "masks": torch.rand(4, 2, 16) < 0.5}


class TestAgainstThePapersCode:
    @pytest.fixture
    def golden(self) -> dict[str, Tensor]:
        found = load_file(GOLDEN / "dinov3_losses_reference.safetensors")
        found["student_patches"].requires_grad_()
        return found

    @pytest.mark.parametrize(("negatives", "clip"), [("keep", False), ("remove", True)])
    def test_gram_loss(self, golden: dict[str, Tensor], negatives: str, clip: bool) -> None:
        loss = gram_loss(golden["student_patches"], golden["teacher_patches"], clip_negative=clip)
        loss.backward()
        assert loss.item() == pytest.approx(golden[f"gram.norm.image.{negatives}"].item(), rel=1e-5)
        norm = golden["student_patches"].grad.norm().item()
        assert norm == pytest.approx(golden[f"grad_norm.gram.norm.image.{negatives}"].item(), rel=1e-5)

    def test_values_of_waves(self) -> None:
        one, other = waves(0.29, 0.4), waves(0.53, 0.8)
        assert gram_loss(one, other).item() == pytest.approx(1.105032, abs=1e-6)
        assert gram_loss(one, other, clip_negative=True).item() == pytest.approx(0.211575, abs=1e-6)


def test_kernel_alignment_has_the_values_of_its_formula() -> None:
    one, other = waves(0.29, 0.4), waves(0.53, 0.8)
    assert paka_loss(one, other).item() == pytest.approx(0.992854, abs=1e-6)
    lengths = [tokens / tokens.norm(dim=-1, keepdim=True) for tokens in (one, other)]
    assert paka_loss(*lengths).item() == pytest.approx(0.979995, abs=1e-6)


def test_kernel_alignment_is_blind_to_rotation_scale_and_shift() -> None:
    patches = torch.randn(3, 9, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert paka_loss(patches, 3 * patches @ rotation + torch.randn(6)).item() == pytest.approx(0, abs=1e-5)
    assert paka_loss(patches, torch.randn(3, 9, 6)).item() > 0.1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["gram", "paka", "features"])
def test_it_is_0_before_the_first_step_and_draws_back_after_it(name: str, kind: str) -> None:
    """Although the student is in training mode, with drop path, and sees masked crops."""
    objective, samples = build(name, kind), batch()
    assert objective(samples, 0.0)["loss_anchor"].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in objective.encoder.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    losses = objective(samples, 0.1)
    assert losses["loss_anchor"].item() > 1e-3
    before = losses["loss_anchor"].item()
    distance = objective.anchor(objective.encoder, samples["global_crops"][:, 0])
    parameters = list(objective.encoder.parameters())
    gradients = torch.autograd.grad(distance, parameters, allow_unused=True)
    with torch.no_grad():
        norm = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 0.01 * (0 if gradient is None else gradient / norm)
    assert objective(samples, 0.1)["loss_anchor"].item() < before


def test_its_weight_is_that_of_its_share_of_the_loss() -> None:
    anchored, samples = build("dino", "gram", drop_path_rate=0.0), batch()
    with torch.no_grad():
        anchored.encoder.vit.blocks[0].attn.qkv.weight += 0.1
    losses = anchored(samples, 0.0)
    assert losses["loss_anchor"].item() > 0
    alone = losses["kl"] + losses["teacher_entropy"]  # DINO's own loss
    assert losses["loss"].item() == pytest.approx((alone + 2 * losses["loss_anchor"]).item(), rel=1e-6)


def test_the_start_is_no_part_of_the_objective() -> None:
    plain = CONFIGS["dino"].build(encoder())
    anchored = build("dino", "gram")
    assert anchored.state_dict().keys() == plain.state_dict().keys()
    assert len(list(anchored.parameters())) == len(list(plain.parameters()))
    [start] = anchored.frozen
    before = start.sha256
    losses = anchored(batch(), 0.0)
    losses["loss"].backward()
    with torch.no_grad():
        for parameter in anchored.parameters():
            parameter += 1
    anchored.after_step(0.5)
    assert type(start)(start.on(torch.device("cpu")), "anchor", "").sha256 == before
    assert all(module.training for module in anchored.encoder.modules())  # as before its pass in eval mode


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_can_be_anchored(family: str) -> None:
    config = FAMILIES[family]
    built = EncoderConfig(**{**vars(config), "pretrained": "start"}).build()
    objective = DINOConfig(**SMALL_HEAD, num_local_crops=0, anchor="gram").build(built)
    side = built.image_size
    losses = objective({"global_crops": torch.randn(2, 2, built.in_chans, *side)}, 0.0)
    assert losses["loss_anchor"].item() == pytest.approx(0, abs=1e-6)


def test_fresh_weights_have_no_anchor() -> None:
    fresh = encoder(pretrained=None)
    with pytest.raises(ValueError, match=r"^anchor='gram': keeps the backbone near .* name some in encoder.pretrained"):
        AnchorConfig(anchor="gram").build_anchor(fresh)
    assert AnchorConfig().build_anchor(fresh) is None
    with pytest.raises(ValueError, match=r"^anchor_weight=0\.0"):
        DINOConfig(anchor_weight=0.0)


def test_blocks_that_are_computed_again_would_drop_paths() -> None:
    with pytest.raises(ValueError, match=r"^anchor='gram': encoder.grad_checkpointing"):
        AnchorConfig(anchor="gram").build_anchor(encoder(grad_checkpointing=True))
    assert AnchorConfig(anchor="gram").build_anchor(encoder(grad_checkpointing=True, drop_path_rate=0.0)) is not None


def test_the_untrained_baseline_of_an_anchored_run_has_none() -> None:
    config = DINOConfig(**SMALL_HEAD, anchor="gram")
    built = untrained_encoder(EncoderConfig(image_size=32, pretrained="start", **TINY), config, seed=0)
    assert not built.is_pretrained


def test_a_run_goes_on_near_to_the_start_that_it_had(start, tmp_path: Path) -> None:
    first, run = tmp_path / "first", tmp_path / "run"
    assert start(name="first", steps=2, objective="dino") == 0
    flags = (f"--encoder.pretrained={first}", "--objective.anchor=gram", "--encoder.drop_path_rate=0.3")
    assert start(*flags, steps=3, objective="dino") == 0
    distances = [json.loads(line)["loss_anchor"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert distances[:2] == pytest.approx([0, 0], abs=1e-6)  # the first step has a rate of 0
    assert distances[2] > 1e-5
    checkpoint = list_checkpoints(run)[-1]
    assert json.loads((checkpoint / "state.json").read_text())["frozen"].keys() == {"anchor"}
    assert not [name for name in last_weights(run) if "anchor" in name or "start" in name]

    assert start(*flags, steps=3, objective="dino") == 0  # finished, and its start is what it was
    assert start("--fresh", "--seed=1", name="first", steps=2, objective="dino") == 0
    with pytest.raises(ValueError, match=r"^encoder.pretrained='.*first': the anchor's weights are not those that "):
        start(*flags, steps=3, objective="dino")


def test_fresh_weights_are_refused_before_an_image_is_read(start) -> None:
    with pytest.raises(ValueError, match=r"^objective.anchor='paka': keeps the backbone near"):
        start("--objective.anchor=paka", "--data.source=missing_folder", objective="dino")
