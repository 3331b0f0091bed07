"""Write what a tokenizer makes of the evaluation images: images.npy, tokens.npz, labels.npy, all sorted by key.

  python3 scripts/reconstruct_tokenizer.py --config configs/fashion/eval.yaml --length=8 --output_dir DIR
  accelerate launch --num_processes 4 scripts/reconstruct_tokenizer.py --config configs/eval/one-d-piece_s256.yaml \\
      --lengths 8,32,256 --output_dir DIR --tokens --labels

images.npy is (n, P, P, 3) uint8, rounded. With --lengths each length has a folder of its own, DIR/length_8 and so on.
--original, --jp2, --jpg and --webp write the cropped originals, or what an image format leaves of them, instead of the
tokenizer's images. The files are the same for any number of processes; with --precision fp64 also for any
--batch_size and device, which in fp32 move about one value in a thousand by one grey level.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from modeling.checkpoints.locate import Located
from modeling.identity import tokens_record
from modeling.tokenizers import Reconstructor, load_tokenizer
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.arguments import (
    add_device_argument,
    add_num_images_argument,
    add_tokenizer_arguments,
    tokenizer_facts,
)
from utils.evaluation.image_formats import Storage
from utils.evaluation.reconstruction_arguments import (
    add_storage_arguments,
    add_wanted_arguments,
    check,
    storage_of,
    stored_as,
    wanted_of,
)
from utils.evaluation.reconstruction_files import RECORD, Wanted, keys_text
from utils.evaluation.report import write_results
from utils.evaluation.session import Session
from utils.inference import (
    AUTO,
    add_batch_size_argument,
    add_speed_arguments,
    check_lengths,
    prepared,
)

if TYPE_CHECKING:
    from data.reconstructing import Written


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_tokenizer_arguments(parser, required=True)
    parser.add_argument("--output_dir", required=True, help="where the files go")
    add_wanted_arguments(parser)
    parser.add_argument("--dry_run", action="store_true", help="try one batch a process, write nothing")
    add_storage_arguments(parser)
    add_batch_size_argument(parser, "images at a time", default_is="the configuration's")
    add_speed_arguments(parser, with_double=True)
    add_num_images_argument(parser)
    add_device_argument(parser)
    arguments = parser.parse_args()
    check(arguments)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    wanted, storage = wanted_of(arguments), storage_of(arguments)
    folder = Path(arguments.output_dir)
    files = {"results": wanted.names(folder), "earlier": wanted.others(folder)}
    with Session(arguments.device, folder, **files, writes=not arguments.dry_run) as session:
        config = load_config(arguments.config, arguments.overrides)
        tokenizer, located = None, None
        if arguments.tokens or (wanted.lengths and not storage):
            tokenizer, located = reconstructor(arguments, wanted, storage, config, session)
        elif arguments.batch_size == AUTO or arguments.compile or arguments.precision != "fp32":
            raise UserError(
                "--precision, --compile and --batch_size auto are for a tokenizer, unused here: leave them out"
            )
        from data import reconstructing  # torchvision is slow to import, too slow for --help

        given = {"num_images": arguments.num_images, "batch_size": arguments.batch_size}
        if arguments.dry_run:
            tried = reconstructing.try_reconstructions(config, tokenizer, storage, session, **given)
            session.say(f"a dry run: {tried:,} images done, one batch a process; nothing was written")
            return
        written = reconstructing.write_reconstructions(
            config,
            wanted,
            tokenizer,
            storage,
            session,
            source=arguments.config,
            about=tokens_record(tokenizer.model, located.source) if located else {},
            **given,
        )
        report(arguments, tokenizer, located, storage, written, session)


def reconstructor(
    arguments: argparse.Namespace, wanted: Wanted, storage: Storage | None, config: DictConfig, session: Session
) -> tuple[Reconstructor, Located]:
    """The tokenizer, which makes tokens where they are wanted, and images where no `storage` does."""
    lengths = [] if storage else wanted.lengths
    num_tokens = OmegaConf.select(config, "model.vq_model.num_latent_tokens")
    asked = [length for length in lengths if length is not None]
    check_lengths(asked, num_tokens, "--lengths" if wanted.apart else "--length")
    model, located = load_tokenizer(config, arguments.checkpoint, device=session.device)
    return Reconstructor(model, prepared(arguments, model), lengths, wanted.raw, wanted.tokens), located


def report(
    arguments: argparse.Namespace,
    tokenizer: Reconstructor | None,
    located: Located | None,
    storage: Storage | None,
    written: "Written",
    session: Session,
) -> None:
    """Write the record of what was written, and say where it is."""
    lengths = [length or tokenizer.model.num_latent_tokens for length in tokenizer.lengths] if tokenizer else []
    bytes_per_image = session.sum(storage.num_bytes) / len(written.keys) if storage and stored_as(arguments) else None
    record = session.record(
        **written.record,
        **tokenizer_facts(arguments, located and located.name, located and located.weights),
        lengths=lengths or None,
        stored_as=stored_as(arguments),
        stored_bytes_per_image=bytes_per_image,
        keys=keys_text(written.keys),
    )
    if session.processes.is_main:
        session.remove_earlier()
        write_results(session.results.place(session.output_dir / RECORD), record)
        session.results.finish()
    for path in (*written.files, session.output_dir / RECORD):
        session.say(f"wrote {path}")
    if bytes_per_image is not None:
        session.say(f"{bytes_per_image:,.1f} bytes per image as {stored_as(arguments)}, headers included")
    session.say(f"{len(written.keys):,} images")


if __name__ == "__main__":
    run(main)
