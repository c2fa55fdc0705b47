"""The texts of docs/results.md as JSON lines: python benchmarks/texts.py docstrings PACKAGE | wikitext FILE | wheels FILE... > OUT.jsonl

docstrings: one document a module of an installed package (or of a folder), read with `ast`, nothing is imported.
wikitext: one document an article of a WikiText file, whose level-1 headings are ` = Title = `.
wheels: one document a file of source or documentation of wheels (pip download --no-deps), nothing is installed.
"""

import argparse
import hashlib
import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from retro_engine.data.builtin import MIN_DOC_CHARACTERS, module_docstrings

SOURCES = (".py", ".pyi", ".md", ".rst", ".txt")  # of a wheel


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


def wheels(paths: list[str]) -> Iterator[dict[str, str]]:
    """The files of all wheels in one order that mixes them, the same for the same files: every n-th is a fair part."""
    found = []
    for path in paths:
        with zipfile.ZipFile(path) as wheel:
            name = "-".join(Path(path).name.split("-")[:2])
            for file in wheel.namelist():
                if file.endswith(SOURCES) and ".dist-info/" not in file:
                    found.append(
                        {"id": f"{name}/{file}", "title": file, "text": wheel.read(file).decode(errors="replace")}
                    )
    found.sort(key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    yield from (row for row in found if len(row["text"]) >= MIN_DOC_CHARACTERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["docstrings", "wikitext", "wheels"])
    parser.add_argument("source", nargs="+", help="a package, a folder, a WikiText file, or wheels")
    args = parser.parse_args()
    if args.kind == "wheels":
        rows = wheels(args.source)
    elif len(args.source) > 1:
        parser.error(f"{args.kind} takes one source")
    else:
        rows = (docstrings if args.kind == "docstrings" else wikitext)(args.source[0])
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
