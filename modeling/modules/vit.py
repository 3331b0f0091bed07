"""ViT encoder and decoder between an image and its one-dimensional sequence of latent tokens."""

from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from modeling.modules.blocks import SelfAttention, TransformerBlock


@dataclass(frozen=True)
class ViTSize:
    width: int
    num_layers: int
    num_heads: int


VIT_SIZES = {
    "tiny": ViTSize(width=192, num_layers=4, num_heads=3),
    "small": ViTSize(width=512, num_layers=8, num_heads=8),
    "base": ViTSize(width=768, num_layers=12, num_heads=12),
    "large": ViTSize(width=1024, num_layers=24, num_heads=16),
}


class ViTEncoder(nn.Module):
    """Image and latent queries in, one unquantised vector per latent token out.

    Args:
        size: Width, depth and heads.
        image_size, patch_size: Pixels a side.
        num_latent_tokens: N.
        token_size: C, channels of a latent token.
        is_legacy: Read the (B, N, W) memory as (B, W, N) without a transpose before the last projection. The
            published weights were trained so.
    """

    def __init__(
        self,
        *,
        size: ViTSize,
        image_size: int,
        patch_size: int,
        num_latent_tokens: int,
        token_size: int,
        is_legacy: bool = True,
    ):
        super().__init__()
        width, grid = size.width, image_size // patch_size
        self.is_legacy = is_legacy
        self.class_embedding = learned_vectors(1, width)
        self.positional_embedding = learned_vectors(grid * grid + 1, width)
        self.latent_token_positional_embedding = learned_vectors(num_latent_tokens, width)
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(TransformerBlock(width, size.num_heads) for _ in range(size.num_layers))
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, token_size, kernel_size=1)
        self.apply(_init_weights)

    @property
    def num_heads(self) -> int:
        return cast(TransformerBlock, self.transformer[0]).attn.num_heads

    def forward(self, pixels: Tensor, latent_tokens: Tensor) -> Tensor:
        """(B, 3, P, P) and (N, W) to (B, C, 1, N)."""
        batch, num_latent_tokens = pixels.shape[0], latent_tokens.shape[0]
        x = rearrange(self.patch_embed(pixels), "b w rows columns -> b (rows columns) w")  # (B, G*G, W)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(batch, 1, -1), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        latents = (latent_tokens + self.latent_token_positional_embedding).to(x.dtype)
        x = torch.cat([x, latents.expand(batch, -1, -1)], dim=1)  # (B, 1 + G*G + N, W)
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x)
        x = self.ln_post(x[:, -num_latent_tokens:])  # (B, N, W)
        if self.is_legacy:
            x = rearrange(rearrange(x, "b n w -> b (n w)"), "b (w n) -> b w n 1", n=num_latent_tokens)
        else:
            x = rearrange(x, "b n w -> b w n 1")
        return rearrange(self.conv_out(x), "b c n 1 -> b c 1 n")


class ViTDecoder(nn.Module):
    """Quantised latent tokens in, one feature vector per grid cell out; `ffn` makes logits over the pixel codes of it.

    Args:
        size: Width, depth and heads.
        image_size, patch_size: Pixels a side.
        num_latent_tokens: N, the most tokens there can be.
        token_size: C, channels of a latent token.
        num_pixel_codes: Entries of the teacher's codebook.
    """

    def __init__(
        self,
        *,
        size: ViTSize,
        image_size: int,
        patch_size: int,
        num_latent_tokens: int,
        token_size: int,
        num_pixel_codes: int = 1024,
    ):
        super().__init__()
        width = size.width
        self.grid = image_size // patch_size
        self.class_embedding = learned_vectors(1, width)
        self.positional_embedding = learned_vectors(self.grid**2 + 1, width)
        self.mask_token = learned_vectors(1, 1, width)
        self.latent_token_positional_embedding = learned_vectors(num_latent_tokens, width)
        self.decoder_embed = nn.Linear(token_size, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(TransformerBlock(width, size.num_heads) for _ in range(size.num_layers))
        self.ln_post = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Conv2d(width, 2 * width, kernel_size=1), nn.Tanh(), nn.Conv2d(2 * width, num_pixel_codes, kernel_size=1)
        )
        self.apply(_init_weights)

    def forward(self, z: Tensor, lengths: Tensor | None = None, early: list[Tensor] | None = None) -> Tensor:
        """(B, C, 1, K) to one vector per grid cell, (B, W, G, G).

        Args:
            z: The first K quantised tokens of each image.
            lengths: (B,), 1..K: how many of the K tokens each image may use; all of them when not given.
            early: Where given, gets what the first block makes of class, mask and latent tokens, (B, 1 + G*G + K, W).
        """
        batch, _, _, kept = z.shape
        latents = self.decoder_embed(rearrange(z, "b c 1 k -> b k c"))  # (B, K, W)
        latents = latents + self.latent_token_positional_embedding[:kept].to(latents.dtype)
        queries = torch.cat([self.class_embedding, self.mask_token[0].expand(self.grid**2, -1)])
        queries = (queries + self.positional_embedding).to(latents.dtype)  # (1 + G*G, W)
        x = torch.cat([queries.expand(batch, -1, -1), latents], dim=1)  # (B, 1 + G*G + K, W)
        mask = None
        if lengths is not None:
            position = torch.arange(x.shape[1], device=x.device)
            lengths = lengths.to(x.device, non_blocking=True)  # a step waits for no accelerator
            mask = (position < 1 + self.grid**2 + lengths[:, None])[:, None, None]  # (B, 1, 1, T)
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x, mask)
            if early is not None and not early:
                early.append(x)
        x = self.ln_post(x[:, 1 : 1 + self.grid**2])  # the mask positions, (B, G*G, W)
        return rearrange(x, "b (rows columns) w -> b w rows columns", rows=self.grid)  # in channels-last layout


def learned_vectors(*shape: int) -> nn.Parameter:
    """Vectors (..., W) that are trained; at first normal, with variance 1 / W."""
    return nn.Parameter(nn.init.normal_(torch.empty(*shape), std=shape[-1] ** -0.5))


def _init_weights(module: nn.Module) -> None:
    """Truncated normal (0.02) for linear and convolution weights, Xavier for the packed attention input, biases 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, SelfAttention):
        nn.init.xavier_uniform_(module.in_proj_weight)
        nn.init.zeros_(module.in_proj_bias)
