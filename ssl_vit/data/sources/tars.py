"""WebDataset tars: finds the member of each sample that is its image, and reads no other."""

import bz2
import gzip
import lzma
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import fsspec

from ssl_vit.core.reading import open_regular
from ssl_vit.data.config import DataConfig, near_match, setting_error
from ssl_vit.data.decode.formats import IMAGE_SUFFIXES

_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # members of a sample share the name before the first dot
_NAMED = 20  # most kinds of members that an error names
_LONGEST_NAME, _LONGEST_HEADER = 4096, 2**20  # bytes
_MOST_INFLATED = 100  # most bytes that a byte of a compressed tar may become; images are compressed already
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
"""Ends of names of tars."""
_COMPRESSED = {b"\x1f\x8b": gzip.GzipFile, b"BZh": bz2.BZ2File, b"\xfd7zXZ\0": lzma.LZMAFile}


class _Archive:
    """The inflated bytes of a tar, with bounds for each header and for all bytes together."""

    def __init__(self, file: Any) -> None:
        self.file, self.end = file, float("inf")
        start = file.read(6)
        unpack = next((kind for signature, kind in _COMPRESSED.items() if start.startswith(signature)), None)
        if unpack is not None:
            self.end = _MOST_INFLATED * file.seek(0, os.SEEK_END) + _LONGEST_HEADER
            self.file = unpack(fileobj=file) if unpack is gzip.GzipFile else unpack(file)
        file.seek(0)

    def read(self, size: int, most: int = _LONGEST_HEADER) -> bytes:
        if not 0 <= size <= most:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)

    def seek(self, position: int) -> None:
        if not 0 <= position <= self.end:
            raise tarfile.ReadError(f"inflates to more than {_MOST_INFLATED} times its size; unpack it yourself")
        self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()

    def member(self, member: tarfile.TarInfo, most: int) -> bytes:
        """The content of a member.

        Raises:
            ValueError: it is sparse, or of more than `most` bytes.
            tarfile.TarError: the archive is cut off.
        """
        if member.issparse():
            raise ValueError("a sparse member of a tar, which is not read; write the tar without --sparse")
        if member.size > most:
            raise ValueError(f"holds {member.size:,} bytes, more than data.max_image_bytes={most}")
        self.seek(member.offset_data)
        data = self.read(member.size, most)
        if len(data) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        return data


@dataclass
class Samples:
    """Finds the samples of a tar by its headers: neighbouring members whose names share a key.

    The image of a sample is its first member with a suffix of an image, in upper or lower case; if `wanted` names
    kinds, its first member of these. Links, devices, folders and hidden files are no members.
    """

    wanted: tuple[str, ...] = ()
    """What may follow the first dot of an image's name, in lower case: `jpg`, `left.png`; () = any image."""
    kinds: dict[str, None] = field(default_factory=dict)
    """Kinds of members that were met, up to the number that an error names."""
    num_further: int = 0
    """Members that could be their sample's image, but follow one that is."""

    def of(self, file: Any) -> Iterator[tuple[str, Callable[[int], bytes] | None]]:
        """For each sample the image's name and a function that reads it (see `_Archive.member`), or its key and None.

        Args:
            file: the archive, opened for reading bytes, compressed or not.

        Raises:
            tarfile.TarError: the archive is cut off or damaged, or inflates without end.
        """
        archive = _Archive(file)
        tar = tarfile.open(fileobj=cast(Any, archive), mode="r:")  # noqa: SIM115  # closes nothing
        key, is_found, end = "", True, -1
        while (member := tar.next()) is not None:
            cast(Any, tar).members = []  # or it would keep all of them
            if tar.offset <= end or member.size < 0:
                raise tarfile.ReadError("a header leads back")
            end = tar.offset
            match = _MEMBER.fullmatch(member.name) if len(member.name) <= _LONGEST_NAME else None
            if not member.isreg() or match is None or member.name.rpartition("/")[2].startswith((".", "__")):
                continue
            if match[1] != key:
                if not is_found:
                    yield key, None
                key, is_found = match[1], False
            kind = match[2].lower()
            if len(self.kinds) < _NAMED:
                self.kinds[kind] = None
            if kind in self.wanted if self.wanted else kind.rpartition(".")[2] in IMAGE_SUFFIXES:
                self.num_further += is_found
                if not is_found:
                    is_found = True
                    yield member.name, partial(archive.member, member)
        if not is_found:
            yield key, None
        if archive.file is file:  # tarfile stops at a damaged header as at the end of the archive
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"the header at byte {tar.offset:,} is damaged")


def wanted_kinds(config: DataConfig) -> tuple[str, ...]:
    """The kinds of members that `data.image_column` names: `jpg`, or several as `jpg;png`."""
    return tuple(kind.strip().lower() for kind in (config.image_column or "").split(";") if kind.strip())


def count_samples(files: list[str], config: DataConfig) -> tuple[list[int] | None, tuple[str, ...]]:
    """Samples of each tar by its headers, None where `data.num_samples` gives the number; and notes for the user.

    Raises:
        ValueError: a file is no tar or damaged, or no tar holds an image.
    """
    samples = Samples(wanted_kinds(config))
    counts, num_images = [], 0
    for file in files:
        count = 0
        try:
            with os.fdopen(open_regular(Path(file), links=True), "rb") as opened:
                for _, image in samples.of(opened):
                    count += 1
                    num_images += image is not None
                    if num_images and config.num_samples is not None:
                        break
        except Exception as error:  # a damaged header raises anything
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


def read_tar(
    files: tuple[str, ...], wanted: tuple[str, ...], max_image_bytes: int, shard: int, start: int
) -> Iterator[dict[str, Any]]:
    """Undecoded images of a tar, local or on the hub, from sample `start` on; bytes are None where one has no image."""
    name = files[shard]
    with fsspec.open(name, "rb") if "://" in name else os.fdopen(open_regular(Path(name), links=True), "rb") as file:
        for number, (path, read) in enumerate(Samples(wanted).of(file)):
            if number >= start:
                stored: dict[str, Any] = {"bytes": None, "path": path}
                try:
                    stored["bytes"] = None if read is None else read(max_image_bytes)
                except ValueError as error:
                    stored["problem"] = str(error)
                yield stored
