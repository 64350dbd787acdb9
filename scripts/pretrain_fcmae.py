"""Pre-train a ConvNeXt V2 (or V1) with FCMAE, its masked autoencoder; without any setting, the quickstart runs.

    accelerate launch scripts/pretrain_fcmae.py --data.source FOLDER --output_dir runs/NAME

`--help-all` lists all settings; configs/ holds files for `--config`.
"""

import sys

from ssl_vit.core.front import handle_signals

if __name__ == "__main__":
    handle_signals()

from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.fcmae import FCMAEConfig
from ssl_vit.training.config import RunConfig
from ssl_vit.training.loop import main
from ssl_vit.training.optim import OptimConfig

# The paper's setting on ImageNet-1k; the batch and the length are yours to set.
DEFAULTS = RunConfig(
    objective=FCMAEConfig(),
    epochs=800,
    encoder=EncoderConfig("convnextv2_tiny"),
    optim=OptimConfig(base_lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95), warmup=0.05),
)

if __name__ == "__main__":
    sys.exit(main(DEFAULTS, quickstart="quickstart_fcmae.yaml"))
