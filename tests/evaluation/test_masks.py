import io
from pathlib import Path
from unicodedata import normalize

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.sources.source import DataConfig
from ssl_vit.evaluation.masks import MaskedSource, centre_pair, open_masked, random_pair, read_mask


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    image, file = Image.fromarray(pixels), io.BytesIO()
    if mode == "P":
        image = Image.fromarray(pixels, mode="L").convert("P")
        image.putdata(pixels.ravel().tolist())
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255] * 85)
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three images, and masks whose classes are the halves of the image; 255 belongs to none."""
    for kind in ("images", "masks"):
        (tmp_path / kind / "sub").mkdir(parents=True)
    for number in range(3):
        name = f"{number}" if number else "sub/0"
        mask = np.zeros((20, 30), dtype=np.uint8)
        mask[:, 15:] = 1
        mask[0] = 255
        Image.fromarray(np.stack([mask % 255 * 200] * 3, axis=-1)).save(tmp_path / "images" / f"{name}.jpg")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path / "images", tmp_path / "masks"


def open_folders(folders: tuple[Path, Path], ignore_index: int = 255) -> MaskedSource:
    images, masks = map(str, folders)
    return open_masked(DataConfig(images), mask_source=masks, mask_column=None, ignore_index=ignore_index)


def test_masks_keep_the_numbers_that_are_stored() -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert torch.equal(read_mask(png(values)), torch.from_numpy(values).long())
    assert torch.equal(read_mask(png(values * 100 % 250, "P")), torch.from_numpy(values * 100 % 250).long())
    assert read_mask(png(values.astype(np.uint16) * 1000)).max() == 11_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(np.zeros((4, 4, 3), dtype=np.uint8)), "is a RGB image; a mask has one channel"),
        (b"no picture", "cannot be read"),
        (png(np.zeros((40, 40), dtype=np.uint8))[:50], "cannot be read"),
    ],
)
def test_what_is_no_mask_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_mask(data)


def test_masks_are_turned_as_their_tags_say_and_long_pairs_stay_small() -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = 3
    Image.fromarray(np.array([[1, 2], [3, 4]], dtype=np.uint8)).save(file, "PNG", exif=exif)
    assert read_mask(file.getvalue()).tolist() == [[4, 3], [2, 1]]
    mask = torch.arange(100_000)[None]
    image, mask = centre_pair((mask % 256).byte().expand(3, -1, -1), mask, (32, 32), 1.0)
    assert image.shape == (3, 32, 32)
    assert 49_996 <= int(mask.min()) <= int(mask.max()) <= 50_004


def test_folders_are_matched_by_name(folders: tuple[Path, Path]) -> None:
    source = open_folders(folders)
    assert len(source) == 3
    for row in range(3):
        image, mask = source.pair(row, 3)
        assert image.shape == (3, 20, 30)
        assert mask[0].tolist() == [-1] * 30
        assert mask[5].tolist() == [0] * 15 + [1] * 15
        assert Path(source.images.rows[row]["image"]["path"]).stem == Path(source.masks.rows[row]["image"]["path"]).stem
    assert open_folders(folders, ignore_index=0).mask(0)[5].tolist() == [-1] * 15 + [1] * 15


def test_names_match_below_the_split_however_they_are_written(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for folder, accented in zip(folders, ("caf\u00e9 [1].v2", "cafe\u0301 [1].v2"), strict=True):
        path = next(folder.glob("1.*"))
        path.rename(folder / f"{accented}{path.suffix}")
        for name in (accented + path.suffix, f"sub/0{path.suffix}"):
            (folder / name).rename(folder / Path(name).with_name("\udce9" + Path(name).name))
    before = open_folders(folders)
    assert len(before) == 3
    folders[0].rename(tmp_path / "train")
    (tmp_path / "images").mkdir()
    (tmp_path / "train").rename(tmp_path / "images/train")
    Image.new("L", (4, 4)).save(tmp_path / "images/train/../x.png")
    (tmp_path / "images/val").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "images/val/y.png")
    after = open_folders(folders)
    assert [after.pair(row, 3)[1][5].tolist() for row in range(3)] == [[0] * 15 + [1] * 15] * 3


def test_names_that_do_not_match_are_refused(folders: tuple[Path, Path]) -> None:
    (folders[1] / "2.png").rename(folders[1] / "two.png")
    with pytest.raises(ValueError, match=r"mask_source='.*': 1 images without a mask: 2; names must be the same"):
        open_folders(folders)
    (folders[0] / "2.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 masks without an image: two"):
        open_folders(folders)


def test_columns_of_one_source(folders: tuple[Path, Path], tmp_path: Path) -> None:
    rows = {
        "image": [str(folders[0] / "1.jpg")] * 2,
        "annotation": [str(folders[1] / "1.png")] * 2,
        "text": ["a", "b"],
    }
    kinds = {"image": datasets.Image(), "annotation": datasets.Image(), "text": datasets.Value("string")}
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(str(file))

    def opened(**changes: str | None) -> MaskedSource:
        settings = {"mask_source": None, "mask_column": None, "ignore_index": 255}
        return open_masked(DataConfig(str(file)), **(settings | changes))

    for source in (opened(), opened(mask_column="annotation")):
        assert source.pair(1, 3)[1][5].tolist() == [0] * 15 + [1] * 15
    with pytest.raises(ValueError, match="mask_column='anotation': no such column; did you mean 'annotation'"):
        opened(mask_column="anotation")


def test_a_source_without_masks_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="where are the masks"):
        open_masked(DataConfig(str(folders[0])), mask_source=None, mask_column=None, ignore_index=255)


def test_a_mask_that_does_not_fit_is_named(folders: tuple[Path, Path]) -> None:
    Image.fromarray(np.zeros((20, 31), dtype=np.uint8)).save(folders[1] / "1.png")
    with pytest.raises(ValueError, match=r"row 0 .*1\.png.*: the mask is 20 x 31 pixels and its image 20 x 30"):
        open_folders(folders).pair(0, 3)
    Image.fromarray(np.full((20, 30), 60_000, dtype=np.uint16)).save(folders[1] / "1.png")
    with pytest.raises(ValueError, match="holds class 60000; classes are below"):
        open_folders(folders).mask(0)


def test_crops_and_flips_keep_image_and_mask_together() -> None:
    mask = torch.zeros(60, 90, dtype=torch.int64)
    mask[10:40, 20:50] = 1
    image = (mask * 255).to(torch.uint8).expand(3, 60, 90)
    pairs = [random_pair(image, mask, (32, 48), np.random.default_rng(seed)) for seed in range(20)]
    pairs += [centre_pair(image, mask, size, pct) for size in ((32, 48), (40, 24)) for pct in (1.0, 0.8)]
    for cropped, classes in pairs:
        assert cropped.shape[1:] == classes.shape
        # Bicubic and nearest differ at the edges alone.
        assert ((cropped[0] > 127) == (classes == 1)).float().mean() > 0.96
    assert len({pair[1].sum().item() for pair in pairs[:20]}) > 5


def rows_of(file: Path, pixels: list[np.ndarray]) -> str:
    datasets.Dataset.from_dict(
        {"image": [{"bytes": png(values), "path": f"{number}.png"} for number, values in enumerate(pixels)]},
        datasets.Features({"image": datasets.Image()}),
    ).to_parquet(str(file))
    return str(file)


@pytest.mark.parametrize(("images", "masks"), [("FOLDER", "PARQUET"), ("PARQUET", "FOLDER"), ("PARQUET", "PARQUET")])
def test_masks_of_sources_without_files_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, images: str, masks: str
) -> None:
    parquet = rows_of(tmp_path / "rows.parquet", [np.zeros((20, 30), dtype=np.uint8)] * 3)
    given = [name.replace("FOLDER", str(folders[0])).replace("PARQUET", parquet) for name in (images, masks)]
    with pytest.raises(ValueError, match=r"^mask_source=.*rows.parquet' is no folder of images; give two folders"):
        open_masked(DataConfig(given[0]), mask_source=given[1], mask_column=None, ignore_index=255)


def test_accents_are_the_same_however_they_are_written(folders: tuple[Path, Path]) -> None:
    for folder, form in zip(folders, ("NFC", "NFD"), strict=True):
        file = next(folder.glob("2.*"))
        file.rename(file.with_stem(normalize(form, "caf\u00e9")))
    opened = open_folders(folders)
    assert sorted(int(opened.pair(row, 3)[1].max()) for row in range(3)) == [1, 1, 1]


def test_two_masks_of_one_name_are_refused(folders: tuple[Path, Path]) -> None:
    (folders[1] / "1.bmp").write_bytes((folders[1] / "1.png").read_bytes())
    with pytest.raises(ValueError, match=r"1 names that several masks have: 1"):
        open_folders(folders)


def test_a_mask_that_cannot_be_read_is_named(folders: tuple[Path, Path]) -> None:
    opened, file = open_folders(folders), folders[1] / "2.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"mask of row 1 .*2\.png"):
        opened.mask(1)
    file.unlink()
    with pytest.raises(ValueError, match=r"mask of row 1 .*2\.png.*No such file"):
        opened.mask(1)


def test_negative_values_are_no_classes(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    values = np.zeros((8, 8), dtype=np.int32)
    values[0] = -9999
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.png")
    Image.fromarray(values).save(tmp_path / "masks" / "0.tif")
    folders = tmp_path / "images", tmp_path / "masks"
    with pytest.raises(ValueError, match=r"holds -9999, and classes are numbered from 0; .* give --ignore_index -9999"):
        open_folders(folders).mask(0)
    assert open_folders(folders, -9999).mask(0)[:2].unique().tolist() == [-1, 0]
