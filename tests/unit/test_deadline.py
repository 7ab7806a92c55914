import time

import pytest

from voip_stack.deadline import Deadline, LateError


def test_what_comes_true_is_waited_for() -> None:
    begin = time.monotonic()
    Deadline(10).wait(lambda: time.monotonic() - begin > 0.1, "a tenth of a second is over", every=0.02)
    assert 0.1 < time.monotonic() - begin < 5


def test_what_does_not_come_true_is_named() -> None:
    with pytest.raises(LateError, match="not within 0 s: the queue is empty"):
        Deadline(0.05).wait(lambda: False, "the queue is empty", every=0.01)


def test_what_is_true_already_needs_no_time() -> None:
    Deadline(0).wait(lambda: True, "it is true")
    assert Deadline(0).until(lambda: True)
    assert not Deadline(0).until(lambda: False)
