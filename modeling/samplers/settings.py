"""What a sampler can be told, and the schedules that follow from it: guidance by step, masked tokens by step."""

import math
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from omegaconf import DictConfig

from utils.errors import UserError

GUIDANCE_DECAYS = ("constant", "linear", "power-cosine")
TEMPERATURE_DECAYS = ("linear", "constant")
MASK_SCHEDULES = ("arccos", "exponential")
ORDERS = ("random", "front", "moment")
REMASKINGS = ("cap", "rescale", "loop")
FLOAT32_MAX = 3.4e38  # logits and noise are float32
KINDS: dict[Any, tuple[Any, str]] = {  # a field's type: what is taken for it, and in words
    bool: (bool, "true or false"),
    float: ((int, float), "a finite number of float32"),
    int: (int, "an integer"),
    str: (str, "a name"),
}
OFF = {  # the values with which a setting does nothing
    "guidance_decay": "constant",
    "guidance_from": 0,
    "guidance_until": 1,
    "temperature_decay": "constant",
    "softmax_temperature_annealing": False,
    "top_p": 1,
    "num_tokens": 0,
}
SAMPLER_FLAGS = "sampler (default: as the generator's configuration says)"  # what they are called in --help


def _setting(default: Any, about: str, **metadata: Any) -> Any:
    """A field that is a flag too, with `about` as its help (utils/flags.py).

    `key` is its name in `model.generator`, where that differs.
    """
    return field(default=default, metadata={"help": about, **metadata})


@dataclass(frozen=True)
class SamplerSettings:
    """The settings of `MaskGIT.generate`; `model.generator` and the flags of the commands set them.

    Numbers of NumPy and torch become Python's.

    Raises:
        UserError: A value is of another type than its field, or outside its range.
    """

    guidance_scale: float = _setting(3.0, "strength of classifier-free guidance")
    guidance_decay: str = _setting("constant", "how it changes over the steps", choices=GUIDANCE_DECAYS)
    guidance_scale_pow: float = _setting(3.0, "power of power-cosine")
    randomize_temperature: float = _setting(4.5, "noise at the first step; 0: none")
    softmax_temperature_annealing: bool = _setting(False, "sharpen the prediction over the steps")
    num_sample_steps: int = _setting(8, "forward passes", key="num_steps")
    sampler: str = _setting("confidence", "confidence (published), choose or remasking (modeling/samplers)")
    guidance_from: float = _setting(0.0, "share of the steps before guidance begins")
    guidance_until: float = _setting(1.0, "share of the steps after which it ends")
    temperature_decay: str = _setting("linear", "whether the noise falls to 0", choices=TEMPERATURE_DECAYS)
    top_p: float = _setting(1.0, "draw of the likeliest codes alone that hold so much of the probability")
    mask_schedule: str = _setting("arccos", "tokens by step; exponential: fewer at first", choices=MASK_SCHEDULES)
    order: str = _setting("random", "which tokens first (choose and remasking)", choices=ORDERS)
    remasking: str = _setting("cap", "how much is drawn again (remasking)", choices=REMASKINGS)
    remasking_strength: float = _setting(0.1, "its share of the known tokens, or of the most")
    num_tokens: int = _setting(0, "a draft: sample the first so many tokens alone; 0: all")

    def __post_init__(self) -> None:
        for setting in fields(self):
            object.__setattr__(self, setting.name, _typed(setting, getattr(self, setting.name)))
        if self.num_sample_steps < 1:
            raise UserError(f"num_sample_steps must be an integer of 1 or more, got {self.num_sample_steps}")
        if self.num_tokens < 0:
            raise UserError(f"num_tokens must be an integer of 0 or more, got {self.num_tokens}")
        for name in ("guidance_scale_pow", "randomize_temperature"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be a finite number of 0 or more, got {getattr(self, name)}")
        for name in ("guidance_from", "guidance_until", "top_p", "remasking_strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if not self.top_p:
            raise UserError("top_p must be more than 0: randomize_temperature 0 draws the likeliest code alone")

    def __str__(self) -> str:
        """The settings that change something: the sampler uses them, and they are not off."""
        unused = self._unused()
        named = {"sampler": self.sampler} | asdict(self)  # the sampler first
        return ", ".join(
            f"{name} {value}" for name, value in named.items() if name not in unused and OFF.get(name) != value
        )

    def _unused(self) -> set[str]:
        """Names of the settings that nothing reads, because of the others."""
        unused = set()
        no_guidance = 1 if self.guidance_decay == "power-cosine" else 0
        if self.guidance_scale == no_guidance:
            unused |= {setting.name for setting in fields(self) if setting.name.startswith("guidance_")}
        if self.guidance_decay != "power-cosine":
            unused.add("guidance_scale_pow")
        if not self.randomize_temperature:
            unused |= {"randomize_temperature", "temperature_decay"}
        if self.sampler == "confidence":
            unused.add("order")
        if self.sampler in ("confidence", "choose"):
            unused |= {"remasking", "remasking_strength"}
        return unused

    @property
    def num_passes(self) -> int:
        """Forward passes that sampling makes: at most one for each token of a draft."""
        return min(self.num_sample_steps, self.num_tokens or self.num_sample_steps)

    def caution(self, num_tokens: int) -> str:
        """What a command says behind the settings of more passes than an image has tokens; nothing where they help."""
        if self.sampler == "remasking" or self.num_tokens or self.num_sample_steps <= num_tokens:
            return ""
        return (
            f" (warning: {self.num_sample_steps} passes for {num_tokens} tokens only draw the last one again, and the "
            f"others under too much noise; take at most {num_tokens})"
        )

    def guidance_weight(self, step: int) -> float:
        """The weight of classifier-free guidance at a step, see `guidance_weight`; 0 outside its interval."""
        if not self.guidance_from <= step / self.num_sample_steps < self.guidance_until:
            return 0.0
        return guidance_weight(
            self.guidance_decay, self.guidance_scale, self.guidance_scale_pow, step, self.num_sample_steps
        )


def _typed(setting: Field, value: Any) -> Any:
    """The value of a setting, as Python's type."""
    plain = value.item() if getattr(value, "ndim", None) == 0 else value  # NumPy's and torch's
    accepted, wanted = KINDS[setting.type]
    fits = isinstance(plain, accepted) and isinstance(plain, bool) == (setting.type is bool)
    if not fits or (setting.type is float and not abs(plain) <= FLOAT32_MAX):  # so written that NaN is refused
        raise UserError(f"{setting.name} must be {wanted}, got {value!r}")
    choices = setting.metadata.get("choices", [plain])
    if plain not in choices:
        raise UserError(f"{setting.name} must be one of {', '.join(choices)}, got {value!r}")
    return plain


def sampler_settings(config: DictConfig, **changes: Any) -> SamplerSettings:
    """What `model.generator` of a configuration says, then `changes`; the published default where neither does."""
    generator = config.model.generator
    keys = {setting.name: setting.metadata.get("key", setting.name) for setting in fields(SamplerSettings)}
    configured = {name: generator[key] for name, key in keys.items() if generator.get(key) is not None}
    return SamplerSettings(**configured | changes)


def guidance_weight(decay: str, scale: float, power: float, step: int, num_steps: int) -> float:
    """Weight g of classifier-free guidance at a sampling step: logits = conditional + g (conditional - unconditional).

    Args:
        decay: "constant": g is `scale`. "linear": it rises from 0 as `scale` * step / num_steps. "power-cosine": it
            rises from 0 towards `scale` - 1, the slower the higher `power` is (in the form of the published code,
            unconditional + s (conditional - unconditional), s = 1 + g goes from 1 to `scale`).
        step: 0..num_steps - 1.

    Returns:
        0 where the unconditional logits are not needed.
    """
    if decay == "constant":
        return scale
    if decay == "linear":
        return scale * step / num_steps
    if decay == "power-cosine":
        return (scale - 1) * (1 - math.cos(math.pi * (step / num_steps) ** power)) / 2
    raise UserError(f"guidance_decay must be one of {', '.join(GUIDANCE_DECAYS)}, got {decay!r}")


def masked_counts(num_tokens: int, num_steps: int, schedule: str = "arccos") -> list[int]:
    """How many tokens are still masked after each sampling step, the last count being 0.

    The share of the schedule, rounded down, but every step fixes at least one token and leaves at least one for the
    next. With more steps than tokens, the last token is therefore drawn again until the last step.
    """
    counts = []
    masked = num_tokens
    for step in range(1, num_steps):
        scheduled = math.floor(num_tokens * masked_share(step / num_steps, schedule))
        masked = max(1, min(masked - 1, scheduled))
        counts.append(masked)
    return [*counts, 0]


def masked_share(progress: float, schedule: str = "arccos") -> float:
    """Share of the tokens that are masked at `progress` 0..1, from 1 down to 0.

    Args:
        schedule: "arccos": acos(progress) * 2 / pi, as published. "exponential": 1 - exp(-5 (1 - progress)), over its
            highest value, which leaves most for the end (eMIGM, arXiv 2503.07197).
    """
    if schedule == "exponential":
        return math.expm1(-5 * (1 - progress)) / math.expm1(-5)
    return math.acos(progress) * 2 / math.pi
