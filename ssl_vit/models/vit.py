"""Every plain Vision Transformer of timm as an encoder."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from timm.layers.drop import DropPath
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.core.reading import settings_of
from ssl_vit.core.settings import check_ranges
from ssl_vit.data.transform import check_divisible, pair
from ssl_vit.models.blocks import make_packable, run_blocks, run_packed_blocks
from ssl_vit.models.encoder import Encoder, Features
from ssl_vit.models.patches import sincos_positions

# No plain ViT exceeds these (the largest published has 22 billion parameters); a file that asks for more is a mistake,
# or meant to take the machine's memory.
_ALLOWED = {
    "image_size": "[1, 65536] pixels",
    "patch_size": "[1, 4096] pixels",
    "in_chans": "[1, 4096]",
    "embed_dim": "[1, 65536]",
    "depth": "[0, 1000]",
    "num_heads": "[1, 4096]",
    "mlp_ratio": "(0, 1000]",
    "layer_scale": "(0, inf)",
    "drop_path_rate": "[0, 1)",
}
_MOST_PARAMETERS = 25e9
_WIDEST, _SMALLEST_PATCH = 1_664, 8  # of timm's, for what is left to the architecture


@dataclass(frozen=True)
class ViTConfig:
    """Which Vision Transformer to build. Settings left at `null` are those of the architecture."""

    arch: str = "vit_base_patch16_224"
    """Name of any timm Vision Transformer: `timm.list_models("vit_*")`."""
    image_size: int | tuple[int, int] = 224
    """Training size in pixels: one number, or [height, width]. The patch size must divide it."""
    patch_size: int | tuple[int, int] | None = None
    """Size of a patch in pixels: one number, or [height, width]."""
    in_chans: int = 3
    """Channels of the images."""
    drop_path_rate: float = 0.0
    """Stochastic depth: the rate of the last block."""
    drop_path_schedule: Literal["linear", "uniform"] = "linear"
    """Rate of the other blocks: growing linearly from 0 at the first, or the same in all (DINOv2)."""
    pos_embed: Literal["learned", "sincos"] = "learned"
    """Position table: learned, or the fixed 2-D sine-cosine table of MAE."""
    embed_dim: int | None = None
    """Width of the tokens."""
    depth: int | None = None
    """Number of blocks. With 0 the encoder only projects patches: a baseline to compare encoders with."""
    num_heads: int | None = None
    """Attention heads of a block."""
    mlp_ratio: float | None = None
    """Width of the MLP's hidden layer over the width of the tokens."""
    layer_scale: float | None = None
    """Initial factor of each residual branch (LayerScale); DINOv2's is 1e-5."""
    grad_checkpointing: bool = False
    """Recompute blocks (also MAE's decoder's) in the backward pass: less memory for a third more time."""
    pretrained: str | None = None
    """Weights to start from: folder of a run or an export, .safetensors or official .pth file, or a timm model's name.
    Encoder settings that are not given are those of these weights."""

    def __post_init__(self) -> None:
        check_ranges(self, **_ALLOWED)
        if (number := self._most_parameters()) > _MOST_PARAMETERS:
            raise ValueError(
                f"embed_dim={self.embed_dim}, depth={self.depth}, image_size={self.image_size}: would be up to "
                f"{number / 1e9:,.0f} billion parameters, and {_MOST_PARAMETERS / 1e9:.0f} billion are the most"
            )

    def _most_parameters(self) -> float:
        """Rough upper bound of the number of parameters, computed before anything is built."""
        width = _WIDEST if self.embed_dim is None else self.embed_dim
        patch = (_SMALLEST_PATCH,) * 2 if self.patch_size is None else pair(self.patch_size)
        height, across = pair(self.image_size)
        tokens = height * across / (patch[0] * patch[1])
        blocks = (self.depth or 0) * (4 + 2 * (4.0 if self.mlp_ratio is None else self.mlp_ratio)) * width**2
        return blocks + width * (tokens + self.in_chans * patch[0] * patch[1])

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "ViTConfig":
        """The config from plain YAML or JSON values, in which tuples are lists.

        Raises:
            ValueError: a setting that this version does not know, or a value of another type.
        """
        return settings_of(cls, values)

    @property
    def timm_overrides(self) -> dict[str, Any]:
        """Arguments of `timm.create_model` for those settings that differ from the architecture's own."""
        names = {"layer_scale": "init_values"}
        settings = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "layer_scale")
        return {names.get(name, name): getattr(self, name) for name in settings if getattr(self, name) is not None}

    def build(self) -> "ViT":
        """Build the encoder with fresh weights.

        Raises:
            ValueError: timm does not have the architecture, it is not a plain ViT, or sizes do not fit.
        """
        _check_widths(self)
        vit = _create(self.arch, pair(self.image_size), self.in_chans, self.drop_path_rate, self.timm_overrides)
        if self.drop_path_schedule == "uniform" and self.drop_path_rate:
            for block in vit.blocks:
                if not hasattr(block, "drop_path1"):
                    raise ValueError(f"drop_path_schedule='uniform': {self.arch} has no plain blocks; use 'linear'")
                block.drop_path1, block.drop_path2 = DropPath(self.drop_path_rate), DropPath(self.drop_path_rate)
        return ViT(vit, config=self)


class ViT(Encoder):
    """A timm `VisionTransformer` behind the encoder contract; `vit` is the timm model, with timm's key names."""

    supports_keep = True
    supports_mask = True

    def __init__(self, vit: VisionTransformer, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = vit
        self.embed_dim = vit.embed_dim
        self.in_chans = config.in_chans
        self.image_size = pair(config.image_size)
        self.patch_size = vit.patch_embed.patch_size
        self.has_cls_token = vit.has_class_token
        self.grad_checkpointing = config.grad_checkpointing
        self.num_layers = len(vit.blocks)
        self._packs = make_packable(vit.blocks)
        self._check_size(*self.image_size)
        if config.pos_embed == "sincos":
            self._fix_positions()

    def _fix_positions(self) -> None:
        positions = self.vit.pos_embed
        if positions is None:
            raise ValueError(f"pos_embed='sincos': {self.config.arch} has no position table; use pos_embed='learned'")
        table = sincos_positions(self.embed_dim, self.grid_size, positions.shape[1] - self.num_patches)
        positions.data.copy_(table)
        positions.requires_grad_(False)

    def _check_size(self, height: int, width: int) -> None:
        check_divisible(f"image_size={(height, width)}", (height, width), self.patch_size)

    def remove_norm(self) -> None:
        self.vit.norm = nn.Identity()

    def layer_of(self, name: str) -> int:
        name = name.removeprefix("vit.")
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        embeds = name.startswith(("patch_embed.", "pos_embed", "cls_token", "reg_token", "norm_pre."))
        return 0 if embeds else self.num_layers + 1

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        keep: Int[Tensor, "b k"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        mask_token: Float[Tensor, " d"] | None = None,
    ) -> Features:
        tokens = self.vit.norm_pre(self._embed(images, keep, mask, mask_token))
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
            self.vit.norm_pre(self._embed(images, None, mask if number == 0 else None, mask_token))
            for number, images in enumerate(groups)
        ]
        found = run_packed_blocks(self.vit.blocks, tokens, self.grad_checkpointing, cls_only=cls_only)
        return [self._features(part[:, :1] if cls_only else part) for part in found]

    def _embed(
        self,
        images: Float[Tensor, "b c h w"],
        keep: Int[Tensor, "b k"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        mask_token: Float[Tensor, " d"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Class and register tokens, then patch tokens with positions; with `keep` only the kept patches."""
        self._check_size(*images.shape[-2:])
        (height, width), embed = self.patch_size, self.vit.patch_embed
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=height, q=width)
        if keep is not None:
            patches = patches.gather(1, repeat(keep, "b k -> b k p", p=patches.shape[-1]))
        # Patch projection as a matmul; cuDNN's convolution is several times slower.
        tokens = embed.norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))
        if mask is not None:
            if mask_token is None:
                raise ValueError("mask is given without mask_token, the embedding to put in its place")
            tokens = torch.where(mask[..., None], mask_token.to(tokens.dtype), tokens)
        # Run timm's `_pos_embed` on zeros to get position embeddings and prefix tokens.
        rows, columns = images.shape[-2] // height, images.shape[-1] // width
        # A batch of two, so that prefix gradients are materialised sums; DDP warns about views.
        added = self.vit._pos_embed(tokens.new_zeros(2, rows, columns, self.embed_dim))[:1]
        prefix, positions = added.split([added.shape[1] - rows * columns, rows * columns], dim=1)
        tokens = tokens + (positions if keep is None else positions[0][keep])
        return torch.cat([prefix.expand(len(images), -1, -1), tokens], dim=1)

    def last_layers(self, images: Float[Tensor, "b c h w"], num_layers: int) -> list[Features]:
        if not 1 <= num_layers <= self.num_layers:
            raise ValueError(f"num_layers={num_layers}: {self.config.arch} has blocks 1 to {self.num_layers}")
        vit = self.vit
        tokens = vit.norm_pre(self._embed(images))
        found = []
        for number, block in enumerate(vit.blocks, start=1):
            tokens = block(tokens)
            if number > self.num_layers - num_layers:
                found.append(self._features(tokens))
        return found

    def _features(self, tokens: Float[Tensor, "b t d"]) -> Features:
        """Apply the final norm to the last block's tokens and split them into class and patch tokens."""
        tokens = self.vit.norm(tokens)
        patches = tokens[:, self.vit.num_prefix_tokens :]
        return Features(cls=tokens[:, 0] if self.has_cls_token else patches.mean(dim=1), patches=patches)


def choose_attention(model: nn.Module, num_patches: int, device: torch.device, precision: str) -> None:
    """Turn timm's fused attention off where it is slower."""
    if not fuses_attention(num_patches, device, precision):
        set_fused_attention(model, False)


def fuses_attention(num_patches: int, device: torch.device, precision: str) -> bool:
    """Whether fused attention is faster: always, except on CPUs in bf16 up to about 256 patches.

    There its backward pass takes up to three times as long as that of plain attention.
    """
    return not (device.type == "cpu" and precision == "bf16" and num_patches <= 256)


def set_fused_attention(model: nn.Module, fused: bool) -> None:
    """Turn fused attention in timm's blocks on or off."""
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def _check_widths(config: ViTConfig) -> None:
    if config.embed_dim is not None and config.num_heads is not None and config.embed_dim % config.num_heads:
        raise ValueError(f"embed_dim={config.embed_dim}: must be a multiple of num_heads={config.num_heads}")


def _create(
    arch: str, image_size: tuple[int, int], in_chans: int, drop_path_rate: float, overrides: dict[str, Any]
) -> VisionTransformer:
    name = arch.split(".")[0]
    if not timm.is_model(name):
        plain_vits = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
        near = difflib.get_close_matches(name, plain_vits, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else 'timm.list_models("vit_*") lists them'
        raise ValueError(f"arch={arch!r}: timm {timm.__version__} has no model of that name; {hint}")
    entrypoint_module = timm.models.model_entrypoint(name).__module__
    plain = ValueError(
        f"arch={arch!r}: not a plain Vision Transformer (it comes from {entrypoint_module}); "
        'choose one of timm.list_models("vit_*") or timm.list_models("deit_*")'
    )
    if entrypoint_module not in ("timm.models.vision_transformer", "timm.models.deit"):
        raise plain
    try:
        # No pooling and no fc_norm: the final norm is applied to every token, whatever the architecture's head does.
        vit = timm.create_model(
            name,
            num_classes=0,
            global_pool="",
            fc_norm=False,
            img_size=image_size,
            dynamic_img_size=True,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            **overrides,
        )
    except (AssertionError, ValueError) as error:  # timm's own checks, e.g. that the heads divide the width
        given = "".join(f", {key}={value!r}" for key, value in overrides.items())
        raise ValueError(f"arch={arch!r}{given}: timm cannot build it: {error}") from error
    if not isinstance(vit, VisionTransformer) or not isinstance(vit.patch_embed, PatchEmbed):
        raise plain
    return vit
