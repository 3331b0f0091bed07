"""What half precision and our kernels change: images from random tokens, and the losses of the first training steps."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from modeling import benchmark_items
from utils.benchmark.items import Setting, allow_tf32

NUM_BATCHES = 4  # of random images, again and again
# As in `variant`: our arithmetic, plain arithmetic in the same precision, and plain float32.
OURS, PLAIN, EXACT = VARIANTS = ("ours", "plain", "exact")
LOSSES = {"stage1": ["lr_scheduler.params.warmup_steps=0"]}
LOSSES["stage2"] = [*LOSSES["stage1"], "losses.discriminator_start=0"]


def variant(setting: Setting, name: str, num_steps: int) -> Iterator[tuple[str, Tensor]]:
    """Images and losses of one way to compute, by name; weights, tokens and images are the same in all of them.

    To be called once a process: what is plain stays so, and Accelerate keeps its precision.
    """
    allow_tf32(False)  # in half precision training sets it as its configuration says
    if name != OURS:
        benchmark_items.compute_plainly()
        setting = replace(setting, compile=False, plain=True, precision="fp32" if name == EXACT else setting.precision)
    yield "images", images(setting)
    for phase in LOSSES:
        yield phase, losses(setting, phase, num_steps)


@torch.no_grad()
def images(setting: Setting) -> Tensor:
    torch.manual_seed(0)
    model = benchmark_items.tokenizer(setting, setting.config("stage2"))
    tokens = torch.randint(model.codebook_size, (setting.batch_size, model.num_latent_tokens))
    with setting.autocast():
        return model.decode_tokens(tokens).float().cpu()


def losses(setting: Setting, phase: str, num_steps: int) -> Tensor:
    """The model's loss of each of the first steps, all at the highest learning rate, (num_steps,)."""
    from utils.training.loop import update

    torch.manual_seed(0)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        training, _, _ = benchmark_items.tokenizer_step(setting, phase, folder, *LOSSES[phase])
        torch.manual_seed(1)
        batches = [{"image": setting.images(training.config)} for _ in range(NUM_BATCHES)]
        for step in range(num_steps):
            found.append(update(training, [batches[step % NUM_BATCHES]])["loss/model"])
    return torch.stack(found).cpu()


def compared(found: dict[str, dict[str, Tensor]]) -> list[str]:
    """Lines of a table: how far ours is from plain arithmetic in the same precision, and that from float32.

    What one of them had no time for is left out.
    """
    ours, plain, exact = (found[name] for name in VARIANTS)
    there = [name for name in ("images", *LOSSES) if all(name in one for one in found.values())]

    def apart(one: Tensor, other: Tensor) -> float:
        return float((one - other).norm() / other.norm())

    lines = ["| relative difference | ours, float32 | plain, float32 | ours, plain |", "|---|---|---|---|"]
    for name in there:
        pairs = (ours, exact), (plain, exact), (ours, plain)
        label = name if name == "images" else f"losses of {len(ours[name])} steps, {name}"
        lines.append(f"| {label} | " + " | ".join(f"{apart(a[name], b[name]):.2%}" for a, b in pairs) + " |")
    for phase in filter(LOSSES.get, there):
        last = ", ".join(f"{name} {float(found[name][phase][-1]):.5f}" for name in VARIANTS)
        lines.append(f"\nLast loss of {phase}: {last}.")
    return lines
