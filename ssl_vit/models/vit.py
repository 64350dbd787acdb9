"""Vision Transformers of timm as encoders: plain, distilled (DeiT), and behind a CNN (hybrids)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import timm
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from timm.layers.attention import Attention, AttentionRope
from timm.layers.drop import DropPath
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.data.transform import pair
from ssl_vit.models.blocks import make_packable, run_blocks, run_packed_blocks
from ssl_vit.models.encoder import Encoder, Features, given_mask_token
from ssl_vit.models.patches import sincos_positions

if TYPE_CHECKING:
    from ssl_vit.models.config import EncoderConfig


class ViT(Encoder):
    """A timm Vision Transformer behind the encoder contract; `vit` is the timm model, with timm's key names."""

    title = "Vision Transformer"
    model_name = "vit"
    has_plain_blocks = True
    supports_keep = True
    supports_mask = True
    vit: Any

    def __init__(self, model: nn.Module, config: "EncoderConfig", arguments: dict[str, Any]) -> None:
        super().__init__(model, config, arguments)
        self.embed_dim = self.mask_dim = self.vit.embed_dim
        self.stride = self._stride()
        self.has_cls_token = self.vit.cls_token is not None
        self.num_layers = self.num_last_layers = len(self.vit.blocks)
        self.has_attention_maps = self.num_layers > 0 and _shows_attention(self.vit.blocks[-1])
        self._packs = make_packable(self.vit.blocks)
        self.grid_of(*self.image_size)
        if config.pos_embed == "sincos":
            self._fix_positions()
        if config.drop_path_schedule == "uniform" and config.drop_path_rate:
            self._drop_paths_alike(config.drop_path_rate)

    @classmethod
    def arguments(cls, config: "EncoderConfig") -> dict[str, Any]:
        # No pooling: the final norm is applied to every token, whatever the architecture's head does. The distilled
        # architectures refuse to be without theirs.
        pooling = "token" if "_distilled" in config.arch else ""
        sizes = {"img_size": list(pair(config.image_size)), "dynamic_img_size": True}
        return {"global_pool": pooling, **cls.norm_arguments(pooled=False), **sizes}

    @staticmethod
    def norm_arguments(*, pooled: bool) -> dict[str, Any]:
        """timm's arguments for a final norm of what is pooled, or of every token."""
        return {"fc_norm": pooled}

    @property
    def is_distilled(self) -> bool:
        """Whether a distillation token follows the class token (DeiT, arXiv:2012.12877)."""
        return getattr(self.vit, "dist_token", None) is not None

    def _stride(self) -> tuple[int, int]:
        if not isinstance(self.vit.patch_embed, PatchEmbed):
            raise ValueError(f"arch={self.config.arch!r}: has no plain patches; use vit_base_patch16_224")
        height, width = self.vit.patch_embed.patch_size
        return int(height), int(width)

    def _fix_positions(self) -> None:
        positions = self.vit.pos_embed
        if positions is None:
            raise ValueError(f"pos_embed='sincos': {self.config.arch} has no position table; use pos_embed='learned'")
        table = sincos_positions(self.embed_dim, self.grid_size, positions.shape[1] - self.num_patches)
        positions.data.copy_(table)
        positions.requires_grad_(False)

    def _drop_paths_alike(self, rate: float) -> None:
        for block in self.vit.blocks:
            if not hasattr(block, "drop_path1"):
                raise ValueError(f"drop_path_schedule='uniform': {self.config.arch} has no plain blocks; use 'linear'")
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)

    def timm_arguments(self, pooled: str, *, norm_pooled: bool = False) -> tuple[dict[str, Any], str]:
        if self.is_distilled:  # these architectures have no other pooling
            return self.model_args, self.model_args["global_pool"]
        pooling = "token" if self.has_cls_token and pooled == "cls" else "avg"
        norms = self.norm_arguments(pooled=True) if norm_pooled else {}
        return {**self.model_args, "global_pool": pooling, **norms}, pooling

    def remove_norm(self) -> nn.Module | None:
        if self.is_distilled:
            return None
        norm, self.vit.norm = self.vit.norm, nn.Identity()
        return norm

    def head_inputs(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b d"]]:
        if not self.is_distilled:
            return super().head_inputs(images)
        tokens = self.vit.norm(run_blocks(self.vit.blocks, self._embed(images), self.grad_checkpointing))
        return [tokens[:, number] for number in range(self.vit.num_prefix_tokens)]

    def layer_of(self, name: str) -> int:
        name = name.removeprefix("vit.")
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        embeds = ("patch_embed.", "pos_embed", "cls_token", "reg_token", "dist_token", "rope.", "norm_pre.")
        return 0 if name.startswith(embeds) else self.num_layers + 1

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        keep: Int[Tensor, "b k"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        mask_token: Float[Tensor, " d"] | None = None,
    ) -> Features:
        tokens = self._embed(images, keep, mask, mask_token)
        return self._features(run_blocks(self.vit.blocks, tokens, self.grad_checkpointing))

    def forward_groups(
        self,
        groups: Sequence[Float[Tensor, "_ c _ _"]],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        mask_token: Float[Tensor, " d"] | None = None,
        cls_only: bool = False,
    ) -> list[Features]:
        cls_only = cls_only and self._packs and self.has_cls_token
        if not self._packs or (len(groups) == 1 and not cls_only):
            return super().forward_groups(groups, mask=mask, mask_token=mask_token)
        tokens = [
            self._embed(images, None, mask if number == 0 else None, mask_token) for number, images in enumerate(groups)
        ]
        found = run_packed_blocks(self.vit.blocks, tokens, self.grad_checkpointing, cls_only=cls_only)
        return [self._features(part[:, :1] if cls_only else part) for part in found]

    def last_layers(self, images: Float[Tensor, "b c h w"], num_layers: int) -> list[Features]:
        self._check_num_layers(num_layers)
        return self._last_of(self._embed(images), num_layers, [{}] * self.num_layers)

    def _last_of(
        self, tokens: Float[Tensor, "b t d"], num_layers: int, given: Sequence[dict[str, Any]]
    ) -> list[Features]:
        """Features of the last blocks; `given` are each block's further arguments."""
        found = []
        for number, (block, arguments) in enumerate(zip(self.vit.blocks, given, strict=True), start=1):
            tokens = block(tokens, **arguments)
            if number > self.num_layers - num_layers:
                found.append(self._features(tokens))
        return found

    def _embed(
        self,
        images: Float[Tensor, "b c h w"],
        keep: Int[Tensor, "b k"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        mask_token: Float[Tensor, " d"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Class and register tokens, then patch tokens with positions; with `keep` only the kept patches."""
        rows, columns = self.grid_of(*images.shape[-2:])
        tokens = self._project(images, keep)
        if mask is not None:
            tokens = torch.where(mask[..., None], given_mask_token(mask_token, tokens), tokens)
        prefix, positions = self._positions(rows, columns, tokens).split(
            [self.vit.num_prefix_tokens, rows * columns], dim=1
        )
        tokens = tokens + (positions if keep is None else positions[0][keep])
        return self.vit.norm_pre(torch.cat([prefix.expand(len(images), -1, -1), tokens], dim=1))

    def _project(
        self, images: Float[Tensor, "b c h w"], keep: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Projected patches; with `keep` only the kept ones."""
        (height, width), embed = self.stride, self.vit.patch_embed
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=height, q=width)
        if keep is not None:
            patches = patches.gather(1, repeat(keep, "b k -> b k p", p=patches.shape[-1]))
        # Patch projection as a matmul; cuDNN's convolution is several times slower.
        return embed.norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))

    def _positions(self, rows: int, columns: int, like: Tensor) -> Float[Tensor, "1 t d"]:
        """Prefix tokens, then position embeddings: what timm's `_pos_embed` makes of zeros."""
        # A batch of two, so that prefix gradients are materialised sums; DDP warns about views.
        return self.vit._pos_embed(like.new_zeros(2, rows, columns, self.embed_dim))[:1]

    def _features(self, tokens: Float[Tensor, "b t d"]) -> Features:
        """Apply the final norm to the last block's tokens and split them into class and patch tokens."""
        tokens = self.vit.norm(tokens)
        patches = tokens[:, self.vit.num_prefix_tokens :]
        return Features(cls=tokens[:, 0] if self.has_cls_token else patches.mean(dim=1), patches=patches)


class HybridViT(ViT):
    """A Vision Transformer on the outputs of a CNN.

    The CNN's outputs hold pixels of neighbouring tokens, so that removed or masked ones would leak: it supports neither
    `keep` nor `mask`.
    """

    title = "Vision Transformer behind a CNN"
    supports_keep = False
    supports_mask = False
    other_settings = ("patch_size",)

    def __init__(self, model: nn.Module, config: "EncoderConfig", arguments: dict[str, Any]) -> None:
        if config.patch_size is not None:
            raise ValueError(
                f"patch_size={config.patch_size!r}: {config.arch} has a CNN for a stem; model_args={{patch_size: ...}} "
                "sets the patch of its outputs"
            )
        super().__init__(model, config, arguments)
        if config.grad_checkpointing:
            self.vit.patch_embed.set_grad_checkpointing(True)

    def _stride(self) -> tuple[int, int]:
        # At the architecture's own size: at others timm rounds, and takes 25 for 32 pixels at a size of 100.
        arguments = {name: value for name, value in self.model_args.items() if name != "img_size"}
        with torch.device("meta"):
            own: Any = timm.create_model(self.config.arch.split(".")[0], num_classes=0, **arguments)
        return own.patch_embed.feat_ratio(as_scalar=False)

    def _project(
        self, images: Float[Tensor, "b c h w"], keep: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b n d"]:
        if keep is not None:
            raise ValueError(f"keep: the CNN of {self.config.arch} has seen all pixels; tokens cannot be dropped")
        return self.vit.patch_embed(images).flatten(1, 2)


def _shows_attention(block: nn.Module) -> bool:
    """Whether what a block attends to is softmax(QK / sqrt(d)), with keys of their own for each head."""
    attn: Any = getattr(block, "attn", None)
    plain = isinstance(attn, Attention | AttentionRope | EvaAttention)
    return plain and getattr(attn, "num_kv_heads", None) in (None, attn.num_heads)


def choose_attention(model: nn.Module, length: int, device: torch.device, precision: str) -> None:
    """Turn timm's fused attention off where it is slower.

    Args:
        length: tokens that attend to each other, `Encoder.attention_length`.
    """
    if not fuses_attention(length, device, precision):
        set_fused_attention(model, False)


def fuses_attention(length: int, device: torch.device, precision: str) -> bool:
    """Whether fused attention is faster: always, except on CPUs in bf16 up to about 256 tokens.

    There its backward pass takes up to three times as long as that of plain attention.
    """
    return not (device.type == "cpu" and precision == "bf16" and length <= 256)


def set_fused_attention(model: nn.Module, fused: bool) -> None:
    """Turn fused attention in timm's blocks on or off."""
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
