"""Tensors of a checkpoint: read without running code, and fitted into a model strictly."""

import hashlib
import os
import pickle
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from modeling.checkpoints import WeightsError
from modeling.checkpoints.registry import fitting_config, shapes_of

WRAPPERS = ("module", "_orig_mod")  # of data parallel training, and of torch.compile


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` file or of a pickle, onto the CPU, running no code from it.

    A dict kept under "state_dict" or "model" is unpacked; what `torch.compile` and data parallel wrappers put into
    names is removed.

    Raises:
        WeightsError: The file is missing, damaged, or holds more than tensors, or a tensor holds what is no number.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"weights file {path} does not exist")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for container in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(container), Mapping):
            state = state[container]
    if not isinstance(state, Mapping) or not state:
        got = "an empty one" if isinstance(state, Mapping) else type(state).__name__
        raise WeightsError(f"{path} must hold a dict of named tensors, got {got}: save the model's state_dict()")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{path} must hold named tensors only, but {key!r} is {type(value).__name__}: save the state dict alone"
            )
    check_finite(state, path)
    return {without_wrappers(key): value for key, value in state.items()}


def without_wrappers(name: str) -> str:
    """A tensor's name without what wrappers have put before it or into it, in any order and number."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def check_finite(state: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """Refuse tensors with NaN or infinite values: a model with them gives ordinary-looking results of nothing.

    Raises:
        WeightsError: Names the first such tensor.
    """
    for name, value in state.items():
        if value.is_floating_point() and not _is_finite(value):
            bad = int((~value.float().isfinite()).sum())
            raise WeightsError(
                f"{name} of {source} holds {bad:,} values of {value.numel():,} that are no numbers (NaN or infinite): "
                "take an earlier checkpoint, or fetch it again"
            )


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """Copy `state` into `model`; every name and shape must be there, and nothing else.

    Values are converted to the precision of the model's parameters. `position_ids`, a constant that old generator
    files hold, is ignored where the model has none.

    Args:
        source: What the weights are called in the error.

    Raises:
        WeightsError: Names are missing or unexpected, or shapes differ; lists the first few of each, and the
            configuration of this project that the weights fit, if one does.
    """
    check_fit(model, state, source)
    model.load_state_dict(without_position_ids(state, model.state_dict()), strict=True)


def assign_strict(
    model: nn.Module, state: Mapping[str, Tensor], source: str | os.PathLike, device: str | torch.device = "cpu"
) -> None:
    """As `load_strict`, for a model on the meta device: gives it tensors of its own on `device`.

    They are copies: tensors of a safetensors file are views of it, and change when somebody writes over it.
    """
    check_fit(model, state, source)
    own = {
        name: state[name].to(device, value.dtype, copy=True, memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(own, strict=True, assign=True)
    empty = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    assert not empty, f"no checkpoint holds {', '.join(empty)}: make them persistent buffers, or in forward"


def check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """Compare names and shapes, as `load_strict` does; `model` may be on the meta device."""
    expected = shapes_of(model.state_dict())
    given = shapes_of(without_position_ids(state, expected))
    misshapen = [name for name in expected if given.get(name, expected[name]) != expected[name]]
    problems = [
        _listed("missing", [name for name in expected if name not in given]),
        _listed("unexpected", [name for name in given if name not in expected]),
        _listed("misshapen", [f"{name} {given[name]} for {expected[name]}" for name in misshapen]),
    ]
    if any(problems):
        raise WeightsError(
            f"the weights of {source} do not fit this {type(model).__name__}, {_advice(type(model), expected, given)}: "
            + "; ".join(filter(None, problems))
        )


def without_position_ids(state: Mapping[str, Tensor], expected: Container[str]) -> dict[str, Tensor]:
    """`state` without the constant that old generator files hold, unless it is expected."""
    return {
        name: value
        for name, value in state.items()
        if name in expected or name.rsplit(".", maxsplit=1)[-1] != "position_ids"
    }


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values (as float32) of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(_damaged(path, error)) from error


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # Bytes of unknown origin: the unpickler fails on damaged ones with nearly any exception there is.
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError):
            # Not torch's own text, which advises to load the file unsafely.
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f"holds more than tensors ({found[1]})" if found else "is damaged or holds more than tensors"
            raise WeightsError(
                f"{path} {what} and was refused, because loading such a pickle could run code: fetch it again, or ask "
                "for a .safetensors file"
            ) from error
        raise WeightsError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    size = path.stat().st_size
    return f"{path} ({size:,} bytes) cannot be read, it is truncated or no weights file ({reason}): fetch it again"


def _is_finite(value: Tensor) -> bool:
    """As a model's float32. By the extremes, which are NaN where any value is: a tenth of the time of each."""
    if value.element_size() == 1:
        value = value.float()  # torch compares no floats of 8 bits
    return not value.numel() or bool(torch.stack(value.aminmax()).float().isfinite().all())


def _listed(kind: str, names: list[str], limit: int = 3) -> str:
    if not names:
        return ""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} {kind} ({', '.join(names[:limit])}{more})"


def _advice(model_class: type, expected: Mapping[str, tuple], given: Mapping[str, tuple]) -> str:
    missing, unexpected = expected.keys() - given.keys(), given.keys() - expected.keys()
    same_sizes = all(given[name] == expected[name] for name in expected.keys() & given.keys())
    if same_sizes and missing and not unexpected and all(name.startswith("pixel_") for name in missing):
        return (
            "they are stage-1 weights (start stage 2 from them and the teacher's file together, or build the model "
            "with model.vq_model.finetune_decoder: False)"
        )
    if same_sizes and unexpected and not missing and all(name.startswith("pixel_") for name in unexpected):
        return "they are stage-2 weights (build the model with model.vq_model.finetune_decoder: True)"
    fitting = fitting_config(model_class, given)
    return f"they fit {fitting} (give that configuration)" if fitting else "nor any configuration of this project"
