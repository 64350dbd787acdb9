"""Masked autoencoder: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (arXiv:2111.06377)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float, Int, UInt8
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from ssl_vit.core.settings import check_interval, check_ranges
from ssl_vit.data.augment.crops import OrientationConfig, random_view
from ssl_vit.data.augment.device import flip_horizontally, normalize
from ssl_vit.data.augment.masking import draw_keep, draw_predicted, num_kept
from ssl_vit.data.transform import InputSpec
from ssl_vit.models.blocks import Block, CrossBlock, run_blocks, run_in_turn
from ssl_vit.models.encoder import Encoder, Features
from ssl_vit.models.patches import patchify, sincos_positions
from ssl_vit.objectives.objective import Objective, Reconstruction, Resolved, RunSize


@dataclass(frozen=True)
class MAEConfig(OrientationConfig):
    """Settings of MAE; the defaults are the paper's for ViT-B, L and H."""

    mask_ratio: float = 0.75
    """Share of the patches to remove, between 0 and 1."""
    norm_pix_loss: bool = True
    """Predict patches normalised by their own mean and standard deviation: better features, greyer figures."""
    decoder_embed_dim: int = 512
    """Width of the decoder."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_num_heads: int = 16
    """Attention heads of a decoder block."""
    decoder: Literal["self", "cross"] = "self"
    """Tokens that decoder blocks attend to: all (the paper), or only the encoder's, which is cheaper (CrossMAE)."""
    predict_ratio: float | None = None
    """Share of all patches to predict, at most mask_ratio; null = all removed ones. Needs decoder cross."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a training crop covers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval(self, "crop_scale")
        decoder = dict.fromkeys(("decoder_embed_dim", "decoder_depth", "decoder_num_heads"), "[1, inf)")
        check_ranges(self, mask_ratio="(0, 1); the paper's is 0.75", **decoder)
        if self.decoder_depth > 1_000 or self.decoder_depth * 12 * self.decoder_embed_dim**2 > 25e9:
            raise ValueError(
                f"decoder_depth={self.decoder_depth}, decoder_embed_dim={self.decoder_embed_dim}: more than 1,000 "
                "blocks or 25 billion parameters; the paper's are 8 and 512"
            )
        if self.decoder_embed_dim % self.decoder_num_heads:
            raise ValueError(
                f"decoder_num_heads={self.decoder_num_heads}: must divide decoder_embed_dim={self.decoder_embed_dim}"
            )
        if self.decoder_embed_dim % 4:
            raise ValueError(
                f"decoder_embed_dim={self.decoder_embed_dim}: must be a multiple of 4 (sine-cosine positions)"
            )
        if self.predict_ratio is not None:
            if self.decoder == "self":
                raise ValueError(
                    f"predict_ratio={self.predict_ratio!r}: decoder='self' needs all tokens; use decoder='cross'"
                )
            if not 0 < self.predict_ratio <= self.mask_ratio:
                raise ValueError(
                    f"predict_ratio={self.predict_ratio!r}: must be above 0 and at most mask_ratio={self.mask_ratio!r}"
                )

    def resolve(self, size: RunSize) -> dict[str, Resolved]:
        """No setting of MAE depends on the data."""
        return {}

    def build(self, encoder: Encoder) -> "MAE":
        """Build the objective on an encoder, initialised as in the paper's code unless its weights are pre-trained.

        Raises:
            ValueError: the encoder cannot drop tokens, or the mask ratio leaves no patch to see or to predict.
        """
        return MAE(self, encoder)

    def build_transform(self, spec: InputSpec) -> "MAETransform":
        """Crop, flip and mask images for an encoder with this `spec`."""
        return MAETransform(self, spec)


class MAETransform:
    """One crop and one mask per image: `images [b c h w]` and `keep [b k]`.

    With `predict_ratio` also `predict [b m]`, the removed patches to predict.
    """

    def __init__(self, config: MAEConfig, spec: InputSpec) -> None:
        self.config, self.spec = config, spec

    def __call__(self, image: UInt8[Tensor, "c h w"], rng: np.random.Generator) -> dict[str, Tensor]:
        num_patches = math.prod(self.spec.grid_size)
        sample = {
            "images": random_view(image, self.spec.image_size, rng, self.config.crop_scale, self.config),
            "flip": torch.tensor(rng.random() < self.config.flip_prob),
            "keep": draw_keep(num_patches, self.config.mask_ratio, rng),
        }
        if self.config.predict_ratio is not None:
            sample["predict"] = draw_predicted(num_patches, sample["keep"], self.config.predict_ratio, rng)
        return sample

    def on_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        images = flip_horizontally(batch["images"].to(device, non_blocking=True), batch["flip"])
        indices = {name: batch[name].to(device, non_blocking=True) for name in ("keep", "predict") if name in batch}
        return {"images": normalize(images, self.spec.normalization), **indices}


class MAE(Objective):
    """Reconstruct removed patches from the visible ones with a light decoder.

    The encoder sees visible patches only; the mask token, the decoder and its positions belong to the objective.
    """

    pooled = "mean"  # no loss trains the class token
    reconstructs = True
    drops_tokens = True
    figure_file = "reconstructions.png"
    decoder_pos_embed: Tensor

    def __init__(self, config: MAEConfig, encoder: Encoder) -> None:
        super().__init__()
        if not encoder.supports_keep:
            raise ValueError(
                f"encoder.arch={encoder.config.arch!r}: MAE drops tokens before the first block, which this backbone "
                "cannot; use a Vision Transformer (vit_*, deit_*), or "
                f"{'SimMIM or ' if encoder.supports_mask else ''}DINO"
            )
        kept = num_kept(encoder.num_patches, config.mask_ratio)
        if not 0 < kept < encoder.num_patches:
            raise ValueError(
                f"mask_ratio={config.mask_ratio!r}: keeps {kept} of {encoder.num_patches} patches; "
                "at least one must be kept and one removed: change mask_ratio, image_size or patch_size"
            )
        self.config = config
        self.encoder = encoder
        width = config.decoder_embed_dim
        patch_height, patch_width = encoder.stride
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)

        if config.decoder == "self":
            self.decoder_embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        table = sincos_positions(width, encoder.grid_size, num_prefix_tokens=int(encoder.has_cls_token))
        self.register_buffer("decoder_pos_embed", table[None])
        heads = config.decoder_num_heads
        self.decoder_blocks = nn.ModuleList(
            CrossBlock(width, encoder.embed_dim, heads)
            if config.decoder == "cross"
            else Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm_layer)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = norm_layer(width)
        self.decoder_pred = nn.Linear(width, patch_height * patch_width * encoder.in_chans)
        self.patch_error = PatchError(encoder.stride, config.norm_pix_loss)
        initialize(self)

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        images, keep = batch["images"], batch["keep"]
        if self.config.decoder == "cross":
            predict = batch["predict"] if "predict" in batch else self._removed(images, keep)
            prediction = self._predict(
                self.encoder(images, keep=keep), predict, self.encoder.grid_of(*images.shape[-2:])
            )
            return {"loss": self.patch_error(prediction, images, predict).mean()}
        error = self.patch_error(self.reconstruct(images, keep), images)
        removed = torch.ones_like(error).scatter(1, keep, 0.0)
        return {"loss": (error * removed).sum() / removed.sum()}

    def reconstruct(self, images: Float[Tensor, "b c h w"], keep: Int[Tensor, "b k"]) -> Float[Tensor, "b n p"]:
        """Predict every patch from the kept ones.

        Returns:
            Patches in row-major order, pixels of a patch in (row, column, channel) order; in units of the normalised
            image, or of the patch normalised by its own mean and deviation with `norm_pix_loss`.
        """
        features, grid_size = self.encoder(images, keep=keep), self.encoder.grid_of(*images.shape[-2:])
        if self.config.decoder == "self":
            return self._decode(features, keep, grid_size)
        patches = torch.arange(grid_size[0] * grid_size[1], device=images.device)
        return self._predict(features, repeat(patches, "n -> b n", b=len(images)), grid_size)

    def compilable(self) -> list[nn.Module]:
        return [*super().compilable(), self.patch_error]

    @torch.inference_mode()
    def preview(self, images: Float[Tensor, "b c h w"], rng: np.random.Generator) -> Reconstruction:
        mask_ratio = self.config.mask_ratio
        keep = torch.stack([draw_keep(self.encoder.num_patches, mask_ratio, rng) for _ in images])
        return self.fill_in(images, keep.to(images.device))._replace(title=f"{mask_ratio:.0%} of the patches removed")

    def fill_in(self, images: Float[Tensor, "b c h w"], keep: Int[Tensor, "b k"]) -> Reconstruction:
        """`reconstruct`, with the facts that its figure needs."""
        patches = self.reconstruct(images, keep)
        visible = torch.zeros(patches.shape[:2], dtype=torch.bool, device=keep.device).scatter(1, keep, True)
        return Reconstruction(patches, visible, self.encoder.stride, self.config.norm_pix_loss)

    def _decode(
        self, features: Features, keep: Int[Tensor, "b k"], grid_size: tuple[int, int]
    ) -> Float[Tensor, "b n p"]:
        visible = self.decoder_embed(features.patches)
        num_patches = grid_size[0] * grid_size[1]
        tokens = repeat(self.mask_token.to(visible.dtype), "1 1 d -> b n d", b=len(keep), n=num_patches)
        tokens = tokens.scatter(1, repeat(keep, "b k -> b k d", d=visible.shape[-1]), visible)
        if self.encoder.has_cls_token:
            tokens = torch.cat([self.decoder_embed(features.cls)[:, None], tokens], dim=1)
        tokens = tokens + self._positions(grid_size)
        tokens = run_blocks(self.decoder_blocks, tokens, self.encoder.grad_checkpointing)
        tokens = tokens[:, tokens.shape[1] - num_patches :]
        return self.decoder_pred(self.decoder_norm(tokens))

    def _predict(
        self, features: Features, patches: Int[Tensor, "b m"], grid_size: tuple[int, int]
    ) -> Float[Tensor, "b m p"]:
        """Predict each of the given patches from the encoder's last tokens only.

        This is CrossMAE (Fu et al., 2024, arXiv:2401.14391) without inter-block attention, which gives each decoder
        block its own mixture of the encoder's layers.
        """
        memory = features.patches
        if self.encoder.has_cls_token:
            memory = torch.cat([features.cls[:, None], memory], dim=1)
        positions = self._positions(grid_size)[0, int(self.encoder.has_cls_token) :]
        queries = self.mask_token + positions[patches]
        checkpointed = self.encoder.grad_checkpointing and torch.is_grad_enabled()
        queries = run_in_turn(self.decoder_blocks, queries, {"memory": memory}, checkpointed)
        return self.decoder_pred(self.decoder_norm(queries))

    def _removed(self, images: Float[Tensor, "b c h w"], keep: Int[Tensor, "b k"]) -> Int[Tensor, "b r"]:
        """Indices of the removed patches in ascending order; no shape depends on the values in `keep`."""
        rows, columns = self.encoder.grid_of(*images.shape[-2:])
        is_kept = torch.zeros(len(keep), rows * columns, device=keep.device).scatter(1, keep, 1.0)
        return is_kept.argsort(dim=1, stable=True)[:, : rows * columns - keep.shape[1]]

    def _positions(self, grid_size: tuple[int, int]) -> Float[Tensor, "1 n d"]:
        return resample_abs_pos_embed(
            self.decoder_pos_embed,
            new_size=list(grid_size),
            old_size=list(self.encoder.grid_size),
            num_prefix_tokens=int(self.encoder.has_cls_token),
        )


class PatchError(nn.Module):
    """Mean squared error of each predicted patch over its pixels, in fp32."""

    def __init__(self, patch_size: tuple[int, int], norm_pix_loss: bool) -> None:
        super().__init__()
        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss

    def forward(
        self,
        prediction: Float[Tensor, "b m p"],
        images: Float[Tensor, "b c h w"],
        patches: Int[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b m"]:
        """Errors [b m] of predicted patches.

        Args:
            patches: indices of the predicted patches; None = all, row-major.
        """
        target = patchify(images, self.patch_size)
        if self.norm_pix_loss:
            target = normalize_patches(target)
        if patches is not None:
            target = target.gather(1, repeat(patches, "b m -> b m p", p=target.shape[-1]))
        return (prediction.float() - target.float()).square().mean(dim=-1)


def initialize(objective: MAE) -> None:
    """Initialise as the paper's code does.

    Linear layers and the patch projection (as a matrix): Xavier uniform with zero bias. Class and mask token: normal
    with standard deviation .02. Norms: 1 and 0. Fixed position tables and pre-trained encoders are left as they are.
    """
    kept = set(objective.encoder.modules()) if objective.encoder.is_pretrained else set()
    for module in objective.modules():
        if module in kept:
            continue
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.data.flatten(1))
    nn.init.normal_(objective.mask_token, std=0.02)
    for name, parameter in objective.encoder.named_parameters():
        if name.endswith("cls_token") and not kept:
            nn.init.normal_(parameter, std=0.02)


def normalize_patches(patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b n p"]:
    """Give each patch zero mean and unit (unbiased) variance over its pixels and channels."""
    variance, mean = torch.var_mean(patches.float(), dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()
