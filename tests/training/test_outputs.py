"""Reports, pictures and data: one that is there is never replaced without --overwrite."""

from __future__ import annotations

from pathlib import Path

import pytest
from script_loader import load_script

from refimpl.errors import UsageError
from refimpl.training.outputs import target


def test_what_nobody_named_takes_the_next_number(tmp_path: Path) -> None:
    page = tmp_path / "new" / "report-fp8.html"
    first, second = (target("--out", None, page, False) for _ in range(2))  # two that were started at the same moment
    assert [first.write_text("a"), second.write_text("b")] == [page, page.with_name("report-fp8-2.html")]
    assert target("--out", None, page, False).write_text("c").name == "report-fp8-3.html"
    assert target("--out", None, page, True).write_text("d") == page
    assert [path.read_text() for path in sorted(page.parent.iterdir())] == ["b", "c", "d"]


def test_what_was_named_is_refused_where_it_exists(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"--json .*a\.json exists: name another file, or --overwrite replaces it"):
        target("--json", path, path, False)
    assert path.read_text() == "mine"
    target("--json", path, path, True).write_text("new")
    assert path.read_text() == "new"


def test_a_file_that_came_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    chosen = target("--json", path, path, False)
    path.write_text("another run's")
    assert chosen.write_text("ours") == tmp_path / "a-2.json" and path.read_text() == "another run's"


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        target("--out", None, tmp_path / "page.html", False).write(fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["formats", "loss_scale"])
def test_pictures(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    monkeypatch.chdir(tmp_path)
    words = ["--format", "e4m3"] if script == "formats" else ["torch"]

    def run(*more: str) -> None:
        module = load_script(script)
        parse = module.arguments if script == "formats" else module.parser().parse_args
        getattr(module, f"show_{script}")(**vars(parse([*words, *more])))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).write_bytes(b"drawn"))
    run("--plot")
    run("--plot")
    with pytest.raises(UsageError, match=f"{script}.png exists"):
        run("--plot", f"{script}.png")
    run("--plot", f"{script}.png", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{script}-2.png", f"{script}.png"]
    assert f"drawn: {script}-2.png" in capsys.readouterr().err
