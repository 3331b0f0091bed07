"""Token sets: the tokens of all images of a data set, made once by scripts/pretokenize.py and trained on after.

SET/train, SET/eval     one folder a split, of four files:
manifest.json           the tokenizer, the crops, the counts; written last, so a folder with it is whole
tokens.npy              (images, variants, N), uint16 where the codebook allows, read through a memory map
labels.npy              (images,) int64, -1 without a label
keys.txt                one key a line, in sorted order, which is the order of the other two
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import DataError
from data.batches import Batch
from utils.arrays import ARRAY_ERRORS
from utils.files import replacing, write_array, write_json

FILES = MANIFEST, TOKENS, LABELS, KEYS = "manifest.json", "tokens.npy", "labels.npy", "keys.txt"


class TokenSet:
    """One split of a token set, opened for reading.

    Args:
        folder: `SET/train` or `SET/eval`.

    Raises:
        DataError: It is not there, not finished, or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_token_manifest(folder)
        try:
            self.tokens = np.load(folder / TOKENS, mmap_mode="r", allow_pickle=False)
            self.labels = np.load(folder / LABELS, allow_pickle=False)
            with open(folder / KEYS, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                self.keys = [line.removesuffix("\n") for line in file]
        except ARRAY_ERRORS as error:
            raise DataError(f"the token set {folder} is damaged ({error}): delete it and make it again") from error
        shape = (self.manifest["num_images"], len(self.manifest["variants"]), self.manifest["num_tokens"])
        dtype = np.dtype(token_dtype(self.manifest["codebook_size"]))
        if (self.tokens.shape, self.tokens.dtype) != (shape, dtype):
            raise DataError(
                f"the token set {folder} must hold tokens {shape} of {dtype} by its {MANIFEST}, got "
                f"{self.tokens.shape} of {self.tokens.dtype}: delete it and make it again"
            )
        if (self.labels.shape, self.labels.dtype) != ((len(self),), np.int64) or len(self.keys) != len(self):
            raise DataError(
                f"the token set {folder} must hold {len(self)} labels of int64 and as many keys, got "
                f"{self.labels.shape} of {self.labels.dtype} and {len(self.keys)} keys: delete it and make it again"
            )

    def __len__(self) -> int:
        return self.manifest["num_images"]

    @property
    def num_variants(self) -> int:
        return len(self.manifest["variants"])

    def batch(self, indices: np.ndarray, variants: np.ndarray | int) -> Batch:
        """`tokens` (B, N) int64, `class_id` (B,) int64 and `__key__` of images, each in one of its variants.

        Raises:
            DataError: A token is none of the codebook; an accelerator would only say that an index is out of bounds.
        """
        tokens = torch.from_numpy(self.tokens[indices, variants].astype(np.int64))
        keys = [self.keys[index] for index in indices]
        if tokens.max() >= self.manifest["codebook_size"]:
            row, code = int(tokens.amax(dim=1).argmax()), int(tokens.max())
            raise DataError(
                f"the token set {self.folder} is damaged: sample {keys[row]!r} has the token {code}, and its codebook "
                f"{self.manifest['codebook_size']}: delete the set and make it again"
            )
        return {"tokens": tokens, "class_id": torch.from_numpy(self.labels[indices]), "__key__": keys}


def read_token_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of one split of a token set."""
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = ", only an unfinished one" if folder.is_dir() else ""
        raise DataError(
            f"there is no token set {folder}{unfinished} (from {Path.cwd()}): make it with scripts/pretokenize.py "
            "--config CONFIG --checkpoint TOKENIZER --output_dir SET, or set dataset.type=shards"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(manifest[key], int) for key in ("num_images", "num_tokens", "codebook_size")):
            raise TypeError("a count has the wrong type")
        if not isinstance(manifest["variants"], list) or not isinstance(manifest["tokenizer"], dict):
            raise TypeError("the variants or the tokenizer have the wrong type")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} must be a manifest written by scripts/pretokenize.py, but it cannot be read as one ({error!r})"
        ) from error
    return manifest


def write_token_set(
    folder: Path, parts: Callable[[], Iterable[Mapping[str, np.ndarray]]], manifest: dict[str, Any]
) -> dict[str, Any]:
    """Put parts together in the sorted order of their keys; returns the manifest, which is written last.

    Args:
        parts: Yields the parts again at each call: `tokens` (n, variants, N), `labels` (n,), `keys` (n,) text.
        manifest: All but the number of images; `num_tokens` and `variants` give the shape, `codebook_size` the type.
    """
    labels, keys = [], []
    for part in parts():
        labels.append(part["labels"])
        keys += part["keys"].tolist()
    if bad := next((key for key in keys if "\n" in key), None):
        raise DataError(f"keys must be one line each, got {bad!r}: rename that sample")
    order = sorted(range(len(keys)), key=keys.__getitem__)
    places = np.empty(len(keys), dtype=np.int64)
    places[order] = np.arange(len(keys))

    shape = (len(keys), len(manifest["variants"]), manifest["num_tokens"])
    dtype = token_dtype(manifest["codebook_size"])
    with replacing(folder / TOKENS) as aside:
        tokens = np.lib.format.open_memmap(aside, mode="w+", dtype=dtype, shape=shape)
        first = 0
        for part in parts():
            codes = part["tokens"]
            tokens[places[first : first + len(codes)]] = codes
            first += len(codes)
        tokens.flush()
        del tokens
    write_array(folder / LABELS, np.concatenate(labels)[order].astype(np.int64))
    with replacing(folder / KEYS) as aside:
        with open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            file.writelines(f"{keys[index]}\n" for index in order)
    unlabelled = sum(int((part < 0).sum()) for part in labels)
    manifest = manifest | {"num_images": len(keys), "num_unlabelled": unlabelled}
    write_json(folder / MANIFEST, manifest)
    return manifest


def token_dtype(codebook_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds all codes, 2 bytes where 65,536 codes or fewer."""
    return np.uint16 if codebook_size <= 1 << 16 else np.uint32
