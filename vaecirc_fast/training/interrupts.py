"""Ctrl-C that waits for the step in progress, so that the state it leaves behind is a whole one."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager


@contextmanager
def delayed_interrupt():
    """A function that raises KeyboardInterrupt if Ctrl-C came since; a second Ctrl-C interrupts at once.

    Only where Ctrl-C would raise anyway: in the main thread, under Python's own handler.
    """
    pressed = False

    def on_signal(number, frame):
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, on_signal)
    try:
        yield check
        check()
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
