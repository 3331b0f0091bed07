"""Entropy models with random weights, for the tests of the codec."""

import numpy as np

from codec.bitstream import Mode
from codec.entropy import CausalNetwork, EntropyModels, FixedBits, StaticTables

TOKENIZER = bytes(range(32))


def random_arrays(num_tokens=8, codebook_size=64, token_size=4, width=16, blocks=1, window=0, reach=0, seed=0):
    """Arrays of a network whose tokens matter to one another; every pair of positions has weights unless `window`."""
    draws = np.random.default_rng(seed)

    def weights(*shape):
        return draws.integers(-127, 128, shape).astype(np.int8)

    pairs = 0 if window else num_tokens * (num_tokens - 1) // 2
    return {
        "codes": weights(codebook_size, token_size),
        "pairs": weights(pairs, token_size, width),
        "near": weights(window, token_size, width),
        "far": weights(reach, token_size, width),
        "position_bias": draws.integers(-5000, 5000, (num_tokens, width)).astype(np.int32),
        "position_scale": draws.integers(50_000, 100_000, num_tokens).astype(np.int32),
        "hidden": weights(blocks, width, width),
        "hidden_bias": draws.integers(-5000, 5000, (blocks, num_tokens, width)).astype(np.int32),
        "hidden_scale": draws.integers(100_000, 200_000, blocks).astype(np.int32),
        "head": weights(width, codebook_size),
        "head_scale": draws.integers(300_000, 500_000, 1).astype(np.int32),
        "tables": weights(num_tokens, codebook_size),
        "table_of_position": np.arange(num_tokens).astype(np.uint16),
    }


def random_models(total_bits=14, **sizes):
    """All three models of a tokenizer that there is not."""
    arrays = random_arrays(**sizes)
    network = CausalNetwork(arrays, total_bits)
    tables = StaticTables(arrays["tables"], arrays["table_of_position"], total_bits)
    fixed = FixedBits(network.num_tokens, network.codebook_size)
    return EntropyModels(TOKENIZER, {Mode.FIXED: fixed, Mode.TABLES: tables, Mode.NETWORK: network})


def likely_tokens(model, num_images, seed=0):
    """Tokens (num_images, N) drawn from the model's own shares."""
    draws = np.random.default_rng(seed)
    tokens = np.zeros((num_images, 0), dtype=np.int64)
    for _ in range(model.num_tokens):
        ends = np.cumsum(model.frequencies(tokens), axis=1)
        targets = draws.integers(0, ends[:, -1:])
        tokens = np.concatenate([tokens, (ends <= targets).sum(axis=1, keepdims=True)], axis=1)
    return tokens
