"""Fine-tune a backbone on labelled images, all of its weights, with MAE's recipe.

    accelerate launch scripts/finetune.py --encoder.pretrained runs/NAME --data.source LABELLED \\
        --evaluation.test_source TEST

Saves and resumes as pre-training does; `--help-all` lists all settings, configs/finetune_*.yaml are presets.
Without a test source a fifth of the images is held out. Ends with a timm classifier and its accuracy.
"""

import sys

from ssl_vit.core.front import handle_signals

if __name__ == "__main__":
    handle_signals()

from ssl_vit.evaluation.evaluate import EvaluationConfig
from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.finetune import FineTuneConfig
from ssl_vit.training import supervised
from ssl_vit.training.config import BatchConfig, RunConfig
from ssl_vit.training.loop import main
from ssl_vit.training.optim import OptimConfig

# The paper's setting for ViT-B/16 on ImageNet-1k.
DEFAULTS = RunConfig(
    objective=FineTuneConfig(),
    epochs=100,
    encoder=EncoderConfig(drop_path_rate=0.1),
    optim=OptimConfig(base_lr=5e-4, min_lr=1e-6, warmup=0.05, weight_decay=0.05, betas=(0.9, 0.999)),
    batch=BatchConfig(size=1024),
    evaluation=EvaluationConfig(max_images=None),
)

if __name__ == "__main__":
    sys.exit(main(DEFAULTS, ending=supervised))
