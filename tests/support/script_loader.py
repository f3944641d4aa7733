"""A command, or a script that is no command, as a module, for tests that call its parser or its functions."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from paths import SCRIPTS


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
