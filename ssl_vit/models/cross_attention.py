"""Blocks whose tokens look at other tokens and not at each other."""

from functools import partial
from typing import Any

from einops import rearrange
from jaxtyping import Float
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional as F


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a memory of a width of its own. `fused_attn` as in timm's attention."""

    def __init__(self, dim: int, memory_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.fused_attn = num_heads, True
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(memory_dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, queries: Float[Tensor, "b m d"], memory: Float[Tensor, "b n e"]) -> Float[Tensor, "b m d"]:
        q = rearrange(self.q(queries), "b m (h e) -> b h m e", h=self.num_heads)
        k, v = rearrange(self.kv(memory), "b n (two h e) -> two b h n e", two=2, h=self.num_heads)
        if self.fused_attn:
            found = F.scaled_dot_product_attention(q, k, v)
        else:
            found = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1).to(v.dtype) @ v
        return self.proj(rearrange(found, "b h m e -> b m (h e)"))


class CrossBlock(nn.Module):
    """Cross-attention and MLP, each after a norm and with a shortcut: CrossMAE's decoder block (arXiv:2401.14391).

    The memory comes normalised, as an encoder's last tokens are.
    """

    def __init__(self, dim: int, memory_dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn = CrossAttention(dim, memory_dim, num_heads)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, queries: Float[Tensor, "b m d"], memory: Float[Tensor, "b n e"]) -> Float[Tensor, "b m d"]:
        queries = queries + self.attn(self.norm1(queries), memory)
        return queries + self.mlp(self.norm2(queries))
