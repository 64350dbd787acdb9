"""The baseline of a trained backbone: the same architecture with the weights that its training began with."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.objectives.objective import ObjectiveConfig
from ssl_vit.objectives.stored import config_class


def untrained_encoder(encoder: EncoderConfig, objective: ObjectiveConfig | None, seed: int) -> Encoder:
    """Build the encoder that a run with these settings has before its first step if it starts from fresh weights.

    Args:
        objective: its `build` initialises an encoder as its paper does, unless it `keeps_fresh_weights`, which needs no
            teacher that may not be there; None = timm's own initialisation.
    """
    torch.manual_seed(seed)
    built = replace(encoder, pretrained=None).build()
    if objective is None or getattr(objective, "keeps_fresh_weights", False):
        return built
    if getattr(objective, "anchor", "none") != "none":  # to trained weights
        objective = replace(objective, anchor="none")  # pyright: ignore[reportCallIssue, reportArgumentType]
    return objective.build(built).backbone()


def objective_of(provenance: Mapping[str, Any]) -> ObjectiveConfig | None:
    """Settings of the pre-training objective that trained a backbone; None where no pre-training objective did.

    Args:
        provenance: of an export. Settings that this version does not know are dropped, since none of them decides how
            an encoder is initialised.
    """
    kind, settings = config_class(str(provenance.get("objective"))), provenance.get("objective_config")
    if kind is None or settings is None or provenance.get("leaves", "backbone") != "backbone":
        return None
    known = {item.name for item in fields(kind)}
    if "num_classes" in known:  # it learns from labels
        return None
    return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key in known})
