"""Train the arms of an ablation at equal steps, score each at 1, 2, 4, ... tokens, and lay them side by side.

    python3 scripts/ablate.py --arms configs/ablations/fashion_tail_drop.yaml

Each arm and seed is stage 1 of a tokenizer, whose predicted codes the teacher's decoder makes into images. The steps
are the commands of the README: train_tokenizer, evaluate_reconstruction, generate_token_contribution_data,
reconstruct_tokenizer --tokens, analyze_tokens; where the list says `entropy` also pretokenize and fit_entropy_model,
for the bits of each position and the bytes of each length; where it says `generation` train_generator and
evaluate_generation, for the distance of a generator's samples. Each writes into OUTPUT_DIR/ARM-SEED and is left out
where it is done, so a run that was killed goes on where it was, and an arm that is added later is all that is run;
where a list says something else of an arm than the one that ran it, that is an error. The last files that it writes are
OUTPUT_DIR/ablation.json, ablation.md (the tables) and ablation.png and .pdf (the curves).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse

from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.report import read_results
from utils.figures import write_figure
from utils.files import write_json, write_text
from utils.paths import ROOT
from utils.training.ablation import read_arms, read_json, refuse_another, run_all, trials_of
from utils.training.ablation_results import draw, results_of, tables


def main() -> None:
    arguments = parse_arguments()
    plan = read_arms(arguments.arms)
    trials = list(trials_of(plan, arguments.output_dir))
    for trial in trials:  # a misspelt key is an error before anything trains
        load_config(ROOT / trial.train, trial.overrides)
        refuse_another(trial, plan)
    run_all(trials, plan, arguments.parallel)
    arms = {}
    for trial in trials:
        arms.setdefault(trial.arm, []).append(results_of(trial))
    images = read_json(trials[0].folder / "scores" / "metrics.json")["protocol"]["originals"]
    baselines = [row for path in arguments.beside for row in read_results(path, images["sha256"])]
    text = "\n\n".join(tables(arms, baselines))
    print(text)
    write_json(arguments.output_dir / "ablation.json", {"plan": plan, "arms": arms, "beside": baselines})
    write_text(arguments.output_dir / "ablation.md", text + "\n")
    write_figure(draw(arms, baselines), arguments.output_dir / "ablation")
    print(f"{len(trials)} runs of {len(arms)} arms; wrote ablation.json, .md, .png, .pdf into {arguments.output_dir}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--arms", type=Path, required=True, metavar="FILE", help="the list of arms, a YAML file")
    parser.add_argument("--output_dir", type=Path, help="default: output/ablation/NAME, where FILE is NAME.yaml")
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        metavar="N",
        help="runs side by side, which share the CPU's threads and take the GPUs in turn (default: %(default)s)",
    )
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="FILE", help="results on the same images to show beside the arms"
    )
    arguments = parser.parse_args()
    arguments.output_dir = arguments.output_dir or Path("output/ablation") / arguments.arms.stem
    if arguments.parallel < 1:
        raise UserError(f"--parallel must be 1 or more, got {arguments.parallel}")
    return arguments


if __name__ == "__main__":
    run(main)
