"""Reading shards: tar files of samples, local or remote, of which nothing is trusted or extracted to disk."""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from webdataset.tariterators import base_plus_ext

from data.batches import NO_LABEL, SampleError
from data.file_formats import IMAGE_EXTENSIONS
from data.shard_files import read_manifest
from data.shard_urls import open_shard, scheme_of

IMAGES = frozenset(IMAGE_EXTENSIONS)
FIELDS = IMAGES | {"cls"}
ENDINGS = tuple(f".{field}" for field in (*IMAGE_EXTENSIONS, "cls"))
MAX_FIELDS = 8  # that an error names
MAX_DOTTED = 8  # fields with images that a sample may have before its own image
MAX_MEMBER_BYTES = 1 << 28
MAX_NAME_BYTES = 1 << 16
NAME_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
BLOCK = tarfile.BLOCKSIZE


class ShardError(Exception):
    """A shard that is missing, cut off or damaged."""


def manifest_facts(shards: list[str]) -> tuple[int | None, int | None]:
    """Samples in all of `shards`, and number of classes, by the manifests beside them; None where there is none."""
    places = _manifest_places(shards)
    if places is None:
        return None, None
    num_samples = sum(place.num_samples for place in places)
    return num_samples, max((place.num_classes for place in places), default=0) or None


def sample_counts(shards: list[str]) -> list[int | None]:
    """Samples in each of `shards`, by the manifests beside them; None where not every one is in a manifest."""
    places = _manifest_places(shards)
    return [None] * len(shards) if places is None else [place.num_samples for place in places]


def key_prefixes(shards: list[str]) -> dict[str, str]:
    """What makes keys unique where they may start again in every shard: the shard's name, before a slash.

    Nothing for a single shard, nor for the shards of one split of a manifest, whose samples are numbered through. Where
    two shards share a name, it is their place in the list.
    """
    shards = list(dict.fromkeys(shards))
    places = _manifest_places(shards)
    if len(shards) < 2 or (places is not None and len({(place.folder, place.split) for place in places}) == 1):
        return {}
    names = [match[-1] if (match := re.findall(r"([^/\\]+?)\.tar", shard)) else "" for shard in shards]
    if len(set(names)) < len(names):
        names = [f"{place:06d}" for place in range(len(shards))]
    return {shard: f"{name}/" for shard, name in zip(shards, names, strict=True)}


def fingerprint_of(shards: list[str]) -> str:
    """Changes when the shards do: by size and their manifest's checksum; of a remote one the address alone counts."""
    places = _manifest_places(shards)
    digest = hashlib.sha256()
    for index, shard in enumerate(shards):
        facts = [shard] if scheme_of(shard) else [Path(shard).name, os.stat(shard).st_size]
        facts.append(places[index].sha256 if places else None)
        digest.update(("\0".join(map(str, facts)) + "\n").encode("utf-8", "replace"))
    return f"{len(shards)} shards, sha256 {digest.hexdigest()[:16]}"


class _Place(NamedTuple):
    """Where a manifest has a shard, and what it says."""

    folder: Path
    split: str
    num_samples: int
    num_classes: int
    sha256: str | None


def _manifest_places(shards: list[str]) -> list[_Place] | None:
    """The places of all shards; None where a shard is remote, or in no manifest."""
    manifests: dict[Path, Any] = {}
    places = []
    for shard in shards:
        path = Path(shard)
        if scheme_of(shard):
            return None
        if path.parent not in manifests:
            manifests[path.parent] = read_manifest(path.parent) or {"splits": {}}
        manifest = manifests[path.parent]
        split = next((name for name, split in manifest["splits"].items() if path.name in split["shards"]), None)
        if split is None:
            return None
        record = manifest["splits"][split]["shards"][path.name]
        num_classes = len(manifest["classes"])
        places.append(_Place(path.parent, split, record["num_samples"], num_classes, record.get("sha256")))
    return places


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
            samples = _group(_members(stream), shard, entered)
            # After a start inside the shard the first sample may lack members that stand before it.
            yield from islice(samples, 1, None) if entered else samples
    except OSError as error:
        raise ShardError(f"cannot be read ({error})") from error


def _group(members: Iterator[tuple[str, bytes | None]], shard: str, entered: bool) -> Iterator[dict[str, Any]]:
    """Put the members of each key together; they are neighbours, and others are marked as `__apart__`."""
    keys: set[str] = set()
    first = None
    for sample in _neighbours(members):
        key = sample["__key__"] = sample.pop("__name__")
        first = first or f"{key}.{sample['__fields__'][0]}"
        if FIELDS.isdisjoint(sample["__fields__"]):
            continue  # files beside the samples
        if key in keys:
            sample["__apart__"] = True
        keys.add(key)
        yield sample | {"__shard__": shard}
    if first is not None and not keys and not entered:
        raise ShardError(f"holds no image: expected names that end in {', '.join(ENDINGS)}, and the first is {first!r}")


def _neighbours(members: Iterator[tuple[str, bytes | None]]) -> Iterator[dict[str, Any]]:
    """Samples of neighbouring members, by WebDataset's rule: the key ends at the first dot of a file's name.

    So `0.mask.png` is the field `mask.png` of the sample 0. But where a key has no image by that rule, the key ends at
    the last dot: `scan.v2.0001.png` and `scan.v2.0002.png` are two samples.
    """
    sample: dict[str, Any] = {"__name__": None}
    dotted: list[dict[str, Any]] = []  # samples by the last dot, under the same key by the first
    for name, data in members:
        key, field = base_plus_ext(name)
        if key is None:
            continue
        if key != sample["__name__"]:
            yield from _chosen(sample, dotted)
            sample, dotted = _new_sample(key), []
        _add(sample, field, data)
        if "." in field:
            long_key, _, last = name.rpartition(".")
            if not dotted or dotted[-1]["__name__"] != long_key:
                dotted.append(_new_sample(long_key))
            _add(dotted[-1], last, data)
        if len(dotted) > MAX_DOTTED:
            if IMAGES.isdisjoint(sample):
                yield dotted[0]
            del dotted[0]
    yield from _chosen(sample, dotted)


def _new_sample(name: str) -> dict[str, Any]:
    return {"__name__": name, "__fields__": []}


def _add(sample: dict[str, Any], field: str, data: bytes | None) -> None:
    field = field.lower()
    if field in sample:
        sample["__duplicate__"] = field
    sample["__fields__"].append(field)
    if data is not None and field in FIELDS:
        sample[field] = data


def _chosen(sample: dict[str, Any], dotted: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The sample by the first dot or, where only those by the last dot have images, these."""
    if IMAGES.isdisjoint(sample) and not all(IMAGES.isdisjoint(one) for one in dotted):
        yield from dotted
    elif sample["__name__"] is not None:
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
    """Names of a shard's members, and the contents of those that are images or labels and plain files."""
    place = "the beginning"
    try:
        for tar, member in _walk(stream):
            name = place = _printable(member.name)
            if member.isdir() or name.startswith("__"):
                continue
            wanted = member.isreg() and not member.issparse() and name.lower().endswith(ENDINGS)
            yield name, tar.extractfile(member).read() if wanted else None
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
        SampleError: It has none, two members of one name, or members that are not neighbours.
    """
    if "__apart__" in sample:
        raise SampleError(
            "members apart",
            f"members of this name stand in two places of the shard, {_fields(sample)} apart from the "
            "others: sort them (tar --sort=name)",
        )
    if "__duplicate__" in sample:
        raise SampleError("two members of one name", f"the field {sample['__duplicate__']} comes twice")
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            return sample[extension]
    raise SampleError(
        "no image",
        f"expected one of the fields {', '.join(IMAGE_EXTENSIONS)} in a plain file, got {_fields(sample)}",
    )


def _fields(sample: dict[str, Any]) -> str:
    fields = sample["__fields__"]
    return ", ".join(fields[:MAX_FIELDS]) + (", ..." if len(fields) > MAX_FIELDS else "")


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
