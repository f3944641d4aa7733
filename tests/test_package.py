"""What surrounds the code: one version everywhere, and a source distribution that holds what the tests read."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

import pytest
from doc_commands import COMMANDS, words_of
from paths import ROOT

import refimpl
from refimpl.tools.formats.plot import PICTURE as FORMATS_PICTURE
from refimpl.tools.loss_scale import PICTURE as SCALE_PICTURE


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert setup["metadata"]["version"] == "attr: refimpl.__version__"
    assert re.findall(r"^version: (.+)$", text_of("CITATION.cff"), re.M) == [refimpl.__version__]
    assert refimpl.__version__ in text_of("CHANGELOG.md")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone: git says what it ignores")
def test_git_ignores_what_the_commands_of_the_pages_write_and_nothing_else() -> None:
    def git(*words: str) -> list[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()

    arguments = [word for _, command in COMMANDS for word in words_of(command)[1]]
    named = {word for word in arguments if re.fullmatch(r"[\w.-]+\.(safetensors|png|csv)", word)}
    assert {"start.safetensors", "theirs.safetensors", "log.csv"} <= named
    written = {*named, str(FORMATS_PICTURE), str(SCALE_PICTURE), "site/index.html", "runs/gpt-fp16/loss.png"}
    assert written == {*git("check-ignore", "--no-index", *sorted(written))}
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard") == []


def test_advice_to_install_can_be_followed_anywhere() -> None:
    """An installed package has no clone, hence no '.' to install; and it is on no index, so that packages are named."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    required = {re.split("[=<>]", line)[0] for extra in setup["options.extras_require"].values() for line in extra.split()}
    by_file = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (ROOT / "refimpl").rglob("*.py")}
    advice = [(file, words) for file, text in by_file.items() for words in re.findall("pip install ([^:;\n]+)", text)]
    assert len({file for file, _ in advice}) >= 12
    advised = {}
    for file, words in advice:
        if file != "refimpl/tools/commands/gpu_check.py":  # which runs in a clone only
            assert "'." not in words and "refimpl" not in words, (file, words)
            advised[file] = re.split(r"['\" ]+", words.lstrip("'"))[0].partition("==")[0]
    assert {*advised.values()} <= {*required, "{PACKAGES[name]}", "nvidia-nccl-cu12"}, advised


@pytest.mark.skipif(find_spec("setuptools") is None, reason="setuptools, which builds distributions, is not installed")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone: git lists the files that must be in the distribution")
def test_every_file_is_part_of_the_source_distribution(tmp_path: Path) -> None:
    """By the build backend itself. It writes beside the sources, so it is given copies of them."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in files:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    program = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=tmp_path / "source", capture_output=True, check=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    assert set(files) <= held, sorted(set(files) - held)
