"""Corpora every machine has: `facts`, generated notes about invented people, and the installed Python's documentation.

Each entity has ten attributes with random values. Its document states six of them; two notes in another store
state the same six, three each, in other words and another order. Whoever predicts a value it has never seen must
read it in the notes. The generator is a pure function of its seed.
"""

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from retro_engine.data.corpus import Document

_ONSETS = [
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "z",
    "br",
    "ch",
    "dr",
    "fl",
    "gr",
    "kl",
    "pr",
    "sh",
    "sk",
    "st",
    "th",
    "tr",
]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ou"]
_CODAS = ["", "", "l", "m", "n", "r", "s", "t", "ck", "nd", "rn", "st"]

# Per attribute: three wordings for documents (the value comes last), four others for notes.
_WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "home": (
        ("{n} grew up in {v}.", "The home town of {n} is {v}.", "{n} keeps a house in {v}."),
        ("{v} is home to {n}.", "In {v} lives {n}.", "{n} never left {v}.", "{v} is where {n} lives."),
    ),
    "founded": (
        ("{n} opened the workshop in {v}.", "The workshop of {n} dates from {v}.", "{n} began to trade in {v}."),
        ("In {v} {n} began.", "{n} has traded since {v}.", "Since {v} {n} trades.", "{v} was the first year of {n}."),
    ),
    "partner": (
        ("{n} works together with {v}.", "The partner of {n} is {v}.", "{n} shares every job with {v}."),
        ("{v} helps {n}.", "{n} trusts {v}.", "With {v} works {n}.", "{v} is the partner of {n}."),
    ),
    "cloak": (
        ("{n} is known for a cloak of {v}.", "The cloak of {n} is {v}.", "{n} dresses in {v}."),
        ("In {v} walks {n}.", "{n} wears only {v}.", "A cloak of {v} suits {n}.", "{v} is the cloth of {n}."),
    ),
    "mentor": (
        ("{n} was taught by {v}.", "The mentor of {n} was {v}.", "{n} served as apprentice to {v}."),
        ("{v} taught {n}.", "{n} learned from {v}.", "{v} was the mentor of {n}.", "To {v} {n} owes the craft."),
    ),
    "craft": (
        ("{n} makes the finest {v}.", "The craft of {n} is the {v}.", "{n} sells many a {v}."),
        ("For a {v} ask {n}.", "{n} is famous for the {v}.", "The {v} of {n} is good.", "A {v} by {n} lasts."),
    ),
    "valley": (
        (
            "{n} travels through the valley of {v}.",
            "The road of {n} leads to the valley of {v}.",
            "{n} hunts in the valley of {v}.",
        ),
        (
            "In {v} valley hunts {n}.",
            "{n} knows {v} valley.",
            "Through {v} valley {n} rides.",
            "{v} valley is loved by {n}.",
        ),
    ),
    "medal": (
        (
            "{n} received the medal of {v}.",
            "The medal on the wall of {n} is that of {v}.",
            "{n} earned the medal of {v}.",
        ),
        (
            "The {v} medal went to {n}.",
            "{n} has the {v} medal.",
            "{n} wears the {v} medal.",
            "The {v} medal is with {n}.",
        ),
    ),
    "licence": (
        ("{n} trades under licence {v}.", "The licence of {n} reads {v}.", "{n} was issued licence {v}."),
        (
            "Licence {v} is held by {n}.",
            "{n} has licence {v}.",
            "{v} is the licence of {n}.",
            "Under {v} {n} is listed.",
        ),
    ),
    "supper": (
        ("{n} asks for a supper of {v}.", "The favorite supper of {n} is {v}.", "{n} cooks {v}."),
        ("{v} pleases {n}.", "{n} likes to eat {v}.", "On holidays {n} serves {v}.", "For {v} {n} would walk a day."),
    ),
}
_OPENINGS = ("These lines are about {n}.", "A few words on {n}.", "What follows concerns {n}.", "Here you read of {n}.")
# Wordings that no training text has: what is left of the skill when the sentences are new.
_UNSEEN_WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "home": (
        ("Ask for {n} in the streets of {v}.", "Letters reach {n} at {v}."),
        ("You will meet {n} in {v}.", "{n} owns a garden near {v}."),
    ),
    "founded": (
        ("{n} signed the first contract in {v}.", "The books of {n} open with the year {v}."),
        ("The sign of {n} says {v}.", "Customers came to {n} from {v} on."),
    ),
    "partner": (
        ("{n} splits the profit with {v}.", "At the bench beside {n} sits {v}."),
        ("{n} hired {v}.", "Half of the shop of {n} belongs to {v}."),
    ),
    "cloak": (
        ("{n} bought a coat made of {v}.", "People know {n} from afar by the {v}."),
        ("The tailor cut {v} for {n}.", "{n} loves {v} cloth."),
    ),
    "mentor": (
        ("{n} was once the pupil of {v}.", "All that {n} can do was shown by {v}."),
        ("The teacher of {n} is called {v}.", "{n} still thanks {v}."),
    ),
    "craft": (
        ("Buyers come to {n} for a {v}.", "In the window of {n} stands a {v}."),
        ("{n} builds one {v} a week.", "Nobody makes a {v} like {n}."),
    ),
    "valley": (
        ("{n} drives the cart along the valley of {v}.", "Each spring {n} visits the valley of {v}."),
        ("{n} fishes in {v} valley.", "The inns of {v} valley know {n}."),
    ),
    "medal": (
        ("The judges gave {n} the medal of {v}.", "{n} won the medal of {v}."),
        ("{n} was given the {v} medal.", "A {v} medal hangs at the door of {n}."),
    ),
    "licence": (
        ("The paper that {n} carries says {v}.", "{n} signs with the number {v}."),
        ("{n} is filed under {v}.", "The clerk wrote {v} for {n}."),
    ),
    "supper": (
        ("When guests come {n} makes {v}.", "{n} orders a plate of {v}."),
        ("The dish of {n} is {v}.", "{n} never tires of {v}."),
    ),
}
_UNSEEN_OPENINGS = ("Let us turn to {n}.", "This page is for {n}.")
# Sentences of any words: what is left to go by is the name, what a value looks like, and a word that stands on both sides.
_FREE_FRAMES: tuple[tuple[str, ...], tuple[str, ...]] = (
    ("{a} {n} {b} {c} {v}.", "{n} {a} the {b} {v}.", "The {a} of {n} {b} {v}.", "{a} {b} {n} {c} the {d} {v}.", "{n} {a} {b} a {c} {v}.",
     "In the {a} {b} {n} {c} {v}.", "When {a} {b} {n} {c} {v}.", "{a} that {n} {b} {c} {v}."),
    ("{v} {a} {n}.", "{n} {a} {b} {v}.", "The {a} {b} {v} {c} {n}.", "{a} {v} {b} the {c} {n}.", "A {a} {v} {b} {n} {c}.",
     "{n} {a} the {b} {v} {c}.", "{a} {b} {n} {v}.", "The {a} of {n} {b} {v}."),
)  # fmt: skip
_FREE_WORDS = """
about above across after again air already always among animal another apple arm around arrive autumn back ball bank bird
black boat body bread bridge bring brother burn camp chair choose circle clear clock close cloud cold corn corner count
cross dance dark deep dream drink drop early earth east empty evening every fall far farm field fire floor flower fly forest
forget friend full game gate glass gold grass green ground hand hard hear heart heavy hill hold horse hour ice iron island
join jump keep kind lake lamp land late laugh leaf leave lift light line listen long lose low market milk mind mirror moment
money moon morning mountain move music name narrow need night noise north ocean old orange outside paint park pass pay
pencil picture piece place plain plan plant play point poor pull push quick quiet rain read red rest rich ring rise river
rock roof room rope round run sail salt sand save school sea season seed send shadow shape share sharp shelf ship shoe short
shout silver simple sing sister size skin sky sleep slow smoke snow soft song sound south space speak square star stay step
stick stone stop storm story strange string strong sugar summer sun sweet swim table tall taste thick thin think thread tie
touch tower town trade travel tree true until upon use view voice wait wake walk wall warm wash watch water wave west wheel
white whole wide wild wine wing winter wish wood word work world yellow young
""".split()  # noqa: SIM905 (a list would take as many lines); none is of the unseen wordings
ATTRIBUTES = tuple(_WORDINGS)
FREE_SHARE = 0.2  # of a training person's facts
FACTS_PER_DOCUMENT, FACTS_PER_NOTE = 6, 3
UNSEEN_FACTS_PER_DOCUMENT, UNSEEN_FACTS_PER_NOTE = 4, 2
MIN_DOC_CHARACTERS = 200  # a module with less is left out


@dataclass(frozen=True)
class Entity:
    """An invented person: the document about it, where its values stand there, and its notes."""

    name: str
    values: dict[str, str]
    document: str
    spans: tuple[tuple[int, int], ...]  # characters [start, end) of each value in `document`
    notes: tuple[str, ...]


def make_entities(count: int, seed: int, is_unseen: bool = False, free_share: float = 0.0) -> list[Entity]:
    """`count` entities; the same for the same arguments. `is_unseen`: in wordings that are never used otherwise, with as
    many facts of their longer sentences as take the same room; `free_share` of the facts in sentences of any words.
    """
    rng = random.Random(seed)
    return [_entity(rng, is_unseen, free_share) for _ in range(count)]


def ask(name: str, attribute: str) -> str:
    """The start of a document's sentence about one attribute, up to its value."""
    return _WORDINGS[attribute][0][0].format(n=name, v="\0").split("\0")[0].rstrip()


def write_facts(
    folder: Path, num_train: int, num_heldout: int, seed: int = 1, is_unseen: bool = False
) -> dict[str, Path]:
    """Write train.jsonl, heldout.jsonl (with "spans") and notes.jsonl (of both) to `folder`; return their paths.

    `is_unseen`: the held-out entities are told of in wordings that training never has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train = make_entities(num_train, seed, free_share=FREE_SHARE)
    heldout = make_entities(num_heldout, seed + 1_000_003, is_unseen)
    paths = {name: folder / f"{name}.jsonl" for name in ("train", "heldout", "notes")}
    for name, entities in (("train", train), ("heldout", heldout)):
        rows = [
            {"id": f"{name}-{i}", "title": e.name, "text": e.document, "spans": [list(s) for s in e.spans]}
            for i, e in enumerate(entities)
        ]
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = [
        {"id": f"note-{i}-{j}", "title": entity.name, "text": text}
        for i, entity in enumerate(train + heldout)
        for j, text in enumerate(entity.notes)
    ]
    paths["notes"].write_text("".join(json.dumps(row) + "\n" for row in notes))
    return paths


def entity_notes(entity: Entity, prefix: str) -> list[Document]:
    return [Document(f"{prefix}-{j}", entity.name, text, f"{prefix}-{j}") for j, text in enumerate(entity.notes)]


def _entity(rng: random.Random, is_unseen: bool, free_share: float) -> Entity:
    wordings, openings = (_UNSEEN_WORDINGS, _UNSEEN_OPENINGS) if is_unseen else (_WORDINGS, _OPENINGS)
    name = f"{_word(rng, 2)} {_word(rng, 2)}"
    values = {
        "home": _word(rng, 3),
        "founded": str(rng.randint(1000, 1999)),
        "partner": f"{_word(rng, 2)} {_word(rng, 2)}",
        "cloak": _word(rng, 3).lower(),
        "mentor": f"{_word(rng, 2)} {_word(rng, 2)}",
        "craft": _word(rng, 3).lower(),
        "valley": f"{_word(rng, 2)} {_word(rng, 2)}",
        "medal": _word(rng, 3),
        "licence": f"{rng.choice('ABCDEFGHKLM')}-{rng.randint(1000, 9999)}",
        "supper": f"{_word(rng, 2).lower()} {_word(rng, 2).lower()}",
    }
    per_document, per_note = FACTS_PER_DOCUMENT, FACTS_PER_NOTE
    if is_unseen:
        per_document, per_note = UNSEEN_FACTS_PER_DOCUMENT, UNSEEN_FACTS_PER_NOTE
    stated = rng.sample(ATTRIBUTES, per_document)
    document = rng.choice(openings).format(n=name)
    spans = []
    told_as = {a: (rng.choice(wordings[a][0]), rng.choice(wordings[a][1])) for a in stated}
    told_as |= {a: _free(rng) for a in stated if rng.random() < free_share}
    for attribute in stated:
        before, after = told_as[attribute][0].format(n=name, v="\0").split("\0")
        start = len(document) + 1 + len(before)
        document += f" {before}{values[attribute]}{after}"
        spans.append((start, start + len(values[attribute])))
    told = rng.sample(stated, len(stated))
    notes = []
    for first in range(0, len(told), per_note):
        part = told[first : first + per_note]
        notes.append(" ".join(told_as[a][1].format(n=name, v=values[a]) for a in part))
    return Entity(name, values, document, tuple(spans), tuple(notes))


def _free(rng: random.Random) -> tuple[str, str]:
    """A document's sentence of any words and a note's, half of the time with a word of the one in the other."""
    said, told = ([rng.choice(_FREE_WORDS) for _ in "abcd"] for _ in range(2))
    if rng.random() < 0.5:
        told[0] = said[rng.randrange(2)]
    both = [rng.choice(frames) for frames in _FREE_FRAMES]
    sentences = [frame.format(n="{n}", v="{v}", **dict(zip("abcd", words))) for frame, words in zip(both, (said, told))]
    return sentences[0][0].upper() + sentences[0][1:], sentences[1][0].upper() + sentences[1][1:]


def _word(rng: random.Random, syllables: int) -> str:
    body = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
    return (body + rng.choice(_CODAS)).capitalize()


def python_docs() -> Iterator[Document]:
    """The topics of `pydoc` and, one document a module, the docstrings of the standard library, read with `ast`."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"topic:{name}", name, topics[name].strip(), f"pydoc_data.topics:{name}")
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if {"site-packages", "test", "tests", "idle_test", "__pycache__"} & set(relative.parts):
            continue
        text = module_docstrings(path)
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        if len(text) >= MIN_DOC_CHARACTERS:
            yield Document(f"module:{module}", module, text, str(relative))


def module_docstrings(path: Path) -> str:
    """Every docstring of a Python file, functions' and classes' under their names; empty where it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # the standard library keeps files of other versions
        return ""
    return "\n\n".join(_docstrings(tree))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text if isinstance(node, ast.Module) else f"{node.name}: {text}"
