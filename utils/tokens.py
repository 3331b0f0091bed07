"""The tokens file, tokens.npz: what images were tokenized to, or what a generator sampled, one row an image.

tokens    (n, N) integers, in 0..codebook size - 1
keys      (n,) text, the names of the images
labels    (n,) integers, their classes, -1 where one has none; may be missing
samples   (n,) integers, of sampled images the number within the class; may be missing
about     text, JSON: the tokenizer, as --checkpoint takes it, and what else made the tokens; missing in older files

NumPy reads it. To images in Python:

    saved = read_tokens("output/inference_tokenizer/tokens.npz")
    tokenizer, _ = load_tokenizer(checkpoint=saved.about["tokenizer"])  # modeling.tokenizers
    images = tokenizer.decode_tokens(torch.from_numpy(saved.tokens), length=8).clamp(0, 1)  # (n, 3, P, P)
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.arrays import ARRAY_ERRORS, why_unread
from utils.errors import UserError
from utils.files import replacing

TOKENS_FILE = "tokens.npz"


class Tokens(NamedTuple):
    """What a tokens file holds."""

    tokens: np.ndarray  # (n, N) int64
    keys: list[str]
    labels: np.ndarray | None  # (n,) int64, -1 where there is none
    about: dict[str, Any]


def write_tokens(
    path: str | os.PathLike,
    tokens: np.ndarray,
    keys: Sequence[str],
    *,
    labels: np.ndarray | None = None,
    samples: np.ndarray | None = None,
    **about: Any,
) -> None:
    """Write a tokens file, whole or not at all; `about` is what JSON can hold."""
    arrays: dict[str, Any] = {"tokens": tokens, "keys": np.array(keys), "labels": labels, "samples": samples}
    arrays["about"] = np.array(json.dumps(about, ensure_ascii=False))
    with replacing(path) as aside:
        np.savez_compressed(aside, **{name: array for name, array in arrays.items() if array is not None})


def read_tokens(path: str | os.PathLike) -> Tokens:
    """Read a tokens file, also an older one, of which each command wrote its own kind.

    Raises:
        UserError: There is none, or it holds something else.
    """
    path = Path(path)
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is a single array")
        with file:
            arrays = {name: file[name] for name in ("tokens", "keys", "labels", "samples", "about") if name in file}
        tokens, keys, about = arrays["tokens"], _keys_of(arrays), _about_of(arrays)
    except ARRAY_ERRORS as error:
        raise UserError(
            f"{path} must hold `tokens` and `keys`, and cannot be read as such ({why_unread(error)}): make it with "
            "scripts/inference_tokenizer.py, inference_generator.py or reconstruct_tokenizer.py --tokens"
        ) from error
    if tokens.ndim != 2 or not tokens.size or not _are_integers(tokens) or keys.shape != tokens.shape[:1]:
        raise UserError(
            f"{path} must hold integer tokens (n, N) and n keys, got {described(tokens)} and keys {keys.shape}"
        )
    labels = arrays.get("labels")
    if labels is not None:
        labels = checked_labels(labels, len(tokens), f"`labels` of {path}")
    return Tokens(tokens.astype(np.int64), [str(key) for key in keys.tolist()], labels, about)


def read_labels(path: Path, num_images: int) -> np.ndarray:
    """Class ids (n,) of a labels.npy, -1 where there is none.

    Raises:
        UserError: There is none, or it does not hold one label for each image.
    """
    try:
        labels = np.load(path, allow_pickle=False)
    except ARRAY_ERRORS as error:
        raise UserError(
            f"{path} must hold class ids, and cannot be read ({why_unread(error)}): make it with "
            "scripts/reconstruct_tokenizer.py --labels"
        ) from error
    return checked_labels(labels, num_images, str(path))


def checked_labels(labels: Any, num_images: int, source: str) -> np.ndarray:
    if getattr(labels, "shape", None) != (num_images,) or not _are_integers(labels):
        raise UserError(f"{source} must hold {num_images} integers, one for each image, got {described(labels)}")
    return labels.astype(np.int64)


def described(value: Any) -> str:
    return f"{value.shape} of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def _keys_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The keys, or CLASS/SAMPLE from what older files of scripts/inference_generator.py hold in their place."""
    if "keys" in arrays or "samples" not in arrays:
        return arrays["keys"]
    numbers = zip(arrays["labels"].ravel(), arrays["samples"].ravel(), strict=True)
    return np.array([f"{label}/{sample}" for label, sample in numbers])


def _about_of(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    about = json.loads(str(arrays["about"])) if "about" in arrays else {}
    if not isinstance(about, dict):
        raise ValueError("`about` is no JSON object")
    return about


def _are_integers(array: np.ndarray) -> bool:
    return np.issubdtype(array.dtype, np.integer)
