"""Text from outside stays text: on the terminal, in cards, in the report."""

import inspect
import io
import json
import logging
import re
import sys
import time
import unicodedata
import warnings
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import pytest
import yaml

from ssl_vit.core.front import stoppable, warning_once
from ssl_vit.core.text import MOST, cell, code, plain, without_orders
from ssl_vit.core.writing import report_error
from ssl_vit.data.sources.source import Source
from ssl_vit.doctor.facts import (
    Class,
    Duplicates,
    Facts,
    Labels,
    Pixels,
    Place,
    Repeat,
    Unreadable,
    UnreadableImage,
)
from ssl_vit.evaluation.command import tell_notes
from ssl_vit.evaluation.scores import ClassScore, format_classes, lay_out
from ssl_vit.export.card import write_card
from ssl_vit.models.vit import ViT
from ssl_vit.runs.record import read_run
from ssl_vit.runs.trained import Trained
from ssl_vit.training.setup import describe
from ssl_vit.visualize.report import render
from tests.specs import grey

HOSTILE = {
    "clears the screen": "cat\x1b[2J\x1b[H",
    "sets the title": "cat\x1b]0;owned\x07",
    "eight-bit escape": "cat\x9b2J",
    "forges a line by CR": "cat\rerror: the disk is full",
    "forges a line by LF": "cat\nerror: the disk is full",
    "forges a line by others": "cat\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029error: all is lost",
    "cells": "| a | b |\n|---|---|",
    "script": "<script>alert(1)</script>",
    "end of script": "</script><img src=x onerror=alert(1)>",
    "comment": "<!-- ]]> -->",
    "link": "[x](javascript:alert(1))",
    "image": "![x](http://evil.example/beacon.png)",
    "emphasis and code": "**a** `b` _c_ ~~d~~ $e$ \\",
    "reordered": "gpj.\u202exe\u2066.exe",
    "unseen": "c\u200ba\u2060t\ufeff",
    "tags": "cat\U000e0041\U000e007f",
    "half a character": "cat\udce9\ud83d",
    "NUL and DEL": "c\x00at\x7f",
    "front matter": "---\nlicense: mit\n---",
    "tag of YAML": "!!python/object/apply:os.system ['touch was_run']",
    "long": "x" * 10_000,
    "long and hostile": "\x1b[2J" * 5_000,
}
every = pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))


def is_plain(text: str) -> bool:
    return not any(unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp") for sign in text)


@every
def test_shown_as_one_line_of_visible_characters(text: str) -> None:
    shown = plain(text)
    assert is_plain(shown)
    assert len(shown.splitlines()) == 1
    assert len(shown) <= 10 * MOST
    shown.encode()


@pytest.mark.parametrize(
    "text",
    ["", "cat", "chat noir, n\u00b0 3", "\u7686\u3000\u3055\u3093", "\U0001f431", "a\\x1b", "caf\u00e9", "ﻡﺮﺤﺑﺍ"],
)
def test_what_is_text_stays_as_it_is(text: str) -> None:
    assert plain(text) == text


def test_of_a_long_text_both_ends_stay() -> None:
    shown = plain("data.source=" + "x" * 10_000 + ": no such folder", 90)
    assert shown.startswith("data.source=xxx")
    assert shown.endswith("xxx: no such folder")
    assert len(shown) <= 91


@every
def test_a_cell_of_markdown(text: str) -> None:
    """Rendered as CommonMark does: no pipe, tag, link or emphasis is left, and the characters are those of `plain`."""
    shown = cell(text)
    unescaped = re.sub(r"\\([!-/:-@\[-`{-~])", "\x00", shown)
    assert not re.search(r"[|<>`*~\\$]", unescaped)
    assert "](" not in unescaped
    assert is_plain(shown)
    rendered = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", shown)
    assert rendered.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") == plain(text)
    assert code(text) in (f"`{plain(text)}`", shown)


def test_code_is_code_where_it_can_be() -> None:
    assert code("vit_small_patch16_224.dino") == "`vit_small_patch16_224.dino`"
    assert code("a|b") == r"a\|b"
    assert code("a`b") == r"a\`b"
    assert cell("norm_pix_loss train[:20%]") == "norm_pix_loss train[:20%]"


@every
def test_an_error_is_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_error(ValueError(f"data.label_column={text}: no such column")) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: data.label_column=")
    assert shown.count("\n") == 1
    assert is_plain(shown[:-1])


@every
def test_tables_and_notes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    tables = format_classes([ClassScore(text, 3, 0.5, None, text)]), lay_out([["%", text], [text, "1"]])
    for table in tables:
        lines = table.splitlines()
        assert len(lines) == 3
        assert all(map(is_plain, lines))
        assert max(map(len, lines)) < 2000

    tell_notes(mock.Mock(spec=Source, notes=(f"classes are the folders {text}",)), None)
    shown = capsys.readouterr().out
    assert shown.startswith("note       classes")
    assert is_plain(shown[:-1])


@every
def test_what_libraries_say(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    record = logging.LogRecord("PIL", logging.WARNING, "Image.py", len(text), "%s is odd", (text,), None)
    assert logging.lastResort is not None
    with warning_once(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(f"{text}: corrupt EXIF data", stacklevel=1)
        assert logging.lastResort.filter(record)
    assert [is_plain(line) for line in (*shown, record.getMessage())] == [True, True]


@every
def test_whatever_else_is_printed_gives_the_terminal_no_orders(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a traceback, for instance. Lines and the colours of libraries stay."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="utf-8", write_through=True)
    monkeypatch.setattr(sys, "stderr", stream)
    stoppable()(lambda: print(f"RuntimeError: \x1b[31m{text}", file=sys.stderr) or 0)()
    shown = raw.getvalue().decode()
    assert shown.startswith("RuntimeError: \x1b[31m")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown.replace("\x1b[31m", ""))
    assert "write" not in vars(stream)


@pytest.mark.parametrize(
    "move", ["\r 45%|####  | 3/7\x1b[0m", "\r          \r", "\n\n\x1b[A\x1b[A", "done\r\n", "\x1b[A"]
)
def test_progress_bars_may_move(move: str) -> None:
    assert without_orders(move) == move


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_the_doctors_page(text: str) -> None:
    image = UnreadableImage(3, text, text)
    duplicates = Duplicates(1, 1, [Repeat(3, text, Place(3, text))])
    facts = Facts(
        source=text,
        notes=[text],
        num_images=9,
        num_read=9,
        sizes=None,
        files={text: 9},
        formats={text: 9},
        channels={text: 9},
        num_16_bit=0,
        dropped={text: 1},
        unreadable=Unreadable(1, 0.1, None, [image]),
        duplicates=duplicates,
        near_duplicates=duplicates,
        pixels=Pixels(1),
        decode_rate=None,
        labels=Labels(2, Class(text, 1), Class(text, 8), 0),
        pretrained=text,
        settings={"data": {"mean": [0.5]}},
        run=None,
        load_per_core=0.0,
        problems=[text],
        warnings=[text],
    )
    page = str(facts)
    assert all(map(is_plain, page.split("\n")))
    assert not any(line.startswith(("error:", "|", "license")) for line in page.split("\n"))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.scripts, self.found = [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts.append(data)


def hostile_run(folder: Path, text: str) -> Path:
    """A run whose files say `text` wherever they say a text, as the name of a key too."""
    key = text[:300]
    (folder / "checkpoints").mkdir(parents=True)
    settings = {
        "objective": {"mask_ratio": 0.75, "decoder": text},
        "encoder": {"arch": "vit_tiny_patch16_224", "pretrained": text},
        "data": {"source": text, "label_column": text},
        "batch": {"size": 8},
        "optim": {"warmup": 0.1, "name": text},
        "evaluation": {"feature": text},
        "seed": 0,
        "steps": text,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    score = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 40}
    scores = {"scores": {key: {key: score}}, "source": text, "split": text, "test": text, "step": 3}
    for name in ("results.json", "knn.json"):
        (folder / name).write_text(json.dumps(scores))
    lines = [{"step": step, "loss": 1.0 / step, key: step, "progress": step / 9} for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = dict.fromkeys(("objective", "version", "torch", "timm", "hardware", "source", "attribution"), text)
    (folder / "config.json").write_text(json.dumps({"ssl_vit": known}))
    return folder


@every
def test_the_report(text: str, tmp_path: Path) -> None:
    runs = [read_run(hostile_run(tmp_path / name, text)) for name in ("a", "b")]
    usual = [read_run(hostile_run(tmp_path / name, "usual")) for name in ("c", "d")]
    pages = [render(both, [f"no panel: {text}", f"no panel: {text}"]) for both in (runs, usual)]
    seen = []
    for page in pages:
        seen.append(Tags())
        assert all(map(is_plain, page.encode().decode().split("\n")))
        seen[-1].feed(page)
        seen[-1].close()
    assert seen[0].found == seen[1].found  # not one tag more or less
    data = json.loads(seen[0].scripts[0])
    assert data["curves"][-1]["name"] == text[:300]


@every
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_the_card(text: str, scored: bool, tmp_path: Path, tiny_encoder: ViT) -> None:
    folder = hostile_run(tmp_path / "run", text)
    names = ("objective", "source", "attribution", "pretrained", "feature", "hardware", "collapse", "weights", "steps")
    known = {
        **dict.fromkeys(names, text),
        **({"steps": 3, "weights": None} if scored else {}),  # those of results.json
        "num_images": text,
        "batch_size": 8,
        "objective_config": {text: text},
        "optim": {"base_lr": text},
    }
    trained = Trained(tiny_encoder, grey(std=0.2), 0.875, known, folder)
    card = write_card(
        trained,
        library="timm",
        loading_code="import timm",
        difference=1e-6,
        proved_on=f"3 images of {code(text)}",
        license=text,
    )
    _, header, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    described = yaml.safe_load(header)
    assert described["license"] == text
    assert described["library_name"] == "timm"
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line.replace(r"\\", ""))) for line in tables} == ({3, 7} if scored else {3})
    begin = ("|", "#", "```", "Loaded", "A Vision", "import", "Left out")
    assert all(line.startswith(begin) for line in body.splitlines() if line)
    outside = re.sub(r"```.*?```|`[^`\n]*`|\\.", "", body, flags=re.DOTALL)
    assert not re.search(r"<\w|</|<!|\]\((?!https://pypi)", outside)
    assert all(map(is_plain, body.splitlines()))


def test_what_a_run_is_about_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace as Any

    text = "a\rerror: x\x1b[2J\nnote"
    source = Any(name=text, attribution=text, num_samples=3, num_classes=0, notes=(text,))
    optim = Any(lr_scaling="linear", base_lr=1.0, peak_lr=lambda size: 1.0)
    config = Any(
        batch=Any(size=8), optim=optim, encoder=Any(arch="vit"), extended=(), notes=lambda _: (), num_steps=lambda _: 3
    )
    accelerator = Any(num_processes=1, device=Any(type="cpu"), is_main_process=True, print=print)
    objective = Any(parameters=lambda: [], encoder=Any(embed_dim=8, in_chans=3), name="MAE")
    run = Any(
        config=config, accelerator=accelerator, source=source, objective=objective, num_steps=3, step=0, per_device=8,
        train_step=Any(num_micro=1, graphs=Any(enabled=False), compiled=False), stream_loader=None, compiled=False,
        folder=Path(text),
    )  # fmt: skip
    inspect.unwrap(describe)(run, "no", Path(text))  # whose types a stand-in for a run does not have
    lines = capsys.readouterr().out.splitlines()
    assert all(map(is_plain, lines))
    assert len(lines) == 10
    assert sum(r"a\rerror: x\x1b[2J\nnote" in line for line in lines) == 5


def test_long_texts_take_no_time() -> None:
    text = "\x1b[" * 200_000 + "\r" * 200_000 + "\n" * 200_000
    start = time.process_time()
    for show in (plain, cell, code, without_orders):
        show(text)
    assert time.process_time() - start < 10
