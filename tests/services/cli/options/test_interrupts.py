"""Ctrl-C as a wish to stop."""

import signal
import threading

import pytest

from blockserve.cli.options.interrupts import Interruptible


def test_ctrl_c_calls_and_raises_nothing_until_it_is_left():
    calls = []
    former = signal.getsignal(signal.SIGINT)
    with Interruptible(lambda: calls.append("stop")) as turn:
        assert not turn.is_stopped
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert turn.is_stopped
    assert calls == ["stop", "stop"]
    assert signal.getsignal(signal.SIGINT) is former
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_what_ignores_ctrl_c_goes_on_to():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruptible(lambda: None) as turn:
            signal.raise_signal(signal.SIGINT)
        assert not turn.is_stopped
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


def test_other_threads_leave_signals_alone():
    seen = []

    def enter():
        with Interruptible(lambda: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
