import pytest

from ssl_vit.evaluation.start import fallen, first_fall, what_to_change

LINES = [
    {"step": 0, "eval_knn": 0.8, "eval_linear": 0.9},
    {"step": 10, "eval_knn": 0.79, "eval_linear": 0.9},
    {"step": 20, "eval_knn": 0.7, "eval_linear": 0.9},
    {"step": 30, "eval_knn": 0.6, "eval_linear": 0.5},
]


def test_a_fall_is_what_chance_does_not_explain() -> None:
    assert fallen(LINES[1], LINES[0], 1000) is None
    words = fallen(LINES[2], LINES[0], 1000)
    assert words == (
        "k-NN is 70.0 %, 10.0 points below the weights that the run started from (95 % interval -13.7 to -6.2)"
    )
    assert fallen(LINES[2], LINES[0], 50) is None  # few images
    assert "the linear probe is 50.0 %" in (fallen({"eval_linear": 0.5}, LINES[0], 1000) or "")


def test_the_first_fall_is_told_and_none_without_a_start() -> None:
    fall = first_fall(LINES, 1000)
    assert fall is not None
    assert fall[0] == 20
    assert first_fall(LINES[:2], 1000) is None
    assert first_fall(LINES[1:], 1000) is None
    assert first_fall([], 1000) is None


@pytest.mark.parametrize(
    ("optim", "objective", "words", "others"),
    [
        (
            {"base_lr": 5e-4, "freeze_backbone_until": 0.0, "layer_decay": 1.0},
            {"anchor": "none"},
            ["optim.base_lr (0.0005", "freeze_backbone_until 0.1", "objective.anchor gram", "optim.layer_decay 0.9"],
            ["anchor_weight"],
        ),
        (
            {"base_lr": 5e-5, "freeze_backbone_until": 0.1, "layer_decay": 1.0},
            {"anchor": "gram", "anchor_weight": 1.0, "layer_decay": 0.9},
            ["raise objective.anchor_weight (1.0)"],
            ["freeze_backbone_until", "anchor gram", "layer_decay"],
        ),
        ({"base_lr": 1e-3}, {}, ["freeze_backbone_until", "layer_decay"], ["anchor"]),
    ],
)
def test_advice_follows_from_what_is_set(optim: dict, objective: dict, words: list[str], others: list[str]) -> None:
    advice = what_to_change(optim, objective)
    assert all(word in advice for word in words)
    assert not any(word in advice for word in others)
