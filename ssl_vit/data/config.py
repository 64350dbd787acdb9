"""Settings that say which images to use, and errors about them."""

import difflib
from dataclasses import dataclass
from typing import Literal

from ssl_vit.core.paths import as_path
from ssl_vit.core.settings import check_ranges
from ssl_vit.data.decode.bounds import MAX_IMAGE_BYTES
from ssl_vit.data.sampler import as_text, check_weights
from ssl_vit.data.transform import Normalization, pair
from ssl_vit.data.workers import check_num_workers

KINDS = (
    "'openmoji' (built-in demo images), a folder of images, a parquet file or a quoted glob of them, "
    "a folder written by datasets' save_to_disk, the id of a data set on the Hugging Face hub, with "
    "--data.streaming true a WebDataset .tar or a quoted glob of them, or a mapping of several to their weights"
)


@dataclass(frozen=True)
class DataConfig:
    """Which images to use, and how they become numbers."""

    source: str | dict[str, float] = ""
    """openmoji | folder of images | parquet file or glob | save_to_disk folder | Hugging Face hub id | with streaming
    a .tar or glob | several with weights: `{photos: 0.7, openmoji: 0.3}`."""
    split: str = "train"
    """Split of a hub, parquet or save_to_disk source, or of a folder whose first-level folders are splits (train, val
    ...; `all` = together, `none` = such folders are classes). Hub and parquet also take slices: `train[:10%]`."""
    image_column: str | None = None
    """Column that holds the images; found by its type where there is only one. In tars the kind of member: `jpg`, or
    the first of several, `left.jpg;left.png`; else a sample's first image."""
    label_column: str | None = None
    """Column that holds the classes, for evaluation; found where possible. `none` = ignore labels."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, of images scaled to [0, 1]. Their number is the number of channels."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, of images scaled to [0, 1]."""
    allow_outside_paths: bool = False
    """Whether rows of tables may name image files outside the folder of their source. Only for those that you trust."""
    drop_duplicates: bool = False
    """Leave images out of training that repeat one before them, byte for byte or nearly (saved again, other size). All
    images are read before the first step, once as long as they stay the same; rows are counted without copies."""
    max_image_bytes: int = MAX_IMAGE_BYTES
    """Most bytes of an image, of its file and decoded: height x width x channels x bytes of a sample, and what its
    decoder takes beside that. Larger ones are refused by their headers, before memory is taken for them."""
    max_pixels: int | None = None
    """Former name, in pixels of three bytes; becomes max_image_bytes."""
    pages: Literal["first", "channels", "images"] = "first"
    """Of files of several pages or frames (TIFF, GIF, WebP, PNG, MPO): the first; all of a TIFF's as channels of one
    image; or each as an image of its own, for which every file is opened at the start."""
    tile_size: int | tuple[int, int] | None = None
    """Cut images into tiles of so many pixels (height, width; one number: square), each of which counts as an image to
    learn from, at its file's resolution. null = whole images, as those that are scored always are. docs/tiles.md"""
    tile_overlap: int = 0
    """Pixels that neighbouring tiles share."""
    on_bad_image: Literal["skip", "raise"] = "skip"
    """When training draws an image that cannot be decoded: take the next good one and note it, or stop."""
    max_bad_share: float = 0.05
    """Stop when more than this share of the images drawn, or of the source, cannot be decoded."""
    num_workers: int | Literal["auto"] = "auto"
    """Loader processes of each training process; auto = chosen from the machine."""
    cache: Literal["none", "ram", "disk"] = "none"
    """Decode each image once, before the first step, and keep it small: in a temporary file that the system keeps in
    memory, for the run alone (ram), or in `cache_dir` (disk)."""
    cache_side: int | Literal["auto"] = "auto"
    """Most pixels of a decoded image's shorter side. auto: 8/7 of the encoder's, 256 for 224; of tiles their own."""
    cache_dir: str | None = None
    """Folder of decoded images and lists of copies; null = ssl_vit/decoded in the user's cache folder."""
    streaming: bool = False
    """Read hub ids, parquet files and WebDataset tars from front to back, without a copy of the data set."""
    shuffle_buffer: int = 4000
    """Undecoded images that a streamed run shuffles among, over all its processes."""
    num_readers: int = 32
    """Shards that a streamed run reads at once, over all its processes. More of them mix better, allow more loader
    processes and take more memory."""
    num_samples: int | None = None
    """Images of a streamed source that cannot tell their number, for epochs and `auto`. Given, tars are not counted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_workers", check_num_workers(self.num_workers))
        if self.max_pixels is not None:  # of settings written before
            object.__setattr__(self, "max_image_bytes", bytes_of_pixels(self.max_pixels))
            object.__setattr__(self, "max_pixels", None)
        if isinstance(self.source, dict):
            check_weights(self.source)
        elif self.source.startswith("{") and self.source.endswith("}") and not as_path(self.source).exists():
            raise ValueError(f"source={self.source!r}: a mixture is {{SOURCE: WEIGHT, ...}} with numbers as weights")
        if not self.split:
            raise ValueError(f"split={self.split!r}: name a split, such as 'train'")
        check_ranges(
            self,
            mean="[0, 1]; one number per channel, divide 0-255 by 255",
            std="(0, 1]; one number per channel, divide 0-255 by 255",
            max_image_bytes="[1, inf)",
            tile_size="[1, inf); null = whole images",
            tile_overlap="[0, inf)",
            max_bad_share="[0, 1]; 1 never stops",
            cache_side="[1, inf); auto = 8/7 of the encoder's",
            shuffle_buffer="[1, inf)",
            num_readers="[1, inf)",
            num_samples="[1, inf)",
        )
        if not self.mean:
            raise ValueError("mean=(): give one number per channel")
        if len(self.std) != len(self.mean):
            raise ValueError(f"std={self.std!r}: give as many numbers as in mean={self.mean!r}")
        if self.tile_overlap and (self.tile_size is None or self.tile_overlap >= min(pair(self.tile_size))):
            raise ValueError(f"tile_overlap={self.tile_overlap}: must be less than tile_size={self.tile_size}")
        if not self.streaming:
            if self.num_samples is not None:
                what = "only streamed sources need it; leave this setting out"
                raise ValueError(f"num_samples={self.num_samples!r}: {what}")
            return
        if isinstance(self.source, dict):
            what = f"a mixture is not streamed ({as_text(self.source)}); leave this setting out, or stream one source"
            raise ValueError(f"streaming=True: {what}")
        if self.pages == "images":
            raise ValueError("pages='images': pages of a stream are not counted; leave this or streaming out")
        if self.tile_size is not None:
            raise ValueError(
                f"tile_size={self.tile_size}: tiles of a stream are not counted; leave out this or streaming"
            )
        if self.cache != "none":
            raise ValueError(f"cache={self.cache!r}: a stream is not decoded beforehand; leave out this or streaming")
        if self.drop_duplicates:
            raise ValueError("drop_duplicates=True: a stream is not read beforehand; leave out this or streaming")

    @property
    def normalization(self) -> Normalization:
        """Mean and standard deviation of each channel."""
        return Normalization(self.mean, self.std)


def bytes_of_pixels(max_pixels: int) -> int:
    """`max_image_bytes` for a former `max_pixels`; the former default becomes the present one."""
    return 3 * max_pixels + 2


def setting_error(config: DataConfig, field: str, what: str) -> ValueError:
    """An error about one setting; use as `raise setting_error(...)`."""
    return ValueError(f"data.{field}={getattr(config, field)!r}: {what}")


def near_match(name: str, names: list[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {matches[0]!r}? " if matches else ""
