"""Transformer pieces that every network here shares: attention and the pre-norm ViT block."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from utils.speed import cpu_has_bfloat16, known_true


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention, softmax(q k^T / sqrt(d)) v, by the arithmetic that is fastest on the device.

    That is `scaled_dot_product_attention` (flash kernels on accelerators; on one CPU core 1.2 to 2.5 x as fast as plain
    operations in float32), except in half precision on CPUs, where a training step of the plain operations took a half
    to a quarter of its time (`scripts/benchmark.py --only attention`; docs/benchmarks.md).

    Args:
        queries, keys, values: (B, heads, T, d).
        mask: Boolean, broadcastable to (B, heads, T, T); True where a query may look. None lets all look at all.
        dropout: Probability of dropping an attention weight.

    Returns:
        (B, heads, T, d).
    """
    if queries.device.type != "cpu" or queries.dtype == torch.float32:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
    # Autocast would convert the scores to float32 and back; softmax computes in float32 anyway.
    with torch.autocast("cpu", enabled=False):
        scores = (queries / math.sqrt(queries.shape[-1])) @ keys.mT  # (B, heads, T, T)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return F.dropout(scores.softmax(dim=-1), dropout) @ values


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x W^T + b, with `gelu` followed by exact GELU, by the arithmetic that is fastest on the device.

    That is oneDNN's for inference on CPUs with AVX-512: in float32 `F.linear` calls MKL, which leaves AVX-512 of AMD's
    processors unused and took 2.2 x as long; in bfloat16 it copies the bias over the output first.
    """
    if x.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if dtype in ONEDNN_DTYPES:
            x, weight, bias = (value if value is None else value.to(dtype) for value in (x, weight, bias))
            return onednn_linear(x, weight, bias, gelu)
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """oneDNN's linear layer: what torch.compile itself makes of one on CPUs."""
    after: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *after)


def faster_in_onednn() -> tuple[torch.dtype, ...]:
    """What oneDNN's linear layers compute here faster than torch's own.

    With AVX-512 2.2 x on AMD's processors; without it, up to 1.6 x slower where GELU follows (docs/benchmarks.md).
    """
    one = torch.ones(1, 1, device="cpu")
    if not (
        torch.backends.mkldnn.is_available()
        and known_true(lambda: torch.cpu._is_avx512_supported())
        and known_true(lambda: onednn_linear(one, one, None, gelu=True).shape == (1, 1))
    ):
        return ()
    return (torch.float32, torch.bfloat16) if cpu_has_bfloat16() else (torch.float32,)


ONEDNN_DTYPES = faster_in_onednn()


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        return linear(x, self.weight, self.bias, gelu)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`, batch first."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3 W)
        queries, keys, values = rearrange(qkv, "b t (qkv heads d) -> qkv b heads t d", qkv=3, heads=self.num_heads)
        x = attention(queries, keys, values, mask)
        return self.out_proj(rearrange(x, "b heads t d -> b t (heads d)"))


class MLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.c_fc = Linear(width, hidden)
        self.c_proj = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x, gelu=True))


class TransformerBlock(nn.Module):
    """Pre-norm ViT block (One-D-Piece, arXiv 2501.10064, section 3; TiTok, arXiv 2406.07550)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int = 4):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, num_heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio * width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))
