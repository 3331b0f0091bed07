"""What scripts/benchmark.py times of compressed files."""

from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice

import numpy as np
import torch
from PIL import Image

from codec.bitstream import Fit
from codec.canvas import to_canvas
from codec.files import codec_named
from codec.rate import encode
from utils.benchmark.items import Setting, Work
from utils.paths import ROOT


def payloads(setting: Setting) -> Iterator[Work]:
    """All tokens of garments by the bundled model, whatever --model is: into bytes, back, and from there to images.

    The entropy model and its coder compute on one core, in integers; the image's decoder as the setting says.
    """
    codec = codec_named(device=setting.device)
    paths = sorted((ROOT / "assets/fashion").glob("*.png"))
    squares = [to_canvas(Image.open(path), Fit.CROP, codec.side).squares for path in paths]
    pixels = torch.from_numpy(np.concatenate(list(islice(cycle(squares), setting.batch_size))))
    on_device = encode(codec.tokenizer, pixels.permute(0, 3, 1, 2)).tokens
    tokens = on_device.cpu().numpy()
    model, count = codec.models.best(), tokens.shape[1]
    written = model.encode_batch(tokens)

    def one_by_one():
        for payload in written:
            model.decode(payload, count)

    @torch.inference_mode()
    def images(batch_size):
        with setting.autocast():
            return [codec.tokenizer.decode_tokens(part) for part in on_device.split(batch_size)]

    for name, turn in (
        ("tokens to bytes", lambda: model.encode_batch(tokens)),
        ("bytes to tokens", lambda: model.decode_batch(written, [count] * len(written))),
        ("bytes to tokens, 1 by 1", one_by_one),
        ("tokens to images", partial(images, len(tokens))),
        ("tokens to images, 1 by 1", partial(images, 1)),
    ):
        yield Work(name, turn, len(tokens))
