"""One way in for every checkpoint: hub, bundled, folder, training output, loose file; strict; one-sentence errors."""

import hashlib
import importlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from torch import Tensor, nn

from utils.checkpoint import checkpoints
from utils.cli import ROOT, UserError
from utils.config import RUN_CONFIG, lenient_config, load_config, to_plain

log = logging.getLogger(__name__)

CONFIG = "config.json"
CARD = "README.md"
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TRAINING_OUTPUTS = "checkpoints"
HUB_TIMEOUT = 10  # seconds until the hub counts as unreachable

BUNDLED = {
    name: ROOT / "assets/models" / name
    for name in (
        "one-d-piece_fashion",
        "maskgit_fashion",
        "pixel_vqgan_fashion",
        "one-d-piece_emoji",
        "maskgit_emoji",
    )
}

# The published repositories that hold no config.json, and the loose files, get their configuration from this project.
PUBLISHED = {
    **{f"turing-motors/One-D-Piece-{size}-256": f"configs/eval/one-d-piece_{size.lower()}256.yaml" for size in "SBL"},
    **{
        f"turing-motors/MaskGIT_One-D-Piece-{size}-256": (
            f"configs/training/generator/maskgit_one-d-piece_{size.lower()}256.yaml"
        )
        for size in "SBL"
    },
}
TITOK_REPOSITORY = "fun-research/TiTok"
TITOK_FILES = {
    "maskgit-vqgan-imagenet-f16-256.bin": "configs/training/teacher/maskgit-vqgan_f16_256.yaml",
    **{f"tokenizer_titok_{size}.bin": f"configs/eval/titok_{size}.yaml" for size in ("l32", "b64", "s128")},
    **{
        f"generator_titok_{size}.bin": f"configs/training/generator/maskgit_titok_{size}.yaml"
        for size in ("l32", "b64", "s128")
    },
}

# What a configuration says that a checkpoint holds. A generator's says both: it names its tokenizer too.
CLASSES = {
    ("model.type", "titok"): ("modeling.titok", "TiTok"),
    ("model.type", "one_d_piece"): ("modeling.one_d_piece", "OneDPiece"),
    ("model.type", "pixel_vqgan"): ("modeling.pixel_vqgan", "PixelVQGAN"),
    ("model.generator.model_type", "ViT"): ("modeling.maskgit", "ImageBert"),
    ("model.generator.model_type", "UViT"): ("modeling.maskgit", "UViTBert"),
}


class WeightsError(UserError):
    """Weights that cannot be found, read or fitted into the model; the text says which, why and what to do."""


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
    name = os.fspath(source)
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
    raise WeightsError(
        f"no checkpoint {name}: it is no file or folder here (working directory {Path.cwd()}), no bundled model "
        f"({', '.join(BUNDLED)}) and no hub repository of the form owner/name"
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
        WeightsError: As `locate`, or there is none of the three.
    """
    output_dir = Path(config.experiment.output_dir)
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


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` file or of a pickle, onto the CPU, running no code from it.

    A dict kept under "state_dict" or "model" is unpacked; the prefixes that `torch.compile` and data parallel
    wrappers put before every name are removed.

    Raises:
        WeightsError: The file is missing, damaged, or holds more than tensors.
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
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


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
    model.load_state_dict(_without_position_ids(state, model.state_dict()), strict=True)


def check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """Compare names and shapes, as `load_strict` does; `model` may be on the meta device."""
    expected = _shapes(model.state_dict())
    given = _shapes(_without_position_ids(state, expected))
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


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values (as float32) of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: nn.Module, source: str | os.PathLike) -> None:
    """Load whatever `locate` finds under `source` into a model that exists, strictly.

    Raises:
        WeightsError: As `locate`, `read_state_dict` and `load_strict`.
    """
    located = locate(source)
    load_strict(model, read_state_dict(located.weights), located.description)


def stage1_start(model: nn.Module, source: str | os.PathLike) -> None:
    """Load a stage-1 tokenizer from a tokenizer of either stage, to train its tokens further.

    What stage 2 adds, `pixel_quantize` and `pixel_decoder`, is left out.

    Raises:
        WeightsError: As `load_weights`.
    """
    located = locate(source)
    state = read_state_dict(located.weights)
    own = {name: value for name, value in state.items() if not name.startswith(("pixel_quantize.", "pixel_decoder."))}
    load_strict(model, own, located.description)


def stage2_start(model: nn.Module, source: str | os.PathLike, teacher_source: str | os.PathLike) -> None:
    """Load a stage-2 tokenizer from stage-1 weights and the pixel VQGAN that taught them, or from a finished tokenizer.

    The teacher's `quantize` and `decoder` become the tokenizer's `pixel_quantize` and `pixel_decoder`. A tokenizer that
    has been through stage 2 has its own, to be trained further, for example on other pictures; no teacher is read then.

    Raises:
        WeightsError: Either is missing or damaged, or they do not fill the model exactly.
    """
    located = locate(source)
    state, description = read_state_dict(located.weights), located.description
    if not any(name.startswith("pixel_decoder.") for name in state):
        teacher = locate(teacher_source)
        description = f"{description} with the teacher {teacher.description}"
        for name, value in read_state_dict(teacher.weights).items():
            if name.startswith(("quantize.", "decoder.")):
                state[f"pixel_{name}"] = value
    load_strict(model, state, description)


def load_teacher(config: Mapping | DictConfig, source: str | os.PathLike) -> nn.Module:
    """The pixel VQGAN of sizes `config.model.pixel_vqgan`, with the weights of `source`, frozen, in evaluation mode.

    Raises:
        WeightsError: As `Pretrained.from_pretrained`.
    """
    from modeling.pixel_vqgan import PixelVQGAN  # it imports this file

    return PixelVQGAN.from_pretrained(source, config=config).requires_grad_(False)


def model_class(config: Mapping | DictConfig) -> type:
    """The class of the model that a configuration is about; a generator's also names its tokenizer, and means itself.

    Raises:
        WeightsError: Neither `model.type` nor `model.generator.model_type` says which.
    """
    declared = _declared(config)
    if not declared:
        known = ", ".join(sorted({f"{key}: {value}" for key, value in CLASSES}))
        raise WeightsError(f"the configuration does not say what model it is about: it needs one of {known}")
    return declared[-1]


class Pretrained:
    """What models with a `config` share: reading and writing their weights with their configuration."""

    config: DictConfig
    pipeline_tag: ClassVar[str] = "image-to-image"
    tags: ClassVar[tuple[str, ...]] = ("image-tokenization", "arxiv:2501.10064", "arxiv:2406.07550")

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
            WeightsError: The checkpoint is missing, damaged, of another class or of other sizes, or there is no
                configuration for it.
        """
        located = source if isinstance(source, Located) else locate(source)
        state = read_state_dict(located.weights)
        if config is None:
            config = located.config
            if config is None:
                raise WeightsError(_config_needed(cls, located))
            _check_own_config(cls, config, located, state)
        model = cls(lenient_config(config))
        load_strict(model, state, located.description)
        return model.to(device).eval()

    def save_pretrained(
        self, folder: str | os.PathLike, *, card: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write `config.json` (resolved), `model.safetensors` and a model card; `from_pretrained` reads them back.

        A new folder appears whole or not at all. In a folder that exists each file is replaced whole, the weights
        last, and other files stay.

        Args:
            card: Text of the model card below its title; a short description of the sizes when not given.
            dtype: Store floating-point weights in this precision, for example torch.float16; as they are by default.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise WeightsError(f"save_pretrained needs a folder, but {folder} is a file")
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = folder.parent / f".{folder.name}.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            (aside / CONFIG).write_text(json.dumps(to_plain(self.config), indent=2) + "\n", encoding="utf-8")
            (aside / CARD).write_text(_model_card(self, folder.resolve().name, card), encoding="utf-8")
            safetensors.torch.save_file(_to_store(self.state_dict(), dtype), aside / SAFETENSORS, {"format": "pt"})
            # safetensors lets the owner alone read; a folder to share is as readable as its other files.
            (aside / SAFETENSORS).chmod((aside / CONFIG).stat().st_mode & 0o777)
            if folder.exists():
                for name in (CONFIG, CARD, SAFETENSORS):
                    (aside / name).replace(folder / name)
            else:
                aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


# Finding


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
            return Located(weights, _config_of(candidate, *run), str(candidate))
    raise WeightsError(
        f"no weights in {folder}: expected {SAFETENSORS} or {PICKLE} in it, or a checkpoint-STEP/ema_model with one"
    )


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
    """Download the first of the weights files `names` that the repository has, and its configuration."""
    try:
        files = {file.rfilename for file in HfApi().model_info(repository, timeout=HUB_TIMEOUT).siblings}
        name = next((name for name in names if name in files), None)
        if name is None:
            raise WeightsError(
                f"{repository} on the hub holds no {' or '.join(names)}: it is not a model of this project"
            )
        weights = hf_hub_download(repository, name)
        config = hf_hub_download(repository, CONFIG) if CONFIG in files else None
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
        cached = {file: try_to_load_from_cache(repository, file) for file in [*names, CONFIG]}
        weights = next((cached[name] for name in names if isinstance(cached[name], str)), None)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if weights is None:
            raise WeightsError(
                f"{' or '.join(names)} of {repository} could not be fetched from the hub ({reason}) and is not in its "
                f"cache ({constants.HF_HUB_CACHE}): connect to the network, or copy its files into a folder and give "
                "that folder as the checkpoint"
            ) from error
        config = cached[CONFIG] if isinstance(cached[CONFIG], str) else None
        log.warning("The hub could not be reached (%s): using the cached copy of %s.", reason, repository)
    described = f"{repository}/{Path(weights).name} (hub)"
    # A published TiTok file stands beside others: a configuration in that repository would not be its own.
    if config is not None and repository != TITOK_REPOSITORY:
        return Located(Path(weights), _read_json(Path(config)), described)
    return Located(Path(weights), _project_config(project_config) if project_config else None, described)


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


# Reading


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


# Fitting


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _without_position_ids(state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in state.items()
        if name in expected or name.rsplit(".", maxsplit=1)[-1] != "position_ids"
    }


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
    fitting = _fitting_config(model_class, given)
    return f"they fit {fitting} (give that configuration)" if fitting else "nor any configuration of this project"


def _fitting_config(model_class: type, given: Mapping[str, tuple]) -> str | None:
    """The first configuration of this project whose model has exactly these names and shapes."""
    if not _is_known(model_class):
        return None
    for path in _project_configs():
        try:
            config = load_config(path)
            declared = _declared(config)
            if not any(issubclass(one, model_class) or issubclass(model_class, one) for one in declared):
                continue
            with torch.device("meta"):
                shapes = _shapes(model_class(config).state_dict())
        except UserError:  # a file that somebody is still writing must not hide the error at hand
            continue
        if shapes == given:
            return str(path.relative_to(ROOT))
    return None


def _project_configs() -> Iterator[Path]:
    for pattern in ("eval/*.yaml", "fashion/*.yaml", "training/**/*.yaml"):
        yield from sorted((ROOT / "configs").glob(pattern))


def _is_known(model_class: type) -> bool:
    return (model_class.__module__, model_class.__name__) in CLASSES.values()


def _declared(config: Mapping | DictConfig) -> list[type]:
    """The classes that a configuration says its checkpoint may hold."""
    config = lenient_config(config)
    return [
        getattr(importlib.import_module(module), name)  # here, because models import this file
        for (key, value), (module, name) in CLASSES.items()
        if OmegaConf.select(config, key) == value
    ]


def _check_own_config(model_class: type, config: Mapping, located: Located, state: Mapping[str, Tensor]) -> None:
    """The configuration found with weights must make this class, in their sizes."""
    try:
        _check_class(model_class, config, located)
        with torch.device("meta"):  # takes no memory, whatever sizes a foreign file claims
            model = model_class(lenient_config(config))
    except UserError:
        raise
    except Exception as error:  # it may hold anything in any place
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(
            f"the configuration with {located.description} describes no {model_class.__name__} ({reason}): fetch it "
            "again, or give the configuration of that model"
        ) from error
    check_fit(model, state, located.description)


def _check_class(model_class: type, config: Mapping, located: Located) -> None:
    """A checkpoint of a subclass may be loaded by its base class, not the other way round."""
    declared = _declared(config) if _is_known(model_class) else []
    if declared and not any(issubclass(one, model_class) for one in declared):
        holds = declared[-1]
        raise WeightsError(
            f"{located.description} holds a {holds.__name__}, not a {model_class.__name__}: load it with "
            f"{holds.__module__}.{holds.__name__}, or give the config of a {model_class.__name__}"
        )


def _config_needed(model_class: type, located: Located) -> str:
    state = read_state_dict(located.weights)
    fitting = _fitting_config(model_class, _shapes(_without_position_ids(state, {})))
    hint = f"it fits {fitting}" if fitting else "for example that of its training run"
    return f"{located.description} has no {CONFIG} beside it: give the configuration, {hint}"


# Writing


def _to_store(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Plain tensors of their own: safetensors takes neither views nor two names of one tensor."""
    stored = {}
    for name, value in state.items():
        value = value.detach().to("cpu", dtype if value.is_floating_point() else None, copy=True)
        stored[name.replace("_orig_mod.", "")] = value.contiguous()
    return stored


def _model_card(model: Pretrained, title: str, text: str | None) -> str:
    kind = type(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = OmegaConf.to_yaml(OmegaConf.create(to_plain(model.config).get("model", {}))).rstrip()
    text = text or f"A `{kind.__name__}` with {parameters:,} parameters.\n\n```yaml\n{sizes}\n```"
    tags = "\n".join(f"- {tag}" for tag in model.tags)
    return f"""---
license: apache-2.0
library_name: one-d-piece
pipeline_tag: {model.pipeline_tag}
tags:
{tags}
---

# {title}

{text.strip()}

## Use

```python
from {kind.__module__} import {kind.__name__}

model = {kind.__name__}.from_pretrained("{title}")  # this folder, or the name of the hub repository
```
"""
