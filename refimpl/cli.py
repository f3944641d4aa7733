"""How every script ends: one clear line and an exit code, never a traceback for what a person did."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from refimpl.errors import TrainingStopped, UsageError


def main(run: Callable[[], int | None]) -> None:
    """Call `run` and exit: 0 or what it returns; 2 for wrong input, 1 for a run that had to stop, 130 for Ctrl-C."""
    try:
        code = run() or 0
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except TrainingStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output has gone; what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
