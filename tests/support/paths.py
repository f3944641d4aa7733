"""Where the files of the repository stand."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS, DOCS, TESTS = ROOT / "scripts", ROOT / "docs", ROOT / "tests"
SUPPORT = TESTS / "support"
COMMANDS = ROOT / "refimpl" / "tools" / "commands"
