"""Which class a configuration means, how it looks without weights, and which configuration fits some weights."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modeling.checkpoints import WeightsError
from utils.config import lenient_config, load_config
from utils.errors import UserError
from utils.paths import ROOT

# What a configuration says, (key, value), and the class that it means. A generator's names its tokenizer too.
MODELS: dict[tuple[str, str], Any] = {}
TOKENIZER, GENERATOR = "model.type", "model.generator.model_type"
_KEYS = (TOKENIZER, GENERATOR)  # the last one that a configuration has is what it is about

Kind = TypeVar("Kind", bound=type)
Model = TypeVar("Model", bound=nn.Module)


def register(key: str, value: str) -> Callable[[Kind], Kind]:
    """Decorate the class that a configuration with `key: value` means."""

    def add(kind: Kind) -> Kind:
        MODELS[key, value] = kind
        return kind

    return add


def declared_classes(config: Mapping | DictConfig) -> list[Any]:
    """The classes that a configuration says its checkpoint may hold, what it is about last."""
    config = lenient_config(config)
    named = ((key, str(OmegaConf.select(config, key))) for key in _KEYS)
    return [MODELS[one] for one in named if one in MODELS]


def model_class(config: Mapping | DictConfig) -> type:
    """The class of the model that a configuration is about; a generator's also names its tokenizer, and means itself.

    Raises:
        WeightsError: Neither `model.type` nor `model.generator.model_type` says which.
    """
    declared = declared_classes(config)
    if not declared:
        known = ", ".join(sorted({f"{key}: {value}" for key, value in MODELS}))
        raise WeightsError(f"the configuration does not say what model it is about: it needs one of {known}")
    return declared[-1]


def class_named(key: str, value: str, base: type) -> type:
    """The class derived from `base` that `key: value` means.

    Raises:
        UserError: There is none; the text lists what there is.
    """
    known = {name: model for (its_key, name), model in MODELS.items() if its_key == key and issubclass(model, base)}
    if value not in known:
        raise UserError(f"{key} must be one of {', '.join(known)}, got {value}")
    return known[value]


class _NoDraws(TorchFunctionMode):
    """Leave out `nn.init.normal_`, which on the meta device makes torch import its compiler: two seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        if function is nn.init.normal_:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def describes_no(
    model_class: type, error: Exception, which: str = "", remedy: str = "correct its section model"
) -> WeightsError:
    """What is said where a configuration's values make no model.

    Args:
        which, remedy: Whose configuration it is, and what to do.
    """
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return WeightsError(f"the configuration{which} describes no {model_class.__name__} ({reason}): {remedy}")


def build(model_class: type[Model], config: Mapping | DictConfig, *words: str) -> Model:
    """The model of a configuration, which may hold anything in any place.

    Args:
        words: For the error, as of `describes_no`.

    Raises:
        WeightsError: It describes no such model.
    """
    try:
        return model_class(lenient_config(config))
    except UserError:
        raise
    except Exception as error:
        raise describes_no(model_class, error, *words) from error


def build_empty(model_class: type[Model], config: Mapping | DictConfig, *words: str) -> Model:
    """As `build`, on the meta device: names, shapes and settings, in no memory, whatever sizes a config claims."""
    with torch.device("meta"), _NoDraws():
        return build(model_class, config, *words)


def fitting_config(model_class: type, given: Mapping[str, tuple]) -> str | None:
    """The first configuration of this project whose model has exactly these names and shapes."""
    if not is_known(model_class):
        return None
    for path in _project_configs():
        try:
            config = load_config(path)
            declared = declared_classes(config)
            if not any(issubclass(one, model_class) or issubclass(model_class, one) for one in declared):
                continue
            shapes = shapes_of(build_empty(model_class, config).state_dict())
        except UserError:  # a file that somebody is still writing must not hide the error at hand
            continue
        if shapes == given:
            return str(path.relative_to(ROOT))
    return None


def is_known(model_class: type) -> bool:
    return model_class in MODELS.values()


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _project_configs() -> Iterator[Path]:
    for pattern in ("eval/*.yaml", "fashion/*.yaml", "training/**/*.yaml"):
        yield from sorted((ROOT / "configs").glob(pattern))
