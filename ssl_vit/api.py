"""ssl_vit from Python: what the scripts do, with a result in place of an exit code.

    import ssl_vit

    run = ssl_vit.pretrain("lejepa", "my_images", output_dir="runs/mine", epochs=100)
    features = ssl_vit.embed(["cat.jpg", "dog.jpg"], run.folder)

Settings are those of the scripts: `epochs=100`, `encoder={"image_size": 96}`; errors are ValueErrors of the same line.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import yaml
from accelerate.state import AcceleratorState
from jaxtyping import Float
from PIL import Image

from ssl_vit.core.distributed import end_processes
from ssl_vit.core.shipped import load_front
from ssl_vit.data.sources.in_memory import is_on_disk, open_memory, store
from ssl_vit.evaluation.command import Backbone, PicturesConfig
from ssl_vit.evaluation.features import check_feature, extract_features, num_layers_for, select_feature
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.weights.backbone import BACKBONE_FILE, load_backbone
from ssl_vit.runs.folder import RESULTS_FILE
from ssl_vit.runs.record import RunData, read_run
from ssl_vit.training import ending as pretraining
from ssl_vit.training import supervised
from ssl_vit.training.config import parse_run
from ssl_vit.training.loop import train
from ssl_vit.training.setup import Ending, set_up


@dataclass(frozen=True)
class Result:
    """A run that has ended, or has stopped and can go on."""

    folder: Path
    code: int
    """0: finished; 130: stopped by Ctrl-C, after saving; others as in `ssl_vit.training.loop.train`."""

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; the same call goes on with one that did not."""
        return self.code == 0

    @property
    def backbone(self) -> Path:
        """The exported backbone, which timm and `ssl_vit.load_backbone` load; there once the run has finished.

        A fine-tuning has none: its classifier is `model.safetensors` in the run's folder, which timm loads.
        """
        return self.folder / BACKBONE_FILE

    @cached_property
    def record(self) -> RunData:
        """All that the run's folder tells: settings, metrics, scores."""
        return read_run(self.folder)

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Accuracies in [0, 1] of the run's end, by row (`trained`, `untrained`, ...) and column (`knn`, `linear`).

        Of a fine-tuning the row is `fine-tuned`, the column `test`. Scores of later evaluations are in `record.scores`.
        """
        found: dict[str, dict[str, float]] = {}
        for file, row, column, value, _ in self.record.scores:
            if file == RESULTS_FILE:
                found.setdefault(row, {})[column] = value
        return found

    def encoder(self) -> Encoder:
        """The trained encoder, in eval mode on the CPU.

        Raises:
            ValueError: the run has not finished, or is a fine-tuning, which has a classifier.
        """
        return load_backbone(self.backbone)

    def figure(self) -> Image.Image | None:
        """The figure that was drawn at the end; None if there is none."""
        path = self.record.picture
        if path is None:
            return None
        with Image.open(path) as image:
            return image.copy()

    def _repr_html_(self) -> str:
        """The scores as a table and the figure, in a notebook."""
        columns = sorted({column for row in self.scores.values() for column in row})
        state = "finished" if self.finished else "stopped; the same call goes on"
        head = "".join(f"<th>{html.escape(name)}, %</th>" for name in columns)
        rows = "".join(
            f"<tr><td>{html.escape(row)}</td>"
            + "".join(f"<td>{100 * found[name]:.1f}</td>" if name in found else "<td></td>" for name in columns)
            + "</tr>"
            for row, found in self.scores.items()
        )
        table = f"<table><tr><th></th>{head}</tr>{rows}</table>" if columns else ""
        path = self.record.picture
        shown = "" if path is None else base64.b64encode(path.read_bytes()).decode()
        figure = f'<img alt="{path.stem}" style="max-width:100%" src="data:image/png;base64,{shown}">' if path else ""
        return f"<p><b>{html.escape(str(self.folder))}</b>: {state}</p>{table}{figure}"


def pretrain(
    method: str,
    /,
    source: Any = None,
    *,
    output_dir: str | Path | None = None,
    config: str | Path | Sequence[str | Path] = (),
    **settings: Any,
) -> Result:
    """Pre-train a backbone on images without labels, or go on with the run in `output_dir`.

    Ctrl-C saves and returns; the same call goes on.

    Args:
        method: "mae", "dino", "dinov2", "simmim", "fcmae" or "lejepa".
        source: what `data.source` takes, or images in memory, see `ssl_vit.data.sources.in_memory.store`; None with no
            other settings is the quickstart.
        output_dir: folder of the run; named after objective, architecture and source by default.
        config: YAML files of settings, or names of those that come with the package.
        settings: settings by name, sections as mappings: `steps=100, encoder={"arch": "vit_tiny_patch16_224"}`.

    Raises:
        ValueError: a setting, file or image that cannot be used, in one line.
    """
    if source is None and not config and not settings:
        config = f"quickstart_{method}"
    return _run(f"pretrain_{method}", pretraining, source, output_dir, config, settings)


def distill(
    teacher: str | Path,
    source: Any,
    *,
    output_dir: str | Path | None = None,
    config: str | Path | Sequence[str | Path] = (),
    **settings: Any,
) -> Result:
    """Distil a trained backbone into another one without labels.

    Args:
        teacher: what `encoder.pretrained` takes: a run's folder, an export, a file of weights or a timm model's name.

    The other arguments and errors are those of `pretrain`.
    """
    settings = {**settings, "objective": {**settings.get("objective", {}), "teacher": str(teacher)}}
    return _run("distill", pretraining, source, output_dir, config, settings)


def finetune(
    source: Any,
    *,
    output_dir: str | Path | None = None,
    config: str | Path | Sequence[str | Path] = (),
    **settings: Any,
) -> Result:
    """Fine-tune a backbone on labelled images: `finetune("labelled", encoder={"pretrained": "runs/mine"})`.

    Arguments and errors are those of `pretrain`.
    """
    return _run("finetune", supervised, source, output_dir, config, settings)


def embed(
    images: Any, backbone: str | Path, *, feature: str | None = None, batch_size: int = 64
) -> Float[np.ndarray, "n d"]:
    """Features of images, one row each, in fp32.

    Args:
        images: a path, a PIL image or an array [h w c]; or several, in a list, an array [n h w c], a Series or a data
            set.
        backbone: folder of a run or an export, or its safetensors file.
        feature: "cls", "mean", "cls+mean", "cls4" or "cls4+mean"; None: the one by which its run was scored.
        batch_size: images encoded at once.

    Raises:
        ValueError: no backbone, no images, or one that cannot be decoded; names it.
    """
    check_feature(feature)
    loaded = Backbone.load(Path(backbone), PicturesConfig(batch_size=batch_size))
    encoder, kind = loaded.encoder, feature or loaded.feature
    is_one = isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim in (2, 3))
    source = open_memory([images] if is_one else images)
    pieces = extract_features(
        encoder,
        source,
        np.arange(len(source)),
        loaded.transform,
        loaded.settings,
        num_layers=num_layers_for([kind], encoder),
    )
    return select_feature(pieces, kind).numpy()


def _run(
    front: str,
    ending: ModuleType,
    source: Any,
    output_dir: str | Path | None,
    config: str | Path | Sequence[str | Path],
    settings: Mapping[str, Any],
) -> Result:
    """Train as the script `front` does, in this process."""
    try:
        defaults = load_front(front).DEFAULTS
    except FileNotFoundError as error:
        name = front.removeprefix("pretrain_")
        raise ValueError(f"{name!r}: there is no objective of this name; `ssl-vit` lists them") from error
    files = [config] if isinstance(config, str | Path) else list(config)
    words = [f"--config={path}" for path in files] + _words(settings)
    if source is not None and is_on_disk(source):
        words.append(f"--data.source={_text(dict(source) if isinstance(source, dict) else str(source))}")
    elif source is not None:
        words += [f"--data.source={store(source)}", "--data.allow_outside_paths=true"]
    if output_dir is not None:
        words.append(f"--output_dir={output_dir}")
    AcceleratorState._reset_state(reset_partial_state=False)  # an earlier run's precision
    try:
        run = set_up(parse_run(defaults, words), _as_ending(ending))
        return Result(run.folder, train(run))
    finally:
        end_processes()


def _as_ending(module: ModuleType) -> Ending:
    assert isinstance(module, Ending)
    return module


def _words(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings as flags: a mapping is a section, but for mappings within sections, which are values."""
    words = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and not prefix:
            words += _words(value, f"{name}.")
        else:
            words.append(f"--{prefix}{name}={_text(value)}")
    return words


def _text(value: Any) -> str:
    """A value as a flag takes it."""
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, Mapping):  # a mixture
        weights = [weight.item() if isinstance(weight, np.generic) else weight for weight in value.values()]
        value = dict(zip(map(str, value), weights, strict=True))
    value = value.item() if isinstance(value, np.generic) else list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
