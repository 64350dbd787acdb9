"""Nothing unpickles more than tensors, and nothing runs code that came with data or weights."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = sorted([*(ROOT / "ssl_vit").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
# Calls that unpickle, by the end of their dotted name, and the arguments that keep them from it.
UNPICKLING = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
FORBIDDEN = ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load", "torch.hub.load", "eval")


def calls(text: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def faults(text: str) -> list[str]:
    """What a file does that could run code out of data."""
    found = []
    for name, call in calls(text):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in FORBIDDEN:
            found.append(name)
        if name in UNPICKLING:
            argument, value = UNPICKLING[name]
            if given.get(argument) != str(value):
                found.append(f"{name} without {argument}={value}")
        if given.get("trust_remote_code", "False") != "False":
            found.append(f"{name} with trust_remote_code")
        if name == "exec" or given.get("weights_only") == "False":
            found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_code_out_of_data(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(data)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "datasets.load_dataset(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=trusted)",
        "exec(text)",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert len(faults(line)) >= 1
