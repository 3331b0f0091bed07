"""Training and evaluation directly on a folder of images, which are taken as a viewer shows them."""

import functools
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from torch.utils.data import Dataset, Sampler

from data import DataError
from data.batches import NO_LABEL, Batch, Example, Fault, FaultLog, SampleError, collate, failure, faults_only, seeded
from data.image_sources import FolderSource, subfolders
from data.transforms import EvalTransform, TrainTransform, decode_as_shown

NUM_STAND_INS = 16  # tried instead of a broken image


class GlobalBatches(Sampler):
    """Which samples are in which batch of a rank: one endless order, cut into global batches.

    The order is a new permutation for every epoch, by seed and epoch alone, and a rank takes its slice of each global
    batch: 2 ranks with B samples each see the global batches that 1 rank with 2B sees.

    Args:
        batch_size: Samples for this rank in a batch.
        start_batch: The first batch to give out.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, rank: int, world_size: int, seed: int, start_batch: int = 0
    ):
        self.num_samples, self.batch_size = num_samples, batch_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.start_batch = seed, start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Endless lists of (epoch, index of the sample)."""
        order = functools.lru_cache(maxsize=2)(self.order)
        for batch in count(self.start_batch):
            first = (batch * self.world_size + self.rank) * self.batch_size
            places = (divmod(position, self.num_samples) for position in range(first, first + self.batch_size))
            yield [(epoch, int(order(epoch)[place])) for epoch, place in places]

    def order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)


def evaluation_batches(
    num_samples: int, batch_size: int, *, rank: int, world_size: int, num_taken: int | None = None
) -> list[list[int]]:
    """Every sample once over all ranks, in order; the last batch may be smaller.

    Args:
        num_taken: Only so many, evenly spaced: in a folder classes follow one another.
    """
    num_taken = num_samples if num_taken is None else num_taken
    mine = [place * num_samples // num_taken for place in range(rank, num_taken, world_size)]
    return [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]


class TrainingFolder(Dataset):
    """Batches of a folder's images, augmented by seed, epoch and index alone."""

    def __init__(self, source: FolderSource, transform: TrainTransform, seed: int):
        self.source, self.transform, self.seed = source, transform, seed

    def __getitems__(self, samples: list[tuple[int, int]]) -> Batch:
        faults = FaultLog(strict=False)
        try:
            return collate([self._example(epoch, index, faults) for epoch, index in samples], faults)
        except DataError as error:
            return failure(error)

    def _example(self, epoch: int, index: int, faults: FaultLog) -> Example:
        rng = seeded(self.seed, "augment", epoch, index)
        transform = functools.partial(self.transform, rng=rng)
        try:
            return load(self.source, index, transform)
        except SampleError as error:
            fault = fault_of(self.source, index, error)
            faults.add(fault)
        for _ in range(NUM_STAND_INS):
            try:
                return load(self.source, rng.randrange(len(self.source)), transform)
            except SampleError:
                continue  # counted when its own turn comes
        raise DataError(f"neither an image nor {NUM_STAND_INS} in its place can be used; the first was {fault}")


class EvaluationFolder(Dataset):
    """Batches of a folder's images as they are."""

    def __init__(self, source: FolderSource, transform: EvalTransform, skip_broken: bool):
        self.source, self.transform, self.skip_broken = source, transform, skip_broken

    def __getitems__(self, indices: list[int]) -> Batch:
        faults = FaultLog(strict=not self.skip_broken)
        examples = []
        try:
            for index in indices:
                try:
                    examples.append(load(self.source, index, self.transform))
                except SampleError as error:
                    faults.add(fault_of(self.source, index, error))
        except DataError as error:
            return failure(error)
        return collate(examples, faults) if examples else faults_only(faults)


def fault_of(source: FolderSource, index: int, error: SampleError) -> Fault:
    return Fault(error.reason, str(source.folder), source.name(index), error.detail)


def load(source: FolderSource, index: int, transform: Callable) -> Example:
    try:
        data, class_id = source.read(index)
    except OSError as error:
        raise SampleError("missing image", f"cannot be read ({error})") from error
    try:
        image = transform(decode_as_shown(data))
    except DataError as error:
        raise SampleError("broken image", str(error)) from error
    return Example(image, NO_LABEL if class_id is None else class_id, source.name(index))


def open_folder(config: DictConfig, split: str) -> FolderSource:
    """The images of the folder that a configuration names for "train" or "eval".

    Class ids are the places of the training folder's subfolders in both splits, even if the other lacks a class.
    """
    params, key = config.dataset.params, f"{split}_folder"
    if not params.get(key):
        raise DataError(
            f"dataset.params.{key} must name a folder of images when dataset.type is folder, and it is empty"
        )
    classes: list[str] = []
    if split == "eval" and params.get("train_folder"):
        train = Path(params.train_folder).expanduser()
        classes = subfolders(train) if train.is_dir() else []
    return FolderSource(Path(params[key]).expanduser(), classes=classes or None)


def num_eval_examples(config: DictConfig) -> int | None:
    """`dataset.params.num_eval_examples`; None for a folder, which counts itself, whatever another set's file says."""
    return None if kind_of_images(config) == "folder" else config.dataset.params.get("num_eval_examples")


def kind_of_images(config: DictConfig) -> str:
    """`dataset.type` of the images: with tokens a folder where one is named, or else shards, which any set inherits."""
    params, kind = config.dataset.params, config.dataset.get("type", "shards")
    if kind == "tokens":
        return "folder" if params.get("train_folder") or params.get("eval_folder") else "shards"
    return kind
