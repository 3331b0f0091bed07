"""The evaluation images of a configuration as a tokenizer, a function here, or an image format gives them back."""

import sys
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from data import DataError
from data.batches import Loader, check_count
from data.evaluation_images import evaluation_images
from utils.evaluation.image_formats import Storage
from utils.evaluation.reconstruction_files import Made, ReconstructionFiles, Wanted
from utils.evaluation.session import Session
from utils.inference import choose_batch_size

Reconstruct = Callable[[Tensor, int], Made]  # of images (B, 3, P, P) uint8, in a batch of so many


class Written(NamedTuple):
    """What was written.

    Attributes:
        keys: Of the images, sorted.
        files: For people, on the first process.
        record: Of the images and how they were read, for the protocol.
    """

    keys: list[str]
    files: list[Path | str]
    record: dict[str, Any]


def write_reconstructions(
    config: DictConfig,
    wanted: Wanted,
    tokenizer: Reconstruct | None,
    storage: Storage | None,
    session: Session,
    *,
    source: str,
    num_images: int | None,
    batch_size: int | str | None,
    about: Mapping[str, Any],
) -> Written:
    """Write all that is wanted, sorted by key; all processes call this together.

    Args:
        tokenizer: Makes tokens, and without `storage` the images too.
        source: What the set of images is called in errors.
        num_images, batch_size: As --num_images and --batch_size; None for the configuration's.
        about: What made the tokens, for `utils.tokens.write_tokens`.

    Raises:
        DataError: Images are missing, or there are none.
    """
    size = config.dataset.preprocessing.crop_size
    with ReconstructionFiles(session.output_dir, wanted, size, session.processes, session.results) as files:
        batches, batch_size = _opened(config, tokenizer, session, num_images, batch_size)
        for batch in session.each(batches):
            files.add(
                batch["__key__"], batch["class_id"].numpy(), _made(batch["image"], tokenizer, storage, batch_size)
            )
        keys, num_bad = files.sort(source), session.sum(batches.num_bad)
        check_count(len(keys), batches.expected, num_bad)
        if not keys:
            raise DataError(f"there was no image ({num_bad} were skipped): check where the images are")
        written = files.write(about)
    images = {"expected": batches.expected, "written": len(keys), "skipped": num_bad}
    record = {"images": images, "preparation": batches.preparation, "batch_size": batch_size}
    return Written(keys, written, record)


def try_reconstructions(
    config: DictConfig,
    tokenizer: Reconstruct | None,
    storage: Storage | None,
    session: Session,
    *,
    num_images: int | None,
    batch_size: int | str | None,
) -> int:
    """One batch a process of `write_reconstructions`, without writing: how many images that was, of all processes."""
    batches, batch_size = _opened(config, tokenizer, session, num_images, batch_size)
    done = 0
    for batch in islice(session.each(batches), 1):
        _made(batch["image"], tokenizer, storage, batch_size)
        done += len(batch["__key__"])
    return session.sum(done)


def _opened(
    config: DictConfig,
    tokenizer: Reconstruct | None,
    session: Session,
    num_images: int | None,
    batch_size: int | str | None,
) -> tuple[Loader, int]:
    """This process's batches, and how many images are in each."""
    size = config.dataset.preprocessing.crop_size
    black = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    batch_size = choose_batch_size(
        batch_size or config.training.per_gpu_batch_size,
        lambda num: tokenizer(black.expand(num, -1, -1, -1), num),
        session.device,
    )
    batches = evaluation_images(config, num_images, **session.share(batch_size))
    return batches, min(batch_size, batches.expected or sys.maxsize)


def _made(images: Tensor, tokenizer: Reconstruct | None, storage: Storage | None, batch_size: int) -> Made:
    """What the tokenizer makes of a batch, the images as `storage` gives them where there is one."""
    made = tokenizer(images, batch_size) if tokenizer else Made({}, {}, None)
    return made._replace(images={None: storage(images)}) if storage else made
