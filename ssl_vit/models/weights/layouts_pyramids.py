"""Swin, Swin V2, ConvNeXt and ConvNeXt V2 in timm and in transformers."""

from functools import partial
from typing import Any, Literal

from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor

from ssl_vit.models.weights.layouts_shared import SIZE, Layout, Names, Settings, grid_of, not_whole, plain, under

_SELF = "attention.self"
_SWIN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": (f"{_SELF}.query", f"{_SELF}.key", f"{_SELF}.value"),
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_SWIN_POSITIONS = {"attn.relative_position_bias_table": f"{_SELF}.relative_position_bias_table"}
_SWIN_V2_POSITIONS = {
    "attn.logit_scale": f"{_SELF}.logit_scale",
    "attn.q_bias": f"{_SELF}.query.bias",
    "attn.v_bias": f"{_SELF}.value.bias",
    "attn.cpb_mlp.0": f"{_SELF}.continuous_position_bias_mlp.0",
    "attn.cpb_mlp.2": f"{_SELF}.continuous_position_bias_mlp.2",
}
_CONVNEXT_BLOCK = {
    "conv_dw": "dwconv",
    "norm": "layernorm",
    "mlp.fc1": "pwconv1",
    "mlp.fc2": "pwconv2",
    "mlp.grn": "grn",
    "gamma": "layer_scale_parameter",
}
# Widths of the first stage and depths of timm's architectures.
_SWINS = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}
_CONVNEXTS = {
    (40, (2, 2, 6, 2)): "atto",
    (48, (2, 2, 6, 2)): "femto",
    (64, (2, 2, 6, 2)): "pico",
    (80, (2, 2, 8, 2)): "nano",
    (96, (3, 3, 9, 3)): "tiny",
    (96, (3, 3, 27, 3)): "small",
    (128, (3, 3, 27, 3)): "base",
    (192, (3, 3, 27, 3)): "large",
    (256, (3, 3, 27, 3)): "xlarge",
    (352, (3, 3, 27, 3)): "huge",
}


def _swin_names(positions: dict[str, str], settings: Settings) -> Names:
    names: Names = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "patch_embed.norm": "embeddings.norm",
        "norm": "layernorm",
    }
    for stage, depth in enumerate(settings["depths"]):
        theirs = f"encoder.layers.{stage}"
        merging = {part: f"downsample.{part}" for part in ("norm", "reduction")}
        if stage:  # timm merges patches before a stage, transformers after the one before
            names |= under(f"layers.{stage}.downsample", f"encoder.layers.{stage - 1}", merging)
        for block in range(depth):
            names |= under(f"layers.{stage}.blocks.{block}", f"{theirs}.blocks.{block}", {**_SWIN_BLOCK, **positions})
    return names


def _describe_swin(swin: Any) -> Settings:
    blocks = [block for stage in swin.layers for block in stage.blocks]
    attn, proj = blocks[0].attn, swin.patch_embed.proj
    return {
        "patch_size": plain(proj.kernel_size),
        "num_channels": proj.in_channels,
        "embed_dim": proj.out_channels,
        "depths": [len(stage.blocks) for stage in swin.layers],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in swin.layers],
        "window_size": max(side for block in blocks for side in block.window_size),
        "mlp_ratio": float(blocks[0].mlp_ratio),
        "qkv_bias": (attn.qkv.bias if isinstance(swin, SwinTransformer) else attn.q_bias) is not None,
        "drop_path_rate": 0.0,
    }


def _describe_swin_v2(swin: Any) -> Settings:
    windows = [stage.blocks[0].attn.pretrained_window_size[0] for stage in swin.layers]
    return {**_describe_swin(swin), "pretrained_window_sizes": windows}


def _swin_arch(settings: Settings) -> str:
    size = _SWINS.get((settings["embed_dim"], max(settings["depths"])))
    version = "v2" if "pretrained_window_sizes" in settings else ""
    patches = "" if version else "_patch4"
    return f"swin{version}_{size}{patches}_window{settings['window_size']}_{settings['image_size']}"


def _swin_arguments(settings: Settings) -> dict[str, Any]:
    same = ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias", "pretrained_window_sizes")
    return {
        "img_size": settings["image_size"],
        **_stem(settings),
        **{name: settings[name] for name in same if name in settings},
    }


def _stem(settings: Settings) -> dict[str, Any]:
    patch = {} if settings["patch_size"] == 4 else {"patch_size": settings["patch_size"]}  # 4 in all of timm's
    return {"in_chans": settings["num_channels"], **patch}


def _odd_swin(settings: Settings) -> str | None:
    """Where the two libraries choose other windows or shifts, or pad before instead of after the shift."""
    is_v2 = "pretrained_window_sizes" in settings
    listed = [settings[name] for name in ("depths", "num_heads", "pretrained_window_sizes") if name in settings]
    if len({len(values) for values in listed}) > 1:
        return f"{', '.join(map(str, listed))} are not of as many stages"
    if 1 in settings.get("pretrained_window_sizes", ()):
        return "a window of 1 was trained before, by whose width less 1 transformers divides"
    if (reason := not_whole(settings)) is not None:
        return reason
    window, grid = settings["window_size"], grid_of(settings)
    for stage, depth in enumerate(settings["depths"]):
        rows, columns = (-(-side // 2**stage) for side in grid)
        where = f"stage {stage + 1}, whose grid is {rows} x {columns} at this image size,"
        if not is_v2 and min(rows, columns) < window:
            return f"{where} is smaller than the window of {window}"
        sides = {rows, columns} | ({side // 2**stage for side in grid} if is_v2 else set())
        if len({(min(side, window), side <= window) for side in sides}) > 1:
            return f"{where} has windows of {window} that timm and transformers clip or shift differently"
        is_shifted = depth > 1 and min(rows, columns) > window
        if is_shifted and any(-side % window and 2 * (-side % window) != window for side in (rows, columns)):
            return f"{where} is padded to whole windows of {window}, by timm after the shift"
    return None


_SWIN_SETTINGS = {
    "image_size": (SIZE, 224),
    "patch_size": (SIZE, 4),
    "num_channels": (int, 3),
    "embed_dim": (int, 96),
    "depths": (list[int], [2, 2, 6, 2]),
    "num_heads": (list[int], [3, 6, 12, 24]),
    "window_size": (int, 7),
    "mlp_ratio": (float, 4.0),
    "qkv_bias": (bool, True),
    "hidden_act": (Literal["gelu"], "gelu"),
    "use_absolute_embeddings": (Literal[False], False),
    "layer_norm_eps": (float, 1e-5),
}

SWIN = Layout(
    architecture="SwinModel",
    model_type="swin",
    prefix="swin",
    eps=1e-5,
    settings=_SWIN_SETTINGS,
    fits=lambda model: isinstance(model, SwinTransformer),
    describe=_describe_swin,
    arch=_swin_arch,
    near="swin_tiny_patch4_window7_224",
    arguments=_swin_arguments,
    odd=_odd_swin,
    names=partial(_swin_names, _SWIN_POSITIONS),
)
SWIN_V2 = Layout(
    architecture="Swinv2Model",
    model_type="swinv2",
    prefix="swinv2",
    eps=1e-5,
    settings=_SWIN_SETTINGS | {"pretrained_window_sizes": (list[int], [0, 0, 0, 0])},
    fits=lambda model: isinstance(model, SwinTransformerV2),
    describe=_describe_swin_v2,
    arch=_swin_arch,
    near="swinv2_tiny_window8_256",
    arguments=_swin_arguments,
    odd=_odd_swin,
    names=partial(_swin_names, _SWIN_V2_POSITIONS),
)


def _convnext_names(settings: Settings) -> Names:
    names: Names = {
        "stem.0": "embeddings.patch_embeddings",
        "stem.1": "embeddings.layernorm",
        "head.norm": "layernorm",
    }
    for stage, depth in enumerate(settings["depths"]):
        ours, theirs = f"stages.{stage}", f"encoder.stages.{stage}"
        if stage:
            names |= under(f"{ours}.downsample", f"{theirs}.downsampling_layer", {"0": "0", "1": "1"})
        for block in range(depth):
            names |= under(f"{ours}.blocks.{block}", f"{theirs}.layers.{block}", _CONVNEXT_BLOCK)
    return names


def _describe_convnext(convnext: Any) -> Settings:
    stem, stages = convnext.stem[0], convnext.stages
    return {
        "patch_size": stem.kernel_size[0],
        "num_channels": stem.in_channels,
        "num_stages": len(stages),
        "hidden_sizes": [stage.blocks[0].conv_dw.out_channels for stage in stages],
        "depths": [len(stage.blocks) for stage in stages],
    }


def _convnext_arch(settings: Settings) -> str:
    size = _CONVNEXTS.get((settings["hidden_sizes"][0], tuple(settings["depths"])))
    return f"convnext{'' if 'layer_scale_init_value' in settings else 'v2'}_{size}"


def _convnext_arguments(settings: Settings) -> dict[str, Any]:
    return {**_stem(settings), "dims": settings["hidden_sizes"], "depths": settings["depths"]}


def _odd_convnext(settings: Settings) -> str | None:
    widths, depths, patch = settings["hidden_sizes"], settings["depths"], settings["patch_size"]
    if len(widths) != 4 or len(depths) != 4:
        return f"hidden_sizes={widths}, depths={depths} are not of 4 stages"
    if patch == 2 or patch >= 8:  # timm gives the first stage a stride at 2, the last one dilation from 8 on
        return f"patch_size={patch} makes timm choose other strides in its stages"
    return None


def _has_grn(convnext: ConvNeXt) -> bool:
    return any(name.endswith(".grn.weight") for name in convnext.state_dict())


def _convnext_shape(name: str, value: Tensor) -> Tensor:
    if ".grn." in name:
        return value.reshape(1, 1, 1, -1)
    return value.flatten(1) if ".pwconv" in name and value.ndim == 4 else value


_CONVNEXT_SETTINGS = {
    "image_size": (SIZE, 224),
    "patch_size": (int, 4),
    "num_channels": (int, 3),
    "hidden_sizes": (list[int], [96, 192, 384, 768]),
    "depths": (list[int], [3, 3, 9, 3]),
    "hidden_act": (Literal["gelu"], "gelu"),
    "layer_norm_eps": (float, 1e-12),
}

CONVNEXT = Layout(
    architecture="ConvNextModel",
    model_type="convnext",
    prefix="convnext",
    eps=1e-6,
    settings=_CONVNEXT_SETTINGS | {"layer_scale_init_value": (float, 1e-6)},
    fits=lambda model: isinstance(model, ConvNeXt) and not _has_grn(model),
    describe=_describe_convnext,
    arch=_convnext_arch,
    near="convnext_tiny",
    arguments=_convnext_arguments,
    odd=_odd_convnext,
    names=_convnext_names,
    shaped=_convnext_shape,
)
CONVNEXT_V2 = Layout(
    architecture="ConvNextV2Model",
    model_type="convnextv2",
    prefix="convnextv2",
    eps=1e-6,
    settings=_CONVNEXT_SETTINGS,
    fits=lambda model: isinstance(model, ConvNeXt) and _has_grn(model),
    describe=_describe_convnext,
    arch=_convnext_arch,
    near="convnextv2_tiny",
    arguments=_convnext_arguments,
    odd=_odd_convnext,
    names=_convnext_names,
    shaped=_convnext_shape,
)
