"""Sums over a set of images that several processes share: taken per process, added up once, finished once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.processes import Processes

INFINITE = "_infinite"  # the ending of a count of infinite values
NUM_SPLITS = 10  # of the Inception Score
NUM_NEIGHBOURS = 3  # of precision and recall
LEAST_DISTANCE, LEAST_SCORE, LEAST_PRECISION = 2, NUM_SPLITS, NUM_NEIGHBOURS + 1  # images that each of them needs


def doubled(tensor: Tensor) -> Tensor:
    """A tensor as float64: on its CUDA GPU, from elsewhere on the CPU, since an Apple GPU has no float64."""
    tensor = tensor.detach()
    return (tensor if tensor.device.type == "cuda" else tensor.cpu()).double()


class Means:
    """Means over images of named values, summed in float64.

    Infinite values, as the PSNR of an image that came back perfect, are left out of a mean and counted.
    """

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.infinite: dict[str, int] = {}
        self.count = 0

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add one batch: {name: (B,)}, the same names every time."""
        for name, value in values.items():
            value = value.cpu().double()
            infinite = value.isinf()
            self.sums[name] = self.sums.get(name, 0.0) + float(value[~infinite].sum())
            self.infinite[name] = self.infinite.get(name, 0) + int(infinite.sum())
        self.count += len(next(iter(values.values())))

    def finish(self, processes: Processes) -> dict[str, float]:
        """Means over the images of all processes; one that saw none takes part with nothing.

        Where infinite values were left out, `NAME_infinite` is their number; of nothing else the mean is infinite.
        """
        shares = processes.gather((self.sums, self.infinite, self.count))
        total = sum(count for *_, count in shares)
        if total == 0:
            raise UserError("there was no image to score: check the paths of the images")
        means: dict[str, float] = {}
        for name in dict.fromkeys(name for sums, *_ in shares for name in sums):
            num_infinite = sum(infinite.get(name, 0) for _, infinite, _ in shares)
            together = sum(sums.get(name, 0.0) for sums, *_ in shares)
            means[name] = together / (total - num_infinite) if num_infinite < total else math.inf
            if num_infinite:
                means[f"{name}{INFINITE}"] = num_infinite
        return means


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D), float64, of `count` feature vectors."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


class Moments:
    """First and second moments of feature vectors, summed in float64.

    Args:
        dimension: Length D of a vector.
    """

    def __init__(self, dimension: int):
        self.count = 0
        self.sum = torch.zeros(dimension, dtype=torch.float64)
        self.products = torch.zeros(dimension, dimension, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add one batch, (B, D)."""
        features = doubled(features)
        if self.sum.device != features.device:
            self.sum, self.products = self.sum.to(features.device), self.products.to(features.device)
        self.count += len(features)
        self.sum += features.sum(dim=0)
        self.products.addmm_(features.T, features)

    def finish(self, processes: Processes) -> Gaussian:
        """Mean and unbiased covariance over all processes.

        Raises:
            UserError: There are fewer than two vectors.
        """
        count = sum(processes.gather(self.count))
        if count < LEAST_DISTANCE:
            raise UserError(
                f"a distance between sets of images needs at least {LEAST_DISTANCE} images in each, got {count}"
            )
        mean = processes.add_up(self.sum.cpu()) / count
        covariance = (processes.add_up(self.products.cpu()) - count * torch.outer(mean, mean)) / (count - 1)
        return Gaussian(mean, covariance, count)


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Frechet distance of two normal distributions (Heusel et al., 2017, arXiv 1706.08500).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the root is the sum of the singular values of
    C1^(1/2) C2^(1/2): stable where there are fewer images than dimensions, and never complex.
    """
    if one.mean.shape != other.mean.shape:
        raise UserError(
            f"statistics of {len(one.mean)} and of {len(other.mean)} features cannot be compared: they are two "
            "networks'; make both with one"
        )
    cross = torch.linalg.svdvals(one.root @ other.root).sum()
    distance = (one.mean - other.mean).square().sum() + one.covariance.trace() + other.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


class Collected:
    """Vectors of `dimension` numbers kept on the CPU as float32, for measures that need all of them."""

    def __init__(self, dimension: int):
        self.rows = [torch.empty(0, dimension)]

    def update(self, rows: Tensor) -> None:
        """Add one batch, (B, D)."""
        self.rows.append(rows.detach().float().cpu())

    def finish(self, processes: Processes, keys: list[str]) -> Tensor:
        """All processes' vectors, sorted by `keys`, this process's own: the same for any number of processes."""
        shares = processes.gather((keys, torch.cat(self.rows)))
        names = [name for keys, _ in shares for name in keys]
        rows = torch.cat([rows for _, rows in shares])
        return rows[torch.tensor(sorted(range(len(names)), key=names.__getitem__), dtype=torch.long)]


def inception_score(logits: Tensor, num_splits: int = NUM_SPLITS) -> tuple[float, float]:
    """Mean and standard deviation over splits of the Inception Score (arXiv 1606.03498) of logits (n, classes).

    Images are spread over the splits by torch-fidelity's fixed permutation.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < num_splits:
        raise UserError(f"the Inception Score needs at least {num_splits} images, got {len(logits)}")
    result = isc_features_to_metric(logits, splits=num_splits)
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]


def precision_recall(features: Tensor, real: Tensor, num_neighbours: int = NUM_NEIGHBOURS) -> tuple[float, float]:
    """Share of generated images within the real ones' neighbourhood, and the reverse (arXiv 1904.06991).

    Args:
        features: Of the generated images, (n, D).
        real: Of real images, (m, D).
        num_neighbours: The radius around each image reaches to so many neighbours.
    """
    from torch_fidelity.metric_prc import (
        KEY_METRIC_PRECISION,
        KEY_METRIC_RECALL,
        prc_features_to_metric,
    )

    if min(len(features), len(real)) <= num_neighbours:
        raise UserError(
            f"precision and recall need more than {num_neighbours} images on both sides, got {len(features)} and "
            f"{len(real)}"
        )
    result = prc_features_to_metric(
        features, real, prc_neighborhood=num_neighbours, prc_batch_size=2000, save_cpu_ram=True, verbose=False
    )
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


class CodeCounts:
    """How often each code stands at each token position, each process its share.

    Args:
        num_tokens, codebook_size: N and V.
    """

    def __init__(self, num_tokens: int, codebook_size: int):
        self.counts = torch.zeros(num_tokens, codebook_size, dtype=torch.long)
        self.positions = torch.arange(num_tokens)

    def update(self, codes: Tensor) -> None:
        """Add one batch of tokens, (B, N) integers."""
        codes = codes.cpu()
        self.counts.index_put_((self.positions.expand_as(codes), codes), torch.ones(()).long(), accumulate=True)

    def finish(self, processes: Processes) -> dict[str, Any]:
        """`code_statistics` of all processes' tokens."""
        return code_statistics(processes.add_up(self.counts.cpu()))


def code_statistics(counts: Tensor) -> dict[str, Any]:
    """Codebook usage, entropy and perplexity, over all tokens and for each token position.

    Args:
        counts: How often each code stood at each position, (N, V) integers.

    Returns:
        `usage` (distinct codes seen / V), `entropy_bits` (-sum p log2 p), `perplexity` (2^entropy), and
        `per_position` with a list of N for each of the three.
    """
    usage = (counts > 0).double().mean(dim=1)
    entropy = entropy_bits(counts)
    together = counts.sum(dim=0)
    total = float(entropy_bits(together[None]))
    return {
        "usage": float((together > 0).double().mean()),
        "entropy_bits": total,
        "perplexity": 2**total,
        "per_position": {
            "usage": usage.tolist(),
            "entropy_bits": entropy.tolist(),
            "perplexity": [2**bits for bits in entropy.tolist()],
        },
    }


def entropy_bits(counts: Tensor) -> Tensor:
    """Entropy in bits of each row of counts (R, V): (R,)."""
    shares = counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.special.entr(shares).sum(dim=1) / math.log(2)
