"""The report: complete, self-contained, escaped."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers import write_corpus

from retro_engine import cli
from retro_engine.evaluate.compare import Comparison
from retro_engine.evaluate.leakage import ChunkLosses
from retro_engine.evaluate.losses import DocumentLosses
from retro_engine.report import verdict

TINY = ["model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_attention_heads=2", "model.init=standard",
        "model.encoder_seq_length=64", "trainer.max_steps=4", "trainer.precision=32", "model.chunk_size=16",
        "model.data.splits_string='70,30,0'", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"]  # fmt: skip


class Parsed(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    source = write_corpus(folder / "c.jsonl", 30)
    source.write_text(source.read_text().replace("Title", "<script>alert(1)</script>"))
    store = f"model.data.store={folder}/s"
    assert cli.main(["prepare", str(source), "--out", f"{folder}/s", "--vocab-size", "300", "--chunk-size", "16"]) == 0
    assert cli.main(["build", f"{folder}/s"]) == 0
    for name, more in (("retro", []), ("plain", ["model.retrieval=false"])):
        assert cli.main(["train", "--preset", "tiny", "--out", f"{folder}/{name}", store, *TINY, *more]) == 0
    assert cli.main(["report", f"{folder}/retro", "--against", f"plain={folder}/plain"]) == 0
    assert cli.main(["report", f"{folder}/plain"]) == 0
    assert "A plain decoder" in (folder / "plain" / "report.html").read_text()
    assert cli.main(["report", f"{folder}/no"]) == 3
    assert cli.main(["report", f"{folder}/retro", "--limit", "0"]) == 2
    assert cli.main(["report", f"{folder}/retro", "--against", f"x={folder}/retro"]) == 2, "no plain decoder"
    other = "model.data.splits_string='60,40,0'"
    assert (
        cli.main(
            ["train", "--preset", "tiny", "--out", f"{folder}/other", store, *TINY, "model.retrieval=false", other]
        )
        == 0
    )
    assert cli.main(["report", f"{folder}/retro", "--against", f"x={folder}/other"]) == 3, "trained on other documents"
    assert cli.main(["report", f"{folder}/retro", "--against", "plain"]) == 3, "no such run"
    assert cli.main(["report", f"{folder}/retro", "--against", f"off={folder}/plain"]) == 2, "a name that is taken"
    return (folder / "retro" / "report.html").read_text()


def test_it_is_whole(page: str) -> None:
    parsed = Parsed()
    parsed.feed(page)
    assert parsed.open == []
    for heading in (
        "What retrieval gives",
        "Gain by overlap",
        "FLOPs of this run against plain: training",
        "Training",
        "Neighbors",
        "What it read",
        "Throughput and memory",
        "Environment",
    ):
        assert heading in parsed.text
    assert re.search(r"Retrieval (pays|costs|makes no measurable difference)", parsed.text)
    assert re.search(r"% \(95 % interval \[.*\], over 9 documents, the valid share\)", parsed.text)
    assert page.count("<details") > 10
    assert page.count("<details open>") == 2, "of the samples, and of what neighbors changed, the first"
    assert page.count("<polyline") == 3
    samples, _, explained = page.partition('id="what-each-neighbor-changed"')
    assert samples.count('class="chunk"') == 5
    assert 1 <= explained.count('class="chunk"') <= 5
    assert "color-mix" in explained
    assert "nats in all" in explained
    assert "<mark>" in page
    assert "retro report" in parsed.text


def test_a_gain_over_another_run_than_a_plain_one_alike_is_not_called_retrievals() -> None:
    of = {
        name: DocumentLosses(np.full(9, nats), np.full(9, 4), np.full(9, 8)) for name, nats in (("on", 1.0), ("a", 2.0))
    }
    compared = Comparison(of, ChunkLosses(np.ones(0), np.ones(0), {}, 0, {}))
    assert verdict(compared, {"a": {}}, "test").startswith("Retrieval pays: 50.0%")
    other = verdict(compared, {"a": {"steps": [120, 6], "lr": [3e-3, 2e-3]}}, "test")
    assert "50.0% (95 % interval [50.0%, 50.0%], over 9 documents, the test share) fewer bits" in other
    assert "not of retrieval alone, for they differ in more: steps 120 / 6, lr 0.003 / 0.002." in other


def test_it_needs_nothing_else_and_runs_nothing(page: str) -> None:
    parsed = Parsed()
    parsed.feed(page)
    links = [value or "" for name, value in parsed.attributes if name in ("src", "href", "onload", "onclick")]
    places = {value for name, value in parsed.attributes if name == "id"}
    assert len(links) == 9
    assert {f"#{place}" for place in places} == {*links}, "the contents, and nothing else"
    assert "<script" not in page.replace("&lt;script", "")
    assert "&lt;script&gt;" in page, "titles are text"
    assert "http" not in page


def test_an_imported_model_has_no_run_to_report_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "COMPLETE").write_text("{}")
    (tmp_path / "trainer.json").write_text('{"step": 0, "imported": "hf"}')
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "was imported" in capsys.readouterr().err


def test_it_is_read_on_a_phone(page: str, tmp_path: Path) -> None:
    """At 360 px nothing is wider than the page but what scrolls in it."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is absent")
    (tmp_path / "page.html").write_text(page)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 360, "height": 640})
        view.goto((tmp_path / "page.html").as_uri())
        assert view.evaluate("document.documentElement.scrollWidth") == 360
        scrolls = "[...document.querySelectorAll('.scroll')].filter(each => each.scrollWidth > each.clientWidth).length"
        assert view.evaluate(scrolls) > 1
        assert view.evaluate("document.documentElement.scrollHeight") < 6000
        browser.close()
