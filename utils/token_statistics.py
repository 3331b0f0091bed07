"""Statistics of token sequences: prefixes, entropies, what they tell about the class. Arrays in, numbers out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.arrays import ARRAY_ERRORS
from utils.errors import UserError


def read_tokens(path: Path) -> tuple[np.ndarray, list[str]]:
    """Tokens (n, N) and the keys of the n images, from a tokens.npz of scripts/reconstruct_tokenizer.py.

    Raises:
        UserError: There is none, or it holds something else.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is a single array")
        with file:
            tokens, keys = file["tokens"], file["keys"]
    except ARRAY_ERRORS as error:
        raise UserError(
            f"{path} must hold `tokens` and `keys`, and cannot be read as such ({error}): make it with "
            "scripts/reconstruct_tokenizer.py --tokens"
        ) from error
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer) or len(keys) != len(tokens):
        raise UserError(
            f"{path} must hold integer tokens (n, N) and n keys, got {_described(tokens)} and {len(keys)} keys"
        )
    return tokens, keys.tolist()


def read_labels(path: Path, num_images: int) -> np.ndarray:
    """Class ids (n,) of a labels.npy, -1 where there is none.

    Raises:
        UserError: There is none, or it does not hold one label for each image.
    """
    try:
        labels = np.load(path, allow_pickle=False)
    except ARRAY_ERRORS as error:
        raise UserError(
            f"{path} must hold class ids, and cannot be read ({error}): make it with scripts/reconstruct_tokenizer.py "
            "--labels"
        ) from error
    if getattr(labels, "shape", None) != (num_images,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{path} must hold {num_images} integers, one for each image, got {_described(labels)}")
    return labels


def _described(value: object) -> str:
    return f"{value.shape} of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


# Prefixes


def with_prefix(tokens: np.ndarray, prefix: Sequence[int]) -> np.ndarray:
    """Sorted indices of the sequences, of (n, N), that start with `prefix`."""
    return np.flatnonzero((tokens[:, : len(prefix)] == np.asarray(prefix, dtype=np.int64)).all(axis=1))


def frequent_prefixes(tokens: np.ndarray, length: int, limit: int | None = None) -> list[tuple[tuple[int, ...], int]]:
    """The prefixes of so many codes that exist and how often, the most frequent first, then the smallest codes."""
    prefixes, counts = np.unique(tokens[:, :length], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return [(tuple(prefixes[index].tolist()), int(counts[index])) for index in order]


def nearest_prefixes(tokens: np.ndarray, prefix: Sequence[int], limit: int) -> list[tuple[tuple[int, ...], int]]:
    """The prefixes of the same length that exist and share the most codes with `prefix` from its start on.

    Among those that share as many, the most frequent come first.
    """
    shared = max(length for length in range(len(prefix)) if len(with_prefix(tokens, prefix[:length])))
    return frequent_prefixes(tokens[with_prefix(tokens, prefix[:shared])], len(prefix), limit)


# Information, in bits


def entropy(values: np.ndarray) -> float:
    """Entropy of the distribution of rows: of numbers (n,), or of whole rows of (n, k).

    It is the plug-in estimate, which is too small where rows are few: it cannot pass log2 n.
    """
    _, counts = np.unique(values, axis=0, return_counts=True)
    shares = counts / counts.sum()
    return float(max(0.0, -(shares * np.log2(shares)).sum()))


def conditional_entropy(values: np.ndarray, given: np.ndarray) -> float:
    """Entropy of `values` (n,) that is left when `given` (n,) is known: H(values, given) - H(given)."""
    return max(0.0, entropy(np.stack([values, given], axis=1)) - entropy(given))


def mutual_information(one: np.ndarray, other: np.ndarray) -> float:
    """What each of two columns (n,) tells about the other: H(one) + H(other) - H(one, other)."""
    return max(0.0, entropy(one) + entropy(other) - entropy(np.stack([one, other], axis=1)))


def normalized_mutual_information(one: np.ndarray, other: np.ndarray) -> float:
    """Mutual information over the mean of both entropies, in 0..1; 0 where both are constant."""
    scale = (entropy(one) + entropy(other)) / 2
    return mutual_information(one, other) / scale if scale > 0 else 0.0


def clusters(tokens: np.ndarray, length: int) -> np.ndarray:
    """A number for each sequence (n,), the same for those that share their first `length` tokens."""
    return np.unique(tokens[:, :length], axis=0, return_inverse=True)[1].reshape(-1)


def purity(cluster: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose class is the most frequent one of their cluster. It is 1 where all are alone."""
    pairs, counts = np.unique(np.stack([cluster, labels], axis=1), axis=0, return_counts=True)
    highest = np.zeros(int(cluster.max()) + 1, dtype=np.int64)
    np.maximum.at(highest, pairs[:, 0], counts)
    return float(highest.sum() / len(cluster))


def same_class(cluster: np.ndarray, labels: np.ndarray) -> float:
    """Of two images of one cluster, how often they are of one class; NaN where all images are alone.

    Unlike purity and mutual information, it does not grow with the number of clusters alone.
    """

    def num_pairs(columns: np.ndarray) -> int:
        counts = np.unique(columns, axis=0, return_counts=True)[1].astype(np.int64)
        return int((counts * (counts - 1)).sum())

    together = num_pairs(cluster)
    return num_pairs(np.stack([cluster, labels], axis=1)) / together if together else float("nan")
