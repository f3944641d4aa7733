"""The command-line parser of every script: argparse, with errors of one line."""

from __future__ import annotations

import argparse
import functools
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from refimpl.errors import nearest, one_line, spelled
from refimpl.training.columns import wrapped
from refimpl.training.program import as_called

_NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)
"""The start of a negative number. argparse's own pattern takes the -1e-3 of `--lr -1e-3` for a flag."""


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """Return the type of a flag with a known name as value, whose case and underscores do not count: FP16 is fp16.

    Unknown names are left to the command, whose message lists the known ones.
    """
    return functools.partial(spelled, known=tuple(known))


def some_of(known: Iterable[str]) -> Callable[[str], str]:
    """Return the type of a flag with known names as value, with commas between them, each as in `one_of`."""
    names = tuple(known)

    def list_of_names(text: str) -> str:
        return ",".join(spelled(word.strip(), names) for word in text.split(","))

    return list_of_names


def file_name(text: str) -> str:
    """Return the name of a file, as the type of a flag. An empty one, of an unset variable, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def _path(text: str) -> Path:
    return Path(file_name(text))


ELSEWHERE = {
    "learning-rate": "--lr", "max-iters": "--steps", "max-steps": "--steps", "gradient-accumulation-steps": "--grad-accum",
    "lr-scheduler-type": "--schedule", "warmup-iters": "--warmup", "warmup-steps": "--warmup", "grad-clip": "--clip",
    "max-grad-norm": "--clip", "eval-interval": "--eval-every", "eval-steps": "--eval-every", "eval-iters": "--eval-batches",
    "log-interval": "--log-every", "logging-steps": "--log-every", "out-dir": "--out", "output-dir": "--out",
    "dtype": "--recipe", "dataset": "--data", "per-device-train-batch-size": "--batch-size", "dropout": "",
}  # fmt: skip
"""Flags of nanoGPT and of transformers' Trainer -> ours; '' for what no model here has."""


def _of_other_projects(name: str, flags: Iterable[str]) -> str:
    """Return what to say of a flag that other projects have: ours, if it is one of `flags`, or that there is none."""
    plain = name.lstrip("-")
    ours = ELSEWHERE.get(plain.replace("_", "-"), "unknown")
    if not ours:
        return f": no model has {plain}"
    return f"; did you mean {ours}?" if ours in flags else ""


MANY = 8
"""The number of flags above which the usage does not list them: the help does."""


class _Help(argparse.HelpFormatter):
    """Help texts broken at spaces only: a name such as pure-bf16 stays whole. Descriptions keep their paragraphs and lists."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Fill the paragraphs of a description; each of its indented lines, with those indented deeper below, is `wrapped`."""
        blocks: list[str] = []
        deeper = 0  # from this indentation on, a line continues the block; 0: a paragraph, or none
        for line in text.strip().split("\n"):
            depth = len(line) - len(line.lstrip())
            if line and blocks and blocks[-1] and (depth > deeper if deeper else depth == 0):
                blocks[-1] += f" {line.strip()}"
            else:
                blocks.append(line)
                deeper = depth
        all_columns = width + 2  # argparse leaves two free, which a command may need
        filled = [wrapped(b, all_columns) if b[:1] == " " else "\n".join(self._split_lines(b, width)) for b in blocks]
        return textwrap.indent("\n".join(filled), indent)


class Parser(argparse.ArgumentParser):
    """argparse's parser with help texts laid out as they are written, and with errors of one line.

    For a wrong command line it prints the error and how to get help, and exits with code 2. argparse prints the usage first,
    25 lines for scripts/train.py. Parsers of sub-commands are of this class too.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **settings})
        self._negative_number_matcher = _NEGATIVE
        self.register("type", Path, _path)

    def format_help(self) -> str:
        """Return argparse's help, in which commands are written as this one was started."""
        if self.usage is None and sum(bool(action.option_strings) for action in self._actions) > MANY:
            positional = [action for action in self._actions if not action.option_strings]
            words = [f"{action.metavar or action.dest}{' ...' * (action.nargs in ('*', '+'))}" for action in positional]
            self.usage = " ".join(["%(prog)s [flags]", *words])
        return as_called(super().format_help())

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, with nanoGPT's underscores in flags too: --batch_size."""
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([self._dashed(word) for word in words], namespace)

    def _dashed(self, word: str) -> str:
        """Return a flag of this parser with dashes in place of underscores, and any other word as it is."""
        name, *value = word.split("=", 1)
        dashed = name.replace("_", "-")
        flags = (flag for action in self._actions for flag in action.option_strings)
        is_ours = name.startswith("--") and name != dashed and any(flag.startswith(dashed) for flag in flags)
        return "=".join([dashed, *value]) if is_ours else word

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Parse as argparse does. For an unknown flag, suggest the nearest one."""
        result, extra = self.parse_known_args(args, namespace)
        self._refuse(result, extra)
        return result

    def parse_intermixed_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Parse flags between positional arguments too. For an unknown flag, suggest the nearest one."""
        result, extra = self.parse_known_intermixed_args(args, namespace)
        self._refuse(result, extra)
        return result

    def error(self, message: str) -> NoReturn:
        """Print `message` in one line and exit with code 2."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and message.endswith(f"are required: {action.dest}"):
                message = f"choose one of {', '.join(action.choices)}"
        choices = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        guess = nearest(choices[1], re.findall(r"[\w-]+", choices[2])) if choices else ""
        line = one_line(message + guess)
        self.exit(2, f"error: {line}{' See' if line.endswith('?') else '; see'} {self.prog} --help\n")

    def _refuse(self, result: argparse.Namespace, extra: list[str]) -> None:
        if not extra:
            return
        parser = next(self._chosen(result), self)
        flags = [flag for action in parser._actions for flag in action.option_strings]
        unknown = next((word for word in extra if word.startswith("-")), None)
        if unknown is None:
            parser.error(f"unexpected {' '.join(extra)!r}{parser._flag_for(extra[0])}")
        name = unknown.partition("=")[0]
        parser.error(f"unknown flag {unknown}{_of_other_projects(name, flags) or nearest(name, flags)}")

    def _flag_for(self, word: str) -> str:
        """Return '; did you mean --recipe fp16?' for a name that a flag with known names takes, or ''."""
        for action in self._actions:
            known = getattr(action.type, "keywords", {}).get("known", ())  # of one_of
            if action.option_strings and spelled(word, known) in known:
                return f"; did you mean {action.option_strings[0]} {spelled(word, known)}?"
        return ""

    def add_quiet(self) -> None:
        """Add --quiet, of the commands that show progress."""
        self.add_argument("--quiet", action="store_true", help="show no progress, only results")

    def _chosen(self, result: argparse.Namespace) -> Iterator[Parser]:
        """Yield the parser of the sub-command that was given, if there is one."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                chosen = getattr(result, action.dest, None)
                if chosen in action.choices:
                    yield action.choices[chosen]
