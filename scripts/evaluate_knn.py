"""Weighted k-NN on the frozen features of a backbone, for several k.

    python scripts/evaluate_knn.py runs/NAME --source LABELLED [--test_source TEST]

Without a test source each image is classified by all others (leave-one-out).
"""

import sys

from ssl_vit.core.front import handle_signals

if __name__ == "__main__":
    handle_signals()

from ssl_vit.evaluation.command import main
from ssl_vit.evaluation.probes import KNNConfig, evaluate_knn

if __name__ == "__main__":
    sys.exit(main(evaluate_knn, {"": KNNConfig()}, __doc__))
