"""`python -m refimpl`: the commands without scripts/, as an installed package has them."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from paths import ROOT

from refimpl.__main__ import commands, main, usage
from refimpl.training.config import Config
from refimpl.training.program import as_called, is_command

COMMANDS = sorted(path.stem for path in (ROOT / "refimpl/tools/commands").glob("[!_]*.py"))


def refimpl(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "refimpl", *words], cwd=folder, capture_output=True, text=True, timeout=120)


def test_help_lists_every_command() -> None:
    assert list(commands()) == COMMANDS and len(COMMANDS) == 18
    assert all(f"    {name} " in usage() for name in COMMANDS) and all(commands().values())


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_script_that_says_the_same_in_one_line(name: str) -> None:
    text = (ROOT / "scripts" / f"{name}.py").read_text()
    assert (ast.get_docstring(ast.parse(text)) or "").splitlines()[0] == commands()[name]
    assert f"from refimpl.tools.commands.{name} import main" in text and len(text.splitlines()) == 9


@pytest.mark.parametrize("words", ["train", "compare_recipes", "inspect_precision", "memory --measure", "trace record --out x"])
def test_commands_that_train_take_the_sizes_of_llama(words: str) -> None:
    given = f"{words} --model llama --n-head 2 --n-kv-head 1 --head-dim 8 --ffn-dim 24 --qk-norm --qkv-bias --no-tied"
    name, *rest = given.split()
    flags = vars(importlib.import_module(f"refimpl.tools.commands.{name}").parser().parse_args(rest))
    names = {field.name for field in fields(Config)}
    sizes = Config.of({key: value for key, value in flags.items() if key in names}).make_model().config
    expected = {"n_kv_head": 1, "head_dim": 8, "ffn_dim": 24, "qk_norm": True, "qkv_bias": True, "o_bias": False, "tied": False}
    assert {key: sizes[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        ([], 0, "usage: python -m refimpl COMMAND ...", ""),
        (["--help"], 0, "usage: python -m refimpl COMMAND ...", ""),
        (["--version"], 0, "refimpl 0.", ""),
        (["trian"], 2, "", "did you mean train?"),
        (["recipes", "--rcipe"], 2, "", "did you mean --recipe? See python -m refimpl recipes --help"),
        (["inspect-step", "--help"], 0, "python -m refimpl inspect_step\n", ""),
        (["generate", "nowhere"], 2, "", "nowhere"),
    ],
)
def test_words(
    words: list[str], code: int, out: str, err: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["__main__.py", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert (ended.value.code or 0) == code
    assert out in printed.out and err in printed.err
    assert printed.err.count("\n") == (code != 0) and "scripts/" not in printed.out + printed.err


def test_a_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    tiny = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 8 --batch-size 4 --eval-batches 1 --sample-bytes 0"
    done = refimpl("train", "--steps", "3", *tiny.split(), "--out", "run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_which_programs_answer_ctrl_c() -> None:
    for file in ("scripts/train.py", "venv/bin/refimpl", "lib/refimpl/__main__.py", "Scripts/refimpl.exe/__main__.py"):
        assert is_command(file), file
    for file in (None, "tests/test_cli.py", "bin/pytest", "site-packages/pytest/__main__.py", "notebook.py"):
        assert not is_command(file), file


def test_commands_in_texts_are_those_that_the_user_has(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "see `python scripts/mistakes.py`, or scripts/trace.py record --out a"
    assert as_called(text) == text
    monkeypatch.setattr("sys.argv", ["python -m refimpl train"])
    assert as_called(text) == "see `python -m refimpl mistakes`, or python -m refimpl trace record --out a"
