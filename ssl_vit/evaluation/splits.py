"""Choose the rows of labelled sources that an evaluation learns from and tests on."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
from jaxtyping import Bool, Int

from ssl_vit.data.sources.source import Source
from ssl_vit.evaluation.scores import class_name
from ssl_vit.runs.provenance import fingerprint

TEST_FOLDS = 5
"""Without a test source one image in so many is tested."""
PICK_FOLDS = 10
"""One training image in so many picks among several heads."""
_NUM_COMPARED = 16  # images whose bytes show that two sources are the same


class Split(NamedTuple):
    """Rows of the sources that an evaluation learns from and tests on, and their classes."""

    rows: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    test_rows: Int[np.ndarray, " m"] | None
    """None: there is no test source."""
    test_labels: Int[np.ndarray, " m"] | None
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def scored_labels(self) -> Int[np.ndarray, " s"]:
        """Labels of the images that are scored: the test set, or without one all images."""
        return self.labels if self.test_labels is None else self.test_labels

    def keep(self, places: Int[np.ndarray, " k"]) -> "Split":
        """Keep some of the rows to learn from."""
        return self._replace(rows=self.rows[places], labels=self.labels[places])

    def keep_test(self, places: Int[np.ndarray, " k"]) -> "Split":
        """Keep some of the rows to test on."""
        assert self.test_rows is not None
        assert self.test_labels is not None
        return self._replace(test_rows=self.test_rows[places], test_labels=self.test_labels[places])


def split_sources(
    train_source: Source,
    test_source: Source | None,
    max_images: int | None,
    seed: int = 0,
    setting: str = "evaluation.source",
) -> Split:
    """Choose labelled images to learn from and to test on; of pages or tiles of one file only the first.

    Test labels are those of the training source; see `align_classes`.

    Args:
        max_images: a seeded random subset of at most so many of each source, each class with its share; None = all.
        setting: setting that named the training source, for error messages.

    Raises:
        ValueError: no labels, fewer than two classes, classes in the test set that the training set lacks, or no test
            set and no class with more than one image.
    """
    labels = _labels(train_source, setting)
    rows = _subset(train_source, labels, max_images, seed)
    shown = f"{setting}={train_source.name!r}"
    counts = np.bincount(labels[rows])
    if (counts > 0).sum() == 1:
        raise ValueError(
            f"{shown}: all {len(rows)} labelled images are of class "
            f"{class_name(int(counts.argmax()), train_source.class_names)!r}: an evaluation needs at least two classes"
        )
    if test_source is None:
        if counts.max() < 2:
            raise ValueError(
                f"{shown}: each of the {len(rows)} labelled images has a class of its own, so none can be predicted "
                "from another one. If the labels are identifiers, name the column of classes in data.label_column; "
                "else name a test source, or raise evaluation.max_images where it is set"
            )
        return Split(rows, labels[rows], None, None, train_source.class_names)
    test_source = align_classes(train_source, test_source)
    test_labels = _labels(test_source, "evaluation.test_source")
    test_rows = _subset(test_source, test_labels, max_images, seed)
    if len(test_rows) == 0:
        raise ValueError("no image of the test set has a label: test on a labelled source")
    missing = np.setdiff1d(test_labels[test_rows], labels[rows])
    if len(missing):
        names = _listed([class_name(label, train_source.class_names) for label in missing.tolist()])
        raise ValueError(
            f"the test set has classes that the training set lacks: {names}; add labelled images of them to the "
            "training source, or raise evaluation.max_images where it is set"
        )
    return Split(rows, labels[rows], test_rows, test_labels[test_rows], train_source.class_names)


def check_apart(train_source: Source, test_source: Source | None, prefix: str = "evaluation.test_") -> None:
    """Refuse to test on the very images that are learned from, by whatever names they were given.

    Args:
        prefix: in front of the settings `source` and `split` that name the test images, for the error.

    Raises:
        ValueError: both sources have as many images with the same names and sizes, and a few hold the same bytes.
    """
    if test_source is None or len(train_source) != len(test_source):
        return
    # Uncompressed files that are numbered alike have names and sizes in common, so bytes decide.
    rows = np.linspace(0, len(train_source) - 1, min(len(train_source), _NUM_COMPARED)).round().astype(int).tolist()
    if fingerprint(train_source) == fingerprint(test_source) and all(
        _encoded(train_source, row) == _encoded(test_source, row) for row in rows
    ):
        raise ValueError(
            f"the test images {test_source.name!r} are the images that are learned from, so their score says nothing "
            f"about others: name others with {prefix}source or {prefix}split, or leave both out, and each image is "
            "judged by what was learned without it"
        )


def _encoded(source: Source, row: int) -> bytes | None:
    try:
        return source.encoded(row)
    except (ValueError, OSError):
        return None


def align_classes(train_source: Source, test_source: Source) -> Source:
    """Give the test source the classes of the training source, matched by name in any Unicode form.

    Raises:
        ValueError: the test source has images of classes that the training source lacks.
    """
    names, test_names = train_source.class_names, test_source.class_names
    if test_source.labels is None or not names or not test_names or names == test_names:
        return test_source
    number = {normalize("NFC", name): index for index, name in enumerate(names)}
    wanted = [normalize("NFC", name) for name in test_names]
    present = np.unique(test_source.labels[test_source.labels >= 0])
    unknown = [test_names[label] for label in present.tolist() if wanted[label] not in number]
    if unknown:
        raise ValueError(
            f"evaluation.test_source={test_source.name!r}: has classes that the training source "
            f"{train_source.name!r} lacks: {_listed(unknown)}; there it is {_listed(names)}: rename them, or add "
            "labelled images of them to the training source"
        )
    found = np.array([number.get(name, -1) for name in wanted], dtype=np.int64)
    labels = np.where(test_source.labels >= 0, found[test_source.labels], -1)
    return replace(test_source, labels=labels, class_names=names)


def independent_rows(labels: Int[np.ndarray, " n"], groups: Int[np.ndarray, " n"] | None) -> Int[np.ndarray, " r"]:
    """Labelled rows in ascending order, only the first one of each group."""
    rows = np.flatnonzero(labels >= 0)
    if groups is None:
        return rows
    return rows[np.sort(np.unique(groups[rows], return_index=True)[1])]


def stratified_folds(
    labels: Int[np.ndarray, " n"], groups: Int[np.ndarray, " n"] | None, num_folds: int, seed: int
) -> Int[np.ndarray, " n"]:
    """Deal rows into folds at random but evenly, in total and in each class.

    Groups are dealt whole, by the label of their first row. Numbers of groups, in total and of a class, differ by at
    most one between folds; a class with fewer groups than folds is missing from some of them.

    Args:
        labels: class of each row.
        groups: rows with the same number stay together; None = every row is its own group.
        num_folds: number of folds.
        seed: decides which group goes where.

    Returns:
        the fold of each row, 0 to `num_folds` - 1.
    """
    groups = np.arange(len(labels)) if groups is None else groups
    _, first, group_of_row = np.unique(groups, return_index=True, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(first))
    order = order[np.argsort(labels[first][order], kind="stable")]
    fold_of_group = np.empty(len(first), dtype=np.int64)
    # Count on from class to class, or fold 0 would get the remainders of many small classes.
    fold_of_group[order] = np.arange(len(first)) % num_folds
    return fold_of_group[group_of_row]


def held_out_rows(
    labels: Int[np.ndarray, " n"], groups: Int[np.ndarray, " n"] | None, num_folds: int, seed: int
) -> Bool[np.ndarray, " n"]:
    """Mark one fold of `stratified_folds`, without classes that are in this fold alone: nothing could learn them."""
    chosen = stratified_folds(labels, groups, num_folds, seed) == 0
    return chosen & np.isin(labels, labels[~chosen])


def _subset(source: Source, labels: np.ndarray, max_images: int | None, seed: int) -> np.ndarray:
    """At most `max_images` independent rows, drawn at random, each class with its share."""
    rows = independent_rows(labels, source.groups)
    if max_images is None or len(rows) <= max_images:
        return rows
    rows = np.random.default_rng(seed).permutation(rows)
    rows = rows[np.argsort(labels[rows], kind="stable")]
    return np.sort(rows[np.arange(max_images) * len(rows) // max_images])


def _labels(source: Source, setting: str) -> np.ndarray:
    if source.labels is None or not (source.labels >= 0).any():
        raise ValueError(
            f"{setting}={source.name!r}: has no labels, and evaluating needs them: "
            f"{source.unlabelled or 'name a labelled source'}"
        )
    return source.labels


def _listed(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
