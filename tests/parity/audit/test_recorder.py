"""The recorder of the audit: it sees every operation of a step, says where each belongs, and changes none of them."""

from __future__ import annotations

import copy
import gc
import linecache
import logging
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the recorder records PyTorch: torch==2.13.0")
import torch
import torch.nn.functional as F
from audit_loops import IMPLEMENTATIONS, LOOPS, VOCAB, Loop, OneRank
from paths import ROOT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

from refimpl.parity.audit.nodes import Nodes, Site
from refimpl.parity.audit.operation import PHASES, Keep, Operation, Role, TensorFacts, tensors_in
from refimpl.parity.audit.place import Places
from refimpl.parity.audit.recorder import Recorder, UncompiledRecorder
from refimpl.parity.audit.values import Values

Bits = dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    with OneRank():
        yield


def values(operation: Operation) -> Keep:
    """Choose to see the values of everything."""
    return Keep.VALUES


def each(value: Any) -> Iterator[Tensor]:
    """The tensors of a nest of lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from each(part)


def reads_all(seen: Values) -> None:
    """An observer that computes in FP64 with everything, as a judge does."""
    for x in each([seen.args, seen.kwargs, seen.output]):
        if x.numel():
            x.double().sum().item()


def recorded(loop: Loop, **options: Any) -> tuple[Bits, Recorder]:
    """Train with every step recorded; the record is the last step's."""
    recorder = Recorder(loop.model, loop.optimizers, loop.ema, **options)
    return loop.run(lambda step: recorder).bits(), recorder


def last_step(name: str, **options: Any) -> Recorder:
    return recorded(LOOPS[name](), **options)[1]


def differing(a: Bits, b: Bits) -> list[str]:
    return [key for key in {**a, **b} if key not in a or key not in b or not torch.equal(a[key], b[key])]


# ------------------------------------------------------------------------------------------------- the run is unchanged


@pytest.mark.parametrize("name", LOOPS)
def test_a_recorded_run_has_the_bits_of_an_unrecorded_one(name: str, group: None) -> None:
    plain = LOOPS[name]().run().bits()
    assert differing(plain, LOOPS[name]().run().bits()) == []  # else the comparison means nothing
    for options in ({}, {"choose": values, "observe": reads_all}):
        bits, recorder = recorded(LOOPS[name](), **options)
        assert differing(plain, bits) == []
        assert recorder.failures == {} and recorder.seen == len(recorder.operations) > 100
        assert {operation.error for operation in recorder.operations} == {None}


def test_steps_between_unrecorded_ones_have_their_bits_too() -> None:
    plain = LOOPS["autocast, tied weight cached"]().run().bits()
    loop = LOOPS["autocast, tied weight cached"]()
    recorder = Recorder(loop.model, loop.optimizers)
    assert differing(plain, loop.run(lambda step: recorder if step == 1 else nullcontext()).bits()) == []


def draws(seen: Values) -> None:
    torch.rand(1)


def reexecutes(seen: Values) -> None:
    name = seen.operation.name
    if "dropout" in name or "bernoulli" in name:
        seen.operation.overload(*(x.clone() if isinstance(x, Tensor) else x for x in seen.args), **seen.kwargs)


def overwrites(seen: Values) -> None:
    if seen.operation.name == "aten.addmm.default":
        seen.output.mul_(1.001)


@pytest.mark.parametrize("bad", [draws, reexecutes, overwrites])
def test_an_observer_that_changes_the_run_is_seen_by_the_comparison(bad: Any) -> None:
    plain = LOOPS["adamw foreach"]().run().bits()
    bits, recorder = recorded(LOOPS["adamw foreach"](), choose=values, observe=bad)
    assert recorder.failures == {}
    changed = differing(plain, bits)
    assert "layers.0.qkv.weight" in changed and ("rng" in changed) == (bad is not overwrites)


def per_sample(model: nn.Module, x: Tensor) -> None:
    """Gradients of each sample by torch.func, and their mean by hand."""
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (sample,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for name, parameter in parameters.items():
        parameter.grad = grads[name].mean(0)


def plain_pass(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


NORMS = torch.nn.utils.parametrizations
LESS_COMMON: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], None], Any]] = {
    "sparse gradients": (lambda: nn.Embedding(9, 3, sparse=True), plain_pass, torch.optim.SparseAdam),
    "weight norm": (lambda: NORMS.weight_norm(nn.Linear(4, 4)), plain_pass, torch.optim.NAdam),
    "spectral norm": (lambda: NORMS.spectral_norm(nn.Linear(4, 4)), plain_pass, torch.optim.RMSprop),
    "torch.func": (lambda: nn.Linear(4, 4), per_sample, torch.optim.Adafactor),
    "muon": (lambda: nn.Linear(4, 4, bias=False), plain_pass, torch.optim.Muon),
}  # fmt: skip


@pytest.mark.parametrize("name", LESS_COMMON)
def test_less_common_ways_to_train_have_their_bits_too(name: str) -> None:
    make, backward, optimizer_of = LESS_COMMON[name]

    def train(record: bool = True, **options: Any) -> tuple[list[Tensor], Recorder]:
        torch.manual_seed(5)
        model = make()
        optimizer = optimizer_of(model.parameters())
        recorder = Recorder(model, [optimizer], **options)
        for _ in range(3):
            with recorder if record else nullcontext():
                backward(model, torch.randint(9, (4,)) if name.startswith("sparse") else torch.randn(4, 4))
                optimizer.step()
                optimizer.zero_grad()
        return [*(p.detach() for p in model.parameters()), torch.get_rng_state()], recorder

    plain, _ = train(record=False)
    for options in ({}, {"choose": values, "observe": reads_all}):
        recorded_bits, recorder = train(**options)
        assert all(torch.equal(a, b) for a, b in zip(plain, recorded_bits, strict=True))
        assert recorder.failures == {} and {"forward", "step"} <= {o.phase for o in recorder.operations}


def test_an_unrecorded_step_finds_nothing_of_the_recorder() -> None:
    loop = Loop()
    recorder = Recorder(loop.model, loop.optimizers)
    with recorder:
        loop.step()
        assert _get_current_dispatch_mode() is recorder
        copy.deepcopy(loop.model)  # nothing of the recorder's is in the model
    assert _get_current_dispatch_mode() is None and not nn.modules.module._has_any_global_hook()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in loop.model.modules())
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in loop.model.parameters())


# ------------------------------------------------------------------------------------------------- what it sees


def phases(recorder: Recorder) -> list[str]:
    """The phases in order, without those of single operations that prepare something."""
    found = [operation.phase for operation in recorder.operations if operation.phase != "other"]
    return [phase for i, phase in enumerate(found) if i == 0 or phase != found[i - 1]]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_step_has_its_phases_in_order(name: str) -> None:
    recorder = last_step(f"fp16 scaler {name}")
    assert phases(recorder) == ["forward", "backward", "unscale", "clip", "step", "update"]
    by_phase = {phase: [o.name for o in recorder.operations if o.phase == phase] for phase in PHASES}
    assert "aten._amp_foreach_non_finite_check_and_unscale_.default" in by_phase["unscale"]
    assert "aten._foreach_norm.Scalar" in by_phase["clip"] and "aten._amp_update_scale_.default" in by_phase["update"]
    update = {"for-loop": "addcdiv_.default", "foreach": "_foreach_addcdiv_.ScalarList", "fused": "_fused_adamw_.default"}
    assert f"aten.{update[name]}" in by_phase["step"]


def text(line: str) -> str:
    """The source text at 'file:number'."""
    file, number = line.rsplit(":", 1)
    return linecache.getline(file, int(number)).strip()


def test_operations_have_the_line_of_the_user_that_calls_them() -> None:
    recorder = last_step("fp16 scaler foreach")

    def lines(phase: str) -> set[str]:
        return {text(operation.line) for operation in recorder.operations if operation.phase == phase}

    assert lines("unscale") == {"self.scaler.unscale_(self.optimizers[0])"}
    assert lines("clip") == {"nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)"}
    assert lines("step") == {"self.scaler.step(self.optimizers[0])"} and lines("update") == {"self.scaler.update()"}
    # An operation of backward has the line of the operation that it differentiates.
    assert len(lines("backward")) > 8 and lines("backward") <= lines("forward")
    relu = {text(o.line) for o in recorder.operations if o.name == "aten.threshold_backward.default"}
    assert relu == {"y = F.relu(self.up(hidden).mul_(0.5), inplace=True)"}
    assert {o.line for o in recorder.operations} == {o.code_line for o in recorder.operations}  # no library is in between


def test_an_ema_is_seen_as_what_it_is() -> None:
    recorder = last_step("accumulation, ema")
    lerp = [o for o in recorder.operations if o.name.startswith("aten._foreach_lerp_") and o.phase == "other"]
    written = [t.role for o in lerp for t in tensors_in(o.arguments["self"])]
    assert Role("ema", "module.layers.0.qkv.weight") in written
    read = [t.role for o in lerp for t in tensors_in(o.arguments["tensors1"])]
    assert Role("parameter", "layers.0.qkv.weight") in read


def test_two_micro_batches_are_accumulated_into_named_gradients() -> None:
    operations = last_step("accumulation, ema").operations
    first = [o for o in operations if o.accumulates == "layers.1.up.weight"]
    assert [o.name for o in first] == ["aten.detach.default", "aten.add_.Tensor"]
    assert first[1].outputs.role == Role("gradient", "layers.1.up.weight") and first[1].module == "layers.1.up"
    assert first[1].arguments["self"].role == Role("gradient", "layers.1.up.weight") and first[1].written == ("self",)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "lora", "optimizer in backward"])
def test_each_trained_parameter_is_accumulated_and_updated(name: str, group: None) -> None:
    loop = LOOPS[name]()
    recorder = recorded(loop)[1]
    trained = {key for key, p in loop.model.named_parameters() if p.requires_grad}
    assert {o.accumulates for o in recorder.operations if o.accumulates} == trained
    updates = [o for o in recorder.operations if o.phase == "step" and "addcdiv_" in o.name]
    updated = {t.role.name for o in updates for t in tensors_in(o.arguments["self"]) if t.role and t.role.kind == "parameter"}
    assert updated == trained


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_optimizer_states_have_names_from_the_first_step_on(name: str) -> None:
    loop = Loop(options=IMPLEMENTATIONS[name])
    recorder = Recorder(loop.model, loop.optimizers)
    loop.run(lambda step: recorder, steps=1)
    roles = {t.role for o in recorder.operations if o.phase == "step" for t in tensors_in(o.arguments)}
    names = {key for key, p in loop.model.named_parameters()}
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert {role.name for role in roles if role and role.kind == "state" and role.key == key} == names


def test_a_closure_is_the_step_but_its_passes_are_forward_and_backward() -> None:
    operations = last_step("closure").operations
    assert {o.phase for o in operations if o.name == "aten.addmm.default"} == {"forward"}
    assert {o.phase for o in operations if o.accumulates} == {"backward"}
    written = [(o, [t.role for name in o.written for t in tensors_in(o.arguments[name])]) for o in operations]
    updates = [o for o, roles in written if any(role and role.kind == "parameter" for role in roles)]
    assert {o.phase for o in updates} == {"step"} and operations[-1] is updates[-1]


def test_evaluation_is_forward_without_nodes() -> None:
    operations = last_step("evaluates").operations
    after = operations[max(i for i, o in enumerate(operations) if o.phase == "step") :]
    products = [o for o in after if o.name == "aten.addmm.default"]
    assert len(products) == 8 and {(o.phase, o.sequence) for o in products} == {("forward", None)}


# ------------------------------------------------------------------------------------------------- modules


class Widths(nn.Module):
    """Layers whose widths are all different, so that the shape of a product says whose it is."""

    SIZES = (5, 7, 11, 13, 17, 19)

    def __init__(self, around: Callable[..., Tensor] = lambda f, x: f(x)) -> None:
        super().__init__()
        self.around = around
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(self.SIZES, self.SIZES[1:], strict=False))

    def forward(self, *, x: Tensor) -> Tensor:
        y = self.around(self.layers[1], self.around(lambda z: self.layers[0](z).tanh(), x))
        for layer in (self.layers[2], self.layers[3], self.layers[4]):
            y = F.gelu(self.around(layer, y.relu()))
        return y


class Twice(torch.autograd.Function):
    """A function of the user's own, whose passes have operations of their own."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = function(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        ctx.y.backward(grad)
        return None, ctx.x.grad


AROUND: dict[str, Callable[..., Tensor]] = {
    "plain": lambda f, x: f(x),
    "checkpoint new": lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False),
    "checkpoint reentrant": lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=True),
    "autograd.Function": lambda f, x: Twice.apply(f, x),
}


def products(name: str, dtype: Any = None, backward: int = 1) -> list[Operation]:
    """The matrix products of a pass forward and back through Widths."""
    torch.manual_seed(3)
    model = Widths(AROUND[name])
    recorder = Recorder(model)
    with recorder, torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(x=torch.randn(3, 5, requires_grad=True)).float().square().sum()
        for i in range(backward):
            loss.backward(retain_graph=i + 1 < backward)
    assert recorder.failures == {}
    return [o for o in recorder.operations if o.name in ("aten.addmm.default", "aten.mm.default")]


def misplaced(operations: list[Operation]) -> list[str]:
    """Products whose module is not the one with the widths that they have."""
    found = []
    for o in operations:
        factors = (o.arguments["mat1" if "mat1" in o.arguments else "self"], o.arguments["mat2"])
        widths = {n for t in tensors_in(factors) for n in t.shape}
        i = next(i for i in range(5) if set(Widths.SIZES[i : i + 2]) <= widths)
        found += [f"{o.name} {o.module} {i}"] if o.module != f"layers.{i}" else []
    return found


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_product_belongs_to_its_module(name: str, dtype: Any) -> None:
    found = products(name, dtype)
    repeated = [o for o in found if o.recomputed]
    assert misplaced(found) == [] and len(found) - len(repeated) == 15  # one forward, two backward, five layers
    # The last product of a region is not repeated by checkpointing without reentrance: nothing in backward needs its output.
    assert len(repeated) == {"plain": 0, "checkpoint new": 1, "checkpoint reentrant": 5, "autograd.Function": 0}[name]
    assert {o.phase for o in repeated} <= {"forward"}


def test_a_second_backward_through_the_same_graph_is_placed_as_the_first() -> None:
    found = products("plain", backward=2)
    assert misplaced(found) == [] and len(found) == 25


def test_a_wrong_attribution_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of the node before: what a recorder would look up that did not count from one."""
    right = Nodes.site
    monkeypatch.setattr(Nodes, "site", lambda self, thread, task, number: right(self, thread, task, number - 3))
    assert len(misplaced(products("plain"))) >= 8


def test_nodes_older_than_the_recording_have_no_module() -> None:
    model = Widths()
    loss = model(x=torch.randn(3, 5)).sum()
    recorder = Recorder(model)
    with recorder:
        torch.zeros(1)  # no node: it must not take the place of the last one made before
        loss.backward()
    assert {o.module for o in recorder.operations if o.phase == "backward" and not o.accumulates} == {None}


def test_modules_outside_the_model_and_shared_ones_have_a_name() -> None:
    model, loss = nn.ModuleDict({"a": nn.Linear(3, 3)}), nn.MSELoss()
    model["b"] = model["a"]
    recorder = Recorder(model)
    with recorder:
        loss(model["b"](torch.randn(2, 3)), torch.zeros(2, 3)).backward()
    assert [o.module for o in recorder.operations if o.name == "aten.addmm.default"] == ["a"]
    assert {o.module for o in recorder.operations if "mse_loss" in o.name} == {"(MSELoss)"}


def test_nodes_of_a_nested_backward_on_a_device_thread_are_its_own() -> None:
    """As on CUDA: thread 1 makes the graph; thread 2 runs it, repeats a part for reentrant checkpointing, and runs that."""
    nodes = Nodes(main=1, next_number=0)
    for number in range(4):
        assert nodes.made_one(1, number + 1)
        nodes.record(1, number + 1, Site(f"forward {number}", "", ""))
    nodes.enter_task(2, 7, recomputing=False)
    assert not nodes.made_one(2, 0) and nodes.site(2, 7, 3).module == "forward 3"
    nodes.enter_task(2, 7, recomputing=True)
    assert nodes.made_one(2, 1)
    nodes.record(2, 1, Site("repeated 0", "", ""))
    nodes.enter_task(2, 8, recomputing=False)
    assert nodes.site(2, 8, 0).module == "repeated 0"
    nodes.enter_task(2, 7, recomputing=False)
    assert nodes.site(2, 7, 0).module == "forward 0" and nodes.site(2, 7, 99) is None


# ------------------------------------------------------------------------------------------------- values


def observed(body: Callable[[], object], **options: Any) -> list[tuple[Operation, list[Tensor], list[Tensor]]]:
    """The operations of a body, with copies of their arguments and outputs."""
    found = []

    def observe(seen: Values) -> None:
        arguments, outputs = ([x.clone() for x in each(part)] for part in ([seen.args, seen.kwargs], seen.output))
        found.append((seen.operation, arguments, outputs))

    recorder = Recorder(nn.Identity(), choose=values, observe=observe, **options)
    with recorder:
        body()
    assert recorder.failures == {}
    return found


def test_an_observer_sees_what_an_operation_in_place_has_overwritten() -> None:
    x = torch.tensor([1.0, 2.0])
    ((operation, (before, added), (after,)),) = observed(lambda: x.add_(x))
    assert before.tolist() == added.tolist() == [1, 2] and after.tolist() == x.tolist() == [2, 4]
    assert operation.written == ("self",) and operation.outputs.storage == operation.arguments["self"].storage


def test_an_argument_that_shares_memory_with_a_written_one_is_seen_as_it_was() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    view = x.view(2, 2)
    ((_, (before, factor), (after,)),) = observed(lambda: x.mul_(view))
    assert before.tolist() == factor.tolist() == [[1, 2], [3, 4]] and after.tolist() == view.tolist() == [[1, 4], [9, 16]]


def test_lists_that_are_written_and_outputs_given_are_seen_as_they_were() -> None:
    xs, out = [torch.ones(2), torch.ones(3)], torch.zeros(2)
    (operation, before, after), (second, (_, _, given), _) = observed(
        lambda: (torch._foreach_add_(xs, 1.0), torch.add(xs[0], xs[0], out=out))
    )
    assert [x.tolist() for x in before] == [[1, 1], [1, 1, 1]] and after == [] and xs[1].tolist() == [2, 2, 2]
    assert operation.written == ("self",) and [t.shape for t in operation.arguments["self"]] == [(2,), (3,)]
    assert second.written == ("out",) and given.tolist() == [0, 0] and out.tolist() == [4, 4]


def test_without_clones_an_observer_would_see_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refimpl.parity.audit.recorder._with_clones", lambda written, args, kwargs: (args, kwargs))
    x = torch.tensor([1.0, 2.0])
    ((_, (before, _), _),) = observed(lambda: x.add_(x))
    assert before.tolist() == [2, 4]


def test_an_observer_records_no_gradients_and_none_of_its_own_operations() -> None:
    layer = nn.Linear(3, 3)
    found: list[bool] = []

    def observe(seen: Values) -> None:
        found.append(any((x.double() * 2).requires_grad for x in each([seen.args, seen.kwargs, seen.output])))

    recorder = Recorder(layer, choose=values, observe=observe)
    with recorder:
        layer(torch.randn(2, 3))
    names = [o.name for o in recorder.operations]
    assert names == ["aten.randn.default", "aten.t.default", "aten.addmm.default"] and found == [False] * 3


def test_a_collective_is_said_to_complete_later(group: None) -> None:
    operations = last_step("ddp", choose=values, observe=reads_all).operations
    reduced = [o for o in operations if o.name.startswith("c10d.allreduce_")]
    assert reduced and all(o.completes_later and "tensors" in o.written for o in reduced)
    assert not any(o.completes_later for o in operations if o.name.startswith("aten."))


# ------------------------------------------------------------------------------------------------- what is kept


def test_equal_functions_of_two_files_have_their_own_places() -> None:
    def frame(file: str) -> Any:
        names: dict[str, Any] = {"sys": sys}
        exec(compile("def f():\n    return sys._getframe()", file, "exec"), names)
        return names["f"]()

    places = Places(os.path.dirname(torch.__file__))
    assert places.of(frame("/home/me/train.py")).line == "/home/me/train.py:2"
    other = places.of(frame("/usr/lib/site-packages/other.py"))
    assert other.code_line == "/usr/lib/site-packages/other.py:2" and other.line != other.code_line


def test_what_is_kept_of_an_operation_is_chosen() -> None:
    loop = LOOPS["adamw foreach"]()
    seen: list[str] = []

    def choose(operation: Operation) -> Keep:
        assert operation.outputs is None
        return {"aten.addmm.default": Keep.VALUES, "aten.add.Tensor": Keep.FACTS}.get(operation.name, Keep.NOTHING)

    recorder = recorded(loop, choose=choose, observe=lambda values: seen.append(values.operation.name))[1]
    kept = [operation.name for operation in recorder.operations]
    assert set(kept) == {"aten.addmm.default", "aten.add.Tensor"} and set(seen) == {"aten.addmm.default"}
    assert kept.count("aten.addmm.default") == len(seen) // 3 and recorder.seen > 2 * len(kept)  # three steps


def test_no_tensor_outlives_its_use_because_of_the_recorder() -> None:
    recorder = Recorder(nn.Identity(), choose=values, observe=reads_all)
    with recorder:
        x = torch.randn(1000)
        y = x.exp_().mul(2)
        dead = [weakref.ref(x), weakref.ref(y)]
        memory = weakref.ref(y.untyped_storage())
        del x, y
        gc.collect()
        assert [ref() for ref in (*dead, memory)] == [None] * 3
    assert [o.name for o in recorder.operations][-2:] == ["aten.exp_.default", "aten.mul.Tensor"]


MEMORY = """
import torch
from refimpl.parity.audit.recorder import Recorder

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

def peak(keep):
    kept, before, most = [], resident(), 0
    for _ in range(20):
        tensors = [torch.ones(4_000_000).mul_(2) for _ in range(2)]  # 32 MB
        most = max(most, resident() - before)
        kept += tensors if keep else []
    return most

peak(keep=False)  # from then on malloc takes blocks of this size from the heap, no longer from the system
recorder = Recorder(torch.nn.Identity())
with recorder:
    print(min(peak(keep=False) for _ in range(4)), peak(keep=True))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_the_memory_of_a_dead_tensor_is_used_again_while_recording() -> None:
    """In a process of its own, whose heap nothing else has used: 640 MB in turn, at most 64 MB of them at once, four times."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True)
    used_again, kept = map(float, done.stdout.split())
    assert used_again < 100 and kept > 300


def test_storages_are_told_apart_although_their_addresses_are_used_again() -> None:
    recorder = Recorder(nn.Identity())
    addresses = set()
    with recorder:
        for _ in range(50):
            x = torch.ones(7)
            x.view(7, 1).mul_(2)
            addresses.add(x.untyped_storage()._cdata)
            del x
    made, viewed, multiplied = (recorder.operations[i::3] for i in range(3))
    assert len({o.outputs.storage for o in made}) == 50 > len(addresses)
    assert [o.outputs.storage for o in made] == [o.outputs.storage for o in viewed] == [o.outputs.storage for o in multiplied]


def test_a_role_dies_with_its_storage() -> None:
    layer = nn.Linear(3, 3)
    recorder = Recorder(layer)
    with recorder:
        for _ in range(20):
            layer(torch.ones(2, 3)).sum().backward()
            layer.zero_grad()
            strangers = [torch.from_numpy(np.ones((3, 3), np.float32)) for _ in range(9)]  # made by no operation
            for x in strangers:
                x.mul(2)
    roles = [t.role for o in recorder.operations if o.name == "aten.mul.Tensor" for t in tensors_in(o.arguments)]
    assert roles == [None] * 180
    gradients = [o.outputs.role for o in recorder.operations if o.accumulates == "weight"]
    assert gradients == [Role("gradient", "weight")] * 20


def test_facts_say_shape_type_and_place() -> None:
    layer = nn.Linear(4, 3).bfloat16()
    recorder = Recorder(layer)
    with recorder:
        layer.weight[1:].add(torch.ones(2, 4, dtype=torch.bfloat16), alpha=2)
    add = recorder.operations[-1]
    facts = add.arguments["self"]
    assert facts == TensorFacts((2, 4), "bfloat16", "cpu", facts.storage, 4, Role("parameter", "weight"))
    assert add.arguments["alpha"] == 2 and add.outputs.role is None and add.parameters == ("weight",)


# ------------------------------------------------------------------------------------------------- failures


def fails(*args: Any) -> Any:
    raise ValueError("the judge divides by zero")


@pytest.mark.parametrize("part", ["observe", "choose", "facts", "roles", "places", "path"])
def test_a_failure_of_the_recorder_is_not_the_users(
    part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = "fp16 scaler foreach"
    plain = LOOPS[name]().run().bits()
    options: dict[str, Any] = {"choose": values, "observe": reads_all}
    if part in options:
        options[part] = fails
    inner = {"facts": "roles.Roles.facts", "roles": "recorder.Roles", "places": "place.Places.of"}
    inner["path"] = "recorder.Recorder._path"
    if part in inner:
        monkeypatch.setattr(f"refimpl.parity.audit.{inner[part]}", fails)
    loop = LOOPS[name]()
    recorder = Recorder(loop.model, loop.optimizers, **options)
    with caplog.at_level(logging.WARNING):
        bits = loop.run(lambda step: recorder).bits()
    assert differing(plain, bits) == []
    assert [key for key in recorder.failures if key == "ValueError: the judge divides by zero"]
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("refimpl")]  # once in three steps
    assert re.match(r"the recorder or its observer failed \d+ times; the training continued", said) and "Traceback" in said
    if part == "observe":
        assert {o.error for o in recorder.operations} == {"ValueError: the judge divides by zero"}


def test_a_failure_holds_no_tensor() -> None:
    alive: list[Any] = []

    def observe(seen: Values) -> None:
        alive.append(weakref.ref(seen.output))
        raise ValueError(seen.operation.name)

    recorder = Recorder(nn.Identity(), choose=values, observe=observe)
    with recorder:
        torch.ones(3)
    gc.collect()
    assert [ref() for ref in alive] == [None] and recorder.failures.total() == 1


def test_the_users_own_exception_passes_and_the_next_step_is_recorded() -> None:
    loop = Loop()
    recorder = Recorder(loop.model, loop.optimizers)
    with pytest.raises(IndexError), recorder:
        loop.model(torch.full((1, 3), VOCAB))
    with pytest.raises(RuntimeError, match="is recording already"), recorder, recorder:
        pass
    assert _get_current_dispatch_mode() is None and recorder.failures == {}
    loop.run(lambda step: recorder, steps=1)
    assert phases(recorder) == ["forward", "backward", "clip", "step"] and recorder.failures == {}
    assert {o.module for o in recorder.operations if o.name == "aten.embedding.default"} == {"embed"}


# ------------------------------------------------------------------------------------------------- other modes and threads


def test_traced_programs_are_not_recorded_and_other_modes_work_beside_it() -> None:
    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    recorder = Recorder(layer)
    with recorder:
        with FakeTensorMode() as fake:
            fake.from_tensor(x).exp().sum()
        assert recorder.operations == [] and recorder.failures == {}
        with FlopCounterMode(display=False) as counter:
            layer(x)
    assert counter.get_total_flops() == 2 * 2 * 3 * 3
    assert [o.name for o in recorder.operations][-1] == "aten.addmm.default"
    with FakeTensorMode(), Recorder(layer) as inner:
        torch.ones(3).exp()
    assert inner.operations == []


def test_operations_of_other_threads_are_not_recorded() -> None:
    recorder = Recorder(nn.Identity())
    with recorder:
        thread = threading.Thread(target=lambda: torch.ones(3))
        thread.start()
        thread.join()
    assert recorder.operations == []


@pytest.mark.parametrize("uncompiled", [False, True])
@pytest.mark.parametrize("steps", [{1}, {0, 1, 2}], ids=["between", "all"])
def test_a_compiled_model_trains_as_without_the_recorder(uncompiled: bool, steps: set[int]) -> None:
    def train(recorded_steps: set[int]) -> tuple[list[Tensor], list[Any], Recorder]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.LayerNorm(4))
        compiled = torch.compile(model, backend=backend, fullgraph=not uncompiled)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        recorder = (UncompiledRecorder if uncompiled else Recorder)(model, [optimizer])
        for step in range(3):
            with recorder if step in recorded_steps else nullcontext():
                compiled(torch.randn(5, 3)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach() for p in model.parameters()], graphs, recorder

    plain, _, _ = train(set())
    trained, graphs, recorder = train(steps)
    assert all(torch.equal(a, b) for a, b in zip(plain, trained, strict=True)) and recorder.failures == {}
    # A recorded step makes the others compile no more; uncompiled, it does not run the compiled program at all.
    assert len(graphs) == (0 if uncompiled and len(steps) == 3 else 1)
    modules = [o.module for o in recorder.operations if o.name == "aten.addmm.default"]
    assert modules == (["0"] if uncompiled else [""])


def test_what_needs_the_compiler_runs_and_uncompiled_says_that_it_cannot() -> None:
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager", fullgraph=True)
    with Recorder(nn.Identity()) as recorder:
        compiled(torch.ones(2))
    assert "aten.sin.default" in [o.name for o in recorder.operations]
    with pytest.raises(RuntimeError, match="fullgraph=True"), UncompiledRecorder(nn.Identity()):
        compiled(torch.ones(2))


def test_a_tensor_of_tensors_comes_as_the_operations_on_its_parts() -> None:
    recorder = Recorder(nn.Identity())
    x = TwoTensor(torch.ones(2), torch.zeros(2))
    with recorder:
        y = x * 2
    assert y.a.tolist() == [2, 2] and [o.name for o in recorder.operations] == ["aten.mul.Tensor"] * 2


def test_only_autograds_own_node_accumulates() -> None:
    """A function of the user's may keep anything on its node, also under the name that AccumulateGrad has for its parameter."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.variable = weight
            return x * weight

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            return grad * ctx.variable, grad * 2

    layer = nn.Linear(3, 3)
    recorder = Recorder(layer)
    with recorder:
        Scaled.apply(torch.randn(3, 3), layer.weight).sum().backward()
    assert [(o.name, o.accumulates) for o in recorder.operations if o.accumulates] == [("aten.detach.default", "weight")]
    assert [o.sequence is not None for o in recorder.operations if o.node == "ScaledBackward"] == [True, True]
