"""Batches from WebDataset shards, as a list of stages: which shard, its samples, mixed, decoded, put together."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from data import DataError
from data.batches import Batch, Example, Fault, FaultLog, SampleError, collate, failure, faults_only, seeded
from data.tar_samples import ShardError, class_of, image_of, key_prefixes, read_shard
from data.transforms import EvalTransform, TrainTransform, decode_image

NUM_STAND_INS = 16  # samples of the next batch that may take the place of broken ones
NUM_USELESS_SHARDS = 100  # in a row, before a worker gives up
# Seconds that shards without a sample may take in a row: the other ranks wait, and NCCL lets them for ten minutes.
PATIENCE = 300.0


class TrainingShards(IterableDataset):
    """Endless batches of one rank, the same for every start.

    Batch b of the rank belongs to the virtual worker b % W (W = number of workers) and to chunk b // L (L = batches per
    chunk), and all chance in it is a function of seed, rank, virtual worker and chunk. `DataLoader` asks its workers in
    turn, so the worker that is asked first plays the virtual worker of the first batch that is wanted.

    With another W or L, or another batch size, streams would give again what they have given; `reseeded_at`, where it
    is not 0, is one more part of their seeds and makes others of them.
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
        reseeded_at: int = 0,
    ):
        self.shards, self.transform, self.prefixes = shards, transform, key_prefixes(shards)
        self.batch_size, self.rank, self.num_classes = batch_size, rank, num_classes
        self.shuffle_buffer_size, self.seed = shuffle_buffer_size, seed
        self.start_batch, self.batches_per_chunk = start_batch, batches_per_chunk
        self.salt = (reseeded_at,) if reseeded_at else ()

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
        seed = (self.seed, self.rank, virtual_worker, chunk, *self.salt)
        stages = [
            partial(resampled, rng=seeded("shards", *seed)),
            partial(read_shards, faults=faults, num_useless_shards=NUM_USELESS_SHARDS, prefixes=self.prefixes),
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
        counts: Mapping[str, int | None],
        prefixes: Mapping[str, str],
        transform: EvalTransform,
        *,
        batch_size: int,
        num_classes: int | None,
        skip_broken: bool,
    ):
        self.shards, self.counts, self.prefixes, self.transform = shards, counts, prefixes, transform
        self.batch_size, self.num_classes, self.skip_broken = batch_size, num_classes, skip_broken

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        shards = self.shards[worker.id :: worker.num_workers] if worker else self.shards
        faults = FaultLog(strict=not self.skip_broken)
        stages = [
            from_the_start,
            partial(read_shards, faults=faults, counts=self.counts, prefixes=self.prefixes),
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
    """Shards drawn with replacement, without end: (shard, where to start reading).

    The first one is read from a random place, because a chunk may be shorter than a shard: the samples at a shard's
    end would be drawn less often than those at its beginning.
    """
    yield rng.choice(shards), rng.random()
    while True:
        yield rng.choice(shards), 0.0


def read_shards(
    shards: Iterable[tuple[str, float]],
    *,
    faults: FaultLog,
    num_useless_shards: int | None = None,
    counts: Mapping[str, int | None] | None = None,
    prefixes: Mapping[str, str] | None = None,
) -> Iterator[RawSample]:
    """The samples of shard after shard, undecoded; a damaged shard is a fault, and its whole samples are used.

    Args:
        counts: Samples to take from the beginning of each shard; None: all of it.
        prefixes: Of the keys, by shard, as of `data.tar_samples.key_prefixes`.

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
                sample["__key__"] = (prefixes or {}).get(shard, "") + sample["__key__"]
                yield sample
        except ShardError as error:
            fault = Fault("broken shard", shard, None, str(error))
            faults.add(fault)
        if useless and num_useless_shards is not None:
            wasted += time.monotonic() - begun
            if useless == num_useless_shards or wasted > PATIENCE:
                raise DataError(f"{useless} shards in a row gave no sample; the last was {fault}")


def windows(samples: Iterable[RawSample], *, size: int, ahead: int) -> Iterator[list[RawSample]]:
    """Each batch of raw samples, followed by the first few of the next, which may replace broken ones."""
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
            decode_this = partial(decode, transform=partial(transform, rng=rng), num_classes=num_classes)
            examples.append(decode_or_replace(sample, stand_ins, decode_this, faults))
        yield collate(examples, faults)


def decode_or_replace(
    sample: RawSample, stand_ins: Iterator[RawSample], decode: Callable[[RawSample], Example], faults: FaultLog
) -> Example:
    """The sample decoded or, where it is broken, the first of `stand_ins` that is not.

    Raises:
        DataError: All of them are broken.
    """
    try:
        return decode(sample)
    except SampleError as error:
        fault = Fault(error.reason, sample["__shard__"], sample["__key__"], error.detail)
        faults.add(fault)
    for stand_in in stand_ins:
        try:
            return decode(stand_in)
        except SampleError:
            continue  # counted when its own batch comes
    raise DataError(f"{len(faults.take())} samples of one batch cannot be used, the last: {fault}")


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
