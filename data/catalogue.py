"""The images of a data set in a fixed order and in every variant, as scripts/pretokenize.py reads them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from PIL import Image

from data import DataError
from data.batches import NUM_JUDGED, Example, Fault, FaultLog, SampleError, seeded
from data.image_folder import kind_of_images, load, open_folder
from data.image_shards import decode, read_shards
from data.image_sources import FolderSource
from data.shard_files import read_manifest
from data.shard_urls import resolve_shards
from data.tar_samples import fingerprint_of, key_prefixes, manifest_facts, sample_counts
from data.transforms import AS_PUBLISHED, AS_SHOWN, EvalTransform, TrainTransform

FOLDER_PART = 1000  # images of a folder in one part
Job = tuple[str, Callable[[], Example]]  # the key of an image, and what decodes it or raises SampleError
Jobs = Callable[[FaultLog], Iterator[Job]]  # what there is to do for a part


class Variants:
    """All variants of a training image: the centre crop, then random crops, each followed by its mirror.

    Args:
        preprocessing: The config's `dataset.preprocessing`; mirrors are made where `random_flip` is true.
        num_crops: Random crops, drawn by `seed`, the image's key and the crop's number alone.
    """

    def __init__(self, preprocessing: DictConfig, num_crops: int, seed: int):
        sizes = preprocessing.resize_shorter_edge, preprocessing.crop_size
        centre = TrainTransform(*sizes, random_crop=False, random_flip=False)
        self.crops = [centre] + [TrainTransform(*sizes, random_crop=True, random_flip=False)] * num_crops
        self.mirror = preprocessing.get("random_flip", False)
        self.seed = seed

    @property
    def names(self) -> list[str]:
        crops = ["centre", *(f"random {number}" for number in range(1, len(self.crops)))]
        return [f"{crop}{side}" for crop in crops for side in (["", ", mirrored"] if self.mirror else [""])]

    def __call__(self, image: Image.Image, key: str) -> torch.Tensor:
        """(variants, 3, P, P) uint8."""
        variants = []
        for number, crop in enumerate(self.crops):
            pixels = crop(image, seeded(self.seed, "crop", key, number))
            variants += [pixels, pixels.flip(-1)] if self.mirror else [pixels]
        return torch.stack(variants)


class CentreCrop:
    """The one variant of an evaluation image, as evaluation on the fly has it."""

    names = ["centre"]

    def __init__(self, preprocessing: DictConfig):
        self.transform = EvalTransform(preprocessing.crop_size)

    def __call__(self, image: Image.Image, key: str) -> torch.Tensor:
        """(1, 3, P, P) uint8."""
        return self.transform(image)[None]


class Part(NamedTuple):
    """A shard, or so many images of a folder: what one process tokenizes at a time.

    Attributes:
        num_images: As a manifest or the folder says; None where that is not known before they are read.
    """

    name: str
    num_images: int | None
    num_variants: int
    jobs: Jobs


class Catalogue:
    """One split of the data set that a config names, in parts.

    `dataset.type` says where the images are; of a config with type tokens it is a folder where one is named, or else
    the shards.

    Args:
        split: "train" or "eval".

    Attributes:
        parts: The parts, in order. Example images are (variants, 3, P, P).
        classes: Class names by id; empty where unknown.
        folder: That of the images; None where they are in shards.
        decoding: How they are made of their files, for records.
        fingerprint: A function: text that changes when the folder's files or the shards do.
    """

    def __init__(self, config: DictConfig, split: str, transform: Variants | CentreCrop):
        kind = kind_of_images(config)
        self.transform, self.folder = transform, None
        jobs = self._of_folder(config, split) if kind == "folder" else self._of_shards(config, split)
        self.decoding = AS_SHOWN if kind == "folder" else AS_PUBLISHED
        self.parts = [Part(name, num_images, len(transform.names), list_jobs) for name, num_images, list_jobs in jobs]

    def _of_shards(self, config: DictConfig, split: str) -> list[tuple[str, int | None, Jobs]]:
        key = f"{split}_shards_path_or_url"
        shards = resolve_shards(config.dataset.params.get(key), f"dataset.params.{key}")
        manifest = read_manifest(Path(shards[0]).parent)
        self.classes = manifest["classes"] if manifest else []
        self.fingerprint = partial(fingerprint_of, shards)
        num_classes = manifest_facts(shards)[1]
        read = partial(read_shards, prefixes=key_prefixes(shards))
        jobs = [partial(self._shard_jobs, read, shard, num_classes) for shard in shards]
        return list(zip((Path(shard).name for shard in shards), sample_counts(shards), jobs, strict=True))

    def _shard_jobs(self, read: Callable, shard: str, num_classes: int | None, faults: FaultLog) -> Iterator[Job]:
        for sample in read([(shard, 0.0)], faults=faults):
            key = sample["__key__"]
            yield key, partial(decode, sample, partial(self.transform, key=key), num_classes)

    def _of_folder(self, config: DictConfig, split: str) -> list[tuple[str, int | None, Jobs]]:
        source = open_folder(config, split)
        self.classes, self.folder, self.fingerprint = source.classes, source.folder, source.fingerprint
        firsts = range(0, len(source), FOLDER_PART)
        parts = [range(first, min(first + FOLDER_PART, len(source))) for first in firsts]
        return [(f"{part[0]:08d}", len(part), partial(self._folder_jobs, source, part)) for part in parts]

    def _folder_jobs(self, source: FolderSource, indices: range, faults: FaultLog) -> Iterator[Job]:
        for index in indices:
            key = source.name(index)
            yield key, partial(load, source, index, partial(self.transform, key=key))


def decoded(part: Part, *, batch_size: int, num_threads: int, faults: FaultLog) -> Iterator[list[Example]]:
    """The images of a part in batches, two of which are decoded ahead; broken ones go to `faults`."""
    with ThreadPoolExecutor(max(1, num_threads)) as pool:  # Pillow lets other threads run while it decodes
        ahead: deque[list[Any]] = deque()
        jobs = part.jobs(faults)
        while True:
            while len(ahead) < 2 and (batch := list(islice(jobs, batch_size))):
                ahead.append([(key, pool.submit(job)) for key, job in batch])
            if not ahead:
                return
            examples = list(_results(ahead.popleft(), part.name, faults))
            if examples:
                yield examples


def _results(futures: Iterable[tuple[str, Any]], part: str, faults: FaultLog) -> Iterator[Example]:
    for key, future in futures:
        try:
            yield future.result()
        except SampleError as error:
            faults.add(Fault(error.reason, part, key, error.detail))


def check_skipped(num_images: int, skipped: list[str], max_bad_fraction: float | None) -> None:
    """Refuse a set of which too many images or shards could not be read, by the rule of training, or all of them.

    Args:
        max_bad_fraction: Of all, a thousand at least; None allows any.
    """
    if skipped and not num_images:
        raise DataError(f"none of the images can be used; the first is {skipped[0]}: repair the data")
    if max_bad_fraction is None:
        return
    if len(skipped) > max_bad_fraction * max(num_images + len(skipped), NUM_JUDGED):
        raise DataError(
            f"{len(skipped)} samples or shards beside {num_images} good ones cannot be used, more than "
            f"dataset.max_bad_fraction={max_bad_fraction} allows; the first is {skipped[0]}: repair the data, or allow "
            "more"
        )
