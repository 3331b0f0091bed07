"""Measure how fast the models run here, against what this machine's arithmetic can do.

    python3 scripts/benchmark.py
    python3 scripts/benchmark.py --model S L --only encode decode --precision bf16 --batch_size 64 --json speed.json

A large matrix product and a channels-last convolution give the machine's ceilings in the same precision. An item's
share of the ceiling is the time that its arithmetic (counted by torch) would take at the ceilings, over the time that
it took. Times are medians after a warm-up, items and ceilings taking turns, so that a busy machine slows both alike.
Weights and pictures are random: neither changes the amount of work.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data.shard_files import Sample, write_shard
from modeling.analysis import replacement_changes
from modeling.modules.blocks import attention
from modeling.tokenizers import build_tokenizer, encode_tokens
from utils.cli import ROOT, UserError, pick_device, run
from utils.config import load_config
from utils.images import to_array

PUBLISHED = {
    "stage1": "configs/training/stage1/one-d-piece_{}256.yaml",
    "stage2": "configs/training/stage2/one-d-piece_{}256.yaml",
    "generator": "configs/training/generator/maskgit_one-d-piece_{}256.yaml",
}
CONFIGS = {
    "tiny": {phase: f"configs/fashion/{phase}.yaml" for phase in PUBLISHED},
    **{size: {phase: path.format(size.lower()) for phase, path in PUBLISHED.items()} for size in "SBL"},
}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHORTEST = 0.05  # seconds: what is quicker is timed several times in a row
LENGTHS = (8, 64, 256)
# Side of the matrices; batch, channels and side of the images: large enough to keep the device busy.
CEILING_SIZES = {"cpu": (2048, 4, 128, 64), "other": (8192, 32, 256, 128)}
COLUMNS = ("model", "item", "batch", "ms", "images/s", "GFLOP", "GFLOP/s", "of ceiling", "peak MiB")


@dataclass(frozen=True)
class Work:
    """Something to time: what it is called, one turn of it, and how many images a turn handles (0: none).

    Training does it after every so many turns of the item's work before it, if `every` is not 0.
    """

    name: str
    turn: Callable[[], object]
    num_images: int = 0
    every: int = 0


@dataclass(frozen=True)
class Setting:
    """One model in one precision on one device."""

    model: str
    device: torch.device
    precision: str
    batch_size: int

    def config(self, phase: str, *overrides: str) -> DictConfig:
        """The model's configuration of "stage1", "stage2" or "generator"."""
        return load_config(
            ROOT / CONFIGS[self.model][phase], [f"training.per_gpu_batch_size={self.batch_size}", *overrides]
        )

    def images(self, config: DictConfig) -> Tensor:
        side = config.dataset.preprocessing.crop_size
        return torch.rand(self.batch_size, 3, side, side, device=self.device)

    def autocast(self) -> AbstractContextManager:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class Measurement:
    """What was found of one item; times in seconds, work in floating-point operations, memory in bytes."""

    model: str
    item: str
    batch_size: int
    seconds: float
    images_per_second: float | None
    flops: int
    flops_per_second: float
    share_of_ceiling: float | None
    peak_memory: int | None
    share_of_training: float | None


# ---------------------------------------------------------------- items: add one by writing its function and its row


def encode(setting: Setting) -> Iterator[Work]:
    config = setting.config("stage2")
    model = build_tokenizer(config).to(setting.device).eval()
    images = setting.images(config)

    @torch.no_grad()
    def turn():
        with setting.autocast():
            return model.encode(images)

    yield Work("encode", turn, len(images))


def decode(setting: Setting) -> Iterator[Work]:
    config = setting.config("stage2")
    model = build_tokenizer(config).to(setting.device).eval()
    total = model.num_latent_tokens
    tokens = torch.randint(model.codebook_size, (setting.batch_size, total), device=setting.device)
    for length in sorted({min(length, total) for length in LENGTHS}):

        @torch.no_grad()
        def turn(length=length):
            with setting.autocast():
                return model.decode_tokens(tokens, length=length)

        yield Work(f"decode {length}", turn, setting.batch_size)


def attend(setting: Setting) -> Iterator[Work]:
    """Attention of one encoder block, forward and backward: by our choice of arithmetic, and by torch's fused one."""
    with torch.device("meta"):  # for its sizes
        encoder = build_tokenizer(setting.config("stage1")).encoder
    num_heads = encoder.transformer[0].attn.num_heads
    num_patches, width = encoder.positional_embedding.shape  # and the class token
    positions = num_patches + encoder.latent_token_positional_embedding.shape[0]
    # In memory as a block's packed projection leaves them: the layout is part of the cost.
    shape = (setting.batch_size, positions, 3, num_heads, width // num_heads)
    packed = torch.randn(shape, device=setting.device, dtype=DTYPES[setting.precision], requires_grad=True)
    for name, function in (("attention", attention), ("attention, fused", F.scaled_dot_product_attention)):

        def turn(function=function):
            output = function(*packed.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)  # (B, T, W)
            return torch.autograd.grad(output, packed, output.detach())

        yield Work(name, turn, setting.batch_size)


def train_stage1(setting: Setting) -> Iterator[Work]:
    with tempfile.TemporaryDirectory() as folder:
        yield Work("stage-1 step", *tokenizer_step(setting, "stage1", folder)[1:])


def train_stage2(setting: Setting) -> Iterator[Work]:
    with tempfile.TemporaryDirectory() as folder:
        yield Work("stage-2 step", *tokenizer_step(setting, "stage2", folder)[1:])


def train_generator(setting: Setting) -> Iterator[Work]:
    """From a token set, and with the frozen tokenizer encoding the pictures of every step."""
    from modeling.tasks.generator import GeneratorTask

    with tempfile.TemporaryDirectory() as folder:
        config = setting.config("generator", f"experiment.output_dir={folder}")
        task = GeneratorTask(config)
        task.tokenizer = build_tokenizer(config).to(setting.device).eval().requires_grad_(False)
        tokens = torch.randint(task.model.codebook_size, (setting.batch_size, task.model.num_tokens))
        labels = {"class_id": torch.randint(task.model.num_classes, (setting.batch_size,)).to(setting.device)}
        training = make_run(setting, config, task)
        for source, batch in (
            ("tokens", {"tokens": tokens.to(setting.device)}),
            ("images", {"image": setting.images(config)}),
        ):
            yield Work(f"generator, {source}", one_update(training, batch | labels), setting.batch_size)


def sample(setting: Setting) -> Iterator[Work]:
    """Tokens of images by the config's sampler; and the guided pair of a step in one forward pass and in two."""
    from modeling.maskgit import generator_class, sampler_settings

    config = setting.config("generator")
    model = generator_class(config)(config).to(setting.device).eval()
    labels = torch.randint(model.num_classes, (setting.batch_size,)).to(setting.device)

    def generate():
        with setting.autocast():
            return model.generate(labels, **sampler_settings(config))

    tokens = torch.full((setting.batch_size, model.num_tokens), model.mask_token, device=setting.device)
    dropped = torch.arange(2, device=setting.device).bool().repeat_interleave(setting.batch_size)

    @torch.no_grad()
    def batched():
        with setting.autocast():
            return model(tokens.repeat(2, 1), labels.repeat(2), dropped)

    @torch.no_grad()
    def apart():
        with setting.autocast():
            return [model(tokens, labels, half) for half in dropped.chunk(2)]

    yield Work("sample", generate, setting.batch_size)
    yield Work("guided, one pass", batched, setting.batch_size)
    yield Work("guided, two", apart, setting.batch_size)


def reconstruct(setting: Setting) -> Iterator[Work]:
    """From shards to the rows of images.npy, as scripts/reconstruct_tokenizer.py goes; in batches and one by one."""
    from data.image_shards import evaluation_loader

    with tempfile.TemporaryDirectory() as folder:
        config = setting.config("stage2", *picture_shards(setting, Path(folder)))
        model = build_tokenizer(config).to(setting.device).eval()
        for name, batch_size in (("reconstruct", setting.batch_size), ("reconstruct, 1 by 1", 1)):
            batches = evaluation_loader(config, rank=0, world_size=1, batch_size=batch_size)

            @torch.no_grad()
            def turn(batches=batches):
                with setting.autocast():
                    for batch in batches:
                        to_array(model(batch["image"].to(setting.device) / 255)[0])

            yield Work(name, turn, setting.batch_size)


def contribute(setting: Setting) -> Iterator[Work]:
    """Pictures in which one token is replaced: a batch at once, and one token at a time; an image is such a picture."""
    model = build_tokenizer(setting.config("stage2")).to(setting.device).eval()
    tokens = torch.randint(model.codebook_size, (1, model.num_latent_tokens), device=setting.device)
    codes = torch.randint(model.codebook_size, (1, setting.batch_size, 1), device=setting.device)
    for name, batch_size in (("contribution", setting.batch_size), ("contribution, 1 by 1", 1)):

        def turn(batch_size=batch_size):
            with setting.autocast():
                for _ in replacement_changes(model, tokens, codes, batch_size):
                    pass

        yield Work(name, turn, setting.batch_size)


def load(setting: Setting) -> Iterator[Work]:
    """Training batches from shards by one process: divide a step's images/s by its own for the workers needed."""
    from data.image_shards import training_loader

    with tempfile.TemporaryDirectory() as folder:
        config = setting.config("stage1", *picture_shards(setting, Path(folder)))
        batches = iter(training_loader(config, rank=0, world_size=1, batches_per_chunk=1000))
        yield Work("loader", partial(next, batches), setting.batch_size)


def pretokenize(setting: Setting) -> Iterator[Work]:
    """From shards to tokens, as scripts/pretokenize.py goes: in float32 whatever the precision."""
    from data.batches import FaultLog
    from data.token_source import CentreCrop, PictureSource, decoded

    with tempfile.TemporaryDirectory() as folder:
        config = setting.config("stage2", *picture_shards(setting, Path(folder)))
        model = build_tokenizer(config).to(setting.device).eval()
        (part,) = PictureSource(config, "eval", CentreCrop(config.dataset.preprocessing)).parts

        def turn():
            for examples in decoded(part, batch_size=setting.batch_size, num_threads=1, faults=FaultLog(strict=True)):
                images = torch.cat([example.image for example in examples]).to(setting.device)
                encode_tokens(model, images.float() / 255).cpu()

        yield Work("pretokenize", turn, setting.batch_size)


def save(setting: Setting) -> Iterator[Work]:
    """A whole checkpoint: weights, EMA, optimiser state, checksums, flush; and a step, of which it is a share."""
    with tempfile.TemporaryDirectory() as folder:
        training, turn, num_images = tokenizer_step(setting, "stage1", folder)
        yield Work("step", turn, num_images)  # first, since the optimiser has no state before it
        yield Work("checkpoint", training.save, every=training.config.experiment.save_every)


ITEMS = {
    "encode": encode,
    "decode": decode,
    "attention": attend,
    "stage1": train_stage1,
    "stage2": train_stage2,
    "generator": train_generator,
    "sample": sample,
    "reconstruct": reconstruct,
    "contribution": contribute,
    "loader": load,
    "pretokenize": pretokenize,
    "checkpoint": save,
}


def picture_shards(setting: Setting, folder: Path) -> list[str]:
    """Write a batch of pictures into a shard; what makes a configuration read it, for training and evaluation.

    They are the bundled ones: photographs as JPEG of ImageNet's usual size, garments as they are.
    """
    if setting.config("stage2").dataset.preprocessing.crop_size > 32:
        pictures = [jpeg(path) for path in sorted((ROOT / "assets/photos").glob("*.png"))]
    else:
        pictures = [path.read_bytes() for path in sorted((ROOT / "assets/fashion").glob("*.png"))]
    chosen = islice(cycle(pictures), setting.batch_size)
    write_shard(folder / "0.tar", (Sample(str(index), picture, 0) for index, picture in enumerate(chosen)))
    return [
        "dataset.type=shards",
        *(f"dataset.params.{split}_shards_path_or_url={folder / '0.tar'}" for split in ("train", "eval")),
        "dataset.params.num_eval_examples=null",
        "dataset.params.num_workers_per_gpu=0",
        # What the loader fills before its first batch.
        f"dataset.params.shuffle_buffer_size={setting.batch_size}",
    ]


def jpeg(path: Path) -> bytes:
    file = io.BytesIO()
    Image.open(path).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def tokenizer_step(setting: Setting, phase: str, folder: str) -> tuple:
    """The training loop's own update of a tokenizer: the loop, one turn of it, the number of images."""
    from modeling.pixel_vqgan import PixelVQGAN
    from modeling.tasks.tokenizer import tokenizer_task

    config = setting.config(
        phase,
        f"experiment.output_dir={folder}",
        # Without tail drop, whose draws would make every step another amount of work.
        "model.type=titok",
        "model.vq_model.strict_length_assertion=False",
        "training.codebook.warmup_steps=0",
        "training.codebook.kmeans=False",
        "training.codebook.restart_every=0",
    )
    if phase == "stage1":
        task = tokenizer_task(config)
        task.teacher = PixelVQGAN(config).eval().requires_grad_(False)
        step = 0
    else:
        task = stage2_task(config, folder)
        step = min(config.losses.discriminator_start, config.training.max_train_steps - 1)  # the adversary has joined
    training = make_run(setting, config, task)
    return training, one_update(training, {"image": setting.images(config)}, step), setting.batch_size


def make_run(setting: Setting, config: DictConfig, task):
    """The training loop around a task, in the setting's precision."""
    from accelerate import Accelerator

    from utils.training import Run

    mixed_precision = setting.precision if setting.precision in ("bf16", "fp16") else "no"
    return Run(task, config, Accelerator(mixed_precision=mixed_precision, cpu=setting.device.type == "cpu"))


def one_update(training, batch: dict[str, Tensor], step: int = 0) -> Callable[[], None]:
    """A turn that does the update with index `step` on `batch`, again and again."""

    def turn():
        training.step = step
        training.update([batch])

    return turn


def stage2_task(config: DictConfig, folder: str):
    """The task of stage 2; where ConvNeXt-Small's weights would have to be downloaded, it has random ones."""
    from modeling.modules.features import PerceptualDistance
    from modeling.tasks.tokenizer import tokenizer_task

    if config.losses.perceptual_loss != "convnext_s":
        return tokenizer_task(config)
    import torchvision
    from safetensors.torch import save_file

    weights = Path(folder) / "convnext_small.safetensors"
    save_file(torchvision.models.convnext_small().state_dict(), weights)
    perceptual_weight, config.losses.perceptual_weight = config.losses.perceptual_weight, 0.0
    task = tokenizer_task(config)
    config.losses.perceptual_weight = perceptual_weight
    task.perceptual = PerceptualDistance("convnext_s", weights)
    return task


# ------------------------------------------------------------------------------------------------------- measuring


def ceilings(setting: Setting) -> dict[str, Work]:
    """Arithmetic that this machine does best: a matrix product, and a 3 x 3 convolution in channels-last layout."""
    kind = {"device": setting.device, "dtype": DTYPES[setting.precision]}
    side, batch, channels, pixels = CEILING_SIZES["cpu" if setting.device.type == "cpu" else "other"]
    left, right = torch.randn(side, side, **kind), torch.randn(side, side, **kind)
    images = torch.randn(batch, channels, pixels, pixels, **kind).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(channels, channels, 3, 3, **kind).contiguous(memory_format=torch.channels_last)
    return {
        "matmul": Work("matrix product", torch.no_grad()(lambda: left @ right)),
        "convolution": Work("convolution", torch.no_grad()(lambda: F.conv2d(images, kernel, padding=1))),
    }


def count_flops(turn: Callable[[], object]) -> dict[str, int]:
    """Floating-point operations of one turn, those of convolutions apart; forward and backward."""
    with FlopCounterMode(display=False) as counter:
        turn()
    counts = counter.get_flop_counts().get("Global", {})
    convolution = sum(count for operator, count in counts.items() if "convolution" in str(operator))
    return {"matmul": counter.get_total_flops() - convolution, "convolution": convolution}


def time_turns(turn: Callable[[], object], device: torch.device, count: int = 1) -> float:
    """Seconds a turn, of `count` turns in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            turn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / count
    begun = time.perf_counter()
    for _ in range(count):
        turn()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - begun) / count


class Benchmark:
    """Times works of one setting, each in turns with the ceilings."""

    def __init__(self, setting: Setting, num_repeats: int):
        self.setting = setting
        self.num_repeats = num_repeats
        self.ceilings = ceilings(setting)
        self.flops = {name: sum(count_flops(work.turn).values()) for name, work in self.ceilings.items()}

    def measure_ceilings(self) -> dict[str, float]:
        """Floating-point operations a second, by kind."""
        seconds = self._medians(self.ceilings)
        return {name: self.flops[name] / seconds[name] for name in self.ceilings}

    def measure(self, item: str) -> Iterator[Measurement]:
        """Build an item and time its works."""
        device = self.setting.device
        resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        seconds = 0.0
        for work in ITEMS[item](self.setting):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            flops = count_flops(work.turn)
            peak = torch.cuda.max_memory_allocated(device) - resident if device.type == "cuda" else None
            times = self._medians({"work": work, **self.ceilings})
            before, seconds = seconds, times["work"]
            at_ceilings = sum(flops[name] / self.flops[name] * times[name] for name in self.ceilings)
            total = sum(flops.values())
            yield Measurement(
                model=self.setting.model,
                item=work.name,
                batch_size=self.setting.batch_size,
                seconds=seconds,
                images_per_second=work.num_images / seconds if work.num_images else None,
                flops=total,
                flops_per_second=total / seconds,
                share_of_ceiling=at_ceilings / seconds if total else None,
                peak_memory=peak,
                share_of_training=seconds / (seconds + work.every * before) if work.every else None,
            )

    def _medians(self, works: dict[str, Work]) -> dict[str, float]:
        """Median seconds of a turn of each, warmed up, all taking turns."""
        device = self.setting.device
        for work in works.values():
            work.turn()
        once = {name: time_turns(work.turn, device) for name, work in works.items()}
        counts = {name: max(1, round(SHORTEST / seconds)) for name, seconds in once.items()}
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self.num_repeats):
            for name, work in works.items():
                times[name].append(time_turns(work.turn, device, counts[name]))
        return {name: statistics.median(values) for name, values in times.items()}


# ------------------------------------------------------------------------------------------------- the command line


def main() -> None:
    arguments = parse_arguments()
    device = pick_device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.precision == "tf32"
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{place}, {torch.get_num_threads()} threads, {arguments.precision}, torch {torch.__version__}")
    found: list[Measurement] = []
    for model in arguments.model:
        default = 32 if device.type != "cpu" else 16 if model == "tiny" else 1
        setting = Setting(model, device, arguments.precision, arguments.batch_size or default)
        benchmark = Benchmark(setting, arguments.repeats)
        if not found:
            limits = benchmark.measure_ceilings()
            print("ceilings: " + ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in limits.items()))
            print("\n" + line(COLUMNS))
        for item in arguments.only:
            for measurement in benchmark.measure(item):
                found.append(measurement)
                print(line(row(measurement)), flush=True)
                if (share := measurement.share_of_training) is not None:
                    print(f"{'':7}as often as the configuration wants: {share:.2%} of training time")
    if arguments.json:
        record = {
            "device": place,
            "threads": torch.get_num_threads(),
            "precision": arguments.precision,
            "torch": torch.__version__,
            "ceilings_flops_per_second": limits,
            "results": [asdict(one) for one in found],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def row(found: Measurement) -> tuple[str, ...]:
    return (
        found.model,
        found.item,
        str(found.batch_size),
        f"{found.seconds * 1000:.2f}",
        f"{found.images_per_second:.1f}" if found.images_per_second else "-",
        f"{found.flops / 1e9:.2f}",
        f"{found.flops_per_second / 1e9:.1f}",
        f"{found.share_of_ceiling:.0%}" if found.share_of_ceiling is not None else "-",
        f"{found.peak_memory / 2**20:,.0f}" if found.peak_memory is not None else "-",
    )


def line(cells: Sequence[str]) -> str:
    return f"{cells[0]:7}{cells[1]:21}" + "".join(f"{cell:>11}" for cell in cells[2:])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", choices=CONFIGS, default=["tiny"], help="sizes: the bundled model's, or published ones")
    add("--only", nargs="+", choices=ITEMS, default=list(ITEMS), help="what to measure (default: everything)")
    add("--batch_size", type=int, help="images a turn (default: 32; on a CPU 16 for tiny, 1 for the others)")
    add("--precision", choices=DTYPES, default="fp32", help="default: %(default)s")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    add("--repeats", type=int, default=5, help="timings to take the median of (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the results there as well")
    arguments = parser.parse_args()
    for name in ("batch_size", "repeats"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be 1 or more, got {value}")
    return arguments


if __name__ == "__main__":
    run(main)
