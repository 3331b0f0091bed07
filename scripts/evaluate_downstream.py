"""Score reconstructions by what other networks still see in them.

  python3 scripts/reconstruct_tokenizer.py --config CONFIG --original --labels --output_dir DIR/original
  python3 scripts/reconstruct_tokenizer.py --config CONFIG --lengths 8,32,256 --output_dir DIR
  python3 scripts/evaluate_downstream.py --task classification --original DIR/original/images.npy \\
      --target DIR/length_*/images.npy --truth DIR/original/labels.npy

| --task         | --model, by default                       | measured                                         |
| classification | convnext_base (torchvision)               | accuracy; agreement with the original's class    |
| clip           | openai/clip-vit-base-patch32 (hub)        | cosine of the embeddings                         |
| depth          | depth-anything/Depth-Anything-V2-Small-hf | L1, RMSE, MSE (the published figure is the MSE)  |
| segmentation   | deeplabv3_resnet50 (torchvision)          | mIoU, over all images                            |
| detection      | fasterrcnn_resnet50_fpn_v2 (torchvision)  | COCO's mean average precision                    |

--model takes another network of the same origin, for classification also timm:NAME or efficientnet_lite0 (no
download), for clip and depth also a folder. Weights are downloaded before the first image is read. clip, depth and
detection need more packages: pip install -c constraints.txt -e '.[downstream]'.

--truth says what is really in the images; without it the originals' predictions are the goal.
classification: labels.npy, in the network's classes; segmentation: masks.npy (n, H, W), likewise, 255 where a pixel
does not count; detection: COCO annotations in JSON, in pixels of the images, `images` in their order.

On several GPUs or processes: torchrun --nproc_per_node N scripts/evaluate_downstream.py ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from modeling.networks.downstream import TASKS
from modeling.networks.frozen import ImageNetwork
from utils.errors import UserError
from utils.evaluation.arguments import add_common_arguments, add_num_images_argument
from utils.evaluation.comparison import Originals
from utils.evaluation.session import Session
from utils.files import sha256_of

ORIGINAL = "original"
# Functions of data/annotations.py.
TRUTHS = {"classification": "read_labels", "segmentation": "read_masks", "detection": "read_boxes"}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--original", required=True, help="images to compare with: .npy, .npz or a folder")
    parser.add_argument("--target", required=True, nargs="+", help="images to score, one or several such sets")
    parser.add_argument("--truth", metavar="FILE", help="labels, masks or boxes, as said above")
    parser.add_argument("--model", help="the network (default: as said above)")
    parser.add_argument("--weights", metavar="FILE", help="weights of a timm model, where they cannot be downloaded")
    add_num_images_argument(parser, "the first N images", default="all")
    add_common_arguments(parser, output_dir="output/evaluate_downstream")
    arguments = parser.parse_args()
    arguments.model = arguments.model or TASKS[arguments.task].model
    if arguments.truth and arguments.task not in TRUTHS:
        raise UserError(f"--truth is not for --task {arguments.task}, which compares with the originals: leave it out")
    if arguments.weights and not arguments.model.startswith("timm:"):
        raise UserError(f"--weights is for --model timm:NAME, got --model {arguments.model}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    with Session(arguments.device, arguments.output_dir, [f"{arguments.task}/metrics.json"]) as session:
        weights = {"weights": arguments.weights} if arguments.weights else {}
        network = TASKS[arguments.task].load(arguments.model, **weights).to(session.device)
        evaluate(arguments, network, session)


def evaluate(arguments: argparse.Namespace, network: ImageNetwork, session: Session) -> None:
    """Compare what `network` sees in the originals and in each set of targets."""
    from data import annotations  # torchvision is slow to import, too slow for --help
    from data.batches import check_count
    from data.evaluation_images import first_of
    from data.image_sets import AS_GIVEN, open_images, paired

    sets = paired([open_images(name) for name in (arguments.original, *arguments.target)])
    truth = getattr(annotations, TRUTHS[arguments.task])(arguments.truth, sets[0]) if arguments.truth else None
    originals, *others = (first_of(images, arguments.num_images) for images in sets)
    targets = dict(zip(arguments.target, others, strict=True))
    # With truth at hand the originals have a score too, which no reconstruction need exceed.
    names = [*([ORIGINAL] if truth is not None else []), *targets]
    scores = {name: TASKS[arguments.task].score(network) for name in names}
    seen = Originals(session.processes)
    with session.progress(len(originals)) as done:
        for keys, images, goal, versions in batches(
            originals, targets, truth, session.share(arguments.batch_size or 64)
        ):
            seen.add(images, keys)
            reference = network(images.to(session.device))
            if truth is not None:
                scores[ORIGINAL].update(reference, reference, goal)
            for name, version in versions.items():
                scores[name].update(network(version.to(session.device)), reference, goal)
            done(len(keys))

    record = session.record(
        originals=session.counted(seen, check_count, len(originals)),
        preparation=AS_GIVEN,
        task=arguments.task,
        original=arguments.original,
        target=arguments.target,
        truth=arguments.truth and {"file": arguments.truth, "sha256": sha256_of(arguments.truth)},
        network={"model": arguments.model} | {key: getattr(network, key) for key in ("preparation", "weights_sha256")},
    )
    rows = [{"name": name, "system": name, **score.finish(session.processes)} for name, score in scores.items()]
    summary = f"{len(originals):,} images scored by {arguments.model}"
    results = {"rows": rows, "protocol": record}
    session.report(summary, results, shown=rows, name=f"{arguments.task}/metrics.json")


def batches(originals, targets: Mapping, truth, share: dict[str, Any]) -> Iterator[tuple]:
    """Keys, images, what is really in them (or None) and {name: the same images of a target}."""
    from data.image_sets import shares

    versions = [images.batches(**share) for images in targets.values()]
    places = shares(len(originals), **share)
    for place, (keys, images), *others in zip(places, originals.batches(**share), *versions, strict=True):
        goal = truth[place] if truth is not None else None
        yield keys, images, goal, {name: version for name, (_, version) in zip(targets, others, strict=True)}


if __name__ == "__main__":
    run(main)
