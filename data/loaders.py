"""What a configuration's `dataset` means: the loaders of training and evaluation, from shards or a folder."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from data import DataError
from data.batches import Batch, Loader
from data.image_folder import (
    EvaluationFolder,
    GlobalBatches,
    TrainingFolder,
    evaluation_batches,
    num_eval_examples,
    open_folder,
)
from data.image_shards import EvaluationShards, TrainingShards
from data.shard_urls import resolve_shards
from data.tar_samples import key_prefixes, manifest_facts
from data.token_loader import TokenBatches, token_loaders
from data.transforms import AS_SHOWN, EvalTransform, TrainTransform
from utils.processes import obey_only_the_parent


def training_loader(
    config: DictConfig,
    *,
    rank: int,
    world_size: int,
    start_batch: int = 0,
    batches_per_chunk: int,
    reseeded_at: int = 0,
    start_method: str | None = None,
) -> Loader:
    """Endless training batches for one rank.

    Interrupted after any batch and started again with `start_batch` = batches taken so far, it continues with the
    batches that would have followed, at the same world size, batch size, number of workers and `batches_per_chunk`.

    Args:
        start_batch: Batches that this rank has taken before.
        batches_per_chunk: Batches of this rank between fresh seeds (shards; a folder needs none). After a restart a
            worker reads at most one chunk again, without decoding it: `save_every` times gradient accumulation is free.
        reseeded_at: The step at which one of those was changed last, 0: never. Shards are drawn by another seed then,
            because the same one would give some batches again; a folder's order does not depend on workers and chunks.
        start_method: How workers are started: `fork`, `spawn` or `forkserver`; the platform's way when not given.

    Raises:
        DataError: The data are not there, a value of the config makes no sense or, while batches are taken, more than
            `dataset.max_bad_fraction` of the samples are broken.
    """
    kind = _dataset_type(config)
    batch_size = _at_least(1, config.training.per_gpu_batch_size, "training.per_gpu_batch_size")
    num_workers = _at_least(0, config.dataset.params.num_workers_per_gpu, "dataset.params.num_workers_per_gpu")
    batches = None
    if kind == "folder":
        dataset = _training_folder(config)
        batches = GlobalBatches(
            len(dataset.source),
            batch_size,
            rank=rank,
            world_size=world_size,
            seed=config.training.seed,
            start_batch=start_batch,
        )
    else:
        dataset = _training_shards(config, batch_size, rank, start_batch, batches_per_chunk, reseeded_at)
    return Loader(
        _data_loader(dataset, batches, num_workers, start_method),
        max_bad_fraction=config.dataset.get("max_bad_fraction", 0.01),
    )


def _training_folder(config: DictConfig) -> TrainingFolder:
    return TrainingFolder(open_folder(config, "train"), _train_transform(config), config.training.seed)


def _training_shards(
    config: DictConfig, batch_size: int, rank: int, start_batch: int, batches_per_chunk: int, reseeded_at: int
) -> TrainingShards:
    params = config.dataset.params
    buffer_size = params.get("shuffle_buffer_size", 1000)
    shards = resolve_shards(params.get("train_shards_path_or_url"), "dataset.params.train_shards_path_or_url")
    return TrainingShards(
        shards,
        _train_transform(config),
        batch_size=batch_size,
        rank=rank,
        num_classes=manifest_facts(shards)[1],
        shuffle_buffer_size=_at_least(1, buffer_size, "dataset.params.shuffle_buffer_size"),
        seed=config.training.seed,
        start_batch=start_batch,
        batches_per_chunk=_at_least(1, batches_per_chunk, "batches_per_chunk"),
        reseeded_at=reseeded_at,
    )


def _train_transform(config: DictConfig) -> TrainTransform:
    preprocessing = config.dataset.preprocessing
    return TrainTransform(
        preprocessing.resize_shorter_edge,
        preprocessing.crop_size,
        preprocessing.get("random_crop", False),
        preprocessing.get("random_flip", False),
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

    `dataset.params.max_eval_examples` takes so many of them: evenly spaced ones of a folder, or the first ones of every
    shard alike. Which ones does not depend on batches, ranks and workers.

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
    kind, params = _dataset_type(config), config.dataset.params
    if batch_size is None:
        batch_size = config.training.per_gpu_batch_size
    num_workers = params.num_workers_per_gpu if num_workers is None else num_workers
    batch_size = _at_least(1, batch_size, "the batch size of evaluation")
    num_workers = _at_least(0, num_workers, "dataset.params.num_workers_per_gpu")
    most = params.get("max_eval_examples")
    if most is not None:
        most = _at_least(1, most, "dataset.params.max_eval_examples")
    batches = None
    if kind == "folder":
        dataset = _evaluation_folder(config)
        found = len(dataset.source)
        taken = found if most is None else min(most, found)
        batches = evaluation_batches(found, batch_size, rank=rank, world_size=world_size, num_taken=taken)
    else:
        dataset, found = _evaluation_shards(config, batch_size, most, rank=rank, world_size=world_size)
        num_workers = min(num_workers, len(dataset.shards))
    return Loader(
        _data_loader(dataset, batches, num_workers, start_method),
        expected=_expected(config, found, most),
        preparation=dataset.transform.description,
    )


def _expected(config: DictConfig, found: int | None, most: int | None) -> int | None:
    """Samples that an evaluation must see, of `found` that there are and `most` that are asked for."""
    expected = num_eval_examples(config)
    if expected is None:
        expected = found
    if most is None and found not in (None, expected):
        raise DataError(
            f"expected {expected} evaluation samples, got {found} by the shards' manifest: shards are missing, or "
            "dataset.params.num_eval_examples is of another data set (null takes the manifest's number)"
        )
    if most is None:
        return expected
    return None if found is None else min(most, expected)  # unknown sizes: some shard may hold too few


def _evaluation_folder(config: DictConfig) -> EvaluationFolder:
    skip_broken = config.dataset.params.get("eval_skip_broken", False)
    transform = EvalTransform(config.dataset.preprocessing.crop_size, AS_SHOWN)
    return EvaluationFolder(open_folder(config, "eval"), transform, skip_broken)


def _evaluation_shards(
    config: DictConfig, batch_size: int, most: int | None, *, rank: int, world_size: int
) -> tuple[EvaluationShards, int | None]:
    """One rank's shards, and the samples of all ranks' where a manifest says."""
    params = config.dataset.params
    shards = resolve_shards(params.get("eval_shards_path_or_url"), "dataset.params.eval_shards_path_or_url")
    found, num_classes = manifest_facts(shards)
    counts = dict.fromkeys(shards) if most is None else samples_of_each(shards, most)
    dataset = EvaluationShards(
        [shard for shard in shards if counts[shard] != 0][rank::world_size],
        counts,
        key_prefixes(shards),
        EvalTransform(config.dataset.preprocessing.crop_size),
        batch_size=batch_size,
        num_classes=num_classes,
        skip_broken=params.get("eval_skip_broken", False),
    )
    return dataset, found


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
) -> tuple[Callable[..., Loader | TokenBatches], Callable[[], Loader | TokenBatches] | None]:
    """What the training loop asks for: training batches, and an evaluation pass.

    The first is a function of the first micro-batch that is wanted and of `reseeded_at` (0 when not given). The second
    is None where the config names no evaluation data.
    """
    if config.dataset.get("type") == "tokens":
        return token_loaders(config, rank=rank, world_size=world_size)
    params = config.dataset.params
    chunk = config.experiment.save_every * config.training.gradient_accumulation_steps
    where = "eval_folder" if _dataset_type(config) == "folder" else "eval_shards_path_or_url"
    place = {"rank": rank, "world_size": world_size}
    training = partial(_training_from, config, batches_per_chunk=chunk, **place)
    return training, partial(evaluation_loader, config, **place) if params.get(where) else None


def _training_from(config: DictConfig, start_batch: int, reseeded_at: int = 0, **arguments: int) -> Loader:
    return training_loader(config, start_batch=start_batch, reseeded_at=reseeded_at, **arguments)


def _dataset_type(config: DictConfig) -> str:
    kind = config.dataset.get("type", "shards")
    if kind == "tokens":
        raise DataError(
            "dataset.type is tokens, and images are needed: give a tokenizer's configuration instead of a generator's"
        )
    if kind not in ("shards", "folder"):
        raise DataError(f"dataset.type must be shards, folder or tokens, got {kind}")
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
