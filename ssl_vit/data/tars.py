"""WebDataset tars: which member of a sample is its image, and no other is read."""

import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from ssl_vit.data.config import DataConfig, near_match, setting_error
from ssl_vit.data.formats import IMAGE_SUFFIXES

_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # the members of a sample share what is before the first dot
_NAMED = 20  # kinds of members that an error names


@dataclass
class Samples:
    """The samples of a tar, found by its headers: those next to each other whose names share a key.

    The image of a sample is its first member with a suffix of an image, in upper or lower case; where `wanted` names
    kinds, the first of these. Links, devices, folders and hidden files are no members.
    """

    wanted: tuple[str, ...] = ()
    """All that follows the first dot of the image's name, in lower case: `jpg`, `left.png`; () = any image."""
    kinds: dict[str, None] = field(default_factory=dict)
    """Kinds of members that were met, as far as an error would name them."""
    num_further: int = 0
    """Members that were met and would have been their sample's image had there been none before them."""

    def of(self, file: Any) -> Iterator[tuple[str, IO[bytes] | None]]:
        """Each sample's image by its name, or the sample's key and None. Read it before the next is asked for.

        Args:
            file: the archive, opened to read bytes, compressed or not.

        Raises:
            tarfile.TarError: the archive is cut off or damaged.
        """
        tar = tarfile.open(fileobj=file, mode="r:*")  # noqa: SIM115  # closes nothing but a file of its own
        key, is_told = "", True
        while (member := tar.next()) is not None:
            cast(Any, tar).members = []  # or all of them would be kept
            match = _MEMBER.fullmatch(member.name)
            if not member.isreg() or match is None or member.name.rpartition("/")[2].startswith((".", "__")):
                continue
            if match[1] != key:
                if not is_told:
                    yield key, None
                key, is_told = match[1], False
            kind = match[2].lower()
            if len(self.kinds) < _NAMED:
                self.kinds[kind] = None
            if kind in self.wanted if self.wanted else kind.rpartition(".")[2] in IMAGE_SUFFIXES:
                self.num_further += is_told
                if not is_told:
                    is_told = True
                    yield member.name, tar.extractfile(member)
        if not is_told:
            yield key, None
        if tar.fileobj is file:  # Python ends at a damaged header as it does at the end of the archive
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"the header at byte {tar.offset:,} is damaged")


def wanted_kinds(config: DataConfig) -> tuple[str, ...]:
    """What `data.image_column` says of a tar: `jpg`, or several kinds as `jpg;png`."""
    return tuple(kind.strip().lower() for kind in (config.image_column or "").split(";") if kind.strip())


def count_samples(files: list[str], config: DataConfig) -> tuple[list[int] | None, tuple[str, ...]]:
    """Samples of each tar by its headers, None where `data.num_samples` says how many; and what a user should know.

    Raises:
        ValueError: no tar, a damaged one, or none with an image.
    """
    samples = Samples(wanted_kinds(config))
    counts, num_images = [], 0
    for file in files:
        count = 0
        try:
            with Path(file).open("rb") as opened:
                for _, image in samples.of(opened):
                    count += 1
                    num_images += image is not None
                    if num_images and config.num_samples is not None:
                        break
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            what = f"{file} is not a tar file, or is empty or damaged: {str(error).partition(chr(10))[0]}"
            raise setting_error(config, "source", what) from error
        counts.append(count)
    _check_kinds(samples, num_images, config)
    if config.num_samples is not None:
        return None, ()
    notes, lacking = [], sum(counts) - num_images
    if lacking:
        notes.append(f"{lacking:,} of {sum(counts):,} samples hold no image")
    if samples.num_further:
        which = "of each sample the first is, or what data.image_column names"
        notes.append(f"{samples.num_further:,} further images of the same samples are not read: {which}")
    return counts, tuple(notes)


def _check_kinds(samples: Samples, num_images: int, config: DataConfig) -> None:
    kinds = list(samples.kinds)
    if not kinds:
        raise setting_error(config, "source", "holds no samples")
    listed = f"there are: {', '.join(kinds)}"
    if num_images == 0 and samples.wanted:
        near = near_match(samples.wanted[0], kinds)
        raise setting_error(config, "image_column", f"the tars have no members of this kind; {near}{listed}")
    if num_images == 0:
        raise setting_error(config, "source", f"no sample holds an image; {listed}")
    if config.label_column not in (None, "none", *kinds) and config.num_samples is None and len(kinds) < _NAMED:
        near = near_match(cast(str, config.label_column), kinds)
        raise setting_error(config, "label_column", f"the tars have no members of this kind; {near}{listed}")


def read_tar(files: tuple[str, ...], wanted: tuple[str, ...], shard: int, start: int) -> Iterator[dict[str, Any]]:
    """Undecoded images of a tar, here or on the hub, from its sample `start` on; without bytes where it has none."""
    name = files[shard]
    with fsspec.open(name, "rb") if "://" in name else Path(name).open("rb") as file:
        for number, (path, image) in enumerate(Samples(wanted).of(file)):
            if number >= start:
                yield {"bytes": None if image is None else image.read(), "path": path}
