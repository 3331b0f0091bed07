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

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from data.batches import FaultLog
from modeling.titok import TiTok
from modeling.tokenizers import encode_tokens, frozen_tokenizer, tokenizer_fingerprint
from utils.cli import run
from utils.config import load_config
from utils.errors import UserError
from utils.inference import add_batch_size_argument, add_compile_argument, choose_batch_size
from utils.parts import Parts, check_plan
from utils.processes import Processes
from utils.speed import compile_blocks

if TYPE_CHECKING:
    from data.catalogue import Part

SPLITS = ("train", "eval")


def tokenize_split(
    config: DictConfig, tokenizer: TiTok, checkpoint: str, split: str, options: argparse.Namespace, processes: Processes
) -> None:
    """Write OUTPUT_DIR/SPLIT, or what is missing of it."""
    # torchvision is slow to import, too slow for --help
    from data.catalogue import CentreCrop, ImageSource, Variants, check_skipped
    from data.token_shards import MANIFEST, read_token_manifest, write_token_set

    preprocessing, seed = config.dataset.preprocessing, config.training.seed
    if split == "train":
        transform = Variants(preprocessing, options.crops, seed)
    else:
        transform = CentreCrop(preprocessing)
    source = ImageSource(config, split, transform)
    plan = {
        "split": split,
        "parts": [part.name for part in source.parts],
        "variants": transform.names,
        "resize_shorter_edge": preprocessing.resize_shorter_edge if split == "train" else preprocessing.crop_size,
        "crop_size": preprocessing.crop_size,
        "seed": seed,
        "fingerprint": tokenizer_fingerprint(tokenizer),
    }
    folder = options.output_dir / split
    if (folder / MANIFEST).is_file():
        check_plan(read_token_manifest(folder)["plan"], plan, folder)
        if processes.is_main:
            print(f"{folder} is there already")
        return

    def try_batch(num_images: int) -> None:
        shape = (num_images * len(transform.names), 3, tokenizer.image_size, tokenizer.image_size)
        encode_tokens(tokenizer, torch.zeros(shape, device=processes.device))

    batch_size = choose_batch_size(options.batch_size, try_batch, processes.device)
    parts = Parts(folder, plan, len(source.parts), processes)
    strict = split == "eval" and not config.dataset.params.get("eval_skip_broken", False)
    todo = list(parts.mine())
    with tqdm(desc=split, unit="image", mininterval=1.0, disable=not processes.is_main) as progress:
        for number, index in enumerate(todo, start=1):
            progress.set_postfix_str(f"part {number} of this process's {len(todo)}")
            arrays = tokenize_part(source.parts[index], tokenizer, config, batch_size, strict, processes, progress)
            parts.write(index, **arrays)
    processes.wait()
    if processes.is_main:
        skipped = [fault for part in parts.read() for fault in part["skipped"].tolist()]
        check_skipped(sum(len(part["labels"]) for part in parts.read()), skipped, config.dataset.max_bad_fraction)
        manifest = {
            "tokenizer": {"checkpoint": checkpoint, "fingerprint": plan["fingerprint"]},
            "codebook_size": tokenizer.codebook_size,
            "num_tokens": tokenizer.num_latent_tokens,
            "variants": transform.names,
            "classes": source.classes,
            "skipped": skipped,
            "plan": plan,
        }
        written = write_token_set(folder, parts.read, manifest)
        parts.remove()
        print(f"{folder}: {written['num_images']:,} images x {len(transform.names)} variants", end="")
        print(f" x {tokenizer.num_latent_tokens} tokens, {len(skipped)} left out as broken")
    processes.wait()


def tokenize_part(
    part: "Part",
    tokenizer: TiTok,
    config: DictConfig,
    batch_size: int,
    strict: bool,
    processes: Processes,
    progress: tqdm,
) -> dict[str, np.ndarray]:
    """Tokens (n, variants, N), labels (n,), keys (n,) and what was skipped, of one part."""
    from data.catalogue import decoded
    from data.token_shards import token_dtype

    faults = FaultLog(strict=strict)
    num_threads = config.dataset.params.num_workers_per_gpu
    dtype = token_dtype(tokenizer.codebook_size)
    tokens = [np.zeros((0, part.num_variants, tokenizer.num_latent_tokens), dtype)]
    labels, keys = [], []
    for examples in decoded(part, batch_size=batch_size, num_threads=num_threads, faults=faults):
        images = torch.stack([example.image for example in examples])  # (B, variants, 3, P, P) uint8
        codes = encode_tokens(tokenizer, images.flatten(0, 1).to(processes.device).float() / 255)
        tokens.append(codes.unflatten(0, images.shape[:2]).cpu().numpy().astype(dtype))
        labels += [example.class_id for example in examples]
        keys += [example.key for example in examples]
        progress.update(len(examples))
    return {
        "tokens": np.concatenate(tokens),
        "labels": np.array(labels, dtype=np.int64),
        "keys": np.array(keys, dtype=np.str_),
        "skipped": np.array([str(fault) for fault in faults.take()], dtype=np.str_),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration of a generator")
    parser.add_argument("--checkpoint", help="the tokenizer (default: the config's experiment.tokenizer_checkpoint)")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=SPLITS, help="default: both")
    parser.add_argument("--crops", type=int, default=0, metavar="K", help="random crops beside the centre one")
    add_batch_size_argument(parser, "images encoded at once, with all their variants", default=64)
    add_compile_argument(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    options = parser.parse_args()
    if options.crops < 0:
        raise UserError(f"--crops must be at least 0, got {options.crops}")

    config = load_config(options.config)
    checkpoint = options.checkpoint or config.experiment.get("tokenizer_checkpoint")
    if not checkpoint:
        raise UserError(f"no tokenizer: {options.config} has no experiment.tokenizer_checkpoint, so give --checkpoint")
    processes = Processes(options.device)
    # As training does: tokens made here and on the fly are then the same.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.training.enable_tf32
    tokenizer = frozen_tokenizer(checkpoint, config, processes.device)
    if options.compile:
        compile_blocks(tokenizer)
    for split in options.split:
        tokenize_split(config, tokenizer, checkpoint, split, options, processes)
    processes.close()


if __name__ == "__main__":
    run(main)
