"""A backbone and the labelled images that it is scored on: what k-NN, linear probe and retrieval begin with."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ssl_vit.core.distributed import process_index
from ssl_vit.core.manifest import hash_file
from ssl_vit.data.bad_images import describe_bad
from ssl_vit.data.sources.source import Source, open_source
from ssl_vit.evaluation.cache import cached_features, feature_key
from ssl_vit.evaluation.command import (
    Backbone,
    LabelledConfig,
    data_config,
    naming_own,
    naming_test,
    tell_notes,
    write_result,
)
from ssl_vit.evaluation.features import check_finite, extract_features, pixel_features
from ssl_vit.evaluation.left_out import check_bad_share
from ssl_vit.evaluation.splits import Split, check_apart, split_sources


@dataclass
class Task:
    """A backbone and the labelled images that it is scored on."""

    backbone: Backbone
    config: LabelledConfig
    train: Source
    test: Source | None
    split: Split
    bad: list[dict[str, Any]] = field(default_factory=list)
    """Images that could not be decoded and were left out, with source, row, path and reason; in the main process."""

    @classmethod
    def open(cls, path: Path, config: LabelledConfig) -> "Task":
        """Load the backbone, open the sources and check the labels before the first image is decoded."""
        backbone = Backbone.load(path, config)
        data = data_config(backbone, config, label_column=config.label_column)
        # Other processes wait until the first one has filled the caches.
        with PartialState().main_process_first():
            with naming_own(config):
                train = open_source(data)
            test = None
            if config.test_source is not None or config.test_split is not None:
                named = config.test_source or data.source
                with naming_test(config):
                    test = open_source(replace(data, source=named, split=config.test_split or data.split))
        tell_notes(train, test)
        split = split_sources(train, test, config.max_images, config.seed)
        check_apart(train, test, "--test_")
        return cls(backbone, config, train, test, split)

    def features(
        self, name: str, num_layers: int, views: int = 0
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor] | None]:
        """Return features of the training and of the test images; see `extract_features`. Every process calls this.

        Images that cannot be decoded are left out of `split` as well, so that features and labels stay side by side.

        Args:
            name: "backbone", or a baseline: "pixels", whose only feature is "mean", or "untrained".
            num_layers: last blocks whose class tokens are wanted.
            views: random crops of the training images; they follow the centre crop.

        Returns:
            for the training images the centre crop and then each view, and for the test images the centre crop or
            None. On other processes than the main one they are empty.
        """
        encode, test = self._pixels if name == "pixels" else self._encoder(name, num_layers), None
        if self.test is not None:
            with naming_test(self.config):
                test = self._good(encode, self.test, None)
        chosen = [None, *range(views if name != "pixels" else 0)]
        with naming_own(self.config):
            return [self._good(encode, self.train, view) for view in chosen], test

    def _good(
        self, encode: Callable[[Source, Any, int | None], dict[str, Tensor]], source: Source, view: int | None
    ) -> dict[str, Tensor]:
        """Return features of the rows that can be decoded; the other rows are left out of `split`."""
        is_test = source is self.test
        rows = self.split.test_rows if is_test else self.split.rows
        assert rows is not None
        pieces = encode(source, rows, view)
        # Features that were kept before images could be left out are of all rows.
        places = pieces.pop("places", torch.arange(len(rows))).numpy()
        kept: np.ndarray = broadcast_object_list([places])[0]
        bad = np.delete(rows, kept)
        if len(bad):  # the same in every later pass, so it is noted once
            channels = self.backbone.encoder.in_chans
            if self.config.on_bad_image == "raise":
                source.image(int(bad[0]), channels)
            check_bad_share(source, bad.tolist(), len(rows), self.config.max_bad_share, channels)
            self.split = self.split.keep_test(kept) if is_test else self.split.keep(kept)
            if process_index() == 0:
                self.bad += [{"source": source.name, **describe_bad(source, int(row), channels)} for row in bad]
        return pieces

    def _pixels(self, source: Source, rows: Any, view: int | None) -> dict[str, Tensor]:
        if process_index() != 0:
            return {}
        return pixel_features(
            source,
            rows,
            self.backbone.encoder.in_chans,
            crop_pct=self.backbone.transform.crop_pct,
            num_workers=self.backbone.settings.num_workers,
            max_bad_share=self.config.skipped_share,
        )

    def _encoder(self, name: str, num_layers: int) -> Callable[[Source, Any, int | None], dict[str, Tensor]]:
        backbone, encoder, digest = self.backbone, self.backbone.encoder, None
        if name == "untrained":
            encoder = backbone.untrained(self.config.seed)
        elif self.config.cache:
            digest = hash_file(backbone.file, links=True)

        def encode(source: Source, rows: Any, view: int | None) -> dict[str, Tensor]:
            transform = replace(backbone.transform, view=view)

            def extract() -> dict[str, Tensor]:
                more = {"num_layers": num_layers, "max_bad_share": self.config.skipped_share}
                return extract_features(encoder, source, rows, transform, backbone.settings, **more)

            if digest is None:
                features = extract()
            else:
                dtype = backbone.settings.autocast_dtype
                key = feature_key(digest, backbone.encoder_settings, source, rows, transform, dtype)
                features = cached_features(backbone.folder / "features", key, num_layers, extract)
            if process_index() == 0:
                for values in (features["cls"], features["mean"]):
                    check_finite(values)
            return dict(features)

        return encode

    def describe(self) -> dict[str, Any]:
        """Return the weights, the images and the settings, for the result's JSON."""
        return {
            "weights": str(self.backbone.file),  # "backbone" is a row of the table
            "source": self.train.name,
            "test_source": None if self.test is None else self.test.name,
            "num_train": len(self.split.labels),
            "num_test": len(self.split.scored_labels),
            "num_classes": self.split.num_classes,
            "num_bad": len(self.bad),
            "crop_pct": self.backbone.transform.crop_pct,
            "image_size": list(self.backbone.transform.size),
            "settings": asdict(self.config),
        }

    def write(self, name: str, result: Mapping[str, Any]) -> None:
        """Write what `describe` says and a result to the file that was named, or to NAME beside the backbone."""
        default = self.backbone.folder / name
        write_result(default, self.config.output, {**self.describe(), **result}, self.bad)
