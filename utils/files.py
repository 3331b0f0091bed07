"""Files that are whole or not there: written aside, flushed, renamed; and their checksums."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from utils.errors import UserError, remedy
from utils.paths import expanded


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write to; on success that file replaces `path`, flushed to disk, and on any error it is deleted.

    The path has the name's ending, so that libraries choose the right format. The folder is made where it is missing.
    """
    path = Path(expanded(os.fspath(path)))
    if path.exists() and not path.is_file() and not path.is_dir():  # a rename would put a file instead of /dev/null
        raise UserError(f"{path} is a device or a pipe, and files are written here: name a file")
    make_folder(path.parent)
    aside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        with naming(path, aside):
            yield aside
            flush(aside)
            os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):  # the first error counts
            aside.unlink()


@contextlib.contextmanager
def replacing_files(folder: str | os.PathLike, names: Sequence[str]) -> Iterator[Path]:
    """Give a folder to write the files `names` into; on success they go into `folder`, on any error they are deleted.

    A new folder appears whole or not at all. In one that exists each file is replaced whole, in the order of `names`,
    and other files stay.
    """
    folder = Path(expanded(os.fspath(folder)))
    make_folder(folder.parent)
    # In a folder that exists, which may be a link to another disk, or all that may be written there.
    aside = (folder if folder.is_dir() else folder.parent) / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with naming(folder, aside):
            aside.mkdir()
            yield aside
            for name in names:
                flush(aside / name)
            _put_into_place(aside, folder, names)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put_into_place(aside: Path, folder: Path, names: Sequence[str]) -> None:
    if not folder.exists():
        os.rename(aside, folder)
        return
    for name in names:
        os.replace(aside / name, folder / name)


@contextlib.contextmanager
def naming(path: Path, aside: Path) -> Iterator[None]:
    """Let an error of the disk, whichever library raises it, be an OSError that names `path` and not the one aside.

    Errors of writing name no file at all, and safetensors has an error of its own.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except OSError as error:
        if error.errno == errno.ENOENT:
            check_writable(path.parent)
        if error.errno is None:  # NumPy's and Pillow's
            raise OSError(f"{path}: {error}") from error
        named = error.filename
        if named is None or (isinstance(named, (str, os.PathLike)) and Path(named).is_relative_to(aside)):
            error.filename = str(path)
        raise


def make_folder(folder: Path) -> None:
    """Create a folder, and those above it, where they are missing.

    Raises:
        UserError: That is impossible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made ({error.strerror}): {remedy(error)}") from error


def check_writable(folder: Path) -> None:
    """Make sure, before the work, that files can be put into a folder, which may be still to be made.

    Raises:
        UserError: They cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"no file can be written into {there} ({error.strerror}): {remedy(error)}") from error


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | os.PathLike) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Of a file's name that is no UTF-8 the wrong bytes are escaped, as JSON and YAML read them.
    """
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a small .npy file, whole or not at all."""
    with replacing(path) as aside:
        np.save(aside, array, allow_pickle=False)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz file, whole or not at all."""
    with replacing(path) as aside:
        np.savez(aside, **arrays)
