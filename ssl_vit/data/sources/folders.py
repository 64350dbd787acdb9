"""A folder of images: which files are images, which folders are splits or classes, and which files are left aside."""

import glob
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssl_vit.core.paths import path_from_text, path_to_text
from ssl_vit.core.writing import is_output, written_files
from ssl_vit.data.config import DataConfig, near_match, setting_error
from ssl_vit.data.decode.formats import IMAGE_SUFFIXES, hint_for
from ssl_vit.data.sources.columns import Labels, encode

# Names of folders that hold a split, and the split.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# With what may follow: `train2017`, `test_set`.
_SPLIT_NAME = re.compile(r"([a-z]+?)(?:[ _-]?(?:set|split|data|images?))?(?:[ _-]?(?:19|20)\d\d)?")
_ALL, _NONE = "all", "none"  # values of data.split: all splits together; no folder is a split
# What operating systems and storage devices put beside files; hidden names are left out anyway.
_SYSTEM = {
    *("@eadir", "@recycle", "@recently-snapshot", "@snapshot", "@tmp", "#recycle", "#snapshot"),
    *("$recycle.bin", "recycler", "recycled", "system volume information", "lost+found", "found.000"),
    *("__macosx", "network trash folder", "temporary items", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}
UNASKED = "data.label_column is 'none'"
"""Why there are no labels where the user wants none."""
_MOST_CLASSES, _MOST_SUFFIXES, _MOST_NAMES = 10, 10, 3  # most that a note lists


@dataclass(frozen=True)
class FolderImages:
    """The images of a folder, or of one of its splits."""

    root: str
    """The folder, or that of the chosen split."""
    paths: list[str]
    """Sorted paths of the images, as `path_to_text` gives them."""
    labels: Labels
    unlabelled: str
    """Why there are no labels; "" where there are."""
    notes: tuple[str, ...]


@dataclass
class _Contents:
    """What lies below a folder, as paths relative to it."""

    files: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    """Files and folders that this package wrote."""
    system: list[str] = field(default_factory=list)
    """Folders of the operating system."""
    lost_links: int = 0


def find_images(folder: Path, config: DataConfig, *, split_may_be_missing: bool = False) -> FolderImages:
    """Find the images below a folder by their names alone, without hidden files and files that this package wrote.

    First-level folders are splits if all have names of splits, or some have those of two different splits:
    `data.split` chooses one, `all` takes them together, and `none` treats them like any folders.

    Args:
        split_may_be_missing: accept a folder without splits whatever `data.split` is.

    Raises:
        ValueError: no images, or no such split.
    """
    prefix = str(folder).rstrip(os.sep) + os.sep
    contents = _walk(prefix)
    files = sorted(contents.files)
    images, others = [], []
    for file in files:
        (images if suffix(file) in IMAGE_SUFFIXES else others).append(file)
    left_out = _left_out(contents)
    if not images:
        raise setting_error(config, "source", _nothing(prefix, others, left_out))
    splits = [] if config.split == _NONE else _find_splits(images)
    chosen, notes = _choose_split(splits, images, config, split_may_be_missing)
    root = prefix
    if splits:
        within = tuple(name + os.sep for name in chosen)
        images, others = ([name for name in names if name.startswith(within)] for names in (images, others))
        root = prefix + within[0] if len(within) == 1 else prefix
    labelled: Labels = (None, ())
    unlabelled = UNASKED
    if config.label_column != "none":
        below = [name.partition(os.sep)[2] for name in images] if splits else images
        labelled, unlabelled, note = _label(below, root)
        unlabelled += "; classes are folders, one for each: source/cat/1.jpg, source/dog/2.jpg" if unlabelled else ""
        notes += note
        if config.split != _NONE and (named := [name for name in labelled[1] if _split_of(name)]):
            notes += [f"{named[0]!r} is taken for a class, since the folders beside it are no splits"]
    notes += _left_aside(others, contents.lost_links) + left_out
    paths = [prefix + name for name in images]
    texts = [path_to_text(path) for path in paths]
    for path, text in zip(paths, texts, strict=True):
        if path is not text and path_from_text(text) != path:
            raise setting_error(config, "source", f"{text}: is no UTF-8 and like the name of another file; rename it")
    return FolderImages(path_to_text(root), texts, labelled, unlabelled, tuple(notes))


def suffix(file: str) -> str:
    """The suffix of a file's name in lower case, without the dot; "" where there is none."""
    return os.path.splitext(file)[1][1:].lower()  # noqa: PTH122  # a Path for each of millions is slow


def _walk(prefix: str) -> _Contents:
    """All files below a folder but hidden ones; follows links, and reads each folder once."""
    contents, pending, seen = _Contents(), [prefix], set()
    while pending:
        folder = pending.pop()
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link to a folder above it, or to one read before
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as scanned:
            entries = {entry.name: entry for entry in scanned}
        if is_output(Path(folder), entries, named=folder == prefix):
            contents.outputs.append(folder.removeprefix(prefix) or ".")
            continue
        written = written_files(Path(folder), entries)
        subfolders = []
        for name, entry in entries.items():
            # To Path, a link that leads nowhere or to itself is neither folder nor file.
            item = Path(entry.path) if entry.is_symlink() else entry
            if name.startswith("."):
                continue
            below = entry.path.removeprefix(prefix)
            if name.lower() in _SYSTEM:
                contents.system += [below] if item.is_dir() else []
            elif item.is_dir():
                subfolders.append(entry.path)
            elif name in written:
                contents.outputs.append(below)
            elif item.is_file():
                contents.files.append(below)
            else:
                contents.lost_links += entry.is_symlink()
        pending += sorted(subfolders, reverse=True)  # a fixed order: of two links the same one always wins
    return contents


def _split_of(folder: str) -> str | None:
    """The split that a folder of this name holds; None for other names."""
    found = _SPLIT_NAME.fullmatch(folder.lower())
    return _SPLITS.get(found[1]) if found else None


def _find_splits(images: Sequence[str]) -> list[str]:
    """The first-level folders if all have names of splits, or some have names of two different splits; else none."""
    counts = Counter(image.partition(os.sep)[0] if os.sep in image else "" for image in images)
    kinds = {_split_of(name) for name in counts}
    are_splits = None not in kinds or len(kinds - {None}) > 1
    return sorted(name for name in counts if name) if are_splits else []


def _choose_split(
    splits: list[str], images: Sequence[str], config: DataConfig, may_be_missing: bool
) -> tuple[list[str], list[str]]:
    """The first-level folders that `data.split` names, and notes for the user."""
    wanted = config.split
    if not splits:
        if wanted not in ("train", _ALL, _NONE) and not may_be_missing:
            what = "this folder has no splits, which are first-level folders such as train and val; leave this out"
            raise setting_error(config, "split", what)
        return [], []
    kind = _split_of(wanted)
    chosen = (
        (splits if wanted == _ALL else [])
        or [name for name in splits if name == wanted]
        or [name for name in splits if name.lower() == wanted.lower()]
        or [name for name in splits if kind and _split_of(name) == kind]  # `train` names `training`, too
    )
    listed = ", ".join(map(path_to_text, splits))
    if not chosen or (len(chosen) > 1 and wanted != _ALL):
        problem = f"may be {' or '.join(map(path_to_text, chosen))}" if chosen else "no such split"
        near = "" if chosen else near_match(wanted, splits)
        what = f"{problem}; {near}there are: {listed}; {_ALL!r} takes them together, {_NONE!r} makes them classes"
        raise setting_error(config, "split", what)
    tests = [path_to_text(name) for name in splits if name not in chosen and _split_of(name) not in (None, "train")]
    used = " and ".join(map(path_to_text, chosen))
    note = f"splits are the folders {listed}; images of {used} are used. --data.split names another, "
    note += f"{_ALL} takes them together, {_NONE} makes them classes"
    if tests:
        note += f"; --evaluation.test_split {tests[-1]} (--test_split of evaluation scripts) tests on that one"
    loose = [image for image in images if os.sep not in image]
    if loose:
        return chosen, [note, f"{_count(loose, 'image')} beside the splits, such as {path_to_text(loose[0])}, left out"]
    return chosen, [note]


def _label(below: Sequence[str], root: str) -> tuple[Labels, str, list[str]]:
    """Labels by first-level folder, if all images lie in at least two; else why not; and notes for the user."""
    folders = [image.partition(os.sep)[0] for image in below if os.sep in image]
    # A Mac decomposes names: the same class in either form.
    names = {name: unicodedata.normalize("NFC", path_to_text(name)) for name in set(folders)}
    root = path_to_text(root)
    if not folders:
        return (None, ()), f"images lie in {root} itself, and classes are the folders that images lie in", []
    if len(folders) < len(below):
        loose = [image for image in below if os.sep not in image]
        why = (
            f"{_count(loose, 'image')}, such as {path_to_text(loose[0])}, lie{'s' * (len(loose) == 1)} beside the "
            f"folders of {root}, which are classes only where every image lies in one"
        )
        return (None, ()), why, [f"no classes: {why}"] if len(names) > 1 else []
    labels, class_names = encode([names[folder] for folder in folders])
    if len(class_names) < 2:
        why = f"all images lie in one folder, {root}{names[folders[0]]}; name that one if its folders are classes"
        return (None, ()), why, []
    return (labels, class_names), "", [f"classes are the folders {_listed(class_names, _MOST_CLASSES)}"]


def _left_aside(files: Sequence[str], lost_links: int) -> list[str]:
    """Notes on files that are not taken for images, by suffix, most frequent first."""
    counts = Counter(_kind(file) for file in files)
    shown = []
    for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        hint = hint_for(kind)
        shown.append(f"{count:,} {kind}" + (f" ({hint})" if hint else ""))
    more = counts.total() - sum(sorted(counts.values(), reverse=True)[:_MOST_SUFFIXES])
    listed = ", ".join(shown[:_MOST_SUFFIXES]) + (f" and {more:,} others" if more else "")
    notes = [f"{_count(files, 'file')} left aside, by suffix: {listed}"] if files else []
    links = f"{lost_links:,} link{'s' * (lost_links > 1)} left aside that lead{'s' * (lost_links == 1)} to no file"
    return notes + ([links] if lost_links else [])


def _kind(file: str) -> str:
    found = suffix(file)
    return found if re.fullmatch(r"\w[\w+~-]{0,11}", found, re.ASCII) else "without a suffix"


def _left_out(contents: _Contents) -> list[str]:
    """Notes on files and folders that are not the user's."""
    written = [path_to_text(path) for path in sorted(contents.outputs)]
    system = [path_to_text(path) for path in sorted(contents.system)]
    notes = [f"left out, since ssl_vit wrote it: {_listed(written, _MOST_NAMES)}"] if written else []
    return notes + ([f"left out, folders of the system: {_listed(system, _MOST_NAMES)}"] if system else [])


def _nothing(prefix: str, files: Sequence[str], left_out: list[str]) -> str:
    """The error about a folder without images, and what to do."""
    kinds = {suffix(file) for file in files}
    prefix = path_to_text(prefix)
    found = "; ".join([*_left_aside(files, 0), *left_out])
    text = f"no images in this folder or below it (looked for {' '.join(IMAGE_SUFFIXES)})"
    text += f"; {found}" if found else ""
    pattern = f"{glob.escape(prefix)}**/*."
    if "tar" in kinds:
        return f"{text}; for its tar files, give --data.streaming true and a quoted glob: '{pattern}tar'"
    return text + (f"; for its parquet files, give a quoted glob: '{pattern}parquet'" if "parquet" in kinds else "")


def _count(items: Sequence[str], what: str) -> str:
    return f"{len(items):,} {what}{'s' * (len(items) != 1)}"


def _listed(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
