"""The loaders of training and evaluation: WebDataset shards as a list of stages, or a folder of images."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset
from omegaconf import DictConfig
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data import DataError
from data.batches import (
    Batch,
    Example,
    Fault,
    FaultLog,
    Loader,
    SampleError,
    check_count,
    collate,
    failure,
    faults_only,
    seeded,
)
from data.image_folder import EvaluationFolder, GlobalBatches, TrainingFolder, evaluation_batches, open_folder
from data.image_sources import subfolders
from data.shard_urls import resolve_shards
from data.tar_samples import ShardError, class_of, image_of, manifest_facts, read_shard
from data.token_loader import TokenBatches, token_loaders
from data.transforms import EvalTransform, TrainTransform, decode_image
from utils.processes import obey_only_the_parent

__all__ = ["DataError", "Loader", "check_count", "evaluation_loader", "loaders", "training_loader"]

NUM_STAND_INS = 16  # samples of the next batch that may take the place of broken ones
NUM_USELESS_SHARDS = 100  # in a row, before a worker gives up
# Seconds that shards without a sample may take in a row: the other ranks wait, and NCCL lets them for ten minutes.
PATIENCE = 300.0


def training_loader(
    config: DictConfig,
    *,
    rank: int,
    world_size: int,
    start_batch: int = 0,
    batches_per_chunk: int,
    start_method: str | None = None,
) -> Loader:
    """Endless training batches for one rank.

    Interrupted after any batch and started again with `start_batch` = batches taken so far, it goes on with the very
    batches that would have come, at the same world size, number of workers and `batches_per_chunk`.

    Args:
        start_batch: Batches that this rank has taken before.
        batches_per_chunk: Batches of this rank between fresh seeds (shards; a folder needs none). After a restart a
            worker reads at most one chunk again, without decoding it: `save_every` times gradient accumulation is free.
        start_method: How workers are started: `fork`, `spawn` or `forkserver`; the platform's way when not given.

    Raises:
        DataError: The data are not there, a value of the config makes no sense or, while batches are taken, more than
            `dataset.max_bad_fraction` of the samples are broken.
    """
    preprocessing = config.dataset.preprocessing
    transform = TrainTransform(
        preprocessing.resize_shorter_edge,
        preprocessing.crop_size,
        preprocessing.get("random_crop", False),
        preprocessing.get("random_flip", False),
    )
    params = config.dataset.params
    seed = config.training.seed
    batch_size = _at_least(1, config.training.per_gpu_batch_size, "training.per_gpu_batch_size")
    num_workers = _at_least(0, params.num_workers_per_gpu, "dataset.params.num_workers_per_gpu")
    if _dataset_type(config) == "folder":
        source = open_folder(params.get("train_folder"), "dataset.params.train_folder")
        dataset = TrainingFolder(source, transform, seed)
        batches = GlobalBatches(
            len(source), batch_size, rank=rank, world_size=world_size, seed=seed, start_batch=start_batch
        )
    else:
        key = "dataset.params.train_shards_path_or_url"
        shards = resolve_shards(params.get("train_shards_path_or_url"), key)
        batches = None
        dataset = TrainingShards(
            shards,
            transform,
            batch_size=batch_size,
            rank=rank,
            num_classes=manifest_facts(shards)[1],
            shuffle_buffer_size=_at_least(
                1, params.get("shuffle_buffer_size", 1000), "dataset.params.shuffle_buffer_size"
            ),
            seed=seed,
            start_batch=start_batch,
            batches_per_chunk=_at_least(1, batches_per_chunk, "batches_per_chunk"),
        )
    return Loader(
        _data_loader(dataset, batches, num_workers, start_method),
        max_bad_fraction=config.dataset.get("max_bad_fraction", 0.01),
    )


def evaluation_loader(
    config: DictConfig,
    *,
    rank: int,
    world_size: int,
    batch_size: int | None = None,
    num_workers: int | None = None,
    start_method: str | None = None,
) -> Loader:
    """Every evaluation sample once, over all ranks and workers; it may be iterated again and again.

    `dataset.params.max_eval_examples` takes so many of them: the first ones of a folder, or of every shard alike. Which
    ones does not depend on batches, ranks and workers.

    Ranks can get different numbers of batches, or none: no collective operation belongs inside the loop. Sum what was
    seen over the ranks and give it to `check_count` with the loader's `expected`. Sorting by `__key__` restores the
    order.

    Args:
        batch_size: Samples in a batch, `training.per_gpu_batch_size` when not given. A worker's last may be smaller.
        num_workers: `dataset.params.num_workers_per_gpu` when not given.
        start_method: As in `training_loader`.

    Raises:
        DataError: The data are not there or, while batches are taken, any sample or shard is broken, unless
            `dataset.params.eval_skip_broken` is true.
    """
    params = config.dataset.params
    transform = EvalTransform(config.dataset.preprocessing.crop_size)
    if batch_size is None:
        batch_size = config.training.per_gpu_batch_size
    if num_workers is None:
        num_workers = params.num_workers_per_gpu
    batch_size = _at_least(1, batch_size, "the batch size of evaluation")
    num_workers = _at_least(0, num_workers, "dataset.params.num_workers_per_gpu")
    skip_broken = params.get("eval_skip_broken", False)
    most, expected = params.get("max_eval_examples"), params.get("num_eval_examples")
    if most is not None:
        most = _at_least(1, most, "dataset.params.max_eval_examples")
    if _dataset_type(config) == "folder":
        train_folder = Path(params.get("train_folder") or "").expanduser()
        # Class ids must mean the same, even if the evaluation folder lacks a class.
        classes = subfolders(train_folder) if params.get("train_folder") and train_folder.is_dir() else None
        source = open_folder(params.get("eval_folder"), "dataset.params.eval_folder", classes or None)
        dataset = EvaluationFolder(source, transform, skip_broken)
        found = len(source)
        taken = found if most is None else min(most, found)
        batches = evaluation_batches(taken, batch_size, rank=rank, world_size=world_size)
    else:
        shards = resolve_shards(params.get("eval_shards_path_or_url"), "dataset.params.eval_shards_path_or_url")
        found, num_classes = manifest_facts(shards)
        counts = dict.fromkeys(shards) if most is None else samples_of_each(shards, most)
        mine = [shard for shard in shards if counts[shard] != 0][rank::world_size]
        num_workers = min(num_workers, len(mine))
        batches = None
        dataset = EvaluationShards(
            mine, counts, transform, batch_size=batch_size, num_classes=num_classes, skip_broken=skip_broken
        )
    expected = found if expected is None else expected
    if most is not None:
        expected = None if found is None else min(most, expected)  # unknown sizes: some shard may hold too few
    return Loader(_data_loader(dataset, batches, num_workers, start_method), expected=expected)


def samples_of_each(shards: list[str], most: int) -> dict[str, int]:
    """How many samples each shard gives so that all give `most`, as evenly as their sizes allow.

    A shard whose size no manifest tells counts as one that is large enough.
    """
    sizes = {shard: manifest_facts([shard])[0] for shard in shards}
    counts = {}
    for shard in sorted(shards, key=lambda shard: math.inf if sizes[shard] is None else sizes[shard]):
        fair = most // (len(shards) - len(counts))
        counts[shard] = fair if sizes[shard] is None else min(fair, sizes[shard])
        most -= counts[shard]
    return counts


def loaders(
    config: DictConfig, *, rank: int, world_size: int
) -> tuple[Callable[[int], Loader | TokenBatches], Callable[[], Loader | TokenBatches] | None]:
    """What the training loop asks for: training batches from a given micro-batch on, and an evaluation pass.

    The second is None where the config names no evaluation data.
    """
    if config.dataset.get("type") == "tokens":
        return token_loaders(config, rank=rank, world_size=world_size)
    params = config.dataset.params
    chunk = config.experiment.save_every * config.training.gradient_accumulation_steps
    where = "eval_folder" if _dataset_type(config) == "folder" else "eval_shards_path_or_url"
    place = {"rank": rank, "world_size": world_size}
    training = partial(_training_from, config, batches_per_chunk=chunk, **place)
    return training, partial(evaluation_loader, config, **place) if params.get(where) else None


def _training_from(config: DictConfig, start_batch: int, **arguments: int) -> Loader:
    return training_loader(config, start_batch=start_batch, **arguments)


def _dataset_type(config: DictConfig) -> str:
    kind = config.dataset.get("type", "shards")
    if kind not in ("shards", "folder"):
        raise DataError(f"dataset.type must be shards or folder, or tokens to train a generator, got {kind}")
    return kind


def _at_least(smallest: int, value: Any, key: str) -> int:
    if not isinstance(value, int) or value < smallest:
        raise DataError(f"{key} must be a whole number of at least {smallest}, got {value!r}")
    return value


def _data_loader(dataset: Any, batches: Any, num_workers: int, start_method: str | None) -> DataLoader:
    options = {"batch_size": None} if batches is None else {"batch_sampler": batches}
    return DataLoader(
        dataset,
        collate_fn=as_is,
        num_workers=num_workers,
        worker_init_fn=obey_only_the_parent,
        multiprocessing_context=start_method if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        # Its own, because a new iterator draws a number: the models' random state must not depend on that.
        generator=torch.Generator(),
        **options,
    )


def as_is(batch: Batch) -> Batch:
    """The data sets make whole batches themselves."""
    return batch


class TrainingShards(IterableDataset):
    """Endless batches of one rank, the same for every start.

    Batch b of the rank belongs to the virtual worker b % W (W = number of workers) and to chunk b // L (L = batches per
    chunk), and all chance in it is a function of seed, rank, virtual worker and chunk. `DataLoader` asks its workers in
    turn, so the worker that is asked first plays the virtual worker of the first batch that is wanted.
    """

    def __init__(
        self,
        shards: list[str],
        transform: TrainTransform,
        *,
        batch_size: int,
        rank: int,
        num_classes: int | None,
        shuffle_buffer_size: int,
        seed: int,
        start_batch: int,
        batches_per_chunk: int,
    ):
        self.shards, self.transform = shards, transform
        self.batch_size, self.rank, self.num_classes = batch_size, rank, num_classes
        self.shuffle_buffer_size, self.seed = shuffle_buffer_size, seed
        self.start_batch, self.batches_per_chunk = start_batch, batches_per_chunk

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        num_workers = worker.num_workers if worker else 1
        batch = self.start_batch + (worker.id if worker else 0)
        virtual_worker = batch % num_workers
        try:
            while True:
                chunk = batch // self.batches_per_chunk
                first = chunk * self.batches_per_chunk
                end = first + self.batches_per_chunk
                first += (virtual_worker - first) % num_workers  # this worker's first batch of the chunk
                wanted = range(batch, end, num_workers)
                yield from islice(self.chunk(virtual_worker, chunk, (batch - first) // num_workers), len(wanted))
                batch += len(wanted) * num_workers
        except DataError as error:
            yield failure(error)

    def chunk(self, virtual_worker: int, chunk: int, num_skipped: int) -> Iterator[Batch]:
        """The endless batches of one chunk, of which the first `num_skipped` are left out before they are decoded."""
        faults = FaultLog(strict=False)
        seed = (self.seed, self.rank, virtual_worker, chunk)
        stages = [
            partial(resampled, rng=seeded("shards", *seed)),
            partial(read_shards, faults=faults, num_useless_shards=NUM_USELESS_SHARDS),
            # Shuffle before decoding: a buffer of decoded images would not fit in memory.
            webdataset.shuffle(self.shuffle_buffer_size, initial=self.shuffle_buffer_size, rng=seeded("mix", *seed)),
            partial(windows, size=self.batch_size, ahead=NUM_STAND_INS),
            partial(skip, num_skipped=num_skipped, faults=faults),
            partial(
                decode_windows,
                batch_size=self.batch_size,
                transform=self.transform,
                num_classes=self.num_classes,
                seed=("augment", *seed),
                faults=faults,
            ),
        ]
        return run_stages(self.shards, stages)


class EvaluationShards(IterableDataset):
    """Batches of one rank's shards, each read once by one worker."""

    def __init__(
        self,
        shards: list[str],
        counts: dict[str, int | None],
        transform: EvalTransform,
        *,
        batch_size: int,
        num_classes: int | None,
        skip_broken: bool,
    ):
        self.shards, self.transform, self.counts = shards, transform, counts
        self.batch_size, self.num_classes, self.skip_broken = batch_size, num_classes, skip_broken

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        shards = self.shards[worker.id :: worker.num_workers] if worker else self.shards
        faults = FaultLog(strict=not self.skip_broken)
        stages = [
            from_the_start,
            partial(read_shards, faults=faults, counts=self.counts),
            partial(decode_each, transform=self.transform, num_classes=self.num_classes, faults=faults),
            partial(batched, batch_size=self.batch_size, faults=faults),
        ]
        try:
            yield from run_stages(shards, stages)
        except DataError as error:
            yield failure(error)


Stage = Callable[[Iterable[Any]], Iterator[Any]]
RawSample = dict[str, Any]


def run_stages(source: Iterable[Any], stages: list[Stage]) -> Iterator[Any]:
    for stage in stages:
        source = stage(source)
    return iter(source)


def from_the_start(shards: Iterable[str]) -> Iterator[tuple[str, float]]:
    for shard in shards:
        yield shard, 0.0


def resampled(shards: list[str], *, rng) -> Iterator[tuple[str, float]]:
    """Shards drawn with replacement, without end: (shard, where to begin).

    The first one begins anywhere, because a chunk may be shorter than a shard: the samples at a shard's end would come
    less often than those at its beginning.
    """
    yield rng.choice(shards), rng.random()
    while True:
        yield rng.choice(shards), 0.0


def read_shards(
    shards: Iterable[tuple[str, float]],
    *,
    faults: FaultLog,
    num_useless_shards: int | None = None,
    counts: dict[str, int | None] | None = None,
) -> Iterator[RawSample]:
    """The samples of shard after shard, undecoded; a damaged shard is a fault, and its whole samples are used.

    Args:
        counts: Samples to take from the beginning of each shard; None: all of it.

    Raises:
        DataError: As many shards in a row as `num_useless_shards`, or `PATIENCE` seconds of them, gave no sample.
    """
    useless, wasted = 0, 0.0
    for shard, start in shards:
        useless, begun = useless + 1, time.monotonic()
        fault = Fault("empty shard", shard, None, "it holds no sample")
        try:
            for sample in islice(read_shard(shard, start), counts[shard] if counts else None):
                useless, wasted = 0, 0.0
                yield sample
        except ShardError as error:
            fault = Fault("broken shard", shard, None, str(error))
            faults.add(fault)
        if useless and num_useless_shards is not None:
            wasted += time.monotonic() - begun
            if useless == num_useless_shards or wasted > PATIENCE:
                raise DataError(f"{useless} shards in a row gave no sample; the last was {fault}")


def windows(samples: Iterable[RawSample], *, size: int, ahead: int) -> Iterator[list[RawSample]]:
    """Each batch of raw samples, followed by the first few of the next, which may stand in for broken ones."""
    window: list[RawSample] = []
    for sample in samples:
        window.append(sample)
        if len(window) == size + ahead:
            yield window
            window = window[size:]


def skip(
    windows: Iterator[list[RawSample]], *, num_skipped: int, faults: FaultLog
) -> Iterator[tuple[int, list[RawSample]]]:
    """Number the batches, and leave out those that were taken before the restart, with their faults."""
    for number, window in enumerate(windows):
        if number < num_skipped:
            faults.take()
        else:
            yield number, window


def decode_windows(
    windows: Iterator[tuple[int, list[RawSample]]],
    *,
    batch_size: int,
    transform: TrainTransform,
    num_classes: int | None,
    seed: tuple[int | str, ...],
    faults: FaultLog,
) -> Iterator[Batch]:
    """Decode, crop and mirror. Each place of a batch has its own chance, so that skipped batches leave none behind."""
    for number, window in windows:
        stand_ins = iter(window[batch_size:])
        examples = []
        for place, sample in enumerate(window[:batch_size]):
            rng = seeded(*seed, number * batch_size + place)
            try:
                examples.append(decode(sample, partial(transform, rng=rng), num_classes))
            except SampleError as error:
                fault = Fault(error.reason, sample["__shard__"], sample["__key__"], error.detail)
                faults.add(fault)
                for stand_in in stand_ins:
                    try:
                        examples.append(decode(stand_in, partial(transform, rng=rng), num_classes))
                        break
                    except SampleError:
                        continue  # counted when its own batch comes
                else:
                    raise DataError(
                        f"{len(faults.take())} samples of one batch cannot be used, the last: {fault}"
                    ) from None
        yield collate(examples, faults)


def decode_each(
    samples: Iterator[RawSample], *, transform: EvalTransform, num_classes: int | None, faults: FaultLog
) -> Iterator[Example]:
    for sample in samples:
        try:
            yield decode(sample, transform, num_classes)
        except SampleError as error:
            faults.add(Fault(error.reason, sample["__shard__"], sample["__key__"], error.detail))


def batched(examples: Iterator[Example], *, batch_size: int, faults: FaultLog) -> Iterator[Batch]:
    while batch := list(islice(examples, batch_size)):
        yield collate(batch, faults)
    yield faults_only(faults)  # of what came after the last whole sample


def decode(sample: RawSample, transform: Callable, num_classes: int | None) -> Example:
    class_id = class_of(sample, num_classes)
    try:
        image = transform(decode_image(image_of(sample)))
    except DataError as error:
        raise SampleError("broken image", str(error)) from error
    return Example(image, class_id, sample["__key__"])
