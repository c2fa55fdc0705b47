"""The page in a real browser (Debian's Chromium under Playwright): skipped where either is absent.

Signs in, generates, stops in the middle, adds a document that appears as a neighbor and goes when it is deleted; no
console error, no request to another host.
"""

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from interop_helpers import chat_folder
from serve_helpers import PASSWORD, Server, serving, serving_run

from retro_engine.interop.imports import import_model, write_checkpoint
from retro_engine.readers.ask import answer_of
from retro_engine.serve import ask as serve_ask
from retro_engine.serve.service import ServiceOptions, open_service

WEB = Path(__file__).resolve().parents[2] / "retro_engine" / "serve" / "web"
SHOTS = os.environ.get("RETRO_SHOTS")  # a folder for screenshots
CHROMIUM = shutil.which("chromium")


def test_the_page_is_small_and_asks_no_other_host() -> None:
    text = {path.name: path.read_text(encoding="utf-8") for path in sorted(WEB.iterdir())}
    assert sum(len(content.splitlines()) for content in text.values()) < 1600
    for name, content in text.items():
        assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w", content.replace("http://www.w3.org/2000/svg", "")), name
        assert not re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", content
        ), name
    assert not re.findall(r"<script(?! type=\"module\" src=)|\son\w+=|style=", text["index.html"])


def test_every_field_has_a_label() -> None:
    html = (WEB / "index.html").read_text(encoding="utf-8")
    labels = set(re.findall(r'<label for="([\w-]+)"', html))
    for tag in re.findall(r"<(?:input|select|textarea)[^>]*>", html):
        (identifier,) = re.findall(r'id="([\w-]+)"', tag)
        assert identifier in labels or re.search(rf"<label[^>]*><input[^>]*id=\"{identifier}\"", html), identifier


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is absent")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_run(small_run, tmp_path_factory.mktemp("site")) as server:
        server.state.accounts.add_user("ada", PASSWORD, "admin")
        server.state.accounts.add_user("reader", PASSWORD, "read")
        yield server


@pytest.fixture
def page(browser: Any, site: Server) -> Iterator[Any]:
    """A page whose console errors and foreign requests fail the test."""
    tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    tab.set_default_timeout(15_000)
    wrong: list[str] = []
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on(
        "request", lambda request: None if request.url.startswith((site.url, "blob:")) else wrong.append(request.url)
    )
    tab.wrong = wrong
    yield tab
    tab.context.close()
    assert wrong == []


def sign_in(page: Any, site: Server, name: str = "ada", password: str = PASSWORD) -> None:
    page.goto(site.url)
    page.fill("#name", name)
    page.fill("#password", password)
    page.press("#password", "Enter")


def both_end(page: Any) -> None:
    """The page allows no eval, so a function cannot be waited for."""
    page.locator(".state", has_text="tokens in").nth(1).wait_for()


def test_sign_in_generate_add_delete_sign_out(page: Any, site: Server) -> None:
    sign_in(page, site)
    page.wait_for_selector("#screen-playground:not([hidden])")
    page.fill("#prompt", "Nafock Wuhack grew up at the river")
    page.fill("#max-tokens", "40")
    page.press("#prompt", "Control+Enter")
    both_end(page)
    on, off = page.query_selector_all(".output")
    assert len(on.query_selector_all(".chunk")) >= 3
    assert on.query_selector_all(".neighbors li")
    assert not off.query_selector_all(".neighbors li")
    assert len(off.query_selector_all(".chunk")) == 1

    page.click("text=Documents")
    page.fill("#doc-id", "news")
    page.fill("#doc-title", "News <b>of</b> today")
    page.fill("#doc-text", "Nafock Wuhack grew up at the river Gaituchul. <script>alert(1)</script>")
    page.click("text=Add or replace")
    page.wait_for_selector("#doc-list td:has-text('news')")
    assert page.inner_text("#doc-list tbody tr td:nth-child(2)") == "News <b>of</b> today"

    page.click("text=Playground")
    page.click("#generate")
    page.wait_for_selector(".neighbors button.link:has-text('News <b>of</b> today')")
    page.click(".neighbors button.link >> nth=0")
    page.wait_for_selector("#document[open]")
    assert "<script>alert(1)</script>" in page.inner_text("#document-text")
    page.keyboard.press("Escape")

    page.click("text=Documents")
    page.click("[aria-label='Delete news']")
    page.click("#confirm-yes")
    page.wait_for_selector("#doc-list:has-text('There are no documents yet')")
    page.click("text=Playground")
    page.click("#generate")
    both_end(page)
    assert not page.query_selector(".neighbors button.link")

    page.click("#sign-out")
    page.wait_for_selector("#sign-in")
    assert page.evaluate("fetch('/v1/models').then(a => a.status)") == 401
    page.wrong[:] = [text for text in page.wrong if "401" not in text]


def test_stop_in_the_middle(page: Any, site: Server) -> None:
    sign_in(page, site)
    page.wait_for_selector("#screen-playground:not([hidden])")
    page.fill("#prompt", "river")
    page.fill("#max-tokens", "1500")
    page.fill("#temperature", "1")
    page.uncheck("#compare")
    page.click("#generate")
    page.wait_for_selector(".chunk .text:not(:empty)")
    page.click("#stop")
    page.wait_for_selector(".state:has-text('stopped')")
    page.wait_for_timeout(300)
    assert site.service.engine.stats()["running"] == 0
    length = len(page.inner_text(".output"))
    page.wait_for_timeout(300)
    assert len(page.inner_text(".output")) == length


def test_a_wrong_password_and_a_reader(page: Any, site: Server) -> None:
    sign_in(page, site, password="wrong password")
    page.wait_for_selector("#sign-in-error:has-text('wrong')")
    assert page.is_hidden("#tabs")
    page.wrong[:] = [text for text in page.wrong if "401" not in text]
    sign_in(page, site, "reader")
    page.click("text=Documents")
    page.wait_for_selector("#doc-list")
    assert page.is_hidden("#writing")
    assert page.is_hidden("#reset")


def test_upload_search_retrieve_status(page: Any, site: Server, tmp_path: Path) -> None:
    (tmp_path / "note.md").write_text("A heron stands in the harbor.")
    (tmp_path / "many.jsonl").write_text('{"id": "m1", "text": "a copper lantern"}\nnonsense\n')
    sign_in(page, site)
    page.click("text=Documents")
    page.set_input_files("#files", [tmp_path / "note.md", tmp_path / "many.jsonl"])
    page.click("#upload button")
    page.wait_for_selector("#upload-state:has-text('2 documents added, 1 not used')")
    assert "many.jsonl: 1 rows not used" in page.inner_text("#upload-faults")
    page.fill("#doc-query", "heron")
    page.press("#doc-query", "Enter")
    page.wait_for_selector(".hits li:has-text('heron')")
    page.click("text=Retrieve")
    page.fill("#query", "copper lantern")
    page.select_option("#query-mode", "hybrid")
    page.click("#query-form .primary")
    page.wait_for_selector("#hits li:has-text('a copper lantern')")
    assert page.locator("#hits mark").all_inner_texts()[:2] == ["copper", "lantern"]
    assert page.is_visible("#weight-dense")
    page.click("text=Status")
    page.wait_for_selector("dd:has-text('tiny')")
    page.click("text=Documents")
    page.click("#reset")
    page.click("#confirm-yes")
    page.wait_for_selector("#doc-list:has-text('There are no documents yet')")


def test_many_files_of_which_some_are_none(page: Any, site: Server, tmp_path: Path) -> None:
    """Each is said by its name, the others go on; a server that is gone ends it, in words."""
    files = [tmp_path / f"f{number}.txt" for number in range(12)]
    for number, path in enumerate(files):
        path.write_bytes(b"\x89PNG" if number % 2 else f"A heron of {number}.".encode())
    sign_in(page, site)
    page.click("text=Documents")
    page.set_input_files("#files", files)
    page.click("#upload button")
    page.wait_for_selector("#upload-state:has-text('6 documents added, 6 not used (the first 5 are named)')")
    assert page.locator("#upload-faults li").count() == 5
    assert "'f1.txt' is a picture" in page.inner_text("#upload-faults")
    page.route("**/v1/documents", lambda route: route.abort() if route.request.method == "POST" else route.continue_())
    page.set_input_files("#files", files[:2])
    page.click("#upload button")
    page.wait_for_selector("#notice:has-text('The server does not answer')")
    assert "ended at f0.txt" in page.inner_text("#upload-state")
    page.wrong[:] = [text for text in page.wrong if "400" not in text and "ERR_FAILED" not in text]
    with site.client("admin") as client:
        client.post("/v1/documents/reset", json={"confirm": True})


def test_by_keyboard_alone(page: Any, site: Server) -> None:
    page.goto(site.url)
    page.wait_for_selector("#sign-in")
    page.wait_for_selector("#name:focus")
    page.keyboard.type("ada")
    page.keyboard.press("Tab")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_selector("#screen-playground:not([hidden])")
    seen = []
    for _ in range(14):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id"))
    assert [name for name in seen if name][:3] == ["prompt", "max-tokens", "temperature"]
    assert "generate" in seen


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits(browser: Any, site: Server, width: int, scheme: str) -> None:
    """No screen is wider than the window, and text can be read: contrast of 4.5 and more."""
    tab = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
    tab.set_default_timeout(15_000)
    tab.goto(site.url)
    tab.wait_for_selector("#sign-in")
    shoot(tab, f"sign-in-{scheme}-{width}")
    sign_in(tab, site)
    with site.client("write") as client:
        client.post(
            "/v1/documents", json={"id": "a-rather-long-id-" + "x" * 80, "title": "River", "text": "river stone " * 30}
        )
    for screen in ("playground", "documents", "retrieve", "status"):
        tab.click(f"nav >> text={screen.capitalize()}")
        tab.wait_for_selector(f"#screen-{screen}:not([hidden])")
        if screen == "playground":
            tab.fill("#prompt", "Document doc7. river stone")
            tab.click("#generate")
            both_end(tab)
        if screen == "documents":
            tab.wait_for_selector("#doc-list table")
        if screen == "retrieve":
            tab.fill("#query", "river")
            tab.click("#query-form .primary")
            tab.wait_for_selector("#hits li")
        if screen == "status":
            tab.wait_for_selector("#status-cards dl")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, screen
        assert tab.evaluate(CONTRAST) == [], screen
        if (width, scheme) in ((360, "light"), (1280, "dark")):
            check_access(tab, screen)
        shoot(tab, f"{screen}-{scheme}-{width}")
    with site.client("admin") as client:
        client.post("/v1/documents/reset", json={"confirm": True})
    tab.context.close()


def check_access(tab: Any, where: str) -> None:
    """What axe-core finds, where it is installed: nothing."""
    if AXE is None:
        return
    tab.evaluate(AXE)
    found = tab.evaluate(
        "async () => (await axe.run(document)).violations.map((one) => `${one.impact}: ${one.id}: ${one.help}`)"
    )
    assert found == [], (where, found)


def axe() -> str | None:
    spec = importlib.util.find_spec("axe_core_python")
    return None if spec is None or spec.origin is None else Path(spec.origin).with_name("axe.min.js").read_text()


AXE = axe()


def shoot(tab: Any, name: str) -> None:
    if SHOTS:
        tab.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


CONTRAST = """() => {
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const back = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] > 0) return c; } return [255, 255, 255]; };
  return [...document.querySelectorAll('main *, header *')].filter((e) => e.offsetParent && !e.disabled
      && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
    .map((e) => { const [a, b] = [light(parse(getComputedStyle(e).color)), light(back(e))].sort((x, y) => y - x); return [e.tagName + '.' + e.className, (a + .05) / (b + .05)]; })
    .filter(([, ratio]) => ratio < 4.5);
}"""


@pytest.fixture(scope="module")
def chat_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that answers everything with "The castle was", and a library."""
    folder = tmp_path_factory.mktemp("chat-site")
    source = chat_folder(folder / "hf")
    write_checkpoint(import_model(source), folder / "run", source)
    options = ServiceOptions(run=str(folder / "run"), name="castle", library=str(folder / "library"))
    with serving(lambda: open_service(options), folder) as server:
        server.state.accounts.add_user("ada", PASSWORD, "admin")
        with server.client("write") as client:
            client.post("/v1/documents", json={"id": "c", "title": "Castles", "text": "Who built the castle? Ada did."})
        yield server


def test_chat(browser: Any, chat_site: Server) -> None:
    """Turns, what each could read, an answer made anew, one that is stopped and goes on, and what a reload keeps."""
    tab = browser.new_context(viewport={"width": 360, "height": 800}).new_page()
    tab.set_default_timeout(15_000)
    sign_in(tab, chat_site)
    tab.wait_for_selector("#screen-chat:not([hidden]) #chat-empty:not([hidden])")
    tab.fill("#message", "Who built the castle?")
    tab.press("#message", "Enter")
    last = tab.locator(".turn.assistant").last
    last.locator("button", has_text="Regenerate").wait_for()
    assert last.locator(".text").inner_text() == "The castle was"
    last.locator("summary", has_text="source").first.click()
    assert last.locator(".sources button.link", has_text="Castles").is_visible()
    check_access(tab, "chat")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    shoot(tab, "chat-light-360")
    with tab.expect_response("**/v1/chat/completions") as answered:
        last.locator("button", has_text="Regenerate").click()
    assert [one["role"] for one in json.loads(answered.value.request.post_data)["messages"]] == ["user"]
    last.locator("button", has_text="Regenerate").wait_for()
    assert tab.locator(".turn").count() == 2
    tab.click("#chat-form summary")
    tab.fill("#system", "Be brief.")
    tab.fill("#chat-tokens", "2")
    tab.uncheck("#chat-reads")
    tab.fill("#message", "And then?")
    tab.click("#chat-form .primary")
    last.locator("button", has_text="Go on").wait_for()
    with tab.expect_response("**/v1/chat/completions") as answered:
        last.locator("button", has_text="Go on").click()
    asked = json.loads(answered.value.request.post_data)
    assert asked["continue_final_message"] and asked["retro"] == {"neighbors": []}
    assert [one["role"] for one in asked["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    last.locator("button", has_text="Regenerate").wait_for()
    begun = last.locator(".text").all_inner_texts()
    assert "The castle was".startswith("".join(begun)) and len(begun) == 1, "no retrieval: one part, which goes on"
    tab.reload()
    tab.wait_for_selector(".turn.assistant >> nth=1")
    tab.click("#chat-new")
    tab.click("#chat-earlier summary")
    tab.click("#chat-list button >> nth=0")
    assert tab.locator(".turn").count() == 4
    tab.click("#sign-out")
    tab.wait_for_selector("#sign-in")
    assert tab.evaluate("sessionStorage.length") == 0 and tab.locator(".turn").count() == 0
    tab.context.close()


def test_keys_and_users_are_managed(browser: Any, chat_site: Server) -> None:
    tab = browser.new_context(viewport={"width": 360, "height": 800}).new_page()
    tab.set_default_timeout(15_000)
    sign_in(tab, chat_site)
    tab.click("nav >> text=Status")
    tab.fill("#key-name", "ci")
    tab.click("#key-form button")
    tab.wait_for_selector("#connect-hint:has-text('shown this once')")
    key = re.findall(r"rk_[\w-]{20,}", tab.inner_text("#connect-code"))[0]
    assert chat_site.state.accounts.of_key(key) is not None
    tab.fill("#user-name", "bo")
    tab.fill("#user-password", "a long password")
    tab.click("#user-submit")
    tab.click("[aria-label='New password for bo']")
    tab.fill("#user-password", "another password")
    tab.select_option("#user-scope", "write")
    tab.click("#user-submit")
    tab.wait_for_selector("#user-list tr:has-text('bo'):has-text('write')")
    assert chat_site.state.accounts.sign_in("bo", "another password") is not None
    check_access(tab, "status of an admin")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.click("#connect >> text=All routes")
    tab.click("#routes summary:has-text('POST /v1/chat/completions')")
    tab.wait_for_selector("#routes details[open] strong:has-text('messages')")
    check_access(tab, "api")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360 and tab.title() == "API · retro-engine"
    shoot(tab, "api-light-360")
    tab.click("text=Back to Status")
    for kind, name in (("key", "ci"), ("user", "bo")):
        tab.click(f"[aria-label='Remove the {kind} {name}']")
        tab.click("#confirm-yes")
        tab.wait_for_selector(f"[aria-label='Remove the {kind} {name}']", state="detached")
    assert chat_site.state.accounts.of_key(key) is None
    assert tab.locator("[aria-label='Remove the user ada']").count() == 0, "nobody removes himself"
    tab.context.close()


def test_a_folder_is_dropped(browser: Any, chat_site: Server, tmp_path: Path) -> None:
    """What is in folders below it too, by their paths; what is of no kind that is read is left out and counted."""
    count = 10_000 if os.environ.get("RETRO_CAMPAIGN") else 120  # a browser tells of a hundred at a time
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "picture.png").write_bytes(b"\\x89PNG")
    for number in range(count):
        (tmp_path / "notes" / "deep" / f"n{number}.md").write_text("A heron.")
    tab = browser.new_context().new_page()
    tab.set_default_timeout(600_000 if count > 120 else 15_000)
    posted: list[str] = []

    def answered(route: Any) -> None:
        if route.request.method == "POST":
            posted.append(route.request.post_data_buffer.decode())
            route.fulfill(json={"ids": ["x"], "index_version": 1})
        else:
            route.continue_()

    tab.route("**/v1/documents*", answered)
    sign_in(tab, chat_site)
    tab.click("text=Documents")
    tab.click("#upload button[type=submit]")
    tab.wait_for_selector("#notice:has-text('Choose files or a folder first')")
    tab.set_input_files("#folder", tmp_path / "notes")
    tab.click("#upload button[type=submit]")
    said = f"{count:,} documents added. 1 files of other kinds were left out."
    tab.wait_for_selector(f"#upload-state:has-text('{said}')")
    assert len(posted) == count and any("notes/deep/n7.md" in form for form in posted)
    tab.context.close()


@pytest.fixture(scope="module")
def reading_site(reader_folder: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("reading-site")
    options = ServiceOptions(run="", reader=str(reader_folder), base=str(base), library=str(folder / "library"))
    with serving(lambda: open_service(options), folder) as server:
        server.state.accounts.add_user("ada", PASSWORD, "admin")
        yield server


def test_a_reader_is_asked_first(browser: Any, reading_site: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(reader: Any, question: str, read: Any, text: str) -> Any:
        return answer_of(reader, question, read, " 1871" if "1871" in question else " Vessel Point")

    monkeypatch.setattr(serve_ask, "answer_of", answered)
    page = browser.new_context(viewport={"width": 360, "height": 800}).new_page()
    page.set_default_timeout(15_000)
    sign_in(page, reading_site)
    page.wait_for_selector("#screen-ask:not([hidden]) #ask-empty:not([hidden])")
    check_access(page, "ask, empty")
    assert page.evaluate(
        "document.querySelector('#tabs').scrollWidth <= document.querySelector('#tabs').clientWidth"
    ), "all tabs are seen"
    page.click("#ask-example")
    page.wait_for_selector("#answer .answer-text:has-text('Vessel Point')")
    page.fill("#question", "What was built in 1871?")
    page.press("#question", "Enter")
    page.wait_for_selector("#answer mark:has-text('1871')")
    check_access(page, "ask, answered")
    shoot(page, "ask-light-360")
    page.click("#answer button.link >> nth=0")
    page.wait_for_selector("#document[open]:has-text('Marta Oden')")
    page.keyboard.press("Escape")
    page.fill("#question", "Zanzibar?")
    page.press("#question", "Enter")
    page.wait_for_selector("#answer .answer-text:has-text('do not hold the answer')")
    page.context.close()
