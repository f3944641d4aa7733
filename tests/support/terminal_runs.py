"""A script in a pseudo-terminal of its own, as a person runs it: Ctrl-C is a key, and what is shown is read back."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from paths import SCRIPTS

# A session leader takes the terminal as its own, and the signals that a test runner's parent may ignore are as usual.
LAUNCH = """\
import fcntl, os, signal, struct, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, int(sys.argv.pop(1)), 0, 0))
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class TerminalRun:
    """A script that is running; `seen` is all that the terminal has shown so far."""

    def __init__(self, script: str, *flags: str, cwd: Path, columns: int = 160) -> None:
        self.master, terminal = pty.openpty()
        command = [sys.executable, "-I", "-S", "-c", LAUNCH, str(columns), str(SCRIPTS / f"{script}.py"), *flags]
        self.process = subprocess.Popen(
            command, cwd=cwd, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
        )
        os.close(terminal)
        self.seen = ""

    def read(self, seconds: float) -> bool:
        """Take what comes within so many seconds; False at its end."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not select.select([self.master], [], [], left)[0]:
                return True
            try:
                data = os.read(self.master, 65536)
            except OSError:  # EIO: nobody has the other end open
                return False
            self.seen += data.decode(errors="replace")
        return True

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read until the terminal shows a text."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert self.read(0.02) and time.monotonic() < end, f"no {text!r} in {self.seen!r}"

    def wait_until_it_listens(self) -> None:
        """Until the script's own first lines have run: before them the signals of a process are Python's."""
        bit = 1 << (signal.SIGTERM - 1)
        while self.process.poll() is None:
            status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
            caught = [line for line in status.splitlines() if "SigCgt" in line]
            if caught and int(caught[0].split()[1], 16) & bit:
                return
            time.sleep(0.001)

    def send(self, name: str) -> None:
        """Send a signal: Ctrl-C as a key, the others from outside."""
        if name == "SIGINT":
            os.write(self.master, b"\x03")
        else:
            self.process.send_signal(getattr(signal, name))

    def end(self, seconds: float = 60) -> int:
        """Read to the end; the exit code."""
        limit = time.monotonic() + seconds
        try:
            while self.read(0.5):
                assert time.monotonic() < limit, f"still running: {self.seen[-500:]!r}"
            return self.process.wait(10)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            os.close(self.master)
