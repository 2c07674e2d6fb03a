"""The CaseOps transform `lossless_caps_caseops_v1`: text without capitals, and marks that restore them.

A model that sees "The", "the" and "THE" as three words learns each by itself. Here capitals A-Z become small
letters, and one of four private characters stands before them: TITLE for a word with a capital first letter,
ALLCAPS for one of two or more capitals, CAPNEXT for a capital anywhere else, ESC before any of the four that
the text itself holds. Nothing else is touched, so every text comes back: decode(encode(text)) == text.
Source: the tokenizer published with record 1855 of openai/parameter-golf.

    The NASA Launch of iPhone  ->  <TITLE>the <ALLCAPS>nasa <TITLE>launch of i<CAPNEXT>phone
"""

import re

import numpy as np

NAME = "lossless_caps_caseops_v1"
MARKS = TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001\ue002\ue003\ue004"
NAMES = dict(zip(MARKS, ("TITLE", "ALLCAPS", "CAPNEXT", "ESC"), strict=True))
LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
# A mark, or a whole word with a capital in it. Possessive, and begun at no other letter, or else a long run
# of small letters would take quadratic time.
CHANGED = re.compile(f"[{TITLE}-{ESC}]|(?<![A-Za-z])[a-z]*+[A-Z][A-Za-z]*+")
CAPITAL = re.compile(r"[A-Z]")
ESCAPED = re.compile(f"{ESC}(.)", re.DOTALL)


def encode(text: str) -> str:
    """`text` with its capitals A-Z as marks. A word is a longest run of A-Z and a-z."""
    return CHANGED.sub(spell, text)


def spell(match: re.Match[str]) -> str:
    """What stands in the encoded text for one mark or one word with a capital."""
    word = match[0]
    if word in NAMES:
        return ESC + word
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    lead, rest = (TITLE + word[0].lower(), word[1:]) if word[0].isupper() else ("", word)
    return lead + CAPITAL.sub(lambda letter: CAPNEXT + letter[0].lower(), rest)


def decode(text: str) -> str:
    """The text that `encode` was given. It reads more than `encode` writes: CAPNEXT may begin a word.

    Raises ValueError, in one line, where a mark other than ESC has no letter after it, where TITLE or ALLCAPS
    stands inside a word, and where a mark ends the text.
    """
    out: list[str] = []
    pending, inside, capitals = "", False, False  # a mark still to act; within a word; within one of ALLCAPS
    for at, char in enumerate(text):
        letter = char in LETTERS
        if pending and pending != ESC and not letter:
            raise ValueError(f"character {at}: {NAMES[pending]} wants a letter after it, found {char!a}")
        if pending == ESC or not (letter or char in NAMES):
            out.append(char)
            pending, inside, capitals = "", False, False
        elif letter:
            capitals = capitals or pending == ALLCAPS
            out.append(char.upper() if pending or capitals else char)
            pending, inside = "", True
        elif inside and char in {TITLE, ALLCAPS}:
            raise ValueError(f"character {at}: {NAMES[char]} inside a word; it stands before one")
        else:
            pending = char
    if pending:
        raise ValueError(f"character {len(text)}: the text ends after {NAMES[pending]}, which wants one more")
    return "".join(out)


def char_bytes(text: str) -> np.ndarray:
    """UTF-8 bytes of the source that each character of an encoded text stands for, int64 (len(text),).

    A mark stands for none, and an escaped one for its own three. What `decode` would write for a character is
    as long as the character, as the capitals are ASCII.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    sizes[(codes >= ord(TITLE)) & (codes <= ord(ESC))] = 0
    for match in ESCAPED.finditer(text):
        sizes[match.start(1)] = len(match[1].encode("utf-8"))
    return sizes
