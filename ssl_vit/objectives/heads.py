"""Projection heads."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class DINOHead(nn.Module):
    """DINO's head (Caron et al. 2021, arXiv:2104.14294): three linear layers with GELU, a bottleneck, L2-normalisation,
    and prototypes whose direction and norm are separate parameters.

    Parameter names are those of the paper's code.

    Args:
        num_prototypes: None = no last layer, as in SimDINO: the L2-normalised bottleneck is the output.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        num_prototypes: int | None,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
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
