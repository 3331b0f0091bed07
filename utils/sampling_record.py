"""What samples say of themselves: the settings of their sampler and the seed, which --like FILE takes up again."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.arrays import ARRAY_ERRORS, why_unread
from utils.errors import UserError
from utils.flags import add_fields

ABOUT = "about"  # the array of an .npz and the text of a PNG that hold it, as JSON
DEFAULT_SEED = 42


def sampling_record(settings: Any, seed: int) -> dict[str, Any]:
    """What samples of one run share, as JSON.

    Args:
        settings: A dataclass of settings, with `num_passes`.
    """
    return {"seed": seed, "passes": settings.num_passes, "sampler": asdict(settings)}


def add_sampling_arguments(parser: argparse.ArgumentParser, settings: type, title: str) -> None:
    """--seed, --like and a flag for each field of `settings`; `take_like` reads them."""
    parser.add_argument("--seed", type=int, help=f"default: {DEFAULT_SEED}")
    parser.add_argument(
        "--like",
        type=Path,
        metavar="FILE",
        help="seed and sampler as in a tokens.npz, samples.npz, samples.json, grid.png or metrics.json, where no flag "
        "says otherwise",
    )
    add_fields(parser, settings, title)


def take_like(arguments: argparse.Namespace, settings: type) -> None:
    """Fill in what no flag gave: seed and settings of the file --like, or else the default seed."""
    if arguments.like is not None:
        record = read_record(arguments.like)
        there = {"seed": record["seed"], **asdict(settings(**record["sampler"]))}  # older files lack some
        for name, value in there.items():
            if getattr(arguments, name) is None:
                setattr(arguments, name, value)
    elif arguments.seed is None:
        arguments.seed = DEFAULT_SEED


def read_record(path: Path) -> Mapping[str, Any]:
    """The `sampling_record` in a file that one of our commands has left.

    Raises:
        UserError: There is none, or it is of many settings.
    """
    try:
        found = _read(path)
    except (*ARRAY_ERRORS, UnidentifiedImageError) as error:
        raise UserError(
            f"--like {path} cannot be read ({why_unread(error)}): name a file that a sampling command wrote"
        ) from error
    found = found if isinstance(found, dict) else {}
    protocol = found.get("protocol")
    protocol = protocol if isinstance(protocol, dict) else {}
    for part in (protocol.get("samples"), found.get("plan"), found):
        if isinstance(part, dict) and isinstance(part.get("sampler"), dict) and "seed" in part:
            if any(protocol.get(name) for name in ("sweep", "recipes")):
                raise UserError(f"--like {path} holds results of several settings: name those of one as flags")
            return part
    raise UserError(f"--like {path} does not say how it was sampled: give a file that a sampling command has written")


def _read(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file[ABOUT])) if ABOUT in file else {}
    with Image.open(path) as image:
        return json.loads(image.info.get(ABOUT, "{}"))
