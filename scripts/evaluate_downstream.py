"""Score reconstructions by what other networks still see in them.

  python3 scripts/reconstruct_tokenizer.py --config CONFIG --original --labels --output_dir DIR/original
  python3 scripts/reconstruct_tokenizer.py --config CONFIG --lengths 8,32,256 --output_dir DIR
  python3 scripts/evaluate_downstream.py --task classification --original DIR/original/images.npy \\
      --target DIR/length_*/images.npy --truth DIR/original/labels.npy

| --task         | --model, by default                       | measured                                         |
| classification | convnext_base (torchvision)               | accuracy; agreement with the original's class    |
| clip           | openai/clip-vit-base-patch32 (hub)        | cosine of the embeddings                         |
| depth          | depth-anything/Depth-Anything-V2-Small-hf | L1, RMSE, MSE (the published figure is the MSE)  |
| segmentation   | deeplabv3_resnet50 (torchvision)          | mIoU, over all images                          |
| detection      | fasterrcnn_resnet50_fpn_v2 (torchvision)  | COCO's mean average precision                    |

--model takes another network of the same origin, for classification also timm:NAME or efficientnet_lite0 (no
download), for clip and depth also a folder. Weights are downloaded before the first image is read. clip, depth and
detection need more packages: pip install -c constraints.txt -e '.[downstream]'.

--truth says what is really in the images; without it the originals' predictions are the goal.
classification: labels.npy, in the network's classes; segmentation: masks.npy (n, H, W), likewise, 255 where a pixel
does not count; detection: COCO annotations in JSON, in pixels of the images, `images` in their order.

On several GPUs or processes: torchrun --nproc_per_node N scripts/evaluate_downstream.py ...
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from modeling.networks.downstream import (
    INSTALL,
    ClipEmbedding,
    Depth,
    TorchvisionDetector,
    TorchvisionSegmenter,
    classifier,
)
from modeling.networks.frozen import ImageNetwork
from utils.cli import run
from utils.errors import UserError
from utils.evaluation.agreement import Detection, PerImage, Score, Segmentation, classification, depth, similarity
from utils.evaluation.arguments import add_common_arguments
from utils.evaluation.comparison import Originals
from utils.evaluation.protocol import exact_arithmetic, protocol
from utils.evaluation.report import Row, table, write_results
from utils.files import sha256_of
from utils.processes import Processes

ORIGINAL = "original"


class Task(NamedTuple):
    """One kind of evaluation.

    Attributes:
        model: What --model is by default.
        load: From --model to the network.
        score: From the network to an empty score of its predictions.
        truth: Name of the function of data/annotations.py that reads --truth; None where there is none.
    """

    model: str
    load: Callable[..., ImageNetwork]
    score: Callable[[ImageNetwork], Score]
    truth: str | None = None


TASKS = {
    "classification": Task("convnext_base", classifier, lambda network: PerImage(classification), "read_labels"),
    "clip": Task("openai/clip-vit-base-patch32", ClipEmbedding, lambda network: PerImage(similarity)),
    "depth": Task("depth-anything/Depth-Anything-V2-Small-hf", Depth, lambda network: PerImage(depth)),
    "segmentation": Task(
        "deeplabv3_resnet50", TorchvisionSegmenter, lambda network: Segmentation(network.num_classes), "read_masks"
    ),
    "detection": Task(
        "fasterrcnn_resnet50_fpn_v2", TorchvisionDetector, lambda network: Detection(INSTALL), "read_boxes"
    ),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--original", required=True, help="images to compare with: .npy, .npz or a folder")
    parser.add_argument("--target", required=True, nargs="+", help="images to score, one or several such sets")
    parser.add_argument("--truth", metavar="FILE", help="labels, masks or boxes, as said above")
    parser.add_argument("--model", help="the network (default: as said above)")
    parser.add_argument("--weights", metavar="FILE", help="weights of a timm model, where they cannot be downloaded")
    add_common_arguments(parser, output_dir="output/evaluate_downstream")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    arguments.model = arguments.model or task.model
    if arguments.truth and task.truth is None:
        raise UserError(f"--truth is not for --task {arguments.task}, which compares with the originals: leave it out")
    if arguments.weights and not arguments.model.startswith("timm:"):
        raise UserError(f"--weights is for --model timm:NAME, got --model {arguments.model}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    exact_arithmetic()
    processes = Processes(arguments.device)
    try:
        task = TASKS[arguments.task]
        weights = {"weights": arguments.weights} if arguments.weights else {}
        network = task.load(arguments.model, **weights).to(processes.device)
        evaluate(arguments, task, network, processes)
    finally:
        processes.close()


def evaluate(arguments: argparse.Namespace, task: Task, network: ImageNetwork, processes: Processes) -> None:
    """Compare what `network` sees in the originals and in each set of targets."""
    from data import annotations  # torchvision is slow to import, too slow for --help
    from data.image_sets import open_images, shares
    from data.image_shards import check_count

    originals = open_images(arguments.original)
    targets = {name: open_images(name) for name in arguments.target}
    for images in targets.values():
        originals.check_pairs(images)
    truth = getattr(annotations, task.truth)(arguments.truth, originals) if arguments.truth else None
    # With truth at hand the originals have a score too, which no reconstruction need exceed.
    scores = {name: task.score(network) for name in [*([ORIGINAL] if arguments.truth else []), *targets]}

    share = {"batch_size": arguments.batch_size or 64, "rank": processes.rank, "world_size": processes.world_size}
    places = shares(len(originals), **share)
    versions = [images.batches(**share) for images in targets.values()]
    seen = Originals(processes)
    with tqdm(total=len(originals), unit="image", disable=not processes.is_main, dynamic_ncols=True) as bar:
        for place, (keys, images), *batches in zip(places, originals.batches(**share), *versions, strict=True):
            seen.add(images, keys)
            goal = truth[place] if truth is not None else None
            reference = network(images.to(processes.device))
            if truth is not None:
                scores[ORIGINAL].update(reference, reference, goal)
            for name, (_, version) in zip(targets, batches, strict=True):
                scores[name].update(network(version.to(processes.device)), reference, goal)
            bar.update(len(keys) * processes.world_size)

    check_count(seen.count(), len(originals))
    rows: list[Row] = [{"name": name, "system": name, **score.finish(processes)} for name, score in scores.items()]
    record = protocol(
        processes,
        originals=seen.record(len(originals)),
        preparation="images as they are given",
        task=arguments.task,
        original=arguments.original,
        target=arguments.target,
        truth=arguments.truth and {"file": arguments.truth, "sha256": sha256_of(arguments.truth)},
        network={
            "model": arguments.model,
            "preparation": network.preparation,
            "weights_sha256": network.weights_sha256,
        },
    )
    if processes.is_main:
        print(table(rows))
        path = Path(arguments.output_dir) / arguments.task / "metrics.json"
        write_results(path, {"rows": rows, "protocol": record})
        print(f"{len(originals):,} images scored by {arguments.model}; wrote {path}")


if __name__ == "__main__":
    run(main)
