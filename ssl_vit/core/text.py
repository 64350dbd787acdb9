"""Text from outside as text: names of files, classes and columns, and what files say, on a terminal and in Markdown."""

import html
import re

MOST = 2000
"""Characters that are shown of one text."""
# Control characters, what reorders a line or cannot be seen in it, ends of lines, and halves of characters.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
# What a terminal takes for an order, but for colours, and but for ends of lines and the moves of a progress bar.
_ORDERS = re.compile("(?!\x1b\\[[0-9;]*m)[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|(?<!^)\r(?!\n|$)")
_BAR_MOVES = re.compile("\n*(?:\x1b\\[A)+")
_SIGNS = re.compile(r"[\\`*|~$]|\](?=\()|(?<![^\W_])_|_(?![^\W_])")


def plain(text: object, most: int = MOST) -> str:
    """A text from outside as one line for a terminal. Characters that cannot be seen are shown as escapes.

    Of more than `most` characters, those in the middle are left out.
    """
    shown = str(text)
    if len(shown) > most:
        shown = f"{shown[: most * 2 // 3]}…{shown[-(most // 3) :]}"
    return _UNSEEN.sub(_escape, shown)


def cell(text: object) -> str:
    """A text from outside within Markdown, also in a table's cell: nothing in it is markup, HTML or a link."""
    return _SIGNS.sub(r"\\\g<0>", html.escape(plain(text), quote=False))


def code(text: object) -> str:
    """As `cell`, set as code where that needs no escapes."""
    shown = plain(text)
    return f"`{shown}`" if shown.strip() == shown != "" and not re.search(r"[`|\\<>&]", shown) else cell(text)


def visible(text: str) -> str:
    """As `plain`, but with its line ends and at full length, for a page of HTML, without lone surrogates."""
    return "\n".join(_UNSEEN.sub(_escape, line) for line in text.split("\n"))


def without_orders(text: str) -> str:
    """Printed text, of one line or several. Commands to the terminal, such as a move of its cursor, become escapes."""
    return text if _BAR_MOVES.fullmatch(text) else _ORDERS.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
