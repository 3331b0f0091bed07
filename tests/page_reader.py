"""A reader of `.1dp` files in plain Python, written from docs/format.md and sharing nothing with `codec`."""

import array
import hashlib
import json
import struct
import zlib


def crc8(data):
    value = 0xFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ 0x1D) & 0xFF if value & 0x80 else value << 1
    return value ^ 0xFF


class Store:
    """Section 6: a stored model."""

    def __init__(self, data):
        (size,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + size])
        self.about = json.loads(entries.pop("__metadata__")["entropy"])
        self.total_bits, self.values, self.shapes, self.types, self.raw = self.about["total_bits"], {}, {}, {}, {}
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            self.raw[name] = data[8 + size + first : 8 + size + last]
            code, self.types[name] = {"I8": ("b", "|i1"), "I32": ("i", "<i4"), "U16": ("H", "<u2")}[entry["dtype"]]
            self.values[name], self.shapes[name] = array.array(code, self.raw[name]), tuple(entry["shape"])

    def row(self, name, *place):
        """The last axis of an array at a place, or a number where the place is complete."""
        shape, index = self.shapes[name], 0
        for axis, value in enumerate(place):
            index = index * shape[axis] + value
        if len(place) == len(shape):
            return self.values[name][index]
        width = shape[-1]
        return self.values[name][index * width : (index + 1) * width]

    def identity(self, mode):
        names = sorted(self.raw) if mode == 2 else ["table_of_position", "tables"]
        digest = hashlib.sha256(f"{('', 'tables', 'network')[mode]} {self.total_bits}".encode())
        for name in names:
            digest.update(f"\n{name} {self.types[name]} {self.shapes[name]}\n".encode() + self.raw[name])
        return digest.digest()


def scaled(value, scale):
    return (value * scale + 2**23) >> 24


def clamped(values, scale):
    return [min(255, max(0, scaled(value, scale))) for value in values]


def logits(store, mode, tokens):
    """Section 5."""
    place = len(tokens)
    table = store.row("tables", store.row("table_of_position", place))
    if mode == 1:
        return [16 * entry for entry in table]
    sums = list(store.row("position_bias", place))
    for earlier, token in enumerate(tokens):
        for depth, code in enumerate(store.row("codes", token)):
            matrix = matrix_of(store, place, earlier, depth)
            if matrix is not None:
                sums = [value + code * weight for value, weight in zip(sums, matrix, strict=True)]
    hidden = clamped(sums, store.row("position_scale", place))
    for block in range(store.shapes["hidden"][0]):
        rows = [store.row("hidden", block, unit) for unit in range(len(hidden))]
        sums = added(store.row("hidden_bias", block, place), hidden, rows)
        more = clamped(sums, store.row("hidden_scale", block))
        hidden = [value + other for value, other in zip(hidden, more, strict=True)]
    ends = added([0] * len(table), hidden, [store.row("head", unit) for unit in range(len(hidden))])
    return [scaled(value, store.row("head_scale", 0)) + 16 * entry for value, entry in zip(ends, table, strict=True)]


def added(start, values, rows):
    sums = list(start)
    for value, row in zip(values, rows, strict=True):
        if value:
            sums = [total + value * weight for total, weight in zip(sums, row, strict=True)]
    return sums


def matrix_of(store, place, earlier, depth):
    if store.shapes["pairs"][0]:
        return store.row("pairs", place * (place - 1) // 2 + earlier, depth)
    near = store.shapes["near"][0]
    if place - earlier <= near:
        return store.row("near", near - (place - earlier), depth)
    return store.row("far", earlier, depth) if earlier < store.shapes["far"][0] else None


E = [int(2 ** (20 - place / 256)) for place in range(256)]


def shares(found, total_bits):
    most = max(found)
    weights = [E[(most - value) % 256] >> min((most - value) // 256, 31) for value in found]
    total = sum(weights)
    result = [1 + weight * (2**total_bits - len(found)) // total for weight in weights]
    result[found.index(most)] += 2**total_bits - sum(result)
    return result


class RangeReader:
    """Section 4."""

    def __init__(self, payload, behind):
        self.bytes, self.behind, self.range, self.code = iter(payload), behind, 1 << 48, 0
        for _ in range(6):
            self.code = self.code << 8 | next(self.bytes, behind)

    def read(self, found, total_bits):
        step = self.range >> total_bits
        target, start, token = self.code // step, 0, 0
        assert target < 1 << total_bits, "damaged"
        while not start <= target < start + found[token]:
            start += found[token]
            token += 1
        self.code -= step * start
        self.range = step * found[token]
        while self.range < 1 << 40:
            self.code, self.range = self.code << 8 | next(self.bytes, self.behind), self.range << 8
        return token


def header_of(data):
    """Section 1: mode, entropy model's byte, tokens of each tile, L, and the payload that is there."""
    assert data[0] == 0x1D and data[1] >> 4 == 5 and data[1] >> 2 & 3 == 0 and data[1] & 3 < 3
    place = 5

    def varint():
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place, value, shift = place + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    tokens, size, check_size = varint(), varint(), 1
    lengths = [tokens // 2 + 1]
    if tokens & 1:
        place += 1
        fit = data[place - 1] >> 3
        varint(), varint()
        if fit == 3:
            count, least, check_size = (varint() + 1) * (varint() + 1), varint() + 1, 4
            width = (lengths[0] - least).bit_length()
            end = place + -(-count * width // 8)
            bits = "".join(f"{byte:08b}" for byte in data[place:end])
            place = end
            lengths = [least + int(bits[width * tile : width * (tile + 1)] or "0", 2) for tile in range(count)]
    fields, check, payload = data[:place], data[place : place + check_size], data[place + check_size :]
    if len(payload) == size:
        whole = fields + payload
        assert check == (bytes([crc8(whole)]) if check_size == 1 else struct.pack(">I", zlib.crc32(whole)))
    return data[1] & 3, data[4] ^ crc8(fields[:4] + fields[5:]), lengths, size, payload


def read(data, store):
    """Tokens of each tile: all of a whole file, the certain ones of a cut one."""
    mode, entropy, lengths, size, payload = header_of(data)
    assert entropy == (store.identity(mode)[0] if mode else 0)
    order = [(tile, place) for place in range(max(lengths)) for tile, count in enumerate(lengths) if place < count]
    if mode == 0:
        return by_fixed_bits(payload, order, lengths, (store.shapes["codes"][0] - 1).bit_length())
    zeros = [[] for _ in lengths]
    readers = [RangeReader(payload, 0)] + [RangeReader(payload, 0xFF)] * (len(payload) < size)
    for tile, _ in order:
        found = shares(logits(store, mode, zeros[tile]), store.total_bits)
        try:
            tokens = [reader.read(found, store.total_bits) for reader in readers]
        except AssertionError:  # with ones behind it no token may be there
            break
        if tokens[0] != tokens[-1]:
            break
        zeros[tile].append(tokens[0])
    return zeros


def by_fixed_bits(payload, order, lengths, width):
    bits, tiles = "".join(f"{byte:08b}" for byte in payload), [[] for _ in lengths]
    for number, (tile, _) in enumerate(order):
        token = bits[width * number : width * (number + 1)]
        if len(token) == width:
            tiles[tile].append(int(token, 2))
    return tiles
