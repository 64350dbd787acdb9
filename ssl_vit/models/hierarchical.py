"""Hierarchical backbones, whose grid shrinks from stage to stage: timm's Swin, Swin V2, ConvNeXt and ConvNeXt V2."""

import math
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from timm.models import group_parameters
from timm.models.convnext import ConvNeXtBlock as TimmConvNeXtBlock
from torch import Tensor, nn

from ssl_vit.data.transform import pair
from ssl_vit.models.blocks import run_in_turn
from ssl_vit.models.encoder import Encoder, Features, given_mask_token

if TYPE_CHECKING:
    from ssl_vit.models.config import EncoderConfig


class Hierarchical(Encoder):
    """A timm model of a stem and stages behind the encoder contract.

    Tokens come from the last stage, whose blocks alone share width and grid. Convolutions and windows need the whole
    grid, so no token can be dropped. Masks are drawn for output tokens and enlarged to the stem's grid.
    """

    model_name = "net"
    has_cls_token = False
    supports_keep = False
    other_settings = (
        *("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "layer_scale", "pos_embed"),
        "drop_path_schedule",
    )
    net: Any

    def __init__(self, model: nn.Module, config: "EncoderConfig", arguments: dict[str, Any]) -> None:
        super().__init__(model, config, arguments)
        self.embed_dim = self.net.num_features
        self.stride = (self.net.feature_info[-1]["reduction"],) * 2
        self.num_last_layers = len(self._stages()[-1].blocks)
        self._layers = self._number_layers()
        self.num_layers = max(self._layers.values()) - 1
        if config.grad_checkpointing:
            self.net.set_grad_checkpointing(True)
        if config.drop_path_schedule == "uniform" and config.drop_path_rate:
            raise ValueError(f"drop_path_schedule='uniform': {config.arch} has no plain blocks; use 'linear'")
        self.grid_of(*self.image_size)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        keep: Int[Tensor, "b k"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        mask_token: Float[Tensor, " d"] | None = None,
    ) -> Features:
        if keep is not None:
            raise ValueError(f"keep: {self.config.arch} needs the whole grid and cannot drop tokens")
        maps = self._stem(images, mask, mask_token)
        for stage in self._stages():
            maps = stage(maps)
        return self._features(maps)

    def last_layers(self, images: Float[Tensor, "b c h w"], num_layers: int) -> list[Features]:
        self._check_num_layers(num_layers)
        maps = self._stem(images)
        *stages, last = self._stages()
        for stage in stages:
            maps = stage(maps)
        maps, found = last.downsample(maps), []
        for number, block in enumerate(last.blocks, start=1):
            maps = block(maps)
            if number > self.num_last_layers - num_layers:
                found.append(self._features(maps))
        return found

    def layer_of(self, name: str) -> int:
        return self._layers[name]

    def _number_layers(self) -> dict[str, int]:
        """timm's groups for layer decay, numbered from 0 without gaps, and the final norm after them."""
        groups: Any = group_parameters(self.net, self.net.group_matcher(), reverse=True)
        last = {name for name in groups if name.startswith(("norm", "head"))}
        order = {group: number for number, group in enumerate(sorted({groups[name] for name in groups.keys() - last}))}
        return {f"net.{name}": len(order) if name in last else order[group] for name, group in groups.items()}

    def _enlarge(
        self, mask: Bool[Tensor, "b n"], images: Tensor, grid: tuple[int, int]
    ) -> Bool[Tensor, "b rows columns"]:
        """A mask of output tokens on the stem's grid."""
        rows, columns = self.grid_of(*images.shape[-2:])
        coarse = rearrange(mask, "b (h w) -> b h w", h=rows)
        return repeat(coarse, "b h w -> b (h p) (w q)", p=grid[0] // rows, q=grid[1] // columns)

    def _stages(self) -> Any:
        raise NotImplementedError

    def _stem(
        self,
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"] | None = None,
        mask_token: Float[Tensor, " d"] | None = None,
    ) -> Tensor:
        """The stem's outputs in the layout of the stages, masked."""
        raise NotImplementedError

    def _features(self, maps: Tensor) -> Features:
        raise NotImplementedError


class Swin(Hierarchical):
    """timm's Swin Transformer (arXiv:2103.14030) and Swin V2 (arXiv:2111.09883).

    Windows and shifts are those of `image_size`, the size it is built for, at every size of images: a stage whose grid
    is at most the window has one window and no shift.
    """

    title = "Swin Transformer"
    example = "{depths: [2, 2, 6, 2], embed_dim: 48, num_heads: [2, 4, 8, 16], window_size: 4}"
    supports_mask = True

    def __init__(self, model: nn.Module, config: "EncoderConfig", arguments: dict[str, Any]) -> None:
        super().__init__(model, config, arguments)
        self.mask_dim = self.net.embed_dim

    @property
    def attention_length(self) -> int:
        return max((math.prod(block.window_size) for stage in self.net.layers for block in stage.blocks), default=1)

    @classmethod
    def arguments(cls, config: "EncoderConfig") -> dict[str, Any]:
        return {"img_size": list(pair(config.image_size)), "strict_img_size": False}

    def _stages(self) -> Any:
        return self.net.layers

    def _stem(
        self,
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"] | None = None,
        mask_token: Float[Tensor, " d"] | None = None,
    ) -> Float[Tensor, "b rows columns d"]:
        self.grid_of(*images.shape[-2:])
        tokens = self.net.patch_embed(images)
        if mask is None:
            return tokens
        where = self._enlarge(mask, images, tokens.shape[1:3])
        return torch.where(where[..., None], given_mask_token(mask_token, tokens), tokens)

    def _features(self, maps: Float[Tensor, "b rows columns d"]) -> Features:
        patches = rearrange(self.net.norm(maps), "b h w d -> b (h w) d")
        return Features(cls=patches.mean(dim=1), patches=patches)


class ConvNeXt(Hierarchical):
    """timm's ConvNeXt (arXiv:2201.03545) and ConvNeXt V2 (arXiv:2301.00808).

    `cls` is what its classifier reads, the norm of the mean; `patches` are the sites, each through the same norm.
    """

    title = "ConvNeXt"
    example = "{depths: [2, 2, 6, 2], dims: [40, 80, 160, 320]}"

    def __init__(self, model: nn.Module, config: "EncoderConfig", arguments: dict[str, Any]) -> None:
        super().__init__(model, config, arguments)
        *convolutions, _ = self.net.stem
        self.mask_dim = convolutions[-1].out_channels
        # Other stems overlap: their convolutions mix pixels of masked and of visible tokens.
        self.supports_mask = len(convolutions) == 1 and convolutions[0].kernel_size == convolutions[0].stride
        blocks = [block for stage in self._stages() for block in stage.blocks]
        self.supports_visible = self.supports_mask and all(type(block) is TimmConvNeXtBlock for block in blocks)
        for block in blocks if self.supports_visible else ():
            block.__class__ = ConvNeXtBlock

    def forward_visible(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b d rows columns"]:
        """Sparse convolutions by dense ones: removed sites are set to 0 before and after everything that looks around.

        At visible sites this gives what submanifold sparse convolutions give, whose kernels skip absent neighbours.
        """
        self.grid_of(*images.shape[-2:])
        maps = self.net.stem(images)
        checkpointed = self.grad_checkpointing and torch.is_grad_enabled()
        for stage in self.net.stages:
            parts = stage.downsample if isinstance(stage.downsample, nn.Sequential) else ()  # norm and convolution
            for part in parts:
                maps = part(maps * self._visible(mask, images, maps))
            visible = self._visible(mask, images, maps)
            maps = run_in_turn(stage.blocks, maps * visible, {"visible": visible}, checkpointed)
        return maps

    def _visible(self, mask: Bool[Tensor, "b n"], images: Tensor, maps: Tensor) -> Float[Tensor, "b 1 rows columns"]:
        return (~self._enlarge(mask, images, (maps.shape[2], maps.shape[3])))[:, None].to(maps.dtype)

    @classmethod
    def arguments(cls, config: "EncoderConfig") -> dict[str, Any]:
        for name in ("depths", "dims"):
            given = config.model_args.get(name)
            if isinstance(given, list) and len(given) != 4:
                raise ValueError(
                    f"model_args={{{name!r}: {given!r}}}: {config.arch} has four stages, not {len(given)}, such as "
                    f"{cls.example}"
                )
        return {"head_hidden_size": None}  # a hidden layer behind the pooling belongs to a classifier

    @property
    def cls_in_words(self) -> str:
        return "the norm of the mean of the last map"

    def _stages(self) -> Any:
        return self.net.stages

    def _stem(
        self,
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"] | None = None,
        mask_token: Float[Tensor, " d"] | None = None,
    ) -> Float[Tensor, "b d rows columns"]:
        self.grid_of(*images.shape[-2:])
        maps = self.net.stem(images)
        if mask is None:
            return maps
        if not self.supports_mask:
            raise ValueError(f"mask: the stem of {self.config.arch} overlaps; use convnext_tiny or convnextv2_tiny")
        where = self._enlarge(mask, images, maps.shape[2:])
        return torch.where(where[:, None], given_mask_token(mask_token, maps)[:, None, None], maps)

    def _features(self, maps: Float[Tensor, "b d rows columns"]) -> Features:
        maps = self.net.norm_pre(maps)
        norm = getattr(self.net.head, "norm", nn.Identity())
        cls = norm(maps.mean(dim=(2, 3), keepdim=True)).flatten(1)
        return Features(cls=cls, patches=rearrange(norm(maps), "b d h w -> b (h w) d"))


class ConvNeXtBlock(TimmConvNeXtBlock):
    """timm's block, under the same class name, that can also compute from visible sites alone."""

    def forward(
        self, x: Float[Tensor, "b d rows columns"], visible: Float[Tensor, "b 1 rows columns"] | None = None
    ) -> Float[Tensor, "b d rows columns"]:
        """With `visible`, 1 where a site is visible: x is 0 at all other sites, and so is the result."""
        if visible is None:
            return super().forward(x)
        branch = self.conv_dw(x) * visible
        if self.use_conv_mlp:
            branch = _mlp(self.mlp, self.norm(branch), visible)
        else:
            last = rearrange(branch, "b d rows columns -> b rows columns d")
            last = _mlp(self.mlp, self.norm(last), rearrange(visible, "b one rows columns -> b rows columns one"))
            branch = rearrange(last, "b rows columns d -> b d rows columns")
        if self.gamma is not None:
            branch = branch * self.gamma[:, None, None]
        return (self.drop_path(branch) + self.shortcut(x)) * visible


def _mlp(mlp: Any, x: Tensor, visible: Tensor) -> Tensor:
    """timm's MLP; sites that are not visible are left out of the sums of Global Response Normalisation."""
    if not hasattr(mlp, "grn"):
        return mlp(x)
    hidden = mlp.drop1(mlp.act(mlp.fc1(x)))
    return mlp.drop2(mlp.fc2(mlp.grn(hidden * visible)))
