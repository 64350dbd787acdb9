"""What mkdocs writes beside the pages: README as the home page, root files, all settings, and the list of configs."""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import docstring_parser
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
OPTIONAL = ("results.md", "tiles.md")
MARKED = re.compile(r"<!-- settings: .*?<!-- /settings -->", flags=re.DOTALL)
CONFIGS_HEAD = """\
# Configs

Files of settings that come with the package: `--config NAME`, or `ssl-vit configs NAME` to read one. The header of
each says hardware, time and what to expect.

| name | what | front |
|---|---|---|
"""
SHARED = ("encoder", "data", "batch", "optim", "checkpoint", "evaluation")
"""Sections that all trainings have, in the order of the page."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out pages of `nav` that are not written yet."""
    config.nav = [_existing(entry, Path(config.docs_dir)) for entry in config.nav or []]
    return config


def _existing(entry: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """An entry of `nav` without optional pages that are not there."""
    ((title, value),) = entry.items()
    if isinstance(value, str):
        return entry
    kept = [item for item in value if (page := next(iter(item.values()))) not in OPTIONAL or (folder / page).exists()]
    return {title: kept}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from files outside of docs/."""
    for page, source in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "configs.md", content=list_configs()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill the page of settings, and let links to the repository's root reach the pages made from it."""
    if page.file.src_uri == "settings.md":
        found = MARKED.split(markdown)
        assert len(found) == 2, "docs/settings.md: the marked part is missing"
        markdown = found[0] + describe_settings() + found[1]
    if page.file.src_uri in ROOT_PAGES:
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    depth = "../" * page.file.src_uri.count("/")
    for target, source in ROOT_PAGES.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(source)}(#[^)]*)?\)", rf"]({depth}{target}\1)", markdown)
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Keep flags in one piece: a browser breaks lines after their hyphens."""
    return re.sub(r"<code>(--[\w.-]+)</code>", r'<code class="name">\1</code>', html)


def list_configs() -> str:
    """A table of the files in configs/, each with the first sentences of its header and the command that runs it."""
    lines = CONFIGS_HEAD.splitlines()
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        header = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
        what = " ".join(header[: header.index("")] if "" in header else header[:1])
        front = next((found[1] for line in header if (found := re.search(r"scripts/(\w+)\.py", line))), "")
        lines.append(f"| `{path.stem}`{{.name}} | {_cell(what)} | `{front}` |")
    return "\n".join(lines) + "\n"


def describe_settings() -> str:
    """Tables of all settings, from the dataclasses: those of trainings, of each objective, and of the evaluations."""
    from ssl_vit.core.shipped import folder, load_front
    from ssl_vit.evaluation import extract, probes, segmentation
    from ssl_vit.evaluation.linear_probe import LinearProbeConfig

    fronts = {path.stem: load_front(path.stem) for path in sorted(folder("scripts").glob("*.py"))}
    runs = {name: front.DEFAULTS for name, front in fronts.items() if hasattr(front, "DEFAULTS")}
    run = next(iter(runs.values()))
    parts = [
        "## Of every training",
        "",
        "`pretrain`, `distill`, `finetune` and `probe attentive` have these.",
        "",
    ]
    whole = [field.name for field in dataclasses.fields(run) if field.name not in (*SHARED, "objective")]
    parts += _table("", runs, whole)
    for section in SHARED:
        names = [field.name for field in dataclasses.fields(getattr(run, section))]
        values = {name: getattr(defaults, section) for name, defaults in runs.items()}
        parts += [
            "",
            f"### {section}",
            "",
            _summary(type(getattr(run, section))),
            "",
            *_table(f"{section}.", values, names),
        ]
    parts += ["", "## Of each objective", ""]
    for name, defaults in runs.items():
        names = [field.name for field in dataclasses.fields(defaults.objective)]
        heading = name.removeprefix("pretrain_").replace("_", " ")
        summary = _summary(type(defaults.objective))
        parts += [f"### {heading}", "", summary, "", *_table("objective.", {name: defaults.objective}, names), ""]
    parts += [
        "## Of evaluation and extraction",
        "",
        "They have no sections, but for the heads of the linear probe.",
        "",
    ]
    others = {
        "probe knn": ("", probes.KNNConfig()),
        "probe linear": ("", probes.LinearConfig()),
        "probe linear: heads": ("probe.", LinearProbeConfig()),
        "retrieve": ("", probes.RetrievalConfig()),
        "segment": ("", segmentation.SegmentationConfig()),
        "extract": ("", extract.ExtractConfig(output="NAME.parquet")),
    }
    for heading, (prefix, settings) in others.items():
        names = [field.name for field in dataclasses.fields(settings)]
        parts += [f"### {heading}", "", _summary(type(settings)), "", *_table(prefix, {heading: settings}, names), ""]
    return "\n".join(parts)


def _table(prefix: str, values: Mapping[str, Any], names: list[str]) -> Iterator[str]:
    """Rows of settings: name, default (of each front, where they differ), text."""
    yield "| setting | default | what |"
    yield "|---|---|---|"
    texts = _texts(type(next(iter(values.values()))))
    for name in names:
        defaults: dict[str, list[str]] = {}
        for front, config in values.items():
            defaults.setdefault(_value(getattr(config, name)), []).append(front.removeprefix("pretrain_"))
        usual = max(defaults, key=lambda value: len(defaults[value]))
        shown = [f"`{usual}`"] + [f"{', '.join(of)}: `{value}`" for value, of in defaults.items() if value != usual]
        yield f"| `{prefix}{name}`{{.name}} | {_cell('; '.join(shown))} | {_cell(texts[name])} |"


def _texts(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, with those that it inherits."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            parsed = docstring_parser.parse_from_object(base)
            found |= {item.arg_name: item.description or "" for item in parsed.params if item.description}
    fields = [field.name for field in dataclasses.fields(kind)]
    return {name: found.get(name, "The objective's settings, below.") for name in fields}


def _summary(kind: type) -> str:
    """The docstring of a dataclass as a paragraph, without arguments."""
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def _value(value: Any) -> str:
    """A default as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def _cell(text: str) -> str:
    """Text as a cell of a table holds it."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
