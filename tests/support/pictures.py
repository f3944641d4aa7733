"""The pictures of README and docs/: the command that makes them, and the figures that each carries in its file.

    python tests/support/pictures.py [NAME ...] [--layers FILE]     makes docs/NAME anew; all of them by default

A picture of a page needs Chromium, docs/audit.png needs torch, and all need matplotlib. docs/real_models.png is drawn from
the figures that it carries, since they took a model of Hugging Face: --layers takes new ones, from the file of
`inspect_precision.py --json`. What a page of docs/ says of its picture is written here, and tests/test_pictures.py compares.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

from paths import DOCS, ROOT, SCRIPTS

Figures = dict[str, Any]
WIDTH = 900
"""Pixels of a picture of a page: about what a page of README has."""


@dataclass(frozen=True)
class Made:
    """What a command made. words: those of the picture, which name no numbers. draw: draws it to a file."""

    figures: Figures
    words: list[str]
    draw: Callable[[Path], None]


@dataclass(frozen=True)
class Picture:
    """page: what shows it. make: makes all of it. again: makes the figures and words again, or those that take no minute.

    sentences: what the page says of it.
    """

    page: str
    make: Callable[[Path], Made]
    again: Callable[[Path], Made]
    sentences: Callable[[Figures], list[str]]


# -- figures within a PNG ----------------------------------------------------------------------------------------------

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"refimpl\0\0"


def chunks_of(png: bytes) -> list[tuple[bytes, bytes]]:
    """Return kind and data of each chunk. Source: the PNG specification, W3C 2003, section 5.3."""
    assert png.startswith(SIGNATURE)
    at, found = len(SIGNATURE), []
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def checksum(chunks: Sequence[tuple[bytes, bytes]]) -> str:
    """Return a checksum of what a viewer shows."""
    return hashlib.sha256(b"".join(data for kind, data in chunks if kind in (b"IHDR", b"IDAT"))).hexdigest()


def stamp(file: Path, figures: Figures, words: Sequence[str]) -> None:
    """Write the figures, the words and the checksum of the image into a PNG, in place of its other texts."""
    chunks = [(kind, data) for kind, data in chunks_of(file.read_bytes()) if kind not in (b"tEXt", b"zTXt", b"iTXt")]
    note = json.dumps({"image": checksum(chunks), "words": list(words), "figures": figures})
    chunks.insert(1, (b"zTXt", KEYWORD + zlib.compress(note.encode(), 9)))
    whole = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    file.write_bytes(SIGNATURE + b"".join(whole))


def note_of(file: Path) -> dict[str, Any]:
    """Return what `stamp` wrote: image, words, figures. Errors: AssertionError where the image is another one."""
    chunks = chunks_of(file.read_bytes())
    (text,) = [data for kind, data in chunks if kind == b"zTXt" and data.startswith(KEYWORD)]
    note: dict[str, Any] = json.loads(zlib.decompress(text.removeprefix(KEYWORD)))
    assert note["image"] == checksum(chunks), f"{file.name} is not the image that its figures were written for"
    return note


def differences(name: str, recorded: Any, now: Any) -> list[str]:
    """Return what is no longer as recorded. Numbers that are no integers may differ by a twentieth: BLAS kernels do as much."""
    if isinstance(recorded, dict) and isinstance(now, dict):
        return [each for key in now for each in differences(f"{name}.{key}", recorded.get(key), now[key])]
    if isinstance(recorded, list) and isinstance(now, list) and len(recorded) == len(now):
        return [each for i, new in enumerate(now) for each in differences(f"{name}[{i}]", recorded[i], new)]
    if isinstance(recorded, float) and isinstance(now, float) and abs(recorded - now) <= 0.05 * max(abs(recorded), abs(now)):
        return []
    return [] if recorded == now else [f"{name} was {recorded} and is {now}"]


# -- making ------------------------------------------------------------------------------------------------------------


def run(folder: Path, script: str, *arguments: str, code: int = 0) -> None:
    """Run a script of the house in a folder, under the name that it has in docs/."""
    if not (folder / "scripts").exists():
        (folder / "scripts").symlink_to(SCRIPTS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, f"scripts/{script}.py", *arguments]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr


def first_sections(page: str, count: int) -> str:
    """Return a page with its first sections only."""
    page, end, rest = page.partition("</main>")
    start, *sections = re.split(r"(?=<section id=)", page)
    return start + "".join(sections[:count]) + end + rest


def words_of_page(page: str) -> list[str]:
    """Return the headings of a page and of its tables and figures, with # for each number."""
    found = re.findall(r"<(h[123]|th scope=\"col\"[^>]*)>(.*?)</(?:h[123]|th)>", page)
    return [re.sub(r"[\d.,]*\d", "#", unescape(re.sub("<.*?>", "", text))) for _, text in found]


def words_of_plot(figure: Any) -> list[str]:
    """Return the titles, the names of the axes and the legends of a figure of matplotlib, sorted."""
    from matplotlib.text import Text

    found = {each.get_text() for each in figure.findobj(Text)}
    return sorted(text for text in found if re.search("[a-z]", text) and "mathdefault" not in text)  # which is at ticks


def photograph(page: str, file: Path) -> None:
    """Write a picture of a page down to its last line."""
    from browser import browse
    from matplotlib.image import imread, imsave

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "page.html").write_text(page)
        size = f"--window-size={WIDTH},6000"
        browse(folder, f"--screenshot={folder / 'all.png'}", size, (folder / "page.html").as_uri())
        shot = imread(folder / "all.png")[..., :3]
        last = max(y for y in range(len(shot)) if (shot[y] != shot[-1, 0]).any())
        assert last < 5900, "the page is longer than its picture"
        imsave(file, shot[: last + 16])


# -- the pictures ------------------------------------------------------------------------------------------------------

FIRST = 50
"""Steps of a run that are made again: its warm-up, in which the learning rate does not depend on the number of steps."""


def _log(folder: Path, steps: int) -> tuple[Any, Figures]:
    from refimpl.training.metrics import read_metrics

    log = read_metrics(folder / "runs" / "gpt-fp16")
    early = log.steps[:FIRST]
    figures = {
        "losses": [round(row["loss"], 3) for row in early],
        "skipped": [row["step"] for row in early if row.get("skipped")],
        "scales": [early[0]["loss_scale"], early[-1]["loss_scale"]],
    }
    if steps > FIRST:
        figures |= {
            "steps": len(log.steps),
            "val_loss": round(log.evaluations[-1]["val_loss"], 4),
            "skipped_in_all": sum(bool(row.get("skipped")) for row in log.steps),
        }
    return log, figures


def _train(folder: Path, *arguments: str, steps: int = 800) -> Made:
    from refimpl.training.pictures import new_figure
    from refimpl.training.plots import SIZE, draw_runs

    run(folder, "train", *arguments)
    log, figures = _log(folder, steps)
    figure = new_figure(*SIZE)
    draw_runs(figure, {"": log}, "step", "byte")
    drawn = folder / "runs" / "gpt-fp16" / "loss.png"
    return Made(figures, words_of_plot(figure), lambda file: _copy(drawn, file))


def _copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def _begin(folder: Path) -> Made:
    return _train(folder, *f"--steps {FIRST} --eval-batches 1 --sample-bytes 0".split(), steps=FIRST)


def _of_run(figures: Figures) -> list[str]:
    assert figures["skipped_in_all"] == len(figures["skipped"]) == 1
    return [
        f"It reaches a validation loss of {figures['val_loss']:.2f} nats per byte in {figures['steps']} steps",
        f"at step {figures['skipped'][0]} a gradient overflows",
    ]


def _report(folder: Path) -> Made:
    from refimpl.numerics.rounding_effects import NEGLIGIBLE

    run(folder, "inspect_precision", "--steps", "50", "--json", "report.json")
    data = json.loads((folder / "report.json").read_text())
    page = first_sections((folder / "runs" / "report-fp16.html").read_text(), 3)
    rows, sweep = data["rows"], data["sweep"]
    of_one = {name: found["flushed"] for name, found in sweep[0]["layers"].items()}
    worst = max(of_one, key=lambda name: of_one[name])
    lost = [(row["loss_scale"], max(found["flushed"] for found in row["layers"].values())) for row in sweep]
    figures = {
        "steps": len(rows),
        "skipped": [row["step"] for row in rows if row["skipped"]],
        "loss": [rows[0]["loss"], rows[-1]["loss"]],
        "worst": worst,
        "lost_at_one": of_one[worst],
        "enough": int(math.log2(next(scale for scale, share in lost if share < NEGLIGIBLE))),
        "overflow": int(math.log2(next(r["loss_scale"] for r in sweep if any(f["overflowed"] for f in r["layers"].values())))),
    }
    return Made(figures, words_of_page(page), lambda file: photograph(page, file))


def _of_report(figures: Figures) -> list[str]:
    from refimpl.numerics.rounding_effects import NEGLIGIBLE
    from refimpl.numerics.rounding_words import percent

    return [
        f"a report for {figures['steps']} steps",
        f"At S = 1 up to {percent(figures['lost_at_one'])} of a layer's gradients become zero ({figures['worst']}); from "
        f"S = 2^{figures['enough']} on no layer loses more than {percent(NEGLIGIBLE)}, and from S = 2^{figures['overflow']} on "
        f"gradients overflow.",
    ]


def _audit(folder: Path) -> Made:
    run(folder, "audit", "--demo", code=1)
    data = json.loads((folder / "runs" / "audit" / "audit.json").read_text())
    page = first_sections((folder / "runs" / "audit" / "audit.html").read_text(), 1)
    found = [[each["code"], each["name"], each["level"]] for each in data["findings"]]
    return Made({"findings": found}, words_of_page(page), lambda file: photograph(page, file))


def _of_audit(figures: Figures) -> list[str]:
    serious = [f"`{code} {name}` ({level})" for code, name, level in figures["findings"] if level != "note"]
    return [", ".join(serious[:-1]) + f" and {serious[-1]}"]


REAL = DOCS / "real_models.png"


def _layers(recorded: Sequence[Mapping[str, Any]]) -> list[Any]:
    from refimpl.tools.precision_report.layers import Effect, Layer, Operand

    return [
        Layer(row["layer"], [
            Operand(one["name"], one["top"], one["peak"], {name: Effect(*effect) for name, effect in one["effects"].items()})
            for one in row["inputs"]
        ])
        for row in recorded
    ]  # fmt: skip


def figures_of_layers(data: Mapping[str, Any]) -> Figures:
    """Return what the picture of the layers shows of the data of `inspect_precision.py --json`."""
    rows = [
        {
            "layer": row["layer"],
            "inputs": [
                {
                    "name": one["name"], "top": _short(one["top_share"]), "peak": _short(one["largest_over_rms"]),
                    "effects": {name: [_short(e["error"]), _short(e["flushed"])] for name, e in one["formats"].items()},
                }
                for one in row["inputs"]
            ],
        }
        for row in data["layers"]
        if row["layer"].startswith("block ")
    ]  # fmt: skip
    return {"title": f"{data['what']}, {data['config']['recipe']}", "layers": rows}


def _short(number: float) -> float:
    return float(f"{number:.4g}")


def _real(_: Path, figures: Figures | None = None) -> Made:
    """Draw the figures, by default those that the picture carries."""
    from refimpl.tools.precision_report.layer_figures import SIZE, draw_layers
    from refimpl.training.pictures import new_figure, save

    figures = note_of(REAL)["figures"] if figures is None else figures
    figure = new_figure(*SIZE)
    draw_layers(figure, _layers(figures["layers"]), figures["title"])
    return Made(figures, words_of_plot(figure), lambda file: save(figure, file))


def _of_real(figures: Figures) -> list[str]:
    from refimpl.numerics.rounding_words import percent
    from refimpl.tools.precision_report.layers import NARROW

    layers = _layers(figures["layers"])
    name, one = max(((layer.name, one) for layer in layers for one in layer.inputs), key=lambda found: found[1].top)
    first = [one.top for layer in layers for one in layer.inputs if one.name == "self_attn.q_proj"]
    effects = {each: [layer.worst_effect("inputs", each) for layer in layers] for each in NARROW}
    snr = [f"{min(effect.snr for effect in found):.1f} dB" for found in effects.values()]
    zero = [percent(max(effect.flushed for effect in found)) for found in effects.values()]
    return [
        f"In {name}, 2 of the 1,536 channels of `{one.name}`'s input have {100 * one.top:.1f} % of its sum of squares",
        f"its largest value is {one.peak:.0f} times",
        f"with {percent(min(first))} to {percent(max(first))}",
        f"| inputs: SNR | {' | '.join(snr)} |",
        f"| inputs: become zero | {' | '.join(zero)} |",
    ]


PICTURES = {
    "run.png": Picture("README.md", _train, _begin, _of_run),
    "precision.png": Picture("docs/algorithm.md", _report, _report, _of_report),
    "audit.png": Picture("docs/audit.md", _audit, _audit, _of_audit),
    "real_models.png": Picture("docs/real_models.md", _real, _real, _of_real),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of README and docs/ anew.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as run.png; all by default")
    parser.add_argument("--layers", type=Path, metavar="FILE", help="new figures for real_models.png")
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.names if name not in PICTURES]:
        parser.error(f"{unknown[0]} is none of {', '.join(PICTURES)}")
    for name in chosen.names or PICTURES:
        with tempfile.TemporaryDirectory() as folder:
            if name == REAL.name and chosen.layers:
                made = _real(Path(folder), figures_of_layers(json.loads(chosen.layers.read_text())))
            else:
                made = PICTURES[name].make(Path(folder))
            made.draw(DOCS / name)
        stamp(DOCS / name, made.figures, made.words)
        print(f"made: docs/{name}; {PICTURES[name].page} must say of it:")
        print(*(f"    {sentence}" for sentence in PICTURES[name].sentences(made.figures)), sep="\n")


if __name__ == "__main__":
    main()
