"""Where the files of the repository stand."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS, DOCS, TESTS = ROOT / "scripts", ROOT / "docs", ROOT / "tests"
SUPPORT = TESTS / "support"
COMMANDS = ROOT / "refimpl" / "tools" / "commands"
EXAMPLES = ("by_hand", "minimal_fp16")
"""The scripts that are there to be read: no flags, and a traceback like that of any other program."""
