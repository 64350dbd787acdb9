import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import fsspec
import huggingface_hub
import pytest

from ssl_vit.data.config import DataConfig
from ssl_vit.data.sources.stream import Stream, open_stream
from ssl_vit.data.sources.tars import read_tar
from tests.data.shards import number_of, numbered_png

Members = list[tuple[str, bytes]]


def tar_of(path: Path, members: Members, mode: Any = "w") -> str:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def stream(path: str | Path, **settings: Any) -> Stream:
    return open_stream(DataConfig(source=str(path), streaming=True, **settings))


def seen(opened: Stream, start: int = 0) -> list[int | None]:
    """Which image each sample is; None where it cannot be decoded."""
    found: list[int | None] = []
    for row, stored in opened.read(0, start):
        try:
            found.append(number_of(opened.decode(0, row, stored, 3)))
        except ValueError:
            found.append(None)
    return found


MIXED: Members = [
    ("a/0.json", b"{broken"),
    ("a/0.PNG", numbered_png(0)),
    ("a/0.seg.png", numbered_png(90)),
    ("a/1.txt", "caf\xe9".encode("latin-1")),
    ("a/1.npy.gz", b"neither"),
    ("a/2.jpeg", numbered_png(2)),
    ("a/2.cls", b"cat"),
    ("b/2.webp", b""),
    ("a/2.tif", numbered_png(4)),
]


def test_a_sample_s_image_is_its_first_member_with_an_image_s_suffix(tmp_path: Path) -> None:
    opened = stream(tar_of(tmp_path / "x.tar", MIXED))
    assert seen(opened) == [0, None, 2, None, 4]
    assert opened.num_samples == 5
    stored = dict(opened.read(0))
    assert stored[0]["path"] == "a/0.PNG"
    assert stored[1] == {"bytes": None, "path": "a/1"}
    with pytest.raises(ValueError, match=r"x.tar, row 1 \(a/1\): the row holds no image$"):
        opened.decode(0, 1, stored[1], 3)
    with pytest.raises(ValueError, match=r"row 3 \(b/2.webp\): the file is empty$"):
        opened.decode(0, 3, stored[3], 3)
    assert opened.notes == (
        "1 of 5 samples hold no image",
        "1 further images of the same samples are not read: of each sample the first is, or what data.image_column "
        "names",
    )


@pytest.mark.parametrize(
    ("column", "expected"),
    [("png", [0] + [None] * 4), ("seg.png", [90] + [None] * 4), ("JPEG; tif", [None, None, 2, None, 4])],
)
def test_the_kind_of_member_can_be_named(tmp_path: Path, column: str, expected: list[int | None]) -> None:
    assert seen(stream(tar_of(tmp_path / "x.tar", MIXED), image_column=column)) == expected


@pytest.mark.parametrize("start", range(7))
def test_reading_goes_on_at_any_sample(tmp_path: Path, start: int) -> None:
    members = [(f"{n}.png", numbered_png(n)) for n in range(6)]
    opened = stream(tar_of(tmp_path / "x.tar", members))
    assert seen(opened, start) == list(range(start, 6))
    assert [row for row, _ in opened.read(0, start)] == list(range(start, 6))


def test_links_devices_and_folders_are_no_images(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    tar_of(path, [("0.png", numbered_png(0))])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("1.png", tarfile.SYMTYPE), ("2.png", tarfile.LNKTYPE), ("3.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.png"
            tar.addfile(info)
        info = tarfile.TarInfo("4.png")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    assert seen(stream(path)) == [0]


def test_a_damaged_header_is_no_end(tmp_path: Path) -> None:
    members = [(f"{n}.png", numbered_png(n)) for n in range(4)]
    path = Path(tar_of(tmp_path / "x.tar", members))
    opened = stream(path)
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[offset + 5] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"x.tar is not a tar file.*: the header at byte {offset:,} is damaged"):
        stream(path)
    with pytest.raises(ValueError, match=r"x.tar cannot be read: ReadError: the header at byte"):
        seen(opened)


def test_samples_that_are_not_counted_are_still_looked_for(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", [("0.txt", b"")])
    tar_of(tmp_path / "1.tar", [("1.txt", b""), ("2.png", numbered_png(2))])
    opened = stream(tmp_path / "*.tar", num_samples=3)
    assert (opened.counts, opened.num_samples, opened.notes) == (None, 3, ())
    with pytest.raises(ValueError, match=r"^data.image_column='pngg': .* did you mean 'png'\? there are: txt, png$"):
        stream(tmp_path / "*.tar", num_samples=3, image_column="pngg")


def test_tars_of_the_hub_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar_of(tmp_path / "x.tar", MIXED)
    load, opened_by = datasets.load_dataset_builder, fsspec.open
    address = "hf://datasets/someone/pictures@1/x.tar"

    def stand_in(name: str) -> datasets.DatasetBuilder:
        builder = load("webdataset", data_files=str(tmp_path / "x.tar"))
        builder.config.data_files = {"train": [address]}
        return builder

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", stand_in)
    monkeypatch.setattr(
        fsspec, "open", lambda name, mode: opened_by(str(tmp_path / "x.tar") if name == address else name, mode)
    )
    opened = stream("someone/pictures")
    assert seen(opened) == [0, None, 2, None, 4]
    assert (opened.shards, opened.counts) == ((address,), None)
    with pytest.raises(ValueError, match=r"^data.split='val': no such split; there are: train$"):
        stream("someone/pictures", split="val")
    with fsspec.open("memory://x.tar", "wb") as file:
        file.write((tmp_path / "x.tar").read_bytes())
    assert [stored["path"] for stored in read_tar(("memory://x.tar",), (), 2**20, 0, 2)] == [
        "a/2.jpeg",
        "b/2.webp",
        "a/2.tif",
    ]
