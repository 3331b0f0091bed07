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

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from modeling.checkpoints.locate import Located
from modeling.checkpoints.state import fingerprint
from modeling.contribution import Measurement, contributions, images_of
from modeling.titok import TiTok
from modeling.tokenizers import load_tokenizer
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.arguments import add_device_argument, add_tokenizer_arguments
from utils.evaluation.session import Session
from utils.files import sha256_of, write_arrays
from utils.inference import Arithmetic, add_batch_size_argument, add_speed_arguments, choose_batch_size, prepared
from utils.parts import Parts, check_plan

if TYPE_CHECKING:
    from data.evaluation_images import NumberedImages

RESULT = "diffs.npz"
MODES = ("replace", "prefix")
NUM_TRIED = 8  # images of a dry run


def main() -> None:
    arguments = parse_arguments()
    with Session(arguments.device, arguments.output_dir, [], writes=not arguments.dry_run) as session:
        measure(arguments, session)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_tokenizer_arguments(parser, required=True)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("output/token_contribution"), help="default: %(default)s"
    )
    parser.add_argument("--mode", choices=MODES, default="replace", help="default: %(default)s")
    parser.add_argument(
        "--num_images",
        type=int,
        help="only so many images, drawn by --seed (default: "
        "dataset.params.max_eval_examples of the configuration, or all)",
    )
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
    add_device_argument(parser)
    parser.add_argument(
        "--dry_run", action="store_true", help=f"try {NUM_TRIED} images, tell how long all would take, write nothing"
    )
    arguments = parser.parse_args()
    for name, smallest in {"num_images": 1, "replacements": 1, "save_every": 1, "seed": 0}.items():
        value = getattr(arguments, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name} must be {smallest} or more, got {value}")
    if arguments.mode == "prefix" and arguments.replacements > 1:
        raise UserError("--replacements goes with --mode replace: nothing is random in --mode prefix")
    return arguments


def measure(arguments: argparse.Namespace, session: Session) -> None:
    from data.evaluation_images import NumberedImages, choose  # torchvision is slow to import, too slow for --help

    config = load_config(arguments.config, arguments.overrides)
    tokenizer, located = load_tokenizer(config, arguments.checkpoint, device=session.device)
    if arguments.mode == "prefix" and tokenizer.strict_length_assertion:
        raise UserError(
            f"--mode prefix needs a tokenizer that decodes prefixes, and {located.description} takes all of its "
            f"{tokenizer.num_latent_tokens} tokens or none: take --mode replace"
        )
    arithmetic = prepared(arguments, tokenizer)
    images = NumberedImages(config, tokenizer.image_size, session.processes)
    chosen = choose(len(images), images.most(arguments.num_images), arguments.seed)
    plan = plan_of(arguments, tokenizer, images, len(chosen))
    path = session.output_dir / RESULT
    if path.is_file() and not arguments.dry_run:
        with np.load(path, allow_pickle=False) as file:
            check_plan(json.loads(str(file["protocol"]))["plan"], plan, session.output_dir)
        session.say(f"{path} is there already")
        return
    measurement = measurement_of(arguments, tokenizer, arithmetic)
    some = chosen[:NUM_TRIED] if arguments.dry_run else chosen
    if arguments.mode == "prefix":
        mine = some[session.processes.rank :: session.processes.world_size]
        counts = measurement.count_first_codes(images.batches(mine, measurement.num_images))
        measurement.start_from(session.processes.add_up(counts.cpu()))
    if arguments.dry_run:
        session.say(how_long(measurement, images, some, len(chosen), session.processes.world_size))
        return
    parts = measured_parts(arguments, measurement, images, chosen, plan, session)
    if session.processes.is_main:
        result = contributions(parts.total())
        record = record_of(arguments, session, images, located, plan, seen=int(result["count"]))
        write_arrays(path, **result, protocol=np.array(json.dumps(record)))
        parts.remove()
        report(result, path)
    session.processes.wait()


def plan_of(
    arguments: argparse.Namespace, tokenizer: TiTok, images: "NumberedImages", num_images: int
) -> dict[str, Any]:
    """Everything that the result depends on."""
    return {
        "mode": arguments.mode,
        "replacements": arguments.replacements,
        "seed": arguments.seed,
        "num_images": num_images,
        "save_every": arguments.save_every,
        "tokenizer": fingerprint(tokenizer.state_dict()),
        "images": images.names,
        "preparation": images.preparation,
        "precision": arguments.precision,
        "compiled": arguments.compile,
    }


def measurement_of(arguments: argparse.Namespace, tokenizer: TiTok, arithmetic: Arithmetic) -> Measurement:
    device = tokenizer.latent_tokens.device

    @torch.no_grad()
    def try_batch(num: int) -> None:
        with arithmetic():
            images_of(tokenizer, torch.zeros(num, tokenizer.num_latent_tokens, dtype=torch.long, device=device))

    settings = {"mode": arguments.mode, "num_draws": arguments.replacements, "seed": arguments.seed}
    batch_size = choose_batch_size(arguments.batch_size, try_batch, device)
    return Measurement(tokenizer, arithmetic, **settings, batch_size=batch_size)


def how_long(
    measurement: Measurement, images: "NumberedImages", some: np.ndarray, num_images: int, num_processes: int
) -> str:
    """Do some images, and tell how long all of them would take."""
    measurement.sums(images.batches(some[:1], measurement.num_images))  # the first one is slow
    start = time.monotonic()
    tried = int(measurement.sums(images.batches(some, measurement.num_images))["count"])
    seconds = (time.monotonic() - start) / tried
    return (
        f"{tried} images done, {seconds:.3g} s each; {num_images:,} on {num_processes} processes would take "
        f"{seconds * num_images / num_processes / 60:,.1f} min; nothing was written"
    )


def measured_parts(
    arguments: argparse.Namespace,
    measurement: Measurement,
    images: "NumberedImages",
    chosen: np.ndarray,
    plan: dict[str, Any],
    session: Session,
) -> Parts:
    """The sums of all portions of the images, those that an earlier run has left included."""
    portions = [chosen[first : first + arguments.save_every] for first in range(0, len(chosen), arguments.save_every)]
    parts = Parts(session.output_dir, plan, len(portions), session.processes)
    todo = list(parts.mine())
    with session.progress(sum(len(portions[part]) for part in todo) * session.processes.world_size) as done:
        for part in todo:
            parts.write(part, **measurement.sums(images.batches(portions[part], measurement.num_images), done))
    session.processes.wait()
    return parts


def record_of(
    arguments: argparse.Namespace,
    session: Session,
    images: "NumberedImages",
    located: Located,
    plan: dict[str, Any],
    seen: int,
) -> dict[str, Any]:
    originals = {"expected": images.expected, "there": len(images), "chosen": plan["num_images"], "seen": seen}
    record = session.record(
        plan=plan,
        originals=originals | {"damaged_shards": images.num_skipped},
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
