"""The texts of docs/results.md as JSON lines: python benchmarks/texts.py docstrings PACKAGE | wikitext FILE > OUT.jsonl

docstrings: one document a module of an installed package (or of a folder), read with `ast`, nothing is imported.
wikitext: one document an article of a WikiText file, whose level-1 headings are ` = Title = `.
"""

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from retro_engine.data.builtin import MIN_DOC_CHARACTERS, module_docstrings


def docstrings(package: str) -> Iterator[dict[str, str]]:
    folder = Path(package)
    if not folder.is_dir():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            sys.exit(
                f"error: {package} is not installed, and no folder\n  its docstrings are read\n  pip install {package}"
            )
        folder = Path(spec.origin).parent
    for path in sorted(folder.rglob("*.py")):
        text = module_docstrings(path)
        if len(text) >= MIN_DOC_CHARACTERS:
            yield {"id": str(path.relative_to(folder)), "title": path.stem, "text": text}


def wikitext(path: str) -> Iterator[dict[str, str]]:
    parts = re.split(
        r"(?:^|\n) *\n = ([^=\n]+) = *\n *\n", Path(path).read_text(encoding="utf-8")
    )  # with empty lines around
    for title, text in zip(parts[1::2], parts[2::2]):
        yield {"id": title.strip(), "title": title.strip(), "text": text.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["docstrings", "wikitext"])
    parser.add_argument("source", help="a package, a folder, or a WikiText file")
    args = parser.parse_args()
    for row in docstrings(args.source) if args.kind == "docstrings" else wikitext(args.source):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
