"""Signals as wishes."""

import os
import signal
import threading

import pytest

from m3oe_fast.training.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_wish_and_the_second_an_order(number):
    interrupt = Interrupt()
    with pytest.raises(KeyboardInterrupt), interrupt.listening():
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.requested
        os.kill(os.getpid(), number)


def test_handlers_are_put_back_and_a_new_run_starts_without_the_wish():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupt = Interrupt()
    with interrupt.listening():
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with interrupt.listening():
        assert not interrupt.requested


def test_a_signal_that_was_ignored_before_stays_ignored(monkeypatch):
    """As in a job that a script started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt = Interrupt()
        with interrupt.listening():
            os.kill(os.getpid(), signal.SIGINT)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_leaves_the_handlers_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with Interrupt().listening():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
