"""Numbers and places of a report as text, the same on the page and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refimpl.parity.audit.finding import is_serious


def amount(n: float) -> str:
    """Return a count in at most four digits: 512, 83.1 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e4, "thousand")):
        if n >= size:
            return f"{n / (1e3 if size == 1e4 else size):.3g} {word}"
    return f"{n:,.0f}"


def share(part: float | None) -> str:
    """Return a share in percent, never rounded up to all or down to nothing."""
    if part is None:
        return "-"
    if part in (0, 1):
        return f"{part:.0%}"
    for digits in (1, 2, 3, 4):
        text = f"{part:.{digits}%}"
        if float(text[:-1]) not in (0, 100):
            return text
    return "almost all" if part > 0.5 else "almost none"


def ratio(number: float | str | None) -> str:
    """Return a number of data, which may be the text 'inf' or 'nan'."""
    return "-" if number is None else number if isinstance(number, str) else f"{number:.3g}"


def formats(row: Mapping[str, Any]) -> str:
    """Return the formats of an operation: 'bf16, bf16 -> fp32'."""
    return f"{', '.join(row['inputs'])} -> {row['output']}"


def short_name(operation: str) -> str:
    """Return an operation's name without what goes without saying: 'mm' for 'aten.mm.default'."""
    return operation.removeprefix("aten.").removesuffix(".default")


def module_of(name: str | None) -> str:
    """Return a module in words."""
    return "" if name is None else name or "(the model)"


def place(line: str, folders: int = 1) -> str:
    """Return a source line with only so many parts of its path."""
    parts = line.replace("\\", "/").split("/")
    return "/".join(parts[-folders:])


def training_line(training: Mapping[str, Any]) -> str:
    """Return what was audited, in one line."""
    steps = training["audited"]
    which = ", ".join(map(str, steps[:6])) + (", ..." if len(steps) > 6 else "")
    numbers = f" (step{'s' * (len(steps) != 1)} {which})" if steps else ""
    scaler = f", {training['scaler']}" if training["scaler"] else ""
    optimizers = " + ".join(training["optimizers"])
    size = amount(training["parameters"])
    return f"{len(steps)} of {training['steps']} steps{numbers}: {training['model']}, {size} parameters, {optimizers}{scaler}"


def seen(finding: Mapping[str, Any]) -> str:
    """Return where a finding was seen first, and how often."""
    where = [f"step {finding['step']}"]
    where += [place(finding["line"])] if finding["line"] else []
    where += [module_of(finding["module"])] if finding["module"] else []
    where += [f"seen {finding['places']:,} times"] if finding["places"] > 1 else []
    return ", ".join(where)


def program_sentence(training: Mapping[str, Any]) -> str:
    """Return which program was audited."""
    if not training["compiled"] and not training["compiled_frames"]:
        return "Audited steps ran the program as it is written."
    parts = [module_of(name) for name in training["compiled"][:5]] or ["functions of the program"]
    return (
        f"torch.compile has compiled {', '.join(parts)}. Audited steps ran it as it is written, without the compiler, and that "
        f"program was judged; the code that the compiler makes, which the other steps run, was not."
    )


def verdict_sentence(data: Mapping[str, Any]) -> str:
    """Return the first sentence of the verdict: how many findings there are, and first what could not be found."""
    training = data["training"]
    n = sum(is_serious(found["level"]) for found in data["findings"])
    count = f"{n} finding{'s' * (n != 1)}" if n else "Nothing found above a note."
    if not training["audited"]:
        ended = f"{training['steps']} steps ended, and none of them was" if training["steps"] else "no step ended that was"
        return f"Nothing was audited: {ended} audited."
    if not whole_steps(training):
        return f"No audited step ended ({training['unended']}): the rules about whole steps, A to C, were not applied. {count}"
    return count


def whole_steps(training: Mapping[str, Any]) -> int:
    """Return how many audited steps have ended."""
    return len(training["audited"]) - bool(training["unended"])


def unended_sentence(training: Mapping[str, Any]) -> str:
    """Return what is to be said of a step that was begun and not ended after others, '' if none was."""
    if not training["unended"] or not whole_steps(training):
        return ""
    return (
        f"The last audited step did not end ({training['unended']}): its operations are judged, but only the rules "
        f"about single operations were applied."
    )
