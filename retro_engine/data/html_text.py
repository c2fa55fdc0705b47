"""The text of an HTML page: its title, and what a reader sees, a paragraph a line; scripts and styles are dropped.

The parser is the standard library's, which reads broken pages as well as it can.
"""

import codecs
import re
from html.parser import HTMLParser

DROPPED = ("script", "style")
_BLOCK_NAMES = (
    "address article aside blockquote body br caption dd details dialog div dl dt fieldset figcaption figure footer form "
    "h1 h2 h3 h4 h5 h6 header hr legend li main menu nav ol option p pre section summary table tbody tfoot thead title tr ul"
)
BLOCKS = frozenset(_BLOCK_NAMES.split())
CELLS = ("td", "th")
_CHARSET = re.compile(
    rb"""(?:<meta[^>]{0,200}charset|<\?xml[^>]{0,99}encoding)\s*=\s*["']?\s*([A-Za-z0-9_.:-]{1,40})""", re.IGNORECASE
)
_COMMENT = re.compile(r"<!--(?:.*?--\s*>|.*)", re.DOTALL)  # one that never ends hides the rest, as in browsers
_DECLARED_IN = 1024  # bytes, as browsers look


def declared_encoding(raw: bytes) -> str:
    """The encoding that a page names, as browsers read it; utf-8 where it names none that is known."""
    found = _CHARSET.search(raw[:_DECLARED_IN])
    try:
        name = codecs.lookup(found[1].decode()).name if found else "utf-8"
        "".encode(name)
    except LookupError:  # unknown, or no encoding of text
        return "utf-8"
    if name in ("iso8859-1", "ascii"):
        return "cp1252"
    return "utf-8" if name.startswith(("utf-16", "utf-32")) else name  # it could not be read so far if it were


def page_text(page: str) -> tuple[str, str]:
    """Title and text."""
    reader = _Page()
    reader.feed(_COMMENT.sub("", page))
    if not reader.rawdata.startswith(
        "<"
    ):  # else a tag without an end: dropped, as in browsers, where close() tries each <
        reader.close()
    return " ".join("".join(reader.title).split()), reader.text()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title: list[str] = []
        self._lines: list[str] = []
        self._line: list[str] = []
        self._open: list[str] = []  # of the tags that decide how text is read
        self._has_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if "title" in self._open:  # it was not closed: nothing stands inside a title
            self.handle_endtag("title")
        if tag in BLOCKS:
            self._end_line()
        elif tag in CELLS:
            self._line.append(" ")
        if tag in (*DROPPED, "title", "pre"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self._end_line()

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            del self._open[len(self._open) - 1 - self._open[::-1].index(tag) :]
            self._has_title |= tag == "title"
        if tag in BLOCKS:
            self._end_line(is_kept=tag == "pre")

    def handle_data(self, data: str) -> None:
        if any(tag in DROPPED for tag in self._open):
            return
        if "title" in self._open:
            if not self._has_title:
                self.title.append(data)
        else:
            self._line.append(data)

    def _end_line(self, is_kept: bool = False) -> None:
        line = "".join(self._line)
        self._line = []
        line = line.strip("\n") if is_kept or "pre" in self._open else " ".join(line.split())
        if line.strip():
            self._lines.append(line)

    def text(self) -> str:
        self._end_line()
        return "\n".join(self._lines)
