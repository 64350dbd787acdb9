"""Recipes at equal CPU time: what a list may say, and that a search goes on where it was killed."""

import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from benchmarks import recipes
from benchmarks.flags import defaults_of
from benchmarks.rivals import RIVALS
from ssl_vit.training.config import parse_run
from tests.conftest import ROOT, SMALL_RUN


def write(path: Path, **content: object) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def small_flags(source: Path) -> dict[str, object]:
    return {**dict(flag.removeprefix("--").split("=", 1) for flag in SMALL_RUN), "data.source": str(source)}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"objective": "mae"}, "no mapping with `settings`"),
        ({"objective": "mae", "settings": {"a": "optim.base_lr"}}, "a: 'optim.base_lr' is no mapping of flags"),
        ({"settings": {"a": {}}}, "a: objective=None: use mae"),
        ({"objective": "mae", "settings": {"a": {"objective": "moco"}}}, "a: objective=moco: use mae"),
        ({"objective": "mae", "settings": {"a": {"steps": 3}}}, "a: steps is set by the comparison"),
        ({"objective": "mae", "settings": {"a": {"config": "quickstart_mea"}}}, "a: .*quickstart_mae"),
    ],
)
def test_a_list_that_cannot_be_compared_is_refused(content: dict, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "list.yaml", **content)
    with pytest.raises(ValueError, match=reason):
        recipes.read_list(path)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "lists").iterdir()), ids=lambda path: path.stem)
def test_lists_that_come_along_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for recipe in recipes.read_list(path).values():
        name = RIVALS.get(recipe["objective"], recipe["objective"])
        config = parse_run(defaults_of(name), [*recipes.flags_of(recipe), "--steps=1"])
        assert config.resolve(5000)[0].build_objective().encoder.embed_dim > 0


def test_settings_are_trained_judged_and_kept(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"slow": {}, "fast": {"optim.base_lr": 0.1}, "broken": {"encoder.patch_size": 7}}
    path = write(tmp_path / "list.yaml", objective="mae", flags=small_flags(photo_folder), settings=settings)
    asked = Namespace(list=path, minutes=0.002, seeds=[1], only=["fast"], output_dir=tmp_path / "runs")
    result = recipes.measure(asked, [])
    (run,) = result["runs"]
    config = yaml.safe_load((tmp_path / "runs" / "fast" / "seed1" / "config.yaml").read_text())
    assert (config["seed"], config["optim"]["base_lr"], config["steps"]) == (1, 0.1, run["steps"])
    assert run["images"] == 8 * run["steps"]
    assert run["steps"] == max(1, int(0.12 / run["cpu_seconds_per_step"]))
    table = "\n".join(recipes.as_lines(result))
    accuracy = run["scores"]["trained"]["knn"]["accuracy"]
    assert all(word in table for word in ("fast [1]", "raw pixels", f"{100 * accuracy:.1f} ["))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(recipes, "measure_run", fail)
    kept = tmp_path / "runs" / "fast" / "seed1.json"
    timed = {key: run[key] for key in ("asked", "steps", "images", "cpu_seconds_per_step")}
    whole = kept.read_text()
    kept.write_text(json.dumps(timed))  # as a kill leaves it: the run ends with as many steps
    assert recipes.measure(asked, [])["runs"][0]["scores"] == run["scores"]
    kept.write_text(whole)
    assert recipes.measure(asked, [])["runs"] == json.loads(json.dumps(result["runs"]))
    with pytest.raises(AssertionError, match="trained again"):  # a seed more is not there yet
        recipes.measure(Namespace(**{**vars(asked), "seeds": [1, 2]}), [])
    with pytest.raises(ValueError, match=r"--only none: .* it has broken, fast, slow"):
        recipes.measure(Namespace(**{**vars(asked), "only": ["none"]}), [])


def test_another_config_by_the_same_name_is_another_recipe(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "settings.yaml"
    recipe = {"objective": "mae", "config": str(settings), **small_flags(photo_folder)}
    monkeypatch.setattr(recipes, "TIMED_STEPS", 2)
    for decay in (0.1, 0.2):
        settings.write_text(f"optim: {{weight_decay: {decay}}}\n")
        recipes.run_recipe(recipe, 0, 0.0001, tmp_path / "run")
        config = yaml.safe_load((tmp_path / "run" / "seed0" / "config.yaml").read_text())
        assert config["optim"]["weight_decay"] == decay
    assert len(list((tmp_path / "run").glob("seed0-before-*"))) == 1


def test_several_seeds_are_averaged() -> None:
    scores = {kind: {"accuracy": 0.5, "low": 0.4, "high": 0.6} for kind in ("knn", "linear")}
    run = {"steps": 2, "images": 16, "cpu_seconds_per_step": 4.0, "name": "a"}
    runs = [
        {**run, "seed": seed, "scores": {"trained": {**scores, "knn": {**scores["knn"], "accuracy": knn}}}}
        for seed, knn in ((0, 0.25), (1, 0.75))
    ]
    lines = recipes.as_lines({"runs": runs, "recipes": {"a": {}}})
    assert lines[-1].split() == ["a,", "2", "seeds", "50.0", "(25.0", "to", "75.0)", "50.0", "(50.0", "to", "50.0)"]
    assert lines[1].split()[-2:] == ["16", "2"]


@pytest.mark.parametrize(("config", "reason"), [("nowhere.yaml", "nowhere.yaml"), ("quickstart_mea", "quickstart_mae")])
def test_a_config_that_is_not_there_is_named(config: str, reason: str, photo_folder: Path, tmp_path: Path) -> None:
    with pytest.raises((ChildProcessError, ValueError), match=reason):
        recipes.run_recipe({"objective": "mae", "config": config, **small_flags(photo_folder)}, 0, 0.001, tmp_path)


def test_a_run_that_fails_is_named(photo_folder: Path, tmp_path: Path) -> None:
    flags = {"objective": "mae", **small_flags(photo_folder), "encoder.patch_size": 7}
    with pytest.raises(ChildProcessError, match="no multiple of 7"):
        recipes.run_recipe(flags, 0, 0.001, tmp_path / "broken")


@pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="needs lightly")
@pytest.mark.parametrize("name", RIVALS)
def test_an_example_of_lightly_is_judged_as_our_runs_are(name: str, photo_folder: Path, tmp_path: Path) -> None:
    small = {key: value for key, value in small_flags(photo_folder).items() if not key.startswith("objective.")}
    flags = {"objective": name, **small, "evaluation.max_images": 20}
    if name != "lightly_mae":
        flags |= {"objective.local_crop_size": 16, "encoder.patch_size": 4}  # blocks are masked in a grid of 8 x 8
    found = recipes.run_recipe(flags, 0, 0.1, tmp_path / "run")
    assert found["images"] == found["steps"] * 40  # a batch is larger than the set
    assert 0 <= found["scores"]["trained"]["linear"]["accuracy"] <= 1
    assert recipes.run_recipe(flags, 0, 0.1, tmp_path / "run") == found
