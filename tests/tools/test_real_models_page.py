"""docs/real_models.md: its commands run one after the other, on a tiny random Llama with a tokenizer in place of the model."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hf_folders import LLAMA, tensors_of, write
from paths import ROOT
from tiny_tokenizers import TEXT, byte_level

PAGE = ROOT / "docs" / "real_models.md"
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^    (python scripts/.+)$", PAGE.read_text(), re.M)]


@pytest.mark.slow  # twenty steps under every recipe
def test_the_commands_of_the_page_run_one_after_the_other(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    byte_level(tmp_path / "DIR", vocab_size=300)
    table = {**LLAMA, "vocab_size": 300, "tie_word_embeddings": True}
    write(tmp_path / "DIR", table, {name: 0.1 * array for name, array in tensors_of(table).items()})
    (tmp_path / "FILE").write_text(TEXT * 60)
    ran = []
    for _, script, *arguments in COMMANDS:
        if "gguf" in arguments:  # tests/training/test_huggingface_gguf.py
            continue
        done = subprocess.run([sys.executable, ROOT / script, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{script} {arguments}\n{done.stderr}"
        ran.append(Path(script).stem)
    assert ran == ["train", "generate", "convert", "inspect_precision", "compare_recipes", "compare_recipes"]
    made = {path.name for path in tmp_path.iterdir()}
    assert {"NEW", "real_models.png"} <= made and (tmp_path / "NEW" / "tokenizer.json").exists()
