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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse

from modeling.checkpoints.state import fingerprint
from modeling.generators import BUNDLED_GENERATOR, load_generator, load_its_tokenizer
from modeling.sampled_set import NPZ, SampledSet
from modeling.samplers.settings import SAMPLER_FLAGS, SamplerSettings, sampler_settings
from utils.errors import UserError
from utils.flags import given_fields
from utils.inference import add_batch_size_argument, add_model_arguments, add_speed_arguments, prepared
from utils.processes import Processes
from utils.sampling_record import add_sampling_arguments, sampling_record, take_like


def main() -> None:
    arguments = parse_arguments()
    processes = Processes(arguments.device)
    generator, located = load_generator(arguments.config, arguments.checkpoint, device=processes.device)
    tokenizer, its_located = load_its_tokenizer(
        generator, located, arguments.tokenizer_checkpoint, device=processes.device
    )
    settings = sampler_settings(generator.config, **given_fields(arguments, SamplerSettings))
    num_images = arguments.num_images
    if arguments.num_images_per_class is not None:
        num_images = arguments.num_images_per_class * generator.num_classes
    num_passes = num_images * settings.num_sample_steps  # of all processes, for their number decides no image
    arithmetic = prepared(arguments, generator, tokenizer, num_passes=num_passes)
    drawing = {"settings": settings, "seed": arguments.seed, "arithmetic": arithmetic}
    plan = {
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
    samples = SampledSet(arguments.output_dir, plan)
    is_done = samples.is_done()
    if is_done and processes.is_main:
        print(f"the {num_images:,} images are in {arguments.output_dir} already")
    if not is_done:
        if processes.is_main:
            print(f"generator      {located.name}")
            print(f"tokenizer      {its_located.name}")
            print(f"sampler        {settings}{settings.caution(generator.num_tokens)}")
            print(f"images         {num_images:,} of {generator.num_classes:,} classes, ", end="")
            print(f"{processes.world_size} processes")
        parts = samples.make(generator, tokenizer, drawing, arguments.batch_size, processes)
        if processes.is_main:
            for written in samples.finish(parts, located.description):
                print(f"images         {written}")
    processes.close()


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_arguments(parser, "generator", BUNDLED_GENERATOR)
    parser.add_argument("--tokenizer_checkpoint", help="its tokenizer (default: the one it was trained with)")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the files go")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--num_images", type=int, default=50_000, help="of all classes together (default: %(default)s)")
    count.add_argument("--num_images_per_class", type=int, help="instead of --num_images")
    add_batch_size_argument(parser, "images at a time", default=64)
    parser.add_argument(
        "--npz", action=argparse.BooleanOptionalAction, default=True, help=f"write {NPZ} (default: yes)"
    )
    parser.add_argument("--png", action="store_true", help="write PNG files")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
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


if __name__ == "__main__":
    run(main)
