"""Text as it can be shown: nothing in it that a terminal would obey or a page would hide."""

from __future__ import annotations

import unicodedata

# Joiners carry no commands, and many scripts cannot be read without them.
_JOINERS = "\u200c\u200d"


def visible(text: str) -> str:
    """Replace what a terminal would obey, or a page would hide, by its sign or its number; newlines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _sign(c) for c in text)


def _sign(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) == "Zs":
        return character
    number = ord(character)
    if number < 0x20:
        return chr(0x2400 + number)
    return "\u2421" if number == 0x7F else f"<U+{number:04X}>"
