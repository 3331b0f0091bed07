"""Small models, and a pickle that would run code, for the tests of checkpoints."""

import os

import torch
from omegaconf import OmegaConf
from torch import nn

from modeling.checkpoints.pretrained import Pretrained
from modeling.pixel_vqgan import PixelVQGAN


class Toy(Pretrained):
    def __init__(self, config):
        super().__init__()
        self.config = OmegaConf.create(config)
        self.inner = nn.Linear(self.config.model.width, 2)

    def forward(self, x):
        return self.inner(x)


class CodeRunner:
    """A pickled one creates a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def toy(width=3, seed=0):
    torch.manual_seed(seed)
    return Toy({"model": {"width": width}})


def tokenizer_config(**vq_model):
    return {
        "model": {
            "type": "one_d_piece",
            "vq_model": {
                "codebook_size": 32,
                "token_size": 4,
                "vit_enc_model_size": "tiny",
                "vit_dec_model_size": "tiny",
                "vit_enc_patch_size": 4,
                "vit_dec_patch_size": 4,
                "num_latent_tokens": 4,
                "finetune_decoder": True,
                **vq_model,
            },
            "pixel_vqgan": {
                "channels": 32,
                "channel_multipliers": [1, 1, 1],
                "num_res_blocks": 1,
                "latent_channels": 8,
                "codebook_size": 16,
            },
        },
        "dataset": {"preprocessing": {"crop_size": 16}},
    }


def teacher():
    config = tokenizer_config()
    config["model"]["type"] = "pixel_vqgan"
    return PixelVQGAN(config)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
