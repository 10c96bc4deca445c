"""Closing the console window on Windows: training saves before the process ends."""

import ctypes
import sys
import time
from collections.abc import Callable
from ctypes import wintypes
from typing import Any

# the events before it, Ctrl-C and Ctrl-Break, are signals; those after it are a logoff and a shutdown
_CTRL_CLOSE_EVENT = 2
_WAIT_SECONDS = 60.0  # longer than Windows waits


class ConsoleCloseHandler:
    """Handler that Windows calls in another thread when the console window is closed. Elsewhere it does nothing.

    Windows ends the process when the handler returns, and after five seconds in any case. Python's own handler notes
    SIGBREAK and returns at once, too early for the main thread to act. This one waits while the main thread saves.

    Args:
        on_close: Called in that thread.
    """

    def __init__(self, on_close: Callable[[], None]) -> None:
        self._on_close = on_close
        self._handler: Any = None

    def install(self) -> None:
        if sys.platform == "win32":
            self._handler = ctypes.WINFUNCTYPE(wintypes.BOOL, wintypes.DWORD)(self._handle)
            ctypes.WinDLL("kernel32").SetConsoleCtrlHandler(self._handler, True)

    def remove(self) -> None:
        # the object stays, because Windows may be in a call of it
        if sys.platform == "win32" and self._handler is not None:
            ctypes.WinDLL("kernel32").SetConsoleCtrlHandler(self._handler, False)

    def _handle(self, event: int) -> bool:
        """Return ``False`` to leave an event to Python's own handler."""
        if event < _CTRL_CLOSE_EVENT:
            return False
        self._on_close()
        time.sleep(_WAIT_SECONDS)
        return True
