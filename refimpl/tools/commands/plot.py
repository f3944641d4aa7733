"""Draw the logs of one run or several in one picture, or write them as a table.

    python scripts/plot.py runs/gpt-fp16                         also while the run is going on, or after it was killed
    python scripts/plot.py runs/gpt-fp16 runs/gpt-bf16 --x seconds
    python scripts/plot.py runs/gpt-fp16 --csv log.csv

The picture shows losses, gradient norm, loss scale and skipped steps. The table has one row per step, in which an evaluation
after that step is included.
"""

from refimpl.training.cli import main as run_program

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refimpl.errors import UsageError
from refimpl.training.arguments import Parser
from refimpl.training.metrics import Metrics, as_table, read_metrics
from refimpl.training.outputs import target
from refimpl.training.pictures import figure_for_flag, save
from refimpl.training.plots import AXES, SIZE, draw_runs
from refimpl.training.run_folder import METRICS, read_config
from refimpl.training.tokenizer import BYTES

PICTURE = Path("runs/plot.png")


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    result.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="the folder of a run")
    result.add_argument("--x", choices=AXES, default="step", dest="axis", help="the horizontal axis (default: step)")
    file = result.add_mutually_exclusive_group()
    file.add_argument(
        "--out", type=Path, default=PICTURE, metavar="FILE", help=f"the picture, a PNG (default: a new {PICTURE})"
    )
    file.add_argument("--csv", type=Path, metavar="FILE", help="write a table in place of the picture")
    result.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return result


def arguments(words: Sequence[str]) -> Any:
    """Parse the command line; flags may come between the folders."""
    return parser().parse_intermixed_args(words)


def run(folders: Sequence[Path], axis: str, out: Path, csv: Path | None, overwrite: bool) -> None:
    """Draw the logs in folders, or write them as a table; a folder that is named twice counts once. Errors: UsageError."""
    folders = list({folder.resolve(): folder for folder in folders}.values())
    if csv is not None:
        file = target("--csv", csv, csv, overwrite)
        print(f"written: {file.write_text(table(_read(folders)))}")
        return
    figure, picture = figure_for_flag(out, PICTURE, overwrite, *SIZE, flag="--out")
    logs, settings = _read(folders), [read_config(folder) for folder in folders]
    tokenizers = {one.get("tokenizer", BYTES.name) for one in settings}
    top = draw_runs(figure, logs, axis, "byte" if tokenizers == {BYTES.name} else "token")
    if len(tokenizers) > 1:
        print("note: losses per token of different tokenizers do not compare; val_bits_per_byte of --csv does", file=sys.stderr)
    if len(logs) == 1:
        (one,), (name,) = settings, logs
        top.set_title(f"{name}: {one.get('model')}, recipe {one.get('recipe')}, seed {one.get('seed')}")
    print(f"written: {picture.write(lambda temporary: save(figure, temporary))}")


def _read(folders: Sequence[Path]) -> dict[str, Metrics]:
    """Return the logs by the names of their folders. Errors: UsageError for one without a log."""
    logs = {str(folder): read_metrics(folder) for folder in folders}
    for name, log in logs.items():
        if not any(log):
            raise UsageError(f"{name} has no log of a run: there is no {METRICS} in it, or nothing in that")
    return logs


def table(logs: dict[str, Metrics]) -> str:
    """Return logs as CSV, with the folder in the first column. A cell is empty for NaN, and where there was no evaluation."""
    rows = [{"folder": name, **row} for name, log in logs.items() for row in as_table(log)]
    columns = list(dict.fromkeys(key for part in ("steps", "evaluations") for log in logs.values() for row in getattr(log, part)
                                 for key in row))  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, ["folder", *columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(**vars(arguments(sys.argv[1:]))))
