"""Statistics of token sequences: prefixes, entropies, what they tell about the class. Arrays in, numbers out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.errors import UserError

TEST_SHARE = 1 / 5  # of the images, on which a probe is tested
BAR = {"leave": False, "delay": 1.0, "dynamic_ncols": True}  # of what takes long for many images alone

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


# Rows for tables, JSON and figures

CLASS_MEASURES = {"nmi": normalized_mutual_information, "purity": purity, "same_class": same_class}


def position_rows(tokens: np.ndarray, draws: np.random.Generator) -> list[dict[str, Any]]:
    """Entropy, codes used, and what the token before tells, by position; entropies in bits."""
    rows = []
    for position in tqdm(range(tokens.shape[1]), "positions", unit="token", **BAR):
        token = tokens[:, position]
        row = {"token": position + 1, "entropy": entropy(token), "codes_used": len(np.unique(token))}
        if position:
            before = tokens[:, position - 1]
            row["entropy_given_before"] = conditional_entropy(token, before)
            row["entropy_given_shuffled"] = conditional_entropy(token, draws.permutation(before))
        rows.append(row)
    return rows


def class_rows(
    tokens: np.ndarray, labels: np.ndarray, lengths: Sequence[int], num_shuffles: int, draws: np.random.Generator
) -> list[dict[str, Any]]:
    """What prefixes of the tokens tell about the class, beside the same with shuffled labels (mean, deviation)."""
    rows = []
    for length in tqdm(lengths, "classes", unit="length", **BAR):
        cluster = clusters(tokens, length)
        row: dict[str, Any] = {"tokens": length, "clusters": int(cluster.max()) + 1}
        shuffled = [draws.permutation(labels) for _ in range(num_shuffles)]
        for name, measure in CLASS_MEASURES.items():
            by_chance = np.array([measure(cluster, others) for others in shuffled])
            row[name] = _finite(measure(cluster, labels))
            row[f"{name}_shuffled"] = _finite(by_chance.mean())
            row[f"{name}_shuffled_deviation"] = _finite(by_chance.std())
        rows.append(row)
    return rows


def _finite(value: float) -> float | None:
    """None for what is not defined: JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


def probe(tokens: np.ndarray, labels: np.ndarray, codebook: np.ndarray, rows: list[dict[str, Any]], seed: int) -> None:
    """Add to each row the accuracy on held-out images of logistic regression on its tokens' code vectors."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = np.random.default_rng(seed).permutation(len(labels))
    test, training = np.split(order, [max(1, round(TEST_SHARE * len(order)))])
    if len(np.unique(labels[training])) < 2:
        raise UserError(f"a probe needs images of two classes to learn from, got {len(training)} of one")
    for row in tqdm(rows, "probes", unit="length", **BAR):
        vectors = codebook[tokens[:, : row["tokens"]]].reshape(len(tokens), -1)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(vectors[training], labels[training])
        row["probe_accuracy"] = float(model.score(vectors[test], labels[test]))
        # What always answering with the most frequent class would get.
        values, counts = np.unique(labels[training], return_counts=True)
        row["probe_chance"] = float((labels[test] == values[counts.argmax()]).mean())
        row["probe_test_images"] = len(test)
