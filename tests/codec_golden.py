"""Writes a set of golden files, once for a version of the format, and what a set lacks of a new bundled tokenizer.

    python3 -m tests.codec_golden tests/golden/v1
    python3 -m tests.codec_golden tests/golden/v1 --keep one-d-piece_fashion    # before another takes its place

Files are never written again: they must decode for ever.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from codec.bitstream import Fit, Geometry, Mode, Tiles, unpack
from codec.entropy import FILE, EntropyModels, load_entropy_models, read_tokens, save_entropy_models, write_tokens
from tests.codec_data import TOKENIZER, likely_tokens, random_models
from utils.paths import ROOT

VECTORS = "vectors.json"
STORES = {
    "pairs": {"num_tokens": 8, "codebook_size": 64, "token_size": 4, "width": 16},
    "shared": {
        "num_tokens": 12,
        "codebook_size": 50,
        "token_size": 4,
        "width": 16,
        "blocks": 2,
        "window": 3,
        "reach": 4,
    },
}
BUNDLED = ("one-d-piece_fashion", "one-d-piece_emoji")
GEOMETRIES = {
    "plain": None,
    "crop": Geometry(640, 480, Fit.CROP, orientation=6),
    "pad": Geometry(28, 28, Fit.PAD),
    "stretch": Geometry(65535, 1, Fit.STRETCH, orientation=8),
    "tile": Geometry(100, 60, Fit.TILE, tiles=Tiles(4, 2, (1, 2, 3, 8, 8, 5, 4, 1))),
    "even": Geometry(64, 40, Fit.TILE, tiles=Tiles(2, 2, (5, 5, 5, 5))),
}


def path_of(store: str, folder: Path) -> Path:
    """The entropy models of a golden store: in the set's folder, or of a bundled tokenizer."""
    own = folder / f"{store}.safetensors"
    return own if own.is_file() else ROOT / "assets/models" / store / FILE


def models_of(store: str, folder: Path) -> EntropyModels:
    return load_entropy_models(path_of(store, folder))


def read_vectors(folder: Path) -> dict:
    path = folder / VECTORS
    return json.loads(path.read_text()) if path.is_file() else {"files": {}, "shares": {}}


def write_vectors(folder: Path, vectors: dict) -> None:
    text = json.dumps(vectors, separators=(",", ":")).replace('},"', '},\n"').replace("},{", "},\n{")
    (folder / VECTORS).write_text(text + "\n")


def described(data: bytes, models: EntropyModels) -> dict:
    """What a reader must find in a file, whole and cut to each size."""
    header, read = unpack(data).header, read_tokens(data, models)
    sizes = range(read.header_size, len(data))
    return {
        "hex": data.hex(),
        "mode": header.mode.name.lower(),
        "entropy": header.entropy.hex(),
        "geometry": header.geometry
        and [header.geometry.fit.name.lower(), header.geometry.width, header.geometry.height],
        "orientation": header.geometry and header.geometry.orientation,
        "tokens": [row[:length].tolist() for row, length in zip(read.tokens, header.lengths, strict=True)],
        "certain_when_cut": [read_tokens(data[:size], models).certain.tolist() for size in sizes],
    }


def examples(models: EntropyModels, geometry: Geometry | None, mode: Mode, seed: int) -> bytes:
    count = len(geometry.tiles.lengths) if geometry and geometry.tiles else 1
    tokens = likely_tokens(models.by_mode[Mode.NETWORK], count, seed)
    most = max(geometry.tiles.lengths) if geometry and geometry.tiles else models.num_tokens
    return write_tokens(tokens[:, :most], models, geometry, mode)


def frequencies_of(models: EntropyModels) -> list[dict]:
    """Logits and shares of the network after none, a few and nearly all tokens."""
    network = models.by_mode[Mode.NETWORK]
    tokens = likely_tokens(network, 1, seed=9)
    return [
        {
            "after": tokens[0, :place].tolist(),
            "logits": network.logits(tokens[:, :place])[0].tolist(),
            "shares": network.frequencies(tokens[:, :place])[0].tolist(),
        }
        for place in (0, 1, network.num_tokens // 2, network.num_tokens - 1)
    ]


def add_missing(folder: Path) -> None:
    """Files of every store that has none: all of a new set, a new bundled tokenizer's of one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    vectors = read_vectors(folder)
    present = {case["store"] for case in vectors["files"].values()}
    for store in [store for store in (*STORES, *BUNDLED) if store not in present]:
        if store in STORES:
            network = random_models(**STORES[store]).by_mode[Mode.NETWORK]
            save_entropy_models(folder / f"{store}.safetensors", TOKENIZER, network)
        models = models_of(store, folder)
        vectors["shares"] |= {store: frequencies_of(models)} if store in STORES else {}
        for name, geometry in GEOMETRIES.items():
            for mode in Mode:
                data = examples(models, geometry, mode, seed=len(vectors["files"]))
                file = f"{store}_{name}_{mode.name.lower()}.1dp"
                (folder / file).write_bytes(data)
                vectors["files"][file] = {"store": store, **described(data, models)}
    write_vectors(folder, vectors)


def keep(folder: Path, store: str) -> None:
    """Name a bundled tokenizer's files by its identity too, and keep its entropy models beside them."""
    kept = f"{store}-{models_of(store, folder).tokenizer[:2].hex()}"
    shutil.copy(path_of(store, folder), folder / f"{kept}.safetensors")
    vectors = read_vectors(folder)
    files = {}
    for file, case in vectors["files"].items():
        if case["store"] == store:
            new = file.replace(store, kept)
            (folder / file).rename(folder / new)
            file, case = new, case | {"store": kept}
        files[file] = case
    write_vectors(folder, vectors | {"files": files})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", choices=BUNDLED, help="a bundled tokenizer whose files and entropy models stay")
    args = parser.parse_args()
    if args.keep:
        keep(args.folder, args.keep)
    else:
        add_missing(args.folder)


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
