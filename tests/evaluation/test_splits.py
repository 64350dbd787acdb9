from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from ssl_vit.data.sources.source import DataConfig, open_source
from ssl_vit.evaluation.splits import align_classes, check_apart, held_out_rows, split_sources, stratified_folds
from tests.evaluation.test_evaluate import source


def test_only_the_first_labelled_row_of_a_group_counts():
    labels = np.repeat(np.arange(40) % 2, 3)
    labels[0] = -1
    split = split_sources(source(labels, groups=np.repeat(np.arange(40), 3)), None, max_images=None)
    assert np.array_equal(split.rows, np.concatenate([[1], np.arange(3, 120, 3)]))
    assert np.array_equal(split.labels, labels[split.rows])


def test_other_bytes_under_the_same_names_and_sizes_are_other_images(tmp_path: Path) -> None:
    """Uncompressed images that are numbered alike differ in their bytes alone."""
    for split, level in (("a", 0), ("b", 100), ("c", 0)):
        for kind in ("x", "y"):
            (tmp_path / split / kind).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (8, 8), (level, number, 0)).save(tmp_path / split / kind / f"{number}.bmp")
    a, b, c = (open_source(DataConfig(str(tmp_path / split))) for split in "abc")
    check_apart(a, b)
    check_apart(a, None)
    with pytest.raises(ValueError, match=r"are learned from.* name others with evaluation.test_source or"):
        check_apart(a, c)


def test_classes_are_matched_however_their_letters_are_composed():
    train, test = source([0, 1], names=("caf\u00e9", "pub")), source([0, 1, -1], names=("pub", "cafe\u0301"))
    aligned = align_classes(train, test)
    assert aligned.labels is not None
    assert (aligned.labels.tolist(), aligned.class_names) == ([1, 0, -1], train.class_names)


def test_classes_of_the_test_set_are_matched_by_name():
    train = source([0, 1, 2] * 4)
    for labels, names, expected in (
        ([0, 1, 1, -1], ("b", "c"), [1, 2, 2]),  # lacks the first class
        ([0, 1, 2], ("c", "a", "b"), [2, 0, 1]),  # another order
        ([0, 3], ("a", "d", "e", "b"), [0, 1]),  # names without images
    ):
        split = split_sources(train, source(labels, names=names), max_images=None)
        assert split.test_labels is not None
        assert split.test_labels.tolist() == expected
        assert split.class_names == ("a", "b", "c")


def test_one_image_of_each_class_is_enough_to_learn_from_where_there_is_a_test_set():
    split = split_sources(source([0, 1, 2]), source([2, 2]), max_images=None)
    assert split.test_labels is not None
    assert split.test_labels.tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"each of the 3 labelled images.*raise evaluation\.max_images"):
        split_sources(source([0, 1, 2] * 4), None, max_images=3)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (
            ["a.png", "b.png"],
            "images lie in .* itself, and classes are the folders that images lie in; classes are folders, one",
        ),
        (["cat/a.png", "cat/deep/b.png"], "all images lie in one folder, .*cat; name that one"),
        (["cat/a.png", "dog/b.png", "stray.png"], "1 image, such as stray.png, lies beside the folders of"),
    ],
)
def test_why_a_folder_has_no_labels(tmp_path: Path, files: list[str], why: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / file)
    with pytest.raises(ValueError, match=rf"^data.source='.*': has no labels, and evaluating needs them: {why}"):
        split_sources(open_source(DataConfig(str(tmp_path))), None, None, setting="data.source")


def test_why_columns_are_no_labels(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    rows = {"image": [Image.new("RGB", (4, 4))] * 2, "species": ["a", "b"]}
    kinds = datasets.Features({"image": datasets.Image(), "species": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, kinds).to_parquet(str(file))
    for given in (str(file), {str(file): 1.0, str(tmp_path): 1.0}):
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
        why = "there are species: name one in data.label_column" if isinstance(given, str) else "none of the sources"
        with pytest.raises(ValueError, match=why):
            split_sources(open_source(DataConfig(given)), None, None)


def test_folds_are_even_in_size_and_in_class():
    labels = np.random.default_rng(0).choice(6, size=203, p=[0.4, 0.3, 0.2, 0.08, 0.01, 0.01])
    folds = stratified_folds(labels, None, 5, seed=0)
    sizes = np.bincount(folds, minlength=5)
    assert sizes.max() - sizes.min() <= 1
    for label in range(6):
        counts = np.bincount(folds[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 1


def test_folds_keep_groups_whole_and_depend_on_the_seed_alone():
    labels = np.repeat(np.arange(4), 30)
    groups = 1000 - np.arange(120) // 4
    folds = stratified_folds(labels, groups, 5, seed=3)
    assert all(len(set(folds[groups == group])) == 1 for group in groups)
    assert np.array_equal(folds, stratified_folds(labels, groups, 5, seed=3))
    assert not np.array_equal(folds, stratified_folds(labels, groups, 5, seed=4))


def test_a_class_that_would_be_held_out_whole_is_learned() -> None:
    labels = np.array([0] * 20 + [1])
    for seed in range(10):
        held_out = held_out_rows(labels, None, 2, seed)
        assert not held_out[-1]
        assert 9 <= held_out.sum() <= 11
