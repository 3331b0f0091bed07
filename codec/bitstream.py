"""The bytes of a compressed file: range coder, packed bits and header. docs/format.md is its specification.

Bytes and integers alone, so that a file can be looked at without numpy or torch.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice

from utils.errors import UserError

MAGIC = 0x1D
VERSION = 1
TOKENIZER_BYTES, ENTROPY_BYTES = 2, 1  # of an identity, that a header keeps
MAX_TOKENS = 4096
MAX_SIDE = 65535
MAX_PIXELS = 1 << 26
MAX_TILES = 1 << 16
MAX_PAYLOAD = (1 << 28) - 1
MAX_TOKEN_BYTES = 4  # of payload a token
# An entropy model may make tokens nearly free. This keeps the work of reading in proportion to the file's size.
TOKENS_PER_BYTE, FREE_BYTES = 64, 16
VARINT_BYTES = 4

REGISTER_BITS = 48  # of the range coder: with 32, frequencies of 20 bits would cost bytes over the ideal
TOP = 1 << REGISTER_BITS
BYTE_SHIFT = REGISTER_BITS - 8
BOTTOM = 1 << BYTE_SHIFT

BLOCK = 64  # numbers that are packed at once, into whole bytes: one integer of all would take quadratic time


class FormatError(UserError):
    """Bytes that are no compressed file, a damaged one, or one that this version cannot read."""


class Mode(IntEnum):
    """What gives the tokens their bits."""

    FIXED = 0
    TABLES = 1
    NETWORK = 2


class Fit(IntEnum):
    """How an image of any size became the square that the model takes."""

    CROP = 0
    PAD = 1
    STRETCH = 2
    TILE = 3


class RangeEncoder:
    """Writes symbols into the fewest bytes that tell them, the likely ones into fractions of a bit."""

    def __init__(self):
        self.out = bytearray()
        self.low, self.range = 0, TOP

    def encode(self, start: int, size: int, total_bits: int) -> None:
        """Write the symbol that has `size` of all 2 ** total_bits shares, those before it having `start`."""
        step = self.range >> total_bits
        self.low += step * start
        self.range = step * size
        if self.low >= TOP:
            self.low -= TOP
            add_carry(self.out)
        while self.range < BOTTOM:
            self.out.append(self.low >> BYTE_SHIFT)
            self.low = (self.low << 8) & (TOP - 1)
            self.range <<= 8

    def num_bytes(self) -> int:
        """Length of what `finish` would give now."""
        if 0 < self.low <= TOP - self.range:
            return len(self.out) + 1
        dropped = 0 if self.low == 0 else 0xFF  # with a carry these become zeros
        return len(self.out.rstrip(bytes([dropped])))

    def finish(self) -> bytes:
        """The shortest bytes that decode to the symbols when zeros follow them."""
        out = bytearray(self.out)
        if self.low > TOP - self.range:  # TOP itself is in the interval, as one more of the byte before
            add_carry(out)
        elif self.low > 0:
            out.append(-(-self.low // BOTTOM))
        return bytes(out.rstrip(b"\0"))


def add_carry(out: bytearray) -> None:
    """Add one to the last byte of a number."""
    place = len(out) - 1
    while out[place] == 0xFF:
        out[place] = 0
        place -= 1
    out[place] += 1


class RangeDecoder:
    """Reads the symbols of a payload, and tells which of them do not depend on bytes that may follow it.

    The payload counts as followed by zeros. `certain` stays true as long as every symbol read would be the same with
    any other bytes behind it.
    """

    def __init__(self, payload: bytes):
        self.payload, self.place = payload, 0
        self.code = self.slack = 0  # with ones behind the payload the code would be code + slack
        self.range = TOP
        self.certain = True
        for _ in range(REGISTER_BITS // 8):
            self._shift()

    def _shift(self) -> None:
        missing = self.place >= len(self.payload)
        self.code = self.code << 8 | (0 if missing else self.payload[self.place])
        if self.certain:  # then it is under the range; later it would grow without end
            self.slack = self.slack << 8 | (0xFF if missing else 0)
        self.place += 1

    def target(self, total_bits: int) -> int:
        """The share, 0..2 ** total_bits - 1, that lies in the next symbol.

        Raises:
            FormatError: No encoder writes such a payload.
        """
        target = self.code // (self.range >> total_bits)
        if target >> total_bits:
            raise FormatError("the payload is damaged: no symbol is written so")
        return target

    def consume(self, start: int, size: int, total_bits: int) -> None:
        """Take the symbol in whose shares the target was."""
        step = self.range >> total_bits
        self.code -= step * start
        self.range = step * size
        self.certain = self.certain and self.code + self.slack < self.range
        while self.range < BOTTOM:
            self.range <<= 8
            self._shift()


def pack_bits(values: Iterable[int], width: int) -> bytes:
    """Numbers of `width` bits each, one after the other, the highest bit first; zero bits fill the last byte."""
    out, rest = bytearray(), iter(values)
    while block := list(islice(rest, BLOCK)):
        total, bits = 0, len(block) * width
        for value in block:
            total = total << width | value
        size = -(-bits // 8)
        out += (total << (8 * size - bits)).to_bytes(size, "big")
    return bytes(out)


def unpack_bits(data: bytes, width: int, count: int) -> list[int]:
    """The first `count` numbers that `pack_bits` wrote."""
    values, mask = [], (1 << width) - 1
    for first in range(0, count, BLOCK):
        num = min(BLOCK, count - first)
        start, size = first * width // 8, -(-num * width // 8)
        total = int.from_bytes(data[start : start + size], "big") >> (8 * size - num * width)
        values += [total >> (width * place) & mask for place in reversed(range(num))]
    return values


@dataclass(frozen=True)
class Tiles:
    """An image cut into columns x rows overlapping squares, row by row, each with its own number of tokens."""

    columns: int
    rows: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """The original image, where it is not the model's square: size as stored, EXIF orientation, fit.

    Args:
        width, height: In pixels, as the file had them, before `orientation` turns them.
        orientation: 1..8 as in EXIF; 1 is upright.
        tiles: With `Fit.TILE` alone.
    """

    width: int
    height: int
    fit: Fit = Fit.CROP
    orientation: int = 1
    tiles: Tiles | None = None


@dataclass(frozen=True)
class Header:
    """What stands before the payload.

    Args:
        tokenizer: The first `TOKENIZER_BYTES` of the tokenizer's identity.
        entropy: The first `ENTROPY_BYTES` of the entropy model's identity; zero with `Mode.FIXED`.
        num_tokens: Of the image; of tiles the most that one has.
        payload_size: In bytes, of the whole payload.
    """

    mode: Mode
    tokenizer: bytes
    entropy: bytes
    num_tokens: int
    payload_size: int
    geometry: Geometry | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each tile; of one image where there are no tiles."""
        tiles = self.geometry.tiles if self.geometry else None
        return tiles.lengths if tiles else (self.num_tokens,)

    @property
    def check_size(self) -> int:
        return 4 if self.geometry and self.geometry.tiles else 1

    def pack(self, payload: bytes) -> bytes:
        """The header's bytes, with the check of itself and the payload as the last of them.

        Raises:
            UserError: A field is beyond what a file can hold.
        """
        check_limits(self, UserError)
        if len(payload) != self.payload_size:
            raise ValueError(f"payload_size is {self.payload_size}, and the payload has {len(payload)} bytes")
        head = bytes([MAGIC, 0x50 | (VERSION - 1) << 2 | self.mode]) + self.tokenizer
        tail = varint((self.num_tokens - 1) << 1 | (self.geometry is not None)) + varint(self.payload_size)
        tail += pack_geometry(self.geometry) if self.geometry else b""
        fields = head + mixed(self.entropy, head + tail) + tail
        return fields + check_of(fields + payload, self.check_size)


@dataclass(frozen=True)
class Compressed:
    """A file taken apart.

    Args:
        payload: As much of it as is there: less than the header's `payload_size` where the file was cut.
        header_size: In bytes.
    """

    header: Header
    payload: bytes
    header_size: int

    @property
    def is_cut(self) -> bool:
        return len(self.payload) < self.header.payload_size


def pack(header: Header, payload: bytes) -> bytes:
    """A whole file."""
    return header.pack(payload) + payload


def unpack(data: bytes) -> Compressed:
    """Take a file apart, and verify the check of a whole one.

    A cut file's check cannot be verified. Its header is sound where `entropy` is that of a model of its tokenizer.

    Raises:
        FormatError: The bytes are no compressed file, are damaged, or end within the header.
    """
    reader = Reader(data)
    mode = read_mode(reader)
    tokenizer, mix = reader.take(TOKENIZER_BYTES), reader.take(ENTROPY_BYTES)
    tail = reader.place
    tokens, payload_size = reader.varint(), reader.varint()
    num_tokens = (tokens >> 1) + 1
    check_range("tokens", num_tokens, MAX_TOKENS, FormatError)
    geometry = read_geometry(reader, num_tokens) if tokens & 1 else None
    fields = data[: reader.place]
    entropy = mixed(mix, fields[: tail - ENTROPY_BYTES] + fields[tail:])
    header = Header(mode, tokenizer, entropy, num_tokens, payload_size, geometry)
    check_limits(header, FormatError)
    check = reader.take(header.check_size)
    payload = data[reader.place :]
    if len(payload) > payload_size:
        raise FormatError(f"the file is damaged: {len(payload) - payload_size} bytes too many")
    if len(payload) == payload_size and check_of(fields + payload, len(check)) != check:
        raise FormatError("the file is damaged: its check does not fit its bytes; get it again")
    return Compressed(header, payload, reader.place)


def read_mode(reader: "Reader") -> Mode:
    magic, kind = reader.take(2)
    if magic != MAGIC or kind >> 4 != 0x5:
        raise FormatError(f"this is no .1dp file: it begins with {magic:02x} {kind:02x}, and not with 1d 5x")
    version, mode = (kind >> 2 & 3) + 1, kind & 3
    if version != VERSION:
        raise FormatError(f"the file is of version {version}, and this reads version {VERSION}: update the reader")
    if mode not in Mode._value2member_map_:
        raise FormatError(f"the file is damaged: there is no mode {mode}")
    return Mode(mode)


def pack_geometry(geometry: Geometry) -> bytes:
    out = bytes([geometry.fit << 3 | (geometry.orientation - 1)])
    out += varint(geometry.width - 1) + varint(geometry.height - 1)
    if tiles := geometry.tiles:
        least, width = min(tiles.lengths), length_bits(min(tiles.lengths), max(tiles.lengths))
        out += varint(tiles.columns - 1) + varint(tiles.rows - 1) + varint(least - 1)
        out += pack_bits((length - least for length in tiles.lengths), width)
    return out


def read_geometry(reader: "Reader", num_tokens: int) -> Geometry:
    kind = reader.take(1)[0]
    if kind >> 3 not in Fit._value2member_map_:
        raise FormatError(f"the file is damaged, or of a later version: there is no fit {kind >> 3}")
    fit, orientation = Fit(kind >> 3), (kind & 7) + 1
    width, height = reader.varint() + 1, reader.varint() + 1
    tiles = read_tiles(reader, num_tokens) if fit == Fit.TILE else None
    return Geometry(width, height, fit, orientation, tiles)


def read_tiles(reader: "Reader", num_tokens: int) -> Tiles:
    columns, rows, least = reader.varint() + 1, reader.varint() + 1, reader.varint() + 1
    check_range("tiles", columns * rows, MAX_TILES, FormatError)
    check_range("least tokens of a tile", least, num_tokens, FormatError)
    width = length_bits(least, num_tokens)
    packed = reader.take(-(-columns * rows * width // 8))
    above = unpack_bits(packed, width, columns * rows)
    lengths = tuple(least + more for more in above)
    if pack_bits(above, width) != packed or min(lengths) != least or max(lengths) != num_tokens:
        raise FormatError(f"the file is damaged: its tiles must have {least} to {num_tokens} tokens")
    return Tiles(columns, rows, lengths)


def length_bits(least: int, most: int) -> int:
    return (most - least).bit_length()


def check_limits(header: Header, error: type[UserError]) -> None:
    """Whether a file can hold this, and whether a reader would take it on."""
    check_range("tokens", header.num_tokens, MAX_TOKENS, error)
    total = sum(header.lengths)
    if header.payload_size > min(MAX_TOKEN_BYTES * total, MAX_PAYLOAD):
        raise error(f"{total} tokens cannot need a payload of {header.payload_size} bytes")
    if not may_hold(header.mode, header.payload_size, total):
        raise error(f"a payload of {header.payload_size} bytes may not hold {total} tokens: use fixed bits")
    if header.geometry:
        check_range("pixels in width", header.geometry.width, MAX_SIDE, error)
        check_range("pixels in height", header.geometry.height, MAX_SIDE, error)
        check_range("pixels", header.geometry.width * header.geometry.height, MAX_PIXELS, error)


def may_hold(mode: Mode, payload_size: int, num_tokens: int) -> bool:
    """Whether a payload may hold so many tokens of all tiles."""
    return mode == Mode.FIXED or num_tokens <= TOKENS_PER_BYTE * (payload_size + FREE_BYTES)


def check_range(what: str, value: int, most: int, error: type[UserError]) -> None:
    if not 1 <= value <= most:
        raise error(f"a .1dp file holds 1 to {most} {what}, got {value}")


class Reader:
    """Bytes from a header's beginning."""

    def __init__(self, data: bytes):
        self.data, self.place = data, 0

    def take(self, count: int) -> bytes:
        if self.place + count > len(self.data):
            raise FormatError(f"the file ends within its header, after {len(self.data)} bytes: get it again")
        self.place += count
        return self.data[self.place - count : self.place]

    def varint(self) -> int:
        """A number of 7 bits a byte, the lowest first; all bytes but the last have their highest bit set."""
        value = 0
        for place in range(VARINT_BYTES):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                if place and not byte:
                    break  # a shorter form exists
                return value
        raise FormatError("the file is damaged: a number in its header has a wrong form")


def varint(value: int) -> bytes:
    """The bytes that `Reader.varint` reads."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def mixed(entropy: bytes, others: bytes) -> bytes:
    """The entropy model's byte, and a check of the header's other bytes, in one; a second time undoes it.

    Who has the model knows the byte, and so whether the header is sound, even where the payload's end is missing.
    """
    return bytes([entropy[0] ^ check_of(others, 1)[0]])


def check_of(data: bytes, size: int) -> bytes:
    """CRC-32 (that of zlib) of 4 bytes, or CRC-8 (SAE J1850) of 1."""
    if size == 4:
        return zlib.crc32(data).to_bytes(4, "big")
    check = 0xFF
    for byte in data:
        check = CRC8[check ^ byte]
    return bytes([check ^ 0xFF])


def crc8_table(polynomial: int) -> Sequence[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value << 1 ^ (polynomial | 0x100 if value & 0x80 else 0)
        table.append(value)
    return table


CRC8 = crc8_table(0x1D)
