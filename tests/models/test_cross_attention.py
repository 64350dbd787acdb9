import pytest
import torch
from torch import nn

from ssl_vit.models.blocks import CrossAttention, CrossBlock


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_torchs_own(fused: bool) -> None:
    own, torchs = CrossAttention(16, 24, 4), nn.MultiheadAttention(16, 4, kdim=24, vdim=24, batch_first=True)
    own.fused_attn = fused
    key, value = own.kv.weight.data.chunk(2)
    torchs.q_proj_weight.data, torchs.k_proj_weight.data, torchs.v_proj_weight.data = own.q.weight.data, key, value
    torchs.in_proj_bias.data = torch.cat([own.q.bias.data, own.kv.bias.data])
    torchs.out_proj.load_state_dict(own.proj.state_dict())
    queries, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 24)
    torch.testing.assert_close(own(queries, memory), torchs(queries, memory, memory, need_weights=False)[0])


def test_queries_of_a_block_do_not_see_each_other() -> None:
    block, queries, memory = CrossBlock(16, 24, 4), torch.randn(2, 5, 16), torch.randn(2, 7, 24)
    torch.testing.assert_close(block(queries, memory)[:, 1:3], block(queries[:, 1:3], memory))
    assert not torch.allclose(block(queries, memory), block(queries, memory + 1))
