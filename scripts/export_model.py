"""Write a trained model as a small folder to share: config.json, model.safetensors in half precision, model card.

    python3 scripts/export_model.py --checkpoint checkpoints/fashion_stage2 --output_dir my_model

`from_pretrained(OUTPUT_DIR)` and every `--checkpoint OUTPUT_DIR` read it back. The configuration names no weights that
only this machine has: what training started from is in the model, and a generator's tokenizer is told by --tokenizer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
from collections.abc import Mapping

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open

from modeling.checkpoints.locate import SAFETENSORS, is_public, locate
from modeling.checkpoints.registry import model_class
from utils.errors import UserError
from utils.evaluation.model_index import read_figures

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STARTS = ("experiment.init_weight", "model.vq_model.pretrained_tokenizer_weight")  # what training started from
TOKENIZER = "experiment.tokenizer_checkpoint"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="training output, checkpoint folder, file or hub id")
    parser.add_argument("--output_dir", required=True, help="where the files go")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float16",
        help="precision of the file (default float16; bfloat16 makes a tokenizer another one, with other tokens)",
    )
    parser.add_argument("--tokenizer", help="what others find a generator's tokenizer by: a hub id, a bundled model")
    parser.add_argument(
        "--card",
        help="Markdown file: the card's text below header and title, which are added; a licence that its own header "
        "names is kept, and there is none by itself",
    )
    parser.add_argument(
        "--metrics", type=Path, help="metrics.json of an evaluation of this checkpoint: the card's model-index"
    )
    arguments = parser.parse_args()
    if arguments.card and not Path(arguments.card).is_file():
        raise UserError(f"--card {arguments.card} is not a file")

    located = locate(arguments.checkpoint)
    if located.config is None:
        raise UserError(f"{located.description} has no configuration beside it: give the training output folder")
    if is_narrowed_in_place(located.weights, Path(arguments.output_dir).expanduser(), DTYPES[arguments.dtype]):
        raise UserError(
            f"--output_dir {arguments.output_dir} is where the weights are, and their only copy would be rounded to "
            f"{arguments.dtype}: name another folder"
        )
    config = to_share(located.config, arguments.tokenizer)
    model = model_class(config).from_pretrained(located, config=config)
    figures = read_figures(arguments.metrics, located.weights, model.pipeline_tag) if arguments.metrics else ()
    card = Path(arguments.card).read_text(encoding="utf-8") if arguments.card else None
    model.save_pretrained(arguments.output_dir, card=card, figures=figures, dtype=DTYPES[arguments.dtype])
    size = (Path(arguments.output_dir) / SAFETENSORS).stat().st_size
    print(f"{type(model).__name__} of {located.name} in {arguments.output_dir}: {size / 2**20:.1f} MiB")


def is_narrowed_in_place(weights: Path, folder: Path, dtype: torch.dtype) -> bool:
    """Whether the file of weights would be replaced by one that says less."""
    target = folder / SAFETENSORS
    if dtype == torch.float32 or not target.exists() or not target.samefile(weights):
        return False
    with safe_open(weights, framework="pt") as file:
        return any(file.get_slice(name).get_dtype() == "F32" for name in file.keys())  # noqa: SIM118


def to_share(config: Mapping, tokenizer: str | None) -> DictConfig:
    """The configuration without weights that only this machine has.

    Args:
        tokenizer: A generator's, under the name that others find it by.

    Raises:
        UserError: A generator's tokenizer is only here, or a model that is no generator's was given one.
    """
    config = OmegaConf.create(config)
    for key in STARTS:
        name = OmegaConf.select(config, key)
        if name and not is_public(name):
            OmegaConf.update(config, key, "")
    if OmegaConf.select(config, "model.generator") is not None:
        tokenizer = tokenizer or OmegaConf.select(config, TOKENIZER)
        if not is_public(tokenizer or ""):
            raise UserError(
                f"the generator's tokenizer, {tokenizer or 'which its configuration does not name'}, cannot be loaded "
                "elsewhere: give it as --tokenizer, by the name of a bundled model or its hub repository"
            )
        OmegaConf.update(config, TOKENIZER, tokenizer)
    elif tokenizer:
        raise UserError("--tokenizer is for a generator, and this is a tokenizer or a teacher: leave it out")
    return config


if __name__ == "__main__":
    run(main)
