"""Pre-train a Swin, ConvNeXt or Vision Transformer with SimMIM; without any setting, the quickstart runs.

    accelerate launch scripts/pretrain_simmim.py --data.source FOLDER --output_dir runs/NAME

`--help-all` lists all settings; configs/ holds files for `--config`.
"""

import sys

from ssl_vit.core.front import handle_signals

if __name__ == "__main__":
    handle_signals()

from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.simmim import SimMIMConfig
from ssl_vit.training.config import BatchConfig, RunConfig
from ssl_vit.training.loop import main
from ssl_vit.training.optim import OptimConfig

# The paper's setting for Swin-B and 100 epochs of ImageNet-1k, at 192 pixels.
DEFAULTS = RunConfig(
    objective=SimMIMConfig(),
    epochs=100,
    encoder=EncoderConfig("swin_base_patch4_window7_224", image_size=192, model_args={"window_size": 6}),
    batch=BatchConfig(size=2048),
    optim=OptimConfig(base_lr=1e-4, min_lr=1e-5, warmup=0.1, weight_decay=0.05, betas=(0.9, 0.999), clip_grad=5.0),
)

if __name__ == "__main__":
    sys.exit(main(DEFAULTS, quickstart="quickstart_simmim.yaml"))
