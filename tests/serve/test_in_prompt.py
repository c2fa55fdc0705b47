"""Documents for a model that reads no neighbors: they stand in its prompt, are named in the answer, and can be chosen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from interop_helpers import decoder_folder
from serve_helpers import Server, post, serving

from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.generate.generator import Generator
from retro_engine.generate.open_model import open_model
from retro_engine.serve.in_prompt import NOTE
from retro_engine.serve.service import ServiceOptions, open_service

ASK = "the quarry by the river"
HELD = "The quarry by the river is deep."


@pytest.fixture(scope="module")
def decoder(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("plain") / "decoder", small_store.tokenizer)


@pytest.fixture(scope="module")
def prompted(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("prompted")
    options = ServiceOptions(run=str(decoder), library=str(folder / "library"), name="plain", reading="prompt")
    with serving(lambda: open_service(options), folder) as server:
        with server.client() as client:
            for name, year, text in (("note", 2024, HELD), ("mill", 2020, "A mill by the river.")):
                document = {"id": name, "title": name.title(), "text": text, "metadata": {"year": year}}
                assert client.post("/v1/documents", json=document).status_code == 200
        yield server


def complete(server: Server, **fields: Any) -> dict[str, Any]:
    answer = post(server, "/v1/completions", **{"prompt": ASK, "max_tokens": 4, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_what_is_found_stands_before_what_is_asked(prompted: Server, decoder: Path, small_store: Store) -> None:
    out = complete(prompted, retro={"k": 1})
    assert [hit["document"] for hit in out["retro"]["neighbors"]] == ["note"]
    assert out["retro"]["notes"] == [NOTE] and out["retro"]["segments"][0]["neighbors"] == [0]
    alone = Generator(open_model(decoder).model, small_store.tokenizer)
    assert out["choices"][0]["text"] == alone.generate(f"Documents:\n\nNote\n{HELD}\n\n{ASK}", 4).text
    off = complete(prompted, retro={"neighbors": []})
    assert off["choices"][0]["text"] == alone.generate(ASK, 4).text and off["retro"]["notes"] == []
    given = complete(prompted, retro={"neighbors": ["amber stone"]})
    assert given["choices"][0]["text"] == alone.generate(f"Documents:\n\namber stone\n\n{ASK}", 4).text
    old = {"filters": {"type": "eq", "key": "year", "value": 2020}}
    assert [hit["document"] for hit in complete(prompted, retro=old)["retro"]["neighbors"]] == ["mill"]
    assert complete(prompted, retro={"min_score": 99})["retro"]["notes"] == []
    two = complete(prompted, prompt=[ASK, "zzz"], n=2)
    assert [one["choice"] for one in two["retro"]["segments"] if one["neighbors"]] == [0, 1]


def test_chats_and_streams(prompted: Server) -> None:
    said = [{"role": "user", "content": "Which quarry?"}]
    chat = {"messages": said, "max_tokens": 3, "temperature": 0}
    out = post(prompted, "/v1/chat/completions", **chat).json()
    assert out["retro"]["neighbors"][0]["document"] == "note" and out["retro"]["notes"] == [NOTE]
    without = post(prompted, "/v1/chat/completions", **chat, retro={"neighbors": []}).json()
    assert out["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"]
    streamed = post(prompted, "/v1/chat/completions", **chat, stream=True).text
    assert streamed.index('"document":"note"') < streamed.index("data: [DONE]") and NOTE in streamed
    for path, body in (
        ("/v1/responses", {"input": "Which quarry?"}),
        ("/v1/messages", {"messages": said, "max_tokens": 2}),
    ):
        answer = post(prompted, path, model="plain", **body).json()
        assert answer["retro"]["neighbors"][0]["document"] == "note", path
    assert post(prompted, "/v1/retrieve", query="quarry", k=1).json()["data"][0]["document"] == "note"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"retro": {"retrieved_length": 4}}, "retro.retrieved_length"), ({"retro": {"neighbors": ["a"], "k": 1}}, "retro.neighbors"),
        ({"prompt": [40, 41], "retro": {"k": 1}}, "retro"), ({"echo": True, "retro": {"k": 1}}, "retro"),
        ({"retro": {"filters": {}}}, "retro.filters"), ({"retro": {"mode": "hybrid", "min_score": 1}}, "retro.min_score"),
    ],
)  # fmt: skip
def test_what_cannot_apply_is_refused(prompted: Server, fields: dict[str, Any], param: str) -> None:
    answer = post(prompted, "/v1/completions", **{"prompt": ASK, "max_tokens": 2, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_prompts_that_nothing_is_put_into_say_so(prompted: Server) -> None:
    assert complete(prompted, prompt=[40, 41])["retro"]["notes"] == ["token ids: no document stands in the prompt"]
    shown = complete(prompted, echo=True, max_tokens=0)
    assert shown["choices"][0]["text"] == ASK and "echo" in shown["retro"]["notes"][0]


def test_a_model_without_room_in_front_reads_in_its_prompt(small_run: Path, small_store: Store, tmp_path: Path) -> None:
    few = decoder_folder(tmp_path / "few", small_store.tokenizer, position_embedding="learned", encoder_seq_length=64)
    service = open_service(ServiceOptions(run=str(few), library=str(tmp_path / "library")))
    try:
        assert service.in_prompt is not None and not service.generator.model.config.retrieval
    finally:
        service.close()
    with pytest.raises(UsageError, match="prompt cannot be used"):
        open_service(ServiceOptions(run=str(small_run), library=str(tmp_path / "other"), reading="prompt"))
