"""What an objective says of itself, where it is stored and who asks for its name."""

import ast
from pathlib import Path

import pytest

import ssl_vit
from ssl_vit.objectives import dino, dinov2, finetune, mae
from ssl_vit.objectives.objective import Objective
from ssl_vit.objectives.stored import config_class, with_traits

FILE = Path("state.json")
OBJECTIVES = (mae.MAE, dino.DINO, dinov2.DINOv2, finetune.FineTune, finetune.AttentiveProbe)
PACKAGE = Path(ssl_vit.__file__).parent
# The card knows the papers, and the benchmarks compare with other libraries' code of the same names.
MAY_NAME = ("objectives/", "benchmarks/", "export/card.py")


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.__name__)
def test_files_without_traits_are_read_as_what_their_objective_says(objective: type[Objective]) -> None:
    pooled = getattr(objective, "pooled", "cls")  # of a fine-tuning it is a setting
    stored = with_traits({"objective": objective.__name__}, FILE)
    if stored["leaves"] == "backbone":
        assert stored["pooled"] == pooled
    assert (stored["leaves"], stored["reconstructs"]) == (objective.leaves, objective.reconstructs)


def test_stored_traits_win_over_the_name() -> None:
    found = with_traits({"objective": "MAE", "pooled": "cls", "reconstructs": False}, FILE)
    assert (found["pooled"], found["reconstructs"]) == ("cls", False)


@pytest.mark.parametrize("wrong", [{"pooled": "max"}, {"leaves": None}, {"reconstructs": "yes"}, {"pooled": ["cls"]}])
def test_traits_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=rf"^state.json: {next(iter(wrong))}="):
        with_traits({"objective": "MAE", **wrong}, FILE)


def test_settings_are_found_by_the_objectives_name() -> None:
    assert config_class("DINOv2") is dinov2.DINOv2Config
    assert config_class("FineTune") is finetune.FineTuneConfig
    assert (config_class("os.path"), config_class("Nothing"), config_class("stored")) == (None, None, None)


def test_nobody_else_asks_for_the_name_of_an_objective() -> None:
    names = {objective.__name__ for objective in OBJECTIVES}
    asking = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.value}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not str(path.relative_to(PACKAGE)).startswith(MAY_NAME)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert asking == []
