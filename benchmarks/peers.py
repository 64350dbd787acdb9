"""The same training steps in other libraries, from their own parts (extra `bench`).

Each takes our settings and gives one step: forward, backward, optimizer, and the teacher's average where there is one.
Images are there already, normalised, for us (`step.own_step`) and for them; masks are drawn in each step. AdamW is
torch's fused one for all, and attention is the kind that is faster, as we choose it.
"""

import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ssl_vit.data.transform import pair
from ssl_vit.models.vit import ViT, choose_attention, fuses_attention
from ssl_vit.objectives.dino import DINOConfig
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.training.config import RunConfig

Step = Callable[[], None]


def transformers_mae(config: RunConfig, batch: int, device: torch.device, dtype: torch.dtype | None) -> Step:
    """ViTMAEForPreTraining as its example's Trainer takes a step by default: fused AdamW, gradients clipped at 1."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    settings, encoder = _mae(config), _shape(config)
    block: Any = encoder.vit.blocks[0]
    attention: Any = {
        "attn_implementation": "sdpa" if fuses_attention(encoder.num_patches, device, kind_of(dtype)) else "eager"
    }
    model: Any = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=encoder.image_size[0],
            patch_size=encoder.stride[0],
            num_channels=encoder.in_chans,
            hidden_size=encoder.embed_dim,
            num_hidden_layers=len(encoder.vit.blocks),
            num_attention_heads=block.attn.num_heads,
            intermediate_size=block.mlp.fc1.out_features,
            decoder_hidden_size=settings.decoder_embed_dim,
            decoder_num_hidden_layers=settings.decoder_depth,
            decoder_num_attention_heads=settings.decoder_num_heads,
            decoder_intermediate_size=4 * settings.decoder_embed_dim,
            mask_ratio=settings.mask_ratio,
            norm_pix_loss=settings.norm_pix_loss,
            **attention,
        )
    )
    images = torch.randn(batch, encoder.in_chans, *encoder.image_size, device=device)
    model = model.to(device).train()
    return _plain_step(model.parameters(), lambda: model(pixel_values=images).loss, device, dtype, clip=1.0)


def lightly_mae(config: RunConfig, batch: int, device: torch.device, dtype: torch.dtype | None) -> Step:
    """lightly's masked timm ViT, decoder and mask."""
    from lightly.models import utils  # pyright: ignore[reportMissingImports]
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM  # pyright: ignore[reportMissingImports]

    settings, encoder = _mae(config), _shape(config)
    backbone = MaskedVisionTransformerTIMM(vit=_timm_vit(config)).to(device).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a new name is announced
        decoder = MAEDecoderTIMM(
            num_patches=encoder.num_patches,
            patch_size=encoder.stride[0],
            in_chans=encoder.in_chans,
            embed_dim=encoder.embed_dim,
            decoder_embed_dim=settings.decoder_embed_dim,
            decoder_depth=settings.decoder_depth,
            decoder_num_heads=settings.decoder_num_heads,
        ).to(device)
    choose_attention(nn.ModuleList([backbone, decoder]), encoder.num_patches, device, kind_of(dtype))
    images = torch.randn(batch, encoder.in_chans, *encoder.image_size, device=device)
    length = backbone.sequence_length

    def loss() -> Tensor:
        keep, masked = utils.random_token_mask((batch, length), settings.mask_ratio, device=device)
        visible = decoder.embed(backbone.encode(images, idx_keep=keep))
        tokens = utils.repeat_token(decoder.mask_token, (batch, length))
        tokens = utils.set_at_index(tokens, keep, visible.type_as(tokens))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(tokens), masked))
        target = utils.get_at_index(utils.patchify(images, encoder.stride[0]), masked - 1)
        if settings.norm_pix_loss:
            target = utils.normalize_mean_var(target)
        return nn.functional.mse_loss(predicted, target)

    return _plain_step([*backbone.parameters(), *decoder.parameters()], loss, device, dtype)


def lightly_dino(config: RunConfig, batch: int, device: torch.device, dtype: torch.dtype | None) -> Step:
    """lightly's head, loss and momentum update around a timm ViT; crops of one size go through it together.

    The teacher drops no paths.
    """
    from lightly.models.utils import update_momentum  # pyright: ignore[reportMissingImports]

    settings, encoder = config.objective, _shape(config)
    assert isinstance(settings, DINOConfig)
    head, criterion = lightly_head_and_loss(
        int(settings.num_prototypes), device, hidden_dim=settings.hidden_dim, bottleneck_dim=settings.bottleneck_dim
    )
    student, teacher = (nn.ModuleList([_timm_vit(config), head(encoder.embed_dim)]).to(device) for _ in range(2))
    teacher.load_state_dict(student.train().state_dict())
    teacher.eval().requires_grad_(False)
    choose_attention(nn.ModuleList([student, teacher]), encoder.num_patches, device, kind_of(dtype))
    local_size, local = pair(settings.local_crop_size), settings.num_local_crops
    large = torch.randn(2 * batch, encoder.in_chans, *encoder.image_size, device=device)
    small = torch.randn(local * batch, encoder.in_chans, *local_size, device=device)

    def loss() -> Tensor:
        with torch.no_grad():
            targets = teacher[1](teacher[0](large)).chunk(2)
        outputs = [*student[1](student[0](large)).chunk(2)]
        if local:
            outputs += student[1](student[0](small)).chunk(local)
        return criterion(list(targets), outputs, teacher_temp=0.04)

    step = _plain_step(student.parameters(), loss, device, dtype, clip=config.optim.clip_grad)

    def step_and_average() -> None:
        update_momentum(student, teacher, 0.996)
        step()

    return step_and_average


def lightly_head_and_loss(
    num_prototypes: int, device: torch.device | str, **widths: int
) -> tuple[Callable[[int], nn.Module], Callable[..., Tensor]]:
    """lightly's head, given its input's width, and loss."""
    from lightly.loss import DINOLoss  # pyright: ignore[reportMissingImports]
    from lightly.models.modules import DINOProjectionHead  # pyright: ignore[reportMissingImports]

    def head(embed_dim: int) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's old weight norm
            return DINOProjectionHead(embed_dim, output_dim=num_prototypes, **widths)

    return head, DINOLoss(output_dim=num_prototypes).to(device)


PEERS: dict[type, dict[str, Callable[..., Step]]] = {
    MAEConfig: {"transformers": transformers_mae, "lightly": lightly_mae},
    DINOConfig: {"lightly": lightly_dino},
}


def _plain_step(
    parameters: Any,
    loss: Callable[[], Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
    clip: float | None = None,
) -> Step:
    """A step as their examples have it."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, fused=True)

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            value = loss()
        value.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def kind_of(dtype: torch.dtype | None) -> str:
    """The precision, as settings name it."""
    return "no" if dtype is None else "bf16"


def _mae(config: RunConfig) -> MAEConfig:
    assert isinstance(config.objective, MAEConfig)
    return config.objective


def _shape(config: RunConfig) -> ViT:
    """Our encoder without weights, for its sizes."""
    with torch.device("meta"):
        encoder = config.encoder.build()
    assert isinstance(encoder, ViT)  # others are refused above
    return encoder


def _timm_vit(config: RunConfig) -> nn.Module:
    """The same timm model without anything of ours."""
    return timm.create_model(
        config.encoder.arch,
        num_classes=0,
        dynamic_img_size=True,
        img_size=config.encoder.image_size,
        in_chans=config.encoder.in_chans,
        drop_path_rate=config.encoder.drop_path_rate,
        **config.encoder.timm_overrides,
    )
