"""Write what a tokenizer makes of the evaluation images: images.npy, tokens.npz, labels.npy, all sorted by key.

  python3 scripts/reconstruct_tokenizer.py --config configs/fashion/eval.yaml --length=8 --output_dir DIR
  accelerate launch --num_processes 4 scripts/reconstruct_tokenizer.py --config configs/eval/one-d-piece_s256.yaml \\
      --lengths 8,32,256 --output_dir DIR --tokens --labels

images.npy is (n, P, P, 3) uint8, rounded. With --lengths each length has a folder of its own, DIR/length_8 and so on.
--original, --jp2, --jpg and --webp write the cropped originals, or what an image format leaves of them, in place of the
tokenizer's images. The files are the same for any number of processes; with --precision fp64 also for any
--batch_size and device, which in fp32 move about one value in a thousand by one grey level.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from modeling.tokenizers import load_tokenizer
from utils.cli import run
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.arguments import parse_lengths
from utils.evaluation.image_formats import available, decode
from utils.evaluation.protocol import exact_arithmetic, protocol
from utils.evaluation.report import write_results
from utils.evaluation.sorted_rows import SortedRows, sorted_places
from utils.evaluation.statistics import add_up, gather
from utils.files import replacing, sha256_of, write_array, write_arrays
from utils.images import to_array
from utils.inference import (
    AUTO,
    DOUBLE,
    add_batch_size_argument,
    add_speed_arguments,
    choose_batch_size,
    prepared,
)
from utils.processes import Processes

ALL_TOKENS = None
FORMATS = ("jp2", "jpg", "webp")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration of the tokenizer and of the evaluation images")
    parser.add_argument("--checkpoint", help="hub id, folder, training output, file, or step (default: the config's)")
    parser.add_argument("--output_dir", required=True)
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--length", type=int, help="tokens to decode from (default: all)")
    lengths.add_argument("--lengths", help="several, such as 8,32,256: encoded once, decoded at each")
    parser.add_argument("--tokens", action="store_true", help="also tokens.npz: tokens (n, N) and keys")
    parser.add_argument("--labels", action="store_true", help="also labels.npy: class ids, -1 where there is none")
    parser.add_argument("--png", action="store_true", help="also png/000000.png, ..., in the order of images.npy")
    parser.add_argument(
        "--save_raw", action="store_true", help="also raw.npy: the decoder's output, float32, unclamped"
    )
    parser.add_argument("--without_image", action="store_true", help="no images.npy: tokens and labels only")
    parser.add_argument("--dry_run", action="store_true", help="one batch a process only, to try the command out")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--original", action="store_true", help="the cropped originals in place of reconstructions")
    instead.add_argument("--jp2", action="store_true", help="originals through JPEG 2000")
    instead.add_argument("--jpg", action="store_true", help="originals through JPEG")
    instead.add_argument("--webp", action="store_true", help="originals through WebP")
    parser.add_argument(
        "--jp2_compression_rate", type=float, default=100, help="raw size over file size (default: %(default)s)"
    )
    parser.add_argument("--jpg_compression_rate", type=int, default=75, help="quality 0-100 (default: %(default)s)")
    parser.add_argument("--webp_compression_rate", type=int, default=75, help="quality 0-100 (default: %(default)s)")
    add_batch_size_argument(parser, "images at once", default_is="the configuration's")
    add_speed_arguments(parser, with_double=True)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values of the configuration to change")
    arguments = parser.parse_args()
    is_decoded = not (stored_as(arguments) or arguments.original)
    if not is_decoded and (arguments.lengths or arguments.length is not None or arguments.save_raw):
        raise UserError("--length, --lengths and --save_raw are for the tokenizer's own images: leave them out here")
    if arguments.without_image:
        if arguments.png or arguments.save_raw or not is_decoded or arguments.lengths or arguments.length is not None:
            raise UserError("--without_image writes no images: leave out what asks for some")
        if not (arguments.tokens or arguments.labels):
            raise UserError("--without_image leaves nothing to write: add --tokens or --labels")
    for name, lowest in (("jp2_compression_rate", 1), ("jpg_compression_rate", 0), ("webp_compression_rate", 0)):
        value = getattr(arguments, name)
        if value < lowest or (value > 100 and name != "jp2_compression_rate"):
            raise UserError(f"--{name} must be {'1 or more' if lowest else 'in 0..100'}, got {value}")
    return arguments


def stored_as(arguments: argparse.Namespace) -> str | None:
    """The image format that was asked for."""
    return next((name for name in FORMATS if getattr(arguments, name)), None)


def main() -> None:
    arguments = parse_arguments()
    exact_arithmetic()
    processes = Processes(arguments.device)
    try:
        reconstruct(arguments, processes)
    finally:
        processes.close()


def reconstruct(arguments: argparse.Namespace, processes: Processes) -> None:
    from data.image_shards import check_count, evaluation_loader  # torchvision is slow to import, too slow for --help
    from data.transforms import EvalTransform

    config = load_config(arguments.config, arguments.overrides)
    output_dir = Path(arguments.output_dir)
    size = config.dataset.preprocessing.crop_size
    instead = in_place_of_tokenizer(arguments)
    model = located = arithmetic = None
    dtype = torch.float64 if arguments.precision == DOUBLE else torch.float32
    if arguments.tokens or not (instead or arguments.without_image):
        model, located = load_tokenizer(config, arguments.checkpoint, device=processes.device)
        model.to(dtype)
        arithmetic = prepared(arguments, model)
    elif arguments.batch_size == AUTO or arguments.compile or arguments.precision != "fp32":
        raise UserError(
            "--precision, --compile and --batch_size auto are for a tokenizer, and none is needed here: leave them out"
        )
    lengths = parse_lengths(arguments.lengths) if arguments.lengths else [arguments.length]
    folders = {length: output_dir / f"length_{length}" if arguments.lengths else output_dir for length in lengths}
    images, raws = {}, {}
    for length, folder in folders.items():
        if not arguments.without_image:
            images[length] = SortedRows(folder, "images.npy", (size, size, 3), np.uint8, processes)
        if arguments.save_raw:
            raws[length] = SortedRows(folder, "raw.npy", (size, size, 3), np.float32, processes)
    waiting = [*images.values(), *raws.values()]
    keys: list[str] = []
    labels: list[np.ndarray] = []
    tokens: list[np.ndarray] = []
    num_stored_bytes = 0

    def encode(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return model.encode(images.to(processes.device, dtype) / 255)

    def decode(z_quantized: Tensor) -> Iterator[tuple[int | None, Tensor]]:
        for length in lengths if instead is None and images else ():
            with arithmetic():
                decoded = model.decode(z_quantized.to(dtype), length=length)
            yield length, decoded

    @torch.no_grad()
    def try_batch(num: int) -> None:
        for _, decoded in decode(encode(torch.zeros(num, 3, size, size))[0]):
            to_array(decoded)

    try:
        batch_size = arguments.batch_size or config.training.per_gpu_batch_size
        batch_size = choose_batch_size(batch_size, try_batch, processes.device)
        batches = evaluation_loader(config, rank=processes.rank, world_size=processes.world_size, batch_size=batch_size)
        batch_size = min(batch_size, batches.expected or sys.maxsize)
        for batch in itertools.islice(shown(batches, processes), 1 if arguments.dry_run else None):
            keys += batch["__key__"]
            labels.append(batch["class_id"].numpy())
            if instead is not None and images:
                restored, num_bytes = instead(batch["image"])
                num_stored_bytes += num_bytes
                images[ALL_TOKENS].append(restored)
            if model is None:
                continue
            count = len(batch["__key__"])
            with torch.no_grad():
                z_quantized, encoded = encode(padded(batch["image"], batch_size))
                if arguments.tokens:
                    codes = encoded["min_encoding_indices"][:count, 0]  # (B, N)
                    tokens.append(codes.cpu().numpy().astype(np.int32))
                for length, decoded in decode(z_quantized):
                    images[length].append(to_array(decoded[:count]))
                    if raws:
                        raws[length].append(decoded[:count].float().permute(0, 2, 3, 1).cpu().numpy())
        for rows in waiting:
            rows.close()
        names, places = sorted_places(keys, processes, arguments.config)
        num_bad = int(add_up(torch.tensor(batches.num_bad), processes))
        if not arguments.dry_run:
            check_count(len(names), batches.expected, num_bad)

        written = []
        shares = gather((labels, tokens), processes)
        if processes.is_main:
            for length, folder in folders.items():
                for store, name in ((images, "images.npy"), (raws, "raw.npy")):
                    if length in store:
                        store[length].write(folder / name, places)
                        written.append(folder / name)
            if arguments.labels:
                write_array(output_dir / "labels.npy", in_order([share[0] for share in shares], places))
                written.append(output_dir / "labels.npy")
            if arguments.tokens:
                all_tokens = in_order([share[1] for share in shares], places)
                write_arrays(output_dir / "tokens.npz", tokens=all_tokens, keys=np.array(names))
                written.append(output_dir / "tokens.npz")
        if arguments.png:
            for length, folder in folders.items():
                write_pngs(images[length], folder / "png", places, processes)
                written.append(folder / "png" / f"000000.png ... {len(places) - 1:06d}.png")
        processes.wait()
    finally:
        for rows in waiting:
            rows.remove()

    stored_bytes = int(add_up(torch.tensor(num_stored_bytes), processes))
    if processes.is_main:
        record = protocol(
            processes,
            images={"expected": batches.expected, "written": len(names), "skipped": num_bad},
            dry_run=arguments.dry_run,
            preparation=EvalTransform(size).description,
            config=arguments.config,
            overrides=arguments.overrides,
            checkpoint=located and located.name,
            checkpoint_sha256=located and sha256_of(located.weights),
            lengths=[length or model.num_latent_tokens for length in lengths] if instead is None and images else None,
            tokenizer_precision=arguments.precision,
            compiled=arguments.compile,
            batch_size=batch_size,
            stored_as=stored_as(arguments),
            stored_bytes_per_image=stored_bytes / len(names) if stored_as(arguments) else None,
        )
        write_results(output_dir / "reconstruction.json", record)
        written.append(output_dir / "reconstruction.json")
        for path in written:
            print(f"wrote {path}")
        if stored_as(arguments):
            print(f"{stored_bytes / len(names):,.1f} bytes per image as {stored_as(arguments)}, headers included")
        what = " (a dry run: one batch a process)" if arguments.dry_run else ""
        print(f"{len(names):,} images{what}")


def padded(images: Tensor, batch_size: int) -> Tensor:
    """A smaller batch filled up with black: arithmetic depends in its last bits on the size of the batch."""
    return torch.cat([images, images.new_zeros(batch_size - len(images), *images.shape[1:])])


def in_place_of_tokenizer(arguments: argparse.Namespace) -> Callable[[Tensor], tuple[np.ndarray, int]] | None:
    """From originals (B, 3, P, P) uint8 to the images (B, P, P, 3) to write and the bytes they are stored in."""
    if arguments.original:
        return lambda images: (images.permute(0, 2, 3, 1).numpy(), 0)
    name = stored_as(arguments)
    if name is None:
        return None
    image_format = available({"jp2": "jpeg2000", "jpg": "jpeg", "webp": "webp"}[name])
    setting = getattr(arguments, f"{name}_compression_rate")

    def store(images: Tensor) -> tuple[np.ndarray, int]:
        files = [image_format.encode(pixels, setting) for pixels in images.permute(0, 2, 3, 1).numpy()]
        return np.stack([decode(file) for file in files]), sum(map(len, files))

    return store


def shown(batches, processes: Processes):
    with tqdm(total=batches.expected, unit="image", disable=not processes.is_main, dynamic_ncols=True) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch["__key__"]) * processes.world_size)


def in_order(shares: list[list[np.ndarray]], places: list) -> np.ndarray:
    """Rows of all processes' batches in the order of `places`."""
    first = np.cumsum([0, *(sum(map(len, share)) for share in shares)])
    rows = np.concatenate([batch for share in shares for batch in share])
    return rows[[first[place.rank] + place.index for place in places]]


def write_pngs(images: SortedRows, folder: Path, places: list, processes: Processes) -> None:
    """Numbered files; the processes share the work."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    if processes.is_main:  # what a run on more images left here
        for path in folder.glob("[0-9]*.png"):
            if path.stem.isdigit() and int(path.stem) >= len(places):
                path.unlink()
    mine = range(processes.rank, len(places), processes.world_size)
    rows = images.rows([places[index] for index in mine])
    for index, row in zip(mine, tqdm(rows, desc="png", total=len(mine), disable=not processes.is_main), strict=True):
        with replacing(folder / f"{index:06d}.png") as aside:
            Image.fromarray(row).save(aside)


if __name__ == "__main__":
    run(main)
