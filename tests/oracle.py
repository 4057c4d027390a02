"""What the operations should return, written again: loops over scalars, or float64.

Nothing here imports kvcompress. Scalar loops follow the documented formulas literally; the float32
ones round after every step, because codes must agree bit for bit.
"""

from __future__ import annotations

import itertools

import numpy as np

TINY = 2.0**-100
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Unit roundoff: a value rounds to within this share of itself."""
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
"""Spacing of the denormals."""


def gamma(n: float) -> float:
    """Relative error of `n` float32 roundings in a row (Higham, Accuracy, section 3.1)."""
    return n * UNIT["float32"] / (1 - n * UNIT["float32"])


def planes(bits: int) -> list[int]:
    """Widths of the planes of a code, those of its lowest bits first: 11 bits are 8 + 2 + 1."""
    widths = [8] * (bits // 8)
    widths += [width for width in (4, 2, 1) if bits % 8 & width]
    return widths


def pack(codes: list[int], bits: int) -> list[int]:
    """One row of codes to bytes, bit by bit."""
    packed: list[int] = []
    shift = 0
    for width in planes(bits):
        size = (len(codes) * width + 7) // 8
        plane = [0] * size
        for i, code in enumerate(codes):
            for bit in range(width):
                plane[i % size] |= (code >> (shift + bit) & 1) << (i // size * width + bit)
        packed += plane
        shift += width
    return packed


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """`pack` along the last axis."""
    rows = [pack([int(c) for c in codes[i]], bits) for i in np.ndindex(codes.shape[:-1])]
    width = len(pack([0] * codes.shape[-1], bits))
    return np.array(rows, "uint8").reshape(*codes.shape[:-1], width)


def groups(tokens: int, channels: int, group_size: int, axis: str) -> dict[tuple[int, int], list]:
    """Positions of the members of every group, by the position of its range."""
    found: dict[tuple[int, int], list] = {}
    for t, c in itertools.product(range(tokens), range(channels)):
        at = (t // group_size, c) if axis == "channel" else (t, c // group_size)
        found.setdefault(at, []).append((t, c))
    return found


def quantize(
    x: np.ndarray, bits: int, group_size: int, axis: str, range_dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (not packed), minima and maxima of the groups of ``[..., tokens, channels]``."""
    *lead, tokens, channels = x.shape
    if axis == "channel":
        ranges = (*lead, -(-tokens // group_size), channels)
    else:
        ranges = (*lead, tokens, -(-channels // group_size))
    codes = np.zeros(x.shape, "int64")
    minimum, maximum = np.zeros(ranges, range_dtype), np.zeros(ranges, range_dtype)
    qmax = 2**bits - 1
    for head in np.ndindex(*lead):
        for at, members in groups(tokens, channels, group_size, axis).items():
            values = [np.float32(x[head][m]) for m in members]
            low, high = min(values), max(values)
            minimum[head][at] = low if abs(low) >= TINY else 0
            maximum[head][at] = high if abs(high) >= TINY else 0
            start = np.float32(minimum[head][at])
            extent = np.float32(maximum[head][at]) - start
            if extent >= TINY:
                inverse = np.float32(qmax) / extent
                for m, value in zip(members, values, strict=True):
                    # Python rounds half to even, as the recipe asks.
                    codes[head][m] = min(max(round(float((value - start) * inverse)), 0), qmax)
    return codes, minimum, maximum


def quantizer_bound(
    x: np.ndarray, minimum: np.ndarray, maximum: np.ndarray, bits: int, group_size: int, axis: str
) -> np.ndarray:
    """Largest error of every value of ``[tokens, channels]`` after quantize and dequantize.

    Half a step of the stored group; what lies beyond the stored ranges; and float32 rounding: 4
    roundings in the code (difference, extent, quotient, product), 4 in the product that undoes it
    (extent, 1 / qmax, step, product), each relative to at most the extent, and one in the last sum.
    Minima, maxima and extents under 2**-100 count as zero.
    """
    bound = np.zeros(x.shape)
    for at, members in groups(*x.shape, group_size, axis).items():
        low, high = float(minimum[at]), float(maximum[at])
        values = [float(x[m]) for m in members]
        beyond = max(low - min(values), max(values) - high, 0.0)
        step = (high - low) / (2**bits - 1)
        for m in members:
            bound[m] = step / 2 + beyond + rounding(low, high) + 2 * TINY
    return bound


def rounding(low: float, high: float) -> float:
    """What float32 adds to half a step; see `quantizer_bound`."""
    extent = abs(high - low)
    return gamma(4) * extent + decode_rounding(low, high)


def decode_rounding(low: float, high: float) -> float:
    """How far a decoded value is from ``low + code * step``, computed exactly."""
    extent = abs(high - low)
    return gamma(4) * extent + gamma(1) * (max(abs(low), abs(high)) + gamma(4) * extent)


def spectrum(x: np.ndarray) -> np.ndarray:
    """Eigenvalues of the covariance of ``[tokens, channels]``, falling; float64, by SVD."""
    x = x.astype("float64")
    values = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2 / len(x)
    return np.concat([values, np.zeros(x.shape[1] - len(values))])


def distances(x: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Squared distances ``[vectors, codebook_size]`` in float64."""
    out = np.zeros((len(x), len(codebook)))
    for i, vector in enumerate(x.astype("float64")):
        for j, centroid in enumerate(codebook.astype("float64")):
            out[i, j] = sum((a - b) ** 2 for a, b in zip(vector, centroid, strict=True))
    return out


def lloyd(x: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """One round of Lloyd's algorithm on one set of vectors, in float64."""
    codes = distances(x, codebook).argmin(1)
    new = codebook.astype("float64")
    for j in range(len(codebook)):
        members = [i for i in range(len(x)) if codes[i] == j]
        if members:
            new[j] = sum(x[i].astype("float64") for i in members) / len(members)
    return new


def unpack_rows(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    """Undo `pack_rows`, bit by bit."""
    codes = np.zeros((*packed.shape[:-1], n), "int64")
    for row in np.ndindex(packed.shape[:-1]):
        start = shift = 0
        for width in planes(bits):
            size = (n * width + 7) // 8
            for i in range(n):
                byte = int(packed[row][start + i % size]) >> (i // size * width)
                codes[row][i] |= (byte & (2**width - 1)) << shift
            start += size
            shift += width
    return codes


def decode_low_rank(payload: dict[str, np.ndarray]) -> np.ndarray:
    """``[heads, tokens, head_dim]`` in float64 from what `LowRank` stores."""
    arrays = {name: a.astype("float64") for name, a in payload.items()}
    x = arrays["coefficients"] @ arrays["basis"].transpose(0, 2, 1) + arrays["mean"]
    return x * arrays["scale"]


def decode_ranges(payload: dict[str, np.ndarray], bits: int) -> tuple[np.ndarray, np.ndarray]:
    """All minima, then all maxima of groups, and how far they may be from the exact ones."""
    ranges = payload["ranges"].astype("float64")
    moved = np.zeros_like(ranges)
    if bits < 8:
        for h, g, c in np.ndindex(ranges.shape):
            low = float(payload["ranges_min"][h, g // 32, c])
            high = float(payload["ranges_max"][h, g // 32, c])
            ranges[h, g, c] = low + ranges[h, g, c] * (high - low) / 255
            moved[h, g, c] = (high - low) / 510 + rounding(low, high)
    return ranges, moved


def decode_hybrid(
    payload: dict[str, np.ndarray], bits: int, group_size: int, rank: int
) -> np.ndarray:
    """``[heads, tokens, head_dim]`` in float64 from what `Hybrid` stores."""
    coefficients = unpack_rows(payload["codes"], bits, rank).astype("float64")
    heads, tokens, _ = coefficients.shape
    ranges, _ = decode_ranges(payload, bits)
    for h, t, c in np.ndindex(heads, tokens, rank):
        low, high = ranges[h, t // group_size, c], ranges[h, t // group_size, rank + c]
        coefficients[h, t, c] = low + coefficients[h, t, c] * (high - low) / (2**bits - 1)
    for h in range(heads):
        pairs = zip(payload["outlier_index"][h], payload["outlier_value"][h], strict=True)
        for index, value in pairs:
            coefficients[h, index // rank, index % rank] = float(value)
    basis = {name: payload[name] for name in ("basis", "mean", "scale")}
    return decode_low_rank({"coefficients": coefficients, **basis})


def decode_vector_quantization(payload: dict[str, np.ndarray], bits: int) -> np.ndarray:
    """``[heads, tokens, head_dim]`` in float64 from what `VectorQuantization` stores."""
    dim = payload["codebook"].shape[-1]
    places = payload["mean"].shape[-1] // dim
    codes = unpack_rows(payload["codes"], bits, places)
    heads, tokens, _ = codes.shape
    x = np.zeros((heads, tokens, places * dim))
    for h, t, p in np.ndindex(heads, tokens, places):
        x[h, t, p * dim : (p + 1) * dim] = payload["codebook"][codes[h, t, p]]
    x = (x + payload["mean"].astype("float64")) * payload["scale"]
    for h in range(heads):
        for index, value in zip(payload["exact_index"][h], payload["exact_value"][h], strict=True):
            x[h, index] = value
    return x
