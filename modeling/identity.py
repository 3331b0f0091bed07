"""The identity of a tokenizer: one hash of everything that decides which tokens an image gets."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modeling.checkpoints.state import fingerprint
from modeling.titok import TiTok
from utils.errors import UserError

FORMAT = "one-d-piece tokenizer identity 1"
FLOAT16_INFINITY = 65520  # from here on float16 rounds to infinity


def identity(tokenizer: TiTok) -> str:
    """SHA-256 in hexadecimal of what decides which tokens an image gets: encoder, latent tokens, codebook, image size.

    The decoder is no part of it: both stages of a tokenizer have one identity. So do its copies in float32 and float16,
    because weights are hashed as float16 holds them. A copy in bfloat16 is another tokenizer: it keeps 8 bits of a
    weight where float16 keeps 11, and 1 % of its tokens are others (those of a float16 copy: 0.1 %).

    Hashed are, in this order, `FORMAT`; the layout as JSON, keys sorted; for each tensor, in the order of the names,
    its name, its shape and its values, little-endian, in row-major order.
    """
    encoder = tokenizer.encoder
    layout = {
        "image_size": tokenizer.image_size,
        "patch_size": encoder.patch_embed.kernel_size[0],
        "num_heads": encoder.num_heads,
        "is_legacy": encoder.is_legacy,
        "use_l2_norm": tokenizer.quantize.use_l2_norm,
    }
    if tokenizer.quantize.choices is not None:  # said only there, as most tokenizers were made before
        layout["first_codes"] = tokenizer.first_codes
    digest = hashlib.sha256(f"{FORMAT}\n{json.dumps(layout, sort_keys=True)}\n".encode())
    for name, value in sorted(_deciding(tokenizer).items()):
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(_as_float16(value).numpy().tobytes())
    return digest.hexdigest()


def identities(tokenizer: TiTok) -> dict[str, str]:
    """What token sets know a tokenizer by: its `identity`, and in sets made before there was one the `fingerprint`."""
    return {"identity": identity(tokenizer), "fingerprint": former_fingerprint(tokenizer)}


def tokens_record(tokenizer: TiTok, source: str) -> dict[str, str]:
    """What a tokens file says of the tokenizer that made it, which `source` names as --checkpoint."""
    return {"tokenizer": source, "tokenizer_identity": identity(tokenizer)}


def check_tokens_record(about: Mapping[str, Any], tokenizer: TiTok, name: str) -> None:
    """Refuse to look at tokens with another tokenizer than made them; older files do not tell.

    Raises:
        UserError: `about`, of the tokens file, names another one.
    """
    if about.get("tokenizer_identity", expected := identity(tokenizer)) != expected:
        raise UserError(f"the tokens are of {about['tokenizer']}, and {name} is another tokenizer: name that one")


def former_fingerprint(tokenizer: TiTok) -> str:
    """What `identity` replaces in token sets: a hash of the float32 weights, which a copy in float16 does not have."""
    layout = f"{tokenizer.encoder.is_legacy} {tokenizer.quantize.use_l2_norm} {fingerprint(_deciding(tokenizer))}"
    return hashlib.sha256(layout.encode()).hexdigest()


def has_mean_code(tokenizer: TiTok, expected: Sequence[float]) -> bool:
    """What `identity` replaces in generators: whether the mean vector of the codebook is `expected`, (token_size,).

    Half precision moves the mean of 1,024 codes by less than 1e-4 of a number's usual size, another training by some
    3e-2. The encoder is not seen.
    """
    codes, theirs = tokenizer.quantize.embedding.weight.detach().float().cpu(), torch.tensor(expected)
    ours, tolerance = codes.mean(dim=0), 1e-3 * float(codes.square().mean().sqrt())
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance)


def _deciding(tokenizer: TiTok) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in tokenizer.state_dict().items()
        if name == "latent_tokens" or name.startswith(("encoder.", "quantize."))
    }


def _as_float16(value: Tensor) -> Tensor:
    """Rounded to nearest, ties to even; what is nearer to 0 than 2^-25 becomes 0, as in a copy.

    A tensor with values that a copy would not hold stays in float32: the copy is broken, and not the same.
    """
    value = value.detach().cpu().float()
    lowest, highest = value.aminmax()
    return value.half() if -FLOAT16_INFINITY < lowest and highest < FLOAT16_INFINITY else value
