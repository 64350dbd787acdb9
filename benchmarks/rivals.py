"""lightly's examples of MAE, DINO and DINOv2 on our images and backbone, judged as our runs are (extra `bench`).

python -m benchmarks.rivals JOB.json    trains one of them; `benchmark.py recipes` writes the job

What the examples fix stays: heads, decoder, losses, temperatures, optimizer, rate, batch and the views' colours
(lightly 1.6, examples/pytorch/mae.py, dino.py and dinov2.py). Sizes are ours: the images', the crops' and the
backbone's, for which the examples take larger ones at 224 pixels. Images are decoded beforehand. One setting is not
the example's: DINOv2 has 2,048 prototypes, as DINO does, since its 65,536 would take most of a CPU's time.
"""

import copy
import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn

from benchmarks.flags import defaults_of
from ssl_vit.core.machine import autocast_dtype, resolve_precision
from ssl_vit.data.augment.evaluation import EvalTransform
from ssl_vit.data.sources.source import Source, open_source
from ssl_vit.data.transform import pair
from ssl_vit.evaluation.evaluate import evaluate_encoder
from ssl_vit.evaluation.features import EncodeSettings
from ssl_vit.evaluation.scores import scores_to_json
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.vit import ViT
from ssl_vit.training import ending
from ssl_vit.training.config import RunConfig, parse_run

RIVALS = {"lightly_mae": "mae", "lightly_dino": "dino", "lightly_dinov2": "dinov2"}
"""Examples by name, each with the objective whose settings name images, backbone and judge."""
EPOCHS = 10  # of the examples of MAE and DINO


def train_rival(job: dict[str, Any]) -> dict[str, Any]:
    """Train for `seconds` of CPU time, and return steps, images, CPU time and scores.

    Args:
        job: `name` in `RIVALS`, `settings` of our script, `seconds`.
    """
    config = parse_run(defaults_of(RIVALS[job["name"]]), job["settings"])
    set_seed(config.seed)  # numpy's too, from which lightly's views draw
    source, labelled = ending.prepare(config, open_source(config.data))
    assert isinstance(source, Source)
    if labelled is None:
        raise ValueError("no labelled images to judge it by: set evaluation.source")
    encoder = config.encoder.build()
    assert isinstance(encoder, ViT), "the examples know Vision Transformers"
    example = {"lightly_mae": _mae, "lightly_dino": _dino, "lightly_dinov2": _dinov2}[job["name"]]
    batch, transform, step = example(config, encoder)
    images = _Views(source, transform)
    device = torch.device("cpu")
    dtype = autocast_dtype(resolve_precision(config.precision, device))
    steps, seen, start = 0, 0, _cpu_seconds()
    for views in _batches(images, batch):
        used = _cpu_seconds() - start
        if used >= job["seconds"]:
            break
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            step(views, used / job["seconds"])
        steps += 1
        seen += len(views[0])
    used = _cpu_seconds() - start
    scores = evaluate_encoder(
        _as_ours(encoder, config.encoder),
        *labelled,
        config.evaluation,
        EvalTransform(encoder.image_size, config.data.normalization, config.evaluation.crop_pct),
        EncodeSettings(config.evaluation.batch_size, device, 0, dtype),
        seed=config.seed,
    )
    return {
        "steps": steps,
        "images": seen,
        "cpu_seconds_per_step": used / steps,
        "scores": scores_to_json({"trained": scores}),
    }


Example = tuple[int, Callable[[Image.Image], list[Tensor]], Callable[[list[Tensor], float], None]]
"""Images of a step, the views of an image, and the step, which is given views and the share of the time that is up."""


def _mae(config: RunConfig, encoder: ViT) -> Example:
    from lightly.models import utils  # pyright: ignore[reportMissingImports]
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM  # pyright: ignore[reportMissingImports]
    from lightly.transforms import MAETransform  # pyright: ignore[reportMissingImports]

    backbone = MaskedVisionTransformerTIMM(vit=encoder.vit)
    decoder = MAEDecoderTIMM(
        num_patches=encoder.num_patches,
        patch_size=encoder.stride[0],
        in_chans=encoder.in_chans,
        embed_dim=encoder.embed_dim,
        decoder_embed_dim=512,
        decoder_depth=1,
        decoder_num_heads=16,
    )
    optimizer = torch.optim.AdamW([*backbone.parameters(), *decoder.parameters()], lr=1.5e-4)
    length = backbone.sequence_length

    def step(views: list[Tensor], progress: float) -> None:
        images = views[0]
        keep, masked = utils.random_token_mask((len(images), length), 0.75, device=images.device)
        visible = decoder.embed(backbone.encode(images, idx_keep=keep))
        tokens = utils.repeat_token(decoder.mask_token, (len(images), length))
        tokens = utils.set_at_index(tokens, keep, visible.type_as(tokens))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(tokens), masked))
        target = utils.get_at_index(utils.patchify(images, encoder.stride[0]), masked - 1)
        _descend(optimizer, nn.functional.mse_loss(predicted, target))

    normalize = {"mean": config.data.mean, "std": config.data.std}
    return 256, MAETransform(input_size=pair(encoder.image_size)[0], normalize=normalize), step


def _dino(config: RunConfig, encoder: ViT) -> Example:
    from lightly.loss import DINOLoss  # pyright: ignore[reportMissingImports]
    from lightly.models.modules import DINOProjectionHead  # pyright: ignore[reportMissingImports]
    from lightly.models.utils import update_momentum  # pyright: ignore[reportMissingImports]
    from lightly.transforms import DINOTransform  # pyright: ignore[reportMissingImports]
    from lightly.utils.scheduler import cosine_schedule  # pyright: ignore[reportMissingImports]

    settings: Any = config.objective
    head = DINOProjectionHead(encoder.embed_dim, 512, 64, 2048, freeze_last_layer=1)
    teacher_head = DINOProjectionHead(encoder.embed_dim, 512, 64, 2048)
    student = nn.Sequential(encoder.vit, _ClassToken(), head)
    teacher = nn.Sequential(copy.deepcopy(encoder.vit), _ClassToken(), teacher_head).requires_grad_(False)
    criterion = DINOLoss(output_dim=2048, warmup_teacher_temp_epochs=EPOCHS // 2)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.001)

    def step(views: list[Tensor], progress: float) -> None:
        epoch = int(progress * EPOCHS)
        update_momentum(student, teacher, m=cosine_schedule(epoch, EPOCHS, 0.996, 1))
        with torch.no_grad():
            targets = [teacher(view) for view in views[:2]]
        loss = criterion(targets, [student(view) for view in views], epoch=epoch)
        _descend(optimizer, loss, lambda: head.cancel_last_layer_gradients(current_epoch=epoch))

    transform = DINOTransform(
        global_crop_size=pair(encoder.image_size)[0],
        local_crop_size=pair(settings.local_crop_size)[0],
        normalize={"mean": config.data.mean, "std": config.data.std},
    )
    return 64, transform, step


def _dinov2(config: RunConfig, encoder: ViT) -> Example:
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss  # pyright: ignore[reportMissingImports]
    from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM  # pyright: ignore[reportMissingImports]
    from lightly.models.utils import random_block_mask, update_drop_path_rate, update_momentum  # pyright: ignore[reportMissingImports]
    from lightly.transforms import DINOTransform  # pyright: ignore[reportMissingImports]
    from lightly.utils.scheduler import cosine_schedule, linear_warmup_schedule  # pyright: ignore[reportMissingImports]

    settings: Any = config.objective
    student = MaskedVisionTransformerTIMM(vit=encoder.vit, antialias=False, pos_embed_initialization="skip")
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    update_drop_path_rate(student.vit, drop_path_rate=0.1, mode="uniform")
    head = DINOv2ProjectionHead(encoder.embed_dim, output_dim=2048)
    teacher_head = DINOv2ProjectionHead(encoder.embed_dim, output_dim=2048).requires_grad_(False).eval()
    dino, ibot, koleo = DINOLoss(output_dim=2048), IBOTPatchLoss(output_dim=2048), KoLeoLoss()
    optimizer = torch.optim.AdamW([*student.parameters(), *head.parameters()], lr=0.001)

    def step(views: list[Tensor], progress: float) -> None:
        images = torch.cat(views[:2])
        block_mask = random_block_mask((len(images), *encoder.grid_size))
        mask = nn.functional.pad(block_mask.flatten(1), (1, 0))  # the class token stays
        temperature = linear_warmup_schedule(
            step=round(1000 * progress), warmup_steps=600, start_value=0.04, end_value=0.07
        )
        with torch.no_grad():
            features = teacher.encode(images)
            targets, masked_targets = teacher_head(features[:, 0]), teacher_head(features[mask])
        features = student.encode(images, mask=mask)
        tokens = features[:, 0]
        outputs = torch.cat([head(tokens), head(student.encode(torch.cat(views[2:]))[:, 0])])
        loss = dino(targets.chunk(2), outputs.chunk(len(views)), teacher_temp=temperature)
        loss = loss + ibot(masked_targets, head(features[mask]), mask=block_mask, teacher_temp=temperature)
        loss = loss + 0.1 * sum(koleo(part) for part in tokens.chunk(2))
        for group in optimizer.param_groups:
            group["weight_decay"] = cosine_schedule(round(1000 * progress), 1000, 0.04, 0.4)
        _descend(optimizer, loss)
        momentum = cosine_schedule(round(1000 * progress), 1000, 0.992, 1.0)
        update_momentum(student, teacher, m=momentum)
        update_momentum(head, teacher_head, m=momentum)

    transform = DINOTransform(
        global_crop_size=pair(encoder.image_size)[0],
        global_crop_scale=(0.32, 1),
        local_crop_size=pair(settings.local_crop_size)[0],
        local_crop_scale=(0.05, 0.32),
        n_local_views=8,
        normalize={"mean": config.data.mean, "std": config.data.std},
    )
    return 64, transform, step


class _ClassToken(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, then: Callable[[], None] = lambda: None) -> None:
    loss.backward()
    then()
    optimizer.step()
    optimizer.zero_grad()


class _Views(torch.utils.data.Dataset):
    """Views of images that are decoded already."""

    def __init__(self, source: Source, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        images = (source.image(row, 3) for row in range(len(source)))
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> list[Tensor]:
        return self.transform(self.images[row])


def _batches(images: _Views, size: int) -> Iterator[list[Tensor]]:
    while True:
        yield from torch.utils.data.DataLoader(images, batch_size=size, shuffle=True, drop_last=len(images) >= size)


def _as_ours(encoder: ViT, config: EncoderConfig) -> Encoder:
    """The trained weights in an encoder that nothing has wrapped."""
    ours = config.build()
    own = ours.state_dict()
    ours.load_state_dict({name: value for name, value in encoder.state_dict().items() if name in own})
    return ours.eval()


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    job = Path(sys.argv[1])
    job.with_suffix(".found").write_text(json.dumps(train_rival(json.loads(job.read_text()))))
