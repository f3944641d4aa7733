"""The frame of every command: one line and an exit code for wrong input, Ctrl-C or lost output, never a traceback.

A command imports this module before anything else, so that Ctrl-C is handled while the rest is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from refimpl.errors import TrainingStopped, UsageError, one_line
from refimpl.training.console import OutputLost, keep_closed_descriptors, safe_streams
from refimpl.training.program import as_called, is_command
from refimpl.training.signals import ENDED, end_at_once, interrupting

if is_command(getattr(sys.modules["__main__"], "__file__", None)):
    keep_closed_descriptors()
    end_at_once()


def main(run: Callable[[], int | None], goes_on: bool = False) -> None:
    """Call `run` and exit with its result or 0; with 2 for wrong input, 1 for a run that had to stop, 130 for Ctrl-C.

    goes_on: whether to continue if standard output fails, because the command also writes files.
    """
    with safe_streams(goes_on), interrupting():
        code = _code_of(run)
    sys.exit(code)


def _code_of(run: Callable[[], int | None]) -> int:
    """Call `run`, print in one line what stopped it, and return the exit code."""
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except OutputLost as lost:
        if lost.reader_gone:
            return 0
        line, code = f"error: {lost}", 1
    except UsageError as error:
        line, code = f"error: {error}", 2
    except OSError as error:
        if error.filename is None:
            raise  # of no file that the user has named
        line, code = f"error: {error.filename}: {error.strerror}", 2
    except MemoryError as error:
        line, code = f"error: out of memory ({str(error) or 'no more is available'}); try a smaller model or batch", 2
    except TrainingStopped as error:
        line, code = f"stopped: {error}", 1
    except KeyboardInterrupt as interrupt:
        line, code = str(interrupt) or "ended by Ctrl-C", ENDED
    print(one_line(as_called(line)), file=sys.stderr)
    return code
