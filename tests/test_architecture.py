"""The design held by tests: what the syntax trees of refimpl/ may contain, and who may import whom.

Each rule is a function from source text to a list of offences. Each is run on the real files, where the list must be
empty, and on a few bad lines, where it must not be: a checker that finds nothing anywhere proves nothing.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache

import pytest
from paths import ROOT

from refimpl.nn.ops import OPS

PACKAGE = ROOT / "refimpl"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

# The only modules that convert: casts, and their fast version for the NumPy backend.
CASTS = ("numerics/casts.py", "numerics/fast_cast.py")
# PyTorch programs kept beside the project, as a witness and to be timed, and the audit of other people's: their tensors are
# not arrays of ours.
FOREIGN = (
    "parity/pytorch_model.py", "tools/bench/pytorch.py", "tools/audit_demo.py",
    *(name for name in FILES if name.startswith("parity/audit/")),
    *(f"parity/transformers/{name}.py" for name in (
        "comparison", "following", "places", "printed", "recording", "sites", "training",
    )),
)  # fmt: skip
OURS = [name for name in FILES if name not in CASTS + FOREIGN]


@cache
def source(name: str) -> str:
    return FILES[name].read_text(encoding="utf-8")


def offences(names: Iterable[str], checker: Callable[[str], Collection[str]]) -> dict[str, Collection[str]]:
    """What a checker finds, by the name of the file or module."""
    return {name: found for name in names if (found := checker(name))}


@cache
def tree_of(text: str) -> ast.Module:
    return ast.parse(text)


def calls(text: str) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the last word of what it calls: `a.b.view(...)` is 'view'."""
    for node in ast.walk(tree_of(text)):
        if isinstance(node, ast.Call):
            function = node.func
            yield node, function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def offence(node: ast.AST) -> str:
    return f"line {node.lineno}: {ast.unparse(node)}"


# ------------------------------------------------------------------------------- (a), (b) one place that changes formats


def uses_of_astype(text: str) -> list[str]:
    """`astype` in any form, called or handed on."""
    return [offence(n) for n in ast.walk(tree_of(text)) if isinstance(n, ast.Attribute) and n.attr == "astype"]


ALLOCATION = {"empty", "zeros", "ones", "full", "asarray", "array", "empty_like", "zeros_like", "ones_like", "full_like"}
NO_FLOATS = re.compile(r"^((np|xp|numpy|self\.xp|p\.xp)\.)?(bool_?|int|u?int(8|16|32|64)|intp)$")


def other_conversions(text: str) -> list[str]:
    """The other ways by which an array changes its type: reinterpreted, copied across types, or computed in a named type."""
    found = []
    for node, name in calls(text):
        if name in ("view", "copyto"):
            found.append(offence(node))
        for keyword in node.keywords:
            if keyword.arg == "dtype" and name not in ALLOCATION and not NO_FLOATS.match(ast.unparse(keyword.value)):
                found.append(offence(node))
    return found


def float_types_called(text: str) -> list[str]:
    """`np.float16(x)` rounds an array as well as astype does; of a number that Python holds it makes a constant."""
    types = {"float16", "float32", "half", "single", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
    return [
        offence(node)
        for node, name in calls(text)
        if name in types and not (node.args and isinstance(node.args[0], ast.Constant))
    ]


# Exceptions, each with its reason; the expression as ast.unparse prints it.
ALLOWED_CONVERSIONS = {
    # the initial draw: NumPy makes fp32 normals directly, nothing is converted
    ("nn/models/model.py", "rng.standard_normal(out=value, dtype=np.float32)"),
    # the only module for bit patterns, on which codes, stochastic rounding and remainders are defined; no value changes
    ("numerics/bits.py", "x.view(_UNSIGNED[FORMATS[format_of(x)].itemsize])"),
    ("numerics/bits.py", "bits.view(row.dtype)"),
    ("numerics/bits.py", "x.view(np.uint8)"),
}
ALLOWED_TYPE_CALLS = {
    # settings and checkpoints: Python numbers that become the 0-d scale
    ("optim/loss_scale.py", "np.float32(init_scale)"),
    ("optim/loss_scale.py", "np.float32(scale)"),
    ("optim/loss_scalers.py", "np.float32(scale)"),
    # a Python number, as a kernel takes it
    ("backends/cupy/launch.py", "np.float32(value)"),
}


ALLOWED_ASTYPE = {
    # the same module: unsigned integers in a type of another size, which CuPy converts by no other name
    ("numerics/bits.py", "bits.astype"),
}


def without_allowed(name: str, offences: list[str], allowed: set[tuple[str, str]]) -> list[str]:
    return [o for o in offences if (name, o.split(": ", 1)[1]) not in allowed]


def test_only_casts_say_astype() -> None:
    names = [n for n in FILES if n not in CASTS]
    assert offences(names, lambda n: without_allowed(n, uses_of_astype(source(n)), ALLOWED_ASTYPE)) == {}


def test_only_casts_change_a_type_in_another_way() -> None:
    assert offences(OURS, lambda n: without_allowed(n, other_conversions(source(n)), ALLOWED_CONVERSIONS)) == {}


def test_the_algorithm_makes_no_float_scalars_from_arrays() -> None:
    # The rule is for what computes. Files that only show or check numbers on the host may hold them as NumPy scalars.
    packages = {"precision", "nn", "backends", "optim", "step"}
    numbers = ("numerics/formats", "numerics/comp", "numerics/acc")
    names = [n for n in OURS if n.partition("/")[0].removesuffix(".py") in packages or n.startswith(numbers)]
    assert offences(names, lambda n: without_allowed(n, float_types_called(source(n)), ALLOWED_TYPE_CALLS)) == {}


def test_every_allowed_exception_is_still_there() -> None:
    checked = (
        (ALLOWED_CONVERSIONS, other_conversions), (ALLOWED_TYPE_CALLS, float_types_called), (ALLOWED_ASTYPE, uses_of_astype),
    )  # fmt: skip
    for allowed, checker in checked:
        for name, text in allowed:
            assert any(o.endswith(f": {text}") for o in checker(source(name))), (name, text)


@pytest.mark.parametrize(
    ("checker", "bad", "good"),
    [
        (uses_of_astype, ["y = x.astype(t)", "f = x.astype", "g(x[0].T.astype(t))"], ["astype = 3", "y = cast(x, 'fp16')"]),
        (
            other_conversions,
            ["x.view(np.uint32)", "np.copyto(a, b)", "x.sum(dtype=np.float32)", "np.add(a, b, dtype=t)", "x.mean(dtype='f2')"],
            ["np.empty(3, dtype=np.float16)", "xp.zeros(3, dtype=t)", "x.sum(dtype=np.int64)", "v.views(b)"],
        ),
        (float_types_called, ["np.float16(x)", "np.float32(a + b)", "ml_dtypes.bfloat16(y)"], ["np.float32(0.5)"]),
    ],
)  # fmt: skip
def test_conversion_checkers_bite(checker: object, bad: list[str], good: list[str]) -> None:
    for line in bad:
        assert len(checker(line)) == 1, line
    for line in good:
        assert checker(line) == [], line
    assert len(checker("\n".join(bad))) == len(bad)


def test_only_the_numpy_backend_uses_fast_conversions() -> None:
    users = {name for name in FILES if "numerics.fast_cast" in imports(source(name))}
    assert users == {"backends/numpy/backend.py"}, users


# --------------------------------------------------------------------------------------------- (c) the direction of imports


def module_of(name: str) -> str:
    """'nn/linear.py' -> 'nn.linear'; 'nn/__init__.py' -> 'nn'; '__init__.py' -> ''."""
    return name.removesuffix(".py").replace("/", ".").removesuffix("__init__").removesuffix(".")


MODULES = {module_of(name): name for name in FILES}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST, types_too: bool, late_too: bool) -> Iterator[ast.AST]:
    """All nodes, without those for type checkers only and those that run when a function is called, unless asked for."""
    for child in ast.iter_child_nodes(node):
        for one in child.orelse if is_type_checking(child) and not types_too else [child]:
            if not isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) or late_too:
                yield one
                yield from statements(one, types_too, late_too)


@cache
def exported(package: str) -> set[str]:
    """The names that a package's __init__ imports: `from refimpl.nn.ops import attention` is the operation, not the module."""
    if package not in MODULES or not MODULES[package].endswith("__init__.py"):
        return set()
    nodes = ast.walk(tree_of(source(MODULES[package])))
    return {alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}


@cache
def imports(text: str, types_too: bool = True, late_too: bool = True) -> set[str]:
    """The modules of refimpl that a source text imports, without the 'refimpl.'; '' is refimpl itself."""
    found = set()
    for node in statements(tree_of(text), types_too, late_too):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = ["refimpl.(relative)"]
        elif isinstance(node, ast.ImportFrom):
            package = node.module.removeprefix("refimpl").removeprefix(".")
            objects = exported(package)
            full = {alias.name: f"{package}.{alias.name}".removeprefix(".") for alias in node.names}
            is_module = {name: full[name] in MODULES and name not in objects for name in full}
            names = [f"{node.module}.{name}" if is_module[name] else node.module for name in full]
        else:
            continue
        found |= {name.removeprefix("refimpl").removeprefix(".") for name in names if name.split(".")[0] == "refimpl"}
    return found


ORDER = ["errors", "numerics", "precision", "nn", "backends", "optim", "distributed", "step", "training", "parity", "tools"]
"""The packages, each of which may import only itself and those before it. `refimpl/__init__.py` stands outside."""


def imports_against_the_order(module: str, text: str) -> set[str]:
    """What a module imports of packages that come after its own, imports inside functions and of types included."""
    own = ORDER.index(module.split(".")[0])
    return {name for name in imports(text) if name and ORDER.index(name.split(".")[0]) > own}


def test_imports_follow_the_order_of_the_packages() -> None:
    modules = [m for m in MODULES if m not in ("", "__main__", "_library")]
    assert offences(modules, lambda m: imports_against_the_order(m, source(MODULES[m]))) == {}


def test_the_packages_are_those_of_the_order() -> None:
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    assert entries == {*ORDER, "py.typed"}


TOP = {
    "refimpl", "tests", "scripts", "docs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE",
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "MANIFEST.in",
}  # fmt: skip
"""What `ls` shows: the project, and nothing that needs an explanation."""


def test_ls_shows_the_project_and_no_stray_file() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone: git does not say which files belong to the project")
    entries = {name.partition("/")[0] for name in listed.stdout.splitlines()}
    assert {name for name in entries if not name.startswith(".")} == TOP


def names_in(text: str) -> set[str]:
    """The functions, classes and variables of a module."""
    found = set()
    for node in tree_of(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_no_module_bears_the_name_of_an_object_in_it() -> None:
    assert [name for name in FILES if FILES[name].stem in names_in(source(name))] == []


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith("/__init__.py")])
def test_a_package_holds_a_docstring_and_what_it_exports_and_nothing_else(name: str) -> None:
    body = tree_of(source(name)).body
    kinds = [type(node).__name__ for node in body if not isinstance(node, ast.ImportFrom)]
    assert kinds[0] == "Expr" and set(kinds[1:]) <= {"Assign"} and names_in(source(name)) <= {"__all__", "__version__"}
    exported_names = {alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert exported_names & {path.stem for path in FILES[name].parent.iterdir()} == set()


def test_the_project_itself_imports_nothing_before_it_is_asked() -> None:
    assert loaded_by("refimpl") & {"numpy", "ml_dtypes"} == set()


def test_name_checker_bites() -> None:
    assert names_in("linear = 1\ndef matmul(): pass\nclass Op: pass\nx: int = 2") == {"linear", "matmul", "Op", "x"}


# Finer rules inside a package: a module of the first kind imports none of the second.
APART = [
    (("numerics.formats",), ("numerics",)),
    (("nn.autograd",), ("nn.linear", "nn.attention", "nn.norm", "nn.loss", "nn.models")),  # it adds gradients by `fan_in`
    (("nn.linear", "nn.attention", "nn.norm", "nn.elementwise", "nn.loss", "nn.embedding", "nn.shape"), ("nn.autograd",)),
    (("backends.base", "backends.numpy.table", "backends.numpy.backend"), ("backends.cupy",)),
]


def starts(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize(("kind", "others"), APART, ids=str)
def test_modules_inside_a_package_know_no_more_than_they_need(kind: tuple[str, ...], others: tuple[str, ...]) -> None:
    for module in kind:
        assert {name for name in imports(source(MODULES[module])) if starts(name, others)} == set(), module


@pytest.mark.parametrize(
    ("module", "bad"),
    [
        ("numerics.formats", "from refimpl.nn.ops import OPS"),
        ("precision.policy", "import refimpl.nn.op"),
        ("nn.linear", "from refimpl.backends import base"),
        ("nn.linear", "def f():\n    from refimpl import step"),
        ("optim.loss_scale", "if x:\n    import refimpl.training.config as t"),
        ("step", "from refimpl.training.trainer import Trainer"),
        ("parity.judge", "from refimpl.tools.memory import states"),
    ],
)
def test_import_checker_bites(module: str, bad: str) -> None:
    assert len(imports_against_the_order(module, f"import math\nfrom numpy import array\n{bad}")) == 1


def cycles(sources: Mapping[str, str]) -> list[str]:
    """Modules that import themselves by way of others (imports inside functions and packages as such not counted)."""
    graph = {m: imports(text, types_too=False, late_too=False) for m, text in sources.items()}
    found = []
    for start in graph:
        seen, waiting = set(), list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting.extend(graph.get(module, ()))
        if start in seen:
            found.append(start)
    return found


def test_no_import_goes_in_a_circle() -> None:
    assert cycles({m: source(name) for m, name in MODULES.items()}) == []
    circle = {"nn.autograd": "import refimpl.nn.ops", "nn.ops": "import refimpl.nn.autograd", "nn.op": ""}
    assert cycles(circle) == ["nn.autograd", "nn.ops"]


def casting(text: str) -> list[str]:
    """What a model must not do: name a cast, import casts, or name a format."""
    tree = tree_of(text)
    found = [offence(node) for node, name in calls(text) if name in ("cast", "widen", "round_to", "_convert")]
    found += [f"imports {module}" for module in imports(text) & {"numerics.casts", "numerics.fast_cast", "numerics.formats"}]
    found += [
        offence(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ("fp16", "bf16", "fp32", "fp64", "e4m3", "e5m2")
    ]
    return found


def test_models_never_cast() -> None:
    assert offences([n for n in FILES if n.startswith("nn/models/")], lambda n: casting(source(n))) == {}


def test_cast_checker_bites() -> None:
    for bad in ("y = cast(x, f)", "c.widen(x)", "from refimpl.numerics.casts import cast", "t(linear, 'fc', x, fmt='bf16')"):
        assert len(casting(bad)) == 1, bad
    assert casting("t(linear, 'mlp.c_fc', x)  # a cast in a comment") == []


# ------------------------------------------------------------------------------------------ (d) every operation is tested


def untested(operations: Mapping[str, object], text: str) -> list[str]:
    """Operations of which no call is in the tests: `Call("linear", ...)`, whose gradients are held against differences."""
    return [name for name in operations if f'Call("{name}", ' not in text]


def test_every_operation_has_a_test_of_its_formula() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "nn").glob("test_*.py"))
    assert untested(OPS, text) == []


def test_untested_operations_are_seen() -> None:
    assert untested({"linear": 0, "matmul": 0}, 'Call("linear", (3, 4))') == ["matmul"]


# ------------------------------------------------------------------------------------------------- (e) optional packages

OPTIONAL = ("cupy", "cupyx", "torch", "transformers", "matplotlib", "mpi4py", "tokenizers")


def loaded_by(imported: str, hidden: tuple[str, ...] = ()) -> set[str]:
    """The top-level packages in sys.modules after the imports, in a fresh interpreter; `hidden` ones cannot be found."""
    program = (
        "import sys, importlib\n"
        f"for name in {hidden!r}: sys.modules[name] = None\n"
        f"for name in {imported!r}.split(): importlib.import_module(name)\n"
        "print(*sorted({name.partition('.')[0] for name, module in sys.modules.items() if module is not None}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_everything_imports_without_the_optional_packages() -> None:
    ours = [f"refimpl.{m}" if m else "refimpl" for m, name in MODULES.items() if name not in FOREIGN]
    loaded = loaded_by(" ".join(ours), hidden=OPTIONAL)
    assert {"refimpl", "numpy"} <= loaded


def test_nothing_imports_the_optional_packages_uninvited() -> None:
    ours = [f"refimpl.{m}" if m else "refimpl" for m, name in MODULES.items() if name not in FOREIGN]
    assert loaded_by(" ".join(ours)) & set(OPTIONAL) == set()


def test_the_step_and_the_library_need_numpy_and_ml_dtypes_only() -> None:
    assert loaded_by("refimpl.step refimpl._library") & {*OPTIONAL, "safetensors", "tqdm"} == set()


def test_what_a_fresh_interpreter_loaded_is_seen() -> None:
    assert "tomllib" in loaded_by("tomllib") and "tomllib" not in loaded_by("math")
    with pytest.raises(AssertionError, match="tomllib"):
        loaded_by("tomllib", hidden=("tomllib",))


# ------------------------------------------------------------------------------------------------------ (f) the one page

HEADINGS = ("# 1. Weights down", "# 2. Forward and backward", "# 3. Gradients up", "# 4. Update")


def page_errors(text: str) -> list[str]:
    """What keeps step.py from being one page: its length, and the four numbered comments of train_step, in order."""
    lines = text.splitlines()
    errors = [f"{len(lines)} lines"] if len(lines) > 100 else []
    functions = [n for n in tree_of(text).body if isinstance(n, ast.FunctionDef) and n.name == "train_step"]
    if not functions:
        return [*errors, "no train_step"]
    body = [line.strip() for line in lines[functions[0].lineno - 1 : functions[0].end_lineno]]
    numbered = [line for line in body if re.match(r"# \d\.", line)]
    if len(numbered) != len(HEADINGS) or not all(a.startswith(b) for a, b in zip(numbered, HEADINGS, strict=False)):
        errors.append(f"headings: {numbered}")
    branches = [node for node in ast.walk(functions[0]) if isinstance(node, ast.If | ast.IfExp | ast.Match)]
    return errors + [f"asks: {offence(node)}" for node in branches]


def test_the_algorithm_is_one_page() -> None:
    assert page_errors(source("step.py")) == []


def test_page_checker_bites() -> None:
    good = source("step.py")
    assert page_errors(good + "\n" * 40) == [f"{len(good.splitlines()) + 40} lines"]
    assert len(page_errors(good.replace("# 2. Forward and backward", "# Forward"))) == 1
    assert len(page_errors(good.replace("# 3. G", "# 9. G").replace("# 4. U", "# 3. G").replace("# 9. G", "# 4. U"))) == 1
    assert len(page_errors(good.replace("loss_scale.update(found_inf)", "if fp16:\n        loss_scale.update(found_inf)"))) == 1
    assert page_errors(good.replace("def train_step", "def step")) == ["no train_step"]


# ------------------------------------------------------------------------------------------------- (g) length, docstrings


def too_long(text: str, limit: int = 60) -> list[str]:
    """Functions of more than `limit` lines, decorators and docstring included."""
    return [
        f"{node.name}: {length} lines"
        for node in ast.walk(tree_of(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1) > limit
    ]


def undocumented(text: str) -> list[str]:
    """The module, and its public functions and classes, where they have no docstring."""
    tree = tree_of(text)
    nodes = [tree, *(n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef))]
    names = [getattr(node, "name", "the module") for node in nodes]
    return [n for n, node in zip(names, nodes, strict=True) if not n.startswith("_") and not ast.get_docstring(node)]


def test_functions_are_short() -> None:
    assert offences(FILES, lambda n: too_long(source(n))) == {}


def test_what_is_public_is_documented() -> None:
    assert offences(FILES, lambda n: undocumented(source(n))) == {}


def test_length_and_docstring_checkers_bite() -> None:
    assert too_long("def f():\n" + "    x = 1\n" * 60) == ["f: 61 lines"]
    assert too_long("def f():\n" + "    x = 1\n" * 59) == []
    assert too_long("@d\ndef f():\n" + "    x = 1\n" * 59) == ["f: 61 lines"]
    assert undocumented("def f(): pass\nclass C: pass\ndef _g(): pass") == ["the module", "f", "C"]
    assert undocumented('"""M."""\ndef f():\n    """F."""') == []
