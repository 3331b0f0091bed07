"""What scripts/benchmark.py times of the data, over a shard of the bundled images; tokenizers are arguments here."""

import io
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn

from data.shard_files import Sample, write_shard
from utils.benchmark.items import Setting, Work
from utils.errors import UserError
from utils.images import to_array
from utils.paths import ROOT

ASSETS = ROOT / "assets"
TokenizerOf = Callable[[Setting, DictConfig], nn.Module]


def load(setting: Setting) -> Iterator[Work]:
    """Training batches from shards by one process: divide a step's images/s by its own for the workers needed."""
    from data.loaders import training_loader

    with tempfile.TemporaryDirectory() as folder:
        config = setting.config("stage1", *bundled_shard(setting, Path(folder)))
        batches = iter(training_loader(config, rank=0, world_size=1, batches_per_chunk=1000))
        yield Work("loader", partial(next, batches), setting.batch_size)


def reconstruct(tokenizer_of: TokenizerOf, setting: Setting) -> Iterator[Work]:
    """From a loader's images to the rows of images.npy, as scripts/reconstruct_tokenizer.py goes; also one by one.

    The loader is an item of its own: one process of it is slower than a GPU.
    """
    from data.loaders import evaluation_loader

    with tempfile.TemporaryDirectory() as folder:
        config = setting.config("stage2", *bundled_shard(setting, Path(folder)))
        model = tokenizer_of(setting, config)
        for name, batch_size in (("reconstruct", setting.batch_size), ("reconstruct, 1 by 1", 1)):
            batches = list(evaluation_loader(config, rank=0, world_size=1, batch_size=batch_size))

            @torch.no_grad()
            def turn(batches=batches):
                with setting.autocast():
                    for batch in batches:
                        to_array(model(batch["image"].to(setting.device) / 255)[0])

            yield Work(name, turn, setting.batch_size)


def pretokenize(
    tokenizer_of: TokenizerOf, encode: Callable[[nn.Module, Tensor], Tensor], setting: Setting
) -> Iterator[Work]:
    """From shards to tokens, as scripts/pretokenize.py goes: in float32 whatever the precision."""
    from data.batches import FaultLog
    from data.catalogue import Catalogue, CentreCrop, decoded

    with tempfile.TemporaryDirectory() as folder:
        config = setting.config("stage2", *bundled_shard(setting, Path(folder)))
        model = tokenizer_of(setting, config)
        (part,) = Catalogue(config, "eval", CentreCrop(config.dataset.preprocessing)).parts

        def turn():
            for examples in decoded(part, batch_size=setting.batch_size, num_threads=1, faults=FaultLog(strict=True)):
                images = torch.cat([example.image for example in examples]).to(setting.device)
                encode(model, images.float() / 255).cpu()

        yield Work("pretokenize", turn, setting.batch_size)


def bundled_shard(setting: Setting, folder: Path) -> list[str]:
    """Write a batch of images into a shard; what makes a configuration read it, for training and evaluation.

    They are the bundled ones: photographs as JPEG of ImageNet's usual size, garments as they are.
    """
    large = setting.config("stage2").dataset.preprocessing.crop_size > 32
    source, read = (ASSETS / "photos", jpeg) if large else (ASSETS / "fashion", Path.read_bytes)
    paths = sorted(source.glob("*.png"))
    if not paths:
        raise UserError(f"{source} must hold the bundled images, *.png, and has none: copy them from the repository")
    chosen = islice(cycle(map(read, paths)), setting.batch_size)
    write_shard(folder / "0.tar", (Sample(str(index), image, 0) for index, image in enumerate(chosen)))
    return [
        "dataset.type=shards",
        *(f"dataset.params.{split}_shards_path_or_url={folder / '0.tar'}" for split in ("train", "eval")),
        "dataset.params.num_eval_examples=null",
        "dataset.params.num_workers_per_gpu=0",
        # What the loader fills before its first batch.
        f"dataset.params.shuffle_buffer_size={setting.batch_size}",
    ]


def jpeg(path: Path) -> bytes:
    """An image file as a JPEG of 500 x 375 pixels, ImageNet's usual size."""
    file = io.BytesIO()
    Image.open(path).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()
