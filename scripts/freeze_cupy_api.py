"""Print the API of the installed CuPy: names, parameters and the dtypes of each ufunc. It needs CuPy, but no GPU.

    pip install cupy-cuda13x==14.2.0 ml_dtypes
    python scripts/freeze_cupy_api.py > tests/support/cupy_api.json

The strict stand-in for CuPy (strict_cupy.py) reads the result. It has one entry per line, so that `git diff` after a run
with a newer CuPy shows the changes. Parameters are in order; `axis=` has a default, `*` and `**` take any number.
"""

from __future__ import annotations

from refimpl.training.cli import main

import argparse
import inspect
import json
import re
import warnings
from typing import Any

STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def parameters(function: Any) -> str:
    """Return a function's parameters: 'a axis= out=' for `def f(a, axis=None, out=None)`."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return _documented_parameters(function)
    return " ".join(STARS.get(p.kind) or p.name + "=" * (p.default is not p.empty) for p in found)


def _documented_parameters(function: Any) -> str:
    """Return a compiled function's parameters, from the signature that begins its docstring; '* **' without one.

    'ndarray.swapaxes(self, Py_ssize_t axis1, Py_ssize_t axis2)' -> 'self axis1 axis2'
    """
    first_line = (inspect.getdoc(function) or "").partition("\n")[0]
    signature = re.match(r"[\w.]+\((.*)\)", first_line)
    if signature is None:
        return "* **"
    flat = re.sub(r"\([^()]*\)|\[[^\[\]]*\]", "", signature[1])  # only the commas between parameters are left
    result = []
    for part in filter(None, (part.strip() for part in flat.split(","))):
        name, default, _ = part.partition("=")
        words = re.findall(r"\*+|\w+", name.partition(":")[0])
        result.append(words[0] if part.startswith("*") else words[-1] + default)
    return " ".join(result)


def public(owner: Any) -> dict[str, Any]:
    """Return the public attributes of an object by name, in alphabetical order."""
    return {name: getattr(owner, name) for name in sorted(dir(owner)) if not name.startswith("_")}


def frozen() -> dict[str, Any]:
    """Return the table: {'version', 'functions', 'linalg', 'ufuncs', 'ndarray', 'types', 'constants'}."""
    with warnings.catch_warnings():  # reading a deprecated name warns
        warnings.simplefilter("ignore")
        import cupy
        import cupy.linalg

        names, linalg, methods = public(cupy), public(cupy.linalg), public(cupy.ndarray)
    ufuncs = {name: " ".join(x.types) for name, x in names.items() if isinstance(x, cupy.ufunc)}
    types = [name for name, x in names.items() if isinstance(x, type)]
    functions = {name: x for name, x in names.items() if callable(x) and name not in ufuncs and name not in types}
    return {
        "version": cupy.__version__,
        "functions": {name: parameters(x) for name, x in functions.items()},
        "linalg": {name: parameters(x) for name, x in linalg.items() if callable(x) and not isinstance(x, type)},
        "ufuncs": ufuncs,
        "ndarray": {name: parameters(x) if callable(x) else "attribute" for name, x in methods.items()},
        "types": types,
        "constants": [name for name, x in names.items() if x is None or isinstance(x, (int, float))],
    }


def as_text(table: dict[str, Any]) -> str:
    """Return the table as JSON with one entry per line."""
    return json.dumps(table, indent=1) + "\n"


def run() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(as_text(frozen()), end="")


if __name__ == "__main__":
    main(run)
