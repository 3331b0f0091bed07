"""Shards on disk: tar files of samples, and the manifest that counts them."""

import contextlib
import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data import DataError
from data.file_formats import FORMATS, image_extension
from utils.files import replacing, sha256_of, write_json

MANIFEST = "manifest.json"


class Sample(NamedTuple):
    """One image as it is stored: its bytes are never re-encoded."""

    key: str
    image: bytes
    class_id: int | None


def write_shard(path: Path, samples: Iterable[Sample]) -> dict[str, Any]:
    """Write one shard, which appears whole or not at all, and return its record for the manifest.

    The bytes depend on the samples alone: no time, user or machine is stored. A name in .gz is compressed.
    """
    num_samples = 0
    with replacing(path) as partial:
        with _open_new_shard(partial, compressed=path.suffix == ".gz") as tar:
            for sample in samples:
                _add_sample(tar, sample)
                num_samples += 1
        return {"num_samples": num_samples, "num_bytes": partial.stat().st_size, "sha256": sha256_of(partial)}


@contextlib.contextmanager
def _open_new_shard(path: Path, *, compressed: bool) -> Iterator[tarfile.TarFile]:
    with open(path, "wb") as file, contextlib.ExitStack() as stack:
        stream = stack.enter_context(gzip.GzipFile("", "wb", 9, file, mtime=0)) if compressed else file
        yield stack.enter_context(tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT))


def _add_sample(tar: tarfile.TarFile, sample: Sample) -> None:
    extension = image_extension(sample.image)
    if extension is None:
        raise ValueError(f"sample {sample.key} is not an image ({', '.join(FORMATS)})")
    _add_member(tar, f"{sample.key}.{extension}", sample.image)
    if sample.class_id is not None:
        _add_member(tar, f"{sample.key}.cls", str(sample.class_id).encode())


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder of shards, None where there is none.

    Raises:
        DataError: The file is there and is not a manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shards = [shard for split in manifest["splits"].values() for shard in split["shards"].values()]
        num_samples = [shard["num_samples"] for shard in shards]
        if not all(isinstance(num, int) for num in num_samples) or not isinstance(manifest["classes"], list):
            raise TypeError("a count or the list of classes has the wrong type")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} must be a manifest written by data/make_shards.py, but it cannot be read as one ({error!r}): "
            "make the shards again, or move this file away"
        ) from error
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a folder of shards, whole or not at all."""
    write_json(folder / MANIFEST, manifest)
