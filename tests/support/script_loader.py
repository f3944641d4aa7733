"""A command, or a script that is no command, as a module, for tests that call its parser, its functions, or all of it."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import pytest
from paths import ROOT, SCRIPTS


def load_script(name: str) -> ModuleType:
    """refimpl.tools.commands.NAME, or scripts/NAME.py where there is no such command."""
    if importlib.util.find_spec(f"refimpl.tools.commands.{name}"):
        return importlib.import_module(f"refimpl.tools.commands.{name}")
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for the names in annotations
    spec.loader.exec_module(module)
    return module


def run_here(name: str, *words: object, folder: Path = ROOT) -> CompletedProcess[str]:
    """Run a command in this process, and return what a process of its own would say: that takes 0.3 seconds longer."""
    out, err, arguments = io.StringIO(), io.StringIO(), [str(SCRIPTS / f"{name}.py"), *map(str, words)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", arguments)
        patch.chdir(folder)
        with pytest.raises(SystemExit) as ended:
            load_script(name).main()
    return CompletedProcess(arguments, int(ended.value.code or 0), out.getvalue(), err.getvalue())
