"""Attentive probe: one cross-attention block and a linear layer on the frozen patch tokens of a backbone.

    accelerate launch scripts/attentive_probe.py --encoder.pretrained runs/NAME --data.source LABELLED \\
        --evaluation.test_source TEST

MAE's class token hides what its patch tokens know; this probe finds it. Probes of several learning rates are trained at
once, and the best is picked on a tenth of the training images. Without a test source a fifth of them is held out.
Saves and resumes as pre-training does; `--help-all` lists all settings.
"""

import sys

from ssl_vit.core.front import handle_signals

if __name__ == "__main__":
    handle_signals()

from ssl_vit.evaluation.evaluate import EvaluationConfig
from ssl_vit.objectives.finetune import AttentiveConfig
from ssl_vit.training import supervised
from ssl_vit.training.config import BatchConfig, RunConfig
from ssl_vit.training.loop import main
from ssl_vit.training.optim import OptimConfig

DEFAULTS = RunConfig(
    objective=AttentiveConfig(),
    epochs=20,
    optim=OptimConfig(base_lr=1e-3, warmup=0.05, weight_decay=0.01, betas=(0.9, 0.999)),
    batch=BatchConfig(size=256),
    evaluation=EvaluationConfig(max_images=None),
)

if __name__ == "__main__":
    sys.exit(main(DEFAULTS, ending=supervised))
