"""Nothing unpickles more than tensors, and nothing runs code that came with data or weights."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ssl_vit.data.sources.source import DataConfig, open_source
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.weights.pretrained import load_pretrained
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


EVIL = "from pathlib import Path\n(Path(__file__).parent / 'was_run').touch()\n"


def test_code_beside_a_data_set_or_of_its_name_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(EVIL)
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    for source in ("evil", "evil.py", "./evil", str(tmp_path / "evil")):
        with pytest.raises(ValueError, match=r"data\.source="):
            open_source(DataConfig(source=source))
    assert list(tmp_path.rglob("was_run")) == []


def test_code_that_comes_with_weights_is_not_run(tmp_path: Path) -> None:
    """What transformers would import with trust_remote_code."""
    described = {"model_type": "vit", "auto_map": {"AutoModel": "modeling_evil.Evil"}, "architectures": ["Evil"]}
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "modeling_evil.py").write_text(EVIL)
    save_file({"embeddings.cls_token": torch.zeros(1, 1, 192)}, tmp_path / "model.safetensors")
    encoder = EncoderConfig(arch="vit_tiny_patch16_224", depth=1).build()
    with pytest.raises(ValueError, match="does not fit"):
        load_pretrained(encoder, str(tmp_path))
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("arch", ["hf-hub:evil/model", "hf_hub:evil/model", "local-dir:evil", "../evil", "/evil"])
def test_an_architecture_names_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    """A config.json or config.yaml of somebody else must not make timm fetch or open anything."""
    (tmp_path / "evil").mkdir()
    described = {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 1}}
    (tmp_path / "evil" / "config.json").write_text(json.dumps(described))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="arch="):
        EncoderConfig(arch=arch).build()
