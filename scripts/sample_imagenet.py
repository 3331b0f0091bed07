"""Sample many images of every class, for evaluation: by default 50,000, as gFID on ImageNet takes them.

    torchrun --nproc_per_node 8 scripts/sample_imagenet.py --output_dir samples \\
        --config configs/training/generator/maskgit_one-d-piece_s256.yaml
    python3 scripts/sample_imagenet.py --checkpoint maskgit_fashion --num_images 10000 --output_dir samples

Works for any generator and number of classes. Writes OUTPUT_DIR/samples.npz with arr_0, (n, P, P, 3) uint8, and arr_1,
the labels, (n,): the format of the ADM evaluator (guided-diffusion). --png also writes (--no-npz: only) single files,
OUTPUT_DIR/png/NUMBER_CLASS.png. Image i is of class i % classes; --seed, its class and how many of that class came
before it decide what it is, and the number of processes does not. A run that was killed goes on where it was. Memory
does not grow with the number of images.
"""

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from modeling.checkpoints.state import fingerprint
from modeling.generators import BUNDLED_GENERATOR, load_generator, load_its_tokenizer, sample
from modeling.maskgit import MaskGIT
from modeling.samplers.settings import SAMPLER_FLAGS, SamplerSettings, sampler_settings
from modeling.titok import TiTok
from utils.errors import UserError
from utils.files import write_json
from utils.flags import given_fields
from utils.images import to_array, write_archive, write_image
from utils.inference import (
    add_batch_size_argument,
    add_model_arguments,
    add_speed_arguments,
    choose_batch_size,
    prepared,
)
from utils.parts import Parts, check_plan
from utils.processes import Processes
from utils.sampling_record import add_sampling_arguments, sampling_record, take_like

IMAGES_PER_PART = 256  # what a kill may cost each process
DONE = "samples.json"
NPZ = "samples.npz"


def main() -> None:
    arguments = parse_arguments()
    processes = Processes(arguments.device)
    generator, located = load_generator(arguments.config, arguments.checkpoint, device=processes.device)
    tokenizer, its_located = load_its_tokenizer(
        generator, located, arguments.tokenizer_checkpoint, device=processes.device
    )
    settings = sampler_settings(generator.config, **given_fields(arguments, SamplerSettings))
    drawing = {"settings": settings, "seed": arguments.seed, "arithmetic": prepared(arguments, generator, tokenizer)}
    plan = plan_of(arguments, generator, tokenizer, settings, processes)
    num_images, folder = plan["num_images"], arguments.output_dir
    if is_done(folder, plan):
        if processes.is_main:
            print(f"the {num_images:,} images are in {folder} already")
        processes.close()
        return
    if processes.is_main:
        print(f"generator      {located.name}")
        print(f"tokenizer      {its_located.name}")
        print(f"sampler        {settings}")
        print(f"images         {num_images:,} of {generator.num_classes:,} classes, {processes.world_size} processes")

    def try_batch(num: int) -> None:
        list(sample(generator, tokenizer, [(0, number) for number in range(num)], batch_size=num, **drawing))

    parts = Parts(folder, plan, -(-num_images // IMAGES_PER_PART), processes, [NPZ, DONE, "png"])
    shares = {part: range(num_images)[part * IMAGES_PER_PART :][:IMAGES_PER_PART] for part in parts.mine()}
    most = min(num_images, IMAGES_PER_PART)
    drawing["batch_size"] = choose_batch_size(arguments.batch_size, try_batch, processes.device, most)
    total = sum(map(len, shares.values()))
    with tqdm(total=total, unit="image", mininterval=1.0, disable=not processes.is_main) as progress:
        for part, indices in shares.items():
            images = sample_part(generator, tokenizer, indices, arguments, drawing, progress)
            parts.write(part, images=images)
    processes.wait()
    if processes.is_main:
        put_together(parts, plan, arguments)
        write_json(folder / DONE, {"generator": located.description, "plan": plan})
        parts.remove()
    processes.close()


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_arguments(parser, "generator", BUNDLED_GENERATOR)
    parser.add_argument("--tokenizer_checkpoint", help="its tokenizer (default: the one it was trained with)")
    parser.add_argument("--output_dir", type=Path, required=True)
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--num_images", type=int, default=50_000, help="of all classes together (default: %(default)s)")
    count.add_argument("--num_images_per_class", type=int, help="instead of --num_images")
    add_batch_size_argument(parser, "images at a time", default=64)
    parser.add_argument(
        "--npz", action=argparse.BooleanOptionalAction, default=True, help=f"write {NPZ} (default: yes)"
    )
    parser.add_argument("--png", action="store_true", help="write PNG files")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    # As the published evaluation: ten times faster on the GPUs that have it, and fp32 on others.
    add_speed_arguments(parser, default="tf32")
    add_sampling_arguments(parser, SamplerSettings, SAMPLER_FLAGS)
    arguments = parser.parse_args()
    take_like(arguments, SamplerSettings)
    for name in ("num_images", "num_images_per_class"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be 1 or more, got {value}")
    if not (arguments.npz or arguments.png):
        raise UserError("--no-npz without --png would write nothing: give one of them")
    return arguments


def plan_of(
    arguments: argparse.Namespace,
    generator: MaskGIT,
    tokenizer: TiTok,
    settings: SamplerSettings,
    processes: Processes,
) -> dict[str, Any]:
    """Everything that the images depend on, and what of them is written."""
    num_images = arguments.num_images
    if arguments.num_images_per_class is not None:
        num_images = arguments.num_images_per_class * generator.num_classes
    return {
        "num_images": num_images,
        "num_classes": generator.num_classes,
        "image_size": tokenizer.image_size,
        **sampling_record(settings, arguments.seed),
        "precision": arguments.precision,
        "compiled": arguments.compile,
        "generator": fingerprint(generator.state_dict()),
        "tokenizer": fingerprint(tokenizer.state_dict()),
        "device": processes.device.type,  # others draw other noise
        "npz": arguments.npz,
        "png": arguments.png,
    }


def is_done(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether these images are there; those of another plan are an error."""
    if not (folder / DONE).is_file():
        return False
    there = json.loads((folder / DONE).read_text(encoding="utf-8"))["plan"]
    there |= sampling_record(SamplerSettings(**there["sampler"]), there["seed"])  # older files leave defaults out
    check_plan(there, plan, folder)
    return True


def sample_part(
    generator: MaskGIT,
    tokenizer: TiTok,
    indices: Sequence[int],
    arguments: argparse.Namespace,
    drawing: dict[str, Any],
    progress: tqdm,
) -> np.ndarray:
    """(n, P, P, 3) uint8 of the images with these numbers, written as PNG too where asked for.

    Args:
        drawing: Keyword arguments of `sample`.
    """
    wanted = [(index % generator.num_classes, index // generator.num_classes) for index in indices]
    arrays = []
    for _, pixels in sample(generator, tokenizer, wanted, **drawing):
        arrays.append(to_array(pixels))
        progress.update(len(pixels))
    images = np.concatenate(arrays)
    if arguments.png:
        for index, (label, _), image in zip(indices, wanted, images, strict=True):
            write_image(Image.fromarray(image), arguments.output_dir / "png" / f"{index:06d}_{label:03d}.png")
    return images


def put_together(parts: Parts, plan: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write the parts as one archive, and say where the images are."""
    folder, num_images, size = arguments.output_dir, plan["num_images"], plan["image_size"]
    if arguments.npz:
        labels = np.arange(num_images, dtype=np.int64) % plan["num_classes"]
        shape = (num_images, size, size, 3)
        about = {name: plan[name] for name in ("seed", "passes", "sampler", "generator", "tokenizer")}
        write_archive(folder / NPZ, (part["images"] for part in parts.read()), shape, labels, about)
        print(f"images         {folder / NPZ}: arr_0 {shape} uint8, arr_1 labels")
    if arguments.png:
        print(f"images         {folder / 'png'}")


if __name__ == "__main__":
    run(main)
