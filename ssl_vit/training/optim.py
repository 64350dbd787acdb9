"""An optimizer over an objective's parameter groups; rate and decay are set from progress before every step."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from ssl_vit.core.schedules import cosine, warmup_cosine, warmup_drop, warmup_linear
from ssl_vit.core.settings import check_ranges
from ssl_vit.objectives.objective import Objective, ParamGroup, Resolved, RunSize
from ssl_vit.objectives.recipes import resolve_optimizer, resolve_peak_lr, resolve_warmup
from ssl_vit.training.muon import Muon


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, with warm-up and cosine decay, both per step."""

    optimizer: Literal["adamw", "muon", "auto"] = "adamw"
    """adamw (Loshchilov & Hutter 2019); muon (Jordan et al. 2024) for the weight matrices of blocks, with adamw at the
    same rate for all else; or auto: muon for fresh weights, adamw for trained ones; for pre-training."""
    base_lr: float | Literal["auto"] = 1.5e-4
    """Learning rate for a global batch of 256; see lr_scaling. auto: what gives a peak rate of 1e-3 (muon 2e-3), less
    in batches of fewer than 64 images, and 5e-5 from trained weights; for pre-training on one or a few devices."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """Peak rate: base_lr x batch / 256 (linear), or base_lr x sqrt(batch / 1024) (sqrt, DINOv2)."""
    min_lr: float = 0.0
    """Learning rate at the end of the run."""
    warmup: float | Literal["auto"] = 0.05
    """Share of the run over which the rate grows from 0 (40 of 800 epochs are 0.05), or auto."""
    drop_at: float | None = None
    """Keep the rate after warm-up, and a tenth of it from this share of the run on (SimMIM's 800 epochs: .875); null
    decays along a cosine to min_lr."""
    weight_decay: float = 0.05
    """Weight decay at the start; biases and one-dimensional parameters have none."""
    weight_decay_end: float | None = None
    """Weight decay at the end, approached along a cosine; null keeps it constant."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment coefficients."""
    clip_grad: float | None = None
    """Largest norm of the gradient; null does not clip."""
    clip_over: Literal["all", "module", "parameter"] = "all"
    """Clip the norm of all parameters together, of encoder and heads apart (DINOv2), or of each parameter (DINO)."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each block of the backbone to the block before it; 1: the same in all. DINOv2
    and fine-tuning have a setting of their own."""
    patch_embed_lr: float = 1.0
    """Further factor on the learning rate of the patch embedding. DINOv2 has a setting of its own."""
    freeze_backbone_until: float = 0.0
    """Share of the run, from its start, in which the weights that it starts from are fixed, but for the patch
    embedding's: new heads learn first, and cannot spoil them. A step takes as long as any other."""
    unfreeze_ramp: float = 0.0
    """Share of the run over which the backbone's learning rate then grows from 0 to that of the others."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            base_lr="(0, inf)",
            clip_grad="(0, inf)",
            min_lr="[0, inf)",
            weight_decay="[0, inf)",
            weight_decay_end="[0, inf)",
            warmup="[0, 1); it is a share of the run: 40 of 800 epochs are 0.05",
            betas="[0, 1)",
            drop_at="(0, 1); it is a share of the run: 700 of 800 epochs are 0.875",
            layer_decay="(0, 1]",
            patch_embed_lr="(0, 1]",
            freeze_backbone_until="[0, 1); it is a share of the run",
            unfreeze_ramp="[0, 1); it is a share of the run",
        )
        if self.freeze_backbone_until + self.unfreeze_ramp > 1:
            raise ValueError(
                f"unfreeze_ramp={self.unfreeze_ramp!r}: begins at freeze_backbone_until={self.freeze_backbone_until!r} "
                "and would end after the run; lower one of them"
            )
        if self.drop_at is not None and self.warmup != "auto" and self.drop_at <= self.warmup:
            raise ValueError(f"drop_at={self.drop_at!r}: must be above warmup={self.warmup!r}, the end of the rise")

    def resolve(self, size: RunSize, *, is_trained: bool) -> tuple["OptimConfig", list[str]]:
        """Replace `auto` settings by numbers.

        Args:
            is_trained: the run starts from trained weights.

        Returns:
            The settings, and a line for each number that says why.
        """
        found: dict[str, Resolved] = {}
        optimizer = self.optimizer
        if optimizer == "auto":
            found["optimizer"] = resolve_optimizer(is_trained=is_trained)
            optimizer = str(found["optimizer"].value)
        if self.base_lr == "auto":
            peak = resolve_peak_lr(size, is_trained=is_trained, optimizer=optimizer)
            assert isinstance(peak.value, float)
            found["base_lr"] = Resolved(peak.value / self._scale(size.batch_size), peak.reason)
        if self.warmup == "auto":
            found["warmup"] = resolve_warmup(size)
        reasons = [f"optim.{name} {value}" for name, value in found.items()]
        values: dict[str, Any] = {name: value.value for name, value in found.items()}
        return replace(self, **values), reasons

    def peak_lr(self, batch_size: int) -> float:
        """Learning rate after warm-up for a global batch of `batch_size` images.

        Raises:
            ValueError: `base_lr` is still `auto`.
        """
        if self.base_lr == "auto":
            raise ValueError("optim.base_lr='auto': follows from the batch; use RunConfig.resolve or give a number")
        return self.base_lr * self._scale(batch_size)

    def _scale(self, batch_size: int) -> float:
        """Peak rate / base rate."""
        return batch_size / 256 if self.lr_scaling == "linear" else math.sqrt(batch_size / 1024)

    def lr_at(self, progress: float, batch_size: int) -> float:
        """Learning rate at this point of the run.

        Raises:
            ValueError: `warmup` is still `auto`.
        """
        if self.warmup == "auto":
            raise ValueError("optim.warmup='auto': follows from a run's length; use RunConfig.resolve or give a number")
        peak = self.peak_lr(batch_size)
        if self.drop_at is None:
            return warmup_cosine(progress, self.warmup, peak, self.min_lr)
        return warmup_drop(progress, self.warmup, peak, self.drop_at)


def build_optimizer(objective: Objective, config: OptimConfig, precision: str = "no") -> torch.optim.AdamW:
    """The optimizer with one group for each of the objective's parameter groups, or two: Muon's and AdamW's.

    Raises:
        ValueError: `optimizer` is still `auto`, or muon where no matrix of a block is trained.
    """
    if config.optimizer == "auto":
        raise ValueError("optim.optimizer='auto': follows from a run; use RunConfig.resolve or name one")
    # lr and weight_decay are those of progress 0; set_schedule writes both before every step.
    # Under fp16 the fused kernel would skip an overflowed step by itself, and the teacher would not know that it must.
    settings: dict[str, Any] = {
        "lr": 0.0,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
        "fused": precision != "fp16",
    }
    if config.optimizer == "adamw":
        groups = parameter_groups(objective, config)
        return torch.optim.AdamW([_as_torch(group) for group in groups if group.params], **settings)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Muon(split_for_muon(objective, config), dtype=dtype, **settings)


def split_for_muon(objective: Objective, config: OptimConfig) -> list[dict[str, Any]]:
    """The parameter groups, each in two: what Muon trains and what AdamW trains.

    Raises:
        ValueError: no matrix of a block is trained.
    """
    split = []
    for group in parameter_groups(objective, config):
        parts: tuple[list[Any], list[Any]] = ([], [])
        for name, parameter in group.params:
            parts[is_matrix_of_block(name, parameter)].append((name, parameter))
        for use_muon, params in enumerate(parts):
            if params:
                split.append(_as_torch(replace(group, params=params)) | {"use_muon": bool(use_muon)})
    if not any(group["use_muon"] for group in split):
        raise ValueError("optim.optimizer='muon': no weight matrix of a block is trained in this run; use adamw")
    return split


def _as_torch(group: ParamGroup) -> dict[str, Any]:
    return {
        "params": [parameter for _, parameter in group.params],
        "lr_scale": group.lr_scale,
        "weight_decay_scale": group.weight_decay_scale,
        "freeze_until": group.freeze_until,
        "unfreeze_ramp": group.unfreeze_ramp,
    }


def is_matrix_of_block(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains it: the weight of a layer in a list named `blocks` or `..._blocks` that mixes channels.

    Depthwise convolutions, first layers, heads and what makes positions (tables, Swin V2's `cpb_mlp`) are AdamW's.
    """
    is_weight = "blocks." in name and name.endswith(".weight") and "cpb_mlp" not in name
    return is_weight and parameter.ndim > 1 and parameter.shape[1] > 1


def parameter_groups(objective: Objective, config: OptimConfig) -> list[ParamGroup]:
    """The objective's groups; those of its backbone split by the rates and the freezing that the settings ask for."""
    groups, until, ramp = objective.param_groups(), config.freeze_backbone_until, config.unfreeze_ramp
    if (config.layer_decay, config.patch_embed_lr, until, ramp) == (1, 1, 0, 0):
        return groups
    encoder = objective.encoder

    def lr_scale(name: str) -> float:
        inner = name.removeprefix("encoder.")
        if inner == name:
            return 1.0
        scale = config.layer_decay ** (encoder.num_layers + 1 - encoder.layer_of(inner))
        return scale * config.patch_embed_lr if encoder.is_patch_embedding(inner) else scale

    found = []
    for group in objective.split_by_lr(groups, lr_scale):
        parts: tuple[list[Any], list[Any]] = ([], [])
        for name, parameter in group.params:
            inner = name.removeprefix("encoder.")
            # The convolutions before a hybrid's patches are a trained network too.
            is_frozen = inner != name and (not encoder.is_patch_embedding(inner) or ".backbone." in inner)
            parts[is_frozen].append((name, parameter))
        thawed = {"freeze_until": max(group.freeze_until, until), "unfreeze_ramp": ramp}
        found += [replace(group, params=parts[0]), replace(group, params=parts[1], **thawed)]
    return found


def set_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, progress: float, batch_size: int
) -> dict[str, float]:
    """Write learning rate and weight decay for this point of the run into the optimizer's groups.

    Frozen groups lose their gradients, so that neither decay nor moments touch them.

    Returns:
        The unscaled "lr" and "weight_decay", for the log.
    """
    lr = config.lr_at(progress, batch_size)
    end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
    weight_decay = cosine(progress, config.weight_decay, end)
    for group in optimizer.param_groups:
        since = progress - group["freeze_until"]
        # A checkpoint of an earlier version knows no ramp.
        group["lr"] = lr * group["lr_scale"] * warmup_linear(max(since, 0.0), group.get("unfreeze_ramp", 0.0), 0.0, 1.0)
        group["weight_decay"] = weight_decay * group["weight_decay_scale"]
        if progress < group["freeze_until"]:
            for parameter in group["params"]:
                parameter.grad = None
    return {"lr": lr, "weight_decay": weight_decay}


def clip_groups(objective: Objective, config: OptimConfig) -> list[list[torch.nn.Parameter]]:
    """Trainable parameters in the groups that `clip_over` names; looked up once, after the model was prepared."""
    named = [(name, parameter) for name, parameter in objective.named_parameters() if parameter.requires_grad]
    if config.clip_grad is None or config.clip_over == "all":
        return [[parameter for _, parameter in named]]
    if config.clip_over == "parameter":
        return [[parameter] for _, parameter in named]
    modules: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        # A token of the objective (mask token) is clipped with the encoder that it is fed to.
        modules.setdefault(name.split(".")[0] if "." in name else "encoder", []).append(parameter)
    return list(modules.values())


def clip_gradients(groups: list[list[torch.nn.Parameter]], clip_grad: float | None) -> Float[Tensor, ""]:
    """Scale the gradients of each group down to the norm `clip_grad`; None leaves them.

    Returns:
        The norm of all gradients together before clipping, the same on all processes; not finite if one of them is
        not.
    """
    foreach: Any = torch
    found = [[parameter.grad for parameter in group if parameter.grad is not None] for group in groups]
    gradients = [group for group in found if group]
    each = torch.stack(foreach._foreach_norm([gradient for group in gradients for gradient in group]))
    if isinstance(each, DTensor):  # the norms of this process's shards only
        each = each.full_tensor()
    if clip_grad is not None:
        sizes = [len(group) for group in gradients]
        norms = each if max(sizes) == 1 else torch.stack([part.norm() for part in each.split(sizes)])
        scales = (clip_grad / (norms + 1e-6)).clamp(max=1.0)
        for group, scale in zip(gradients, scales.unbind(), strict=True):
            foreach._foreach_mul_(group, scale)
    return each.norm()
