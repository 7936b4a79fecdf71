"""Grouped-query attention with rotary positions (Hugging Face's rotate_half layout), heads cut along tp.

    x[T/tp, D] -> all_gather -> q[T, H/tp, C] k,v[T, G/tp, C] -> rotate -> attend -> o[T, D]{tp} -> reduce_scatter

With `qk_norm` the heads of q and k are normed before they are rotated: "head" each by itself, with one weight[C] for
all (Qwen3), "projection" all together (OLMoE). Attention is causal and never crosses a document: positions restart at 0
where a document starts.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_engine.config import Model
from moe_engine.model.norm import RMSNorm, WideNorm
from moe_engine.parallel.collectives import all_gather, reduce_scatter
from moe_engine.parallel.linear import ColumnLinear, RowLinear
from moe_engine.parallel.mesh import Axis, Mesh


class Places(NamedTuple):
    """What attention knows of a micro-batch: cos, sin [B, 1, S, C]; bias [B, 1, S, S], 0 or -inf, or None = causal;
    and what they were made of, positions int64 and rotary frequencies [C/2]."""

    cos: Tensor
    sin: Tensor
    bias: Tensor | None
    positions_BS: Tensor
    inverse_frequency: Tensor


def inverse_frequencies(config: Model) -> Tensor:
    """Rotary frequencies [C/2] in fp32, with Llama-3's scaling of long wavelengths when the config asks for it. On CPU,
    also where a model is built without storage: they are numbers, not weights to come."""
    head_dim = config.head_dim
    inverse = config.rope_theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    wavelength = 2 * math.pi / inverse
    turns = scaling.original_max_position_embeddings / wavelength
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(inverse / scaling.factor, inverse, smooth.clamp(0, 1))


def places(positions_BS: Tensor, inverse_frequency: Tensor, dtype: torch.dtype) -> Places:
    """Rotation tables and the bias of one micro-batch, made once for all layers; None when no document ends inside."""
    cos, sin = turns(positions_BS.unsqueeze(1), inverse_frequency, dtype)
    starts_BS = positions_BS == 0
    bias = document_bias(starts_BS.cumsum(1), dtype) if bool(starts_BS[:, 1:].any()) else None
    return Places(cos, sin, bias, positions_BS, inverse_frequency)


def turns(positions: Tensor, inverse_frequency: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [.., C] of positions[..]."""
    angle = positions.unsqueeze(-1).float() * inverse_frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def document_bias(document_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, S, S]: 0 where a query may see a key, not later and of the same document, -inf elsewhere."""
    same = (document_BS.unsqueeze(2) == document_BS.unsqueeze(1)).tril().unsqueeze(1)
    return torch.zeros_like(same, dtype=dtype).masked_fill_(~same, -math.inf)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x[.., C]: pairs are (i, i + C/2)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def head_norm(config: Model, heads: int, tp: Axis) -> nn.Module:
    """The norm of q's or k's heads, on x[.., heads/tp, C]."""
    if config.qk_norm == "projection":
        return WideNorm(heads * config.head_dim, config.rms_norm_eps, tp)
    return RMSNorm(config.head_dim, config.rms_norm_eps, tp) if config.qk_norm == "head" else nn.Identity()


class Attention(nn.Module):
    """q, k, v, o of one layer. This rank holds H/tp query heads and G/tp kv heads."""

    def __init__(self, config: Model, mesh: Mesh):
        super().__init__()
        self.tp, self.head_dim = mesh.tp, config.head_dim
        heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        std = config.initializer_range
        self.q = ColumnLinear(hidden, heads * self.head_dim, mesh.tp, std)
        self.k = ColumnLinear(hidden, kv_heads * self.head_dim, mesh.tp, std)
        self.v = ColumnLinear(hidden, kv_heads * self.head_dim, mesh.tp, std)
        self.o = RowLinear(heads * self.head_dim, hidden, mesh.tp, std)
        self.q_norm, self.k_norm = head_norm(config, heads, mesh.tp), head_norm(config, kv_heads, mesh.tp)

    def forward(self, x_TD: Tensor, at: Places) -> Tensor:
        """x[T/tp, D], normalised -> the layer's contribution [T/tp, D]."""
        h_TD = all_gather(x_TD, self.tp)
        sequences, _, length, _ = at.cos.shape
        q, k, v = (p(h_TD).view(sequences, length, -1, self.head_dim) for p in (self.q, self.k, self.v))
        q, k, v = (x.transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v))
        a_BHSC = F.scaled_dot_product_attention(
            rotate(q, at.cos, at.sin),
            rotate(k, at.cos, at.sin),
            v,
            attn_mask=at.bias,
            is_causal=at.bias is None,
            enable_gqa=True,
        )
        a_TD = a_BHSC.transpose(1, 2).reshape(sequences * length, -1)
        return reduce_scatter(self.o(a_TD), self.tp)
