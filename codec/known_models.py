"""The bundled tokenizers by the identity that a file's header keeps, told without torch."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from codec.bitstream import TOKENIZER_BYTES
from codec.entropy import ABOUT, FILE
from utils.paths import ROOT


@dataclass(frozen=True)
class KnownModel:
    """A tokenizer whose files can be read by its name alone.

    Args:
        folder: Where its configuration and its entropy models are.
        identity: 32 bytes.
        image_size: Pixels a side, P.
    """

    name: str
    folder: Path
    identity: bytes
    image_size: int
    num_tokens: int
    codebook_size: int


@cache
def known_models() -> tuple[KnownModel, ...]:
    """The bundled tokenizers that have entropy models. What cannot be read here is reported where it is used."""
    found = (_known(path.parent) for path in sorted((ROOT / "assets/models").glob(f"*/{FILE}")))
    return tuple(model for model in found if model is not None)


def _known(folder: Path) -> KnownModel | None:
    try:
        with safe_open(folder / FILE, framework="numpy") as file:
            identity = bytes.fromhex(json.loads((file.metadata() or {})[ABOUT])["tokenizer"])
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        vq_model = config["model"]["vq_model"]
        size = config["dataset"]["preprocessing"]["crop_size"]
        return KnownModel(folder.name, folder, identity, size, vq_model["num_latent_tokens"], vq_model["codebook_size"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def known_by(identity: bytes) -> KnownModel | None:
    """The bundled tokenizer whose identity begins so."""
    identity = identity[:TOKENIZER_BYTES]
    return next((model for model in known_models() if model.identity[:TOKENIZER_BYTES] == identity), None)


def described(identity: bytes) -> str:
    """A tokenizer in words, by its name where it has one."""
    known, code = known_by(identity), identity[:TOKENIZER_BYTES].hex()
    return f"{known.name} ({code})" if known else f"an unknown tokenizer ({code})"
