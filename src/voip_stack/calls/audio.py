"""Telephone audio: A-law (ITU-T G.711), tones, and the measurement of a tone at the far end.

Levels are in dBm0: a sine at the top of the A-law range has +3.14 dBm0 (G.711, section 6).
"""

from __future__ import annotations

import bisect
import cmath
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RATE = 8000  # samples and A-law octets per second
PACKET = 160  # octets per packet: 20 ms
BLOCK = 4096  # samples of one measurement: 0.512 s, 1.95 Hz per bin
SEND_DBM0 = -10.0
SILENCE_DBM0 = -90.0
_PEAK, _PEAK_DBM0 = 32256, 3.14
_TONE_BINS = 3  # a Hann window spreads a tone over its bin and two on each side


def _expand(octet: int) -> int:
    """One A-law octet as a 16-bit sample (G.711, table 1a; even bits are inverted on the line)."""
    octet ^= 0x55
    exponent, mantissa = (octet >> 4) & 7, octet & 15
    magnitude = (mantissa << 4) + 8 if exponent == 0 else ((mantissa << 4) + 0x108) << (exponent - 1)
    return magnitude if octet & 0x80 else -magnitude


_PCM = tuple(_expand(octet) for octet in range(256))
_WINDOW = tuple(0.5 - 0.5 * math.cos(2 * math.pi * n / BLOCK) for n in range(BLOCK))


def decode(alaw: bytes) -> list[int]:
    """16-bit samples of A-law octets."""
    return [_PCM[octet] for octet in alaw]


def encode(pcm: Sequence[float]) -> bytes:
    """A-law octets of 16-bit samples, each the nearest A-law value."""
    nearest = sorted((value, octet) for octet, value in enumerate(_PCM))
    values = [value for value, _ in nearest]
    edges = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    return bytes(nearest[bisect.bisect_left(edges, sample)][1] for sample in pcm)


def tone(frequency_hz: int, level_dbm0: float = SEND_DBM0) -> bytes:
    """One second of a sine as A-law; whole periods, so it can be repeated without a click."""
    peak = _PEAK * 10 ** ((level_dbm0 - _PEAK_DBM0) / 20)
    return encode([peak * math.sin(2 * math.pi * frequency_hz * n / RATE) for n in range(RATE)])


def _dbm0(mean_square: float) -> float:
    relative = mean_square / (_PEAK**2 / 2)
    return max(SILENCE_DBM0, 10 * math.log10(relative) + _PEAK_DBM0) if relative > 0 else SILENCE_DBM0


def _fft(values: list[complex]) -> list[complex]:
    """Radix 2 transform; the length must be a power of two."""
    n = len(values)
    if n == 1:
        return values
    even, odd = _fft(values[::2]), _fft(values[1::2])
    turned = [cmath.exp(-2j * math.pi * k / n) * odd[k] for k in range(n // 2)]
    return [a + b for a, b in zip(even, turned, strict=True)] + [a - b for a, b in zip(even, turned, strict=True)]


def _spectrum(block: Sequence[int]) -> list[float]:
    """Power per bin below 4 kHz, scaled so that a tone's bins add up to its mean square."""
    bins = _fft([complex(s * w) for s, w in zip(block, _WINDOW, strict=True)])[: BLOCK // 2]
    scale = 2 / (BLOCK * sum(w * w for w in _WINDOW))
    return [abs(b) ** 2 * scale for b in bins]


def _blocks(pcm: Sequence[int]) -> list[list[float]]:
    return [_spectrum(pcm[start : start + BLOCK]) for start in range(0, len(pcm) - BLOCK + 1, BLOCK)]


def _around(spectrum: Sequence[float], centre: int) -> float:
    return sum(spectrum[max(0, centre - _TONE_BINS) : centre + _TONE_BINS + 1])


def level(pcm: Sequence[int], frequency_hz: float) -> float:
    """The level of the tone `frequency_hz` in `pcm`, in dBm0: the median over its blocks, whatever else is heard."""
    centre = round(frequency_hz * BLOCK / RATE)
    return statistics.median([_dbm0(_around(spectrum, centre)) for spectrum in _blocks(pcm)] or [SILENCE_DBM0])


@dataclass(frozen=True)
class Tone:
    """The strongest tone of a recording: medians over its blocks, and the share of the recording that holds it."""

    tone_hz: float
    level_dbm0: float
    share: float  # of the blocks: those with more than half of their power at this frequency (within 5 Hz)


def measure(pcm: Sequence[int]) -> Tone:
    """The strongest tone in `pcm`; silence (or less than 0.512 s) is 0 Hz at -90 dBm0."""
    found: list[tuple[float, float, bool]] = []
    for spectrum in _blocks(pcm):
        top = max(range(2, len(spectrum) - 1), key=spectrum.__getitem__)
        power, total = _around(spectrum, top), sum(spectrum)
        if total <= 0 or not spectrum[top - 1] or not spectrum[top + 1]:
            found.append((0.0, SILENCE_DBM0, False))
            continue
        # The peak between the bins, from a parabola through the logarithms of three.
        left, middle, right = (math.log(p) for p in spectrum[top - 1 : top + 2])
        offset = 0.5 * (left - right) / (left - 2 * middle + right)
        found.append(((top + offset) * RATE / BLOCK, _dbm0(power), power > total / 2))
    if not found:
        return Tone(0.0, SILENCE_DBM0, 0.0)
    frequency = statistics.median(f for f, _, _ in found)
    held = sum(1 for f, _, pure in found if pure and abs(f - frequency) < 5)
    return Tone(frequency, statistics.median(level for _, level, _ in found), held / len(found))
