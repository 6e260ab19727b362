"""Cards packed by the dozen into the page, so that a browser unpacks only what is seen; and out of it again.

Owns that form and the page's size; knows nothing of what is on a card.
"""

import base64
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

PACK: Final = 64
"""Cards unpacked together."""
CARDS_BYTES: Final = 12_000_000
"""Of all packed cards at most, in the page."""
ELEMENT: Final = re.compile(r'<script type="text/plain" id="pack-\d+">([A-Za-z0-9+/=]*)</script>')

Card = dict[str, Any]


def packed(cards: Iterable[Card], most: int = CARDS_BYTES) -> Iterator[tuple[int, str]]:
    """So many of them as fit, some at a time: how many they are, and gzip in base64 of the JSON list."""
    used, left = 0, iter(cards)
    while some := list(islice(left, PACK)):
        plain = json.dumps(some, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        text = base64.b64encode(gzip.compress(plain, 6, mtime=0)).decode()
        used += len(text)
        if used > most:
            return
        yield len(some), text


def cards_of(page: Path) -> Iterator[Card]:
    """All cards of a page, in their order; one pack is held at a time."""
    for found in ELEMENT.finditer(page.read_text(encoding="utf-8")):
        yield from json.loads(gzip.decompress(base64.b64decode(found[1])))
