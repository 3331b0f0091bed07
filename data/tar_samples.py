"""Reading shards: tar files of samples, local or remote, of which nothing is trusted or extracted to disk."""

import os
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.tariterators import base_plus_ext

from data.batches import NO_LABEL, SampleError
from data.file_formats import IMAGE_EXTENSIONS
from data.shard_files import read_manifest
from data.shard_urls import open_shard, scheme_of

FIELDS = (*IMAGE_EXTENSIONS, "cls")
ENDINGS = tuple(f".{field}" for field in FIELDS)
MAX_MEMBER_BYTES = 1 << 28
MAX_NAME_BYTES = 1 << 16
NAME_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
BLOCK = tarfile.BLOCKSIZE


class ShardError(Exception):
    """A shard that is missing, cut off or damaged."""


def manifest_facts(shards: list[str]) -> tuple[int | None, int | None]:
    """Samples in all of `shards`, and number of classes, by the manifests beside them; None where there is none."""
    num_samples, num_classes = 0, 0
    manifests: dict[Path, Any] = {}
    for shard in shards:
        path = Path(shard)
        if scheme_of(shard):
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
        with open_shard(shard) as stream:
            entered = start > 0 and not scheme_of(shard) and _enter(stream, start)
            samples = _group(_members(stream), shard)
            # After a start inside the shard the first sample may lack members that stand before it.
            yield from islice(samples, 1, None) if entered else samples
    except OSError as error:
        raise ShardError(f"cannot be read ({error})") from error


def _group(members: Iterator[tuple[str, bytes | None]], shard: str) -> Iterator[dict[str, Any]]:
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
        if data is not None:
            sample[field] = data
    if sample is not None:
        yield sample


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged header, or the end of a cut file, for the end of the archive: here it is an error.

    So is a size that cannot be: with one below zero tarfile loses its place, and long names it reads into memory.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)._checked()  # again, because a name's record may change the size
        except tarfile.EOFHeaderError:  # the block of zeros that ends every archive
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error

    @classmethod
    def frombuf(cls, buffer: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        return super().frombuf(buffer, encoding, errors)._checked()

    def _checked(self) -> tarfile.TarInfo:
        if not 0 <= self.size <= (MAX_NAME_BYTES if self.type in NAME_TYPES else MAX_MEMBER_BYTES):
            raise tarfile.ReadError(f"member {_printable(self.name)} claims {self.size} bytes")
        return self


def _members(stream: BinaryIO) -> Iterator[tuple[str, bytes | None]]:
    """Names and contents of a shard's images and labels; no content of links and of what else is no plain file."""
    place = "the beginning"
    try:
        for tar, member in _walk(stream):
            name = place = _printable(member.name)
            if member.isdir() or name.startswith("__") or not name.lower().endswith(ENDINGS):
                continue
            is_file = member.isreg() and not member.issparse()
            yield name, tar.extractfile(member).read() if is_file else None
    except Exception as error:  # tarfile and the decompressors raise errors of many classes for damaged bytes
        raise ShardError(f"ends early or is damaged in or after {place} ({error or type(error).__name__})") from error


def _walk(stream: BinaryIO) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    with tarfile.open(fileobj=stream, mode="r|*", bufsize=1 << 18, tarinfo=_StrictTarInfo) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep a million of them
            yield tar, member


def _printable(name: str) -> str:
    """A member's name, which is never used as a path, without what would garble a terminal or part a line."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in name)


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


def image_of(sample: dict[str, Any]) -> bytes:
    """The encoded image of a raw sample.

    Raises:
        SampleError: It has none, or two members of one name.
    """
    if "__duplicate__" in sample:
        raise SampleError("two members of one name", f"the field {sample['__duplicate__']} comes twice")
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            return sample[extension]
    raise SampleError("no image", f"expected one of the fields {', '.join(IMAGE_EXTENSIONS)}")


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
