"""What a network sees in a set of images: moments, and features and logits where they are wanted."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from utils.evaluation.statistics import LEAST_SCORE, Collected, Gaussian, Moments, inception_score
from utils.processes import Processes


class FeatureNetwork(Protocol):
    """What a distance between sets of images looks through.

    Attributes:
        key: What the distance is called in files: "fid" is Inception's alone.
        title: What it is called in tables.
        dimension: Length D of a feature vector.
        num_logits: Classes of the logits that the Inception Score is made of; 0 without any.
    """

    key: str
    title: str
    dimension: int
    num_logits: int

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, D) and logits of (B, 3, H, W) uint8."""
        ...


class FeatureSet:
    """The images of one set, each process its share, as `network` sees them.

    Args:
        with_logits: Keep the logits, where the network has some, for the Inception Score.
        with_features: Keep all features, for precision and recall.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        processes: Processes,
        *,
        with_logits: bool = False,
        with_features: bool = False,
    ):
        self.network, self.processes = network, processes
        self.keys: list[str] = []
        self._moments = Moments(network.dimension)
        self._logits = Collected(network.num_logits) if with_logits and network.num_logits else None
        self._features = Collected(network.dimension) if with_features else None

    def update(self, images: Tensor, keys: Sequence[str]) -> None:
        """Add one batch, (B, 3, H, W) uint8, and the names of its images, which order what is kept."""
        features, logits = self.network(images)
        self.keys += keys
        self._moments.update(features)
        if self._logits is not None:
            self._logits.update(logits)
        if self._features is not None:
            self._features.update(features)

    # Every process calls each of the following together.

    def count(self) -> int:
        """Images of all processes."""
        return sum(self.processes.gather(len(self.keys)))

    def gaussian(self) -> Gaussian:
        """Mean and covariance of all processes' features."""
        return self._moments.finish(self.processes)

    def features(self) -> Tensor:
        """All processes' features, (n, D), in the order of the keys."""
        return self._features.finish(self.processes, self.keys)

    def inception_score(self) -> dict[str, float]:
        """`inception_score` and its standard deviation over ten splits; nothing without logits or of too few images."""
        if self._logits is None or self.count() < LEAST_SCORE:
            return {}
        mean, deviation = inception_score(self._logits.finish(self.processes, self.keys))
        return {"inception_score": mean, "inception_score_std": deviation}
