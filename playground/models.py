"""The models that the page offers, each loaded when it is first wanted, and what it opens with."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock

import torch
from omegaconf import DictConfig

from codec.bitstream import TOKENIZER_BYTES, FormatError
from codec.completion import Completer
from codec.files import Codec, load_codec
from codec.known_models import described
from modeling.generators import class_names, load_generator, load_its_tokenizer
from modeling.maskgit import MaskGIT
from modeling.samplers.settings import SamplerSettings, sampler_settings
from modeling.titok import TiTok
from utils.paths import ROOT
from utils.sampling_record import DEFAULT_SEED

TOKENIZERS = ("one-d-piece_emoji", "one-d-piece_fashion")  # bundled; the first is shown first
GENERATORS = ("maskgit_fashion", "maskgit_emoji")
PHOTOGRAPHS = ("astronaut", "chelsea", "china", "coffee")


@dataclass(frozen=True)
class Example:
    """An image to begin with, and the model and the fit that show it best."""

    path: Path
    model: str
    fit: str

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class Painter:
    """A generator with its tokenizer."""

    generator: MaskGIT
    tokenizer: TiTok
    classes: Sequence[str]

    @cached_property
    def settings(self) -> SamplerSettings:
        return sampler_settings(self.generator.config)


class Models:
    """Codecs and generators by name.

    Args:
        config, checkpoint: Of a tokenizer that takes the place of the bundled ones.
        generator: A generator's checkpoint that takes the place of the bundled ones.
    """

    def __init__(
        self,
        config: str | None = None,
        checkpoint: str | None = None,
        generator: str | None = None,
        device: str | torch.device = "cpu",
    ):
        self.device = device
        self._codecs: dict[str, Codec] = {}
        self._painters: dict[str, Painter] = {}
        self._lock = Lock()  # visitors come at the same time
        self.is_bundled = config is None and checkpoint is None
        if self.is_bundled:
            self.tokenizers = TOKENIZERS
        else:
            codec = load_codec(config, checkpoint, device)
            self.tokenizers = (codec.name,)
            self._codecs[codec.name] = codec
        self.generators = (generator,) if generator else GENERATORS
        self.completer = Completer("vivid", DEFAULT_SEED, generator=generator)

    def codec(self, name: str) -> Codec:
        with self._lock:
            if name not in self._codecs:
                self._codecs[name] = load_codec(checkpoint=name, device=self.device)
            return self._codecs[name]

    def codec_of(self, tokenizer: bytes) -> Codec:
        """The codec of the tokenizer that a file's header names.

        Raises:
            FormatError: The page has another one.
        """
        for name in self.tokenizers:
            codec = self.codec(name)
            if codec.identity.startswith(tokenizer[:TOKENIZER_BYTES]):
                return codec
        raise FormatError(
            f"the file was written with {described(tokenizer)}, and this page has {', '.join(self.tokenizers)}: start "
            "it with that one as --checkpoint"
        )

    def painter(self, name: str) -> Painter:
        with self._lock:
            if name not in self._painters:
                generator, located = load_generator(checkpoint=name, device=self.device)
                tokenizer, _ = load_its_tokenizer(generator, located, device=self.device)
                self._painters[name] = Painter(generator, tokenizer, classes_of(generator.config))
            return self._painters[name]

    def examples(self) -> list[Example]:
        """Images that come with the repository; of a model of one's own the photographs alone."""
        photographs = [ROOT / f"assets/photos/{name}.png" for name in PHOTOGRAPHS]
        if not self.is_bundled:
            return [Example(path, self.tokenizers[0], "crop") for path in photographs]
        emoji, garments = (
            [Example(path, model, "crop") for path in sorted((ROOT / folder).glob("*.png"))]
            for model, folder in zip(TOKENIZERS, ("assets/emoji", "assets/fashion"), strict=True)
        )
        return [*emoji, *(Example(path, TOKENIZERS[0], "tile") for path in photographs), *garments]


def classes_of(config: DictConfig) -> list[str]:
    """What a generator's classes are called in a list: by number, and by name where they have one."""
    return [name if name == str(label) else f"{label} · {name}" for label, name in enumerate(class_names(config))]
