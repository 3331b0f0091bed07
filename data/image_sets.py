"""Sets of images that are compared as they are: arrays (.npy, .npz) and folders, read a batch at a time."""

import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from data import DataError
from data.file_formats import is_image_name
from data.image_sources import announced_images
from data.transforms import AS_SHOWN, decode_as_shown
from utils.arrays import ARRAY_ERRORS, why_unread
from utils.evaluation.reconstruction_files import recorded_keys

AS_GIVEN = f"images as they are given, those of folders as {AS_SHOWN}"  # for records
NPZ_MEMBER = "arr_0"  # the name that the ADM evaluator reads


def shares(count: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[slice]:
    """The batches of a rank, as places among `count` images: the ranks take turns, and each image is in one batch."""
    for first in range(rank * batch_size, count, world_size * batch_size):
        yield slice(first, min(first + batch_size, count))


class ImageSet:
    """Images of one size in a fixed order.

    Attributes:
        source: Where they are, for messages.
        height, width: Pixels.
        names: What they are called, without extension, in this order; None where nothing says.
        has_rows: The order is that in which somebody wrote rows, not that of the names.
    """

    source: Path
    height: int
    width: int
    names: list[str] | None = None
    has_rows = True

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

    def label(self, index: int) -> str:
        """An image's name in messages."""
        return self.key(index)


class Selected(ImageSet):
    """Some images of a set, in any order.

    Args:
        places: Their numbers in `images`.
        has_names: Keep the names; without, they were only numbers, which the order now says.
    """

    def __init__(self, images: ImageSet, places: Sequence[int], has_names: bool = True):
        self.images, self.places = images, places
        self.source, self.height, self.width = images.source, images.height, images.width
        self.names = [images.names[place] for place in places] if has_names and images.names is not None else None

    def __len__(self) -> int:
        return len(self.places)

    def key(self, index: int) -> str:
        return self.images.key(self.places[index])

    def label(self, index: int) -> str:
        return self.images.label(self.places[index])

    def read(self, first: int, end: int) -> np.ndarray:
        return np.concatenate([self.images.read(place, place + 1) for place in self.places[first:end]])


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
            raise DataError(f"{path} must hold an array of images, and cannot be read ({why_unread(error)})") from error
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
            raise DataError(f"{path} must hold images (n, H, W, 3) of uint8, got {shape} of {dtype}")
        self._start = self._file.tell()
        self.count, self.height, self.width = shape[:3]
        if not self.count:
            raise DataError(f"{path} holds no images")
        self.names = recorded_names(path, self.count)

    def __len__(self) -> int:
        return self.count

    def label(self, index: int) -> str:
        return self.key(index) if self.names is None else self.names[index]

    def read(self, first: int, end: int) -> np.ndarray:
        size = self.height * self.width * 3
        self._file.seek(self._start + first * size)
        data = self._file.read((end - first) * size)
        if len(data) != (end - first) * size:
            raise DataError(f"{self.source} ends before image {end} of {self.count}: write or fetch it again")
        return np.frombuffer(bytearray(data), dtype=np.uint8).reshape(end - first, self.height, self.width, 3)


class FolderImages(ImageSet):
    """The images of a folder, sorted by name, as a viewer shows them."""

    def __init__(self, folder: Path):
        self.source, self.files = folder, announced_images(folder)
        if not self.files:
            raise DataError(f"{folder} holds no images")
        self.height, self.width = self._load(0).shape[:2]
        self.names = recorded_names(folder, len(self.files))
        self.has_rows = self.names is not None
        if self.names is None:
            self.names = without_extensions(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return os.path.splitext(self.files[index])[0]

    def label(self, index: int) -> str:
        return self.files[index]

    def read(self, first: int, end: int) -> np.ndarray:
        return np.stack([self._load(index) for index in range(first, end)])

    def _load(self, index: int) -> np.ndarray:
        path = self.source / self.files[index]
        try:
            pixels = np.array(decode_as_shown(path.read_bytes()))
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
    """Mean (D,) and covariance (D, D), float64, of Inception features, and whether the archive has images, too."""

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
        raise DataError(
            f"{path} must be a reference archive of arrays, and cannot be read ({why_unread(error)})"
        ) from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(f"{path} must hold mu (D,) and sigma (D, D), got {mean.shape} and {covariance.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path} must hold numbers, and mu or sigma has NaN or infinite ones: fetch or make it again")
    return Statistics(mean, covariance, has_images)


def paired(sets: Sequence[ImageSet]) -> list[ImageSet]:
    """The sets in one order: the images at one place belong together.

    Names say which do, wherever sets have some; numbers are places, in natural order (2 before 10), where the other
    side is an array without names.

    Raises:
        DataError: The numbers, the sizes or the names of the images differ, or names stand against mere places.
    """
    for other in sets[1:]:
        _check_sizes(sets[0], other)
    rows = [set(images.names) for images in sets if images.has_rows and images.names is not None]
    if rows or any(images.names is None for images in sets):  # some sets are ordered by their rows
        sets = [images if images.has_rows or set(images.names) in rows else _by_number(images) for images in sets]
        numbered = [images for images in sets if isinstance(images, Selected)]
        for other in numbered[1:]:
            _check_names(numbered[0].images, other.images)
    named = [images for images in sets if images.names is not None]
    anchor = next((images for images in named if images.has_rows), named[0] if named else None)
    if named and len(named) < len(sets) and not anchor.has_rows:
        raise DataError(
            f"the images of {anchor.source} have names such as {anchor.label(0)}, and an array has places only, so "
            "nothing shows which belong together: number the files (000.png, 001.png, ...), or give two folders with "
            "the same names"
        )
    return [images if images.names is None else _in_order_of(images, anchor) for images in sets]


def _check_sizes(one: ImageSet, other: ImageSet) -> None:
    if len(one) != len(other):
        raise DataError(
            f"expected as many images in both, got {len(one)} in {one.source} and {len(other)} in {other.source}"
        )
    if (one.height, one.width) != (other.height, other.width):
        raise DataError(
            f"expected images of one size, got {one.height} x {one.width} in {one.source} and "
            f"{other.height} x {other.width} in {other.source}"
        )


def _check_names(one: ImageSet, other: ImageSet) -> None:
    """The same names on both sides."""
    missing = set(one.names) ^ set(other.names)
    if not missing:
        return
    mine = next((index for index, name in enumerate(one.names) if name in missing), 0)
    theirs = next((index for index, name in enumerate(other.names) if name in missing), 0)
    what = "both" if one.has_rows or other.has_rows else "both folders"
    raise DataError(
        f"expected the same names in {what}, got {one.label(mine)} in {one.source} where {other.source} has "
        f"{other.label(theirs)}"
    )


def _in_order_of(images: ImageSet, anchor: ImageSet) -> ImageSet:
    """The images in the order of another set's names, which must be the same."""
    _check_names(anchor, images)
    if images.names == anchor.names:
        return images
    places = {name: place for place, name in enumerate(images.names)}
    return Selected(images, [places[name] for name in anchor.names])


def _by_number(images: ImageSet) -> ImageSet:
    """A folder whose names are the numbers from 0 or 1 on, in their order; others as they are."""
    order = sorted(range(len(images)), key=lambda index: natural(images.names[index]))
    found = [re.fullmatch(r"(.*?)(\d+)", images.names[index]) for index in order]
    if not all(found) or len({match[1] for match in found}) > 1:
        return images
    numbers = [int(match[2]) for match in found]
    if numbers[0] > 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return images
    return Selected(images, order, has_names=False)


def natural(name: str) -> list[str | int]:
    """A key that sorts names by the numbers in them: 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def without_extensions(files: Sequence[str]) -> list[str]:
    """Names of image files without their extensions, where that leaves each its own."""
    names = [os.path.splitext(file)[0] if is_image_name(file) else file for file in files]
    return names if len(set(names)) == len(names) else list(files)


def recorded_names(path: Path, count: int) -> list[str] | None:
    """`recorded_keys`, without the extensions of files."""
    keys = recorded_keys(path, count)
    return None if keys is None else without_extensions(keys)
