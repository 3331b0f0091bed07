"""Several versions of the same images, such as reconstructions from 1, 2, 4 tokens, scored in one pass."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.evaluation.feature_set import FeatureNetwork, FeatureSet
from utils.evaluation.metrics import psnr_of_mse
from utils.evaluation.statistics import LEAST_DISTANCE, Means, frechet_distance
from utils.processes import Processes

# Given originals, what measures versions of them: all (B, 3, H, W) float32 in [0, 1], the result (B,).
Measure = Callable[[Tensor], Callable[[Tensor], Tensor]]


def against(function: Callable[[Tensor, Tensor], Tensor]) -> Measure:
    """A measure of a function (version, original)."""
    return lambda originals: lambda versions: function(versions, originals)


class Originals:
    """The images that numbers are about, each process its share: how many, and which."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self.keys: list[str] = []
        self.digests: list[bytes] = []

    def add(self, images: Tensor, keys: Sequence[str]) -> None:
        """One batch, (B, 3, H, W) uint8, and its names."""
        self.keys += keys
        self.digests += [hashlib.sha256(image.numpy().tobytes()).digest() for image in images.cpu()]

    def count(self) -> int:
        """Images seen so far by all processes; every process calls this together."""
        return sum(self.processes.gather(len(self.keys)))

    def fingerprint(self) -> str:
        """sha256 of the set, whatever its order and names; every process calls this together."""
        digests = sorted(digest for share in self.processes.gather(self.digests) for digest in share)
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def record(self, expected: int | None, num_skipped: int = 0) -> dict[str, Any]:
        """For the protocol; every process calls this together."""
        return {
            "expected": expected,
            "seen": self.count(),
            "skipped": num_skipped,
            "sha256": self.fingerprint(),
        }


class Comparison(Originals):
    """Scores versions of images against the originals, all on 8 bits, each process its share.

    Args:
        measures: {name: measure}, one number per image each; `against` makes one of a function of two images.
        network: For the Frechet distance of each version's set to the originals' (and, where it has logits, the
            Inception Score); None for neither.
    """

    def __init__(self, measures: Mapping[str, Measure], network: FeatureNetwork | None, processes: Processes):
        super().__init__(processes)
        self.measures, self.network = measures, network
        self.means: dict[str, Means] = {}
        self.sets: dict[str | None, FeatureSet] = {}  # None: the originals

    @torch.no_grad()
    def update(
        self,
        originals: Tensor,
        versions: Mapping[str, Tensor],
        keys: Sequence[str],
        extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Add one batch.

        Args:
            originals: (B, 3, H, W) uint8.
            versions: {name: (B, 3, H, W) uint8}, the same names every time.
            keys: Names of the images, B of them.
            extra: {name of a version: {name: (B,)}}, further numbers whose mean is wanted, such as bytes.
        """
        self.add(originals, keys)
        if self.network is not None:
            self.feature_set(None).update(originals, keys)
        target = originals.float() / 255
        measures = {name: measure(target) for name, measure in self.measures.items()}
        for name, version in versions.items():
            if version.shape != originals.shape or version.dtype != torch.uint8:
                raise UserError(
                    f"{name} must be 8-bit images of the originals' shape {tuple(originals.shape)}, "
                    f"got {tuple(version.shape)} {version.dtype}"
                )
            pixels = version.float() / 255
            values = {measure: function(pixels) for measure, function in measures.items()}
            values |= (extra or {}).get(name, {})
            self.means.setdefault(name, Means()).update(values)
            if self.network is not None:
                self.feature_set(name).update(version, keys)

    def feature_set(self, name: str | None) -> FeatureSet:
        """What is known of a version's set of images, or of the originals' (None)."""
        return self.sets.setdefault(name, FeatureSet(self.network, self.processes, with_logits=name is not None))

    def finish(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """{version: {name of the measure: value}} over all processes, which call this together.

        Measures of sets that need more images are left out, which `utils.evaluation.report.remarks` says.
        """
        results: dict[str, dict[str, float]] = {}
        has_sets = self.network is not None and self.count() >= LEAST_DISTANCE
        originals = self.feature_set(None).gaussian() if has_sets else None
        for name in names:
            results[name] = self._means(name)
            if has_sets:
                version = self.feature_set(name)
                results[name][self.network.key] = frechet_distance(originals, version.gaussian())
                results[name] |= version.inception_score()
        return results

    def _means(self, name: str) -> dict[str, float]:
        """Means over the images of a version; that of the squared error as its PSNR."""
        means = self.means.get(name, Means()).finish(self.processes)
        return {
            "psnr_of_mse" if measure == "mse" else measure: psnr_of_mse(mean) if measure == "mse" else mean
            for measure, mean in means.items()
        }


def require_unique(keys: Sequence[str], what: str) -> None:
    """Every key once.

    Raises:
        UserError: A key comes twice.
    """
    repeated = [key for key, times in Counter(keys).items() if times > 1]
    if repeated:
        raise UserError(
            f"{what} has {len(repeated)} keys that come more than once, the first is {repeated[0]!r}: results are "
            "sorted by key, so each image needs its own"
        )
