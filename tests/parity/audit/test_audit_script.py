"""`scripts/audit.py`: other people's scripts run as Python runs them, and what trains in them is found."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT, SCRIPTS

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from torch import nn

from refimpl.errors import UsageError
from refimpl.parity.audit.finding import is_serious
from refimpl.parity.audit.found import Models
from refimpl.parity.audit.program import ProgramAudit
from refimpl.parity.audit.session import Audit
from refimpl.tools.commands.audit import DEMO, arguments_of, audit_program, folder_for, main
from refimpl.tools.commands.audit import run as run_audit
from refimpl.tools.python_program import check_program, run_python

START = """
import sys, torch
from torch import nn
torch.manual_seed(0)
def net(): return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
def batch(): return torch.randn(5, 8)
"""
PLAIN = """
model = net(); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(6):
    model(batch()).square().mean().backward(); optimizer.step(); optimizer.zero_grad()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test in a folder of its own, and what the audit replaces in PyTorch is as before."""
    monkeypatch.chdir(tmp_path)
    before = nn.Module.__call__, torch.autograd.backward, torch.amp.GradScaler.step, torch.amp.GradScaler.update
    yield tmp_path
    assert before == (nn.Module.__call__, torch.autograd.backward, torch.amp.GradScaler.step, torch.amp.GradScaler.update)
    assert Audit._running is None and torch._C._len_torch_dispatch_stack() == 0


def audited(program: str, *words: str, start: str = START, **options: Any) -> tuple[Audit, int, list[str]]:
    """Run a program under the audit, in this process."""
    Path("train.py").write_text(start + textwrap.dedent(program), encoding="utf-8")
    said: list[str] = []
    around = ProgramAudit(**{"steps": 3, "every": 100, **options}, say=said.append)
    code = run_python("train.py", False, words, around)
    assert around.audit is not None
    assert around.audit.failures == {}
    return around.audit, code, said


def per_step(audit: Audit, name: str) -> list[int]:
    """How many operations of a name each audited step has."""
    return [sum(operation.name.startswith(name) for operation in step.operations) for step in audit.steps]


# -------------------------------------------------------------------------------------------------- what trains, and when


def test_a_plain_loop_is_found_and_cut_into_steps() -> None:
    audit, code, said = audited(PLAIN, every=5)
    assert (code, audit.number, audit.audited) == (0, 6, [1, 2, 3, 5]) and audit.unended == ""
    assert said == ["found Sequential (212 parameters), SGD"]
    assert per_step(audit, "aten.addmm") == [2] * 4 and per_step(audit, "aten.gelu_backward") == [1] * 4
    assert {operation.phase for operation in audit.steps[-1].operations} == {"forward", "backward", "step", "other"}
    assert {operation.module for operation in audit.steps[-1].operations if operation.phase == "forward"} >= {"0", "1", "2"}


def test_what_follows_the_update_belongs_to_its_step_and_an_evaluation_to_none() -> None:
    audit, _, said = audited("""
        model = net(); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        average = torch.optim.swa_utils.AveragedModel(model)
        for step in range(4):
            loss = model(batch()).square().mean()
            scaler.scale(loss * (1e30 if step == 1 else 1)).backward(); scaler.step(optimizer)
            scale = scaler.get_scale(); scaler.update(); optimizer.zero_grad()
            if scaler.get_scale() == scale: scheduler.step(); average.update_parameters(model)
            with torch.no_grad(): model(batch())
    """)
    assert said == ["found Sequential (212 parameters), SGD, GradScaler, StepLR, AveragedModel"]
    assert audit.number == 4 and per_step(audit, "aten.addmm") == [2, 2, 2]
    borders = [(step.before, step.after) for step in audit.steps]
    moved = [(after.schedulers[0] - before.schedulers[0], after.scale / before.scale) for before, after in borders]
    assert moved == [(1, 1.0), (0, 0.5), (1, 1.0)]
    kinds = [{o.arguments["self"].role.kind for o in step.operations if o.name == "aten.lerp_.Scalar"} for step in audit.steps]
    assert per_step(audit, "aten.copy_")[0] >= 4 and all(kind <= {"ema"} for kind in kinds)


LOOPS = {
    "accumulation": (
        """
        model = net(); optimizer = torch.optim.AdamW(model.parameters())
        for step in range(4):
            for _ in range(3): (model(batch()).square().mean() / 3).backward()
            optimizer.step(); optimizer.zero_grad()
        """, "Sequential", 4, [6, 6, 6],
    ),
    "two optimizers of one model": (
        """
        model = net()
        both = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
        for step in range(4):
            model(batch()).square().mean().backward()
            for optimizer in both: optimizer.step(); optimizer.zero_grad()
        """, "Sequential", 4, [2, 2, 2],
    ),
    "two models with an optimizer each, stepping in turn": (
        """
        first, second = net(), net()
        both = [(model, torch.optim.SGD(model.parameters(), lr=0.1)) for model in (first, second)]
        for step in range(2):
            for model, optimizer in both:
                model(batch()).square().mean().backward(); optimizer.step(); optimizer.zero_grad()
        """, "Models", 4, [2, 2, 2],
    ),
    "a closure": (
        """
        model = net(); optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2, tolerance_grad=0, tolerance_change=0)
        x = batch()
        def closure():
            optimizer.zero_grad(); loss = model(x).square().mean(); loss.backward(); return loss
        for step in range(4): optimizer.step(closure)
        """, "Sequential", 4, [4, 4, 4],
    ),
    "an optimizer in backward": (
        """
        model = net()
        for p in model.parameters():
            own = torch.optim.SGD([p], lr=0.1)
            p.register_post_accumulate_grad_hook(lambda p, own=own: (own.step(), own.zero_grad())[0])
        for step in range(4): model(batch()).square().mean().backward()
        """, "Sequential", 4, [2, 2, 2],
    ),
    "a wrapper around the model that the loop calls": (
        """
        class Wrapper(nn.Module):
            def __init__(self, model): super().__init__(); self.model = model
        wrapper = Wrapper(net()); optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
        for step in range(4): wrapper.model(batch()).square().mean().backward(); optimizer.step(); optimizer.zero_grad()
        """, "Sequential", 4, [2, 2, 2],
    ),
    "an optimizer that is made after the first forward pass": (
        """
        model = net(); loss = model(batch()).square().mean()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(5):
            loss.backward(); optimizer.step(); optimizer.zero_grad(); loss = model(batch()).square().mean()
        """, "Sequential", 5, [2, 2],  # the first step is not seen, the others begin and end at the call of the model
    ),
    "a compiled model, and a compiled function": (
        """
        import warnings, torch._dynamo
        warnings.simplefilter("ignore")  # those of the compiler itself
        torch._dynamo.reset()
        model = net(); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        square = torch.compile(torch.square, backend="eager")
        for step in range(5):
            square(compiled(batch())).mean().backward(); optimizer.step(); optimizer.zero_grad()
        assert torch._dynamo.utils.counters["frames"]["ok"] >= 1  # in the steps that are not audited
        """, "OptimizedModule", 5, [2, 2, 2],
    ),
    "data that comes from modules, workers and threads": (
        """
        import threading
        model = net(); optimizer = torch.optim.SGD(model.parameters(), lr=0.1); crop = nn.Identity()
        class Data(torch.utils.data.Dataset):
            def __len__(self): return 8
            def __getitem__(self, i): return crop(torch.randn(8))
        for x in torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=1):
            other = threading.Thread(target=lambda: crop(x)); other.start(); other.join()
            model(x).square().mean().backward(); optimizer.step(); optimizer.zero_grad()
        """, "Sequential", 4, [2, 2, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_loops(name: str) -> None:
    program, kind, steps, forward = LOOPS[name]
    audit, code, _ = audited(program)
    assert (code, type(audit.model).__name__, audit.number) == (0, kind, steps)
    assert per_step(audit, "aten.addmm") == forward
    if kind == "Models":
        assert isinstance(audit.model, Models) and set(audit.model._modules) == {"first", "second"}
        assert {o.module for o in audit.steps[0].operations if o.name == "aten.addmm.default"} == {"first.0", "first.2"}


def test_modes_of_the_program_are_entered_and_left_as_without() -> None:
    audit, code, _ = audited("""
        from torch.utils.flop_counter import FlopCounterMode
        from torch.utils._python_dispatch import _get_current_dispatch_mode
        model = net(); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        def step(): model(batch()).square().mean().backward(); optimizer.step(); optimizer.zero_grad()
        step()
        with FlopCounterMode(display=False) as mode:
            step(); assert _get_current_dispatch_mode() is mode.mode
            step(); assert _get_current_dispatch_mode() is mode.mode
        assert mode.get_total_flops() == 2 * (2 * 5 * 8 * 16 * 2 + 2 * 5 * 16 * 4 * 3), mode.get_total_flops()
        for _ in range(3): step()
    """, steps=4)
    assert code == 0 and per_step(audit, "aten.addmm")[-1] == 2
    assert audit.audited[-1] <= 4


def test_a_program_has_the_bits_that_it_has_without() -> None:
    program = PLAIN + "torch.save([*model.parameters(), torch.get_rng_state()], sys.argv[1])\n"
    audited(program, "with.pt")
    subprocess.run([sys.executable, "train.py", "without.pt"], check=True)
    for a, b in zip(*(torch.load(name, weights_only=False) for name in ("with.pt", "without.pt")), strict=True):
        assert torch.equal(a, b)


def test_the_trainer_of_transformers() -> None:
    pytest.importorskip("transformers", reason="other people's loop: transformers==5.24.0")
    pytest.importorskip("accelerate", reason="its Trainer needs it")
    audit, code, _ = audited("""
        from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6))
        data = [{"input_ids": (t := torch.randint(11, (6,))), "labels": t} for _ in range(16)]
        flags = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, report_to=[], use_cpu=True)
        flags |= dict(save_strategy="no", eval_strategy="steps", eval_steps=1, disable_tqdm=True)
        arguments = TrainingArguments("out", **flags)
        Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2]).train()
    """)
    assert (code, type(audit.model).__name__, audit.number, audit.audited) == (0, "GPT2LMHeadModel", 4, [1, 2, 3])
    assert [type(s).__name__ for s in audit.schedulers] == ["LambdaLR"]
    assert [step.after.schedulers[0] - step.before.schedulers[0] for step in audit.steps] == [1, 1, 1]
    assert per_step(audit, "aten.embedding.") == [4, 4, 4]  # two tables, two micro-batches: no evaluation among them


def test_accelerate() -> None:
    pytest.importorskip("accelerate", reason="a wrapper around loops")
    audit, code, _ = audited("""
        from accelerate import Accelerator
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = net(); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        for i in range(8):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch()).square().mean())
                optimizer.step(); scheduler.step(); optimizer.zero_grad()
    """)
    assert (code, audit.number, type(audit.optimizers[0]).__name__) == (0, 4, "SGD")
    assert per_step(audit, "aten.addmm") == [4, 4, 4]


# ------------------------------------------------------------------------------------------------------- as Python runs it


def test_a_script_sees_what_python_gives_it(capsys: pytest.CaptureFixture[str]) -> None:
    program = """
        import argparse, pickle
        class Mine: pass
        flags = argparse.ArgumentParser(); flags.add_argument("--steps", type=int)
        n = flags.parse_args().steps
        main = sys.modules["__main__"]
        print(n, sys.argv, __name__, __file__, sys.path[0], type(pickle.loads(pickle.dumps(Mine()))) is Mine, main.Mine is Mine)
        print(__package__, __spec__, "\\x1b[1m")
    """
    before = sys.argv, sys.path, sys.modules["__main__"]
    audited(textwrap.dedent(program) + PLAIN.replace("range(6)", "range(n)"), "--steps", "2")
    here = os.path.realpath(os.getcwd())
    want = f"2 ['train.py', '--steps', '2'] __main__ {os.path.abspath('train.py')} {here} True True\nNone None \x1b[1m\n"
    assert capsys.readouterr().out == want
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before


def test_an_exception_is_shown_as_python_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("def f():\n    raise ValueError('mine')\nf()\n", "x = (\n", "import json\njson.loads('{')\n"):
        Path("train.py").write_text(text, encoding="utf-8")
        assert run_python("train.py", False, (), ProgramAudit()) == 1
        shown = capsys.readouterr().err
        plain = subprocess.run([sys.executable, "train.py"], capture_output=True, text=True)
        assert shown == plain.stderr and plain.returncode == 1
    audit, code, _ = audited(PLAIN.replace("range(6):", "range(6):\n    if step == 2: raise ValueError('mine')"))
    assert code == 1 and audit.number == 2


@pytest.mark.parametrize(("end", "code", "err"), [("3", 3, ""), ("", 0, ""), ("None", 0, ""), ("'words'", 1, "words\n")])
def test_exit_codes_are_the_scripts_own(end: str, code: int, err: str, capsys: pytest.CaptureFixture[str]) -> None:
    audit, got, _ = audited(PLAIN + f"sys.exit({end})\n")
    assert got == code and audit.unended == "" and audit.number == 6
    assert capsys.readouterr().err == err


def test_a_step_that_the_script_ends_in_is_said() -> None:
    audit, _, _ = audited(PLAIN.replace("range(6):", "range(6):\n    y = model(batch())\n    if step == 1: 1 / 0"))
    assert audit.unended == "ZeroDivisionError in step 2" and audit.audited == [1, 2]


def test_modules_run_as_with_m(capsys: pytest.CaptureFixture[str]) -> None:
    Path("package").mkdir()
    Path("package/__init__.py").touch()
    source = START + PLAIN + "print(__name__, __package__, sys.argv[1:], sys.path[0])\n"
    Path("package/train.py").write_text(source, encoding="utf-8")
    around = ProgramAudit()
    assert run_python("package.train", True, ("--lr", "3"), around) == 0
    assert capsys.readouterr().out == f"__main__ package ['--lr', '3'] {os.getcwd()}\n"
    assert around.audit is not None and around.audit.number == 6


def test_a_thread_of_the_program_does_not_end_its_steps() -> None:
    around = ProgramAudit()
    with around:
        thread = threading.Thread(target=lambda: nn.Linear(2, 2)(torch.ones(2)))
        thread.start()
        thread.join()
    assert around.audit is None


# ------------------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("train.py --steps 9", (["train.py", "--steps", "9"], False, 4)),
        ("--steps 2 train.py --steps 9 -m x", (["train.py", "--steps", "9", "-m", "x"], False, 2)),
        ("--steps 2 -m package.train --steps 9", (["package.train", "--steps", "9"], True, 2)),
    ],
)
def test_what_follows_the_script_is_the_scripts(line: str, want: tuple[list[str], bool, int]) -> None:
    arguments = arguments_of(line.split())
    assert (arguments.words, arguments.is_module, arguments.steps) == want


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("", "name a script"),
        ("--demo train.py", "--demo takes no script"),
        ("--demo --replay audit.json", "--demo and --replay exclude each other"),
        ("--catalogue --demo", "--catalogue and --demo exclude each other"),
        ("--every 0 train.py", "--every at least 1"),
        ("nothing.py", "nothing.py: there is no such script"),
        ("-m no.such.module", "-m no.such.module: there is no such module"),
        (".", "it is a folder"),
        ("--out taken train.py", "--out taken has a report"),
        ("--stpes 3 train.py", "unknown flag --stpes; did you mean --steps?"),
    ],
)
def test_wrong_use_is_one_line(
    line: str, error: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("train.py").write_text("", encoding="utf-8")
    Path("taken").mkdir()
    Path("taken/audit.json").touch()
    monkeypatch.setattr("sys.argv", ["scripts/audit.py", *line.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and error in err


def test_folders_are_numbered_and_not_replaced() -> None:
    assert folder_for(None, False) == Path("runs/audit") and Path("runs/audit").is_dir()
    Path("runs/audit/audit.json").touch()
    assert folder_for(None, False) == Path("runs/audit-2") and folder_for(Path("runs/audit"), True) == Path("runs/audit")
    assert folder_for(None, False) == Path("runs/audit-3")  # the second one is somebody's who has just begun
    with pytest.raises(UsageError, match="cannot be created"):
        folder_for(Path("runs/audit/audit.json/inside"), False)
    Path("file").touch()
    with pytest.raises(UsageError, match="is a file"):
        folder_for(Path("file"), False)


def test_slow_audited_steps_are_reported_as_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refimpl.parity.audit.program.SLOW", 0.0)
    _, _, said = audited(PLAIN, every=5)
    assert said[1:] == [f"step {number} was audited, in 0 s" for number in (1, 2, 3, 5)]


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_leaves_out_what_was_found(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.py").write_text(START + PLAIN, encoding="utf-8")
    assert run_audit(arguments_of([*["--quiet"] * quiet, "train.py"])) == 0
    assert ("found Sequential" in capsys.readouterr().err) != quiet


def test_no_training_is_no_good_news(capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.py").write_text("print('hello')", encoding="utf-8")
    assert audit_program(["train.py"], False, ProgramAudit(), folder_for(Path("out"), False)) == 2
    assert "no optimizer of torch.optim with parameters of a module made a step" in capsys.readouterr().err
    Path("train.py").write_text(START + PLAIN, encoding="utf-8")
    assert audit_program(["train.py"], False, ProgramAudit(steps=0), folder_for(Path("out"), False)) == 2
    assert "6 steps ended, and --steps and --every chose none of them" in capsys.readouterr().err
    assert not Path("out").exists()
    with pytest.raises(UsageError):
        check_program("other.py", False)


def test_the_demo_has_its_three_mistakes_and_no_others() -> None:
    around = ProgramAudit()
    assert run_python(str(DEMO), False, (), around) == 0
    assert around.audit is not None and around.audit.failures == {}
    found = [finding for finding in around.audit.findings.values() if is_serious(finding.level)]
    assert {finding.code for finding in found} == {"B1", "B17", "D1"}
    lines = DEMO.read_text().splitlines()
    for finding in found:
        assert "# mistake" in lines[int(finding.line.rpartition(":")[2]) - 1], finding
        assert not re.search(r"\b1 times\b", finding.number), finding


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, SCRIPTS / "audit.py", *words], capture_output=True, text=True, env=environment)


def test_the_whole_command_in_a_process_of_its_own() -> None:
    source = START + PLAIN + "print('\\x1b[1mdone', flush=True)\nsys.exit(int(sys.argv[1]))\n"
    Path("train.py").write_text(source, encoding="utf-8")
    done = run("--out", "report", "train.py", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("\x1b[1mdone\nrefimpl audit: 4 of 6 steps") and "Traceback" not in done.stderr
    assert {path.name for path in Path("report").iterdir()} == {"audit.html", "audit.json"}
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert run("--overwrite", "--out", "report", "train.py", "7").returncode == 7


def test_ctrl_c_is_the_scripts_own() -> None:
    Path("train.py").write_text(START + PLAIN + "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n", encoding="utf-8")
    done = run("train.py")
    assert done.returncode == 128 + signal.SIGINT and "KeyboardInterrupt" in done.stderr
    assert re.search("refimpl audit: 4 of 6 steps", done.stdout)
