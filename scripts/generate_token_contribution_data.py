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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse

from modeling.checkpoints.state import fingerprint
from modeling.contribution import Measurement
from modeling.contribution_data import ContributionData
from modeling.tokenizers import load_tokenizer
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.arguments import add_device_argument, add_tokenizer_arguments
from utils.evaluation.contribution_figures import summary
from utils.evaluation.session import Session
from utils.files import sha256_of
from utils.inference import add_batch_size_argument, add_speed_arguments, prepared
from utils.parts import SOURCE

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
    add_batch_size_argument(parser, "token sequences decoded at a time", default=64)
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
    session.say(f"measuring {located.name}")
    arithmetic = prepared(arguments, tokenizer)
    images = NumberedImages(config, tokenizer.image_size, session.processes)
    chosen = choose(len(images), images.most(arguments.num_images), arguments.seed)
    plan = {
        "mode": arguments.mode,
        "replacements": arguments.replacements,
        "seed": arguments.seed,
        "num_images": len(chosen),
        "save_every": arguments.save_every,
        "tokenizer": fingerprint(tokenizer.state_dict()),
        "images": images.names,
        SOURCE: images.source,
        "preparation": images.preparation,
        "precision": arguments.precision,
        "compiled": arguments.compile,
    }
    data = ContributionData(images, chosen, plan, session)
    if not arguments.dry_run and data.is_there():
        session.say(f"{data.path} is there already")
        return
    settings = {"mode": arguments.mode, "num_draws": arguments.replacements, "seed": arguments.seed}
    measurement = Measurement(tokenizer, arithmetic, **settings, batch_size=arguments.batch_size)
    if arguments.dry_run:
        session.say(data.how_long(measurement, NUM_TRIED))
        return
    facts = {"config": arguments.config, "overrides": arguments.overrides, "checkpoint": located.description}
    result = data.write(measurement, facts | {"checkpoint_sha256": sha256_of(located.weights)})
    if result is not None:
        print(f"{summary(result)}; wrote {data.path}")


if __name__ == "__main__":
    run(main)
