"""The notebooks of docs/ run, and hold the outputs of a whole run."""

import json
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_those_of_a_whole_run(notebook: Path) -> None:
    assert notebook.stat().st_size < 300_000
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    shown = [output["data"] for output in outputs if "data" in output]
    assert any("image/png" in data for data in shown)
    assert any("<table>" in "".join(data.get("text/html", "")) for data in shown)
    text = notebook.read_text()
    assert not re.search(r"/(work|tmp|root|home)/", text)  # nobody's folders


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    book = nbformat.read(notebook, as_version=4)
    nbformat.validate(book)
    settings = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(settings) == 1
    settings[0].source, changed = re.subn(
        r"STEPS, NUM_IMAGES = \d+, \d+", "STEPS, NUM_IMAGES = 2, 150", settings[0].source
    )
    assert changed == 1
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert list(tmp_path.rglob("backbone.safetensors"))
