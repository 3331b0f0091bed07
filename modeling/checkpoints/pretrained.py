"""What models share: from_pretrained, save_pretrained and the model card."""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from huggingface_hub import EvalResult, ModelCardData
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from modeling.checkpoints import WeightsError
from modeling.checkpoints.locate import CARD, CONFIG, SAFETENSORS, Located, locate
from modeling.checkpoints.registry import (
    TOKENIZER,
    build_empty,
    declared_classes,
    describes_no,
    fitting_config,
    is_known,
    shapes_of,
)
from modeling.checkpoints.state import (
    assign_strict,
    check_finite,
    load_strict,
    read_state_dict,
    without_position_ids,
    without_wrappers,
)
from utils.config import lenient_config, to_plain
from utils.errors import UserError
from utils.files import replacing_files
from utils.paths import expanded

logger = logging.getLogger(__name__)


class Pretrained(nn.Module):
    """What models with a `config` share: reading and writing their weights with their configuration."""

    config: DictConfig
    role: ClassVar[str] = "model"  # what it is called in errors: a tokenizer, teacher, generator
    pipeline_tag: ClassVar[str] = "image-to-image"
    tags: ClassVar[tuple[str, ...]] = ("image-tokenization", "arxiv:2501.10064", "arxiv:2406.07550")
    # Settings that change what weights mean and that no shape of them shows, and what they are where none is named.
    unseen: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike | Located,
        *,
        config: Mapping | DictConfig | None = None,
        device: str | torch.device = "cpu",
    ):
        """Build the model of a checkpoint and load its weights strictly; evaluation mode, float32.

        Args:
            source: Whatever `locate` finds (hub id, folder, training output, file, bundled name), or what it returned.
            config: Taken instead of the checkpoint's own configuration. Needed for a loose file that has none.

        Raises:
            WeightsError: The checkpoint is missing, damaged, of another class, of other sizes or of other settings
                that decide what its weights mean, or there is no configuration for it.
        """
        located = source if isinstance(source, Located) else locate(source)
        state = read_state_dict(located.weights)
        if config is not None:
            model = build_empty(cls, config)
            _check_role(model, located, state)
            check_settings(model, located)
        elif located.config is not None:
            model = _build_as_saved(cls, located.config, located, state)
        else:
            raise WeightsError(_config_needed(cls, located, state))
        assign_strict(model, state, located.description, device)
        return model.eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        card: str | None = None,
        figures: Sequence[EvalResult] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write `config.json` (resolved), `model.safetensors` and a model card; `from_pretrained` reads them back.

        A new folder appears whole or not at all. In a folder that exists each file is replaced whole, the weights
        last, and other files stay; so does a README.md that is no card of ours.

        Args:
            card: Text of the model card below its title, or a whole card, of which the licence in its header is kept
                too; a short description of the sizes, and no licence, when not given.
            figures: What an evaluation has measured, for the card's `model-index`.
            dtype: Store floating-point weights in this precision, for example torch.float16; as they are by default.

        Raises:
            WeightsError: A weight is no number, or is beyond what `dtype` can hold, or the folder holds the model of
                another program.
        """
        folder = Path(expanded(os.fspath(folder)))
        if folder.exists() and not folder.is_dir():
            raise WeightsError(f"save_pretrained needs a folder, but {folder} is a file")
        _check_ours(folder)
        names = [CONFIG, CARD, SAFETENSORS]
        if _is_foreign_card(folder / CARD):
            logger.warning("%s is no model card of ours and stays as it is: the model goes without one", folder / CARD)
            names.remove(CARD)
        with replacing_files(folder, names) as aside:
            (aside / CONFIG).write_text(json.dumps(to_plain(self.config), indent=2) + "\n", encoding="utf-8")
            (aside / CARD).write_text(_model_card(self, folder.resolve().name, card, figures), encoding="utf-8")
            safetensors.torch.save_file(_to_store(self.state_dict(), dtype), aside / SAFETENSORS, {"format": "pt"})
            # safetensors lets the owner alone read; a folder to share is as readable as its other files.
            (aside / SAFETENSORS).chmod((aside / CONFIG).stat().st_mode & 0o777)


def _check_ours(folder: Path) -> None:
    """Refuse a folder with a configuration or weights that were not saved here."""
    there = [name for name in (CONFIG, SAFETENSORS) if (folder / name).exists()]
    try:
        ours = not there or "model" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise WeightsError(f"{folder / there[0]} is there and not of ours: move it away, or name another folder")


def _is_foreign_card(path: Path) -> bool:
    return path.exists() and "\nlibrary_name: one-d-piece\n" not in path.read_text(encoding="utf-8", errors="replace")


def load_weights(model: nn.Module, source: str | os.PathLike) -> None:
    """Load whatever `locate` finds under `source` into a model that exists, strictly.

    Raises:
        WeightsError: As `locate`, `read_state_dict` and `load_strict`.
    """
    located = locate(source)
    state = read_state_dict(located.weights)
    _check_role(model, located, state)
    check_settings(model, located)
    load_strict(model, state, located.description)


def check_settings(model: nn.Module, located: Located, kind: type[Pretrained] | None = None) -> None:
    """Refuse weights whose own configuration gives them another meaning than `model` does.

    Args:
        kind: Whose settings are compared: the model's own, or those of a part of it.

    Raises:
        WeightsError: A setting of `Pretrained.unseen` is another one.
    """
    for key, default in (kind or model).unseen.items():
        *sections, name = key.split(".")
        theirs: Any = located.config
        for section in sections:
            theirs = theirs.get(section) if isinstance(theirs, Mapping) else None
        if not isinstance(theirs, Mapping):
            continue  # it has none, or that of something else
        there, here = theirs.get(name, default), OmegaConf.select(model.config, key, default=default)
        if there != here:
            raise WeightsError(
                f"{located.description} was trained with {key}={_as_written(there)}, and here it is "
                f"{_as_written(here)}: give {key}={_as_written(there)}"
            )


def _as_written(value: Any) -> str:
    return "null" if value is None else str(value)


def _check_role(model: nn.Module, located: Located, state: Mapping[str, Tensor]) -> None:
    """Say of weights that do not fit a model that they are of another role, where their own configuration says so."""
    holds = next(iter(reversed(declared_classes(located.config or {}))), None)
    if holds is None or holds.role == getattr(model, "role", "model") or _have_shapes_of(model, state):
        return
    raise WeightsError(_is_another(type(model), holds, located))


def _build_as_saved(model_class: type, config: Mapping, located: Located, state: Mapping[str, Tensor]) -> nn.Module:
    """The model of the configuration found with weights, still without them; it must be of this class."""
    words = f" with {located.description}", "fetch it again, or give the configuration of that model"
    try:
        _check_class(model_class, config, located, state)
    except UserError:
        raise
    except Exception as error:  # it may hold anything in any place
        raise describes_no(model_class, error, *words) from error
    return build_empty(model_class, config, *words)


def _check_class(model_class: type, config: Mapping, located: Located, state: Mapping[str, Tensor]) -> None:
    """A checkpoint of a subclass may be loaded by its base class, not the other way round.

    A generator's configuration names its tokenizer too, and TiTok's own repositories, which have no model.type, keep
    one of both beside the weights of either: there the weights decide.
    """
    declared = declared_classes(config) if is_known(model_class) else []
    if not declared or issubclass(declared[-1], model_class):
        return
    is_named = any(issubclass(one, model_class) for one in declared)
    has_type = OmegaConf.select(lenient_config(config), TOKENIZER) is not None
    if (has_type and not is_named) or not _fits(model_class, config, state):
        raise WeightsError(_is_another(model_class, declared[-1], located))


def _is_another(wanted: type, holds: type, located: Located) -> str:
    """What is said of a checkpoint that holds a model of another class than is wanted."""
    role, wanted_role = (getattr(one, "role", "model") for one in (holds, wanted))
    roles = f"is a {role}; give a {wanted_role}. It " if role != wanted_role else ""
    return (
        f"{located.description} {roles}holds a {holds.__name__}, not a {wanted.__name__}: load it with "
        f"{holds.__module__}.{holds.__name__}, or give the config of a {wanted.__name__}"
    )


def _fits(model_class: type, config: Mapping, state: Mapping[str, Tensor]) -> bool:
    try:
        return _have_shapes_of(build_empty(model_class, config), state)
    except Exception:  # it may hold anything in any place
        return False


def _have_shapes_of(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    expected = shapes_of(model.state_dict())
    return shapes_of(without_position_ids(state, expected)) == expected


def _config_needed(model_class: type, located: Located, state: Mapping[str, Tensor]) -> str:
    fitting = fitting_config(model_class, shapes_of(without_position_ids(state, ())))
    hint = f"it fits {fitting}" if fitting else "for example that of its training run"
    return f"{located.description} has no {CONFIG} beside it: give the configuration, {hint}"


def _to_store(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Plain tensors of their own: safetensors takes neither views nor two names of one tensor."""
    stored = {}
    for name, value in state.items():
        value = value.detach().to("cpu", dtype if value.is_floating_point() else None, copy=True)
        stored[without_wrappers(name)] = value.contiguous()
    if dtype is not None:
        _check_range(state, stored, dtype)
    check_finite(stored, "the model")
    return stored


def _check_range(state: Mapping[str, Tensor], stored: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for name, value in state.items():
        if value.is_floating_point() and bool((value.isfinite().cpu() & stored[without_wrappers(name)].isinf()).any()):
            raise WeightsError(
                f"{name} has values up to {float(value.abs().max()):.3g}, and {dtype} holds {largest:.3g} at most: "
                "store it in bfloat16 or float32 (export_model.py --dtype)"
            )


def _model_card(model: Pretrained, title: str, text: str | None, figures: Sequence[EvalResult] = ()) -> str:
    header, text = re.fullmatch(r"(---\n.*?\n---\n)?\s*(.*)", text or "", re.DOTALL).groups("")
    if text.startswith("# "):  # it is whole, with its title and its use
        text = re.sub(r"\A(# .*\n\s*)+", "", text).partition("\n## Use\n")[0]
    # Whose weights they are decides: a model that somebody trains has the licence that its card gives, or none yet.
    licence = "".join(re.findall(r"^license: .*\n", header, re.MULTILINE))
    kind = type(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = OmegaConf.to_yaml(OmegaConf.create(to_plain(model.config).get("model", {}))).rstrip()
    text = text or f"A `{kind.__name__}` with {parameters:,} parameters.\n\n```yaml\n{sizes}\n```"
    tags = "\n".join(f"- {tag}" for tag in model.tags)
    index = ModelCardData(model_name=title, eval_results=list(figures)).to_yaml() + "\n" if figures else ""
    return f"""---
{licence}library_name: one-d-piece
pipeline_tag: {model.pipeline_tag}
tags:
{tags}
{index}---

# {title}

{text.strip()}

## Use

```python
from {kind.__module__} import {kind.__name__}

model = {kind.__name__}.from_pretrained("{title}")  # this folder, or the name of the hub repository
```
"""
