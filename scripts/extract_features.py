"""Features of any source into one file: parquet or safetensors, one row for each image, in the order of the source.

    python scripts/extract_features.py runs/NAME --source IMAGES --output features.parquet

Memory stays flat however many images there are, and the same command goes on where it was killed. Several processes:
start it with `accelerate launch`. Read the file with `pandas.read_parquet`, `datasets.load_dataset("parquet", ...)` or
`safetensors.torch.load_file`.
"""

import sys

from ssl_vit.core.front import handle_signals

if __name__ == "__main__":
    handle_signals()

from ssl_vit.evaluation.command import main
from ssl_vit.evaluation.extract import ExtractConfig, extract

if __name__ == "__main__":
    sys.exit(main(extract, {"": ExtractConfig}, __doc__))
