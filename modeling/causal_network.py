"""A small network that predicts each token from those before it, made so that eight-bit integers can take its place.

`codec.entropy.CausalNetwork` is that integer network; this one is what gets trained.
"""

import math

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from modeling.checkpoints.pretrained import Pretrained


class CausalTokenNetwork(Pretrained):
    """For position p: h = relu(b_p + sum of A_pq e(t_q) over q < p), h += relu(W h + c_p) once a block,
    logits = H h + table_p, with code vectors e(t).

    Every pair of positions has its matrix A_pq where `model.entropy.window` is 0. Else the matrices are shared: the
    `window` tokens just before p have one for each distance, of the ones before those the first `reach` one each.

    Args:
        config: `model.entropy`: num_tokens N, codebook_size V, token_size D, width W, blocks, window, reach.
    """

    role = "entropy model"
    pipeline_tag = "other"
    codes: Tensor
    tables: Tensor

    def __init__(self, config: DictConfig):
        super().__init__()
        self.config = config
        size = config.model.entropy
        num_tokens, token_size, width = size.num_tokens, size.token_size, size.width
        self.window, self.reach = size.window, size.reach
        self.register_buffer("codes", torch.zeros(size.codebook_size, token_size))
        self.register_buffer("tables", torch.zeros(num_tokens, size.codebook_size))
        std = 1 / math.sqrt(min(num_tokens, self.window + self.reach or num_tokens) / 2)
        if self.window:
            self.near = nn.Parameter(std * torch.randn(self.window, token_size, width))  # the farthest first
            self.far = nn.Parameter(std * torch.randn(self.reach, token_size, width))
        else:
            self.pairs = nn.Parameter(std * torch.randn(num_tokens, token_size, num_tokens, width))
        self.position_bias = nn.Parameter(torch.zeros(num_tokens, width))
        self.hidden = nn.Parameter(torch.randn(size.blocks, width, width) / math.sqrt(width))
        self.hidden_bias = nn.Parameter(torch.zeros(size.blocks, num_tokens, width))
        self.head = nn.Parameter(0.01 * torch.randn(width, size.codebook_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, N, V), in nats, of each of the tokens (B, N) from those before it."""
        hidden = torch.relu(self.contexts(tokens) + self.position_bias)
        for weight, bias in zip(self.hidden, self.hidden_bias, strict=True):
            hidden = hidden + torch.relu(hidden @ weight + bias)
        return hidden @ self.head + self.tables

    def contexts(self, tokens: Tensor) -> Tensor:
        """(B, N, W), the sum of A_pq e(t_q) over the q before each p."""
        codes = self.codes[tokens]  # (B, N, D)
        if not self.window:
            is_before = torch.ones(len(self.pairs), len(self.pairs), device=codes.device).triu(1)
            return torch.einsum("bqd,qdpw->bpw", codes, self.pairs * is_before[:, None, :, None])
        num_tokens = codes.shape[1]
        windows = nn.functional.pad(codes, (0, 0, self.window, 0)).unfold(1, self.window, 1)[:, :num_tokens]
        near = torch.einsum("bpdj,jdw->bpw", windows, self.near)
        # Far tokens of p: the first min(reach, p - window).
        far = torch.einsum("bqd,qdw->bqw", codes[:, : self.reach], self.far).cumsum(dim=1)
        far = nn.functional.pad(far, (0, 0, 1, 0))  # (B, reach + 1, W)
        places = torch.arange(num_tokens, device=codes.device)
        return near + far[:, (places - self.window).clamp(0, self.reach)]
