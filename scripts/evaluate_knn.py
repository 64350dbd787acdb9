"""Weighted k-NN on the frozen features of a backbone.

    python scripts/evaluate_knn.py runs/NAME --source LABELLED [--test_source TEST]

Without a test source the accuracy is cross-validated.
"""

import sys

from ssl_vit.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main("knn", __doc__))
