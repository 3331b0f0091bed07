"""What is left for other networks to see in reconstructions: scores of their predictions, whatever made these."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError
from utils.evaluation.statistics import Means
from utils.processes import Processes

logger = logging.getLogger(__name__)

VOID = 255  # the value of mask pixels that do not count
SURE = 0.5  # score from which an object seen in the original has to be found again

Boxes = Mapping[str, Tensor]  # "boxes" (k, 4) as x1, y1, x2, y2 and "labels" (k,); "scores" (k,) where predicted


class Score(Protocol):
    """Predictions on reconstructions, each process its share, held against those on the originals and the truth."""

    def update(self, predicted: Any, reference: Any, truth: Any = None) -> None:
        """Add one batch: predictions on the reconstructions, on the originals, and what is really in the images."""
        ...

    def finish(self, processes: Processes) -> dict[str, float]:
        """{measure: value}; every process calls this together."""
        ...


class PerImage:
    """Means over the images of what `measure(predicted, reference, truth)` says of each, {name: (B,)}."""

    def __init__(self, measure: Callable[[Tensor, Tensor, Any], dict[str, Tensor]]):
        self.measure, self.means = measure, Means()

    def update(self, predicted: Tensor, reference: Tensor, truth: np.ndarray | None = None) -> None:
        self.means.update(self.measure(predicted, reference, truth))

    def finish(self, processes: Processes) -> dict[str, float]:
        scores = self.means.finish(processes)
        if "depth_mse" in scores:
            scores["depth_rmse"] = math.sqrt(scores["depth_mse"])
        return scores


def classification(logits: Tensor, reference: Tensor, labels: np.ndarray | None) -> dict[str, Tensor]:
    """Whether the likeliest class is the original's, and whether it is right.

    Args:
        logits, reference: (B, classes).
        labels: (B,) integers, where they are known.
    """
    predicted = logits.argmax(dim=1).cpu()
    values = {"agreement": predicted == reference.argmax(dim=1).cpu()}
    if labels is not None:
        if labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise UserError(
                f"labels must be classes of the network, 0..{logits.shape[1] - 1}, got {labels.min()}..{labels.max()}"
            )
        values["accuracy"] = predicted == torch.from_numpy(labels.astype(np.int64))
    return values


def similarity(embedding: Tensor, reference: Tensor, truth: None) -> dict[str, Tensor]:
    """Cosine of the angle between embeddings (B, D)."""
    return {"clip_similarity": F.cosine_similarity(embedding.cpu().double(), reference.cpu().double())}


def depth(predicted: Tensor, reference: Tensor, truth: None) -> dict[str, Tensor]:
    """Absolute and squared difference of depth maps (B, h, w), averaged over the pixels."""
    difference = (predicted - reference).cpu().double().flatten(1)
    return {"depth_l1": difference.abs().mean(dim=1), "depth_mse": difference.square().mean(dim=1)}


class Segmentation:
    """Intersection over union of classes of pixels, over all images, averaged over the classes that occur.

    `miou` is against masks; `miou_to_original` against the classes seen in the originals.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.confusion: dict[str, Tensor] = {}  # (true, predicted) pixel counts

    def update(self, predicted: Tensor, reference: Tensor, masks: np.ndarray | None = None) -> None:
        """Add classes (B, H, W) of pixels."""
        self._count("miou_to_original", predicted.cpu(), reference.cpu())
        if masks is not None:
            masks = torch.from_numpy(masks.astype(np.int64))
            wrong = masks[((masks < 0) | (masks >= self.num_classes)) & (masks != VOID)]
            if len(wrong):
                raise UserError(
                    f"masks must hold classes of the network, 0..{self.num_classes - 1}, or {VOID} for pixels that do "
                    f"not count, got {int(wrong[0])}"
                )
            self._count("miou", predicted.cpu(), masks)

    def _count(self, name: str, predicted: Tensor, goal: Tensor) -> None:
        counts = goal != VOID
        pairs = goal[counts] * self.num_classes + predicted[counts]
        square = torch.bincount(pairs, minlength=self.num_classes**2).view(self.num_classes, self.num_classes)
        self.confusion[name] = self.confusion.get(name, 0) + square

    def finish(self, processes: Processes) -> dict[str, float]:
        names = sorted({name for share in processes.gather(list(self.confusion)) for name in share})
        nothing = torch.zeros(self.num_classes, self.num_classes, dtype=torch.long)
        scores = {}
        for name in names:
            square = processes.add_up(self.confusion.get(name, nothing).cpu()).double()
            union = square.sum(dim=0) + square.sum(dim=1) - square.diag()
            scores[name] = float((square.diag() / union)[union > 0].mean())
        return scores


class Detection:
    """COCO's mean average precision, by torchmetrics: over IoU 0.5, 0.55, ..., 0.95, and at 0.5 alone.

    `map` and `map_50` are against annotations; `..._to_original` against the objects that are seen in the originals
    with a score of at least 0.5.

    Raises:
        UserError: The package behind torchmetrics' metric is missing.
    """

    def __init__(self, install: str):
        try:
            self._metric()
        except ModuleNotFoundError as error:
            raise UserError(f"COCO's mean average precision needs the package pycocotools: {install}") from error
        self.items: list[tuple[Boxes, Boxes, Boxes | None]] = []

    @staticmethod
    def _metric() -> Any:
        from torchmetrics.detection import MeanAveragePrecision

        return MeanAveragePrecision(sync_on_compute=False)

    def update(
        self, predicted: Sequence[Boxes], reference: Sequence[Boxes], truth: Sequence[Boxes] | None = None
    ) -> None:
        """Add the boxes of B images."""
        for index, (boxes, seen) in enumerate(zip(predicted, reference, strict=True)):
            boxes, seen = ({name: value.cpu() for name, value in item.items()} for item in (boxes, seen))
            sure = seen["scores"] >= SURE
            seen = {name: seen[name][sure] for name in ("boxes", "labels")}
            self.items.append((boxes, seen, truth[index] if truth is not None else None))

    def finish(self, processes: Processes) -> dict[str, float]:
        items = [item for share in processes.gather(self.items) for item in share]
        scores = self._score([(boxes, seen) for boxes, seen, _ in items], "_to_original")
        if all(truth is not None for _, _, truth in items):
            scores |= self._score([(boxes, truth) for boxes, _, truth in items], "")
        return scores

    def _score(self, pairs: Sequence[tuple[Boxes, Boxes]], ending: str) -> dict[str, float]:
        metric = self._metric()
        metric.update([boxes for boxes, _ in pairs], [goal for _, goal in pairs])
        result = metric.compute()
        scores = {f"{name}{ending}": float(result[name]) for name in ("map", "map_50")}
        if min(scores.values()) < 0:  # torchmetrics' way to say so
            logger.warning("no image has an object that should be found, so there is no %s", " and ".join(scores))
            return {}
        return scores
