"""Projection heads."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.core.distributed import gather_with_gradient


class DINOHead(nn.Module):
    """DINO's head (Caron et al. 2021, arXiv:2104.14294): three linear layers with GELU, a bottleneck, L2-normalisation,
    and prototypes whose direction and norm are separate parameters.

    Parameter names are those of the paper's code.

    Args:
        num_prototypes: None = no last layer, as in SimDINO: the L2-normalised bottleneck is the output.
        batch_norm: normalise hidden layers over all rows, as `use_bn_in_head` in the paper's code.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        num_prototypes: int | None,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, out_width in pairwise((in_dim, hidden_dim, hidden_dim)):
            norm = [BatchNorm(out_width)] if batch_norm else []
            layers += [nn.Linear(width, out_width), *norm, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        self.last_layer: Prototypes | None = None
        if num_prototypes is not None:
            self.last_layer = Prototypes(bottleneck_dim, num_prototypes, trainable_norm=not norm_last_layer)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, features: Float[Tensor, "*b d"], as_factors: bool = False
    ) -> Float[Tensor, "*b k"] | tuple[Float[Tensor, "*b e"], Float[Tensor, "k e"]]:
        """Logits: the cosine to each prototype, times its norm; or the two matrices whose product they are."""
        # The norm is taken in fp32: squares of 256 half-precision numbers lose too much.
        bottleneck = F.normalize(self.mlp(features).float(), dim=-1)
        if self.last_layer is None:
            return bottleneck
        return (bottleneck, self.last_layer.weight()) if as_factors else self.last_layer(bottleneck)


class Prototypes(nn.Module):
    """A linear layer without bias whose rows have a direction `weight_v` and a norm `weight_g` (weight norm)."""

    def __init__(self, in_dim: int, num_prototypes: int, *, trainable_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=trainable_norm)
        # The paper's code keeps torch's initialisation of a linear layer here.
        self.weight_v = nn.Parameter(nn.Linear(in_dim, num_prototypes, bias=False).weight.detach())

    def weight(self) -> Float[Tensor, "k d"]:
        """Directions times norms."""
        # The operation behind torch's weight_norm: unlike a division and a product it keeps one copy of the weights.
        return torch._weight_norm(self.weight_v, self.weight_g, 0)  # pyright: ignore[reportPrivateImportUsage]

    def forward(self, features: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        return F.linear(features, self.weight())


class BatchNorm(nn.Module):
    """Batch norm over the rows of all processes, in fp32, in evaluation as in training."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, rows: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        with torch.autocast(rows.device.type, enabled=False):
            centered = rows.float() - mean_of_rows(rows.float())
            variance = mean_of_rows(centered.square())
            return centered * (variance + self.eps).rsqrt() * self.weight + self.bias


def mean_of_rows(rows: Float[Tensor, "*b d"]) -> Float[Tensor, " d"]:
    """Mean over the rows of all processes, of any number each; gradients flow to all of them."""
    rows = rows.flatten(0, -2)
    part = torch.cat([rows.sum(dim=0), rows.new_full((1,), len(rows))])
    whole = gather_with_gradient(part[None]).sum(dim=0)
    return whole[:-1] / whole[-1].clamp(min=1)
