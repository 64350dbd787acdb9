"""Settings that follow from the data, the batch, the size of images and the length of a run."""

import math

from ssl_vit.objectives.objective import Resolved, RunSize

_LARGE = 100_000  # from this many images on, the teacher's temperature warms up to the papers' .07
_SEEN = 375  # images that a run sees for each prototype
_SHORT = 1024 * _SEEN  # runs that see fewer images have no time for a moving centre and soft targets


def choose_num_prototypes(num_images: int, num_seen: float = math.inf) -> int:
    """About one prototype per 16 images, and per 375 that a run of `num_seen` images sees, from 256 to 65,536.

    The second limit is for short runs, where too few images come to each prototype to move it.
    """
    return min(max(2 ** round(math.log2(min(num_images / 16, num_seen / _SEEN))), 256), 65536)


def resolve_distillation(
    size: RunSize, *, warmup_teacher_temp: float, teacher_temp: float | None, teacher_images: int
) -> dict[str, Resolved]:
    """Resolve the prototypes' number and centring, the teacher's temperature and momentum, and the last layer's freeze.

    Args:
        warmup_teacher_temp: the teacher's temperature at the start.
        teacher_temp: its temperature at the end, if given.
        teacher_images: number of images that the paper's teacher averages over.
    """
    images, epochs = f"{size.num_samples:,} images", size.epochs
    seen = size.num_seen
    span = teacher_images / size.batch_size
    most = size.num_steps / 20
    steps = max(min(span, most), 10)
    momentum = round(1 - 1 / steps, 5)
    few = size.num_samples < _LARGE
    short, sees = seen < _SHORT, f"the run sees {seen:,} images, which are few"
    temp = min(warmup_teacher_temp, 0.02 if short else 0.04) if short or few else 0.07
    rises = (temp if teacher_temp is None else teacher_temp) > warmup_teacher_temp
    freeze = min(1 / epochs, 0.1)
    return {
        "num_prototypes": Resolved(
            choose_num_prototypes(size.num_samples, seen),
            f"about one for 16 images and for 375 that are seen, from 256 to 65,536, for {images} and {seen:,} seen",
        ),
        "teacher_temp": Resolved(
            temp,
            f"{sees if short else f'{images} are few'}: a sharp teacher all along"
            if short or few
            else f"the papers', for {images}",
        ),
        "centering": Resolved(
            "sinkhorn" if short else "center", f"{sees} for a moving centre" if short else "the paper's"
        ),
        "teacher_temp_warmup": Resolved(
            0.3 if rises else 0.0, "30 of 100 epochs, as the papers" if rises else "the temperature does not rise"
        ),
        "ema_momentum": Resolved(
            momentum,
            f"the teacher averages over {steps:,.0f} steps: "
            + (
                f"{teacher_images:,} images, as in the paper"
                if span <= most
                else "a twentieth of this short run, or 10"
            ),
        ),
        "freeze_last_layer": Resolved(
            round(freeze, 4), "one epoch, as the paper" if epochs >= 10 else "a tenth of the run, which is short"
        ),
    }


def resolve_blur(size: RunSize) -> Resolved:
    """Smallest and largest deviation of the blur: the papers' .1 and 2 pixels at 224, less for smaller images."""
    side = min(size.image_size)
    if side >= 224:
        return Resolved((0.1, 2.0), "the papers'")
    widest = max(round(2 * side / 224, 2), 0.1)
    return Resolved((0.1, widest), f"2 pixels of the papers' 224 are as much as {widest:g} of {side}")


def resolve_warmup(size: RunSize) -> Resolved:
    """Warm-up of the learning rate as a share of the run."""
    share = round(min(10 / size.epochs, 0.1), 4)
    return Resolved(
        share, "10 epochs, as DINO" if size.epochs >= 100 else "a tenth of the run: 10 epochs would be more"
    )


def resolve_optimizer(*, is_trained: bool) -> Resolved:
    """AdamW for trained weights, Muon for fresh ones."""
    if is_trained:
        return Resolved("adamw", "for trained weights; muon was not tried on them")
    return Resolved("muon", "for fresh weights, which learn more with it in the same time")


def resolve_peak_lr(size: RunSize, *, is_trained: bool, optimizer: str = "adamw") -> Resolved:
    """Peak learning rate: 1e-3 (Muon 2e-3) from 64 images a step on, by the square root below; 5e-5 continuing.

    The papers' peaks lie around it (DINO 1e-3 at 512 images, MAE 2.4e-3 at 4,096), but their rules scale it down with
    the batch: to 4e-5 for MAE with 64 images.
    """
    share = min(size.batch_size / 64, 1.0) ** 0.5
    fresh = 2e-3 if optimizer == "muon" else 1e-3
    peak, of_weights = (5e-5, "trained weights") if is_trained else (fresh, "fresh weights")
    return Resolved(
        peak * share, f"a peak rate of {peak * share:.1e}, for {of_weights} and {size.batch_size} images a step"
    )
