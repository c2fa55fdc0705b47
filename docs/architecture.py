"""Draws the README's picture of the architecture: `python docs/architecture.py` writes docs/architecture.svg beside itself.

Sizes are of SVG's user units; colors are those of the served page. tests/test_docs.py holds the file to what this prints.
"""

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 960, 436
INK, LINE, PALE, GREEN, AMBER = "#1d2523", "#5d6b67", "#ffffff", "#e2efec", "#fdf0d9"


def text(x: int, y: int, words: str, size: int = 13, anchor: str = "middle", is_bold: bool = False) -> str:
    weight = ' font-weight="600"' if is_bold else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{INK}"{weight}>{escape(words)}</text>'
    )


def box(x: int, y: int, width: int, height: int, lines: list[str], fill: str = PALE) -> str:
    """A box with centered lines, the first of them bold."""
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}" stroke="{LINE}"/>'
    top = y + height // 2 - 9 * (len(lines) - 1) + 4
    words = [
        text(x + width // 2, top + 18 * number, line, 12 if number else 13, is_bold=not number)
        for number, line in enumerate(lines)
    ]
    return "\n".join([shape, *words])


def arrow(*points: tuple[int, int]) -> str:
    """A line through the points, with a head at its end."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#head)"/>'


def pipeline() -> list[str]:
    """From files to the neighbor table, left to right."""
    return [
        text(16, 28, "1  text to neighbors, once", anchor="start", is_bold=True),
        box(16, 44, 120, 64, ["files", "text, PDF, JSON ..."]),
        arrow((136, 76), (194, 76)),
        text(165, 68, "prepare", 12),
        box(196, 44, 160, 64, ["store", "chunks of m tokens"], AMBER),
        arrow((356, 76), (424, 76)),
        text(389, 68, "build", 12),
        box(426, 44, 180, 64, ["index", "BM25, vectors or both"]),
        arrow((606, 76), (664, 76)),
        box(
            666, 44, 278, 64, ["neighbor table", "the best chunks for every chunk,", "never of its own document"], AMBER
        ),
    ]


def model() -> list[str]:
    """Neighbors of chunk u are read while chunk u + 1 is written."""
    chunks = [box(16 + 116 * u, 364, 108, 34, [f"chunk {u + 1}"], AMBER) for u in range(3)]
    return [
        text(16, 152, "2  the model, trained and decoding alike", anchor="start", is_bold=True),
        *chunks,
        text(186, 418, "tokens", 12),
        arrow((186, 364), (186, 334)),
        box(16, 288, 340, 44, ["causal self-attention"], GREEN),
        arrow((186, 288), (186, 260)),
        box(
            16, 206, 340, 52, ["chunked cross-attention, then FFN", "chunk u + 1 reads the neighbors of chunk u"], GREEN
        ),
        arrow((186, 206), (186, 184)),
        text(186, 178, "next token", 12),
        text(364, 270, "x layers", 12, anchor="start"),
        box(666, 206, 278, 52, ["neighbors of chunk u", "each with the text that follows it"], AMBER),
        arrow((805, 108), (805, 204)),
        text(815, 160, "k of them", 12, anchor="start"),
        arrow((666, 232), (608, 232)),
        box(436, 206, 170, 52, ["neighbor encoder", "its output can be kept"], GREEN),
        arrow((436, 232), (358, 232)),
    ]


def uses() -> list[str]:
    """What is done with a run."""
    names = [
        ("eval", "on, off, random"),
        ("generate", "searches while it writes"),
        ("serve", "API, page, live library"),
    ]
    top = [text(436, 318, "3  measured and used", anchor="start", is_bold=True)]
    return top + [box(436 + 172 * i, 334, 164, 64, [f"retro {name}", about]) for i, (name, about) in enumerate(names)]


def draw() -> str:
    title = (
        "Files become a store of chunks, an index and a neighbor table; a decoder reads the neighbors of each chunk."
    )
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker>'
    )
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="sans-serif">',
        f"<title>{title}</title>",
        f"<defs>{head}</defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#f5f5f3"/>',
        *pipeline(),
        *model(),
        *uses(),
        "</svg>",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
