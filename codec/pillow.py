"""Pillow reads and writes .1dp files after `import codec.pillow`.

    image.save("bag.1dp", tokens=16)
    Image.open("bag.1dp").show()

Opening reads the header alone; size and mode are known then, and torch is loaded when pixels are wanted. `save` takes
the keyword arguments of `codec.files.compress`.
"""

import io
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageFile

from codec.bitstream import MAGIC, Compressed, FormatError, unpack
from codec.canvas import size_of
from codec.conversions import EXTENSION
from codec.known_models import described, known_by

if TYPE_CHECKING:
    from codec.files import Codec

FORMAT, MIME = "1DP", "image/x-one-d-piece"
_codecs: dict[bytes, "Codec"] = {}


def use(codec: "Codec") -> None:
    """Open the files of this codec too, whose tokenizer is not bundled."""
    _codecs[codec.identity] = codec


class CompressedImage(ImageFile.ImageFile):
    """A .1dp file. `info` has the number of its "tokens" and the name of its "model"."""

    format = FORMAT
    format_description = "One-D-Piece tokens"
    _data: bytes | None = None  # None once it is loaded, as copies are

    def _open(self) -> None:
        self._data = self.fp.read()
        file = unpack(self._data)
        self._codec = _codec_of(file)
        known = known_by(file.header.tokenizer)
        if self._codec is None and known is None:
            raise FormatError(
                f"the file was written with {described(file.header.tokenizer)}: load it with codec.files.load_codec "
                "and give it to codec.pillow.use"
            )
        self._mode = "RGB"
        self._size = size_of(file.header.geometry, self._codec.side if self._codec else known.image_size)
        self.info["tokens"] = sum(file.header.lengths)
        self.info["model"] = self._codec.name if self._codec else known.name
        self.tile = []

    def load(self) -> Any:
        if self._data is not None:
            from codec.files import decompress

            self.im = decompress(self._data, self._codec).im
            self._data = None
            if self._exclusive_fp and self.fp is not None:
                self.fp.close()
                self.fp = None
        return Image.Image.load(self)


def _codec_of(file: Compressed) -> "Codec | None":
    wanted = file.header.tokenizer
    return next((codec for identity, codec in _codecs.items() if identity.startswith(wanted)), None)


def _accept(prefix: bytes) -> bool:
    return len(prefix) > 1 and prefix[0] == MAGIC and prefix[1] >> 4 == 5


def _save(image: Image.Image, file: io.BufferedIOBase, name: str | bytes) -> None:
    from codec.files import compress

    file.write(compress(image, **image.encoderinfo))


Image.register_open(FORMAT, CompressedImage, _accept)
Image.register_save(FORMAT, _save)
Image.register_extension(FORMAT, EXTENSION)
Image.register_mime(FORMAT, MIME)
