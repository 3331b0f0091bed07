"""Write Fashion-MNIST, the default data set, into shards: 32 x 32 pixels, three equal channels, PNG.

    python3 data/make_fashion_mnist.py

The 28 x 28 images get two black pixels on every side. They come from --idx_dir, from the Debian package
dataset-fashion-mnist where it is installed, or by torchvision's download. Zalando Research, MIT licence.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import gzip
import hashlib
import io
import os
import tempfile

import numpy as np
from PIL import Image

from data import DataError
from data.make_shards import make_shards, report

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IDX_NAMES = {"train": "train", "test": "t10k"}
MARGIN = 2  # 28 + 2 + 2 = 32 pixels


class FashionMNIST:
    """One split of Fashion-MNIST as a source of shards.

    Args:
        pixels: (n, 28, 28) uint8.
        class_ids: (n,), 0..9.
        compress: Whether the PNGs are compressed. A compressed shard is smaller when its images are not.
    """

    classes = CLASSES

    def __init__(self, pixels: np.ndarray, class_ids: np.ndarray, *, compress: bool = True):
        self.pixels = pixels
        self.class_ids = class_ids
        self.compress = compress

    def __len__(self) -> int:
        return len(self.pixels)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.pixels.tobytes() + self.class_ids.tobytes())
        return f"{len(self)} images, sha256 {digest.hexdigest()[:16]}"

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> tuple[bytes, int]:
        grey = Image.fromarray(np.pad(self.pixels[index], MARGIN))
        file = io.BytesIO()
        grey.convert("RGB").save(file, "PNG", compress_level=9 if self.compress else 0)
        return file.getvalue(), int(self.class_ids[index])

    def sample(self, count: int) -> "FashionMNIST":
        """The first `count` images of every class, for a small compressed shard."""
        chosen = np.sort(np.concatenate([np.flatnonzero(self.class_ids == c)[:count] for c in range(len(CLASSES))]))
        return FashionMNIST(self.pixels[chosen], self.class_ids[chosen], compress=False)


def read_split(idx_dir: Path, split: str) -> FashionMNIST:
    """The `train` or `test` split from its two IDX files, gzipped or not."""
    pixels = read_idx(idx_dir, f"{IDX_NAMES[split]}-images-idx3-ubyte")
    class_ids = read_idx(idx_dir, f"{IDX_NAMES[split]}-labels-idx1-ubyte")
    if pixels.shape[1:] != (28, 28) or class_ids.shape != pixels.shape[:1] or class_ids.max() >= len(CLASSES):
        raise DataError(
            f"{idx_dir} must hold n images of 28 x 28 and n labels in 0..9 as {split} split, got arrays of "
            f"{pixels.shape} and {class_ids.shape}, largest label {class_ids.max()}: is it Fashion-MNIST?"
        )
    return FashionMNIST(pixels, class_ids)


def read_idx(folder: Path, name: str) -> np.ndarray:
    """The unsigned bytes of an IDX file: a magic number with the number of axes, the sizes, the values."""
    path = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if path is None:
        raise DataError(f"{folder} must hold {name}.gz or {name}, and holds neither")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        axes = data[3] if data[:3] == b"\0\0\x08" else 0
        shape = np.frombuffer(data, ">u4", count=axes, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{path} must be a complete IDX file, and is not ({error}): download it again") from error


def download(folder: Path) -> Path:
    """Fetch the IDX files with torchvision and return where they are."""
    from torchvision.datasets import FashionMNIST as Download

    try:
        Download(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"Fashion-MNIST could not be downloaded ({error}): install the Debian package dataset-fashion-mnist, or "
            "give the folder of the four IDX files as --idx_dir"
        ) from error
    return folder / "FashionMNIST" / "raw"


def write_splits(idx_dir: Path, arguments: argparse.Namespace) -> None:
    # Enough shards to share among ranks and workers; the sample is for the repository, so it is small.
    if arguments.sample:
        plan = [("test", read_split(idx_dir, "test").sample(arguments.sample), 500, "tar.gz")]
    else:
        plan = [
            ("train", read_split(idx_dir, "train"), 5000, "tar"),
            ("test", read_split(idx_dir, "test"), 1000, "tar"),
        ]
    for split, source, max_samples_per_shard, extension in plan:
        prefix = f"fashion-{split}"
        written = make_shards(
            source,
            arguments.output_dir,
            prefix=prefix,
            max_samples_per_shard=max_samples_per_shard,
            num_workers=arguments.num_workers,
            seed=0,
            extension=extension,
        )
        report(written, arguments.output_dir, prefix)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("fashion_mnist"), help="where the shards go (default: %(default)s)"
    )
    parser.add_argument("--idx_dir", type=Path, help="folder of the four IDX files, gzipped or not")
    parser.add_argument("--sample", type=int, metavar="N", help="only the first N test images of each class")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes, one shard each at a time")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    idx_dir = arguments.idx_dir or (DEBIAN_FOLDER if DEBIAN_FOLDER.is_dir() else None)
    if idx_dir is not None:
        write_splits(idx_dir, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_splits(download(Path(folder)), arguments)


if __name__ == "__main__":
    run(main)
