"""Small shards and folders of images for the tests of the loaders."""

import io
import struct
import tarfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import ExifTags, Image

from data.shard_files import Sample, write_manifest, write_shard

SIDE = 8


def png(number: int, width: int = SIDE, height: int = SIDE) -> bytes:
    """An image whose pixels depend on `number`, and are not symmetric."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def lying_and_clear(folder: Path) -> None:
    """Files a.jpg and b.png: lying on its side, its left half to be its upper; transparent over black on the right."""
    folder.mkdir(parents=True, exist_ok=True)
    lying, exif = Image.new("RGB", (SIDE, SIDE), "white"), Image.Exif()
    lying.paste("black", (0, 0, SIDE // 2, SIDE))
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees, clockwise
    lying.save(folder / "a.jpg", quality=100, subsampling=0, exif=exif)
    clear = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (SIDE // 2, 0, SIDE, SIDE))
    clear.save(folder / "b.png")


def is_as_shown(images: list | np.ndarray) -> bool:
    """Whether pixels (2, 3, P, P) of those files are what a viewer shows: dark above, dark on the left."""
    lying, clear = (np.asarray(image, dtype=int)[0] for image in images)
    half = SIDE // 2
    return bool(
        lying[:half].max() < 50 < 200 < lying[half:].min() and clear[:, :half].max() < 50 < 200 < clear[:, half:].min()
    )


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """A tar file of members as they come, however odd."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def samples(first: int, count: int) -> list[Sample]:
    return [Sample(f"{number:05d}", png(number), number % 10) for number in range(first, first + count)]


def make_shards(folder: Path, counts: list[int], *, manifest: bool = True, classes: str = "0123456789") -> Path:
    """Shards `s-000000.tar`, ... with so many samples each; keys are numbered through, a class has one letter."""
    folder.mkdir(parents=True, exist_ok=True)
    records, first = {}, 0
    for index, count in enumerate(counts):
        name = f"s-{index:06d}.tar"
        records[name] = write_shard(folder / name, samples(first, count))
        first += count
    if manifest:
        write_manifest(folder, {"classes": list(classes), "splits": {"s": {"shards": records}}})
    return folder


def shard_spec(folder: Path, num_shards: int) -> str:
    return f"{folder}/s-{{000000..{num_shards - 1:06d}}}.tar"


def make_config(**params) -> DictConfig:
    """A config of what the loaders read; keys of `preprocessing`, `training` and `dataset` are told by their names."""
    config = OmegaConf.create(
        {
            "dataset": {
                "type": "shards",
                "max_bad_fraction": 0.01,
                "params": {"num_workers_per_gpu": 0, "shuffle_buffer_size": 10},
                "preprocessing": {
                    "resize_shorter_edge": SIDE,
                    "crop_size": SIDE - 2,
                    "random_crop": True,
                    "random_flip": True,
                },
            },
            "training": {"per_gpu_batch_size": 4, "seed": 3},
        }
    )
    for key, value in params.items():
        place = next(
            (node for node in (config.dataset, config.dataset.preprocessing, config.training) if key in node),
            config.dataset.params,
        )
        place[key] = value
    return config


def take(loader, count: int) -> list[dict]:
    return list(islice(iter(loader), count))


def keys(batches: list[dict]) -> list[str]:
    return [key for batch in batches for key in batch["__key__"]]


def same(one: list[dict], other: list[dict]) -> bool:
    return len(one) == len(other) and all(
        a["__key__"] == b["__key__"] and a["image"].equal(b["image"]) and a["class_id"].equal(b["class_id"])
        for a, b in zip(one, other, strict=True)
    )
