"""Questions over HTTP: a reader's answer, where it stands, and what is refused; another model is no reader."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_helpers import Server, post, serving

from retro_engine import cli
from retro_engine.errors import StoreError, UsageError
from retro_engine.generate.request import Request
from retro_engine.library.library import Library
from retro_engine.readers.ask import NOT_FOUND, answer_of
from retro_engine.serve import ask
from retro_engine.serve.reader_chat import NOTE
from retro_engine.serve.service import ServiceOptions, open_service

CASTLE = {"id": "castle", "title": "A castle", "text": "The castle was built in 1302 by Adelheid."}


def options(reader: Path, base: Path, folder: Path) -> ServiceOptions:
    return ServiceOptions(run="", reader=str(reader), base=str(base), library=str(folder / "library"))


@pytest.fixture(scope="module")
def reading(reader_folder: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("reading")
    with serving(lambda: open_service(options(reader_folder, base, folder)), folder) as server:
        with server.client("write") as client:
            assert client.post("/v1/documents", json=CASTLE).status_code == 200
        yield server


def test_an_answer(reading: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ask, "answer_of", lambda reader, question, read, text: answer_of(reader, question, read, " 1302")
    )
    answer = post(reading, "/v1/ask", question="Which castle was  built in 1302?", k=3)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["object"], found["question"]) == ("answer", "Which castle was built in 1302?")
    assert (found["answer"], found["found"]) == ("1302", True)
    source = found["sources"][found["span"]["source"]]
    assert (source["document"], source["title"]) == ("castle", "A castle")
    assert source["text"][found["span"]["start"] : found["span"]["end"]] == found["span"]["text"] == "1302"
    assert 1 <= len(found["sources"]) <= 3
    assert found["index_version"] == reading.service.index_version


def test_what_the_model_says(reading: Server) -> None:
    """The same as the command says, which reads the same passage: the first that is shown."""
    service = reading.service
    assert service.reader is not None
    found = post(reading, "/v1/ask", question="Who built the castle?").json()
    texts = [source["text"] for source in found["sources"]][:1]
    out = service.generator.generate(service.reader.prompt("Who built the castle?"), 6, neighbors=texts)
    said = out.text.split("\n")[0].strip()
    assert said and (found["answer"], found["note"]) == (
        NOT_FOUND,
        f"what the model said stands in no passage: {said!r}",
    )


def test_nothing_is_found(reading: Server) -> None:
    found = post(reading, "/v1/ask", question="Zanzibar?").json()
    assert (found["found"], found["answer"], found["span"], found["sources"]) == (False, NOT_FOUND, None, [])
    assert found["note"] == "no hit: none of its words is in a document"


def test_documents_come_and_go(reading: Server) -> None:
    with reading.client("write") as client:
        client.post("/v1/documents", json={"id": "new", "text": "Zebras graze."})
        assert post(reading, "/v1/ask", question="zebras").json()["sources"][0]["document"] == "new"
        client.delete("/v1/documents/new")
        assert post(reading, "/v1/ask", question="zebras").json()["sources"] == []


def test_what_is_refused(reading: Server, server: Server) -> None:
    bodies = {
        "question": [{"question": ""}, {"question": " \n"}, {"question": "x" * 10_000}, {"question": 3}, {"question": "a\0b"}, {}],
        "k": [{"question": "x", "k": 0}, {"question": "x", "k": 1000}, {"question": "x", "k": "2"}],
        "collection": [{"question": "x", "collection": "a"}],
    }  # fmt: skip
    for param, wrong in bodies.items():
        for body in wrong:
            answer = post(reading, "/v1/ask", **body)
            assert answer.status_code == 400, body
            assert answer.json()["error"]["param"] == param
    assert post(reading, "/v1/ask", question="x", model="other").status_code == 404
    with reading.client(None) as client:
        assert client.post("/v1/ask", json={"question": "x"}).status_code == 401
    answer = post(server, "/v1/ask", question="river")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_reader")


def test_the_server_says_what_it_is(reading: Server, server: Server) -> None:
    with reading.client("read") as client:
        (about,) = client.get("/v1/models").json()["data"]
        assert "/v1/ask" in client.get("/openapi.json").json()["paths"]
    assert (about["id"], about["retro"]["reader"]) == ("tiny-reads", "tiny-reads")
    with server.client("read") as client:
        assert client.get("/v1/models").json()["data"][0]["retro"]["reader"] is None


def test_what_cannot_be_opened(
    reader_folder: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="needs a library"):
        open_service(ServiceOptions(run="", reader=str(reader_folder), base=str(base)))
    service = open_service(options(reader_folder, base, tmp_path))
    assert service.library is not None
    assert (service.library.file.chunk_size, service.library.file.stride) == (16, 8)
    tokenizer = service.tokenizer
    service.close()
    Library.create(tmp_path / "other" / "library", tokenizer, 32)
    with pytest.raises(StoreError):
        open_service(options(reader_folder, base, tmp_path / "other"))
    for words in ([], ["run", "--reader", "smollm2"], ["run", "--base", "x.gguf"]):
        assert cli.main(["serve", *words]) == 2, words
    assert "cannot be used" in capsys.readouterr().err


def test_a_chat_is_a_question(reading: Server) -> None:
    """The official clients' way to the same answer: the same passage chosen, the same prompt; what is left out is said."""
    service = reading.service
    assert service.reader is not None
    with reading.client("write") as client:
        client.post(
            "/v1/documents", json={"id": "mill", "title": "A mill", "text": "The mill by the castle burned down."}
        )
    question = "Who built the castle?"
    asked = post(reading, "/v1/ask", question=question).json()
    answer = post(reading, "/v1/chat/completions", messages=[{"role": "user", "content": question}], temperature=0)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    names = [(hit["document"], hit["chunk"]) for hit in found["retro"]["neighbors"]]
    assert names == [(source["document"], source["chunk"]) for source in asked["sources"]]
    prompt, read = service.reader.prompt(question), [asked["sources"][0]["text"]]
    shown = service.reader.shown(asked["sources"][0]["title"], read[0])
    (out,) = service.generator.generate_all([Request(prompt, 256, neighbors=[shown], stop=("\n",))])
    assert found["choices"][0]["message"]["content"] == out.text
    assert found["usage"]["prompt_tokens"] == len(service.tokenizer.encode(prompt))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    said = post(reading, "/v1/chat/completions", messages=turns, temperature=0).json()
    assert said["retro"]["notes"] == [NOTE]
    assert said["choices"][0]["message"]["content"] == found["choices"][0]["message"]["content"]
    given = post(
        reading, "/v1/chat/completions", messages=turns, retro={"neighbors": ["It was Adelheid."]}, max_tokens=3
    )
    assert [hit["text"] for hit in given.json()["retro"]["neighbors"]] == ["It was Adelheid."]
    none = post(
        reading, "/v1/chat/completions", messages=[{"role": "user", "content": "Zanzibar?"}], max_tokens=3
    ).json()
    assert none["retro"]["neighbors"] == []
    streamed = post(reading, "/v1/chat/completions", messages=turns, temperature=0, stream=True).text
    assert '"castle"' in streamed and streamed.endswith("data: [DONE]\n\n")
    with reading.client("write") as client:
        client.delete("/v1/documents/mill")


def test_chats_that_are_no_question(reading: Server) -> None:
    user = {"role": "user", "content": "Who?"}
    for fields in (
        {"messages": [user, {"role": "assistant", "content": "Adelheid"}], "add_generation_prompt": False, "continue_final_message": True},
        {"messages": [{"role": "user", "content": " "}]},
        {"messages": [{"role": "user", "content": "x" * 5000}]},
        {"messages": [user], "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
        {"messages": [user], "retro": {"min_score": 1, "mode": "hybrid"}},
    ):  # fmt: skip
        answer = post(reading, "/v1/chat/completions", **fields)
        assert answer.status_code == 400, fields


def test_what_the_model_made_up_is_not_found(reading: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "answer_of", lambda reader, question, read, text: answer_of(reader, question, read, " 2"))
    found = post(reading, "/v1/ask", question="Which castle was built?").json()
    assert (found["found"], found["answer"], found["span"]) == (False, NOT_FOUND, None)
    assert found["note"] == "what the model said stands in no passage: '2'" and found["sources"]
