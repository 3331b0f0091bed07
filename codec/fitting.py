"""From a token set to an entropy model of integers: the tables by position, and a trained network rounded to 8 bits."""

import json
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from codec.entropy import HIDDEN_LIMIT, LOGIT_STEPS, SCALE_BITS, TABLE_STEPS, CausalNetwork, StaticTables
from data.batches import FaultLog
from data.catalogue import Catalogue, CentreCrop, Part, check_skipped, decoded
from data.token_loader import check_token_sets, token_loaders
from data.token_sets import TOKENS
from modeling.causal_network import CausalTokenNetwork
from modeling.identity import identities, identity
from modeling.tasks.entropy import EntropyTask
from modeling.titok import TiTok
from utils.checkpoint import WEIGHTS_FILE, checkpoints
from utils.errors import UserError
from utils.files import sha256_of, write_json
from utils.lock import FolderLock
from utils.training.loop import make_accelerator, train

BATCH = 64  # images at a time
MAX_TABLES = 32  # positions beyond share them, so that 256 positions of 4,096 codes fit into a megabyte
NUM_ROUNDING = 2000  # images that tell the range of the hidden units
PRIOR_WEIGHT = 30  # images, that the frequencies over all positions count for at each
SUBJECT = "subject.json"  # beside a training: what it is of
FREQUENCY_BITS = 8  # of the shares, beyond those of the codebook: the least share of 1 then costs 0.006 bits a token


def fit(config: DictConfig, tokenizer: TiTok) -> CausalNetwork:
    """Train a network on the token set that the configuration names, in its output folder, and round it.

    Args:
        config: That of configs/entropy.yaml.

    Raises:
        DataError: The token set is missing, damaged, or made by another tokenizer.
        UserError: The output folder holds the training of another tokenizer or token set.
    """
    check_token_sets(config, identities(tokenizer), config.experiment.tokenizer_checkpoint)
    training, evaluation = token_loaders(config, rank=0, world_size=1)
    token_set = training(0).token_set
    subject = {"tokenizer": identity(tokenizer), "token set": sha256_of(token_set.folder / TOKENS)}
    check_subject(Path(config.experiment.output_dir), subject)
    parts = (token_set.tokens[:, variant] for variant in range(token_set.num_variants))
    tables = fitted_tables(parts, tokenizer.num_latent_tokens, tokenizer.codebook_size)
    with torch.no_grad():
        codes = tokenizer.quantize.lookup(torch.arange(tokenizer.codebook_size))
    config.experiment.max_train_examples = len(token_set)
    train(EntropyTask(config, codes, log_tables(tables)), config, make_accelerator(config), training, evaluation)
    network = CausalTokenNetwork.from_pretrained(config.experiment.output_dir)
    some = token_set.tokens[:NUM_ROUNDING, 0].astype(np.int64)
    return rounded(network, tables, torch.from_numpy(some))


def check_subject(folder: Path, subject: dict[str, str]) -> None:
    """Write beside a new training what it is of, and refuse to go on with one of something else.

    Args:
        subject: Hashes of what is trained on.

    Raises:
        UserError: The folder holds the training of something else.
    """
    path = folder / SUBJECT
    with FolderLock(folder):
        if not checkpoints(folder) and not (folder / WEIGHTS_FILE).exists():  # a training that failed to begin is none
            write_json(path, subject)
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, value in subject.items():
        if there.get(name) != value:
            raise UserError(
                f"{folder} holds the training of another {name} ({there.get(name, 'unknown')[:12]}, and this is "
                f"{value[:12]}): give another --output_dir, or delete that folder"
            )


def fitted_tables(tokens: Iterable[np.ndarray], num_tokens: int, codebook_size: int) -> StaticTables:
    """The tables of tokens, given in parts (n, N)."""
    counts = np.zeros((num_tokens, codebook_size), dtype=np.int64)
    for part in tokens:
        for position in range(num_tokens):
            counts[position] += np.bincount(part[:, position], minlength=codebook_size)
    table_of_position = shared_tables(num_tokens)
    grouped = np.zeros((table_of_position.max() + 1, codebook_size))
    np.add.at(grouped, table_of_position, counts)
    everywhere = counts.sum(axis=0) + 1
    grouped += PRIOR_WEIGHT * everywhere / everywhere.sum()
    bits = np.log2(grouped / grouped.max(axis=1, keepdims=True))  # below the likeliest
    tables = np.rint(bits * TABLE_STEPS).clip(-255, 0) + 127
    return StaticTables(tables.astype(np.int8), table_of_position, total_bits(codebook_size))


def shared_tables(num_tokens: int) -> np.ndarray:
    """(N,) the table of each position: the first ones have their own, as they say most; the others share evenly."""
    if num_tokens <= MAX_TABLES:
        return np.arange(num_tokens, dtype=np.uint16)
    alone = MAX_TABLES // 2
    later = np.arange(num_tokens - alone) * (MAX_TABLES - alone) // (num_tokens - alone)
    return np.concatenate([np.arange(alone), alone + later]).astype(np.uint16)


def total_bits(codebook_size: int) -> int:
    return (codebook_size - 1).bit_length() + FREQUENCY_BITS


def log_tables(tables: StaticTables) -> Tensor:
    """Logits (N, V) in nats, float32, of the tables as the integer network adds them."""
    steps = torch.from_numpy(tables.tables[tables.table_of_position].astype(np.float32))
    return steps / TABLE_STEPS * math.log(2)


@torch.no_grad()
def rounded(network: CausalTokenNetwork, tables: StaticTables, tokens: Tensor) -> CausalNetwork:
    """The network in integers of 8 bits.

    Args:
        tokens: (n, N), which the range of the hidden units is taken from.
    """
    codes, code_unit = to_int8(network.codes)
    num_tokens, width = network.position_bias.shape
    unit = float(activations(network, tokens).max()) / HIDDEN_LIMIT
    arrays = {"codes": codes, "pairs": empty(codes, width), "near": empty(codes, width), "far": empty(codes, width)}
    if network.window:
        size = len(network.near)
        shared, matrix_unit = to_int8(torch.cat([network.near, network.far]))
        arrays |= {"near": shared[:size], "far": shared[size:]}
        units = np.full(num_tokens, matrix_unit * code_unit)
    else:
        parts = [to_int8(network.pairs[:position, :, position]) for position in range(num_tokens)]
        arrays["pairs"] = np.concatenate([matrices for matrices, _ in parts])
        units = np.array([matrix_unit * code_unit for _, matrix_unit in parts])
    hidden, hidden_units = zip(*map(to_int8, network.hidden), strict=True)
    head, head_unit = to_int8(network.head)
    arrays |= {
        "position_bias": to_int32(network.position_bias.numpy() / units[:, None]),
        "position_scale": to_scale(units / unit),
        "hidden": np.stack(hidden),
        "hidden_bias": to_int32(network.hidden_bias.numpy() / (np.array(hidden_units) * unit)[:, None, None]),
        "hidden_scale": to_scale(np.array(hidden_units)),
        "head": head,
        "head_scale": to_scale(np.array([head_unit * unit * LOGIT_STEPS / math.log(2)])),
        "tables": tables.tables,
        "table_of_position": tables.table_of_position,
    }
    return CausalNetwork(arrays, tables.total_bits)


def activations(network: CausalTokenNetwork, tokens: Tensor) -> Tensor:
    """The largest value of a hidden unit before the blocks, and of what each block adds."""
    hidden = torch.relu(network.contexts(tokens) + network.position_bias)
    largest = [hidden.max()]
    for weight, bias in zip(network.hidden, network.hidden_bias, strict=True):
        added = torch.relu(hidden @ weight + bias)
        hidden = hidden + added
        largest.append(added.max())
    return torch.stack(largest)


def to_int8(values: Tensor) -> tuple[np.ndarray, float]:
    """Values in -127..127, and what one of them stands for."""
    unit = float(values.abs().max()) / 127 if values.numel() else 1.0
    return (values / unit).round().to(torch.int8).numpy(), unit


def to_int32(values: np.ndarray) -> np.ndarray:
    return np.rint(values).astype(np.int32)


def to_scale(factors: np.ndarray) -> np.ndarray:
    """Factors as the integer network multiplies with them."""
    return np.rint(factors * 2**SCALE_BITS).astype(np.int32)


def empty(codes: np.ndarray, width: int) -> np.ndarray:
    return np.zeros((0, codes.shape[1], width), dtype=np.int8)


def training_images(config: DictConfig, num_images: int) -> Iterator[Tensor]:
    """Batches (B, 3, P, P) uint8 of training images, cropped as those to be compressed; as many of every shard.

    Raises:
        DataError: The images are not there, or too many of them are broken.
    """
    parts = Catalogue(config, "train", CentreCrop(config.dataset.preprocessing)).parts
    faults, num_read = FaultLog(strict=False), 0
    for part in parts:
        some = first_images(part, -(-num_images // len(parts)))
        for examples in decoded(some, batch_size=BATCH, num_threads=1, faults=faults):
            num_read += len(examples)
            yield torch.cat([example.image for example in examples])
    check_skipped(num_read, [str(fault) for fault in faults.take()], config.dataset.get("max_bad_fraction", 0.01))


def first_images(part: Part, count: int) -> Part:
    return part._replace(jobs=lambda faults: islice(part.jobs(faults), count))
