"""The dashboard in docs/deploy asks for names that /metrics of a server has."""

import json
import re
from pathlib import Path

from serve_helpers import Server, post

DASHBOARD = Path(__file__).parents[2] / "docs" / "deploy" / "grafana-dashboard.json"
WORDS = {  # of the language of questions, and labels
    "by", "sum", "rate", "changes", "histogram_quantile", "le", "status", "outcome", "finished_reason", "instance", "label_values",
}  # fmt: skip


def test_the_dashboard_asks_for_what_there_is(server: Server) -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [one["query"]["query"] for one in dashboard["templating"]["list"] if isinstance(one["query"], dict)]
    named = {name for text in asked for name in re.findall(r"[a-zA-Z_][\w:]*", re.sub(r'"[^"]*"|\[[^]]*\]', "", text))}
    assert len(named - WORDS) > 15
    assert post(server, "/v1/completions", prompt="river", max_tokens=3, stream=True).status_code == 200
    with server.client(None) as client:
        assert client.post("/auth/login", json={"name": "nobody", "password": "x" * 12}).status_code == 401
        text = client.get("/metrics").text
    found = set(re.findall(r"^([a-zA-Z_][\w:]*)[{ ]", text, re.MULTILINE))
    assert named - WORDS <= found, sorted(named - WORDS - found)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})
