"""How a generator's logits become tokens: the samplers by name. One is a file here, and a line below."""

from modeling.samplers.choose import ChooseThenSample
from modeling.samplers.confidence import Confidence
from modeling.samplers.remasking import Remasking
from modeling.samplers.sampler import Sampler
from utils.errors import UserError

SAMPLERS: dict[str, type[Sampler]] = {
    "confidence": Confidence,
    "choose": ChooseThenSample,
    "remasking": Remasking,
}


def sampler_class(name: str) -> type[Sampler]:
    """The sampler that `model.generator.sampler` or --sampler names."""
    if name not in SAMPLERS:
        raise UserError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name}")
    return SAMPLERS[name]
