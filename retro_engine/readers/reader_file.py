"""What a reader is on the disk: adapters that teach a base to read, and the settings under which they were trained.

Reads and writes a folder: reader.json (version 1: FIELDS), adapters.safetensors (bf16, named as a checkpoint's adapters are)
and README.md, the card. The base is not in it: reader.json has its SHA-256. The readers of this package lie in
retro_engine/readers/NAME/; one of a user's own is named by its folder.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from retro_engine.config import LoraConfig
from retro_engine.config.fields import LORA_TARGETS
from retro_engine.data import files, manifests
from retro_engine.data.checkpoint_files import ADAPTERS_FILE
from retro_engine.errors import MissingInputError, StoreError, UsageError, nearest

READER_FILE, CARD_FILE = "reader.json", "README.md"
VERSION = 1
SHIPPED = Path(__file__).parent
DEFAULT = "smollm2"
QUESTION, TEXT, TITLE = "{question}", "{text}", "{title}"
MOST_CHUNK = 1 << 12  # tokens
MOST_PASSAGES = 64  # that are read
NAME = manifests.text(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LINE = manifests.text(r"[^\0\n\r\ud800-\udfff]{1,200}")
FIELDS = manifests.fields(
    {
        "version": manifests.whole(1, 1 << 16),
        "name": NAME,
        "base": manifests.fields(
            {"name": NAME, "file": manifests.NAME, "sha256": manifests.FINGERPRINT, "get": LINE},
        ),
        "lora": manifests.fields(
            {
                "rank": manifests.whole(1, 4096),
                "alpha": manifests.real(1e-6, 1e6),
                "targets": manifests.each(manifests.text("|".join(LORA_TARGETS))),
            }
        ),
        "reading": manifests.fields(
            {
                "chunk_size": manifests.whole(2, MOST_CHUNK),
                "retrieved_length": manifests.whole(1, 2 * MOST_CHUNK),
                "num_neighbors": manifests.whole(1, 64),
                "sink_id": manifests.maybe(manifests.ID),
            }
        ),
        "template": manifests.text(),
        "passage": manifests.text(),
        "absent": LINE,
        "max_new_tokens": manifests.whole(1, 1024),
        "adapters": manifests.FINGERPRINT,  # of adapters.safetensors
    }
)


@dataclass(frozen=True, kw_only=True)
class BaseFile:
    """The GGUF file whose weights the adapters are added to."""

    name: str
    file: str
    sha256: str
    get: str  # what brings it here, for people


@dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """How a reader was taught to read: in front (model/prefix.py)."""

    chunk_size: int  # of the texts that are searched
    retrieved_length: int  # tokens of a passage, at most
    num_neighbors: int
    sink_id: int | None

    @property
    def stride(self) -> int:
        """Tokens between the starts of chunks: half of one, so that few sentences are cut in every chunk that has them."""
        return max(1, self.chunk_size // 2)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A reader's folder, checked."""

    folder: Path
    name: str
    base: BaseFile
    lora: LoraConfig
    reading: ReadingSettings
    template: str  # the prompt, with {question} in it
    passage: str  # what is read of a passage, with {text} and perhaps {title} in it
    absent: str  # the answer that means: not in the documents
    max_new_tokens: int
    adapters: str  # SHA-256 of adapters.safetensors

    @property
    def key(self) -> str:
        """Of its weights: the base's and the adapters'."""
        return hashlib.sha256(f"{self.base.sha256} {self.adapters} {self.lora}".encode()).hexdigest()[:16]

    def prompt(self, question: str) -> str:
        return self.template.replace(QUESTION, question)

    def shown(self, title: str, text: str) -> str:
        """A passage as the model reads it."""
        before, after = self.passage.split(TEXT)
        return f"{before.replace(TITLE, title)}{text}{after.replace(TITLE, title)}"

    def to_json(self) -> dict[str, object]:
        lora = {name: value for name, value in asdict(self.lora).items() if name != "dropout"}
        values = asdict(self) | {"version": VERSION, "lora": lora | {"targets": list(self.lora.chosen)}}
        return {name: values[name] for name in ("version", *values) if name != "folder"}


def read_reader(folder: Path) -> Reader:
    """A reader's folder. Raises MissingInputError for what is none, StoreError for what is damaged, edited or newer."""
    path = folder / READER_FILE
    if not path.is_file():
        raise MissingInputError(f"{folder} is no reader", f"it has no {READER_FILE}", "retro export RUN --reader BASE")
    do = "take the whole folder again from where it came from"
    values = files.read_object(path, do)
    if values.get("version") != VERSION and type(values.get("version")) is int:
        why = f"this program reads version {VERSION}"
        raise StoreError(f"{path} has version {values['version']}", why, "update retro-engine")
    try:
        FIELDS(values, READER_FILE)
        check_templates(values["template"], values["passage"])
        for name in ("base", "lora", "reading"):
            values[name] = dict(values[name])
    except ValueError as error:
        why = error.what if isinstance(error, UsageError) else str(error)
        raise StoreError(f"{path} is damaged", why, do) from error
    if values["reading"]["retrieved_length"] > 2 * values["reading"]["chunk_size"]:
        raise StoreError(f"{path} is damaged", "retrieved_length is more than a chunk and as much that follows it", do)
    adapters = folder / ADAPTERS_FILE
    if not adapters.is_file():
        raise MissingInputError(f"{adapters} does not exist", f"{READER_FILE} names it", do)
    if files.sha256_file(adapters) != values["adapters"]:
        raise StoreError(f"{adapters} is damaged", "its checksum does not match", do)
    base, lora, reading = values["base"], values["lora"], values["reading"]
    return Reader(
        folder=folder,
        name=values["name"],
        base=BaseFile(**{name: base[name] for name in ("name", "file", "sha256", "get")}),
        lora=LoraConfig(rank=lora["rank"], alpha=lora["alpha"], targets=lora["targets"]),
        reading=ReadingSettings(**{name: reading[name] for name in ReadingSettings.__dataclass_fields__}),
        **{name: values[name] for name in ("template", "passage", "absent", "max_new_tokens", "adapters")},
    )


def check_templates(template: str, passage: str) -> None:
    """Raises UsageError for a prompt without a question, or a passage without its text."""
    if QUESTION not in template:
        raise UsageError(f"template {template[:80]!r} cannot be used", f"it has no {QUESTION}")
    if passage.count(TEXT) != 1:
        raise UsageError(f"passage {passage[:80]!r} cannot be used", f"it has {TEXT} once")


def shipped_readers() -> list[str]:
    """Names of the readers of this package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{READER_FILE}"))


def find_reader(name: str | Path | None = None) -> Reader:
    """A reader by its name, or by its folder; None: the package's own. Raises MissingInputError where there is none."""
    known = shipped_readers()
    name = DEFAULT if name is None else name
    if str(name) in known:
        return read_reader(SHIPPED / str(name))
    if Path(name).is_dir():
        return read_reader(Path(name))
    there = f"this package has {', '.join(known)}" if known else "this package has none of its own"
    raise MissingInputError(f"there is no reader {name}", nearest(str(name), known) or there, "--reader FOLDER")


def with_settings(reader: Reader, num_neighbors: int | None = None, max_new_tokens: int | None = None) -> Reader:
    """The same with what a user asked for otherwise. Raises UsageError for what cannot be used."""
    if num_neighbors is not None and not 1 <= num_neighbors <= MOST_PASSAGES:
        why = f"1 to {MOST_PASSAGES} passages are read"
        raise UsageError(f"k={num_neighbors} cannot be used", why, "leave it out: the reader's")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens} cannot be used", "at least one token is generated")
    reading = reader.reading if num_neighbors is None else replace(reader.reading, num_neighbors=num_neighbors)
    most = reader.max_new_tokens if max_new_tokens is None else max_new_tokens
    return replace(reader, reading=reading, max_new_tokens=most)
