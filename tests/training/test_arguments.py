"""Command lines that cannot be read: one line, exit code 2, and the flag that was meant."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator

import pytest
from paths import COMMANDS, EXAMPLES, SCRIPTS
from script_loader import load_script

from refimpl.errors import UsageError, nearest, one_line, unknown
from refimpl.precision.recipes import get_recipe
from refimpl.training.arguments import ELSEWHERE, Parser

BAD = [
    ("train", "--seed x", "argument --seed: invalid int value: 'x'; see train.py --help"),
    ("train", "--lr 1e", "argument --lr: invalid float value: '1e'; see train.py --help"),
    ("train", "--bacth_size 8", "unknown flag --bacth_size; did you mean --batch-size? See train.py --help"),
    ("train", "--bogus 1", "unknown flag --bogus; see train.py --help"),
    ("train", "--bacth_size=8", "unknown flag --bacth_size=8; did you mean --batch-size? See train.py --help"),
    ("train", "--learning_rate 1e-3", "unknown flag --learning_rate; did you mean --lr? See train.py --help"),
    ("train", "--learning-rate=1e-3", "unknown flag --learning-rate=1e-3; did you mean --lr? See train.py --help"),
    ("train", "--max_iters 9", "unknown flag --max_iters; did you mean --steps? See train.py --help"),
    ("train", "--gradient_accumulation_steps 2", "accumulation_steps; did you mean --grad-accum? See train.py --help"),
    ("train", "--dropout 0.1", "unknown flag --dropout: no model has dropout; see train.py --help"),
    ("recipes", "--max_iters 9", "unknown flag --max_iters; see recipes.py --help"),
    ("train", "--zzz", "unknown flag --zzz; see train.py --help"),
    ("train", "--steps", "argument --steps: expected one argument; see train.py --help"),
    ("loss_scale", "torch torch", "unexpected 'torch'; see loss_scale.py --help"),
    ("train", "now", "unexpected 'now'; see train.py --help"),
    ("train", "--eval=1", "ambiguous option: --eval=1 could match --eval-every, --eval-batches; see train.py --help"),
    ("convert", "exprt a b", "did you mean export? See convert.py --help"),
    ("convert", "", "error: choose one of export, import, gguf; see convert.py --help"),
    ("trace", "", "error: choose one of record, diff; see trace.py --help"),
    ("recipes", "fp16", "unexpected 'fp16'; did you mean --recipe fp16? See recipes.py --help"),
    ("mistakes", "ignore_inf", "unexpected 'ignore_inf'; did you mean --table ignore-inf? See mistakes.py --help"),
    ("mistakes", "foo", "unexpected 'foo'; see mistakes.py --help"),
    ("convert", "import a", "the following arguments are required: TARGET; see convert.py import --help"),
    ("convert", "import a b --n-haed 3", "unknown flag --n-haed; did you mean --n-head? See convert.py import --help"),
    ("trace", "diff a b --n-layer 2", "unknown flag --n-layer; see trace.py diff --help"),
    ("trace", "record --out o --n-layr 2", "unknown flag --n-layr; did you mean --n-layer? See trace.py record --help"),
    ("generate", "", "the following arguments are required: CHECKPOINT; see generate.py --help"),
]


OF_ANY_MODEL = ["train", "trace record --out o", "inspect_precision", "compare_recipes", "memory --measure"]


@pytest.mark.parametrize("command", OF_ANY_MODEL)
def test_an_mlp_has_no_heads(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name, *more = command.split()
    monkeypatch.setattr("sys.argv", [f"{name}.py", *more, "--model", "mlp", "--n-head", "7"])
    with pytest.raises(SystemExit) as ended:
        load_script(name).main()
    says = "error: --n-head 7 is for --model gpt or llama: leave it out\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, says)


CONSTANT = [("--loss-scale 128", "128"), ("--loss-scale none", "none"), ("--recipe bf16", "none")]


@pytest.mark.parametrize(("scale", "kind"), CONSTANT)
@pytest.mark.parametrize("words", ["--init-scale 65536", "--init-scale 5", "--growth-interval 3"])
@pytest.mark.parametrize("command", ["train", "trace record --out o", "inspect_precision", "compare_pytorch", "inspect_step"])
def test_a_constant_loss_scale_refuses_the_flags_of_one_that_adapts(
    command: str, scale: str, kind: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the default value: whoever gives it wants it used."""
    if command == "compare_pytorch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    name, *more = command.split()
    if (name == "compare_pytorch" and "--loss-scale" in scale) or (name == "inspect_step" and "growth" in words):
        pytest.skip("it has no such flag")
    monkeypatch.setattr("sys.argv", [f"{name}.py", *more, *scale.split(), *words.split()])
    with pytest.raises(SystemExit) as ended:
        load_script(name).main()
    flag, value = words.split()
    shown = value if flag == "--growth-interval" else float(value)
    assert ended.value.code == 2
    says = f"error: {flag} {shown} with loss scale {kind}: only a dynamic one has this setting, such as --loss-scale dynamic\n"
    assert capsys.readouterr().err == says


@pytest.mark.parametrize("value", ["-1e-3", "-1E5", "-.5e2", "-inf", "-nan", "-3"])
def test_a_negative_number_is_a_value_and_not_a_flag(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """argparse alone says 'expected one argument' of --lr -1e-3, and nothing of what is wrong with it."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    lr = load_script("train").parser().parse_args(["--lr", value]).lr
    assert str(lr) == str(float(value))


def test_flags_of_other_projects_have_names_here() -> None:
    flags = {flag for action in load_script("train").parser()._actions for flag in action.option_strings}
    assert {ours for ours in ELSEWHERE.values() if ours} <= flags
    assert not {f"--{theirs}" for theirs in ELSEWHERE} & flags


@pytest.mark.parametrize(("script", "line", "message"), BAD)
def test_one_line_and_exit_code_2(
    script: str, line: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [f"{script}.py"])
    parser = load_script(script).parser()
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(line.split(" ") if line else [])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_every_script_has_this_parser() -> None:
    """argparse's own prints its usage before an error. freeze_cupy_api.py runs where refimpl is not installed, examples
    have no flags.
    """
    commands = sorted(COMMANDS.glob("[!_]*.py"))
    scripts = [path for path in sorted(SCRIPTS.glob("*.py")) if path.name not in {command.name for command in commands}]
    for path in commands + scripts:
        if path.stem not in ("freeze_cupy_api", *EXAMPLES):
            names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
            assert "ArgumentParser" not in names and "Parser(" in path.read_text(), path.name


def test_right_lines_are_read_as_argparse_reads_them() -> None:
    ours, theirs = Parser(), argparse.ArgumentParser()
    for parser in (ours, theirs):
        parser.add_argument("names", nargs="*")
        parser.add_argument("--n", type=int, default=3)
    for line in ([], ["a", "--n", "4"], ["--n=5", "a", "b"]):
        assert vars(ours.parse_args(line)) == vars(theirs.parse_args(line))
        assert vars(ours.parse_intermixed_args(line)) == vars(theirs.parse_intermixed_args(line))


def test_names_that_were_nearly_right() -> None:
    with pytest.raises(UsageError, match=r"unknown recipe 'fp61': choose one of .*; did you mean fp64\?$"):
        get_recipe("fp61")
    names = ["fp16", "amp-fp16", "pure-fp16", "pure-bf16"]
    assert nearest("bf16-pure", names) == "; did you mean pure-bf16?" and nearest("amp", names) == "; did you mean amp-fp16?"
    assert nearest("fp-16", names) == "; did you mean fp16?" and nearest("int8", names) == ""
    assert unknown("model", "gtp", ["gpt", "mlp"]) == "unknown model 'gtp': choose one of gpt, mlp; did you mean gpt?"
    assert unknown("model", "rnn", ["gpt", "mlp"]) == "unknown model 'rnn': choose one of gpt, mlp"


@pytest.mark.parametrize(
    ("command", "words", "name", "value"),
    [
        ("train", "--batch_size 8", "batch_size", 8),
        ("train", "--batch_size=8", "batch_size", 8),
        ("train", "--no_bias", "bias", False),
        ("train", "--recipe FP16", "recipe", "fp16"),
        ("train", "--recipe=AMP_bf16", "recipe", "amp-bf16"),
        ("train", "--optimizer AdamW --data my_file", "data", "my_file"),
        ("train", "--optimizer AdamW", "optimizer", "adamw"),
        ("train", "--data pydoc_words", "data", "pydoc_words"),
        ("trace", "record --out a_b --n_embd 8", "n_embd", 8),
        ("compare_recipes", "--recipes BF16,Fp8_delayed,x", "recipes", "bf16,fp8-delayed,x"),
        ("generate", "run --prompt=--top_p", "prompt", "--top_p"),
        ("memory", "--params 7B", "params", 7e9),
        ("memory", "--params 124m", "params", 124e6),
        ("memory", "--params 1.5e9", "params", 1.5e9),
        ("memory", "--preset GPT2_XL", "preset", "gpt2-xl"),
        ("audit", "train.py --batch_size 8 --ev_ery 2", "program", ["train.py", "--batch_size", "8", "--ev_ery", "2"]),
    ],
)
def test_case_and_underscores_do_not_count(command: str, words: str, name: str, value: object) -> None:
    assert vars(load_script(command).parser().parse_args(words.split()))[name] == value


@pytest.mark.parametrize("words", ["--params 7X", "--params B", "--params ''"])
def test_numbers_of_parameters_that_are_none(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_script("memory").parser().parse_args(words.split())
    assert "argument --params: invalid amount value" in capsys.readouterr().err


OTHERS = ("audit_cost", "audit_coverage", "pytorch_trace", "record_vectors")
"""Scripts with flags that are not commands of the package."""


@pytest.mark.parametrize("name", [*(path.stem for path in sorted(COMMANDS.glob("[!_]*.py"))), *OTHERS])
def test_help_says_each_flag_once_with_its_default(name: str) -> None:
    if name in OTHERS:
        pytest.importorskip("torch", reason="PyTorch is not installed")
    for parser in parsers(load_script(name).parser()):
        for action in parser._actions:
            if action.help is argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
                continue
            assert action.help, action.dest
            assert action.help.count("(default:") <= 1, action.help
            assert action.metavar or action.choices or action.nargs == 0, f"{action.dest}: no word for its value"
            if action.default not in (None, False, argparse.SUPPRESS, "==SUPPRESS==", "", []) and action.option_strings:
                assert "(default: " in action.help, action.dest


def test_help_fills_paragraphs_and_keeps_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    description = """Summarize in a line that is long.

    command --flag            what it does, in a few words
                              that go on
    command

A paragraph that was broken
by hand at another width.
"""
    monkeypatch.setenv("COLUMNS", "42")
    assert Parser(prog="p", description=description).format_help().partition("\n\noptions")[0] == (
        "usage: p [-h]\n\nSummarize in a line that is long.\n\n    command --flag\n        what it does, in a few words that\n"
        "        go on\n    command\n\nA paragraph that was broken by hand at\nanother width."
    )


def test_switches_that_are_off_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = load_script("train").parser().format_help()
    assert "normalize queries and keys, as in Qwen3 (default: off)" in text and "as output layer (default: on)" in text


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def test_a_message_is_one_line_whatever_stands_in_it() -> None:
    assert one_line("a\nb\x1b[1m\u2028ü") == "a\\nb\\x1b[1m\\u2028ü"
    assert len(one_line("x" * 5000)) == 4000
    assert str(UsageError("a\nb")) == "a\\nb"
