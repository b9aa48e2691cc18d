"""Ctrl-C and SIGTERM during a run: answered at once, and acted on where nothing is lost.

Python calls a signal's handler between two operations of the main thread. A step's backward pass is one
operation, which may take a minute; a thread therefore answers in its place, which the operating system
wakes through a socket.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Requests to stop; made by `stop_signals`.

    Attributes
    ----------
    requested
        Whether a signal came.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupts = False

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a request raises KeyboardInterrupt at once; outside, it is only noted."""
        self._interrupts = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._interrupts = False

    def handle(self, *_: object) -> None:
        """Take note of a signal; a second one raises KeyboardInterrupt wherever the program is."""
        again, self.requested = self.requested, True
        if again or self._interrupts:
            raise KeyboardInterrupt


@contextmanager
def stop_signals(answer: Callable[[int], None]) -> Iterator[StopSignals]:
    """Catch SIGINT and SIGTERM, in the main thread only; elsewhere nothing is caught.

    Parameters
    ----------
    answer
        Called in a thread of its own, at once, with the number of signals so far.
    """
    stop = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.handle) for number in SIGNALS}
    try:
        with _answering(answer):
            yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _answering(answer: Callable[[int], None]) -> Iterator[None]:
    """Call ``answer`` in a thread for each signal that comes."""
    sender, receiver = socket.socketpair()
    sender.setblocking(False)

    def wait() -> None:
        count = 0
        while data := receiver.recv(1):
            if data[0] in SIGNALS:
                count += 1
                answer(count)

    thread = threading.Thread(target=wait, name="answer to signals", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(sender.fileno())
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        sender.close()  # the thread reads the end, and returns
        thread.join()
        receiver.close()
