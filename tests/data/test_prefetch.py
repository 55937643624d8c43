import itertools
import threading
import time

import pytest

from megatron_mtp.data.prefetch import Prefetcher

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_items_come_in_order_and_end(depth):
    stream = Prefetcher(iter(range(10)), depth)
    assert list(stream) == list(range(10))
    assert list(stream) == []


@pytest.mark.parametrize("depth", [0, 2])
def test_error_reaches_the_caller_after_the_good_items(depth):
    def source():
        yield 1
        yield 2
        raise ValueError("bad sample")

    stream = Prefetcher(source(), depth)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(ValueError, match="bad sample"):
        next(stream)
    stream.close()


def test_reads_ahead_no_further_than_asked():
    made = []
    stream = Prefetcher((made.append(i) or i for i in itertools.count()), 3)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 4  # three ready, one waiting to be put
    stream.close()


def test_close_ends_an_endless_source_at_once():
    before = threading.active_count()
    stream = Prefetcher(itertools.count(), 2)
    next(stream)
    began = time.monotonic()
    stream.close()
    stream.close()
    assert time.monotonic() - began < 1
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(stream)
