"""The images that commands evaluate: all of a configuration, some of them, or the reference of generated ones."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data import DataError
from data.batches import Example, FaultLog, Loader, check_count
from data.catalogue import Catalogue, CentreCrop, decoded
from data.image_folder import num_eval_examples
from data.image_sets import ImageSet, Selected
from data.loaders import evaluation_loader
from utils.config import load_config
from utils.processes import Processes

SEED = 42  # draws the images of --num_images


class NumberedImages:
    """The evaluation images of a configuration in a fixed order, any of which can be read by its number.

    All processes make it together; each counts its share of the shards, without decoding an image.

    Args:
        image_size: Side P that is wanted of them.

    Attributes:
        names: Of the shards, or of the stretches of a folder, with the number of images in each.
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
        crop = CentreCrop(config.dataset.preprocessing)
        self.preparation = crop.transform.description
        self.strict = not params.get("eval_skip_broken", False)
        self.num_threads = params.num_workers_per_gpu
        self.parts = Catalogue(config, "eval", crop).parts
        faults = FaultLog(self.strict)
        mine = range(processes.rank, len(self.parts), processes.world_size)
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
        for examples in self.examples(numbers, batch_size, FaultLog(self.strict)):
            yield [example.key for example in examples], torch.cat([example.image for example in examples])

    def examples(self, numbers: np.ndarray, batch_size: int, faults: FaultLog) -> Iterator[list[Example]]:
        """Batches of the images of sorted `numbers`, (1, 3, P, P) each; broken ones go to `faults`."""
        for part, first, end in zip(self.parts, self.bounds[:-1], self.bounds[1:], strict=True):
            wanted = numbers[(numbers >= first) & (numbers < end)] - first
            if len(wanted):
                picked = part._replace(jobs=partial(_pick, part.jobs, wanted.tolist()))
                yield from decoded(picked, batch_size=batch_size, num_threads=self.num_threads, faults=faults)


class ChosenImages:
    """Some of the evaluation images of a configuration, in batches as those of `evaluation_loader`.

    Attributes:
        expected: How many, of all processes.
        num_bad: Of this process's, those that could not be used.
    """

    def __init__(self, images: NumberedImages, num_images: int, processes: Processes, batch_size: int):
        self.images, self.batch_size, self.expected, self.num_bad = images, batch_size, num_images, 0
        numbers = choose(len(images), num_images, SEED)
        self.numbers = np.array_split(numbers, processes.world_size)[processes.rank]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        faults = FaultLog(self.images.strict)
        for examples in self.images.examples(self.numbers, self.batch_size, faults):
            yield {
                "image": torch.cat([example.image for example in examples]),
                "class_id": torch.tensor([example.class_id for example in examples], dtype=torch.int64),
                "__key__": [example.key for example in examples],
            }
        self.num_bad = len(faults.take())


def evaluation_images(
    config: DictConfig, num_images: int | None, processes: Processes, batch_size: int | None
) -> Loader | ChosenImages:
    """The evaluation images of a configuration, this process's share; all processes call this together.

    Args:
        num_images: Only so many, drawn by a fixed seed, the same in every command; when not given, at most
            `dataset.params.max_eval_examples`, or all.
        batch_size: `training.per_gpu_batch_size` when not given.

    Raises:
        DataError: As `evaluation_loader`, or there are fewer images.
    """
    if num_images is None and config.dataset.params.get("max_eval_examples") is None:
        return evaluation_loader(config, rank=processes.rank, world_size=processes.world_size, batch_size=batch_size)
    images = NumberedImages(config, config.dataset.preprocessing.crop_size, processes)
    return ChosenImages(images, images.most(num_images), processes, batch_size or config.training.per_gpu_batch_size)


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
        raise DataError(f"--num_images must be at most {total}, the number of images there are, got {num_images}")
    return np.sort(np.random.default_rng(seed).choice(total, num_images, replace=False))


def chosen(images: ImageSet, num_images: int | None) -> ImageSet:
    """So many images of a set, drawn as those of a configuration are; all of them for None."""
    return images if num_images is None else Selected(images, choose(len(images), num_images, SEED).tolist())


def chosen_rows(rows: Any, num_images: int | None) -> Any:
    """The same of a list or array that has a row for each image."""
    if num_images is None:
        return rows
    numbers = choose(len(rows), num_images, SEED)
    return rows[numbers] if isinstance(rows, np.ndarray) else [rows[number] for number in numbers]


def reference_images(source: str, size: int, processes: Processes, batch_size: int) -> Loader | ChosenImages:
    """The evaluation images of a configuration, or the images in shards, cropped to `size` pixels a side.

    Args:
        source: Path of the configuration, or the shards (DIR/name-{000000..000049}.tar).

    Raises:
        DataError: The configuration crops to another size.
    """
    if ".tar" in source:
        params = {"eval_shards_path_or_url": source, "num_workers_per_gpu": 1, "num_eval_examples": None}
        dataset = {"type": "shards", "params": params, "preprocessing": {"crop_size": size}}
        config = OmegaConf.create({"dataset": dataset, "training": {}})
    else:
        config = load_config(source)
    if config.dataset.type == "tokens":  # a generator's configuration: its images stand in shards
        config.dataset.type = "shards"
    config_size = config.dataset.preprocessing.crop_size
    if config_size != size:
        raise DataError(f"the samples have {size} pixels a side, and {source} crops its images to {config_size}")
    return evaluation_images(config, None, processes, batch_size)
