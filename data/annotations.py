"""What is really in the images of an array or folder: labels, masks or boxes, one an image, in their order."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.image_sets import ImageSet, recorded_names, without_extensions
from utils.arrays import why_unread


def read_labels(path: str | os.PathLike, images: ImageSet) -> np.ndarray:
    """Class ids (n,) of a .npy file, such as scripts/reconstruct_tokenizer.py --labels writes."""
    labels = _read_array(path, (len(images),), "class ids")
    names = recorded_names(Path(path), len(labels))
    return labels[_order_of(names, images, path)] if names is not None and images.names is not None else labels


def read_masks(path: str | os.PathLike, images: ImageSet) -> np.ndarray:
    """The class of each pixel, (n, H, W), of a .npy file, read as it is needed; 255 where a pixel does not count."""
    return _read_array(path, (len(images), images.height, images.width), "masks")


def read_boxes(path: str | os.PathLike, images: ImageSet) -> list[dict[str, Tensor]]:
    """Objects in COCO's JSON format, in pixels of the images: of those with an image's name, or in order without names.

    Returns:
        For each image `boxes` (k, 4) as x1, y1, x2, y2, `labels` (k,) and `iscrowd` (k,).
    """
    try:
        annotations = json.loads(Path(path).read_text(encoding="utf-8"))
        objects = {image["id"]: [] for image in annotations["images"]}
        names = [image.get("file_name") for image in annotations["images"]]
        for item in annotations["annotations"]:
            x, y, width, height = item["bbox"]
            box = [x, y, x + width, y + height]
            objects[item["image_id"]].append((box, item["category_id"], item.get("iscrowd", 0)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"expected COCO annotations in {path}, which cannot be read so ({error!r})") from error
    if len(objects) != len(images):
        raise DataError(f"expected {len(images)} images in {path}, as in {images.source}, got {len(objects)}")
    found = list(objects.values())
    if images.names is not None and all(names):
        found = [found[place] for place in _order_of(without_extensions(names), images, path)]
    return [
        {
            "boxes": torch.tensor([box for box, _, _ in objects], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([label for _, label, _ in objects], dtype=torch.long),
            "iscrowd": torch.tensor([crowd for _, _, crowd in objects], dtype=torch.long),
        }
        for objects in found
    ]


def _order_of(names: Sequence[str], images: ImageSet, path: str | os.PathLike) -> list[int]:
    """Where in `names`, those of a truth, each image is."""
    places = {name: place for place, name in enumerate(names)}
    missing = [name for name in images.names if name not in places]
    if missing:
        lost = f"{path} has no {missing[0]}, which is in {images.source} ({len(missing)} are missing)"
        raise DataError(f"{lost}: give the one that belongs to these images")
    return [places[name] for name in images.names]


def _read_array(path: str | os.PathLike, shape: tuple[int, ...], what: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"expected a .npy file of {what} in {path}, which cannot be read ({why_unread(error)})"
        ) from error
    if not isinstance(array, np.ndarray) or array.shape != shape or not np.issubdtype(array.dtype, np.integer):
        got = f"{array.shape} of {array.dtype}" if isinstance(array, np.ndarray) else "an archive"
        raise DataError(f"{path} must hold {what} {shape} of integers, one for each image, got {got}")
    return array
