"""The facts of `diagnose` as a page of text."""

import textwrap
from typing import Any

import yaml

from ssl_vit.core.text import plain
from ssl_vit.data.copies import INSTALL

_LABEL = 14  # width of the left column
_WIDTH = 110


def as_text(facts: dict[str, Any], step_is_off: bool = False) -> str:
    """One page for the terminal.

    Args:
        facts: what `diagnose` returns.
        step_is_off: whether it was asked to measure no step.
    """
    lines = [*_pictures(facts), "", *_settings(facts), *_run(facts, step_is_off)]
    for title in ("problems", "warnings"):
        if facts[title]:
            lines += ["", title, *(_item(text) for text in facts[title])]
    if not facts["problems"]:
        lines += ["", "No problem found." if facts["warnings"] else "No problem found, and nothing to warn of."]
    return "\n".join(lines)


def _pictures(facts: dict[str, Any]) -> list[str]:
    read, sizes, unreadable = facts["num_read"], facts["sizes"], facts["unreadable"]
    all_read = read == facts["num_images"]
    lines = [
        _line("source", facts["source"]),
        *(_line("note", note) for note in facts["notes"]),
        _line("images", f"{facts['num_images']:,}" + (", all looked at" if all_read else f"; looked at {read:,}")),
        _line("files", _counts(facts["files"])),
    ]
    if sizes is not None:
        shape = ", ".join(f"{name} {_size(sizes[name])}" for name in ("smallest", "median", "largest"))
        lines += [
            _line("sizes", f"{shape} (width x height, by area)"),
            _line("", f"{sizes['num_distinct']:,} different; {sizes['share_not_square']:.0%} are not square"),
            *([_line("not used", _counts(facts["dropped"], "hold "))] if facts["dropped"] else []),
        ]
    lines += _unreadable(unreadable, read)
    lines += _repeats("duplicates", "is the same as", facts["duplicates"], all_read)
    if facts["near_duplicates"] is None:
        lines.append(_line("nearly so", f"not looked for: {INSTALL}"))
    else:
        lines += _repeats("nearly so", "looks the same as", facts["near_duplicates"], all_read)
    lines.append(_line("labels", _labels(facts["labels"], facts["num_images"])))
    return lines


def _repeats(label: str, verb: str, found: dict[str, Any], all_read: bool) -> list[str]:
    among = "" if all_read else " among those"
    copies, images = ("copy" if found["count"] == 1 else "copies"), ("image" if found["groups"] == 1 else "images")
    text = f"{found['count']:,} {copies} of {found['groups']:,} {images}" if found["count"] else "none"
    lines = [f"{_place(item)} {verb} {_place(item['same_as'])}" for item in found["examples"]]
    return [_line(label, text + among), *(_line("", line) for line in lines)]


def _unreadable(unreadable: dict[str, Any], read: int) -> list[str]:
    count, interval = unreadable["count"], unreadable["interval"]
    text = f"{count:,} of {read:,}" if count else "none"
    if count:
        text += f", {unreadable['share']:.2%}"
    if interval is not None:
        text += f"; of all pictures {interval[0]:.2%} to {interval[1]:.2%} (95 % interval)"
    more = count - len(unreadable["examples"])
    return [
        _line("unreadable", text),
        *(_line("", f"{_place(item)}: {item['reason']}") for item in unreadable["examples"]),
        *([_line("", f"and {more:,} more")] if more else []),
    ]


def _settings(facts: dict[str, Any]) -> list[str]:
    if facts["settings"] is None:
        return []
    text = yaml.safe_dump(facts["settings"], sort_keys=False, default_flow_style=None)
    what = f"mean and deviation of {facts['pixels']['count']:,} pixels"
    if facts["pretrained"] is not None:
        what = f"normalisation of {facts['pretrained']}"
    lines = [f"{plain(what)}, to be pasted into a config:"]
    return [*lines, *(f"  {line}" for line in text.splitlines()), ""]


def _run(facts: dict[str, Any], step_is_off: bool) -> list[str]:
    run = facts["run"]
    if run is None:
        return [_line("run", "cannot be built")]
    steps = f"{run['num_steps']:,} step{'s' if run['num_steps'] > 1 else ''}"
    busy = "; busy with other work, so that rates are lower than they would be" if facts["load_per_core"] > 0.5 else ""
    lines = [
        _line(
            "run",
            f"{run['objective']}, {run['arch']}, input {_size(run['image_size'])}, "
            f"{run['num_parameters'] / 1e6:.1f} M trainable parameters",
        ),
        _line(
            "",
            f"{steps} of {run['batch_size']:,} images = {run['epochs']:,.4g} epochs",
        ),
        _line("machine", f"{run['device']}, {run['cores']} cores{busy}"),
    ]
    if run["input_rate"] is not None:
        decode = f"{facts['decode_rate']:,.0f} images/s on one core"
        lines.append(_line("input", f"{decode}, with the objective's crops {run['input_rate']:,.0f}"))
    step, on_cpu = run["step"], run["device"].startswith("CPU")
    if step is None:
        # A step that was tried and failed stands among the problems.
        lines.append(_line("step", "not measured" if step_is_off else "not measured; --step true does it"))
    else:
        lines += [
            _line(
                "step",
                f"{step['rate']:,.1f} images/s without input, precision {step['precision']}, measured with "
                f"{step['num_images']} images at once",
            ),
            _line(
                "workers",
                "data.num_workers 0: on a CPU the step has all cores, and input is read between the steps"
                if on_cpu
                else f"data.num_workers {step['num_workers']} for each training process",
            ),
            _line("length", f"{_duration(step['hours'])} on one such device, at {step['run_rate']:,.1f} images/s"),
        ]
    return lines + _memory(run)


def _memory(run: dict[str, Any]) -> list[str]:
    memory, step = run["memory_mib"], run["step"]
    teacher = f" (the teacher's {memory['teacher']:,.0f} of them)" if memory["teacher"] else ""
    lines = [
        _line(
            "memory",
            f"{memory['total']:,.0f} MiB = parameters {memory['parameters']:,.0f}{teacher} + gradients "
            f"{memory['gradients']:,.0f} + AdamW {memory['optimizer']:,.0f}",
        )
    ]
    if step is None:
        return [*lines, _line("", "and activations, which are measured with a step")]
    return [
        *lines,
        _line("", f"and activations, {step['activations']:,.0f} MiB for {step['num_images']} images at once"),
    ]


def _line(label: str, text: str) -> str:
    return textwrap.fill(
        plain(text),
        _WIDTH,
        initial_indent=f"{label:{_LABEL}}",
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _item(text: str) -> str:
    return textwrap.fill(plain(text), _WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)


def _counts(counts: dict[str, int], verb: str = "") -> str:
    return "; ".join(f"{count:,} {verb}{name}" for name, count in counts.items())


def _size(size: list[int]) -> str:
    """[height, width] as people say a size."""
    return f"{size[1]} x {size[0]}"


def _place(item: dict[str, Any]) -> str:
    return f"row {item['row']}" + (f" ({item['path']})" if item["path"] else "")


def _labels(labels: dict[str, Any] | None, num_images: int) -> str:
    if labels is None:
        return "none"
    smallest, largest = labels["smallest"], labels["largest"]
    if labels["num_classes"] == 1:
        text = f"1 class, {largest['name']!r} with {largest['size']:,}"
    elif smallest["size"] == largest["size"]:
        text = f"{labels['num_classes']:,} classes of {smallest['size']:,} images each"
    else:
        text = (
            f"{labels['num_classes']:,} classes, the smallest {smallest['name']!r} with {smallest['size']:,} images, "
            f"the largest {largest['name']!r} with {largest['size']:,}"
        )
    without = labels["num_unlabelled"]
    return text + (f"; {without / num_images:.1%} of the images have no label" if without else "")


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes"
