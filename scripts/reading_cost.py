"""Count what it takes to read the core: lines and files of an evening, and calls behind one operation.

    python scripts/reading_cost.py            prints each count with its limit; exit code 1 if one is over it
    python scripts/reading_cost.py --update   writes the table into docs/architecture.md too

Only functions and files of refimpl count. The operation is a linear layer in FP16 on the backend 'reference', called once
before, so that the policy's rows have been looked up.
"""

from __future__ import annotations

from refimpl.training.cli import main  # first: Ctrl-C is answered from here on

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import refimpl as rf
from refimpl.nn.linear import linear_forward
from refimpl.training.arguments import Parser

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = f"{Path(rf.__file__).parent}/"  # as frames name it: not resolved where the clone is behind a symbolic link


@dataclass(frozen=True)
class Count:
    """A number, with its limit."""

    what: str
    number: int
    limit: int


def linked(text: str) -> list[str]:
    """Return the files of refimpl that a text in Markdown links to, each once: 'optim/state.py'."""
    return list(dict.fromkeys(re.findall(r"\]\((?:\.\./)?refimpl/([\w/]+\.py)(?:#L\d+)?\)", text)))


def evening() -> list[str]:
    """Return the files of README's evening, in its order."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return linked(readme.partition("**An evening**")[2].partition("**The rest")[0])


def way_of_a_weight() -> list[str]:
    """Return the files that docs/architecture.md crosses with one weight, from step 1 to step 4."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return linked(page.partition("*Step 1, weights down.*")[2].partition("\n## ")[0])


def place_of(frame: FrameType) -> tuple[str, str]:
    """Return the file, within refimpl, and the name of the function that a frame runs."""
    return frame.f_code.co_filename.removeprefix(PACKAGE), frame.f_code.co_qualname


def calls_of(f: Callable[[], Any]) -> list[tuple[str, str]]:
    """Return the calls of functions of refimpl during f(), in order."""
    calls = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.append(place_of(frame))

    sys.setprofile(note)
    try:
        f()
    finally:
        sys.setprofile(None)
    return calls


def one_linear_layer() -> list[tuple[str, str]]:
    """Return the calls behind one forward of a linear layer in FP16."""
    run = rf.Run(rf.get_recipe("fp16").policy, rf.get_backend("reference"))
    p, rng = run.precision("linear", "mlp.c_fc"), np.random.default_rng(0)
    x, w, b = (rf.cast(rng.standard_normal(shape, np.float32), "fp16") for shape in ((16, 32, 32), (128, 32), (128,)))
    linear_forward(x, w, b, p)
    return calls_of(lambda: linear_forward(x, w, b, p))


def step_of_a_gpt() -> None:
    """Make one step in FP16 on the backend 'reference'."""
    model = rf.gpt_model(rf.GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=4))
    backend, recipe, rule = rf.get_backend("reference"), rf.get_recipe("fp16"), rf.AdamW()
    state = rf.State(model, recipe.state_encodings(rule.moments), backend)
    state.load_weights(model.initial_weights(np.random.default_rng(0)))
    run = rf.Run(recipe.policy, backend)
    tokens = np.zeros((1, 4), np.int64)
    optimizer = rf.Optimizer(rule, rf.Schedule(1e-3, 1e-3, 0, 1))
    rf.train_step(model, [(tokens, tokens)], state, optimizer, rf.make_loss_scale("dynamic", init_scale=1024), run)


def down_to_a_rounding(place: str = "transformer.h.0.mlp.c_fc") -> list[tuple[str, str]]:
    """Return the calls in progress, from `train_step` to `cast`, when the output of a linear layer of a GPT is rounded."""
    stack: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        caller = frame.f_back
        if stack or event != "call" or place_of(frame) != ("numerics/casts.py", "cast") or caller is None:
            return
        if caller.f_locals.get("site") == "y" and caller.f_locals["self"].place == place:
            above: FrameType | None = frame
            while above is not None:
                if above.f_code.co_filename.startswith(PACKAGE):
                    stack.insert(0, place_of(above))
                above = above.f_back

    sys.setprofile(note)
    try:
        step_of_a_gpt()
    finally:
        sys.setprofile(None)
    return stack[stack.index(("step.py", "train_step")) :]


def counts() -> list[Count]:
    """Return all that is limited."""
    files, calls, stack = evening(), one_linear_layer(), down_to_a_rounding()
    elsewhere = {file for file, _ in stack} - {*files}
    calls_of(step_of_a_gpt)  # imports, and what is made once per process
    of_a_step = calls_of(step_of_a_gpt)
    of_a_step = of_a_step[of_a_step.index(("step.py", "train_step")) :]
    lines = sum(len((ROOT / "refimpl" / file).read_text(encoding="utf-8").splitlines()) for file in files)
    return [
        Count("lines of the evening in README", lines, 1800),
        Count("files of the evening", len(files), 16),
        Count("calls of one FP16 linear forward", len(calls), 30),
        Count("distinct functions behind that forward", len(set(calls)), 15),
        Count("files behind that forward", len({file for file, _ in calls}), 5),
        Count("files that docs/architecture.md names on the way of one weight", len(way_of_a_weight()), 9),
        Count("files in progress from train_step to a rounding, not of the evening", len(elsewhere), 0),
        Count("files that run in a step of a GPT, all helpers included", len({file for file, _ in of_a_step}), 30),
    ]


def table(found: list[Count]) -> str:
    """Return the counts as a table in Markdown."""
    rows = [f"| {count.what} | {count.number} | {count.limit} |" for count in found]
    return "\n".join(["| what | count | at most |", "| --- | --- | --- |", *rows]) + "\n"


def with_table(page: str, rows: str) -> str:
    """Return the text of docs/architecture.md with another table of counts."""
    before, heading, after = page.partition("| what | count | at most |\n")
    return before + rows + "\n" + after.partition("\n\n")[2] if heading else page


def run() -> int:
    """Print the counts, and the calls on the way to a rounding. Return 1 if one is over its limit."""
    parser = Parser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the table into docs/architecture.md")
    update, found = parser.parse_args().update, counts()
    for count in found:
        print(f"{count.number:6} (at most {count.limit:4})   {count.what}")
    print("\nThe calls in progress when an activation is rounded:\n")
    for file, function in down_to_a_rounding():
        print(f"    {file:24} {function}")
    if update:
        page = ROOT / "docs" / "architecture.md"
        page.write_text(with_table(page.read_text(encoding="utf-8"), table(found)), encoding="utf-8")
    return int(any(count.number > count.limit for count in found))


if __name__ == "__main__":
    main(run)
