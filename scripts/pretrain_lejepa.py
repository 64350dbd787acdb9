"""Pre-train any backbone with LeJEPA or VISReg; without any setting, the quickstart runs.

    accelerate launch scripts/pretrain_lejepa.py --data.source FOLDER --output_dir runs/NAME

`--help-all` lists all settings; configs/ holds files for `--config`.
"""

import sys

from ssl_vit.core.front import handle_signals

if __name__ == "__main__":
    handle_signals()

from ssl_vit.evaluation.evaluate import EvaluationConfig
from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.lejepa import LeJEPAConfig
from ssl_vit.training.config import BatchConfig, RunConfig
from ssl_vit.training.loop import main
from ssl_vit.training.optim import OptimConfig

# VISReg's recipe for Imagenette: a rate of 1e-3 for batches of 128, and a thousandth of it at the end.
DEFAULTS = RunConfig(
    objective=LeJEPAConfig(blur_sigma="auto"),
    epochs=200,
    encoder=EncoderConfig("vit_small_patch16_224"),
    batch=BatchConfig(size=128),
    optim=OptimConfig(base_lr=2e-3, min_lr=1e-6, warmup="auto", weight_decay=0.05, betas=(0.9, 0.999)),
    evaluation=EvaluationConfig(feature="cls"),
)

if __name__ == "__main__":
    sys.exit(main(DEFAULTS, quickstart="quickstart_lejepa.yaml"))
