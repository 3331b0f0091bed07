"""Where images come from: a folder, an ImageNet folder, a data set of the Hugging Face hub."""

import csv
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from data import DataError
from data.file_formats import IMAGE_ENDINGS, is_image_name
from utils.result_folder import sheets_in

logger = logging.getLogger(__name__)
SPLITS = {"train", "val", "valid", "validation", "test"}  # what the subfolders of splits are called
WORDNET_ID = re.compile(r"n\d{8}")  # what ImageNet's class folders are called


class Source(Protocol):
    """Images that can be read by number, in any order and in any process (picklable)."""

    classes: list[str]  # names by class id; empty where there are no labels

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Changes when the list of images does, so that a restart does not mix two of them."""

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> tuple[bytes, int | None]:
        """The image's bytes and its class id."""


class FolderSource:
    """A folder of images, in sorted order; subfolders, where there are any, are the classes.

    Args:
        folder: Holds either images or one subfolder for each class (with images at any depth below).
        classes: Names by class id; the sorted names of the subfolders when not given.
        class_of: Class name by file name without extension, for a flat folder whose labels are in a file.

    Raises:
        DataError: There is no image, or it is not clear what the classes are. Without `classes` a subfolder without
            images is an error too: a generator would learn nothing of its class, and sample it all the same.
    """

    def __init__(self, folder: Path, *, classes: list[str] | None = None, class_of: dict[str, str] | None = None):
        self.folder = folder
        files = announced_images(folder)
        if not files:
            endings = ", ".join(IMAGE_ENDINGS)
            raise DataError(f"{folder} holds no images ({endings}), neither directly nor in subfolders")
        flat = [file for file in files if "/" not in file]
        if flat and len(flat) < len(files):
            raise DataError(
                f"{folder} holds images ({flat[0]}, ...) beside subfolders with images: put all images into "
                "subfolders, one for each class, or all into one folder without subfolders"
            )
        if class_of is not None:
            names: list[str] = [_label_of(Path(file).stem, class_of, folder) for file in files]
        else:
            names = [] if flat else [file.split("/", 1)[0] for file in files]
        self.files = files
        if not names:
            self.classes = []
        elif classes is not None:
            self.classes = classes
        else:
            self.classes = sorted(set(names)) if flat else subfolders(folder)
            if empty := sorted(set(self.classes) - set(names)):
                raise DataError(
                    f"each subfolder of {folder} is a class, and {empty[0]} holds no image ({len(empty)} of "
                    f"{len(self.classes)} are so): put its images there, or remove it"
                )
        ids = {name: index for index, name in enumerate(self.classes)}
        if unknown := sorted(set(names) - set(ids)):
            raise DataError(f"{folder} has the class {unknown[0]}, which is not one of the {len(ids)} training classes")
        self.class_ids = [ids[name] for name in names]  # empty: no labels

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for index, file in enumerate(self.files):
            class_id = self.class_ids[index] if self.class_ids else None
            size = (self.folder / file).stat().st_size
            digest.update(f"{file}\0{size}\0{class_id}\n".encode("utf-8", "replace"))
        return f"folder of {len(self)} files, sha256 {digest.hexdigest()[:16]}"

    def name(self, index: int) -> str:
        return self.files[index]

    def read(self, index: int) -> tuple[bytes, int | None]:
        return (self.folder / self.files[index]).read_bytes(), self.class_ids[index] if self.class_ids else None


class OwnFolder(FolderSource):
    """A person's own folder: what a viewer would not show as it is stored is given as it shows it, as a PNG."""

    def read(self, index: int) -> tuple[bytes, int | None]:
        from data.transforms import bytes_as_shown  # imports torch, too slow for who only lists images

        data, class_id = super().read(index)
        return bytes_as_shown(data), class_id


def list_images(folder: Path) -> list[str]:
    """Paths of all images below `folder`, relative to it with forward slashes, sorted.

    Hidden files are left out, and the sheets and figures that our commands have put beside the images.
    """
    return walk_images(folder)[0]


def announced_images(folder: Path) -> list[str]:
    """As `list_images`, and a line in the log where other files are left out."""
    images, others = walk_images(folder)
    if images and others:
        logger.warning("%s: %d images; %s", folder, len(images), left_out(others))
    return images


def left_out(files: list[str]) -> str:
    """What is said of files that are not read."""
    return f"left out {len(files):,}, such as {files[0]}"


def walk_images(folder: Path) -> tuple[list[str], list[str]]:
    """The images below a folder as `list_images` gives them, and the other files that are not hidden, likewise."""
    if not folder.is_dir():
        raise DataError(f"{folder} must be a folder of images, and it is not there (from {Path.cwd()})")
    images, others = [], []
    for parent, files in walk(folder):
        relative, sheets = parent.relative_to(folder), sheets_in(parent)
        for name in files:
            if name not in sheets:
                (images if is_image_name(name) else others).append((relative / name).as_posix())
    return sorted(images), sorted(others)


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all below it, through links too, each with the names of its files; what is hidden is left out.

    Raises:
        DataError: A folder cannot be read, or is a link to one that contains it.
    """
    for parent, folders, files in os.walk(folder, onerror=_refuse_unread, followlinks=True):
        if os.path.islink(parent) and any(os.path.samefile(parent, above) for above in Path(parent).parents):
            raise DataError(f"{parent} is a link to a folder that contains it: remove the link")
        folders[:] = [name for name in folders if not _is_hidden(name)]
        yield Path(parent), [name for name in files if not name.startswith(".")]


def _refuse_unread(error: OSError) -> None:
    """A folder that cannot be listed would be left out of the walk in silence."""
    raise DataError(
        f"the folder {error.filename} cannot be read ({error.strerror}): make it readable, or move it away"
    ) from error


def _label_of(stem: str, class_of: dict[str, str], folder: Path) -> str:
    if stem not in class_of:
        raise DataError(f"the image {stem} of {folder} has no label in the file of labels")
    return class_of[stem]


def split_source(root: Path, split: str) -> FolderSource:
    """A split of a folder: `train/` with class folders, `val/` with class folders or flat beside ImageNet's labels.

    It is a person's own (`OwnFolder`) unless its classes are WordNet ids, as ImageNet's are. Labels of a flat `val/`
    come from `LOC_val_solution.csv` (Kaggle) or the folder `ILSVRC2012_devkit_t12` (its ground truth and meta.mat), in
    `root` or in the folders above it. Class ids are the places of the sorted class names.
    """
    folder = root / split
    train = root / "train"
    classes = subfolders(train) if split != "train" and train.is_dir() else []
    if own_classes := subfolders(folder):
        kind = FolderSource if all(map(WORDNET_ID.fullmatch, own_classes)) else OwnFolder
        return kind(folder, classes=classes or None)
    class_of = validation_labels(root, [Path(file).stem for file in list_images(folder)])
    if class_of is None:
        if classes:
            raise DataError(
                f"{folder} has no class folders, and neither LOC_val_solution.csv nor ILSVRC2012_devkit_t12 is in "
                f"{root}: put one of them there, or sort the images into class folders"
            )
        return OwnFolder(folder)
    return FolderSource(folder, classes=classes or sorted(set(class_of.values())), class_of=class_of)


def subfolders(folder: Path) -> list[str]:
    """The classes of a folder of images: its subfolders' names, sorted."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def _is_hidden(folder: str) -> bool:
    """Whether a folder of this name is none of the user's; lost+found, which only root reads, is on many disks."""
    return folder.startswith(".") or folder == "lost+found"


def validation_labels(root: Path, stems: list[str]) -> dict[str, str] | None:
    """WordNet id by image name for ImageNet's validation images, None where no file of labels is found."""
    for place in (root, *root.resolve().parents[:3]):
        solution = place / "LOC_val_solution.csv"
        if solution.is_file():
            with open(solution, newline="", encoding="utf-8") as file:
                return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        devkit = place / "ILSVRC2012_devkit_t12" / "data"
        truth = devkit / "ILSVRC2012_validation_ground_truth.txt"
        if truth.is_file():
            from scipy.io import loadmat

            synsets = loadmat(devkit / "meta.mat", squeeze_me=True)["synsets"]
            wordnet_id = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
            numbers = truth.read_text(encoding="ascii").split()
            if len(numbers) != len(stems):
                raise DataError(f"{truth} has {len(numbers)} labels for {len(stems)} validation images")
            return {stem: wordnet_id[int(number)] for stem, number in zip(sorted(stems), numbers, strict=True)}
    return None


class HubSource:
    """A data set of the Hugging Face hub (or of its cache), whose stored bytes are read without decoding."""

    def __init__(self, name: str, split: str):
        self.dataset_name, self.split = name, split
        dataset = _load_from_hub(name, split, streaming=False)
        self.columns = Columns(dataset.features, name)
        self.classes = self.columns.classes
        self.dataset = self.columns.undecoded(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> str:
        return f"hub data set {self.dataset_name}, {self.split}, {len(self)} rows"

    def name(self, index: int) -> str:
        return f"row {index}"

    def read(self, index: int) -> tuple[bytes, int | None]:
        return self.columns.read(self.dataset[index])


class HubStream:
    """A data set of the hub that is read while it is downloaded, from its start and in its own order."""

    def __init__(self, name: str, split: str):
        self.dataset_name, self.split = name, split
        dataset = _load_from_hub(name, split, streaming=True)
        if dataset.features is None:
            raise DataError(f"{name} does not declare its columns: leave --streaming out")
        self.columns = Columns(dataset.features, name)
        self.classes = self.columns.classes
        self.dataset = self.columns.undecoded(dataset)

    def fingerprint(self) -> str:
        return f"hub stream {self.dataset_name}, {self.split}"

    def read_from(self, start: int) -> Iterator[tuple[bytes, int | None]]:
        for row in self.dataset.skip(start):
            yield self.columns.read(row)


class Columns:
    """Which columns of a hub data set hold the image and the class."""

    def __init__(self, features: Any, name: str):
        from datasets import ClassLabel, Image

        images = [column for column, feature in features.items() if isinstance(feature, Image)]
        labels = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
        if len(images) != 1 or len(labels) > 1:
            raise DataError(
                f"{name} must have one column of images and at most one of class labels, got {images} and {labels}"
            )
        self.image = images[0]
        self.label = labels[0] if labels else None
        self.classes = list(features[self.label].names) if self.label else []

    def undecoded(self, dataset: Any) -> Any:
        from datasets import Image

        return dataset.cast_column(self.image, Image(decode=False))

    def read(self, row: dict[str, Any]) -> tuple[bytes, int | None]:
        cell = row[self.image] or {"bytes": b""}  # a row may lack its image; no bytes are left out as broken ones are
        image = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        class_id = row[self.label] if self.label else None
        # The hub writes -1 where a label is withheld.
        return image, class_id if class_id is not None and class_id >= 0 else None


def _load_from_hub(name: str, split: str, *, streaming: bool) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        # datasets has many errors for "no network", "no such data set" and "not allowed".
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"the data set {name} (split {split}) could not be loaded from the Hugging Face hub: {reason}; check the "
            "name and the network, accept the data set's terms on its page and log in with `hf auth login`, or give a "
            "local folder as --source"
        ) from error


def open_source(source: str, split: str, *, streaming: bool = False) -> FolderSource | HubSource | HubStream:
    """The images that a command line names: a folder that exists, or else a data set of the hub.

    Of a folder with a subfolder called `split` that one alone is read.

    Raises:
        DataError: There are none, or it is not clear which are meant.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if streaming:
            raise DataError(f"--streaming is for data sets of the hub, and {source} is a folder: leave it out")
        if not (folder / split).is_dir():
            return OwnFolder(folder)
        _check_is_split(folder, split)
        return split_source(folder, split)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"--source {source} is neither a folder (from {Path.cwd()}) nor the id of a hub data set")
    return HubStream(source, split) if streaming else HubSource(source, split)


def _check_is_split(folder: Path, split: str) -> None:
    """Refuse a subfolder that may as well be a class, such as of trains: flat, beside others with images."""
    others = [name for name in subfolders(folder) if name != split]
    if subfolders(folder / split) or SPLITS.intersection(others):
        return
    if other := next((name for name in others if list_images(folder / name)), None):
        raise DataError(
            f"{folder} holds {split}/ beside {other}/, and {split} may be the split or a class: give {folder / split} "
            "for its images alone, or rename the class"
        )
