"""Look at your images before you train on them: faults, mean and deviation, rates, memory, and what would spoil a run.

python scripts/doctor.py SOURCE                                      any source that pre-training takes
python scripts/doctor.py SOURCE --objective dino --config FILE       and the run that a config would make of it

Settings of scripts/pretrain_OBJECTIVE.py or distill.py may follow SOURCE, as --encoder.image_size 96. Ends with code 1
where something would stop or spoil a run, and with 2 where settings or source cannot be used.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ssl_vit.core.front import FlagParser, handle_signals, stoppable

if __name__ == "__main__":
    handle_signals()

from ssl_vit.doctor.command import examine

FRONTS = {
    path.stem.removeprefix("pretrain_"): path.stem
    for pattern in ("pretrain_*.py", "distill.py")
    for path in sorted(Path(__file__).parent.glob(pattern))
}


@stoppable()
def main(args: Sequence[str] | None = None) -> int:
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "source", metavar="SOURCE", help="folder, parquet file or glob, saved or hub data set, openmoji"
    )
    parser.add_argument("--objective", choices=FRONTS, default="mae", help="what to train [mae]")
    parser.add_argument("--sample", type=_sample, default=1000, help="images to read, or all [1000]")
    parser.add_argument(
        "--step",
        choices=("auto", "true", "false"),
        default="auto",
        help="measure a training step [with a GPU, or up to 50 M trainable parameters]",
    )
    parser.add_switch("--json", "print JSON and nothing else")
    parser.add_argument("--write_config", type=Path, metavar="FILE", help="new YAML for the --config of pre-training")
    given, settings = parser.parse_known_args(args)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    return examine(
        importlib.import_module(f"scripts.{FRONTS[given.objective]}").DEFAULTS,
        [*settings, f"--data.source={given.source}"],
        sample=given.sample,
        step=given.step,
        as_json=given.json,
        config_file=given.write_config,
        front=FRONTS[given.objective],
    )


def _sample(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number of images of at least 1, or all")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
