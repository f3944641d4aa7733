"""The CUDA kernels through NVIDIA's own compiler, NVRTC, which needs no GPU and no driver: what it makes of them.

The PTX must contain no fused product and sum (the definitions round after each), no double precision, no arithmetic in 16
bits, no atomics; the registers must leave room for enough threads, and none may spill to memory. Options are CuPy's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from pathlib import Path

import pytest
from kernel_host import include_options

from refimpl.backends.cupy.launch import COLUMNS, FORMATS, LANES, THREADS, WARP, WARPS, declarations, source

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
FUNCTIONS = ("expf", "logf", "tanhf")
REGISTERS = {(THREADS,): 40, (WARP, WARPS): 40, (COLUMNS, LANES): 64, (1,): 64}
"""A thread's, by the shape of its block. A multiprocessor has 65536: six blocks of 256 threads, or one of 1024, fit at once."""


@functools.cache
def nvrtc() -> ctypes.CDLL | None:
    """NVRTC of the nvidia-cuda-nvrtc package in this interpreter, or None."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(root).glob("*/lib/libnvrtc.so.[0-9]*")):
            return ctypes.CDLL(str(path))
    return None


pytestmark = [
    pytest.mark.skipif(nvrtc() is None, reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc"),
    pytest.mark.skipif(include_options() is None, reason="no CUDA headers: pip install nvidia-cuda-runtime nvidia-cuda-crt"),
]


@functools.cache
def compiled(text: str, fmt: str, architecture: str) -> tuple[str, str]:
    """The PTX, and what ptxas says about it. Errors: RuntimeError with NVRTC's log."""
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    assert library is not None
    options = [f"-arch={architecture}", "-std=c++17", "-ftz=true", f"-DSTORAGE={fmt}", "--ptxas-options=-v", *include_options()]
    words = (ctypes.c_char_p * len(options))(*(word.encode() for word in options))
    assert library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None) == 0
    failed = library.nvrtcCompileProgram(program, len(options), words)

    def read(what: str) -> str:
        assert getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
        buffer = ctypes.create_string_buffer(size.value)
        assert getattr(library, f"nvrtcGet{what}")(program, buffer) == 0
        return buffer.value.decode()

    log = read("ProgramLog")
    if failed:
        raise RuntimeError(log)
    ptx = read("PTX")
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx, log


def entries(ptx: str) -> dict[str, str]:
    """The PTX of each kernel by its name."""
    return {part.partition("(")[0]: part for part in ptx.split(".visible .entry ")[1:]}


LINT = {
    "a fused product and sum": r"\bfma\.",
    "double precision": r"\.f64\b",
    "16-bit arithmetic": r"\b(add|sub|mul|fma|min|max|neg|abs)\.[\w.]*(f16|bf16)(x2)?\b",
    "an atomic": r"\b(atom|red)\.",
    "an approximation": r"\b(div|sqrt)\.(approx|full)",
}


def lint(ptx: str) -> set[tuple[str, str]]:
    """(kernel, what it has and must not have)."""
    return {(name, what) for name, body in entries(ptx).items() for what, text in LINT.items() if re.search(text, body)}


def without_functions(text: str) -> str:
    """The source with exp, log and tanh replaced by their argument: what remains is our own arithmetic."""
    identity = "".join(f"#define {name}(x) (x)\n" for name in FUNCTIONS)
    assert text.count("using T = STORAGE;") == 1
    return text.replace("using T = STORAGE;", "using T = STORAGE;\n" + identity)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_kernel_compiles_and_stays_within_its_registers(fmt: str, architecture: str, record_property: object) -> None:
    ptx, log = compiled(source(), fmt, architecture)
    assert set(entries(ptx)) == set(declarations(source()))
    said = re.findall(r"entry function '(\w+)'.*?(\d+) bytes spill st.*?(\d+) bytes spill lo.*?Used (\d+) registers", log, re.S)
    if not said:
        pytest.skip("this NVRTC does not tell what ptxas needs")
    record_property("registers", {name: int(registers) for name, _, _, registers in said})
    assert {name for name, *_ in said} == set(declarations(source()))
    for name, stores, loads, registers in said:
        assert stores == loads == "0", f"{name} spills"
        assert int(registers) <= REGISTERS[declarations(source())[name].block], f"{name} needs {registers} registers"


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_kernels_own_arithmetic_rounds_after_every_operation(fmt: str) -> None:
    """Without exp, log and tanh there is nothing that the lint finds."""
    assert lint(compiled(without_functions(source()), fmt, "sm_90")[0]) == set()


@pytest.mark.parametrize("fmt", FORMATS)
def test_only_exp_log_and_tanh_fuse(fmt: str) -> None:
    """With them, fused operations are in the kernels that call one, and only there; nothing else is found."""
    calls = re.compile(r"\b(expf|logf|tanhf|gelu_tanh|one_plus_exp|causal_softmax)\(")
    kernels = {name for name, body in bodies(source()).items() if calls.search(body)}
    assert kernels == {
        "gelu_tanh_forward", "gelu_tanh_backward", "silu_forward", "silu_backward", "swiglu_forward", "swiglu_backward",
        "causal_softmax_forward", "wide_causal_softmax_forward", "cross_entropy_forward", "cross_entropy_backward",
    }  # fmt: skip
    assert lint(compiled(source(), fmt, "sm_90")[0]) == {(name, "a fused product and sum") for name in kernels}


def bodies(text: str) -> dict[str, str]:
    """Each kernel's body by its name."""
    return dict(re.findall(r"__launch_bounds__\([\w *]+\)\s+(\w+)\([^)]*\) \{\n(.*?)\n\}\n", text, re.S))


def loads_at_once(body: str) -> int:
    """The most loads that a thread issues before a branch or a store, which may have to wait for one."""
    return max(part.count("ld.global") for part in re.split(r"\bbra\b|\bst\.global|^\$L", body, flags=re.M))


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_thread_asks_for_several_values_at_once(fmt: str) -> None:
    """The compiler unrolls a loop as it is told to only if it can tell how often the loop runs before it begins."""
    counts = {name: loads_at_once(body) for name, body in entries(compiled(source(), fmt, "sm_90")[0]).items()}
    assert {name: counts[name] for name, least in AT_ONCE.items() if counts[name] < least} == {}


AT_ONCE = {
    "layernorm_forward": 8, "layernorm_backward": 12, "layernorm_weights_backward": 16, "bias_backward": 8,
    "causal_softmax_forward": 8, "causal_softmax_backward": 16, "llama_rmsnorm_forward": 8, "llama_rmsnorm_backward": 12,
    "llama_rmsnorm_weights_backward": 12, "wide_causal_softmax_forward": 8, "wide_causal_softmax_backward": 16,
}  # fmt: skip

BAD = {
    "a fused product and sum": "*y = *x * *x + *x;",
    "double precision": "*y = *x * 0.1;",
    "16-bit arithmetic": "__half h = __float2half_rn(*x); *y = __half2float(h * h);",
    "an atomic": "atomicAdd(y, *x);",
    "an approximation": "*y = __fdividef(*x, 3.0f);",
}


@pytest.mark.parametrize("what", BAD)
def test_the_lint_bites(what: str) -> None:
    bad = '#include <cuda_fp16.h>\nextern "C" __global__ void bad(const float* x, float* y) { ' + BAD[what] + " }"
    assert lint(compiled(bad, "fp32", "sm_90")[0]) == {("bad", what)}


def test_a_source_that_does_not_compile_says_why() -> None:
    with pytest.raises(RuntimeError, match="no_such_name"):
        compiled('extern "C" __global__ void bad(float* y) { *y = no_such_name; }', "fp32", "sm_90")
