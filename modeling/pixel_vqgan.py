"""Pixel VQGAN, the stage-1 teacher: an image as a grid of pixel codes (MaskGIT-VQGAN, arXiv 2202.04200)."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from modeling.checkpoints.pretrained import Pretrained
from modeling.checkpoints.registry import TOKENIZER, register
from modeling.modules.conv import ConvDecoder, ConvEncoder
from modeling.modules.quantizer import VectorQuantizer
from utils.errors import UserError

PUBLISHED_SIZES = {
    "channels": 128,
    "channel_multipliers": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "latent_channels": 256,
    "norm_groups": 32,
    "codebook_size": 1024,
}


@dataclass(frozen=True)
class ConvSizes:
    """Arguments of the convolutional halves, and the number of codes between them."""

    conv: dict[str, Any]
    codebook_size: int


def conv_sizes(config: DictConfig) -> ConvSizes:
    """`model.pixel_vqgan` of a config, the published MaskGIT-VQGAN where it says nothing."""
    given = config.model.get("pixel_vqgan") or {}
    sizes = {name: given.get(name, default) for name, default in PUBLISHED_SIZES.items()}
    codebook_size = sizes.pop("codebook_size")
    return ConvSizes(
        conv=sizes | {"channel_multipliers": list(sizes["channel_multipliers"])}, codebook_size=codebook_size
    )


@register(TOKENIZER, "pixel_vqgan")
class PixelVQGAN(Pretrained):
    """Convolutional autoencoder with a plain nearest-neighbour codebook on a G x G grid.

    Args:
        config: dict or DictConfig; `model.pixel_vqgan.*` holds the sizes (published ones by default) and
            `commitment_cost` (0.25).
    """

    role = "teacher"
    unseen = {"model.pixel_vqgan.norm_groups": PUBLISHED_SIZES["norm_groups"]}

    def __init__(self, config: dict | DictConfig):
        super().__init__()
        self.config = config = config if isinstance(config, DictConfig) else OmegaConf.create(config)
        sizes = conv_sizes(config)
        self.downsampling = 2 ** (len(sizes.conv["channel_multipliers"]) - 1)
        self.encoder = ConvEncoder(**sizes.conv)
        self.decoder = ConvDecoder(**sizes.conv)
        self.quantize = VectorQuantizer(
            codebook_size=sizes.codebook_size,
            token_size=sizes.conv["latent_channels"],
            commitment_cost=(config.model.get("pixel_vqgan") or {}).get("commitment_cost", 0.25),
            use_l2_norm=False,
        )

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixel codes (B, G*G) of images (B, 3, H, W) in [0, 1], G = P / downsampling."""
        self._check(pixels)
        hidden = self.encoder(pixels)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.quantize.nearest(hidden.float().movedim(1, -1)).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, 3, P, P) in [0, 1] of codes (B, G*G) or (B, G, G)."""
        if codes.ndim == 2:
            grid = round(codes.shape[1] ** 0.5)
            if grid * grid != codes.shape[1]:
                raise UserError(
                    f"codes (B, G*G) must fill a square grid, got {codes.shape[1]}; give (B, H, W) otherwise"
                )
            codes = codes.view(-1, grid, grid)
        return self._decoded(self.quantize.lookup(codes).movedim(-1, 1)).float().clamp(0, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Unclamped reconstruction (B, 3, P, P) through the codes, and the quantizer's losses and codes (B, G, G)."""
        self._check(pixels)
        z_quantized, result = self.quantize(self.encoder(pixels))
        return self._decoded(z_quantized), result

    def _decoded(self, z_quantized: Tensor) -> Tensor:
        """Images of codes, which are float32 where the weights may be half."""
        return self.decoder(z_quantized.to(self.quantize.embedding.weight.dtype))

    def _check(self, pixels: Tensor) -> None:
        if pixels.ndim != 4 or pixels.shape[1] != 3 or any(side % self.downsampling for side in pixels.shape[2:]):
            raise UserError(
                f"the pixel VQGAN takes (B, 3, H, W) with sides that are multiples of {self.downsampling}, "
                f"got {tuple(pixels.shape)}"
            )


def load_teacher(config: Mapping | DictConfig, source: str | os.PathLike) -> PixelVQGAN:
    """The pixel VQGAN of sizes `config.model.pixel_vqgan`, with the weights of `source`, frozen, in evaluation mode.

    Raises:
        WeightsError: As `Pretrained.from_pretrained`.
    """
    return PixelVQGAN.from_pretrained(source, config=config).requires_grad_(False)
