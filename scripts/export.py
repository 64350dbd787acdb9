"""Export the backbone, or the fine-tuned classifier, of a run's newest checkpoint: python scripts/export.py RUN."""

import argparse
import sys
from pathlib import Path

from ssl_vit.export.run import export_run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    try:
        print(f"Wrote {export_run(parser.parse_args().run)} (+ config.json)")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
