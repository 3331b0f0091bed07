"""The formats of image files that are read: one list for decoding, folders and shards."""

from typing import NamedTuple


class FileFormat(NamedTuple):
    """An image format.

    Attributes:
        name: As Pillow calls it.
        extensions: Endings of its files, in lower case; the first is what shards call it.
        signatures: First bytes, `?` standing for any byte.
    """

    name: str
    extensions: tuple[str, ...]
    signatures: tuple[bytes, ...]


FILE_FORMATS = (
    FileFormat("JPEG", ("jpg", "jpeg", "jfif", "jpe"), (b"\xff\xd8\xff",)),
    FileFormat("PNG", ("png",), (b"\x89PNG\r\n\x1a\n",)),
    FileFormat("WEBP", ("webp",), (b"RIFF????WEBP",)),
    FileFormat("GIF", ("gif",), (b"GIF87a", b"GIF89a")),
    FileFormat("BMP", ("bmp", "dib"), (b"BM",)),
    FileFormat("TIFF", ("tif", "tiff"), (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
)
FORMATS = tuple(kind.name for kind in FILE_FORMATS)
IMAGE_EXTENSIONS = tuple(extension for kind in FILE_FORMATS for extension in kind.extensions)
IMAGE_ENDINGS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


def is_image_name(name: str) -> bool:
    """Whether a file is called as an image is."""
    return name.lower().endswith(IMAGE_ENDINGS)


def image_extension(data: bytes) -> str | None:
    """What shards call the format of a file, such as `jpg`, by its first bytes; None for anything else."""
    for kind in FILE_FORMATS:
        if any(_begins(data, signature) for signature in kind.signatures):
            return kind.extensions[0]
    return None


def _begins(data: bytes, signature: bytes) -> bool:
    return len(data) >= len(signature) and all(
        wanted in (found, ord("?")) for found, wanted in zip(data, signature, strict=False)
    )
