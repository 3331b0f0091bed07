"""The images that commands evaluate: all of a configuration, or some of them."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from data import DataError
from data.batches import FaultLog, Loader, check_count
from data.catalogue import Catalogue, CentreCrop, decoded
from data.image_folder import num_eval_examples
from data.image_sets import ImageSet, Selected
from data.loaders import evaluation_loader
from data.transforms import EvalTransform
from utils.evaluation.comparison import Originals
from utils.evaluation.session import Session
from utils.processes import Processes


class NumberedImages:
    """The evaluation images of a configuration in a fixed order, any of which can be read by its number.

    All processes make it together; each counts its share of the shards, without decoding an image.

    Args:
        image_size: Side P that is wanted of them.

    Attributes:
        names: Of the shards, or of the stretches of a folder, with the number of images in each.
        source: Text that changes when the folder's files or the shards do.
        num_skipped: Shards that are damaged, where `dataset.params.eval_skip_broken` allows that.
        expected: `dataset.params.num_eval_examples`.
        preparation: What is done to the images, for the record.

    Raises:
        DataError: Images are missing, or cropped to another size.
    """

    def __init__(self, config: DictConfig, image_size: int, processes: Processes):
        params, crop_size = config.dataset.params, config.dataset.preprocessing.crop_size
        if crop_size != image_size:
            raise DataError(
                f"dataset.preprocessing.crop_size must be {image_size}, as the tokenizer takes it, got {crop_size}"
            )
        catalogue = Catalogue(config, "eval", CentreCrop(config.dataset.preprocessing))
        self.strict = not params.get("eval_skip_broken", False)
        self.num_threads = params.num_workers_per_gpu
        self.parts, self.source = catalogue.parts, catalogue.fingerprint()
        self.preparation = EvalTransform(crop_size, catalogue.decoding).description
        faults = FaultLog(self.strict)
        mine = tqdm(
            range(processes.rank, len(self.parts), processes.world_size), "counting images", unit="part", delay=1.0,
            leave=False, dynamic_ncols=True, disable=not processes.is_main,
        )  # fmt: skip
        counts = {index: sum(1 for _ in self.parts[index].jobs(faults)) for index in mine}
        shares = processes.gather((counts, len(faults.take())))
        sizes = {index: size for share, _ in shares for index, size in share.items()}
        self.num_skipped = sum(num for _, num in shares)
        self.names = [[part.name, sizes[index]] for index, part in enumerate(self.parts)]
        self.bounds = np.cumsum([0, *(size for _, size in self.names)])
        self.expected, self.max_examples = num_eval_examples(config), params.get("max_eval_examples")
        check_count(len(self), self.expected, self.num_skipped)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def most(self, num_images: int | None) -> int | None:
        """How many of them to take: so many, or `dataset.params.max_eval_examples`; None for all."""
        if num_images is None and self.max_examples is not None:
            return min(self.max_examples, len(self))
        return num_images

    def batches(self, numbers: np.ndarray, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
        """Keys and images (B, 3, P, P) uint8 of sorted `numbers`; broken ones are left out where that is allowed."""
        for part, first, end in zip(self.parts, self.bounds[:-1], self.bounds[1:], strict=True):
            wanted = numbers[(numbers >= first) & (numbers < end)] - first
            if len(wanted):
                picked = part._replace(jobs=partial(_pick, part.jobs, wanted.tolist()))
                options = {"batch_size": batch_size, "num_threads": self.num_threads}
                for examples in decoded(picked, **options, faults=FaultLog(self.strict)):
                    yield [example.key for example in examples], torch.cat([example.image for example in examples])


def _pick(jobs: Any, places: Sequence[int], faults: FaultLog) -> Iterator[Any]:
    """The jobs at sorted places."""
    wanted = set(places)
    for place, job in enumerate(islice(jobs(faults), places[-1] + 1)):
        if place in wanted:
            yield job


def choose(total: int, num_images: int | None, seed: int) -> np.ndarray:
    """Which of `total` images to take, sorted: `num_images` of them, drawn by `seed`, or all."""
    if num_images is None:
        return np.arange(total)
    if num_images > total:
        raise too_many(total, num_images)
    return np.sort(np.random.default_rng(seed).choice(total, num_images, replace=False))


def evaluation_images(config: DictConfig, num_images: int | None, **share: int | None) -> Loader:
    """The evaluation images of a configuration, all or `num_images` instead of `dataset.params.max_eval_examples`.

    Args:
        share: Rank, world size and batch size, as of `evaluation_loader`.

    Raises:
        DataError: As of `evaluation_loader`, or there are fewer images.
    """
    if num_images is None:
        return evaluation_loader(config, **share)
    config = config.copy()
    config.dataset.params.max_eval_examples = num_images
    loader = evaluation_loader(config, **share)
    if loader.expected is not None and loader.expected < num_images:
        raise too_many(loader.expected, num_images)
    return loader


def first_of(images: ImageSet, num_images: int | None) -> ImageSet:
    """The first images of a set; all of them for None."""
    if num_images is not None and num_images > len(images):
        raise too_many(len(images), num_images)
    return images if num_images is None else Selected(images, range(num_images))


def too_many(there: int, num_images: int) -> DataError:
    return DataError(f"--num_images must be at most {there}, the number of images there are, got {num_images}")


def record_of(loader: Loader, originals: Originals, session: Session) -> dict[str, Any]:
    """For the protocol: the images of `loader` that all processes have seen, and what was done to them.

    Raises:
        DataError: Images are missing.
    """
    counted = session.counted(originals, check_count, loader.expected, loader.num_bad)
    return {"originals": counted, "preparation": loader.preparation}


def training_images(config: DictConfig, batch_size: int | None, session: Session) -> Tensor:
    """All images that a configuration trains on, prepared as for evaluation and sorted by key: (n, 3, P, P) uint8."""
    train, params = config.copy(), config.dataset.params
    train.dataset.params.eval_shards_path_or_url = params.train_shards_path_or_url
    train.dataset.params.eval_folder = params.train_folder
    train.dataset.params.num_eval_examples = None  # as the manifest says
    train.dataset.params.max_eval_examples = None
    batches = evaluation_loader(train, rank=0, world_size=1, batch_size=batch_size)
    images, keys = [], []
    for batch in session.each(batches, "reading"):
        images.append(batch["image"])
        keys += batch["__key__"]
    check_count(len(keys), batches.expected, batches.num_bad)
    return torch.cat(images)[torch.tensor(np.argsort(np.array(keys), kind="stable"))]
