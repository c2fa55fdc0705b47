"""A library behind another process answers as itself; two replicas on Ray Serve over one (where Ray is installed): a write of any
is read by all, also after a process was killed."""

import asyncio
import importlib.util
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers import small_config

from retro_engine.data.corpus import Document
from retro_engine.data.store import Store
from retro_engine.errors import MissingExtraError, UsageError
from retro_engine.library.library import Library
from retro_engine.model.retro import RetroModel
from retro_engine.serve.accounts import Accounts
from retro_engine.serve.replicas import FORWARDED, SharedImporter, SharedLibrary, Shelf, build
from retro_engine.serve.service import ServiceOptions, open_service
from retro_engine.train.checkpoint import publish_model

ROOT = Path(__file__).resolve().parents[2]
HAS_RAY_SERVE = bool(importlib.util.find_spec("ray") and importlib.util.find_spec("fastapi"))
SCRIPT = """
import json, os, socket, sys, time
from retro_engine.retrieval.executor import connect_ray
ray = connect_ray(2)
from ray import serve
from retro_engine.serve.replicas import build
with socket.socket() as free:
    free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(build(json.loads(sys.argv[1])), name="retro", route_prefix="/")
print(f"serving {port}", flush=True)
sys.stdin.read()
serve.shutdown(); ray.shutdown()
"""


@pytest.fixture(scope="module")
def served(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path, int]]:
    """A client, the library's folder and the process that started it all."""
    if not HAS_RAY_SERVE:
        pytest.skip("Ray Serve is not installed")
    folder = tmp_path_factory.mktemp("replicas")
    settings = {"run": str(small_run), "library": str(folder / "library"), "accounts": str(folder / "accounts.sqlite")}
    key = Accounts(settings["accounts"]).add_key("all", "admin")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps({**settings, "name": "tiny", "replicas": "2"})],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    port = next(line.split()[1] for line in process.stdout if line.startswith("serving"))
    headers = {"authorization": f"Bearer {key}", "connection": "close"}  # a new connection each: both replicas answer
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60, trust_env=False) as client:
            waited(lambda: all(client.get("/health").status_code == 200 for _ in range(20)))
            yield client, folder / "library", process.pid
    finally:
        process.communicate("", timeout=60)


def waited(is_there: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


def found(client: httpx.Client, query: str) -> set[str]:
    """Documents that a search finds."""
    answer = client.post("/v1/retrieve", json={"query": query}).raise_for_status().json()
    return {hit["document"] for hit in answer["data"]}


def processes(name: str) -> list[int]:
    """Ray's processes of a deployment: it names them."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if line.startswith(b"ray::ServeReplica:retro:" + name.encode()):
                found.append(int(folder.name))
    return found


def test_a_write_of_one_replica_is_read_by_all(served: tuple[httpx.Client, Path, int]) -> None:
    client, library, _ = served
    assert len(processes("Server")) == 2 and len(processes("Shelf")) == 1
    with pytest.raises(UsageError, match="in use"):
        Library(library)
    client.post("/v1/documents", json={"id": "stone", "text": "Zircon is a mineral."}).raise_for_status()
    assert [found(client, "zircon") for _ in range(30)] == [{"stone"}] * 30
    assert client.get("/v1/documents/stone").json()["text"] == "Zircon is a mineral."
    assert client.get("/v1/documents").json()["statistics"]["documents"] == 1
    client.delete("/v1/documents/stone").raise_for_status()
    assert [found(client, "zircon") for _ in range(30)] == [set()] * 30
    bad = client.post("/v1/documents", json={"id": "\x00", "text": "x"})
    assert bad.status_code == 400 and "id" in bad.json()["error"]["message"], bad.text
    assert client.get("/v1/models", headers={"authorization": "Bearer rk_no"}).status_code == 401


def test_generation_streams_and_reads_the_library(served: tuple[httpx.Client, Path, int]) -> None:
    client, _, _ = served
    client.post("/v1/documents", json={"id": "amber", "text": "amber resin " * 20}).raise_for_status()
    body = {"model": "tiny", "prompt": "amber resin " * 12, "max_tokens": 8, "temperature": 0}
    answers = [client.post("/v1/completions", json=body).raise_for_status().json() for _ in range(6)]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert all(answer["retro"]["neighbors"][0]["document"] == "amber" for answer in answers)
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["text"] for event in events[:-1] if json.loads(event)["choices"]]
    assert "".join(pieces) == answers[0]["choices"][0]["text"]


def test_an_import_is_a_job_of_the_library(served: tuple[httpx.Client, Path, int]) -> None:
    client, library, _ = served
    rows = "".join(json.dumps({"id": f"row-{i}", "text": f"basalt number {i}"}) + "\n" for i in range(300))
    headers = {"content-type": "application/x-ndjson"}
    number = client.post("/v1/documents/import", content=rows, headers=headers).raise_for_status().json()["id"]
    waited(lambda: client.get(f"/v1/jobs/{number}").json()["state"] == "done")
    assert client.get(f"/v1/jobs/{number}").json()["added"] == 300
    assert client.get("/v1/documents/row-299").json()["text"] == "basalt number 299"
    assert client.get("/v1/jobs/99").status_code == 404
    assert list((library / "imports").iterdir()) == []


@pytest.mark.parametrize("name", ["Server", "Shelf"])
def test_nothing_is_lost_with_a_killed_process(served: tuple[httpx.Client, Path, int], name: str) -> None:
    client, _, _ = served
    client.post("/v1/documents", json={"id": name, "text": f"granite {name}"}).raise_for_status()
    before = set(processes(name))
    os.kill(next(iter(before)), signal.SIGKILL)

    def is_whole() -> bool:
        answers = [client.post("/v1/retrieve", json={"query": f"granite {name}"}) for _ in range(10)]
        assert all(answer.status_code in (200, 503) for answer in answers), [answer.text for answer in answers]
        return all(answer.status_code == 200 for answer in answers) and len(processes(name)) == len(before)

    waited(is_whole)
    assert set(processes(name)) != before
    assert name in found(client, f"granite {name}")


def test_an_import_survives_the_shelf(served: tuple[httpx.Client, Path, int]) -> None:
    """What was answered with 202 is done by the process that comes next."""
    client, _, _ = served
    rows = "".join(json.dumps({"id": f"long-{i}", "text": f"obsidian number {i} " * 40}) + "\n" for i in range(5000))
    headers = {"content-type": "application/x-ndjson"}
    number = client.post("/v1/documents/import", content=rows, headers=headers).raise_for_status().json()["id"]
    before = processes("Shelf")
    os.kill(before[0], signal.SIGKILL)

    def is_done() -> bool:
        answer = client.get(f"/v1/jobs/{number}")
        return answer.status_code == 200 and answer.json()["state"] == "done"

    waited(is_done)
    assert processes("Shelf") != before
    assert client.get(f"/v1/jobs/{number}").json()["added"] == 5000
    assert client.get("/v1/documents/long-4999").status_code == 200


def test_completions_say_503_without_the_shelf(served: tuple[httpx.Client, Path, int]) -> None:
    client, _, _ = served
    os.kill(processes("Shelf")[0], signal.SIGKILL)
    codes = []
    for number in range(400):
        body = {"model": "tiny", "prompt": f"{number} amber resin " * 12, "max_tokens": 2}
        codes.append(client.post("/v1/completions", json=body).status_code)
        if codes[-1] == 200 and len(processes("Shelf")) == 1:
            break
    assert set(codes) <= {200, 503}, codes


def test_metrics_take_a_token(served: tuple[httpx.Client, Path, int]) -> None:
    client, _, _ = served
    assert client.get("/metrics").status_code == 401


def shelf_of(run: Path, folder: Path) -> tuple[Shelf, SharedLibrary]:
    """A Shelf in this process, and a library that asks it as through Ray: all that passes is pickled."""
    shelf = Shelf(ServiceOptions(run=str(run), library=str(folder / "library")))

    def ask(*arguments: Any, **named: Any) -> Any:
        given, more = pickle.loads(pickle.dumps((arguments, named)))  # noqa: S301
        return pickle.loads(pickle.dumps(asyncio.run(shelf.call(*given, **more))))  # noqa: S301

    return shelf, SharedLibrary(ask)


def test_a_shared_library_answers_as_the_library(small_run: Path, tmp_path: Path) -> None:
    shelf, shared = shelf_of(small_run, tmp_path)
    version = shared.add([Document("a", "A title", "basalt and granite"), Document("b", "", "granite alone")])
    assert version == shared.version == shelf.library.version
    assert shared.get("a") == Document("a", "A title", "basalt and granite")
    assert shared.search("basalt", 3) == shelf.library.search("basalt", 3)
    for mode in ("dense", "hybrid"):
        pairs = zip(shared.find("granite", 2, mode), shelf.library.find("granite", 2, mode), strict=True)
        assert all(one[0] == other[0] and (one[1] == other[1]).all() for one, other in pairs)
    assert shared.entries(limit=1) == shelf.library.entries(limit=1)
    assert shared.statistics() == shelf.library.statistics()
    shared.add([Document("b", "", "granite alone", metadata={"year": 1})])
    assert shared.metadata(["a", "b"]) == shelf.library.metadata(["a", "b"]) == {"b": {"year": 1}}
    assert shared.delete(["a", "c"]) == 1
    for wrong in (
        lambda: shared.add([Document("", "", "x")]),
        lambda: shared.search("", 3),
        lambda: shared.search("x", 0),
    ):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(ValueError, match="not one of"):
        shared.ask("write", "default", None, [])
    importer = SharedImporter(shared)
    number = importer.start(io.BytesIO(b'{"id": "c", "text": "chalk"}\n'))
    waited(lambda: importer.job(number).state == "done")
    assert shared.reset() == 2
    with pytest.raises(UsageError, match="does not exist"):
        importer.job(99)

    async def on_a_loop() -> int:
        return shared.version  # asks nobody

    known = shared.version
    shelf.library.add([Document("d", "", "dolomite")])
    assert asyncio.run(on_a_loop()) == known < shared.version
    shelf.importer.stop()
    shelf.library.close()


def test_all_that_the_server_asks_of_a_library_is_answered() -> None:
    """What one process alone has, the thread that encodes ahead, opens the library itself."""
    asked = {
        name
        for path in (ROOT / "retro_engine" / "serve").glob("*.py")
        if path.name != "encode_ahead.py"
        for name in re.findall(r"(?<!retro_engine\.)\blibrary\.([a-z]\w*)", path.read_text())
        if callable(getattr(Library, name, None))
    }
    assert {"add", "find", "metadata", "close"} <= asked
    assert asked <= {*FORWARDED, *vars(SharedLibrary)}, "FORWARDED lacks them"


def test_a_plain_decoder_reads_the_shared_library(small_store: Store, tmp_path: Path) -> None:
    """In front, in the library's chunks; with reading=none there is none."""
    config = small_config(vocab_size=small_store.vocab_size, retrieval=False, encoder_seq_length=64, chunk_size=16)
    greedy = {"greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    publish_model(tmp_path / "run", RetroModel(config), small_store.tokenizer, {"imported": "here"}, greedy)
    options = ServiceOptions(run=str(tmp_path / "run"), library=str(tmp_path / "library"))
    shelf, shared = shelf_of(tmp_path / "run", tmp_path)
    shared.add([Document("a", "", "river stone amber lantern orchard harbor winter copper thistle")])
    service = open_service(options, (shared, SharedImporter(shared)))
    assert service.generator.model.config.reads_prefix
    out = service.generator.generate("river stone amber", 4)
    assert [hit.document for segment in out.segments for hit in segment.neighbors][:1] == ["a"]
    service.close()
    shelf.importer.stop()
    shelf.library.close()
    assert not open_alone(ServiceOptions(run=options.run, reading="none"))


def open_alone(options: ServiceOptions) -> bool:
    """Whether a service without a library reads."""
    service = open_service(options)
    service.close()
    return service.generator.model.config.retrieval


def test_a_version_never_goes_back(small_run: Path, tmp_path: Path) -> None:
    shelf, shared = shelf_of(small_run, tmp_path)
    answers = iter([(7, None), (6, [])])
    shared._asks = lambda *_, **__: next(answers)
    shared.ask("add")
    shared.ask("find")
    assert shared._known_version == 7
    shelf.importer.stop()
    shelf.library.close()


def test_settings_that_cannot_be_used(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_RAY_SERVE:
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(MissingExtraError, match=r"retro-engine\[replicas\]"):
            build({"run": str(small_run)})
        return
    accounts = str(tmp_path / "accounts.sqlite")
    settings = {"run": str(small_run), "accounts": accounts}
    for change, match in [
        ({"colour": "red"}, "colour"),
        ({"run": ""}, "not set"),
        ({"mode": "psychic"}, "psychic"),
        ({}, "nobody has access"),
    ]:
        with pytest.raises(UsageError, match=match):
            build({name: value for name, value in {**settings, **change}.items() if value})
    Accounts(accounts).add_key("all", "admin")
    for change in ({"replicas": "two"}, {"cpus": "0"}, {"max_batch": "-1"}):
        with pytest.raises(UsageError, match="a number from 1 on"):
            build({**settings, **change})
