"""Shows untrusted text (names of files, classes and columns, contents) safely in a terminal, Markdown and HTML."""

import html
import re

MOST = 2000
"""Most characters shown of one text."""
# Control characters, characters that are invisible or reorder a line, line ends and lone surrogates.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
# Characters that a terminal executes, except colours, line ends and the moves of a progress bar.
_ORDERS = re.compile("(?!\x1b\\[[0-9;]*m)[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|(?<!^)\r(?!\n|$)")
_BAR_MOVES = re.compile("\n*(?:\x1b\\[A)+")
_SIGNS = re.compile(r"[\\`*|~$]|\](?=\()|(?<![^\W_])_|_(?![^\W_])")


def plain(text: object, most: int = MOST) -> str:
    """Untrusted text as one line for a terminal. Invisible characters become escapes.

    If it has more than `most` characters, the middle is left out.
    """
    shown = str(text)
    if len(shown) > most:
        shown = f"{shown[: most * 2 // 3]}…{shown[-(most // 3) :]}"
    return _UNSEEN.sub(_escape, shown)


def cell(text: object) -> str:
    """Untrusted text for Markdown, also in a table's cell: no markup, HTML or link remains in it."""
    return _SIGNS.sub(r"\\\g<0>", html.escape(plain(text), quote=False))


def code(text: object) -> str:
    """`cell`, but set as code if that needs no escapes."""
    shown = plain(text)
    return f"`{shown}`" if shown.strip() == shown != "" and not re.search(r"[`|\\<>&]", shown) else cell(text)


def visible(text: str) -> str:
    """`plain` with line ends and at full length, for an HTML page, which holds no lone surrogates."""
    return "\n".join(_UNSEEN.sub(_escape, line) for line in text.split("\n"))


def without_orders(text: str) -> str:
    """Printed text in which terminal commands, such as a move of the cursor, become escapes."""
    return text if _BAR_MOVES.fullmatch(text) else _ORDERS.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
