"""The images that tokens were made of, found again (in an array, a folder, a configuration), and their classes."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import DataError
from data.image_sources import list_images
from utils.config import load_config
from utils.tokens import read_labels

logger = logging.getLogger(__name__)
BATCH_SIZE = 64  # images read at once


def images_beside(tokens_file: Path, keys: Sequence[str]) -> Path | None:
    """images.npy beside the tokens, or their folder where it holds every image; None where neither is so."""
    array = tokens_file.with_name("images.npy")
    if array.is_file():
        return array
    folder = tokens_file.parent
    return folder if folder.is_dir() and set(keys) <= files_by_key(list_images(folder)).keys() else None


def read_images(source: Path, keys: Sequence[str], indices: Sequence[int]) -> dict[int, Image.Image]:
    """The images of some tokens, by their index.

    Args:
        keys: The keys of all tokens.

    Raises:
        DataError: The source is none, or lacks one of the images.
    """
    if source.is_dir():
        return from_folder(source, keys, indices)
    if source.suffix == ".npy":
        return from_array(source, keys, indices)
    if source.suffix in (".yaml", ".yml"):
        return from_configuration(source, keys, indices)
    raise DataError(f"--images must be a .npy file, a folder or a configuration (.yaml), got {source}")


def from_array(path: Path, keys: Sequence[str], indices: Sequence[int]) -> dict[int, Image.Image]:
    from data.image_sets import open_images

    images = open_images(path)
    if len(images) != len(keys):
        raise DataError(f"{path} must hold the {len(keys)} images of the tokens, in their order, got {len(images)}")
    places = places_of(keys, path, "images")
    return {index: Image.fromarray(images.read(places[index], places[index] + 1)[0]) for index in indices}


def labels_of(path: Path, keys: Sequence[str]) -> np.ndarray:
    """Class ids (n,) of the images of tokens, from a labels.npy; -1 where there is none.

    Raises:
        UserError: There is none, or it has other images.
    """
    labels = read_labels(path, len(keys))
    return labels[places_of(keys, path, "labels")]


def places_of(keys: Sequence[str], path: Path, what: str) -> list[int]:
    """Where in a file or folder of as many rows the image of each key is: by its recorded names, or in order.

    A line in the log says where `what` is in it is paired with the tokens by nothing but their order.

    Raises:
        DataError: As `recorded_places`.
    """
    places = recorded_places(keys, path)
    if places is None:
        logger.warning("%s: no names are recorded beside it, so its %s are taken in the tokens' order", path, what)
        return list(range(len(keys)))
    return places


def recorded_places(keys: Sequence[str], path: Path) -> list[int] | None:
    """Where the image of each key is by recorded names; None where there are none.

    Raises:
        DataError: There are names, and they are of other images.
    """
    from utils.evaluation.reconstruction_files import recorded_keys  # imports torch

    names = recorded_keys(path, len(keys))
    if names is None:
        return None
    by_key = files_by_key(names) | {name: name for name in names}
    if missing := [key for key in keys if key not in by_key]:
        raise DataError(
            f"{path} has no {missing[0]}, which was tokenized ({len(missing)} are missing): give the one that belongs "
            "to these tokens"
        )
    places = {name: place for place, name in enumerate(names)}
    return [places[by_key[key]] for key in keys]


def from_folder(folder: Path, keys: Sequence[str], indices: Sequence[int]) -> dict[int, Image.Image]:
    from data.transforms import decode_as_shown

    files = list_images(folder)
    by_key = files_by_key(files)
    missing = next((key for key in keys if key not in by_key), None)
    if missing is None:
        chosen = {index: by_key[keys[index]] for index in indices}
    elif len(files) == len(keys) and all(Path(file).stem.isdecimal() for file in files):
        numbered = sorted(files, key=lambda file: int(Path(file).stem))
        places = places_of(keys, folder, "images")
        chosen = {index: numbered[places[index]] for index in indices}
    else:
        raise DataError(
            f"{folder} must hold the {len(keys)} images of the tokens, named by key or numbered, and has no "
            f"{missing}: name the folder of what was tokenized, or its configuration"
        )
    return {index: square(decode_as_shown((folder / file).read_bytes())) for index, file in chosen.items()}


def files_by_key(files: Sequence[str]) -> dict[str, str]:
    """The files of a folder by what each may be called in a tokens file.

    That is its path with and without its ending; the latter with _ for /, as scripts/inference_tokenizer.py writes it;
    and of a sampled image CLASS/SAMPLE, as older files of scripts/inference_generator.py are read.
    """
    by_key = {}
    for file in files:
        name = Path(file).with_suffix("").as_posix()
        sample = re.fullmatch(r"(\d+)(?:_.*)?_(\d{3,})", name)
        if sample:
            by_key[f"{int(sample[1])}/{int(sample[2])}"] = file
        by_key[name.replace("/", "_")] = by_key[name] = by_key[file] = file
    return by_key


def square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def from_configuration(path: Path, keys: Sequence[str], indices: Sequence[int]) -> dict[int, Image.Image]:
    """The evaluation images of a configuration, read until all that are wanted were seen."""
    from data.loaders import evaluation_loader

    wanted = {keys[index]: index for index in indices}
    images: dict[int, Image.Image] = {}
    loader = evaluation_loader(load_config(path), rank=0, world_size=1, batch_size=BATCH_SIZE, num_workers=0)
    with tqdm(total=loader.expected, desc="finding images", unit="image", leave=False, dynamic_ncols=True) as progress:
        for batch in loader:
            found = [pair for pair in zip(batch["__key__"], batch["image"], strict=True) if pair[0] in wanted]
            images |= {wanted[key]: Image.fromarray(image.permute(1, 2, 0).numpy()) for key, image in found}
            progress.update(len(batch["__key__"]))
            if len(images) == len(wanted):
                return images
    missing = next(key for key, index in wanted.items() if index not in images)
    raise DataError(
        f"the evaluation images of {path} lack {missing}, which was tokenized: give the configuration of the tokens"
    )
