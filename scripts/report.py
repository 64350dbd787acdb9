"""Write one HTML file about a run, or several side by side: how it goes, curves, figures, scores, settings.

python scripts/report.py RUN                   RUN/report.html; a run that still trains may be looked at too
python scripts/report.py RUN_A RUN_B           which is better, in RUN_A/report.html unless --out says otherwise

The file holds everything it shows and asks the network for nothing.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ssl_vit.core.front import FlagParser, handle_signals, stoppable

if __name__ == "__main__":
    handle_signals()

from ssl_vit.core.text import plain
from ssl_vit.core.writing import FAULTS, report_error
from ssl_vit.runs.record import read_run
from ssl_vit.visualize.comparison import compare
from ssl_vit.visualize.report import distinct, write_report
from ssl_vit.visualize.verdict import assess


@stoppable()
def main(args: Sequence[str] | None = None) -> int:
    parser = FlagParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, finished or not")
    parser.add_argument(
        "--out", "--output", dest="out", type=Path, help="the file to write [report.html in the first run's folder]"
    )
    parser.add_argument("--panel_images", type=int, default=3, help="images of the panel; 0 leaves it out [3]")
    parser.add_argument("--data.source", dest="source", metavar="SOURCE", help="whose images the panels show")
    parser.add_open_source()
    given = parser.parse_args(args)
    out = given.out or given.runs[0] / "report.html"
    try:
        notes = write_report(
            given.runs, out, num_images=given.panel_images, source=given.source, asked=given.open_source
        )
        runs = [read_run(folder) for folder in given.runs]
    except FAULTS as error:
        return report_error(error)
    names = distinct([run.name for run in runs])
    for name, run in zip(names, runs, strict=True):
        verdict = assess(run)
        print(plain(f"{name}: {verdict.word}. {verdict.reasons[0]}"))
    for sentence in compare(runs, names):
        print(plain(sentence))
    for note in notes:
        print(f"note: {plain(note)}")
    print(f"{plain(out)}   {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
