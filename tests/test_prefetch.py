"""Work ahead: the same items and errors, a bounded number of them made, and no thread left behind."""

import gc
import threading

import pytest

from m3oe_fast.data.prefetch import ahead

TIMEOUT = 30


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "m3oe_fast prefetch"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert threads() == []


class Source:
    """Counts items up to ``stop``; tells how many it was asked for, and that it was closed."""

    def __init__(self, stop, error=None):
        self.made, self.closed = 0, False
        self._stop, self._error = stop, error
        self.grown = threading.Condition()

    def items(self):
        try:
            while self.made < self._stop:
                with self.grown:
                    self.made += 1
                    self.grown.notify_all()
                yield self.made - 1
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True

    def wait_for(self, made):
        with self.grown:
            assert self.grown.wait_for(lambda: self.made >= made, TIMEOUT)


@pytest.mark.parametrize("depth", [1, 2, 5, 100])
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_same_items(depth, stop):
    source = Source(stop)
    assert list(ahead(source.items(), depth)) == list(range(stop))
    assert source.closed


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_are_made_ahead(depth):
    source = Source(100)
    items = ahead(source.items(), depth)
    assert source.made == 0  # nothing before the first is asked for
    for got in range(1, 6):
        next(items)
        source.wait_for(got + depth)
        assert source.made == got + depth
    items.close()
    assert source.closed
    assert source.made <= 5 + depth


@pytest.mark.parametrize("error", [ValueError("bad row"), KeyboardInterrupt(), GeneratorExit(), StopIteration()])
def test_error_is_raised_where_the_items_are_used(error):
    source = Source(3, error)
    items = ahead(source.items(), 2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError if isinstance(error, StopIteration) else type(error)):
        next(items)
    assert source.closed


def test_traceback_names_the_line_that_failed():
    with pytest.raises(ValueError, match="bad row") as caught:
        list(ahead(Source(0, ValueError("bad row")).items(), 1))
    assert caught.traceback[-1].name == "items"


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_dropped_before_the_end(taken):
    source = Source(100)
    items = ahead(source.items(), 2)
    for _ in range(taken):
        next(items)
    del items
    gc.collect()
    assert source.closed or not taken


def test_closed_while_an_item_is_being_made():
    started, go = threading.Event(), threading.Event()

    def slow():
        yield 0
        started.set()
        assert go.wait(TIMEOUT)
        yield 1

    items = ahead(slow(), 2)
    assert next(items) == 0
    assert started.wait(TIMEOUT)
    closing = threading.Thread(target=items.close)
    closing.start()
    go.set()
    closing.join(TIMEOUT)
    assert not closing.is_alive()


def test_error_of_the_consumer():
    source = Source(100)
    items = ahead(source.items(), 2)

    def consume():
        for item in items:
            raise ValueError(f"cannot use {item}")

    with pytest.raises(ValueError, match="cannot use 0"):
        consume()
    items.close()
    assert source.closed
