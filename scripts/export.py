"""Export what a run has learned, at any time, for other libraries; each file is loaded and compared before it is there.

python scripts/export.py RUN                                            backbone.safetensors, into the run's folder
python scripts/export.py RUN --to timm transformers --out exported      exported/timm and exported/transformers
python scripts/export.py vit_small_patch16_224.dino --out public/dino   published weights, to be judged beside your own
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ssl_vit.core.front import FlagParser, handle_signals, stoppable

if __name__ == "__main__":
    handle_signals()

from ssl_vit.export.command import export


@stoppable()
def main(args: Sequence[str] | None = None) -> int:
    parser = FlagParser(description=__doc__)
    parser.add_argument("path", type=Path, help="folder of a run, of a checkpoint or an export; or published weights")
    parser.add_argument("--to", nargs="+", metavar="LIBRARY", help="timm transformers torchvision onnx torch_export")
    parser.add_argument(
        "--out",
        "--output",
        dest="out",
        type=Path,
        help="folder in which each library gets one of its name [PATH/exported]",
    )
    parser.add_argument(
        "--weights",
        help="teacher (default) or student of DINO and DINOv2; best; average-last-K, of K checkpoints",
    )
    parser.add_argument("--images", "--data.source", metavar="SOURCE", help="images to compare on [generated ones]")
    parser.add_open_source()
    parser.add_argument("--license", default="unknown", help="the weights' licence for the model card, as apache-2.0")
    parser.add_switch("--overwrite", "replace what is in the folders of OUT")
    parser.add_argument("--push_to_hub", metavar="NAMESPACE/NAME", help="upload the one library's folder to the hub")
    parser.add_switch("--private", "make the hub's repository a private one")
    return export(parser.parse_args(args))


if __name__ == "__main__":
    sys.exit(main())
