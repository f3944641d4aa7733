"""Where an operation was called: the phase of the step and the source line, from the Python frames.

PyTorch's own functions around an operation tell its phase: `GradScaler.unscale_`, `clip_grad_norm_`, the wrapper that every
optimizer's `step` gets, the engine's call for backward, a module's call for forward. The innermost of them decides, so
that a closure's forward pass inside `optimizer.step` is a forward pass, and an update inside a gradient's hook is an update.
The frame of a module's call also has the module: hooks are not needed, which a compiled or a copied module would notice.
"""

from __future__ import annotations

import os
import sysconfig
from functools import cache
from types import CodeType, FrameType
from typing import NamedTuple


class Place(NamedTuple):
    """Where an operation was called.

    mark: the innermost of MARKS around it, '' if none. module: in a forward pass, the innermost module whose call it is part
    of, None if it is part of none. line, code_line: as in `Operation`, '' if unknown.
    """

    mark: str
    module: object
    line: str
    code_line: str


MARKS = (
    ("amp/grad_scaler.py", ("unscale_", "_unscale_grads_"), "unscale"),
    ("distributed/fsdp/sharded_grad_scaler.py", ("unscale_", "_unscale_grads_"), "unscale"),
    ("amp/grad_scaler.py", ("step",), "step"),
    ("optim/optimizer.py", ("Optimizer.profile_hook_step.<locals>.wrapper",), "step"),
    ("amp/grad_scaler.py", ("update",), "update"),
    ("distributed/fsdp/sharded_grad_scaler.py", ("update",), "update"),
    ("nn/utils/clip_grad.py", (), "clip"),
    ("distributed/fsdp/fully_sharded_data_parallel.py", ("clip_grad_norm_",), "clip"),
    ("autograd/graph.py", ("_engine_run_backward",), "backward"),
    ("autograd/__init__.py", ("backward", "grad"), "backward"),
    ("nn/modules/module.py", ("_call_impl",), "module"),
    ("utils/checkpoint.py", (), "checkpoint"),
)  # fmt: skip
"""(file of PyTorch, functions in it by name or qualified name, or () for all of them, what their callees belong to)."""


FORWARD = ("module", "checkpoint")
"""The marks of a forward pass."""
GENERATED = ("<frozen", "<string>")
"""File names of code that is in no file of the user's; a notebook's cells, and what is typed at a prompt, have other names."""


class Places:
    """Classifies frames, each function once."""

    def __init__(self, torch_folder: str) -> None:
        """torch_folder: the folder of the package torch."""
        self._torch = os.path.join(os.path.realpath(torch_folder), "")
        paths = sysconfig.get_paths()
        folders = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
        self._libraries = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
        self._own = os.path.join(os.path.dirname(os.path.realpath(__file__)), "")
        # By id: to hash a code object takes as long as its code is, and functions of two files may be equal.
        self._known: dict[int, tuple[str, str, CodeType]] = {}

    def of(self, frame: FrameType | None) -> Place:
        """Return the place of what is called in a frame, by walking outwards from it."""
        mark = line = code_line = ""
        module = None
        while frame is not None and not (line and mark and (module is not None or mark not in FORWARD)):
            code = frame.f_code
            owner, what, _ = self._known.get(id(code)) or self._classify(code)
            mark = mark or what
            if what == "backward" and mark != what:
                break  # a recomputation: who called backward has not called this
            if what == "module" and mark in FORWARD and module is None:
                module = frame.f_locals.get("self")
            if owner in ("user", "library") and not (line and code_line):
                here = f"{code.co_filename}:{frame.f_lineno}"
                code_line = code_line or here
                line = line or (here if owner == "user" else "")
            frame = frame.f_back
        return Place(mark, module, line, code_line)

    def _classify(self, code: CodeType) -> tuple[str, str, CodeType]:
        """Return whose code it is (torch, recorder, library, user), its mark, and the code, which keeps its id its own."""
        path = _real_path(code.co_filename)
        owner, mark = "user", ""
        if path.startswith(self._torch):
            owner, mark = "torch", _mark(path.removeprefix(self._torch), code)
        elif path.startswith(self._own):
            owner = "recorder"
        elif path.startswith(self._libraries) or "site-packages" in path or code.co_filename.startswith(GENERATED):
            owner = "library"
        self._known[id(code)] = owner, mark, code
        return self._known[id(code)]


_real_path = cache(os.path.realpath)


def _mark(path: str, code: CodeType) -> str:
    path = path.replace(os.sep, "/")
    for file, functions, mark in MARKS:
        if path == file and (not functions or code.co_name in functions or code.co_qualname in functions):
            return mark
    return ""
