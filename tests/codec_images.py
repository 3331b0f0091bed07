"""A tiny tokenizer with entropy models, and images, for the tests of the codec."""

import numpy as np
import torch
from PIL import Image

from codec.entropy import FILE, CausalNetwork, save_entropy_models
from modeling.identity import identity
from modeling.one_d_piece import OneDPiece
from tests.codec_data import random_arrays
from tests.fill import fill

SIDE, NUM_TOKENS, CODEBOOK = 16, 6, 32
MODEL = {
    "type": "one_d_piece",
    "vq_model": {
        "codebook_size": CODEBOOK,
        "token_size": 4,
        "vit_enc_model_size": "tiny",
        "vit_dec_model_size": "tiny",
        "vit_enc_patch_size": 4,
        "vit_dec_patch_size": 4,
        "num_latent_tokens": NUM_TOKENS,
    },
    "pixel_vqgan": {
        "channels": 32,
        "channel_multipliers": [1, 1, 1],
        "num_res_blocks": 1,
        "latent_channels": 8,
        "codebook_size": 16,
    },
}


def tiny_tokenizer(seed=0, **vq_model):
    config = {"model": MODEL | {"vq_model": MODEL["vq_model"] | vq_model}}
    return fill(OneDPiece(config | {"dataset": {"preprocessing": {"crop_size": SIDE}}}), seed).eval()


def save_codec(folder, seed=0):
    """A folder with a tiny tokenizer and the entropy models that belong to it."""
    tokenizer = tiny_tokenizer(seed)
    tokenizer.save_pretrained(folder)
    network = CausalNetwork(random_arrays(NUM_TOKENS, CODEBOOK, seed=seed), total_bits=14)
    save_entropy_models(folder / FILE, bytes.fromhex(identity(tokenizer)), network)
    return folder


def pixels(count, side=SIDE, seed=0):
    """Smooth random images (count, 3, side, side) uint8."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return (smooth.clamp(0, 1) * 255).round().to(torch.uint8)


def photo(width, height, seed=0):
    """A smooth random image."""
    draws = np.random.default_rng(seed)
    small = Image.fromarray(draws.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)
