"""Every command of README and docs/ on a terminal of 80 columns, into a file, and in encodings that lack most characters.

No line is longer than the terminal is wide and no progress line is cut; a file has no progress bar; no encoding crashes. Those
that train do so for a few steps: `SHORTER` has the flags for that, which come after those of the page.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from doc_commands import COMMANDS, lacks, may_exit, words_of
from hf_folders import LLAMA, tensors_of, write
from paths import SCRIPTS
from progress_bars import Terminal
from script_loader import load_script, run_here
from tiny_tokenizers import byte_level

WIDTH = 80
TINY = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 8 --batch-size 4"
TRAINED = "--steps 3 --batch-size 8 --block-size 32 --eval-batches 1 --sample-bytes 15"  # of which a terminal shows 60 at most
SHORTER = {
    "train": TRAINED,
    "generate": "--tokens 8",
    "compare_recipes": "--steps 3 --batch-size 2 --block-size 8 --seeds 2 --perturbations 1 --eval-batches 1",
    "compare_pytorch": "--steps 3 --batch-size 2",
    "inspect_precision": "--steps 3 --batch-size 4 --block-size 16",
    "trace": "--steps 2",
    "mistakes": "ignore-inf",
    "bench": "--rounds 1 --models smoke --recipes fp16",
    "experiments": "",
}
ALONE = {"compare_recipes": ("--inference", "--batch-size 2 --block-size 8 --eval-batches 1 --tokens 4"),
         "train": ("--resume", "--steps 5"), "trace": ("diff", ""), "generate": ("--loss", "")}  # fmt: skip
"""Flags with which a command takes others: no others are added."""
OF_A_TEXT = ("train", "inspect_precision", "compare_recipes", "compare_pytorch")
WITH_DATA = {"--data", "--resume", "--run", "--trace", "--hf"}
"""Flags of commands that have their text. All others that have flags are given a short one, which takes a third of the time."""
WORDS = {"FILE": "text.txt", "NAME": "ignore-inf", "NEW": "new", "DIR": "SmolLM2-135M", "your_script.py": "train.py"}
"""What stands for the words of a page that are the reader's."""
NO_TERMINAL = "a pseudo-terminal needs a system of the POSIX family"

NO_FILE = re.compile("\r|\\d%\\||\x1b|Traceback")
"""What a file has none of: a progress bar, a control character, a traceback."""
ESCAPED = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")

SCRIPT = """\
import torch
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(3):
    loss = model(torch.randn(4, 8)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: runs, a text, traces, a Hugging Face model, a script with a loop."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "text.txt").write_text("The for statement is used to iterate over the elements of a sequence.\n" * 400)
    (folder / "package").mkdir()
    for name in ("train.py", "package/train.py", "package/__init__.py"):
        (folder / name).write_text(SCRIPT)
    if importlib.util.find_spec("tokenizers") is not None:
        write(folder / "SmolLM2-135M", {**LLAMA, "vocab_size": 320}, tensors_of({**LLAMA, "vocab_size": 320}))
        byte_level(folder / "SmolLM2-135M")
        shutil.copy(folder / "SmolLM2-135M" / "tokenizer.json", folder)
        for out in ("runs/llama-bf16", "runs/tuned"):
            done(folder, f"train --init-from SmolLM2-135M --data text.txt --recipe bf16 {TRAINED} --out {out}")
    for out in ("runs/gpt-fp16", "runs/gpt-bf16", "runs/mine"):
        done(folder, f"train {TINY} --steps 3 --eval-batches 1 --sample-bytes 0 --out {out}")
    for more in ("--out ours.safetensors", "--mistake unscale-after-clip --out theirs.safetensors"):
        done(folder, f"trace record --recipe amp-fp16-cpu --steps 2 {more}")
    done(folder, "convert export runs/gpt-fp16 gpt.safetensors")
    if importlib.util.find_spec("torch") is not None:
        subprocess.run([sys.executable, SCRIPTS / "audit.py", "--demo"], cwd=folder, capture_output=True)
    return folder


def done(folder: Path, command: str) -> None:
    name, *words = command.split()
    ended = run_here(name, *words, folder=folder)
    assert ended.returncode == 0, ended.stderr


def shortened(script: str, words: list[str]) -> list[str]:
    """The words of a command that takes seconds, about files that `desk` has."""
    words = [WORDS.get(word, word) for word in words]
    if script == "audit" and "-m" not in words and "train.py" not in words:
        return words
    if script == "convert" and words[0] == "export":
        return [*words[:-1], f"new-{Path(words[-1]).name}"]
    flag, others = ALONE.get(script, ("", ""))
    more = others if flag in words else SHORTER.get(script, "")
    if (script == "mistakes" and "--table" not in words) or ("--init-from" in words and script == "inspect_precision"):
        more = ""
    if script in OF_A_TEXT and words and more and not WITH_DATA & {*words}:
        more += " --data text.txt"
    if "--out" in words and (words[0] == "record" if script == "trace" else script == "train" and "--resume" not in words):
        more += " --overwrite"
    if script == "bench" and "--ranks" in words:
        more = "--rounds 1 --models smoke --recipes bf16"
    return [*words, *more.split()]


def parts_of(text: str) -> list[str]:
    """The lines that a terminal shows one after the other, in the same place too; without the code that moves the cursor up."""
    return [part.rstrip() for part in re.split("[\r\n]+", text.replace("\x1b[A", ""))]


QUICK = (
    "experiments", "memory", "memory --conventions", "memory --zero-table", "recipes", "recipes --recipe nvfp4 --rows",
    "mistakes", "formats 0.1 65520", "loss_scale --compare", "inspect_step", "train --help", "compare_recipes --help",
    "convert export --help",
)  # fmt: skip


@pytest.mark.parametrize("width", [WIDTH, 60])
def test_quick_commands_fit(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for command in QUICK:
        name, *words = command.split()
        output = Terminal()
        monkeypatch.setattr("sys.argv", [f"scripts/{name}.py", *words])
        with redirect_stdout(output), pytest.raises(SystemExit):
            load_script(name).main()
        lines = output.getvalue().split("\n")
        assert len(lines) > 5 and [line for line in lines if len(line) > width] == [], command


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({command for _, command in COMMANDS}))
def test_every_command_fits_a_terminal_and_a_file(
    command: str, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")  # it asks for an account on a terminal
    terminal_runs = pytest.importorskip("terminal_runs", reason=NO_TERMINAL, exc_type=ImportError)
    if missing := lacks(command):
        pytest.skip(f"needs {missing}")
    script, words = words_of(command)
    if words[:1] == ["gguf"]:
        pytest.skip("needs a GGUF file of a Llama: test_huggingface_gguf.py has one")
    if "DIR" in words or "SmolLM2-135M" in words or "runs/tuned" in words or "tokenizer.json" in words:
        pytest.importorskip("tokenizers", reason="makes the tokenizer of a Hugging Face model")
    words = shortened(script, words)

    def place(name: str) -> Path:
        return Path(shutil.copytree(desk, tmp_path / name))

    run = terminal_runs.TerminalRun(script, *words, cwd=place("terminal"), columns=WIDTH)
    code = run.end(600)
    assert code in may_exit(command), run.seen
    parts = parts_of(run.seen)
    assert [part for part in parts if len(part) > WIDTH] == []
    assert [part for part in parts if re.search(r"\d%\|", part) and not part.endswith("]")] == []
    text = into_a_file(script, words, place("ascii"), "ascii", may_exit(command))
    assert NO_FILE.search(text) is None, text
    if ESCAPED.search(text):  # otherwise all of it is ASCII, and the same in the other encoding
        text = into_a_file(script, words, place("cp1252"), "cp1252", may_exit(command))
        assert NO_FILE.search(text) is None, text


def into_a_file(script: str, words: list[str], folder: Path, encoding: str, codes: tuple[int, ...]) -> str:
    """What a command writes to a file, both streams together."""
    environment: dict[str, Any] = {**os.environ, "PYTHONIOENCODING": encoding}
    path = folder / "output.txt"
    with path.open("wb") as file:
        code = subprocess.run([sys.executable, SCRIPTS / f"{script}.py", *words], cwd=folder, stdout=file, stderr=file,
                              env=environment).returncode  # fmt: skip
    text = path.read_bytes().decode(encoding)
    assert code in codes, text
    return text
