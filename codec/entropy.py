"""What tokens cost: models that give each token its share of the bits, in integers alone, so that every machine agrees.

A tokenizer has up to three: fixed bits, tables by position, and a causal network. docs/format.md specifies them.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from codec.bitstream import (
    ENTROPY_BYTES,
    FREE_BYTES,
    MAX_TOKEN_BYTES,
    TOKENIZER_BYTES,
    TOKENS_PER_BYTE,
    FormatError,
    Geometry,
    Header,
    Mode,
    RangeDecoder,
    RangeEncoder,
    may_hold,
    pack,
    pack_bits,
    unpack,
    unpack_bits,
)
from utils.errors import UserError
from utils.files import replacing

FILE = "entropy.safetensors"
ABOUT = "entropy"  # the entry of its metadata
WEIGHTS = ("pairs", "near", "far")
VERSION = 1
ROWS = 64  # whose shares are computed at once
DAMAGED = "the payload is damaged: its tokens are not written so"
# Of the integer network: steps of a bit in tables and in logits, the largest value that a hidden unit starts from or
# gains, and the bits behind the point of its scales. All of them belong to the format.
TABLE_STEPS, LOGIT_STEPS = 16, 256
HIDDEN_LIMIT = 255
SCALE_BITS, MAX_SCALE = 24, 1 << 28
MAX_TOTAL_BITS = 24  # of all shares
MAX_SUM = 1 << 24  # integers below are exact in float32
UNKNOWN = -1  # in the place of a token that a cut payload does not tell


class EntropyModel:
    """How tokens (B, N) become bytes and bytes tokens. Prefixes need no end mark: their length stands elsewhere.

    Args:
        num_tokens: N, the most tokens that an image has.
        codebook_size: V; tokens are 0..V - 1.
        identity: SHA-256 of all that decides the shares, 32 bytes; zeros for fixed bits.
    """

    mode: Mode

    def __init__(self, num_tokens: int, codebook_size: int, identity: bytes):
        self.num_tokens, self.codebook_size, self.identity = num_tokens, codebook_size, identity

    def encode(self, tokens: np.ndarray) -> bytes:
        """The payload of one image's tokens (n,)."""
        return self.encode_batch(np.asarray(tokens)[None])[0]

    def decode(self, payload: bytes, num_tokens: int, *, is_whole: bool = True) -> tuple[np.ndarray, int]:
        """Tokens (num_tokens,) of one payload, and how many of them are certain. See `decode_batch`."""
        tokens, certain = self.decode_batch([payload], [num_tokens], is_whole=is_whole)
        return tokens[0], int(certain[0])

    def encode_batch(self, tokens: np.ndarray, lengths: Sequence[int] | None = None) -> list[bytes]:
        """A payload for each row of tokens (B, n): of its first `lengths` (B,) tokens, all n where not given."""
        raise NotImplementedError

    def decode_batch(
        self, payloads: Sequence[bytes], lengths: Sequence[int], *, is_whole: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (B, n) of each payload, and how many of each (B,) are certain.

        Args:
            lengths: How many tokens to read of each, (B,); n is the most of them.
            is_whole: Whether the payloads are all there. Then all tokens are certain; else reading ends where bytes
                that are not there could change the token, and what follows is `UNKNOWN`.

        Raises:
            FormatError: No encoder writes such a payload.
        """
        raise NotImplementedError

    def encode_tiles(self, tokens: np.ndarray, lengths: Sequence[int]) -> bytes:
        """One payload for the tiles of an image, (T, n) of `lengths` (T,).

        The first tokens of all tiles come first, then the second ones, so that a cut file shows all tiles less well.
        """
        raise NotImplementedError

    def decode_tiles(
        self, payload: bytes, lengths: Sequence[int], *, is_whole: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (T, n) of the tiles and how many of each (T,) are certain. Arguments as of `decode_batch`."""
        raise NotImplementedError

    def check_size(self, payload_size: int, num_tokens: int) -> None:
        """Refuse a whole payload of a size that so many tokens never take, before there is an array of them.

        Raises:
            FormatError: No encoder writes such a payload.
        """

    def prefix_bits(self, tokens: np.ndarray) -> np.ndarray:
        """Ideal bits of the first 1, 2, ..., n tokens of each row, (B, n) float, for tokens (B, n)."""
        raise NotImplementedError

    def prefix_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of the payloads of the first 1, 2, ..., n tokens of each row, (B, n) int, for tokens (B, n)."""
        raise NotImplementedError

    def tiles_bytes(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Bytes of what `encode_tiles` gives for tiles (T, n), (O,) int, for each way `lengths` (O, T) to cut them."""
        raise NotImplementedError


class FixedBits(EntropyModel):
    """As many bits for each token as the largest one needs: possible for all tokens."""

    mode = Mode.FIXED

    def __init__(self, num_tokens: int, codebook_size: int):
        super().__init__(num_tokens, codebook_size, bytes(32))
        self.width = (codebook_size - 1).bit_length()

    def encode_batch(self, tokens: np.ndarray, lengths: Sequence[int] | None = None) -> list[bytes]:
        lengths = [tokens.shape[1]] * len(tokens) if lengths is None else lengths
        return [pack_bits(row[:length].tolist(), self.width) for row, length in zip(tokens, lengths, strict=True)]

    def decode_batch(
        self, payloads: Sequence[bytes], lengths: Sequence[int], *, is_whole: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        tokens, certain = empty(lengths)
        for row, (payload, length) in enumerate(zip(payloads, lengths, strict=True)):
            part, certain[row : row + 1] = self.decode_tiles(payload, [length], is_whole=is_whole)
            tokens[row, :length] = part
        return tokens, certain

    def encode_tiles(self, tokens: np.ndarray, lengths: Sequence[int]) -> bytes:
        return pack_bits((int(tokens[tile, place]) for tile, place in interleaved(lengths)), self.width)

    def decode_tiles(
        self, payload: bytes, lengths: Sequence[int], *, is_whole: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        tokens, certain = empty(lengths)
        count = min(int(sum(lengths)), 8 * len(payload) // self.width)
        values = unpack_bits(payload, self.width, count)
        for value, (tile, place) in zip(values, interleaved(lengths), strict=False):
            tokens[tile, place] = value
            certain[tile] = place + 1
        if max(values, default=0) >= self.codebook_size:
            raise FormatError(f"the payload is damaged: token {max(values)} of a codebook of {self.codebook_size}")
        if is_whole and (len(values) < sum(lengths) or pack_bits(values, self.width) != payload):
            raise FormatError(DAMAGED)
        return tokens, certain

    def check_size(self, payload_size: int, num_tokens: int) -> None:
        if payload_size != -(-num_tokens * self.width // 8):
            raise FormatError(DAMAGED)

    def prefix_bits(self, tokens: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.width * np.arange(1.0, tokens.shape[1] + 1), tokens.shape)

    def prefix_bytes(self, tokens: np.ndarray) -> np.ndarray:
        return -(-self.prefix_bits(tokens).astype(np.int64) // 8)

    def tiles_bytes(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return -(-self.width * lengths.sum(axis=1, dtype=np.int64) // 8)


class RangeCoded(EntropyModel):
    """A model that gives every token its share, so that likely tokens cost less.

    Args:
        total_bits: The shares of all tokens add up to 2 ** total_bits.
    """

    def __init__(self, num_tokens: int, codebook_size: int, identity: bytes, total_bits: int):
        super().__init__(num_tokens, codebook_size, identity)
        if not 2 * codebook_size <= 1 << total_bits <= 1 << MAX_TOTAL_BITS:
            raise UserError(
                f"shares of {codebook_size} tokens in {total_bits} bits: they need 1 more, {MAX_TOTAL_BITS} at most"
            )
        self.total_bits = total_bits

    def frequencies(self, tokens_before: np.ndarray) -> np.ndarray:
        """Shares (B, V) int64 of the token that comes after tokens (B, p); each at least 1, all 2 ** total_bits."""
        raise NotImplementedError

    def encode_batch(self, tokens: np.ndarray, lengths: Sequence[int] | None = None) -> list[bytes]:
        lengths = [tokens.shape[1]] * len(tokens) if lengths is None else lengths
        encoders = [RangeEncoder() for _ in tokens]
        for _ in self._encoded(tokens, lengths, encoders):
            pass
        return [encoder.finish() for encoder in encoders]

    def encode_tiles(self, tokens: np.ndarray, lengths: Sequence[int]) -> bytes:
        encoder = RangeEncoder()
        for _ in self._encoded(tokens, lengths, [encoder] * len(tokens)):
            pass
        return encoder.finish()

    def decode_batch(
        self, payloads: Sequence[bytes], lengths: Sequence[int], *, is_whole: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        streams = [Stream(payload, is_whole) for payload in payloads]
        return self._decoded(streams, lengths)

    def decode_tiles(
        self, payload: bytes, lengths: Sequence[int], *, is_whole: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        return self._decoded([Stream(payload, is_whole)] * len(lengths), lengths)

    def prefix_bits(self, tokens: np.ndarray) -> np.ndarray:
        sizes = [self._intervals(tokens[:, : place + 1])[1] for place in range(tokens.shape[1])]
        return np.cumsum(self.total_bits - np.log2(np.stack(sizes, axis=1)), axis=1)

    def prefix_bytes(self, tokens: np.ndarray) -> np.ndarray:
        encoders = [RangeEncoder() for _ in tokens]
        steps = self._encoded(tokens, [tokens.shape[1]] * len(tokens), encoders)
        return np.array([[encoder.num_bytes() for encoder in encoders] for _ in steps]).T.reshape(tokens.shape)

    def tiles_bytes(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        intervals = [self._intervals(tokens[:, : place + 1]) for place in range(lengths.max())]
        return np.array([self._num_bytes(intervals, kept) for kept in lengths])

    def _num_bytes(self, intervals: Sequence[tuple[np.ndarray, np.ndarray]], lengths: np.ndarray) -> int:
        """Of tiles of `lengths` (T,), for the intervals (T,) of their tokens at each place."""
        encoder = RangeEncoder()
        for place, (starts, sizes) in enumerate(intervals[: lengths.max()]):
            there = lengths > place
            for start, size in zip(starts[there].tolist(), sizes[there].tolist(), strict=True):
                encoder.encode(start, size, self.total_bits)
        return encoder.num_bytes()

    def _intervals(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B,) shares before the last one of tokens (B, p + 1), and its own."""
        starts, sizes = [], []
        for chunk in chunks(tokens):
            shares = self.frequencies(chunk[:, :-1])
            last = chunk[:, -1:]
            ends = np.take_along_axis(np.cumsum(shares, axis=1), last, axis=1)[:, 0]
            sizes.append(np.take_along_axis(shares, last, axis=1)[:, 0])
            starts.append(ends - sizes[-1])
        return np.concatenate(starts), np.concatenate(sizes)

    def _encoded(self, tokens: np.ndarray, lengths: Sequence[int], encoders: Sequence[RangeEncoder]) -> Iterator[None]:
        """Write place after place of all rows (B, n), each into its encoder; stops after each place."""
        lengths = np.asarray(lengths)
        for place in range(max(lengths, default=0)):
            rows = np.flatnonzero(lengths > place)
            starts, sizes = self._intervals(tokens[rows, : place + 1])
            for row, start, size in zip(rows.tolist(), starts.tolist(), sizes.tolist(), strict=True):
                encoders[row].encode(start, size, self.total_bits)
            yield

    def _decoded(self, streams: Sequence["Stream"], lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (B, n) of rows and how many are certain (B,), read place after place, each from its stream."""
        tokens, certain = empty(lengths)
        for place in range(tokens.shape[1]):
            for rows in chunks(np.flatnonzero(np.asarray(lengths) > place)):
                rows = [row for row in rows.tolist() if not streams[row].ended]
                if not rows:
                    continue
                ends = np.cumsum(self.frequencies(tokens[rows, :place]), axis=1)
                for row, row_ends in zip(rows, ends, strict=True):
                    tokens[row, place] = streams[row].read(row_ends, self.total_bits)
                    certain[row] += tokens[row, place] != UNKNOWN
        for stream in set(streams):
            stream.close()
        return tokens, certain


class StaticTables(RangeCoded):
    """Shares that depend on the position alone.

    Args:
        tables: Logits (G, V) int8, `TABLE_STEPS` a bit.
        table_of_position: (N,), which of the tables a position takes.
    """

    mode = Mode.TABLES

    def __init__(self, tables: np.ndarray, table_of_position: np.ndarray, total_bits: int):
        identity = identity_of("tables", total_bits, {"tables": tables, "table_of_position": table_of_position})
        super().__init__(len(table_of_position), tables.shape[1], identity, total_bits)
        self.tables, self.table_of_position = tables, table_of_position
        self._shares = shares(table_logits(tables), total_bits)

    def frequencies(self, tokens_before: np.ndarray) -> np.ndarray:
        table = self._shares[self.table_of_position[tokens_before.shape[1]]]
        return np.broadcast_to(table, (len(tokens_before), self.codebook_size))


class CausalNetwork(RangeCoded):
    """Shares from a small network that sees all tokens before: h = relu(b_p + sum of A_pq e(t_q)), h += relu(W h + c_p)
    once a block, logits = H h + table_p. Weights and activations are integers of 8 bits.

    Args:
        arrays: As docs/format.md names them.
    """

    mode = Mode.NETWORK

    def __init__(self, arrays: Mapping[str, np.ndarray], total_bits: int):
        num_tokens, codebook_size = len(arrays["position_bias"]), len(arrays["codes"])
        super().__init__(num_tokens, codebook_size, identity_of("network", total_bits, arrays), total_bits)
        check_sums(arrays)
        self.arrays = arrays
        self._tables = table_logits(arrays["tables"])
        # A float32 product of integers is exact where no sum can reach 2 ** 24; `check_sums` has seen to it.
        self._codes = arrays["codes"].astype(np.float32)
        self._pairs, self._near, self._far = (
            arrays[name].reshape(-1, arrays[name].shape[-1]).astype(np.float32) for name in ("pairs", "near", "far")
        )
        self._hidden, self._head = arrays["hidden"].astype(np.float32), arrays["head"].astype(np.float32)
        self._position_bias, self._hidden_bias = (
            arrays[name].astype(np.int64) for name in ("position_bias", "hidden_bias")
        )
        self._position_scale, self._hidden_scale, self._head_scale = (
            arrays[name].tolist() for name in ("position_scale", "hidden_scale", "head_scale")
        )

    def frequencies(self, tokens_before: np.ndarray) -> np.ndarray:
        return shares(self.logits(tokens_before), self.total_bits)

    def logits(self, tokens_before: np.ndarray) -> np.ndarray:
        """(B, V) int64, `LOGIT_STEPS` a bit, of the token after tokens (B, p)."""
        position = tokens_before.shape[1]
        sums = self._position_bias[position]
        for tokens, weights in self._terms(tokens_before):
            sums = sums + product(self._codes[tokens].reshape(len(tokens), -1), weights)
        hidden = clamped(np.broadcast_to(sums, (len(tokens_before), len(self._head))), self._position_scale[position])
        for weights, bias, scale in zip(self._hidden, self._hidden_bias, self._hidden_scale, strict=True):
            sums = product(hidden.astype(np.float32), weights) + bias[position]
            hidden = hidden + clamped(sums, scale)
        sums = product(hidden.astype(np.float32), self._head)
        return rescaled(sums, self._head_scale[0]) + self._tables[self.arrays["table_of_position"][position]]

    def _terms(self, tokens_before: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens (B, k) and the weights (k * D, W) that their codes are multiplied with."""
        position, size = tokens_before.shape[1], self._codes.shape[1]
        if len(self._pairs):
            first = position * (position - 1) // 2
            yield tokens_before, self._pairs[first * size : (first + position) * size]
            return
        window, reach = len(self._near) // size, len(self._far) // size
        split = max(0, position - window)
        yield tokens_before[:, split:], self._near[len(self._near) - (position - split) * size :]
        yield tokens_before[:, : min(split, reach)], self._far[: min(split, reach) * size]


def check_sums(arrays: Mapping[str, np.ndarray]) -> None:
    """Whether the network's sums stay where float32 and JavaScript's numbers are exact."""
    largest = np.abs(arrays["codes"].astype(np.int64)).max(axis=0, initial=0)  # (D,)
    reach = {name: np.einsum("d,mdw->mw", largest, np.abs(arrays[name].astype(np.int64))) for name in WEIGHTS}
    firsts = np.cumsum(np.arange(len(arrays["position_bias"])))  # of each position's pairs
    contexts = [reach["near"].sum(axis=0) + reach["far"].sum(axis=0)]
    contexts += [part.sum(axis=0) for part in np.split(reach["pairs"], firsts)] if len(reach["pairs"]) else []
    layers = [*arrays["hidden"], arrays["head"]]
    sums = [
        HIDDEN_LIMIT * (1 + layer) * np.abs(weights.astype(np.int64)).sum(axis=0)
        for layer, weights in enumerate(layers)
    ]
    scales = np.concatenate([arrays[name] for name in ("position_scale", "hidden_scale", "head_scale")])
    biases = np.concatenate([arrays["position_bias"], *arrays["hidden_bias"]])
    if max(map(np.max, contexts + sums)) >= MAX_SUM or np.abs(biases.astype(np.int64)).max() >= MAX_SUM:
        raise UserError(f"the sums of an entropy network must stay below {MAX_SUM}: fit it with smaller weights")
    if scales.min() < 1 or scales.max() >= MAX_SCALE:
        raise UserError(f"the scales of an entropy network must be in 1..{MAX_SCALE - 1}: fit it again")


def product(integers: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The matrix product of integers held in float32, as int64."""
    return (integers @ weights).astype(np.int64)


def rescaled(sums: np.ndarray, scale: int) -> np.ndarray:
    """sums * scale / 2 ** SCALE_BITS, rounded, halves up."""
    return (sums * scale + (1 << (SCALE_BITS - 1))) >> SCALE_BITS


def clamped(sums: np.ndarray, scale: int) -> np.ndarray:
    return np.minimum(np.maximum(rescaled(sums, scale), 0), HIDDEN_LIMIT)  # much faster than clip


def table_logits(tables: np.ndarray) -> np.ndarray:
    return tables.astype(np.int64) * (LOGIT_STEPS // TABLE_STEPS)


def shares(logits: np.ndarray, total_bits: int) -> np.ndarray:
    """Shares (B, V) int64 in proportion to 2 ** (logits / 256): each at least 1, all 2 ** total_bits."""
    below = logits.max(axis=1, keepdims=True) - logits
    weights = EXP2[below & 255] >> np.minimum(below >> 8, 31)
    spread = (1 << total_bits) - logits.shape[1]
    result = 1 + weights * spread // weights.sum(axis=1, keepdims=True)
    # What rounding has left goes to the likeliest, the first of them.
    rows = np.arange(len(result))
    result[rows, below.argmin(axis=1)] += (1 << total_bits) - result.sum(axis=1)
    return result


def exp2_table() -> np.ndarray:
    """floor(2 ** (20 - i / 256)) for i of 0..255, by integer square roots."""
    table = []
    for place in range(256):
        root = 1 << (256 * 20 - place)
        for _ in range(8):  # the 256th root
            root = math.isqrt(root)
        table.append(root)
    return np.array(table, dtype=np.int64)


EXP2 = exp2_table()


def identity_of(kind: str, total_bits: int, arrays: Mapping[str, np.ndarray]) -> bytes:
    """SHA-256 of all that decides a model's shares."""
    digest = hashlib.sha256(f"{kind} {total_bits}".encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\n{name} {array.dtype.newbyteorder('<').str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    return digest.digest()


class Stream:
    """A payload being read.

    Args:
        is_whole: As of `EntropyModel.decode_batch`. A whole payload is written again, and must come out the same.
    """

    def __init__(self, payload: bytes, is_whole: bool):
        self.payload, self.decoder = payload, RangeDecoder(payload)
        self.encoder = RangeEncoder() if is_whole else None
        self.ended = False

    def read(self, ends: np.ndarray, total_bits: int) -> int:
        """The next token, whose share ends at `ends` (V,); `UNKNOWN` where it is not certain."""
        if self.ended:
            return UNKNOWN
        token = int(np.searchsorted(ends, self.decoder.target(total_bits), side="right"))
        start = int(ends[token - 1]) if token else 0
        size = int(ends[token]) - start
        self.decoder.consume(start, size, total_bits)
        if self.encoder:
            self.encoder.encode(start, size, total_bits)
        elif not self.decoder.certain:
            self.ended = True
            return UNKNOWN
        return token

    def close(self) -> None:
        if self.encoder and self.encoder.finish() != self.payload:
            raise FormatError(DAMAGED)


def empty(lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Unknown tokens (B, n) and as many zeros (B,)."""
    return np.full((len(lengths), max(lengths, default=0)), UNKNOWN), np.zeros(len(lengths), dtype=np.int64)


def chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Rows in parts that keep the tables of shares small."""
    yield from (rows[first : first + ROWS] for first in range(0, len(rows), ROWS))


def interleaved(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(tile, place) of the tokens of tiles in the order of a payload."""
    for place in range(max(lengths)):
        for tile, length in enumerate(lengths):
            if place < length:
                yield tile, place


@dataclass(frozen=True)
class EntropyModels:
    """All entropy models of one tokenizer.

    Args:
        tokenizer: Its identity, 32 bytes.
    """

    tokenizer: bytes
    by_mode: dict[Mode, EntropyModel]

    @property
    def num_tokens(self) -> int:
        return self.by_mode[Mode.FIXED].num_tokens

    @property
    def codebook_size(self) -> int:
        return self.by_mode[Mode.FIXED].codebook_size

    def best(self) -> EntropyModel:
        """The one that is expected to be the smallest."""
        return self.by_mode[max(self.by_mode)]

    def of(self, header: Header) -> EntropyModel:
        """The model that wrote a file.

        Raises:
            FormatError: Another tokenizer or entropy model did.
        """
        if header.tokenizer != self.tokenizer[:TOKENIZER_BYTES]:
            raise FormatError(
                f"the file was written with the tokenizer {header.tokenizer.hex()}, and this is "
                f"{self.tokenizer[:TOKENIZER_BYTES].hex()}: give the other one as the model"
            )
        model = self.by_mode.get(header.mode)
        if model is None or header.entropy != model.identity[:ENTROPY_BYTES]:
            ours = f"it has {model.identity[:ENTROPY_BYTES].hex()}" if model else "it has none of that kind"
            raise FormatError(
                f"the header is damaged, or the file was written with the entropy model {header.mode.name.lower()} "
                f"{header.entropy.hex()} of this tokenizer, and {ours} now: read it with the version that wrote it"
            )
        return model


def entropy_models_of(
    folder: str | os.PathLike | None, tokenizer: bytes, num_tokens: int, codebook_size: int
) -> EntropyModels:
    """The entropy models that stand in a tokenizer's folder; fixed bits alone where there are none.

    Args:
        tokenizer: Its identity, 32 bytes.

    Raises:
        UserError: They are damaged, or belong to another tokenizer.
    """
    path = Path(folder or "") / FILE
    if folder is None or not path.is_file():
        return EntropyModels(tokenizer, {Mode.FIXED: FixedBits(num_tokens, codebook_size)})
    models = load_entropy_models(path)
    wanted = (tokenizer.hex(), num_tokens, codebook_size)
    found = (models.tokenizer.hex(), models.num_tokens, models.codebook_size)
    if found != wanted:
        raise UserError(
            f"{path} belongs to another tokenizer: to {found[0][:12]} of {found[1]} tokens and {found[2]} codes, and "
            f"this is {wanted[0][:12]} of {wanted[1]} and {wanted[2]}: fit it again with scripts/fit_entropy_model.py"
        )
    return models


def save_entropy_models(path: str | os.PathLike, tokenizer: bytes, model: StaticTables | CausalNetwork) -> None:
    """Write a network with its tables, or tables alone, for the tokenizer of an identity."""
    arrays = model.arrays if isinstance(model, CausalNetwork) else tables_alone(model)
    about = {"version": VERSION, "tokenizer": tokenizer.hex(), "total_bits": model.total_bits}
    with replacing(path) as aside:
        # One entry, as safetensors writes several in any order.
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, aside, {ABOUT: json.dumps(about)}
        )
        aside.chmod(0o644)


def load_entropy_models(path: str | os.PathLike) -> EntropyModels:
    """The entropy models of a file that `save_entropy_models` wrote, and fixed bits.

    Raises:
        UserError: It is no such file, or a damaged one.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})[ABOUT])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["version"] != VERSION:
            raise UserError(
                f"{path} is of version {about['version']}, and this reads version {VERSION}: update the code"
            )
        check_arrays(arrays)
        tokenizer, total_bits = bytes.fromhex(about["tokenizer"]), about["total_bits"]
        tables = StaticTables(arrays["tables"], arrays["table_of_position"], total_bits)
        by_mode = {Mode.FIXED: FixedBits(tables.num_tokens, tables.codebook_size), Mode.TABLES: tables}
        if len(arrays) > len(tables_alone(tables)):
            by_mode[Mode.NETWORK] = CausalNetwork(arrays, total_bits)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged or holds no entropy models ({error!r}): fetch or fit it again") from error
    return EntropyModels(tokenizer, by_mode)


def tables_alone(model: StaticTables) -> dict[str, np.ndarray]:
    return {"tables": model.tables, "table_of_position": model.table_of_position}


def check_arrays(arrays: Mapping[str, np.ndarray]) -> None:
    """Whether names, types and shapes are those of a network with tables, or of tables alone."""
    num_tokens, (num_tables, codebook_size) = len(arrays["table_of_position"]), arrays["tables"].shape
    expected = {"table_of_position": (np.uint16, (num_tokens,)), "tables": (np.int8, (num_tables, codebook_size))}
    if len(arrays) > len(expected):
        token_size, width = arrays["codes"].shape[1], arrays["head"].shape[0]
        blocks, num_near, num_far = len(arrays["hidden"]), len(arrays["near"]), len(arrays["far"])
        num_pairs = 0 if num_near else num_tokens * (num_tokens - 1) // 2
        expected |= {
            "codes": (np.int8, (codebook_size, token_size)),
            "pairs": (np.int8, (num_pairs, token_size, width)),
            "near": (np.int8, (num_near, token_size, width)),
            "far": (np.int8, (num_far, token_size, width)),
            "position_bias": (np.int32, (num_tokens, width)),
            "position_scale": (np.int32, (num_tokens,)),
            "hidden": (np.int8, (blocks, width, width)),
            "hidden_bias": (np.int32, (blocks, num_tokens, width)),
            "hidden_scale": (np.int32, (blocks,)),
            "head": (np.int8, (width, codebook_size)),
            "head_scale": (np.int32, (1,)),
        }
    found = {name: (array.dtype.type, array.shape) for name, array in arrays.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise UserError(f"entropy models must hold {expected.get(wrong[0])} as {wrong[0]}, got {found.get(wrong[0])}")
    if num_tables == 0 or num_tokens == 0 or arrays["table_of_position"].max() >= num_tables:
        raise UserError(f"table_of_position must name one of {num_tables} tables for each position")


@dataclass(frozen=True)
class TokensRead:
    """The tokens of a file.

    Args:
        tokens: (T, n) of the tiles, (1, n) of one image; `UNKNOWN` after a tile's last certain token.
        certain: (T,), how many of each are there.
        header_size, payload_size: In bytes, as the file has them.
        is_cut: Whether bytes are missing behind. The check could then not be verified.
    """

    header: Header
    tokens: np.ndarray
    certain: np.ndarray
    header_size: int
    payload_size: int
    is_cut: bool


def write_tokens(
    tokens: np.ndarray, models: EntropyModels, geometry: Geometry | None = None, mode: Mode | None = None
) -> bytes:
    """A file of tokens: (n,) of one image, or (T, N) of the tiles that `geometry` gives with their lengths.

    Args:
        mode: The smallest file's, where not given.

    Raises:
        UserError: The payload of that mode would be so small that no reader would take it for so many tokens.
    """
    tokens = np.atleast_2d(tokens)
    lengths = geometry.tiles.lengths if geometry and geometry.tiles else [tokens.shape[1]]
    files = []
    for tried in models.by_mode if mode is None else [mode]:
        model = models.by_mode[tried]
        payload = model.encode_tiles(tokens, lengths)
        if may_hold(tried, len(payload), sum(lengths)):
            identities = models.tokenizer[:TOKENIZER_BYTES], model.identity[:ENTROPY_BYTES]
            files.append(pack(Header(tried, *identities, max(lengths), len(payload), geometry), payload))
        elif mode is not None:
            raise UserError(
                f"{len(payload)} bytes of the mode {mode.name.lower()} may not hold {sum(lengths)} tokens: leave the "
                "mode out"
            )
    return min(files, key=len)


def read_tokens(data: bytes, models: EntropyModels, num_tokens: int | None = None) -> TokensRead:
    """The tokens of a file, or of what is left of a cut one.

    Args:
        num_tokens: The most to read of each tile; all where not given.

    Raises:
        UserError: `num_tokens` is under 1.
        FormatError: The bytes are no file of these models, are damaged, or end within the header.
    """
    if num_tokens is not None and num_tokens < 1:
        raise UserError(f"tokens to read must be 1 or more, got {num_tokens}: leave the number out to read all")
    file = unpack(data)
    model = models.of(file.header)
    if file.header.num_tokens > model.num_tokens:
        raise FormatError(f"the file is damaged: {file.header.num_tokens} tokens, and an image has {model.num_tokens}")
    most = file.header.num_tokens if num_tokens is None else num_tokens
    if file.is_cut:  # what a few bytes may hold, whatever their header says
        room = TOKENS_PER_BYTE * (len(file.payload) + FREE_BYTES)
        most = min(most, room // len(file.header.lengths) + 1)
    else:
        model.check_size(len(file.payload), sum(file.header.lengths))
    lengths = [min(length, most) for length in file.header.lengths]
    reads_all = lengths == list(file.header.lengths)
    payload = file.payload
    if not file.is_cut and not reads_all:
        payload += bytes(MAX_TOKEN_BYTES * sum(lengths))  # zeros follow a whole payload: that is certain
    is_whole = not file.is_cut and reads_all
    tokens, certain = model.decode_tiles(payload, lengths, is_whole=is_whole)
    if file.is_cut and reads_all and certain.tolist() == lengths:
        raise FormatError("the file is damaged: it is shorter than its header says, and no token is missing")
    return TokensRead(file.header, tokens, certain, len(data) - len(file.payload), len(file.payload), file.is_cut)
