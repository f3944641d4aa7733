"""precision.policy: rows are found by their dotted names, and what is bound to a run rounds where and how the row says."""

import re

import numpy as np
import pytest
from op_calls import SHAPES

from refimpl.backends.numpy.backend import NUMPY
from refimpl.nn.autograd import Parameters
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.nn.ops import OPS, SELECTED, fan_in
from refimpl.numerics.formats import dtype_of, format_of
from refimpl.optim.state import State
from refimpl.precision.context import OpPrecision, Run
from refimpl.precision.policy import EVERY_OTHER, PRODUCTS, SAME, Policy, Precision, uniform
from refimpl.precision.policy_checks import ROWS
from refimpl.precision.policy_variants import with_attention
from refimpl.precision.recipes import RECIPES, get_recipe
from refimpl.step import forward_backward

A, B, C, D = (Precision(fmt, "fp32", fmt) for fmt in ("fp16", "bf16", "fp32", "fp64"))


def bound(row: Precision, monitor: object = None, op: str = "linear", place: str = "h.0.fc") -> OpPrecision:
    return Run(Policy("test", {EVERY_OTHER: row}), NUMPY, monitor).precision(op, place)


def ones(fmt: str, *shape: int) -> np.ndarray:
    return np.ones(shape or (3,), dtype_of(fmt))


class Recorder:
    """A monitor that keeps its arguments."""

    def __init__(self) -> None:
        self.sites: list[str] = []
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, site: str, before: np.ndarray, after: np.ndarray) -> None:
        self.sites.append(site)
        self.pairs.append((before, after))


# ------------------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("linear", A),
        ("linear.y", A),
        ("linear.dx", A),
        ("linear.dw", B),
        ("linear.dw.deeper", B),
        ("attention.softmax", C),
        ("attention.scores", D),
        ("attention", D),
        ("softmax", D),
        ("linearity", D),  # a prefix that ends in no dot is another operation
        ("", D),
    ],
)
def test_a_row_is_the_most_specific_one(key: str, expected: Precision) -> None:
    policy = Policy("p", {"linear": A, "linear.dw": B, "attention.softmax": C, EVERY_OTHER: D})
    assert policy.row(key) is expected


BY_PLACE = {"linear": A, "linear.dw": B, "lm_head:linear": C, "h.1.fc:linear.y": D, EVERY_OTHER: D}


@pytest.mark.parametrize(
    ("key", "place", "expected"),
    [
        ("linear.y", "h.0.fc", A),
        ("linear.dw", "h.0.fc", B),
        ("linear", "lm_head", C),
        ("linear.y", "lm_head", C),
        ("linear.dw", "lm_head", C),  # a row of the place, though one of all places is of this part
        ("linear.dw.deeper", "lm_head", C),
        ("cross_entropy", "lm_head", D),
        ("linear.y", "h.0.lm_head", A),  # a place is a whole name
        ("linear.y", "lm_head.x", A),
        ("linear.y", "h.1.fc", D),
        ("linear.dx", "h.1.fc", A),
        ("linear.dw", "h.1.fc", B),
        ("linear.y", "", A),
    ],
)
def test_rows_of_a_place_come_first(key: str, place: str, expected: Precision) -> None:
    assert Policy("p", BY_PLACE).row(key, place) is expected


def test_control_a_lookup_by_part_before_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`linear.dw` of all places before `lm_head:linear`: so a last layer that is meant for 16 bits would be quantized."""

    def by_part(policy: Policy, key: str, place: str = "") -> Precision:
        while key:
            for listed in (f"{place}:{key}", key):
                if listed in policy.rows:
                    return policy.rows[listed]
            key = key.rpartition(".")[0]
        return policy.rows[EVERY_OTHER]

    monkeypatch.setattr(Policy, "row", by_part)
    with pytest.raises(AssertionError):
        test_rows_of_a_place_come_first("linear.dw", "lm_head", C)


def test_operations_are_handed_the_row_of_their_place() -> None:
    run = Run(Policy("p", BY_PLACE), NUMPY)
    assert [run.precision("linear", place)["dw"].row for place in ("lm_head", "h.0.fc")] == [C, B]
    assert run.precision("linear", "lm_head").row is C and run.precision("linear", "h.1.fc")["y"].row is D


@pytest.mark.parametrize(
    ("row", "in_formats"),
    [
        (Precision("fp16", "fp32", "fp16"), True),
        (Precision({"x": "bf16", "w": SAME}, "fp64", SAME), True),
        (Precision("e4m3", "fp32", "bf16"), True),  # a format, though of 8 bits
        (Precision("e4m3-tensor", "fp32", "bf16"), False),
        (Precision({"x": "bf16", "w": "nvfp4"}, "fp32", "bf16"), False),
        (Precision("fp16", "fp16", "fp16"), False),
        (Precision("fp16", "fp32/128", "fp16"), False),
        (Precision("fp16", "e8m14", "fp16"), False),
    ],
)
def test_in_formats_says_whether_all_is_casts_and_plain_sums(row: Precision, in_formats: bool) -> None:
    assert Policy("p", {EVERY_OTHER: A, "lm_head:linear.y": row}).in_formats is in_formats
    assert row.quantizes is (not in_formats and row.acc == "fp32")  # the others have another accumulator


@pytest.mark.parametrize("acc", ["fp16", "bf16", "e8m14", "fp32/128"])
@pytest.mark.parametrize(
    "key", [EVERY_OTHER, "linear", "linear.db", "lm_head:linear", "attention.softmax", "attention.values", "layernorm", "add"]
)
def test_an_accumulator_that_nothing_would_heed_is_refused(key: str, acc: str) -> None:
    """Only the products of linear sum otherwise than in FP32; elsewhere it would be FP32 in silence."""
    refused_but_in_products(key, Precision("fp16", acc, "fp16"))


@pytest.mark.parametrize("key", [EVERY_OTHER, "linear", "linear.db", "lm_head:linear", "attention.scores", "matmul", "relu"])
def test_only_factors_of_linear_can_be_quantized(key: str) -> None:
    refused_but_in_products(key, Precision("e4m3-tensor", "fp32", "bf16"))


def refused_but_in_products(key: str, odd: Precision) -> None:
    message = f"policy p: row {key!r} quantizes or sums in fewer bits, as only linear.y, linear.dx, linear.dw can"
    message = re.escape(message)
    with pytest.raises(ValueError, match=f"^{message}$"):
        Policy("p", {EVERY_OTHER: A, key: odd})
    for product in PRODUCTS:
        for place in ("", "lm_head:"):
            assert Policy("p", {EVERY_OTHER: A, place + product: odd}).row(product, "lm_head") is odd


LACKS = "it lacks the row '*', of all operations that it does not list"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ({"linaer.y": A, EVERY_OTHER: A}, "unknown row 'linaer.y': choose one of linear, .*, \\*; did you mean linear.y\\?"),
        ({"lm_head:linaer": A, EVERY_OTHER: A}, "unknown row 'linaer': .*; did you mean linear\\?"),
        ({"linear.dq": A, EVERY_OTHER: A}, "unknown row 'linear.dq': .*; did you mean linear.d[xwb]\\?"),
        ({"layernorm.y": A, EVERY_OTHER: A}, "unknown row 'layernorm.y': .*; did you mean layernorm\\?"),  # it has no parts
        ({"quantized_linear": A, EVERY_OTHER: A}, "unknown row 'quantized_linear': .*"),  # reads the row of linear
        ({"linear ": A, EVERY_OTHER: A}, "unknown row 'linear ': .*; did you mean linear\\?"),
        ({}, re.escape(LACKS)),
        ({"linear": A, "lm_head:*": A}, re.escape(LACKS)),
        ({EVERY_OTHER: Precision("fp17", "fp32", "fp16")},
         "row '\\*': input 'fp17': choose one of same, fp64, .*, or a scheme of quantization; did you mean fp16\\?"),
        ({EVERY_OTHER: A, "linear.y": Precision({"x": "fp16", "w": "e4m3-tensr"}, "fp32", "fp16")},
         "row 'linear.y': input 'e4m3-tensr': .*; did you mean e4m3-tensor\\?"),
        ({EVERY_OTHER: A, "h.0.fc:linear.dw": Precision("fp16", "fp32", "FP16")},
         "row 'h.0.fc:linear.dw': output 'FP16': choose one of same, .*; did you mean fp16\\?"),
        ({EVERY_OTHER: A, "linear.y": Precision("fp16", "fp32", "e4m3-tensor")}, "row 'linear.y': output 'e4m3-tensor': .*"),
        ({EVERY_OTHER: Precision("fp16", "fp23", "fp16")},
         "row '\\*': accumulator 'fp23': it must be fp32, .*; did you mean fp32\\?"),
        ({EVERY_OTHER: A, "linear.dw": Precision("fp16", "e8m99", "fp16")}, "row 'linear.dw': accumulator 'e8m99': it must .*"),
        ({EVERY_OTHER: A, "linear": Precision("fp16", SAME, "fp16")}, "row 'linear': accumulator 'same': it must be .*"),
    ],
)  # fmt: skip
def test_a_table_with_a_mistake_is_refused(rows: dict[str, Precision], says: str) -> None:
    with pytest.raises(ValueError, match=f"^policy p: {says}$") as error:
        Policy("p", rows)
    assert "\n" not in str(error.value)


def test_the_rows_that_can_be_are_those_of_the_operations_and_their_parts() -> None:
    """What each operation looks up in forward and backward, with the operations that a policy selects."""
    looked_up = {EVERY_OTHER, fan_in.key}
    for policy in (uniform("bf16", "fp32"), get_recipe("fp8").policy, with_attention(uniform("bf16", "fp32"), "fused")):
        for name, case in SHAPES.items():
            run, chosen = Run(policy, NUMPY), {**OPS, **SELECTED}[policy.operation(name, "here")]
            inputs, params, static = case.draw("bf16")
            p = run.precision(chosen.key, "here")
            y, saved = chosen.forward(*inputs, *params, p=p, **static)
            chosen.backward(np.ones(np.shape(y), y.dtype), saved, *params, p=p, **static)
            looked_up |= {chosen.key} | {part.op for part in p._parts.values()}
    assert looked_up == set(ROWS) and len(ROWS) == len(set(ROWS))


def test_the_policy_selects_the_operation_of_a_place() -> None:
    odd, plain = Precision("bf16", "fp16", "bf16"), Precision("bf16", "fp32", "bf16")
    for product in PRODUCTS:
        policy = Policy("p", {EVERY_OTHER: plain, product: odd, "lm_head:linear": plain})
        assert [policy.operation("linear", place) for place in ("h.0.fc", "lm_head")] == ["quantized_linear", "linear"]
        assert policy.operation("attention", "h.0.attn") == "attention"
    assert with_attention(uniform("fp16", "fp32"), "fused").operation("attention", "h.0.attn") == "fused_attention"


def test_recipes_in_formats() -> None:
    others = {name for name, recipe in RECIPES.items() if not recipe.policy.in_formats}
    assert others == {name for name in RECIPES if name.startswith(("fp8", "mxfp", "nvfp4", "fp16-sums"))}


def test_inputs_are_one_format_or_a_table() -> None:
    one = Precision("fp16", "fp32", "fp16")
    assert one.input("x") == one.input("w") == "fp16"
    table = Precision({"x": "e4m3", "dy": "e5m2"}, "fp32", "bf16")
    assert (table.input("x"), table.input("dy"), table.input("w")) == ("e4m3", "e5m2", SAME)


def test_parts_of_an_operation_have_rows_of_their_own() -> None:
    run = Run(Policy("p", {"attention.softmax": C, EVERY_OTHER: A}), NUMPY)
    p = run.precision("attention", "h.0.attn")
    assert p.row is A
    assert p["softmax"].row is C and p["scores"].row is A
    assert p["softmax"] is p["softmax"]
    assert (p["softmax"].op, p["softmax"].place) == ("attention.softmax", "h.0.attn")


def test_a_run_binds_each_place_once_and_runs_share_nothing() -> None:
    policy = Policy("p", {EVERY_OTHER: A})
    run, other = Run(policy, NUMPY), Run(policy, NUMPY)
    assert run.precision("linear", "a") is run.precision("linear", "a")
    assert run.precision("linear", "a") is not run.precision("linear", "b")
    assert run.precision("linear", "a") is not run.precision("add", "a")
    assert run.precision("linear", "a") is not other.precision("linear", "a")
    assert run.precision("linear", "a").run is run


# ------------------------------------------------------------------------------------------------- what `p` does to arrays


@pytest.mark.parametrize(("given", "row", "expected"), [
    ("fp32", "fp16", "fp16"),
    ("fp16", "fp16", "fp16"),
    ("bf16", "fp16", "fp16"),
    ("fp32", SAME, "fp32"),
    ("bf16", SAME, "bf16"),
    ("fp16", "fp32", "fp32"),
])  # fmt: skip
def test_cast_takes_an_operand_to_the_rows_format(given: str, row: str, expected: str) -> None:
    x = ones(given)
    y = bound(Precision(row, "fp32", "fp32")).cast(x, "x")
    assert format_of(y) == expected
    assert (y is x) == (given == expected)


def test_cast_rounds_each_operand_its_own_way() -> None:
    p = bound(Precision({"x": "fp16", "w": "bf16"}, "fp32", "fp16"))
    x = np.float32([1 + 2**-9])
    assert p.cast(x, "x")[0] == 1 + 2**-9  # fp16 has ten fraction bits
    assert p.cast(x, "w")[0] == 1.0  # bf16 has seven
    assert p.cast(x, "b") is x  # not in the table: as it comes


@pytest.mark.parametrize(("given", "acc"), [("fp16", "fp32"), ("bf16", "fp32"), ("fp32", "fp32"), ("fp32", "fp64")])
def test_wide_takes_to_the_accumulation_format(given: str, acc: str) -> None:
    assert format_of(bound(Precision("fp16", acc, "fp16")).widen(ones(given))) == acc


def test_wide_never_rounds() -> None:
    with pytest.raises(TypeError, match="would round"):
        bound(Precision("fp64", "fp32", "fp64")).widen(ones("fp64"))


@pytest.mark.parametrize(("row", "operands", "expected"), [
    ("fp16", ("fp32",), "fp16"),
    ("fp32", ("fp16",), "fp32"),
    (SAME, ("fp16",), "fp16"),
    (SAME, ("fp16", "fp16"), "fp16"),
    (SAME, ("bf16", "fp32"), "fp32"),
    (SAME, ("fp16", "bf16"), "fp32"),
])  # fmt: skip
def test_out_rounds_to_the_rows_format_or_the_widest_operand(row: str, operands: tuple[str, ...], expected: str) -> None:
    p = bound(Precision(SAME, "fp32", row))
    z = np.float32([1 + 2**-20])
    y = p.round(z, "y", *(ones(fmt) for fmt in operands))
    assert format_of(y) == expected
    assert (y is z) == (expected == "fp32")


def test_gemm_accumulates_in_acc_and_rounds_nothing() -> None:
    a, b = np.float16([[2048, 1]]), np.float16([[1], [1]])
    y = bound(Precision("fp16", "fp32", "fp16")).matmul(a, b)
    assert format_of(y) == "fp32" and y[0, 0] == 2049  # fp16 has no 2049
    y = bound(Precision("fp32", "fp64", "fp32")).matmul(np.float32([[2**24, 1]]), np.float32([[1], [1]]))
    assert format_of(y) == "fp64" and y[0, 0] == 2**24 + 1  # fp32 has no 2^24 + 1


ONE_AND_A_BIT = 1 + 2**-9  # a value of fp16 and fp32, but not of bf16


@pytest.mark.parametrize(("inputs", "stored", "expected_format", "expected_value"), [
    # uniform: the row's format is the tensor's
    ("fp16", "fp16", "fp16", ONE_AND_A_BIT),
    ("bf16", "bf16", "bf16", 1.0),
    # autocast: rounded to what the operation saw, widened to what the tensor is
    ("bf16", "fp32", "fp32", 1.0),
    ("fp16", "fp32", "fp32", ONE_AND_A_BIT),
    # SAME: rounded to the tensor's own format
    (SAME, "bf16", "bf16", 1.0),
    (SAME, "fp32", "fp32", ONE_AND_A_BIT),
    # an operation that saw more than the tensor has (cross-entropy of 16-bit logits): rounded on the way out
    ("fp32", "bf16", "bf16", 1.0),
])  # fmt: skip
def test_grad_is_rounded_to_what_was_seen_and_stored_as_the_tensor(
    inputs: str, stored: str, expected_format: str, expected_value: float
) -> None:
    p = bound(Precision(inputs, "fp32", "fp32"))
    g = p.round_grad(np.float32([ONE_AND_A_BIT]), "x", stored)
    assert format_of(g) == expected_format
    assert float(g[0]) == expected_value


def test_grad_rounds_twice_where_the_seen_format_does_not_fit_the_stored_one() -> None:
    monitor = Recorder()
    p = bound(Precision("bf16", "fp32", "bf16"), monitor)
    g = p.round_grad(np.float32([ONE_AND_A_BIT]), "x", "fp16")
    assert format_of(g) == "fp16" and g[0] == 1.0
    assert monitor.sites == ["h.0.fc:linear.dx", "h.0.fc:linear.dx.stored"]


@pytest.mark.parametrize(("inputs", "given", "expected"), [
    ("fp16", "fp32", "fp16"),
    ("bf16", "fp32", "bf16"),
    ("fp16", "fp16", None),
    (SAME, "fp32", None),
    ("fp32", "fp32", None),
    ("fp32", "fp16", None),
    ("e4m3", "fp32", None),  # 8 bits: each GEMM quantizes its own way
    ("e4m3-tensor", "fp32", None),
])  # fmt: skip
def test_which_parameters_are_cast_once_a_step(inputs: str, given: str, expected: str | None) -> None:
    policy = Policy("p", {EVERY_OTHER: A, "linear.y": Precision({"w": inputs}, "fp32", "fp16")})
    p = Run(policy, NUMPY).precision("linear", "here")
    parameters = Parameters({"here.weight": ones(given)}, {})
    leaf = parameters.leaf("here.weight")
    assert leaf is not None and parameters.copy_format(leaf, "w", p) == expected


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "fp32"])
def test_empty_hands_out_memory_of_the_format(fmt: str) -> None:
    x = bound(A).empty((2, 3), fmt)
    assert x.shape == (2, 3) and format_of(x) == fmt


# --------------------------------------------------------------------------------------------------------------- monitor


def test_the_monitor_hears_of_each_rounding_by_name() -> None:
    monitor = Recorder()
    p = bound(Precision("fp16", "fp32", "bf16"), monitor, op="attention", place="transformer.h.3.attn")
    x = np.float32([1 + 2**-12])
    y = p.cast(x, "q")
    p["scores"].round(x, "S", x)
    p["scores"].round_grad(x, "k", "fp32")
    assert monitor.sites == [
        "transformer.h.3.attn:attention.q",
        "transformer.h.3.attn:attention.scores.S",
        "transformer.h.3.attn:attention.scores.dk",
    ]
    before, after = monitor.pairs[0]
    assert before is x and after is y and after[0] == 1.0


def test_the_monitor_hears_nothing_where_nothing_is_rounded() -> None:
    monitor = Recorder()
    p = bound(Precision("fp16", "fp32", "fp16"), monitor)
    x = ones("fp16")
    p.cast(x, "x")  # has the format already
    p.widen(x)  # exact
    p.matmul(ones("fp16", 2, 2), ones("fp16", 2, 2))
    p.round(x, "y", x)
    p.round_grad(x, "x", "fp32")  # only widened
    bound(Precision(SAME, "fp32", SAME), monitor).cast(ones("fp32"), "x")
    assert monitor.sites == []
    p.round(np.float32([1]), "y", x)
    assert monitor.sites == ["h.0.fc:linear.y"]


def test_a_uniform_fp32_or_fp64_run_rounds_nowhere() -> None:
    # one whole forward and backward: a recipe without rounding never calls the monitor, a 16-bit one does
    rng = np.random.default_rng(0)
    model = mlp_model(MLPConfig(n_layer=1, n_embd=4, block_size=3, vocab_size=7))
    tokens = rng.integers(0, 7, (5, 3))
    heard = {}
    for name in ("fp64", "fp32", "bf16", "amp-bf16"):
        monitor, recipe = Recorder(), get_recipe(name)
        state = State(model, recipe.state_encodings(), NUMPY)
        state.load_weights(model.initial_weights(rng))
        forward_backward(model, [(tokens, tokens)], state, np.float32(1), Run(recipe.policy, NUMPY, monitor))
        heard[name] = set(monitor.sites)
    assert heard["fp64"] == heard["fp32"] == set()
    assert {"h.0.fc:linear.y.y", "lm_head:linear.dw.dw", "loss:cross_entropy.dlogits.stored"} <= heard["bf16"]
    assert "lm_head.weight.bf16:cast.w" in heard["amp-bf16"] and "lm_head.weight.bf16:cast.w" not in heard["bf16"]


def test_widening_calls_of_cast_are_not_roundings() -> None:
    # cross-entropy casts 16-bit logits up to fp32: `cast` in the wide direction changes the type and rounds nothing
    monitor = Recorder()
    y = bound(Precision("fp32", "fp32", "fp32"), monitor).cast(ones("fp16"), "logits")
    assert format_of(y) == "fp32"
    assert monitor.sites == []
