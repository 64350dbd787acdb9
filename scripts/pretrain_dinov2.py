"""Pre-train a vision backbone with DINOv2; without any setting, the quickstart runs.

    accelerate launch scripts/pretrain_dinov2.py --data.source FOLDER --output_dir runs/NAME

`--help-all` lists all settings; configs/ holds files for `--config`.
"""

import sys

from ssl_vit.core.front import handle_signals

if __name__ == "__main__":
    handle_signals()

from ssl_vit.evaluation.evaluate import EvaluationConfig
from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.dinov2 import DINOv2Config
from ssl_vit.training.config import BatchConfig, RunConfig
from ssl_vit.training.loop import main
from ssl_vit.training.optim import OptimConfig

# The setting of the paper's code for ImageNet-1k, on ViT-S/16, but for what follows from your data: `auto`.
DEFAULTS = RunConfig(
    objective=DINOv2Config(
        num_prototypes="auto",
        head_batch_norm="auto",
        teacher_temp="auto",
        teacher_temp_warmup="auto",
        ema_momentum="auto",
        freeze_last_layer="auto",
        koleo_weight="auto",
        blur_sigma="auto",
    ),
    epochs=100,
    encoder=EncoderConfig(
        arch="vit_small_patch16_224", drop_path_rate=0.1, drop_path_schedule="uniform", layer_scale=1e-5
    ),
    optim=OptimConfig(
        base_lr=4e-3,
        lr_scaling="sqrt",
        min_lr=1e-6,
        warmup="auto",
        weight_decay=0.04,
        weight_decay_end=0.4,
        betas=(0.9, 0.999),
        clip_grad=3.0,
        clip_over="module",
    ),
    batch=BatchConfig(size=512),
    evaluation=EvaluationConfig(feature="cls"),
)

if __name__ == "__main__":
    sys.exit(main(DEFAULTS, quickstart="quickstart_dinov2.yaml"))
