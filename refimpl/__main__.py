"""`python -m refimpl COMMAND ...`: all commands, with or without a clone of the project."""

from __future__ import annotations

from refimpl.training.cli import main as run_program

import ast
import importlib
import sys
from importlib.resources import files

from refimpl import __version__
from refimpl.errors import UsageError, unknown
from refimpl.training.program import AS_MODULE


def commands() -> dict[str, str]:
    """Return the name of each command with the first line of its docstring, without importing any."""
    modules = sorted(path.name for path in files("refimpl.tools.commands").iterdir() if path.name.endswith(".py"))
    texts = {name.removesuffix(".py"): files("refimpl.tools.commands").joinpath(name).read_text("utf-8") for name in modules}
    return {name: (ast.get_docstring(ast.parse(text)) or "").splitlines()[0] for name, text in texts.items() if name[0] != "_"}


def usage() -> str:
    """Return the list of all commands."""
    lines = [f"    {name:18} {line}" for name, line in commands().items()]
    return "\n".join([f"usage: {AS_MODULE} COMMAND ...", "", *lines, "", f"{AS_MODULE} COMMAND --help shows its flags."])


def answer(word: str) -> None:
    """Print the help or the version. Errors: UsageError for any other word."""
    if word not in ("-h", "--help", "help", "--version"):
        raise UsageError(unknown("command", word, commands()))
    print(f"refimpl {__version__}" if word == "--version" else usage())


def main() -> None:
    """Run the command that the first word names with the words after it, and exit."""
    word, *words = sys.argv[1:] or ["--help"]
    name = word.replace("-", "_")  # compare-recipes is compare_recipes
    if name in commands():
        sys.argv = [f"{AS_MODULE} {name}", *words]
        importlib.import_module(f"refimpl.tools.commands.{name}").main()
    run_program(lambda: answer(word))


if __name__ == "__main__":
    main()
