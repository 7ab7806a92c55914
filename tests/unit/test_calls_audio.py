import random

import pytest

from voip_stack.calls import audio


@pytest.mark.parametrize(("octet", "sample"), [(0xD5, 8), (0x55, -8), (0xAA, 32256), (0x2A, -32256), (0x85, 4224)])
def test_alaw_is_decoded_as_in_g711(octet: int, sample: int) -> None:
    assert audio.decode(bytes([octet])) == [sample]


def test_alaw_survives_decoding_and_encoding() -> None:
    octets = bytes(range(256))
    assert audio.encode(audio.decode(octets)) == octets


@pytest.mark.parametrize("hz", [440, 1020, 3000])
@pytest.mark.parametrize("dbm0", [-3.0, -10.0, -40.0])
def test_a_tone_measures_what_was_sent(hz: int, dbm0: float) -> None:
    tone = audio.measure(audio.decode(audio.tone(hz, dbm0) * 2))
    assert tone.tone_hz == pytest.approx(hz, abs=0.5)
    assert tone.level_dbm0 == pytest.approx(dbm0, abs=0.5)
    assert tone.share == 1.0


def test_two_tones_at_once_are_measured_apart() -> None:
    both = [a + b for a, b in zip(*(audio.decode(audio.tone(hz) * 2) for hz in (440, 1020)), strict=True)]
    assert audio.level(both, 440) == pytest.approx(-10, abs=0.5)
    assert audio.level(both, 1020) == pytest.approx(-10, abs=0.5)
    assert audio.level(both, 1570) < -60


def test_silence_and_noise_are_no_tone() -> None:
    noise = random.Random(1)  # noqa: S311  # repeatable on purpose
    assert audio.measure([0] * 16000) == audio.measure([]) == audio.Tone(0.0, audio.SILENCE_DBM0, 0.0)
    assert audio.measure([noise.randint(-8000, 8000) for _ in range(16000)]).share == 0.0


def test_a_tone_for_half_of_the_time_has_half_a_share() -> None:
    half = audio.decode(audio.tone(440) * 4) + [0] * 32000
    assert audio.measure(half).share == pytest.approx(0.5, abs=0.1)
