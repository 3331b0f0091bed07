"""Write images into WebDataset shards: from a folder, a Hugging Face data set or an ImageNet folder.

    python3 data/make_shards.py --source ./images --output_dir ./shards
    python3 data/make_shards.py --source OWNER/DATASET --split train --output_dir ./shards

The files' own bytes are stored. Only images of a folder of your own that have transparency or lie on their side, by
their EXIF data, are stored as PNG, on white and upright. Run it again after an interruption and it continues.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, counted, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from data import DataError
from data.file_formats import FORMATS, image_extension
from data.image_sources import HubStream, Source, open_source
from data.shard_files import (
    Sample,
    read_manifest,
    write_manifest,
    write_shard,
)
from utils.lock import FolderLock
from utils.parts import check_free


def make_shards(
    source: Source,
    output_dir: Path,
    *,
    prefix: str,
    max_samples_per_shard: int,
    num_workers: int,
    seed: int,
    extension: str = "tar",
) -> dict[str, Any]:
    """Write all images of `source` into shards `PREFIX-000000.tar`, ... and into the folder's manifest.

    The images are mixed by `seed`; the shards' bytes depend on the source, the seed and the size of a shard, and not
    on the number of processes. Shards that an earlier, interrupted run finished are kept.

    Args:
        num_workers: Processes that write, one shard each at a time; 0 or 1 writes in this one.
        extension: `tar`, or `tar.gz` for images that are not compressed themselves.

    Returns:
        The manifest's entry of this prefix: `num_samples`, `num_skipped`, `plan` and `shards`.

    Raises:
        DataError: The folder holds shards of another plan, or the source cannot be read.
        UserError: Another process writes into the folder.
    """
    plan = _plan(source, max_samples_per_shard, seed)
    order = np.random.default_rng(seed).permutation(len(source))
    with FolderLock(output_dir):
        book = Book(output_dir, prefix, plan, source.classes, extension)
        jobs = {}
        for first in range(0, len(source), max_samples_per_shard):
            name = f"{prefix}-{first // max_samples_per_shard:06d}.{extension}"
            if not book.has(name):
                jobs[name] = order[first : first + max_samples_per_shard].tolist()
        with tqdm(total=len(source), initial=book.num_handled(), unit=" images", desc=prefix) as progress:
            for name, record in _write_all(source, output_dir, jobs, num_workers):
                book.enter(name, record)
                progress.update(record["num_samples"] + len(record["skipped"]))
        return book.close()


def make_shards_in_order(
    stream: HubStream, output_dir: Path, *, prefix: str, max_samples_per_shard: int
) -> dict[str, Any]:
    """`make_shards` for a source that can only be read from its start: in its own order, in one process."""
    plan = _plan(stream, max_samples_per_shard, None)
    with FolderLock(output_dir):
        book = Book(output_dir, prefix, plan, stream.classes, "tar")
        _write_in_order(stream, book, max_samples_per_shard)
        return book.close()


def _write_in_order(stream: HubStream, book: "Book", max_samples_per_shard: int) -> None:
    num_shards, prefix = 0, book.prefix
    while book.has(f"{prefix}-{num_shards:06d}.tar"):
        num_shards += 1
    start = num_shards * max_samples_per_shard
    with tqdm(initial=start, unit=" images", desc=prefix) as progress:
        images = ((index, f"row {index}", *read) for index, read in enumerate(stream.read_from(start), start))
        while picked := list(islice(images, max_samples_per_shard)):
            name = f"{prefix}-{num_shards:06d}.tar"
            record = _write_one(book.output_dir / name, iter(picked))
            book.enter(name, record)
            progress.update(len(picked))
            num_shards += 1


def _plan(source: Source | HubStream, max_samples_per_shard: int, seed: int | None) -> dict[str, Any]:
    if max_samples_per_shard < 1:
        raise DataError(f"the number of samples per shard must be at least 1, got {max_samples_per_shard}")
    if seed is not None and seed < 0:
        raise DataError(f"the seed must be at least 0, got {seed}")
    return {"source": source.fingerprint(), "seed": seed, "max_samples_per_shard": max_samples_per_shard}


class Book:
    """The manifest while shards are being written; it is on disk after every shard."""

    def __init__(self, output_dir: Path, prefix: str, plan: dict[str, Any], classes: list[str], extension: str):
        output_dir.mkdir(parents=True, exist_ok=True)
        self.output_dir, self.prefix = output_dir, prefix
        self.manifest = read_manifest(output_dir) or {"classes": classes, "splits": {}}
        if self.manifest["classes"] != classes:
            raise DataError(
                f"{output_dir} already holds shards with {len(self.manifest['classes'])} other classes than the "
                f"{len(classes)} of this source: give each data set its own --output_dir"
            )
        if prefix not in self.manifest["splits"]:
            check_free(output_dir, [path.name for path in sorted(output_dir.glob(f"{prefix}-[0-9]*.{extension}"))])
        self.split = self.manifest["splits"].setdefault(prefix, {"plan": plan, "shards": {}})
        if self.split["plan"] != plan:
            changed = ", ".join(key for key in plan if self.split["plan"].get(key) != plan[key])
            raise DataError(
                f"{output_dir} already holds {prefix} shards that were made with another {changed}: "
                "remove them and manifest.json, or give another --output_dir or --prefix"
            )
        self._save()  # shards of a killed run are known as ours

    def has(self, name: str) -> bool:
        record = self.split["shards"].get(name)
        path = self.output_dir / name
        return record is not None and path.is_file() and path.stat().st_size == record["num_bytes"]

    def num_handled(self) -> int:
        return sum(
            record["num_samples"] + len(record["skipped"])
            for name, record in self.split["shards"].items()
            if self.has(name)
        )

    def enter(self, name: str, record: dict[str, Any]) -> None:
        self.split["shards"][name] = record
        self._save()

    def close(self) -> dict[str, Any]:
        self._save()
        return self.split

    def _save(self) -> None:
        # Sorted, so that the file does not depend on which process was first.
        self.split["shards"] = dict(sorted(self.split["shards"].items()))
        records = self.split["shards"].values()
        self.split["num_samples"] = sum(record["num_samples"] for record in records)
        self.split["num_skipped"] = sum(len(record["skipped"]) for record in records)
        write_manifest(self.output_dir, self.manifest)


def _write_all(
    source: Source, output_dir: Path, jobs: dict[str, list[int]], num_workers: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    if num_workers <= 1 or len(jobs) <= 1:
        for name, indices in jobs.items():
            yield name, _write_one(output_dir / name, _read_each(source, indices))
        return
    # "spawn": a fork of a process whose libraries run threads can hang.
    pool = ProcessPoolExecutor(
        min(num_workers, len(jobs)), multiprocessing.get_context("spawn"), initializer=_keep_source, initargs=(source,)
    )
    with pool:
        futures = {pool.submit(_write_in_worker, output_dir / name, indices): name for name, indices in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker_source: Source | None = None


def _keep_source(source: Source) -> None:
    """Sent once to each process: the list of a million files is larger than the images of a shard."""
    global _worker_source
    _worker_source = source


def _write_in_worker(path: Path, indices: list[int]) -> dict[str, Any]:
    return _write_one(path, _read_each(_worker_source, indices))


def _read_each(source: Source, indices: list[int]) -> Iterator[tuple[int, str, bytes, int | None]]:
    for index in indices:
        yield index, source.name(index), *source.read(index)


def _write_one(path: Path, images: Iterator[tuple[int, str, bytes, int | None]]) -> dict[str, Any]:
    skipped = []

    def samples() -> Iterator[Sample]:
        for index, name, image, class_id in images:
            if not _is_usable(image):
                skipped.append(name)
                continue
            yield Sample(f"{index:08d}", image, class_id)

    return write_shard(path, samples()) | {"skipped": skipped}


def _is_usable(image: bytes) -> bool:
    """By the first bytes; a TIFF, which may hold what no command shows, such as NaN, is decoded."""
    extension = image_extension(image)
    if extension != "tif":
        return extension is not None
    from data.transforms import decode_image  # imports torch

    try:
        decode_image(image)
    except DataError:
        return False
    return True


def report(split: dict[str, Any], output_dir: Path, prefix: str) -> None:
    """Print what was written, and what was not."""
    samples, shards = counted(split["num_samples"], "sample"), counted(len(split["shards"]), "shard")
    print(f"{samples} in {shards}: {output_dir / prefix}-*")
    skipped = [name for record in split["shards"].values() for name in record["skipped"]]
    if skipped:
        shown = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        print(
            f"{len(skipped)} left out, because their bytes are no {', '.join(FORMATS)} image that can be read: {shown}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--source",
        required=True,
        help="a folder of images (a subfolder is a class; no subfolders: no labels), an ImageNet folder (train/, "
        "val/), or the id of a data set on the Hugging Face hub",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="where the shards and manifest.json go")
    parser.add_argument("--split", default="train", help="hub split, or subfolder train or val of --source")
    parser.add_argument("--prefix", help="shards are PREFIX-000000.tar, ... (default: the split)")
    parser.add_argument("--max_samples_per_shard", type=int, default=4000)
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes, one shard each at a time")
    parser.add_argument("--seed", type=int, default=0, help="mixes the images")
    parser.add_argument(
        "--streaming", action="store_true", help="hub only: do not keep a copy on disk; the hub's order, one process"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    prefix = arguments.prefix or arguments.split
    source = open_source(arguments.source, arguments.split, streaming=arguments.streaming)
    if isinstance(source, HubStream):
        split = make_shards_in_order(
            source, arguments.output_dir, prefix=prefix, max_samples_per_shard=arguments.max_samples_per_shard
        )
    else:
        split = make_shards(
            source,
            arguments.output_dir,
            prefix=prefix,
            max_samples_per_shard=arguments.max_samples_per_shard,
            num_workers=arguments.num_workers,
            seed=arguments.seed,
        )
    report(split, arguments.output_dir, prefix)


if __name__ == "__main__":
    run(main)
