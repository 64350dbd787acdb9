"""Distil a frozen backbone into any other one on your images, without labels.

    accelerate launch scripts/distill.py --objective.teacher TEACHER --data.source FOLDER --output_dir runs/NAME

TEACHER is what --encoder.pretrained takes: a run's folder, an export, a file of weights or a timm model's name.
`--help-all` lists all settings; configs/ holds files for `--config`.
"""

import sys

from ssl_vit.core.front import handle_signals

if __name__ == "__main__":
    handle_signals()

from ssl_vit.evaluation.evaluate import EvaluationConfig
from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.distill import DistillConfig
from ssl_vit.training.config import BatchConfig, RunConfig
from ssl_vit.training.loop import main
from ssl_vit.training.optim import OptimConfig

# lightly-train's recipe: a rate of 5e-4 for batches of 1,536 and its square-root rule, here written for 1,024.
DEFAULTS = RunConfig(
    objective=DistillConfig(),
    epochs=100,
    encoder=EncoderConfig("vit_small_patch16_224"),
    batch=BatchConfig(size=512),
    optim=OptimConfig(
        base_lr=4.08e-4,
        lr_scaling="sqrt",
        warmup="auto",
        weight_decay=0.04,
        betas=(0.9, 0.999),
        clip_grad=1.0,
    ),
    evaluation=EvaluationConfig(feature="cls"),
)

if __name__ == "__main__":
    sys.exit(main(DEFAULTS))
