import json
from pathlib import Path

import pytest

from ssl_vit.models.vit import ViT
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.objectives.objective import Objective
from ssl_vit.runs.best import best_checkpoint, check_keep_best, is_best_yet, ranked, tidy
from ssl_vit.runs.checkpoint import CheckpointConfig, list_checkpoints, save_checkpoint
from ssl_vit.training.optim import OptimConfig, build_optimizer


@pytest.fixture
def objective(tiny_encoder: ViT) -> Objective:
    return MAEConfig(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2).build(tiny_encoder)


@pytest.fixture
def run(tmp_path: Path, objective: Objective) -> Path:
    """Checkpoints at steps 1 to 5, of which the last was not scored; a score of a step without a checkpoint."""
    optimizer = build_optimizer(objective, OptimConfig())
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, objective, optimizer, {})
    knn = {0: 0.9, 1: 0.3, 2: 0.5, 3: 0.5, 4: 0.4, 7: 0.8}
    lines = [
        {"step": step, "loss": 1 / (1 + step), "rankme": None if step == 2 else 9.0 - step} for step in range(1, 6)
    ]
    lines += [{"step": step, "eval_knn": value} for step, value in knn.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.mark.parametrize(("by", "steps"), [("knn", [2, 3, 4, 1]), ("rankme", [1, 3, 4, 5]), ("loss", [5, 4, 3, 2, 1])])
def test_checkpoints_are_ranked_by_what_the_log_says(run: Path, by: str, steps: list[int]) -> None:
    assert [best.step for best in ranked(run, by)] == steps
    assert ranked(run, "none") == ranked(run, "linear") == []


def test_a_damaged_one_is_not_the_best(run: Path) -> None:
    best = best_checkpoint(run, "knn")
    assert best is not None
    assert best.to_plain() == {"by": "knn", "value": 0.5, "step": 2}
    assert str(best) == "step 2, knn 50.0 %"
    (best.folder / "model.safetensors").write_bytes(b"")
    assert best_checkpoint(run, "knn").step == 3
    assert best_checkpoint(run, "linear") is None


def test_a_score_is_compared_with_checkpoints_of_other_steps(run: Path) -> None:
    assert is_best_yet(run, "knn", 7)
    assert is_best_yet(run, "knn", 2) is False  # step 3 is as good
    assert is_best_yet(run, "knn", 4) is False
    assert is_best_yet(run, "knn", 6) is False  # not scored


def test_the_best_is_never_pruned(run: Path) -> None:
    tidy(run, CheckpointConfig(keep=1, keep_best="knn"))
    assert [folder.name[-1] for folder in list_checkpoints(run)] == ["2", "5"]
    tidy(run, CheckpointConfig(keep=1))
    assert [folder.name[-1] for folder in list_checkpoints(run)] == ["5"]


def test_what_is_not_measured_is_refused(objective: Objective) -> None:
    with pytest.raises(ValueError, match=r"^checkpoint.keep_best='knn': there are no labelled images; name some in "):
        check_keep_best(CheckpointConfig(keep_best="knn"), objective, has_labels=False)
    with pytest.raises(ValueError, match=r"^checkpoint.keep_best='rankme': MAE logs none; use knn, linear or loss"):
        check_keep_best(CheckpointConfig(keep_best="rankme"), objective, has_labels=True)
    objective.leaves = "classifier"
    with pytest.raises(ValueError, match=r"^checkpoint.keep_best='loss': a run with labels keeps its last"):
        check_keep_best(CheckpointConfig(keep_best="loss"), objective, has_labels=True)
    check_keep_best(CheckpointConfig(), objective, has_labels=False)
