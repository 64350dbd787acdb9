"""The proof that an export gives what was trained."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ssl_vit.models.encoder import Encoder, eval_mode
from ssl_vit.models.vit import set_fused_attention

TOLERANCE = 1e-4
"""Largest difference of a value in fp32, as a share of the largest value where that is above 1. Libraries compute the
same function in another order: a convolution and the equal matrix product differ in their last bits."""


@torch.inference_mode()
def prove_equal(
    trained: nn.Module,
    encoder: Encoder,
    compute: Callable[[Tensor], Iterable[Tensor]],
    loaded: nn.Module,
    *,
    what: str = "features",
    tolerance: float = TOLERANCE,
) -> None:
    """Compare what the trained and the loaded model compute from two random images.

    Args:
        trained: the model that `compute` runs; put into eval mode meanwhile.
        encoder: gives the size of the images, the device and the kernel of attention.
        loaded: returns a tensor, or as many as `compute`.

    Raises:
        RuntimeError: see `largest_difference`.
    """
    device = next(encoder.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, encoder.in_chans, *encoder.image_size, generator=generator).to(device)
    fused = [module.fused_attn for module in encoder.modules() if hasattr(module, "fused_attn")]
    set_fused_attention(loaded.to(device).eval(), all(fused))  # two kernels round differently
    exact = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    with eval_mode(trained), exact:  # TF32 would round a convolution, and not the equal matrix product
        expected, found = compute(images), loaded(images)
    for pair in zip(expected, [found] if isinstance(found, Tensor) else found, strict=True):
        largest_difference(*pair, what=what, tolerance=tolerance)


def largest_difference(
    expected: Tensor, found: Tensor, *, what: str = "features", tolerance: float = TOLERANCE
) -> float:
    """The largest difference between a trained model's output and an export's.

    Raises:
        RuntimeError: it is above the tolerance, or the shapes differ.
    """
    if expected.shape != found.shape:
        raise RuntimeError(f"the exported {what} have shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    difference = float((expected - found).abs().max())
    allowed = tolerance * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise RuntimeError(f"the exported {what} differ from the trained ones by {difference:.2e} (> {allowed:.2e})")
    return difference
