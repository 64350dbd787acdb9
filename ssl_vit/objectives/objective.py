"""The objective contract: what the training loop may rely on in every objective."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ssl_vit.data.transform import InputSpec, Transform
from ssl_vit.models.encoder import Encoder
from ssl_vit.objectives.frozen import Frozen
from ssl_vit.objectives.teacher import Teacher

Taken = Bool[Tensor, ""] | None
Pooled = Literal["cls", "mean"]
"""The class token, or the mean of the patch tokens."""
Leaves = Literal["backbone", "classifier", "nothing"]
TOKENS = ("pos_embed", "cls_token", "reg_token", "dist_token")
"""Names of tables and tokens that timm exempts from weight decay and pre-training does not."""


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share an optimizer setting.

    freeze_until: progress in [0, 1] before which they are frozen: no gradient, no weight decay, no moments.
    unfreeze_ramp: share of the run over which their learning rate then grows from 0.
    """

    params: list[tuple[str, nn.Parameter]]
    lr_scale: float = 1.0
    weight_decay_scale: float = 1.0
    freeze_until: float = 0.0
    unfreeze_ramp: float = 0.0


@dataclass(frozen=True)
class RunSize:
    """The sizes that `auto` settings follow from."""

    num_samples: int
    """Images of the source."""
    batch_size: int
    """Images per optimizer step, over all processes."""
    num_steps: int
    """Optimizer steps of the whole run."""
    num_classes: int = 0
    """Classes of the source, 0 where it has none."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels that the encoder takes."""

    @property
    def num_seen(self) -> int:
        """Images that the run sees, one as often as it is seen."""
        return self.num_steps * self.batch_size

    @property
    def epochs(self) -> float:
        """Passes over the data."""
        return self.num_seen / self.num_samples


class Resolved(NamedTuple):
    """The value of an `auto` setting, and the reason for it."""

    value: float | str | tuple[float, ...]
    reason: str

    def __str__(self) -> str:
        value = list(self.value) if isinstance(self.value, tuple) else self.value
        is_text = isinstance(value, bool | str | list)
        return f"{str(value).lower() if is_text else format(value, 'g')}: {self.reason}"


@runtime_checkable
class ObjectiveConfig(Protocol):
    """Settings of an objective; its class builds the objective and its transform.

    If evaluation settings decide which images are trained on, `decides_data` names them; a run does not continue with
    other values.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def resolve(self, size: RunSize) -> dict[str, Resolved]:
        """Values of the `auto` settings, by name."""
        ...

    def build(self, encoder: Encoder) -> "Objective": ...

    def build_transform(self, spec: InputSpec) -> Transform: ...


class Reconstruction(NamedTuple):
    """Masked images and the patches that a model predicts for them."""

    patches: Float[Tensor, "b n p"]
    """Predicted patches in row-major order, pixels of a patch in (row, column, channel) order."""
    visible: Bool[Tensor, "b n"]
    """Patches that the model saw."""
    patch_size: tuple[int, int]
    norm_pix_loss: bool
    """Whether each predicted patch is normalised by its own mean and standard deviation."""
    title: str = ""


class AttentionMaps(NamedTuple):
    """Attention of the class token to each patch in the last block."""

    maps: Float[Tensor, "b heads rows columns"]


class PatchTokens(NamedTuple):
    """Patch tokens, row-major over a grid."""

    patches: Float[Tensor, "b n d"]
    grid: tuple[int, int]


Preview = Reconstruction | AttentionMaps | PatchTokens


class Objective(nn.Module):
    """An encoder with everything that its training needs: heads, decoder, teacher, centre and loss."""

    encoder: Encoder  # the one that receives gradients
    pooled: Pooled  # the feature that stands for an image after training: read by evaluation, export and figures
    leaves: Leaves = "backbone"  # what a run exports
    reconstructs = False  # whether it is a `Reconstructs`
    drops_tokens = (
        False  # whether its encoder sees kept tokens alone, so that a report shows the way to the whole image
    )
    teacher: Teacher | None = None
    frozen: tuple[Frozen, ...] = ()  # models that it reads from elsewhere: outside of checkpoints and optimizer
    figure_file = "figure.png"  # file name of the figure that shows `preview`'s result

    @property
    def name(self) -> str:
        """Name of the class, without the prefix that FSDP adds."""
        return type(self).__name__.removeprefix("FSDP")

    def train(self, mode: bool = True) -> "Objective":
        """Set the mode as in any module, except that a teacher stays in eval mode."""
        super().train(mode)
        for module in self.teacher.modules() if self.teacher is not None else ():
            module.eval()
        return self

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        """Losses of a batch, a deterministic function of (parameters, batch, progress).

        Returns:
            Scalars. "loss" is minimised, every scalar is logged.
        """
        raise NotImplementedError

    def after_step(self, progress: float, taken: Taken = None) -> None:
        """Update EMA and centre; called once after every optimizer step. Does nothing by default.

        Args:
            taken: scalar on the device; False if the optimizer skipped the step, so that nothing else may move either;
                None = taken. It stays on the device, so that the host need not wait.
        """

    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars that are too expensive for every step; called on every process at log steps, after `forward`."""
        return {}

    def diagnose(self, values: Mapping[str, float], run: Mapping[str, Any] | None = None) -> str | None:
        """Explain from the averages of a log interval what is wrong and what to change; None if all is well.

        Args:
            run: settings as in the run's config.yaml, and `num_images` of its source.
        """
        return None

    def backbone(self) -> Encoder:
        """The encoder that is evaluated and exported."""
        return self.encoder

    def compilable(self) -> list[nn.Module]:
        """Modules for torch.compile; by default those in module lists named `blocks` or `..._blocks`."""
        return [module for name, module in self.named_modules() if name.rpartition(".")[0].endswith("blocks")]

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the classes of blocks, the units that FSDP shards; Accelerate reads it where no file names any."""
        return sorted({type(module).__name__ for module in Objective.compilable(self)})

    def param_groups(self) -> list[ParamGroup]:
        """Trainable parameters by optimizer setting.

        No decay have vectors and biases, as in the papers, and what timm exempts (such as tables of relative
        positions); but class tokens and position tables have it, as in the code of MAE, DINO and DINOv2.
        """
        return self.split_by_decay({name for name in self._timm_exempts() if not name.endswith(TOKENS)})

    def _timm_exempts(self) -> set[str]:
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def split_by_decay(self, exempt: set[str]) -> list[ParamGroup]:
        """Trainable parameters in two groups; vectors, biases and those named in `exempt` have no weight decay."""
        decayed: list[tuple[str, nn.Parameter]] = []
        undecayed: list[tuple[str, nn.Parameter]] = []
        for name, parameter in self._trainable():
            is_exempt = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
            (undecayed if is_exempt else decayed).append((name, parameter))
        return [ParamGroup(decayed), ParamGroup(undecayed, weight_decay_scale=0.0)]

    def split_by_lr(self, groups: list[ParamGroup], lr_scale: Callable[[str], float]) -> list[ParamGroup]:
        """Split groups by the learning-rate factor that `lr_scale` gives for a parameter's name."""
        parts: dict[tuple[float, ...], list[tuple[str, nn.Parameter]]] = {}
        for group in groups:
            for name, parameter in group.params:
                scale = lr_scale(name) * group.lr_scale
                key = (scale, group.weight_decay_scale, group.freeze_until, group.unfreeze_ramp)
                parts.setdefault(key, []).append((name, parameter))
        return [ParamGroup(params, *key) for key, params in parts.items()]

    def preview(self, images: Float[Tensor, "b c h w"], rng: np.random.Generator) -> Preview | None:
        """What the model makes of normalised `images`, for a figure; None if there is nothing to show."""
        return None

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)


@runtime_checkable
class Reconstructs(Protocol):
    """An objective that predicts removed patches from kept ones, so that figures can show reconstructions."""

    encoder: Encoder
    config: Any
    """Has a `mask_ratio`."""
    drops_tokens: bool

    def fill_in(self, images: Float[Tensor, "b c h w"], keep: Int[Tensor, "b k"]) -> Reconstruction: ...
