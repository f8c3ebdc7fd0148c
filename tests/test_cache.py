import threading
import time

import numpy as np
import pytest

from sam_infer.cache import ByteLru


@pytest.fixture
def cache():
    return ByteLru(limit=100, size_of=lambda a: a.nbytes)


def test_least_recently_used_goes_first(cache):
    for name in "abc":
        cache.put(name, np.zeros(40, np.uint8))
        cache.get("a")
    assert cache.get("a") is not None
    assert cache.get("b") is None
    assert cache.nbytes == 80


def test_what_is_larger_than_the_limit_is_not_kept(cache):
    value, hit = cache.get_or_make("x", lambda: np.zeros(101, np.uint8))
    assert len(value) == 101
    assert not hit
    assert cache.get("x") is None
    assert cache.nbytes == 0


def test_replacing_a_value_frees_the_old_one(cache):
    cache.put("x", np.zeros(90, np.uint8))
    cache.put("x", np.zeros(10, np.uint8))
    assert cache.nbytes == 10


def test_a_value_is_made_once_for_many_threads(cache):
    made = []

    def make():
        made.append(1)
        time.sleep(0.05)
        return np.zeros(1, np.uint8)

    threads = [threading.Thread(target=cache.get_or_make, args=("k", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_a_failed_making_can_be_tried_again(cache):
    def fail():
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        cache.get_or_make("k", fail)
    assert not cache.get_or_make("k", lambda: np.zeros(1))[1]
