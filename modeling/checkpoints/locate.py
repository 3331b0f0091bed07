"""Where a checkpoint is: hub, bundled, folder, training output, loose file; errors of one sentence."""

import difflib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError
from omegaconf import DictConfig

from modeling.checkpoints import WeightsError
from modeling.checkpoints.published import BUNDLED, PUBLISHED, TITOK_FILES, TITOK_REPOSITORY
from utils.checkpoint import CONFIG_FILE, WEIGHTS_FILE, checkpoints
from utils.config import RUN_CONFIG, lenient_config, load_config, to_plain, value_of
from utils.paths import ROOT

log = logging.getLogger(__name__)
CONFIG = CONFIG_FILE
CARD = "README.md"
SAFETENSORS = WEIGHTS_FILE
PICKLE = "pytorch_model.bin"
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TRAINING_OUTPUTS = "checkpoints"
ON_HUB = " (hub)"  # after the name of what was found there
HUB_TIMEOUT = 10  # seconds until the hub counts as unreachable


@dataclass(frozen=True)
class Located:
    """Where a checkpoint is: its weights file, the configuration found with it, and words for error messages."""

    weights: Path
    config: dict[str, Any] | None
    description: str

    @property
    def name(self) -> str:
        """What it is called in tables and records: a bundled model by its name, others by their path, from the
        repository where they lie inside."""
        for name, folder in BUNDLED.items():
            if self.weights.parent == folder:
                return name
        return self.description.replace(f"{ROOT}/", "")

    @property
    def source(self) -> str:
        """What `locate` finds it by: a bundled model by its name, one of the hub by its repository or file."""
        place = self.name.removesuffix(ON_HUB)
        repository, _, file = place.rpartition("/")
        if place == self.name:
            return self.name
        return file if file in TITOK_FILES else repository


def locate(source: str | os.PathLike, *, output_dir: str | os.PathLike | None = None) -> Located:
    """Find a checkpoint, downloading it if it is on the hub.

    Args:
        source: In this order, whichever matches first: a file or folder on this machine (weights file, folder made by
            `save_pretrained`, training output folder, one of its `checkpoint-STEP` folders), the name of a bundled
            model, a bare step number of `output_dir`, the name of a published TiTok file, a hub repository
            `owner/name`.
        output_dir: The training output folder that step numbers refer to.

    Of a training output folder the final weights are taken, before the end of training the newest checkpoint's; of a
    checkpoint the EMA weights, or the trained ones where the run kept no EMA.

    Raises:
        WeightsError: Nothing is there, or the hub could not give it; the text says where it looked.
    """
    if source is not None and not isinstance(source, str | os.PathLike):
        raise WeightsError(f"a checkpoint is named by a string or a path, got {source!r} ({type(source).__name__})")
    name = os.fspath(source or "")
    if not name:  # as a path it would be the working directory
        raise WeightsError("no checkpoint given: name a file, a folder, a bundled model or a hub repository")
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return _in_file(path)
    if name in BUNDLED:
        return _in_folder(BUNDLED[name])
    if name.isdecimal():
        return _at_step(name, output_dir)
    if name in TITOK_FILES:
        return _on_hub(TITOK_REPOSITORY, [name], TITOK_FILES[name])
    if path.parts[0] == TRAINING_OUTPUTS:  # looks like a hub repository, but is where our configurations write
        raise WeightsError(f"there is no training output {name} here (working directory {Path.cwd()}): train it first")
    if _is_hub_id(name):
        return _on_hub(name, [SAFETENSORS, PICKLE], PUBLISHED.get(name))
    near = difflib.get_close_matches(name, [*BUNDLED, *TITOK_FILES], n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise WeightsError(
        f"no checkpoint {name}: it is no file or folder here (working directory {Path.cwd()}), no bundled model "
        f"({', '.join(BUNDLED)}) and no hub repository of the form owner/name{hint}"
    )


def is_public(name: str) -> bool:
    """Whether `locate` finds this on every machine: a bundled model, a published file or a hub repository."""
    return name in (*BUNDLED, *TITOK_FILES) or (_is_hub_id(name) and not Path(name).exists())


def locate_configured(
    config: Mapping | DictConfig, checkpoint: str | os.PathLike | None = None, *, path: str | os.PathLike | None = None
) -> Located:
    """Find the weights that a command means by a configuration and, where one is given, a checkpoint.

    In this order: `checkpoint`, as `locate` finds it, step numbers being those of `experiment.output_dir`; the run in
    `experiment.output_dir`, once it has weights; the published or bundled model that `experiment.init_weight` names;
    the published model whose configuration is the file `path`. Any other init_weight is what training starts from, and
    not what the configuration makes.

    Raises:
        ConfigError: It has no such key: it is no model's.
        WeightsError: As `locate`, or there is none of the three.
    """
    output_dir = Path(value_of(lenient_config(config), "experiment.output_dir"))
    if checkpoint is not None:
        return locate(checkpoint, output_dir=output_dir)
    if output_dir.is_dir() and (_weights_file(output_dir) or checkpoints(output_dir)):
        return _in_folder(output_dir)
    init_weight = config.experiment.get("init_weight")
    if init_weight in (*PUBLISHED, *TITOK_FILES, *BUNDLED):
        return locate(init_weight)
    for published, file in (PUBLISHED | TITOK_FILES).items():
        if path is not None and Path(path).resolve() == ROOT / file:
            return locate(published)
    raise WeightsError(
        f"no weights for this configuration: {output_dir} (its experiment.output_dir) holds none, and it names no "
        "published model: train it first, or give a checkpoint"
    )


def _is_hub_id(name: str) -> bool:
    path = Path(name)
    return bool(HUB_ID.fullmatch(name)) and path.suffix not in SUFFIXES and path.parts[0] != TRAINING_OUTPUTS


def _in_folder(folder: Path) -> Located:
    """A save_pretrained folder, a training output folder or one of its checkpoints."""
    searched = [folder]
    saved = checkpoints(folder)
    if saved and not _weights_file(folder):
        searched.append(saved[-1][1])
    nested = [searched[-1] / "ema_model", searched[-1] / "unwrapped_model"]
    # First, because a checkpoint also holds Accelerate's copy of the trained weights, under the same file name.
    for candidate in nested + searched:
        if weights := _weights_file(candidate):
            # A checkpoint's configuration may stand beside its weights, or once for the whole run.
            run = candidate.absolute().parents[:2] if candidate.name in ("ema_model", "unwrapped_model") else []
            return Located(weights, _config_of(candidate, *run) or _config_by_name(folder), str(candidate))
    raise WeightsError(
        f"no weights in {folder}: expected {SAFETENSORS} or {PICKLE} in it, or a checkpoint-STEP/ema_model with one"
    )


def _config_by_name(folder: Path) -> dict[str, Any] | None:
    """The configuration of a published repository that has none itself, of which the folder is a copy by its name."""
    configs = {repository.rpartition("/")[2]: file for repository, file in PUBLISHED.items()}
    file = configs.get(folder.resolve().name)
    return _project_config(file) if file else None


def _in_file(path: Path) -> Located:
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"a weights file ends in {', '.join(SUFFIXES)}, got {path}")
    if path.name in TITOK_FILES:
        return Located(path, _project_config(TITOK_FILES[path.name]), str(path))
    return Located(path, _config_of(path.parent), str(path))


def _at_step(step: str, output_dir: str | os.PathLike | None) -> Located:
    if output_dir is None:
        raise WeightsError(f"checkpoint {step} is a step number, which needs the output folder of a run: give its path")
    saved = dict(checkpoints(Path(output_dir)))
    if int(step) not in saved:
        there = ", ".join(map(str, saved)) or "none"
        raise WeightsError(f"no checkpoint of step {step} in {output_dir}; the steps there are: {there}")
    return _in_folder(saved[int(step)])


def _on_hub(repository: str, names: list[str], project_config: str | None) -> Located:
    """The first of the weights files `names` that a repository has, and its configuration; downloaded, or cached."""
    try:
        weights, config = _download(repository, names)
    except GatedRepoError as error:
        raise WeightsError(
            f"{repository} on the hub is gated: accept its terms there, log in with `hf auth login`, and try again"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise WeightsError(
            f"no checkpoint {repository}: it is no file or folder here, and the hub has no such repository, or a "
            "private one (log in with `hf auth login` for that)"
        ) from error
    except (HTTPError, OSError) as error:
        weights, config = _cached(repository, names, error)
    described = f"{repository}/{Path(weights).name}{ON_HUB}"
    # A published TiTok file stands beside others: a configuration in that repository would not be its own.
    if config is not None and repository != TITOK_REPOSITORY:
        return Located(Path(weights), _read_json(Path(config)), described)
    return Located(Path(weights), _project_config(project_config) if project_config else None, described)


def _download(repository: str, names: list[str]) -> tuple[str, str | None]:
    files = {file.rfilename for file in HfApi().model_info(repository, timeout=HUB_TIMEOUT).siblings}
    name = next((name for name in names if name in files), None)
    if name is None:
        raise WeightsError(f"{repository} on the hub holds no {' or '.join(names)}: it is not a model of this project")
    weights = hf_hub_download(repository, name)
    return weights, hf_hub_download(repository, CONFIG) if CONFIG in files else None


def _cached(repository: str, names: list[str], error: Exception) -> tuple[str, str | None]:
    """What an earlier download has left, where the hub gives this error."""
    found = {file: try_to_load_from_cache(repository, file) for file in [*names, CONFIG]}
    cached = {file: path for file, path in found.items() if isinstance(path, str)}
    weights = next((cached[name] for name in names if name in cached), None)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if weights is None:
        raise WeightsError(
            f"there is no {repository} here, and {' or '.join(names)} of {repository} could not be fetched from the "
            f"hub ({reason}) and is not in its cache ({constants.HF_HUB_CACHE}): connect to the network, or copy its "
            "files into a folder and give that folder as the checkpoint"
        ) from error
    log.warning("The hub could not be reached (%s): using the cached copy of %s.", reason, repository)
    return weights, cached.get(CONFIG)


def _weights_file(folder: Path) -> Path | None:
    return next((folder / name for name in (SAFETENSORS, PICKLE) if (folder / name).is_file()), None)


def _config_of(*folders: Path) -> dict[str, Any] | None:
    for folder in folders:
        if (folder / CONFIG).is_file():
            return _read_json(folder / CONFIG)
        if (folder / RUN_CONFIG).is_file():
            return to_plain(load_config(folder / RUN_CONFIG))
    return None


def _project_config(path: str) -> dict[str, Any]:
    return to_plain(load_config(ROOT / path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON ({error}): fetch or write it again") from error
    if not isinstance(config, dict):
        raise WeightsError(
            f"{path} must hold one JSON object, the configuration of the model, got {type(config).__name__}"
        )
    return config
