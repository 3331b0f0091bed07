"""Tokenize a data set once, so that generators train on tokens and never wait for images.

    python3 scripts/pretokenize.py --config configs/fashion/generator.yaml --output_dir fashion_mnist_tokens
    torchrun --nproc_per_node 8 scripts/pretokenize.py --output_dir imagenet_tokens \\
        --config configs/training/generator/maskgit_one-d-piece_s256.yaml

It reads the shards (or the folder) that the configuration names, as its preprocessing says, and writes
OUTPUT_DIR/train and OUTPUT_DIR/eval. Train on them with dataset.type=tokens dataset.params.token_set=OUTPUT_DIR.
A run that was killed goes on where it was; the result does not depend on the number of processes.

Variants of a training image: the centre crop, with --crops K also K crops at random places (always the same ones),
and after each of them its mirror where dataset.preprocessing.random_flip is true. Training draws one each time. An
evaluation image has its centre crop alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from data.labels import SUBFOLDERS
from modeling.identity import former_fingerprint, identity
from modeling.titok import TiTok
from modeling.tokenizers import encode_tokens, frozen_tokenizer
from utils.config import load_config
from utils.errors import UserError
from utils.inference import add_batch_size_argument, add_compile_argument, choose_batch_size
from utils.parts import check_plan
from utils.processes import Processes
from utils.speed import compile_blocks

SPLITS = ("train", "eval")
NO_CLASSES = f"so a generator cannot be trained on them: {SUBFOLDERS}"


def main() -> None:
    arguments = parse_arguments()
    # torchvision is slow to import, too slow for --help
    from data.dataset_facts import check_class_ids
    from data.image_folder import kind_of_images

    config = load_config(arguments.config, arguments.overrides)
    checkpoint = arguments.checkpoint or config.experiment.get("tokenizer_checkpoint")
    if not checkpoint:
        raise UserError(
            f"no tokenizer: {arguments.config} has no experiment.tokenizer_checkpoint, so give --checkpoint"
        )
    if set(arguments.split) == set(SPLITS):
        check_class_ids(config, kind_of_images(config))
    processes = Processes(arguments.device)
    # As training does: tokens made here and on the fly are then the same.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.training.enable_tf32
    tokenizer = frozen_tokenizer(checkpoint, config, processes.device)
    if arguments.compile:
        compile_blocks(tokenizer)
    for name in arguments.split:
        tokenize_split(config, tokenizer, checkpoint, name, arguments, processes)
    processes.close()


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", required=True, help="configuration of a generator")
    parser.add_argument("--checkpoint", help="the tokenizer (default: the config's experiment.tokenizer_checkpoint)")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the files go")
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=SPLITS, help="default: both")
    parser.add_argument("--crops", type=int, default=0, metavar="K", help="random crops beside the centre one")
    add_batch_size_argument(parser, "images encoded at a time, with all their variants", default=64)
    add_compile_argument(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values of the configuration to change")
    arguments = parser.parse_args()
    if arguments.crops < 0:
        raise UserError(f"--crops must be at least 0, got {arguments.crops}")
    return arguments


def tokenize_split(
    config: DictConfig,
    tokenizer: TiTok,
    checkpoint: str,
    name: str,
    arguments: argparse.Namespace,
    processes: Processes,
) -> None:
    """Write OUTPUT_DIR/NAME, or what is missing of it."""
    # torchvision is slow to import, too slow for --help
    from data.pretokenizing import Encoder, Split
    from data.token_sets import MANIFEST, TokenSet

    def encode(images: torch.Tensor) -> torch.Tensor:
        return encode_tokens(tokenizer, images.to(processes.device).float() / 255)

    record = {"checkpoint": checkpoint, "identity": identity(tokenizer)}
    sizes = tokenizer.image_size, tokenizer.codebook_size, tokenizer.num_latent_tokens
    encoder = Encoder(encode, *sizes, record)
    split = Split(config, name, arguments.crops, encoder)
    folder = arguments.output_dir / name
    if (folder / MANIFEST).is_file():
        check_finished(TokenSet(folder).manifest["plan"], split.plan, tokenizer, folder)
        if processes.is_main:
            print(f"{folder} is there already")
        return

    if split.has_no_classes and processes.is_main:
        print(f"{split.source.folder} has no subfolders, so its images have no classes, {NO_CLASSES}", flush=True)

    batch_size = choose_batch_size(arguments.batch_size, split.try_batch, processes.device)
    parts = split.parts(folder, batch_size, processes)
    if processes.is_main:
        written = split.write(folder, parts)
        parts.remove()
        print(f"{folder}: {written['num_images']:,} images x {len(split.variants)} variants", end="")
        print(f" x {tokenizer.num_latent_tokens} tokens, {len(written['skipped'])} left out as broken")
        if written["num_unlabelled"]:
            print(f"{folder}: {written['num_unlabelled']:,} images have no class, {NO_CLASSES}")
    processes.wait()


def check_finished(there: Mapping[str, Any], plan: Mapping[str, Any], tokenizer: TiTok, folder: Path) -> None:
    """Refuse a finished token set of another plan."""
    if "fingerprint" in there:  # made before tokenizers had an identity
        plan = {name: value for name, value in plan.items() if name != "identity"}
        plan["fingerprint"] = former_fingerprint(tokenizer)
    check_plan(dict(there), dict(plan), folder)


if __name__ == "__main__":
    run(main)
