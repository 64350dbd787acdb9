"""Supervised objectives on a pre-trained encoder: full fine-tuning, and the attentive probe on frozen patch tokens."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from timm.layers.attention_pool import AttentionPoolLatent
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn

from ssl_vit.core.settings import check_ranges
from ssl_vit.data.augment.supervised import AugmentConfig, SupervisedTransform
from ssl_vit.data.transform import InputSpec
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.weights.classifier import open_classifier
from ssl_vit.objectives.deit import Distillation, distillation_loss, read_teacher, teacher_input
from ssl_vit.objectives.objective import Objective, ParamGroup, Resolved, RunSize, Taken
from ssl_vit.objectives.teacher import Teacher


@dataclass(frozen=True)
class SupervisedConfig(AugmentConfig):
    """Settings of every supervised objective."""

    # Without a test source some images of the source are held out; with one none are.
    decides_data: ClassVar[tuple[str, ...]] = ("evaluation.test_source", "evaluation.test_split")

    num_classes: int | Literal["auto"] = "auto"
    """Number of classes; auto = that of the source."""

    def resolve(self, size: RunSize) -> dict[str, Resolved]:
        """Resolve the number of classes from the source.

        Raises:
            ValueError: the source has more classes than `num_classes`.
        """
        if self.num_classes != "auto":
            if self.num_classes < size.num_classes:
                raise ValueError(
                    f"num_classes={self.num_classes!r}: the source has {size.num_classes} classes; give at least "
                    "that number, or 'auto'"
                )
            return {}
        return {"num_classes": Resolved(size.num_classes, "classes of the source")}

    def build_transform(self, spec: InputSpec) -> SupervisedTransform:
        """Crops and labels of images, for an encoder with this `spec`."""
        return SupervisedTransform(self, self.classes, spec)

    @property
    def classes(self) -> int:
        """The number of classes.

        Raises:
            ValueError: it is still `auto`."""
        if self.num_classes == "auto":
            raise ValueError("num_classes='auto': follows from the source's classes; use RunConfig.resolve or a number")
        return self.num_classes


@dataclass(frozen=True)
class FineTuneConfig(SupervisedConfig):
    """Full fine-tuning as in MAE's appendix (He et al. 2022, table 9), which follows BEiT and DeiT."""

    pool: Literal["mean", "cls"] = "mean"
    """Feature of a ViT to classify: the mean of the patch tokens, normalised after pooling, or the class token. Swin,
    ConvNeXt and distilled DeiT have a pooling of their own, that of timm's classifiers, whatever this says."""
    layer_decay: float = 0.65
    """Factor on the learning rate from each block to the block before it."""
    model_ema: float | None = None
    """Momentum of an average of the weights, which is tested and exported instead of them; null = no average."""
    head_init: float = 2e-5
    """Standard deviation of the head's initial weights."""
    keep_head: bool = False
    """Start with the head of the classifier that encoder.pretrained names, as for images of another size."""
    teacher: str | None = None
    """Trained classifier of the same classes to learn from too, through a second head (DeiT): folder of a fine-tuning,
    of a timm classifier or its .safetensors file, or a timm model's name. It stays as it is and is in no checkpoint."""
    distillation: Distillation = "hard"
    """What the second head learns: the teacher's most likely class (hard) or its distribution (soft); none leaves the
    teacher out. Only with a teacher."""
    distillation_alpha: float = 0.5
    """Share of the loss on the teacher's answers; the rest is that on labels."""
    distillation_tau: float = 1.0
    """Temperature of soft distillation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self,
            layer_decay="(0, 1]; 1 = the same rate in all blocks",
            model_ema="[0, 1); the usual value is 0.9999",
            head_init="(0, inf)",
            distillation_alpha="[0, 1]",
            distillation_tau="(0, inf)",
        )

    @property
    def distils(self) -> bool:
        """Whether there is a teacher to learn from."""
        return self.teacher is not None and self.distillation != "none"

    def build(self, encoder: Encoder) -> "FineTune":
        """Put a head on an encoder, and read the teacher.

        Raises:
            ValueError: the teacher, or the head to start from, is missing or does not fit; begins with the setting.
        """
        objective = FineTune(self, encoder)
        if self.keep_head and encoder.config.pretrained is not None:
            objective.take_head(encoder.config.pretrained)
        if self.teacher is not None and self.distils:
            objective.frozen = (read_teacher(self.teacher, encoder, self.classes),)
        return objective

    def build_transform(self, spec: InputSpec) -> SupervisedTransform:
        teacher = teacher_input(self.teacher) if self.teacher is not None and self.distils else None
        return SupervisedTransform(self, self.classes, spec, teacher)


class Supervised(Objective):
    """An objective whose batch has `images` and `targets`, and which classifies images."""

    def logits(self, images: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b classes"]]:
        """Logits of each head for normalised images."""
        raise NotImplementedError


class Classifier(nn.Module):
    """Norm and linear layer on pooled features, with timm's names: fc_norm and head.

    Distilled DeiT has two linear layers, `head` on the class token and `head_dist` on the distillation token, whose
    logits are averaged. Without a teacher both learn from the average. With one, other backbones have two as well, on
    the same features.
    """

    def __init__(
        self, encoder: Encoder, num_classes: int, *, norm: nn.Module, head_init: float, distils: bool = False
    ) -> None:
        super().__init__()
        self.fc_norm = norm
        self.names = [name.split(".")[0] for name in encoder.head_names]
        if distils and len(self.names) == 1:
            self.names.append("head_dist")
        for name in self.names:
            head = nn.Linear(encoder.embed_dim, num_classes)
            nn.init.trunc_normal_(head.weight, std=head_init)
            nn.init.zeros_(head.bias)
            self.add_module(name, head)

    @property
    def heads(self) -> list[nn.Module]:
        """The linear layers, in the order of `Encoder.head_names`."""
        return [self.get_submodule(name) for name in self.names]

    def each(self, pooled: Sequence[Float[Tensor, "b d"]]) -> list[Float[Tensor, "b classes"]]:
        """Logits of each head; where all read the same features, `pooled` holds these once."""
        normed = [self.fc_norm(features) for features in pooled]
        inputs = normed if len(normed) == len(self.names) else normed * len(self.names)
        return [head(features) for head, features in zip(self.heads, inputs, strict=True)]

    def forward(self, pooled: Sequence[Float[Tensor, "b d"]]) -> Float[Tensor, "b classes"]:
        logits = self.each(pooled)
        return logits[0] if len(logits) == 1 else torch.stack(logits).mean(dim=0)


class FineTune(Supervised):
    """Encoder and classifier, trained together with a learning rate that decays towards the input."""

    leaves = "classifier"

    def __init__(self, config: FineTuneConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        # Norm after the mean, in the classifier, unless the architecture's own classifier has another order.
        norm = encoder.remove_norm() if config.pool == "mean" else None
        self.pooled = "cls" if norm is None else "mean"
        encoder.requires_grad_(True)  # also position tables, which pre-training may fix
        if norm is None:
            norm = nn.Identity()
        else:
            norm.reset_parameters()  # pyright: ignore[reportCallIssue]
        self.classifier = Classifier(
            encoder, config.classes, norm=norm, head_init=config.head_init, distils=config.distils
        )
        self.criterion = SoftTargetCrossEntropy()
        self.ema_encoder: Encoder | None = None
        self.ema_classifier: Classifier | None = None
        if config.model_ema is not None:
            self.teacher = Teacher(self, "ema_", "encoder", "classifier")

    def take_head(self, name: str) -> None:
        """Start with the head of a trained classifier. One with a single linear layer gives it to both of two heads.

        Raises:
            ValueError: there is no such classifier, or it does not fit; begins with `keep_head=`.
        """
        try:
            found = open_classifier(name)
            if next(self.classifier.parameters()).is_meta:  # where the number of classes is not known yet
                return
            if found.num_classes != self.config.classes:
                raise ValueError(f"knows {found.num_classes} classes, and this run has {self.config.classes}")
            with torch.random.fork_rng(devices=[]):
                tensors = found.read().state_dict()
            theirs = dict(zip(self.classifier.names, self.encoder.head_names, strict=False))
            names = {}
            for own in self.classifier.state_dict():
                module, _, kind = own.partition(".")
                names[own] = own if module == "fc_norm" else f"{theirs.get(module, self.encoder.head_names[0])}.{kind}"
            if missing := [name for name in names.values() if name not in tensors]:
                raise ValueError(f"has no {missing[0]}")
            self.classifier.load_state_dict({own: tensors[name] for own, name in names.items()})
        except (RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"keep_head=True: encoder.pretrained={name!r} is no classifier to go on from: {said}"
            ) from error

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        pooled = self._pool(self.encoder, batch["images"])
        if not self.frozen:
            return {"loss": self.criterion(self.classifier(pooled).float(), batch["targets"])}
        of_labels, of_teacher = (logits.float() for logits in self.classifier.each(pooled))
        answers = self.frozen[0](batch.get("teacher_images", batch["images"])).float()
        base, config = self.criterion(of_labels, batch["targets"]), self.config
        settings = (config.distillation, config.distillation_alpha, config.distillation_tau)
        loss = distillation_loss(of_labels, of_teacher, answers, base, *settings)
        agreement = (of_teacher.argmax(dim=1) == answers.argmax(dim=1)).float().mean()
        return {"loss": loss, "loss_labels": base, "teacher_agreement": agreement}

    def _pool(self, encoder: Encoder, images: Tensor) -> list[Tensor]:
        return [encoder(images).patches.mean(dim=1)] if self.pooled == "mean" else encoder.head_inputs(images)

    def logits(self, images: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b classes"]]:
        return {"head": self.tested_classifier()(self._pool(self.backbone(), images))}

    def after_step(self, progress: float, taken: Taken = None) -> None:
        if self.teacher is not None and self.config.model_ema is not None:
            self.teacher.update(self.config.model_ema, taken)

    def backbone(self) -> Encoder:
        return self.encoder if self.ema_encoder is None else self.ema_encoder

    def tested_classifier(self) -> Classifier:
        """The classifier that belongs to `backbone`."""
        return self.classifier if self.ema_classifier is None else self.ema_classifier

    def param_groups(self) -> list[ParamGroup]:
        """Groups with the decayed learning rate of their layer; what timm exempts has no weight decay."""
        return self.split_by_lr(self.split_by_decay(self._timm_exempts()), self._lr_scale)

    def _lr_scale(self, name: str) -> float:
        if not name.startswith("encoder."):
            return 1.0
        layer = self.encoder.layer_of(name.removeprefix("encoder."))
        return self.config.layer_decay ** (self.encoder.num_layers + 1 - layer)


@dataclass(frozen=True)
class AttentiveConfig(SupervisedConfig):
    """One cross-attention block over frozen patch tokens and a linear layer (V-JEPA, Bardes et al. 2024)."""

    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    rand_augment: str | None = None
    """RandAugment policy, in timm's notation; null = none."""
    random_erasing: float = 0.0
    """Probability of replacing a random box by noise."""
    mixup: float = 0.0
    """Alpha of Mixup; 0 = none."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 = none."""
    label_smoothing: float = 0.0
    """Label smoothing: share of a label that is spread over all classes."""
    lr_scales: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """Factors on the learning rate, one probe each; the best is chosen on a held-out part of the data."""
    num_heads: int = 8
    """Attention heads of a probe; fewer if they do not divide the width of the tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr_scales or min(self.lr_scales) <= 0 or len(set(self.lr_scales)) < len(self.lr_scales):
            raise ValueError(f"lr_scales={self.lr_scales!r}: give different numbers above 0")
        check_ranges(self, num_heads="[1, inf)")

    def build(self, encoder: Encoder) -> "AttentiveProbe":
        """Put probes on a frozen encoder."""
        return AttentiveProbe(self, encoder)


class AttentiveProbe(Supervised):
    """Probes of several learning rates on the patch tokens of one frozen encoder, which they share."""

    pooled = "mean"
    leaves = "nothing"

    def __init__(self, config: AttentiveConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder.requires_grad_(False)
        width = encoder.embed_dim
        num_heads = next(count for count in range(config.num_heads, 0, -1) if width % count == 0)
        probe = nn.Sequential(
            AttentionPoolLatent(width, num_heads=num_heads, norm_layer=nn.LayerNorm),
            nn.Linear(width, config.classes),
        )
        self.names = [f"lr_{scale:g}" for scale in config.lr_scales]
        self.probes = nn.ModuleList(copy.deepcopy(probe) for _ in self.names)  # all start with equal weights
        self.criterion = SoftTargetCrossEntropy()

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        logits = self.logits(batch["images"])
        losses = {f"loss_{name}": self.criterion(values.float(), batch["targets"]) for name, values in logits.items()}
        # A probe's loss has gradients for this probe alone, so their sum trains all of them.
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def logits(self, images: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b classes"]]:
        with torch.no_grad():
            tokens = self.encoder(images).patches
        return {name: probe(tokens) for name, probe in zip(self.names, self.probes, strict=True)}

    def train(self, mode: bool = True) -> "AttentiveProbe":
        super().train(mode)
        self.encoder.eval()
        return self

    def param_groups(self) -> list[ParamGroup]:
        scales = dict(zip(map(str, range(len(self.names))), self.config.lr_scales, strict=True))
        return self.split_by_lr(super().param_groups(), lambda name: scales[name.split(".")[1]])
