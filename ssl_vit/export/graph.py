"""What timm's models return, as features; and a backbone for images of one size, which tracers can follow."""

from typing import Any

import timm
from jaxtyping import Float
from torch import Tensor, nn

from ssl_vit.models.encoder import Encoder, Features


def timm_features(model: Any, outputs: Tensor) -> Features:
    """What a timm model's `forward_features` returns, as features: `timm_code` in Python that users run."""
    if outputs.ndim == 3:
        patches = outputs[:, model.num_prefix_tokens :]
        return Features(outputs[:, 0] if model.cls_token is not None else patches.mean(dim=1), patches)
    if is_channels_last(model):
        patches = outputs.flatten(1, 2)
        return Features(patches.mean(dim=1), patches)
    norm = getattr(model.head, "norm", nn.Identity())
    cls = norm(outputs.mean(dim=(2, 3), keepdim=True)).flatten(1)
    return Features(cls, norm(outputs).flatten(2).transpose(1, 2))


def timm_code(encoder: Encoder, name: str = "model") -> list[str]:
    """Lines of Python that compute `cls` and `patches` from the `outputs` of `forward_features`.

    Args:
        name: of the timm model.
    """
    model: Any = encoder.model
    if not hasattr(model, "num_prefix_tokens"):
        if is_channels_last(model):
            return ["patches = outputs.flatten(1, 2)  # outputs are rows and columns", "cls = patches.mean(1)"]
        if not hasattr(model.head, "norm"):
            return ["cls, patches = outputs.mean((2, 3)), outputs.flatten(2).transpose(1, 2)"]
        norm = f"{name}.head.norm"
        return [
            f"cls = {norm}(outputs.mean((2, 3), keepdim=True)).flatten(1)",
            f"patches = {norm}(outputs).flatten(2).transpose(1, 2)",
        ]
    patches = f"outputs[:, {model.num_prefix_tokens}:]"
    return [f"cls, patches = {'outputs[:, 0]' if encoder.has_cls_token else f'{patches}.mean(1)'}, {patches}"]


def is_channels_last(model: Any) -> bool:
    """Whether a timm model's maps are [b, h, w, c] instead of [b, c, h, w]."""
    return getattr(model, "output_fmt", None) == "NHWC"


class StaticBackbone(nn.Module):
    """timm's model for a single image size, returning `Features` as a plain tuple."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        of_any_size = ("dynamic_img_size", "strict_img_size")
        arguments = {name: value for name, value in encoder.model_args.items() if name not in of_any_size}
        arch = encoder.config.arch.split(".")[0]
        self.model: Any = timm.create_model(arch, num_classes=0, in_chans=encoder.in_chans, **arguments)
        self.model.load_state_dict(encoder.model.state_dict())
        self.eval()

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        cls, patches = timm_features(self.model, self.model.forward_features(images))
        return cls, patches
