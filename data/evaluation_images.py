"""The images that commands evaluate: all of a configuration, some of them, or the reference of generated ones."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data import DataError
from data.batches import FaultLog, Loader, check_count
from data.catalogue import Catalogue, CentreCrop, decoded
from data.image_folder import num_eval_examples
from data.image_sets import AS_GIVEN, ImageSet, Selected, open_images, read_statistics
from data.loaders import evaluation_loader
from data.transforms import EvalTransform
from utils.config import load_config
from utils.evaluation.feature_set import FeatureNetwork
from utils.evaluation.generation import Reference, reference_of
from utils.evaluation.session import Session
from utils.evaluation.statistics import Gaussian
from utils.processes import Processes

INCEPTION = "fid"  # the `key` of its network


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
        self.strict = not params.get("eval_skip_broken", False)
        self.num_threads = params.num_workers_per_gpu
        catalogue = Catalogue(config, "eval", CentreCrop(config.dataset.preprocessing))
        self.parts = catalogue.parts
        self.preparation = EvalTransform(crop_size, catalogue.decoding).description
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
    """The evaluation images of a configuration, all or `num_images` in place of `dataset.params.max_eval_examples`.

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


def reference_images(source: str, size: int, **share: int) -> Loader:
    """The evaluation images of a configuration, or the images in shards, cropped to `size` pixels a side.

    Args:
        source: Path of the configuration, or the shards (DIR/name-{000000..000049}.tar).
        share: As of `evaluation_images`.

    Raises:
        DataError: The configuration crops to another size.
    """
    if ".tar" in source:
        params = {"eval_shards_path_or_url": source, "num_workers_per_gpu": 1, "num_eval_examples": None}
        dataset = {"type": "shards", "params": params, "preprocessing": {"crop_size": size}}
        config = OmegaConf.create({"dataset": dataset, "training": {}})
    else:
        config = load_config(source)
    if config.dataset.type == "tokens":  # a generator's configuration: its images are in shards
        config.dataset.type = "shards"
    config_size = config.dataset.preprocessing.crop_size
    if config_size != size:
        raise DataError(f"the samples have {size} pixels a side, and {source} crops its images to {config_size}")
    return evaluation_loader(config, **share)


def load_reference(source: str, size: int, network: FeatureNetwork, batch_size: int, session: Session) -> Reference:
    """The reference set of generated images as `network` sees it.

    Args:
        source: A configuration or shards, as of `reference_images`, or a .npy or .npz file or a folder. Of an archive
            of the ADM evaluator the statistics are taken, if the network is Inception.
        size: Pixels a side of the samples, to which shards are cropped.
    """
    see = partial(reference_of, network, session, check_count)
    share = session.share(batch_size)
    if source.endswith((".yaml", ".yml")) or ".tar" in source:
        loader = reference_images(source, size, **share)
        batches = ((batch["__key__"], batch["image"]) for batch in loader)
        reference = see(batches, loader.expected, lambda: loader.num_bad)
        return reference.noting(source=source, preparation=loader.preparation)
    facts = {"source": source, "preparation": AS_GIVEN}
    statistics = read_statistics(source) if network.key == INCEPTION else None
    if statistics is None or statistics.has_images:
        images = open_images(source)
        reference = see(images.batches(**share), len(images))
    else:
        reference = Reference(None, None, {})
    if statistics is not None:
        facts["statistics"] = "mu and sigma of the file, of the Inception in TensorFlow"
        gaussian = Gaussian(torch.from_numpy(statistics.mean), torch.from_numpy(statistics.covariance))
        reference = replace(reference, gaussian=gaussian)
    return reference.noting(**facts)
