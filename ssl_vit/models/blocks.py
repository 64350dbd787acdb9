"""Transformer blocks: timm's, extended to packed tokens of images of several sizes, and a cross-attention block."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Shapes = tuple[tuple[int, int], ...]  # per group: (number of sequences, tokens of each)
Runner = Callable[[nn.Module, Tensor, dict[str, Any]], Tensor]
_runner: ContextVar[Runner | None] = ContextVar("runner", default=None)


class Block(TimmBlock):
    """timm's block, under the same class name, that also takes sequences of different lengths packed into one.

    With `shapes`, everything but attention itself runs on all groups of sequences at once, without padding.
    `cls_only` computes only the class token's output; other tokens serve as keys and values. It takes a quarter of the
    operations.
    """

    def forward(
        self, x: Tensor, *args: Any, shapes: Shapes | None = None, cls_only: bool = False, **kwargs: Any
    ) -> Tensor:
        if shapes is None:
            return super().forward(x, *args, **kwargs)
        attended = self.ls1(_attend(self.attn, self.norm1(x), shapes, cls_only))
        if cls_only:
            x, shapes = _first_tokens(x, shapes), tuple((count, 1) for count, _ in shapes)
        x = x + _drop_path(self.drop_path1, attended, shapes)
        return x + _drop_path(self.drop_path2, self.ls2(self.mlp(self.norm2(x))), shapes)


class CompilableDropPath(nn.Module):
    """timm's DropPath with its rate in a buffer: as a Python float every block would recompile."""

    keep_prob: Tensor

    def __init__(self, drop_prob: float, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("keep_prob", torch.tensor(1 - drop_prob, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) < self.keep_prob
        return x * (kept / self.keep_prob).to(x.dtype)


def make_packable(blocks: Iterable[nn.Module]) -> bool:
    """Turn timm's plain blocks into ours, in place; if any is of another kind, change nothing and return False."""
    blocks = list(blocks)
    if not all(type(block) is TimmBlock and type(block.attn) is Attention for block in blocks):
        return False
    for block in blocks:
        block.__class__ = Block
    return True


def run_blocks(
    blocks: nn.Module, tokens: Float[Tensor, "b t d"], grad_checkpointing: bool, **pack_kwargs: Any
) -> Float[Tensor, "b _ d"]:
    """Run tokens through a list of blocks.

    With gradient checkpointing a block stores only its input, and the backward pass recomputes the block with the same
    drop path (Chen et al., 2016, arXiv:1604.06174).

    Args:
        pack_kwargs: `shapes` of packed groups, and `cls_only` for the last block; empty for unpacked tokens.
    """
    checkpointed = grad_checkpointing and torch.is_grad_enabled()  # a teacher has no backward pass
    runner = _runner.get()
    if runner is not None and not checkpointed:
        return runner(blocks, tokens, pack_kwargs)
    return run_in_turn(blocks, tokens, pack_kwargs, checkpointed)


def run_in_turn(
    blocks: Any, tokens: Float[Tensor, "b ..."], pack_kwargs: dict[str, Any], checkpointed: bool = False
) -> Float[Tensor, "b ..."]:
    """Run blocks one after the other; `checkpointed` recomputes them in the backward pass."""
    before_last = {**pack_kwargs, "cls_only": False} if "cls_only" in pack_kwargs else pack_kwargs
    for number, block in enumerate(blocks, start=1):
        given = pack_kwargs if number == len(blocks) else before_last
        tokens = checkpoint(block, tokens, use_reentrant=False, **given) if checkpointed else block(tokens, **given)
    return tokens


@contextmanager
def runs_blocks(runner: Runner) -> Iterator[None]:
    """Let `run_blocks` call `runner` with blocks, tokens and `pack_kwargs` instead of running the blocks."""
    before = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(before)


def run_packed_blocks(
    blocks: nn.ModuleList | nn.Sequential,
    groups: Sequence[Float[Tensor, "_ _ d"]],
    grad_checkpointing: bool,
    cls_only: bool = False,
) -> list[Float[Tensor, "_ _ d"]]:
    """`run_blocks` on several groups of sequences at once; within a group all have the same length.

    Args:
        cls_only: return only the class token of each sequence, [b 1 d].
    """
    shapes = tuple((group.shape[0], group.shape[1]) for group in groups)
    packed = torch.cat([rearrange(group, "b t d -> 1 (b t) d") for group in groups], dim=1)
    cls_only = cls_only and len(blocks) > 0
    packed = run_blocks(blocks, packed, grad_checkpointing, shapes=shapes, cls_only=cls_only)
    lengths = [1 if cls_only else length for _, length in shapes]
    parts = packed.split([len(group) * length for group, length in zip(groups, lengths, strict=True)], dim=1)
    return [rearrange(part, "1 (b t) d -> b t d", b=len(group)) for part, group in zip(parts, groups, strict=True)]


def _first_tokens(x: Float[Tensor, "1 n d"], shapes: Shapes) -> Float[Tensor, "1 s d"]:
    """The first token of every sequence."""
    parts = x.split([count * length for count, length in shapes], dim=1)
    firsts = [
        rearrange(part, "1 (b t) d -> 1 b t d", b=count)[:, :, 0]
        for part, (count, _) in zip(parts, shapes, strict=True)
    ]
    return torch.cat(firsts, dim=1)


def _attend(attn: Any, x: Float[Tensor, "1 n d"], shapes: Shapes, cls_only: bool = False) -> Float[Tensor, "1 m d"]:
    """timm's attention within each sequence; with `cls_only` only the first token of each is a query."""
    lengths = asking = [count * length for count, length in shapes]
    queries, keys, values = attn.qkv(x).chunk(3, dim=-1)
    if cls_only:
        queries, asking = _first_tokens(queries, shapes), [count for count, _ in shapes]
    found = []
    parts = zip(queries.split(asking, dim=1), keys.split(lengths, dim=1), values.split(lengths, dim=1), strict=True)
    for part, (count, _) in zip(parts, shapes, strict=True):
        q, k, v = (rearrange(one, "1 (b t) (h e) -> b h t e", b=count, h=attn.num_heads) for one in part)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if attn.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0)
        else:
            out = attn.attn_drop((q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        found.append(rearrange(out, "b h t e -> 1 (b t) (h e)"))
    together = attn.norm(torch.cat(found, dim=1))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        together = together * gate(_first_tokens(x, shapes) if cls_only else x).sigmoid()
    return attn.proj_drop(attn.proj(together))


def _drop_path(path: nn.Module, x: Float[Tensor, "1 n d"], shapes: Shapes) -> Float[Tensor, "1 n d"]:
    """Stochastic depth: one draw for each sequence, repeated for its tokens."""
    if not (isinstance(path, DropPath | CompilableDropPath) and path.training):
        return path(x)
    drawn = path(x.new_ones(sum(count for count, _ in shapes), 1))
    counts = torch.cat([drawn.new_full((count,), length, dtype=torch.int64) for count, length in shapes])
    return x * drawn.repeat_interleave(counts, dim=0, output_size=x.shape[1])


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a memory of another width. `fused_attn` as in timm's attention."""

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

    The memory must be normalised, as an encoder's last tokens are.
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
