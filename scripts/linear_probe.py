"""Linear probe (logistic regression) on the frozen features of a backbone.

    python scripts/linear_probe.py runs/NAME --source LABELLED [--test_source TEST]

Without a test source the accuracy is cross-validated. The strength of the L2 penalty is chosen on a part of the
training pictures, never on those that are scored.
"""

import sys

from ssl_vit.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main("linear", __doc__))
