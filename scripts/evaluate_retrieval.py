"""Retrieval by the frozen features of a backbone: mean average precision and recall@k.

    python scripts/evaluate_retrieval.py runs/NAME --source GALLERY [--test_source QUERIES]

Without queries each image of the gallery looks for the others of its class.
"""

import sys

from ssl_vit.core.front import handle_signals

if __name__ == "__main__":
    handle_signals()

from ssl_vit.evaluation.command import main
from ssl_vit.evaluation.probes import RetrievalConfig, evaluate_retrieval

if __name__ == "__main__":
    sys.exit(main(evaluate_retrieval, {"": RetrievalConfig()}, __doc__))
