"""Linear segmentation on the frozen patch tokens of a backbone: mean IoU.

    python scripts/evaluate_segmentation.py runs/NAME --source SOURCE --mask_column mask [--test_source TEST]
    python scripts/evaluate_segmentation.py runs/NAME --source IMAGES --mask_source MASKS

A mask has one channel whose values are classes; 255 belongs to none. Without a test source a fifth is held out.
"""

import sys

from ssl_vit.core.front import handle_signals

if __name__ == "__main__":
    handle_signals()

from ssl_vit.evaluation.command import main
from ssl_vit.evaluation.segmentation import SegmentationConfig, evaluate_segmentation

if __name__ == "__main__":
    sys.exit(main(evaluate_segmentation, {"": SegmentationConfig()}, __doc__))
