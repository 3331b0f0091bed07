"""Values that depend only on (seed, name, shape), so that golden numbers need no weight file.

The rule is the one behind tests/golden/: each tensor is drawn by PCG64 from sha256("seed:name").
"""

import hashlib
import math

import numpy as np
import torch

CONSTANT_BUFFERS = {
    "kernel",
    "imagenet_mean",
    "imagenet_std",
    "ema_real_logits_mean",
    "ema_fake_logits_mean",
    "position_ids",
    "token_type_ids",
}
TABLES = (
    "class_embedding",
    "positional_embedding",
    "latent_token_positional_embedding",
    "mask_token",
    "latent_tokens",
    "pos_embed",
    "embedding.weight",
    "embeddings.weight",
    "word_embeddings.weight",
    "position_embeddings.weight",
    "token_type_embeddings.weight",
)
# First match wins: the order matters ("attention.output.dense" also ends in "output.dense").
GAINS = {
    "decoder.ffn.2.weight": 5.0,
    "lm_head.weight": 3.0,
    "to_logits.2.weight": 3.0,
    "patch_embed.weight": 4.0,
    "in_proj_weight": 1.8,
    "query.weight": 1.8,
    "key.weight": 1.8,
    "qkv.weight": 1.8,
    "attention.output.dense.weight": 0.35,
    "output.dense.weight": 0.35,
}


def _draws(seed, name):
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "big")))


def integers(seed, name, shape, low, high):
    return torch.from_numpy(_draws(seed, name).integers(low, high, size=tuple(shape), dtype=np.int64))


def tensor(seed, name, shape, scale=1.0, shift=0.0):
    values = _draws(seed, name).standard_normal(tuple(int(size) for size in shape))
    return torch.from_numpy((values * scale + shift).astype(np.float32))


def _ends_with(name, suffix):
    return name == suffix or name.endswith("." + suffix)


def parameter(seed, name, shape):
    """The value of one parameter, from its name and shape alone."""
    if any(_ends_with(name, table) for table in TABLES):
        scale, shift = (2.0 if _ends_with(name, "position_embeddings.weight") else 0.5), 0.0
    elif name.endswith("bias"):
        scale, shift = 0.02, 0.0
    elif name.rsplit(".", 1)[-1] == "layer_scale":
        scale, shift = 0.2, 0.0
    elif len(shape) < 2:
        scale, shift = 0.05, 1.0
    else:
        gain = next((gain for suffix, gain in GAINS.items() if _ends_with(name, suffix)), 1.0)
        scale, shift = gain / math.sqrt(int(np.prod(shape[1:]))), 0.0
    return tensor(seed, name, shape, scale, shift)


def is_filled(name):
    return name.rsplit(".", 1)[-1] not in CONSTANT_BUFFERS


@torch.no_grad()
def fill(module, seed):
    """Overwrite every floating parameter and learnt buffer of `module`."""
    named = dict(module.named_parameters())
    named.update((name, buffer) for name, buffer in module.named_buffers() if is_filled(name))
    for name in sorted(named):
        if named[name].is_floating_point():
            named[name].copy_(parameter(seed, name, named[name].shape))
    return module


def image(seed, batch, height, width):
    """(batch, 3, height, width) float32 in [0, 1]: a few sinusoids a channel and a little noise."""
    y = np.linspace(0.0, 1.0, height)[:, None]
    x = np.linspace(0.0, 1.0, width)[None, :]
    out = np.zeros((batch, 3, height, width))
    for index in range(batch):
        draws = _draws(seed, f"image:{index}:{height}x{width}")
        for channel in range(3):
            waves = np.zeros((height, width))
            for _ in range(5):
                fy, fx = draws.uniform(-6.0, 6.0, 2)
                waves += draws.uniform(0.3, 1.0) * np.sin(
                    2 * math.pi * (fy * y + fx * x) + draws.uniform(0.0, 2 * math.pi)
                )
            waves = waves / np.abs(waves).max() + 0.08 * draws.standard_normal((height, width))
            offset = draws.uniform(-0.15, 0.15)
            out[index, channel] = 0.5 + offset + draws.uniform(0.25, 0.45) * waves
    return torch.from_numpy(np.clip(out, 0.0, 1.0).astype(np.float32))


def assert_close(got, golden, key, tolerance=2e-4):
    """Compare with a golden array, which may be a strided subsample of the flattened tensor.

    The stride is the smallest odd one that gives the stored length (tests/golden, `KEY.shape` beside `KEY`).
    """
    want = torch.from_numpy(np.atleast_1d(golden[key])).double()
    flat = got.detach().double().reshape(-1)
    if f"{key}.shape" in golden:
        assert tuple(got.shape) == tuple(golden[f"{key}.shape"]), f"{key}: shape {tuple(got.shape)}"
    stride = 1
    while -(-flat.numel() // stride) > want.numel():
        stride += 2
    flat, want = flat[::stride], want.reshape(-1)
    assert flat.numel() == want.numel(), f"{key}: {flat.numel()} values against {want.numel()}"
    limit = tolerance * torch.maximum(want.abs(), want.abs().mean().clamp(max=1.0))
    wrong = (flat - want).abs() > limit
    assert not wrong.any(), (
        f"{key}: {int(wrong.sum())} of {wrong.numel()} values differ, by {(flat - want).abs().max()}"
    )
