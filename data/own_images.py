"""A person's own images: the files and folders that a command line names, found and read a batch at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from data import DataError
from data.file_formats import IMAGE_ENDINGS
from data.image_sources import left_out, walk_images
from utils.errors import with_reasons
from utils.result_folder import results_in


@dataclass(frozen=True)
class ImageFile:
    """An image to read, the name of what is made of it, and whether the user named this very file."""

    path: Path
    key: str
    is_named: bool


def find_images(paths: Sequence[Path], output_dir: Path) -> tuple[list[ImageFile], list[str]]:
    """The files among `paths`, and the images in the folders among them, each with a key of its own.

    Args:
        output_dir: Of its images, those that a command has listed as its results are left out.

    Returns:
        The images, and for each folder that holds other files too a line that says so.

    Raises:
        DataError: A path is nothing, or a folder without images.
    """
    found: list[tuple[Path, str, bool]] = []
    notes = []
    results = {output_dir.resolve() / name for name in results_in(output_dir)}
    for path in paths:
        if path.is_dir():
            listed = walk_images(path)
            names, others = ([name for name in kind if (path / name).resolve() not in results] for kind in listed)
            if not names:
                endings = ", ".join(IMAGE_ENDINGS)
                raise DataError(f"--image {path} is a folder without images ({endings}): name one with some, or a file")
            if others:
                notes.append(f"{len(names)} of {path}; {left_out(others)}")
            found += [(path / name, Path(name).with_suffix("").as_posix().replace("/", "_"), False) for name in names]
        elif path.is_file():
            found.append((path, path.stem, True))
        else:
            raise DataError(f"--image {path} is neither a file nor a folder (working directory {Path.cwd()})")
    files: dict[str, ImageFile] = {}
    for path, name, is_named in found:
        key, number = name, 2
        while key in files:  # images of one name must not overwrite one another's results
            key, number = f"{name}-{number}", number + 1
        files[key] = ImageFile(path, key, is_named)
    return list(files.values()), notes


class ImageBatches:
    """The images of some files as a viewer shows them, scaled and cropped as for evaluation.

    Attributes:
        broken: The files that could not be read so far, with the reasons.

    Args:
        size: Pixels a side P.
    """

    def __init__(self, files: Sequence[ImageFile], size: int, batch_size: int):
        self.files, self.size, self.batch_size = files, size, batch_size
        self.broken: list[tuple[ImageFile, str]] = []

    @property
    def preparation(self) -> str:
        """What is done to the images, for a record."""
        from data.transforms import AS_SHOWN, EvalTransform

        return EvalTransform(self.size, AS_SHOWN).description

    def __iter__(self) -> Iterator[list[tuple[ImageFile, Tensor]]]:
        """Batches of files with their pixels, (3, P, P) uint8."""
        from data.transforms import EvalTransform, decode_as_shown

        transform = EvalTransform(self.size)
        batch: list[tuple[ImageFile, Tensor]] = []
        # disable=None: no bar where nobody watches, in files and pipes.
        for file in tqdm(self.files, unit="image", leave=False, dynamic_ncols=True, disable=None):
            try:
                batch.append((file, transform(decode_as_shown(file.path.read_bytes()))))
            except (DataError, OSError) as error:
                self.broken.append((file, str(error)))
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def describe(broken: Sequence[tuple[ImageFile, str]]) -> str:
    """Which files could not be read, and why."""
    count = f"{len(broken)} broken {'image' if len(broken) == 1 else 'images'}"
    return f"{count}: {with_reasons([(str(file.path), reason) for file, reason in broken])}"
