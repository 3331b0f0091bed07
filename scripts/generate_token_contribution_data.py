"""Measure what each token contributes: the change at every pixel when it alone is replaced by a random other code.

    python3 scripts/generate_token_contribution_data.py --config configs/fashion/eval.yaml \\
        --output_dir output/token_contribution
    torchrun --nproc_per_node 8 scripts/generate_token_contribution_data.py \\
        --config configs/eval/one-d-piece_s256.yaml --output_dir output/token_contribution_s256

It takes the evaluation images that the configuration names and writes OUTPUT_DIR/diffs.npz, which
scripts/visualize_token_contribution.py draws: length_to_diff_l1 and length_to_diff_l2 (N, P, P), the mean over images
of the absolute and squared change summed over the colour channels; mean_l1, mean_l2, standard_error_l1 and
standard_error_l2 (N,), their means over the pixels; count; and protocol, a JSON text.

With --mode prefix it is the change from adding each token to those before it. Before the first stands the mean of what
the first tokens alone give. A run that was killed goes on where it was; the result does not depend on the number
of processes.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from data.batches import Example, FaultLog, check_count
from modeling.checkpoints.locate import Located
from modeling.checkpoints.state import fingerprint
from modeling.contribution import (
    Contributions,
    contributions,
    images_of,
    mean_of_one_token,
    other_codes,
    prefix_changes,
    replacement_changes,
)
from modeling.titok import TiTok
from modeling.tokenizers import encode_tokens, load_tokenizer
from utils.cli import run
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.protocol import protocol
from utils.evaluation.statistics import add_up, gather
from utils.files import sha256_of, write_arrays
from utils.inference import Arithmetic, add_batch_size_argument, add_speed_arguments, choose_batch_size, prepared
from utils.parts import Parts, check_plan
from utils.processes import Processes

RESULT = "diffs.npz"
MODES = ("replace", "prefix")
NUM_TRIED = 8  # images of a dry run


def main() -> None:
    arguments = parse_arguments()
    processes = Processes(arguments.device)
    try:
        measure(arguments, processes)
    finally:
        processes.close()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration of the tokenizer and of the evaluation images")
    parser.add_argument("--checkpoint", help="hub id, folder, training output, file, or step (default: the config's)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("output/token_contribution"), help="default: %(default)s"
    )
    parser.add_argument("--mode", choices=MODES, default="replace", help="default: %(default)s")
    parser.add_argument("--num_images", type=int, help="so many images, drawn by --seed (default: all)")
    parser.add_argument("--replacements", type=int, default=1, metavar="K", help="codes that replace each token")
    add_batch_size_argument(parser, "token sequences decoded at once", default=64)
    add_speed_arguments(parser)
    parser.add_argument(
        "--save_every",
        type=int,
        default=1000,
        metavar="IMAGES",
        help="a process saves its sums after so many, 16 x N x P x P bytes each time (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=42, help="draws codes and images (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--dry_run", action="store_true", help=f"try {NUM_TRIED} images, tell how long all would take, write nothing"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values of the configuration to change")
    arguments = parser.parse_args()
    for name, smallest in {"num_images": 1, "replacements": 1, "save_every": 1, "seed": 0}.items():
        value = getattr(arguments, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name} must be {smallest} or more, got {value}")
    if arguments.mode == "prefix" and arguments.replacements > 1:
        raise UserError("--replacements goes with --mode replace: nothing is random in --mode prefix")
    return arguments


def measure(arguments: argparse.Namespace, processes: Processes) -> None:
    config = load_config(arguments.config, arguments.overrides)
    tokenizer, located = load_tokenizer(config, arguments.checkpoint, device=processes.device)
    if arguments.mode == "prefix" and tokenizer.strict_length_assertion:
        raise UserError(
            f"--mode prefix needs a tokenizer that decodes prefixes, and {located.description} takes all of its "
            f"{tokenizer.num_latent_tokens} tokens or none: take --mode replace"
        )
    arithmetic = prepared(arguments, tokenizer)
    images = Images(config, tokenizer.image_size, processes)
    chosen = choose(len(images), arguments.num_images, arguments.seed)
    plan = {
        "mode": arguments.mode,
        "replacements": arguments.replacements,
        "seed": arguments.seed,
        "num_images": len(chosen),
        "save_every": arguments.save_every,
        "tokenizer": fingerprint(tokenizer.state_dict()),
        "images": images.names,
        "preparation": images.preparation,
        "precision": arguments.precision,
        "compiled": arguments.compile,
    }
    path = arguments.output_dir / RESULT
    if arguments.dry_run:
        try_some(tokenizer, images, chosen, arguments, arithmetic, processes)
        return
    if path.is_file():
        with np.load(path, allow_pickle=False) as file:
            check_plan(json.loads(str(file["protocol"]))["plan"], plan, arguments.output_dir)
        if processes.is_main:
            print(f"{path} is there already")
        return

    sums = sums_of(tokenizer, images, chosen, arguments, arithmetic, processes)
    portions = [chosen[first : first + arguments.save_every] for first in range(0, len(chosen), arguments.save_every)]
    parts = Parts(arguments.output_dir, plan, len(portions), processes)
    todo = list(parts.mine())
    with tqdm(
        total=sum(len(portions[part]) for part in todo), unit="image", disable=not processes.is_main, dynamic_ncols=True
    ) as bar:
        for part in todo:
            parts.write(part, **sums(portions[part], bar))
    processes.wait()
    if processes.is_main:
        result = contributions(total_of(parts))
        record = record_of(arguments, processes, images, located, plan, seen=int(result["count"]))
        write_arrays(path, **result, protocol=np.array(json.dumps(record)))
        parts.remove()
        report(result, path)
    processes.wait()


class Images:
    """The evaluation images of a configuration in a fixed order, any of which can be read.

    Args:
        image_size: Side P of the tokenizer's images.

    Attributes:
        names: Of the shards, or of the stretches of a folder, with the number of images in each.
        num_skipped: Shards that are damaged, where `dataset.params.eval_skip_broken` allows that.
    """

    def __init__(self, config: DictConfig, image_size: int, processes: Processes):
        from data.catalogue import CentreCrop, ImageSource  # torchvision is slow to import, too slow for --help

        params, preprocessing = config.dataset.params, config.dataset.preprocessing
        if preprocessing.crop_size != image_size:
            raise UserError(
                f"dataset.preprocessing.crop_size must be {image_size}, as the tokenizer takes it, got "
                f"{preprocessing.crop_size}"
            )
        crop = CentreCrop(preprocessing)
        self.preparation = crop.transform.description
        self.strict = not params.get("eval_skip_broken", False)
        self.num_threads = params.num_workers_per_gpu
        self.parts = ImageSource(config, "eval", crop).parts
        faults = FaultLog(self.strict)
        mine = range(processes.rank, len(self.parts), processes.world_size)
        counts = {index: sum(1 for _ in self.parts[index].jobs(faults)) for index in mine}
        shares = gather((counts, len(faults.take())), processes)
        sizes = {index: size for share, _ in shares for index, size in share.items()}
        self.num_skipped = sum(num for _, num in shares)
        self.names = [[part.name, sizes[index]] for index, part in enumerate(self.parts)]
        self.bounds = np.cumsum([0, *(size for _, size in self.names)])
        self.expected = params.get("num_eval_examples")
        check_count(len(self), self.expected, self.num_skipped)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def read(self, indices: np.ndarray, batch_size: int) -> Iterator[list[Example]]:
        """Batches of the images of sorted `indices`; broken ones are left out where that is allowed."""
        from data.catalogue import decoded

        for part, first, end in zip(self.parts, self.bounds[:-1], self.bounds[1:], strict=True):
            wanted = indices[(indices >= first) & (indices < end)] - first
            if len(wanted):
                picked = part._replace(jobs=partial(pick, part.jobs, wanted.tolist()))
                yield from decoded(
                    picked, batch_size=batch_size, num_threads=self.num_threads, faults=FaultLog(self.strict)
                )


def pick(jobs: Any, places: Sequence[int], faults: FaultLog) -> Iterator[Any]:
    """The jobs at sorted places."""
    wanted = set(places)
    for place, job in enumerate(islice(jobs(faults), places[-1] + 1)):
        if place in wanted:
            yield job


def choose(total: int, num_images: int | None, seed: int) -> np.ndarray:
    """Indices of the images to take, sorted."""
    if num_images is None:
        return np.arange(total)
    if num_images > total:
        raise UserError(f"--num_images must be at most {total}, the number of evaluation images, got {num_images}")
    return np.sort(np.random.default_rng(seed).choice(total, num_images, replace=False))


def try_some(
    tokenizer: TiTok,
    images: Images,
    chosen: np.ndarray,
    arguments: argparse.Namespace,
    arithmetic: Arithmetic,
    processes: Processes,
) -> None:
    """Do a few images, and tell how long all of them would take."""
    sums = sums_of(tokenizer, images, chosen[:NUM_TRIED], arguments, arithmetic, processes)
    sums(chosen[:1])  # the first one is slow
    start = time.monotonic()
    tried = int(sums(chosen[:NUM_TRIED])["count"])
    seconds = (time.monotonic() - start) / tried
    if processes.is_main:
        print(
            f"{tried} images done, {seconds:.3g} s each; {len(chosen):,} on {processes.world_size} processes would "
            f"take {seconds * len(chosen) / processes.world_size / 60:,.1f} min; nothing was written"
        )


def sums_of(
    tokenizer: TiTok,
    images: Images,
    chosen: np.ndarray,
    arguments: argparse.Namespace,
    arithmetic: Arithmetic,
    processes: Processes,
) -> Callable[..., dict[str, np.ndarray]]:
    """The function of image indices (and a progress bar) that adds up what the tokens of those images change.

    Args:
        chosen: Indices of all images of this run, of all processes.
        arithmetic: The context in which the tokenizer decodes.
    """
    device = tokenizer.latent_tokens.device

    @torch.no_grad()
    def try_batch(num: int) -> None:
        with arithmetic():
            images_of(tokenizer, torch.zeros(num, tokenizer.num_latent_tokens, dtype=torch.long, device=device))

    batch_size = choose_batch_size(arguments.batch_size, try_batch, device)
    num_images = max(1, batch_size // arguments.replacements)

    def encoded(indices: np.ndarray) -> Iterator[tuple[list[str], Tensor]]:
        for examples in images.read(indices, num_images):
            pixels = torch.cat([example.image for example in examples]).to(device)  # (B, 3, P, P)
            yield [example.key for example in examples], encode_tokens(tokenizer, pixels.float() / 255)

    if arguments.mode == "prefix":
        counts = torch.zeros(tokenizer.codebook_size, dtype=torch.long)
        for _, tokens in encoded(chosen[processes.rank :: processes.world_size]):
            counts += tokens[:, 0].cpu().bincount(minlength=len(counts))
        with arithmetic():
            no_tokens = mean_of_one_token(tokenizer, add_up(counts, processes), batch_size)

    def changes(keys: list[str], tokens: Tensor) -> Iterator[tuple[slice, Tensor]]:
        if arguments.mode == "prefix":
            return prefix_changes(tokenizer, tokens, no_tokens)
        draws = {"codebook_size": tokenizer.codebook_size, "num_draws": arguments.replacements}
        codes = other_codes(tokens, keys, seed=arguments.seed, **draws)
        return replacement_changes(tokenizer, tokens, codes, batch_size)

    def sums(indices: np.ndarray, bar: tqdm | None = None) -> dict[str, np.ndarray]:
        total = Contributions(tokenizer.num_latent_tokens, tokenizer.image_size, device)
        for keys, tokens in encoded(indices):
            with arithmetic():
                for places, change in changes(keys, tokens):
                    total.update(places, change)
            total.count += len(keys)
            if bar is not None:
                bar.update(len(keys))
        return total.arrays()

    return sums


def total_of(parts: Parts) -> dict[str, np.ndarray]:
    """The sums of all parts; they are read one by one, and always in the same order."""
    total: dict[str, np.ndarray] = {}
    for part in parts.read():
        for name in part:
            total[name] = total.get(name, 0) + part[name]
    return total


def record_of(
    arguments: argparse.Namespace,
    processes: Processes,
    images: Images,
    located: Located,
    plan: dict[str, Any],
    seen: int,
) -> dict[str, Any]:
    record = protocol(
        processes,
        plan=plan,
        originals={
            "expected": images.expected,
            "there": len(images),
            "chosen": plan["num_images"],
            "seen": seen,
            "damaged_shards": images.num_skipped,
        },
        config=arguments.config,
        overrides=arguments.overrides,
        checkpoint=located.description,
        checkpoint_sha256=sha256_of(located.weights),
        change="replaced by a random other code" if plan["mode"] == "replace" else "added to the tokens before it",
        unit="pixels in [0, 1]; absolute and squared change, summed over colour channels, mean over images",
    )
    # Rounding to 8 bits would make the small changes of late tokens nothing.
    return record | {"rounding": "none: images are clamped to [0, 1] before they are compared"}


def report(result: dict[str, np.ndarray], path: Path) -> None:
    num_tokens = len(result["mean_l1"])
    first = max(1, num_tokens // 8)
    shares = [result[f"mean_{norm}"][:first].sum() / result[f"mean_{norm}"].sum() for norm in ("l1", "l2")]
    print(
        f"{int(result['count']):,} images: the first {first} of {num_tokens} tokens carry {shares[0]:.1%} of the "
        f"absolute and {shares[1]:.1%} of the squared change; wrote {path}"
    )


if __name__ == "__main__":
    run(main)
