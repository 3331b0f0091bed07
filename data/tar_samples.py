"""Reading shards: tar files of samples, local or remote, of which nothing is trusted or extracted to disk."""

import os
import re
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.gopen import gopen, gopen_schemes
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from data import DataError
from data.batches import NO_LABEL, SampleError
from data.shard_files import PICTURE_EXTENSIONS, read_manifest
from utils.cli import ROOT

FIELDS = (*PICTURE_EXTENSIONS, "cls")
MAX_MEMBER_BYTES = 1 << 28
TIMEOUT = 60.0  # seconds without a byte from a remote
NUM_ATTEMPTS = 3  # to reach a remote
BLOCK = tarfile.BLOCKSIZE


class ShardError(Exception):
    """A shard that is missing, cut off or damaged."""


def resolve_shards(spec: Any, key: str) -> list[str]:
    """The shards that a config names, in order: local paths (made absolute) and URLs.

    Args:
        spec: A path or URL with brace expansion (`shards/train-{000000..000320}.tar`), or a list of them. Relative
            paths are looked for from the current folder, then from the repository.
        key: The config key, for messages.

    Raises:
        DataError: Nothing is given, or a local shard is not there, or a URL has a scheme that nothing here reads.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec or [])
    if not patterns:
        raise DataError(f"{key} must name shards, for example shards/train-{{000000..000320}}.tar, and it is empty")
    try:
        names = [name.removeprefix("file://") for pattern in patterns for name in expand_urls(pattern)]
    except (ValueError, AssertionError) as error:
        raise DataError(f"{key} must be paths or URLs with brace expansion, got {spec!r} ({error})") from error
    shards = [name if _scheme(name) else _find_local(name) for name in names]
    for name in names:
        if _scheme(name) and _scheme(name) not in gopen_schemes:
            raise DataError(
                f"{key}: shards cannot be read from {name}; use a path, http(s):, gs:, hf: or a command that writes "
                "the shard to its output, such as 'pipe:aws s3 cp s3://BUCKET/SHARD.tar -'"
            )
    if missing := [name for name, shard in zip(names, shards, strict=True) if shard is None]:
        raise DataError(
            f"{key}: {len(missing)} of {len(names)} shards are not there, the first is {missing[0]} (looked from "
            f"{Path.cwd()} and {ROOT}): make them with a script of data/, or correct the path"
        )
    return shards


def _scheme(name: str) -> str:
    match = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):", name)
    return match.group(1).lower() if match else ""


def _find_local(name: str) -> str | None:
    path = Path(name).expanduser()
    found = next((place for place in (path.absolute(), ROOT / path) if place.is_file()), None)
    return str(found) if found else None


def manifest_facts(shards: list[str]) -> tuple[int | None, int | None]:
    """Samples in all of `shards`, and number of classes, by the manifests beside them; None where there is none."""
    num_samples, num_classes = 0, 0
    manifests: dict[Path, Any] = {}
    for shard in shards:
        path = Path(shard)
        if _scheme(shard):
            return None, None
        if path.parent not in manifests:
            manifests[path.parent] = read_manifest(path.parent)
        manifest = manifests[path.parent]
        splits = manifest["splits"].values() if manifest else ()
        record = next((split["shards"][path.name] for split in splits if path.name in split["shards"]), None)
        if record is None:
            return None, None
        num_samples += record["num_samples"]
        num_classes = max(num_classes, len(manifest["classes"]))
    return num_samples, num_classes or None


def read_shard(shard: str, start: float = 0.0) -> Iterator[dict[str, Any]]:
    """The samples of a shard as they are stored: `__key__`, `__shard__`, and the bytes of `jpg`..., `cls`.

    Args:
        start: Where to begin, as a share of the file in [0, 1). Other values than 0 take effect on local uncompressed
            shards; the rest is read from the beginning.

    Raises:
        ShardError: It cannot be opened, or ends before its end. The sample that was being read is not given out.
    """
    try:
        with _open(shard) as stream:
            entered = start > 0 and not _scheme(shard) and _enter(stream, start)
            samples = _group(_members(stream), shard)
            # After a start inside the shard the first sample may lack members that stand before it.
            yield from islice(samples, 1, None) if entered else samples
    except OSError as error:
        raise ShardError(f"cannot be read ({error})") from error


def _group(members: Iterator[tuple[str, bytes]], shard: str) -> Iterator[dict[str, Any]]:
    sample: dict[str, Any] | None = None
    for name, data in members:
        key, field = base_plus_ext(name)
        if key is None:
            continue
        if sample is None or key != sample["__key__"]:
            if sample is not None:
                yield sample
            sample = {"__key__": key, "__shard__": shard}
        field = field.lower()
        if field in sample:
            sample["__duplicate__"] = field
        if field in FIELDS:
            sample[field] = data
    if sample is not None:
        yield sample


def _open(shard: str) -> BinaryIO:
    scheme = _scheme(shard)
    if not scheme:
        return open(shard, "rb")
    if scheme not in ("http", "https"):
        return gopen(shard)
    for attempt in range(NUM_ATTEMPTS):
        try:
            # urllib and not webdataset's curl: a remote that stalls must end in an error.
            return urllib.request.urlopen(shard, timeout=TIMEOUT)
        except OSError as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or attempt == NUM_ATTEMPTS - 1:
                raise
            time.sleep(2.0**attempt)
    raise AssertionError("the loop returns or raises")


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged header, or the end of a cut file, for the end of the archive: here it is an error."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # the block of zeros that ends every archive
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error


def _members(stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(fileobj=stream, mode="r|*", bufsize=1 << 18, tarinfo=_StrictTarInfo) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep a million of them
                # Names are never used as paths; this keeps them printable.
                name = member.name.encode("utf-8", "backslashreplace").decode()
                if not member.isreg() or member.issparse() or name.startswith("__"):
                    continue
                if not name.lower().endswith(tuple(f".{field}" for field in FIELDS)):
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise tarfile.ReadError(f"member {name} claims {member.size} bytes")
                yield name, tar.extractfile(member).read()
    except Exception as error:  # tarfile and the decompressors raise errors of many classes for damaged bytes
        raise ShardError(f"ends early or is damaged ({error or type(error).__name__})") from error


def _enter(file: BinaryIO, start: float) -> bool:
    """Move to the first header at or after this share of the file; False (at the beginning) where that cannot be."""
    if _is_header(file.read(BLOCK)):  # a compressed shard has none
        file.seek(int(os.fstat(file.fileno()).st_size * start) // BLOCK * BLOCK)
        while block := file.read(BLOCK):
            if _is_header(block):
                file.seek(-BLOCK, os.SEEK_CUR)
                return True
    file.seek(0)
    return False


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def picture_of(sample: dict[str, Any]) -> bytes:
    """The encoded picture of a raw sample.

    Raises:
        SampleError: It has none, or two members of one name.
    """
    if "__duplicate__" in sample:
        raise SampleError("two members of one name", f"the field {sample['__duplicate__']} comes twice")
    for extension in PICTURE_EXTENSIONS:
        if extension in sample:
            return sample[extension]
    raise SampleError("no picture", f"expected one of the fields {', '.join(PICTURE_EXTENSIONS)}")


def class_of(sample: dict[str, Any], num_classes: int | None) -> int:
    """The class id of a raw sample, -1 where it has none.

    Raises:
        SampleError: The label is not a number in 0..num_classes-1.
    """
    if "cls" not in sample:
        return NO_LABEL
    text = sample["cls"].strip()
    if text == b"-1":
        return NO_LABEL
    if not text.isdigit() or len(text) > 9 or (num_classes is not None and int(text) >= num_classes):
        allowed = "0 or more" if num_classes is None else f"in 0..{num_classes - 1}"
        raise SampleError("wrong label", f"cls must be a whole number {allowed}, got {text[:40]!r}")
    return int(text)
