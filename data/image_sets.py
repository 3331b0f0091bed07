"""Sets of images that are compared as they are: arrays (.npy, .npz) and folders, read a batch at a time."""

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from data import DataError
from data.image_sources import list_images
from data.transforms import decode_image
from utils.arrays import ARRAY_ERRORS

NPZ_MEMBER = "arr_0"  # the name that the ADM evaluator reads


def shares(count: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[slice]:
    """Which of `count` images make the batches of a rank: each r-th batch is rank r's, so all come once."""
    for first in range(rank * batch_size, count, world_size * batch_size):
        yield slice(first, min(first + batch_size, count))


class ImageSet:
    """Images of one size in a fixed order.

    Attributes:
        source: Where they are, for messages.
        height, width: Pixels.
    """

    source: Path
    height: int
    width: int

    def __len__(self) -> int:
        raise NotImplementedError

    def key(self, index: int) -> str:
        """The name of an image: its file's, without extension, or its number."""
        return f"{index:08d}"

    def read(self, first: int, end: int) -> np.ndarray:
        """(end - first, H, W, 3) uint8."""
        raise NotImplementedError

    def batches(self, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[list[str], Tensor]]:
        """Keys and images (B, 3, H, W) uint8 of each of this rank's `shares`."""
        for share in shares(len(self), batch_size=batch_size, rank=rank, world_size=world_size):
            images = torch.from_numpy(self.read(share.start, share.stop)).permute(0, 3, 1, 2)
            yield [self.key(index) for index in range(share.start, share.stop)], images

    def check_pairs(self, other: "ImageSet") -> None:
        """Each image here has its counterpart at the same place of `other`.

        Raises:
            DataError: The numbers or sizes differ, or, where both are folders, the names.
        """
        if len(self) != len(other):
            raise DataError(
                f"expected as many images in both, got {len(self)} in {self.source} and {len(other)} in {other.source}"
            )
        if (self.height, self.width) != (other.height, other.width):
            raise DataError(
                f"expected images of one size, got {self.height} x {self.width} in {self.source} and "
                f"{other.height} x {other.width} in {other.source}"
            )
        if isinstance(self, FolderImages) and isinstance(other, FolderImages):
            for index in range(len(self)):
                if self.key(index) != other.key(index):
                    raise DataError(
                        f"expected the same names in both folders, got {self.files[index]} in {self.source} where "
                        f"{other.source} has {other.files[index]}"
                    )


class ArrayImages(ImageSet):
    """An array (n, H, W, 3) uint8 in a .npy file, or the first of an .npz archive; read by position, never whole."""

    def __init__(self, path: Path):
        self.source = path
        try:
            self._file = _open_array(path)
            major, minor = npy.read_magic(self._file)
            shape, fortran, dtype = (npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0)(self._file)
        except DataError:
            raise
        except ARRAY_ERRORS as error:
            raise DataError(f"{path} must hold an array of images, and cannot be read ({error})") from error
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
            raise DataError(f"{path} must hold images (n, H, W, 3) of uint8, got {shape} of {dtype}")
        self._start = self._file.tell()
        self.count, self.height, self.width = shape[:3]

    def __len__(self) -> int:
        return self.count

    def read(self, first: int, end: int) -> np.ndarray:
        size = self.height * self.width * 3
        self._file.seek(self._start + first * size)
        data = self._file.read((end - first) * size)
        if len(data) != (end - first) * size:
            raise DataError(f"{self.source} ends before image {end} of {self.count}: write or fetch it again")
        return np.frombuffer(bytearray(data), dtype=np.uint8).reshape(end - first, self.height, self.width, 3)


class FolderImages(ImageSet):
    """The images of a folder, sorted by name."""

    def __init__(self, folder: Path):
        self.source, self.files = folder, list_images(folder)
        if not self.files:
            raise DataError(f"{folder} holds no images")
        self.height, self.width = self._load(0).shape[:2]

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return os.path.splitext(self.files[index])[0]

    def read(self, first: int, end: int) -> np.ndarray:
        return np.stack([self._load(index) for index in range(first, end)])

    def _load(self, index: int) -> np.ndarray:
        path = self.source / self.files[index]
        try:
            pixels = np.array(decode_image(path.read_bytes()))
        except (DataError, OSError) as error:
            raise DataError(f"{path}: {error}") from error
        if index and pixels.shape[:2] != (self.height, self.width):
            raise DataError(
                f"expected images of one size, got {pixels.shape[0]} x {pixels.shape[1]} in {path} and "
                f"{self.height} x {self.width} in {self.source / self.files[0]}: scripts/reconstruct_tokenizer.py "
                "--original crops them alike"
            )
        return pixels


def open_images(path: str | os.PathLike) -> ImageSet:
    """The images of a .npy or .npz file or of a folder.

    Raises:
        DataError: There is none, or it holds no images of one size.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return FolderImages(path)
    if path.is_file() and path.suffix in (".npy", ".npz"):
        return ArrayImages(path)
    raise DataError(f"expected a .npy or .npz file or a folder of images, got {path} (working directory {Path.cwd()})")


def _open_array(path: Path) -> BinaryIO:
    if path.suffix == ".npy":
        return open(path, "rb")
    archive = zipfile.ZipFile(path)
    members = archive.namelist()
    member = f"{NPZ_MEMBER}.npy"
    if member not in members:
        raise DataError(
            f"{path} must hold the images as {NPZ_MEMBER}, got {', '.join(map(repr, members)) or 'nothing'}"
        )
    return archive.open(member)  # its seek reads on from where it is: cheap in order


class Statistics(NamedTuple):
    """Mean (D,) and covariance (D, D), float64, of Inception features, and whether images stand beside them."""

    mean: np.ndarray
    covariance: np.ndarray
    has_images: bool


def read_statistics(path: str | os.PathLike) -> Statistics | None:
    """The `mu` and `sigma` of a reference archive of the ADM evaluator; None where a file has none."""
    path = Path(path).expanduser()
    if not (path.is_file() and path.suffix == ".npz"):
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not {"mu", "sigma"} <= set(archive.files):
                return None
            mean, covariance = archive["mu"].astype(np.float64), archive["sigma"].astype(np.float64)
            has_images = NPZ_MEMBER in archive.files
    except ARRAY_ERRORS as error:
        raise DataError(f"{path} must be a reference archive of arrays, and cannot be read ({error})") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(f"{path} must hold mu (D,) and sigma (D, D), got {mean.shape} and {covariance.shape}")
    return Statistics(mean, covariance, has_images)
