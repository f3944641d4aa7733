"""Runs a Python program inside this process as Python itself would: `python SCRIPT ...`, or `python -m MODULE ...`."""

from __future__ import annotations

import builtins
import importlib.util
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from refimpl.errors import UsageError
from refimpl.training.console import Output


def check_program(word: str, is_module: bool) -> None:
    """Raise UsageError if there is no such script or module."""
    if not word:
        raise UsageError("the name of the script or module is empty")
    if not is_module:
        if not Path(word).is_file():
            raise UsageError(f"{word}: there is no such script" + ("; it is a folder" if Path(word).is_dir() else ""))
        return
    with _changed(sys, "path", [os.getcwd(), *sys.path[1:]]):
        try:
            there = importlib.util.find_spec(word) is not None
        except (ImportError, ValueError):
            there = False
    if not there:
        raise UsageError(f"-m {word}: there is no such module")


def run_python(word: str, is_module: bool, arguments: Sequence[str], around: AbstractContextManager[Any]) -> int:
    """Run a script or module, whose exceptions are shown as Python shows them. Return its exit code.

    It has its own sys.argv, sys.path and __main__, and Python's own streams and signals. around: is entered just before it.
    """
    folder = os.getcwd() if is_module else str(Path(word).resolve().parent)
    with (
        _changed(sys, "argv", [word, *arguments]),
        _changed(sys, "path", [folder, *sys.path[1:]]),
        _changed(sys, "stdout", _plain(sys.stdout)),
        _changed(sys, "stderr", _plain(sys.stderr)),
        _python_signals(),
    ):
        code = _code_of(_module if is_module else _script, word, around)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return code


def _code_of(run: Callable[[str], None], word: str, around: AbstractContextManager[Any]) -> int:
    """Run a program, and return the exit code that Python would have."""
    try:
        with around:
            run(word)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException as error:
        shown = error.with_traceback(_own_frames(error.__traceback__))
        sys.excepthook(type(shown), shown, shown.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _script(word: str) -> None:
    path = os.path.abspath(word)
    main = ModuleType("__main__")
    loader = SourceFileLoader("__main__", path)
    vars(main).update(__file__=path, __builtins__=builtins, __loader__=loader, __cached__=None, __doc__=None)
    with _changed_main(main):
        exec(loader.source_to_code(Path(path).read_bytes(), path), vars(main))


def _module(name: str) -> None:
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _own_frames(traceback: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames that ran the program; an error in its syntax has no frames of its own."""
    ours = (__file__, runpy.__file__, "<frozen runpy>")
    while traceback is not None and traceback.tb_frame.f_code.co_filename in ours:
        traceback = traceback.tb_next
    while traceback is not None and "importlib" in traceback.tb_frame.f_code.co_filename:
        traceback = traceback.tb_next
    return traceback


def _plain(stream: Any) -> Any:
    """Return the stream that the frame of our commands has wrapped: what a program prints is not ours to escape."""
    return stream.stream if isinstance(stream, Output) else stream


@contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _changed_main(main: ModuleType) -> Iterator[None]:
    """Let a module be __main__: classes that it pickles are looked up there, also by other processes."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = main
    try:
        yield
    finally:
        sys.modules["__main__"] = before


@contextmanager
def _python_signals() -> Iterator[None]:
    """Let signals do what they do in a plain Python program; those that are ignored stay so."""
    plain: dict[str, Any] = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
    before: dict[int, Any] = {}
    for name, handler in plain.items():
        signum = getattr(signal, name, None)
        if signum is not None and signal.getsignal(signum) != signal.SIG_IGN:
            before[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
