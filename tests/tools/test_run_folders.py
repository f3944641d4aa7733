"""The folder of a run in the place of its checkpoint, in every command that reads one; what the others say to it."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from script_loader import run_here

TINY = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 8 --batch-size 4"
SHORT = "--steps 1 --batch-size 2 --eval-batches 1"
FILE = "run/checkpoint.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run."""
    folder = tmp_path_factory.mktemp("made")
    run_here("train", *f"{TINY} --recipe bf16 --steps 3 --eval-batches 1 --sample-bytes 0 --out run".split(), folder=folder)
    assert (folder / FILE).exists()
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "here"))


def told(line: str) -> str:
    """A line without the name of the source, and without the time of a step in the table of compare_recipes."""
    return re.sub(r" +\d+ +([\d.]+)$", r" \1", line.replace(FILE, "run").replace(Path(FILE).name, "run"))


@pytest.mark.parametrize(
    "command",
    [
        "generate RUN --tokens 8",
        "generate RUN --loss run/config.json",
        "convert export RUN new.safetensors",
        "convert export RUN new",
        f"train --init-from RUN {SHORT} --sample-bytes 8 --out new",
        f"inspect_precision --init-from RUN {SHORT.replace('--eval-batches 1', '')} --no-page",
        f"compare_recipes --init-from RUN {SHORT} --recipes bf16 --seeds 2 --perturbations 1 --no-page",
        "compare_recipes --init-from RUN --inference --recipes bf16 --batch-size 2 --eval-batches 1 --tokens 2",
    ],
)
def test_the_folder_of_a_run_is_as_good_as_its_checkpoint(command: str, here: Path) -> None:
    said = []
    for source in ("run", FILE):
        name, *words = command.replace("RUN", source).split()
        ended = run_here(name, *words, folder=here)
        assert ended.returncode == 0, ended.stderr
        said.append([told(line) for line in ended.stdout.splitlines() if "tok/s" not in line])
        shutil.rmtree(here / "new", ignore_errors=True)
        (here / "new.safetensors").unlink(missing_ok=True)
    assert said[0] == said[1] != []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("convert import run new.safetensors", "run is already a checkpoint of refimpl"),
        ("memory --hf run", "run/config.json is of a run: `python scripts/convert.py export RUN NEW` makes it a Hugging Face"),
        ("compare_pytorch --hf run", "run/config.json is of a run: `python scripts/convert.py export"),
        (f"inspect_precision --run {FILE} --no-page", f"{FILE} is a file: give the folder of the run"),
        (f"plot {FILE} --csv new.csv", f"{FILE} is a file: give the folder of the run"),
        (f"train --config {FILE}", "it is not JSON: give a config.json, or the folder of a run"),
    ],
)
def test_what_is_no_run_or_no_checkpoint_is_told_apart(command: str, message: str, here: Path) -> None:
    name, *words = command.split()
    if name == "compare_pytorch" and importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers")
    ended = run_here(name, *words, folder=here)
    assert (ended.returncode, ended.stdout) == (2, "") and message in ended.stderr and ended.stderr.count("\n") == 1
