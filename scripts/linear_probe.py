"""Linear probe on the frozen features of a backbone, and classification from few labels.

    python scripts/linear_probe.py runs/NAME --source LABELLED [--test_source TEST] [--protocol mae] [--logistic true]

A head is trained for each learning rate and kind of feature (--probe.*). The best one is picked on a part of the
training images, never on those that are scored. `--protocol` is dinov2 (a grid of heads, SGD) or mae (batch norm,
LARS). Without a test source the accuracy is cross-validated.
"""

import sys

from ssl_vit.core.front import FlagParser, handle_signals

if __name__ == "__main__":
    handle_signals()

from ssl_vit.evaluation.command import main
from ssl_vit.evaluation.linear_probe import PRESETS
from ssl_vit.evaluation.probes import LinearConfig, evaluate_linear

if __name__ == "__main__":
    preset = FlagParser(add_help=False)
    preset.add_argument("--protocol", choices=sorted(PRESETS), default="dinov2")
    given, rest = preset.parse_known_args()
    sys.exit(main(evaluate_linear, {"": LinearConfig(), "probe": PRESETS[given.protocol]}, __doc__, rest))
