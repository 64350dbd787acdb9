"""The encoder contract: what every backbone offers and every objective may rely on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ssl_vit.data.transform import check_divisible, pair

if TYPE_CHECKING:
    from ssl_vit.models.config import EncoderConfig


_STEMS = ("vit.patch_embed.", "net.patch_embed.", "net.stem.")  # names of what projects pixels begin so


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode; afterwards restore the mode of each submodule."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


class Features(NamedTuple):
    """What an encoder returns.

    cls: what stands for the image: the final-norm class token, or the architecture's own pooled feature (ConvNeXt: norm
        of the mean; Swin and ViTs without a class token: mean of the normed tokens).
    patches: final-norm tokens, row-major over `Encoder.grid_of`; with `keep` only the kept ones, in the order of
        `keep`.
    """

    cls: Float[Tensor, "b d"]
    patches: Float[Tensor, "b n d"]


class Encoder(nn.Module):
    """A timm model that turns images into a feature of the image and a grid of tokens.

    Takes images of any size that `stride` divides, square or not. `image_size` is the size it was built for. A pair of
    objective and encoder that cannot work is refused when the objective is built, by what the encoder supports.
    """

    config: "EncoderConfig"  # builds the encoder again
    title: ClassVar[str]  # of the family, in words
    model_name: ClassVar[str]  # the attribute that holds the timm model, and the prefix of its parameters' names
    model_args: dict[str, Any]  # arguments of timm's factory that build the model again
    embed_dim: int
    in_chans: int
    image_size: tuple[int, int]  # (height, width) in pixels
    stride: tuple[int, int]  # (height, width) in pixels of one output token
    mask_dim: int  # width of a mask token: that of the stem's outputs
    has_cls_token: bool
    supports_keep: bool  # can drop tokens before the first block (MAE)
    supports_mask: bool  # can replace the stem's outputs, which hold pixels of one token alone (SimMIM, iBOT)
    supports_visible: bool = False  # can compute from visible tokens as if others did not exist: `forward_visible`
    has_attention_maps: bool = False  # `attention_maps.attention_weights` supports it
    has_plain_blocks: ClassVar[bool] = False  # one list of blocks that take tokens alone, run by `blocks.run_blocks`
    num_layers: int  # layers between embeddings and final norm, for `layer_of`
    num_last_layers: int  # blocks at the end that share width and grid
    grad_checkpointing: bool = False  # blocks store only their input; the backward pass recomputes them
    is_pretrained: bool = False  # pretrained weights are loaded; objectives must not re-initialise
    read_sha256: str | None = None  # of these as they were read; fitted to a size they round differently elsewhere
    pretrained_cfg: dict[str, Any]  # of a loaded backbone: input size, mean, std and crop, in timm's form

    example: ClassVar[str] = ""  # `model_args` of such an architecture
    other_settings: ClassVar[tuple[str, ...]] = ()  # of `EncoderConfig`, which suit other families only

    def __init__(self, model: nn.Module, config: "EncoderConfig", arguments: dict[str, Any]) -> None:
        """Take a timm model.

        Args:
            config: the settings that the model was built from.
            arguments: of timm's factory, as it was called.
        """
        super().__init__()
        setattr(self, self.model_name, model)
        self.config, self.model_args = config, arguments
        self.image_size, self.in_chans = pair(config.image_size), config.in_chans
        self.grad_checkpointing = config.grad_checkpointing

    @classmethod
    def arguments(cls, config: "EncoderConfig") -> dict[str, Any]:
        """Arguments of timm's factory that models of this family are built with, beside settings."""
        return {}

    @property
    def model(self) -> nn.Module:
        """The timm model, with timm's names of parameters."""
        return self.get_submodule(self.model_name)

    @property
    def strides(self) -> list[int]:
        """Strides of the maps of `timm.create_model(..., features_only=True)`; a ViT has one."""
        info: Any = self.model.feature_info
        return sorted({stage["reduction"] for stage in info})

    @property
    def cls_in_words(self) -> str:
        """What `Features.cls` is."""
        return "the class token" if self.has_cls_token else "the mean of the patch tokens"

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of tokens at the size the encoder was built for."""
        return self.grid_of(*self.image_size)

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def attention_length(self) -> int:
        """Tokens that attend to each other at the size the encoder was built for: those of a window, or all patches."""
        return self.num_patches

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of an image.

        Raises:
            ValueError: the stride does not divide the size.
        """
        check_divisible(f"image_size={(height, width)}", (height, width), self.stride)
        return height // self.stride[0], width // self.stride[1]

    def layer_of(self, name: str) -> int:
        """Depth of a parameter: 0 for embeddings, 1 to `num_layers` for blocks, `num_layers` + 1 for what follows."""
        raise NotImplementedError

    def is_patch_embedding(self, name: str) -> bool:
        """Whether a parameter belongs to what turns pixels into the first tokens."""
        return name.startswith(_STEMS)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm exempts from weight decay, beside vectors and biases."""
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()  # pyright: ignore[reportCallIssue]
        known = {name for name, _ in self.named_parameters()}
        return {f"{self.model_name}.{name}" for name in names} & known

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        keep: Int[Tensor, "b k"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        mask_token: Float[Tensor, " d"] | None = None,
    ) -> Features:
        """Encode a batch.

        Args:
            images: normalised images.
            keep: indices of the tokens that enter the blocks; all others are dropped. Needs `supports_keep`.
            mask: True where the stem's outputs are replaced by `mask_token` (before positions are added), one value
                for each output token. Needs `supports_mask`.
            mask_token: the replacement, `mask_dim` wide. The objective owns it, so that a backbone has no unused
                parameter.
        """
        raise NotImplementedError

    def forward_groups(
        self,
        groups: Sequence[Float[Tensor, "_ c _ _"]],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        mask_token: Float[Tensor, " d"] | None = None,
        cls_only: bool = False,
    ) -> list[Features]:
        """Encode batches of several sizes, at once if the backbone can.

        Args:
            groups: normalised images; those of a batch have one size.
            mask, mask_token: as in `forward`, for the first batch.
            cls_only: the caller needs no patch tokens; a backbone may skip them and return none.
        """
        masking = {} if mask is None else {"mask": mask, "mask_token": mask_token}
        return [self(images, **(masking if number == 0 else {})) for number, images in enumerate(groups)]

    def forward_visible(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b d rows columns"]:
        """Outputs of the last block, before the final norm, computed from visible tokens alone (FCMAE).

        Args:
            mask: True where a token is removed. Needs `supports_visible`.

        Returns:
            zeros where a token is removed; nothing depends on the removed tokens' pixels.
        """
        raise NotImplementedError

    def timm_arguments(self, pooled: str, *, norm_pooled: bool = False) -> tuple[dict[str, Any], str]:
        """Arguments of timm's factory with which `timm.create_model` pools as asked, and timm's name of that pooling.

        Args:
            pooled: "cls" or "mean"; a backbone without a class token has its own pooling.
            norm_pooled: the model normalises after pooling, with a norm that timm calls `fc_norm`; see `remove_norm`.
        """
        return self.model_args, "avg"

    def remove_norm(self) -> nn.Module | None:
        """Take the final norm away, for heads that normalise what they have pooled, and return it.

        None where timm's classifier of the architecture has an order of its own, which `head_inputs` follows.
        """
        return None

    @property
    def head_names(self) -> tuple[str, ...]:
        """timm's names of its classifier's linear layers: one, or two in distilled DeiT, whose logits are averaged."""
        model: Any = self.model
        names = model.pretrained_cfg["classifier"]
        return (names,) if isinstance(names, str) else tuple(names)

    def head_inputs(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b d"]]:
        """What each of `head_names` reads: `cls`, and in distilled DeiT the distillation token."""
        return [self(images).cls]

    def last_layers(self, images: Float[Tensor, "b c h w"], num_layers: int) -> list[Features]:
        """Features of the last `num_layers` blocks, each through the final norm, the last block last.

        Raises:
            ValueError: fewer blocks than that share width and grid.
        """
        raise NotImplementedError

    def _check_num_layers(self, num_layers: int) -> None:
        if not 1 <= num_layers <= self.num_last_layers:
            raise ValueError(
                f"num_layers={num_layers}: the last {self.num_last_layers} blocks of {self.config.arch} share width "
                "and grid"
            )


def given_mask_token(mask_token: Float[Tensor, " d"] | None, like: Tensor) -> Float[Tensor, " d"]:
    """The mask token in the dtype of the tokens that it replaces.

    Raises:
        ValueError: there is none.
    """
    if mask_token is None:
        raise ValueError("mask is given without mask_token, the embedding to put in its place")
    return mask_token.to(like.dtype)
