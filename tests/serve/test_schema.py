"""The OpenAPI document is of the routes there are, and what it allows (and what it does not) never makes a 5xx."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance
from serve_helpers import Server, serving_run, with_letters

from retro_engine.serve.app import NEMO_ROUTES, ROUTES
from retro_engine.serve.bounds import Limits
from retro_engine.serve.schema import BODIES, describe

DOCUMENT = describe([*ROUTES, *NEMO_ROUTES])
OPERATIONS = [  # schemathesis cannot make JSON lines: test_documents.py sends odd ones
    (method.upper(), path)
    for path, methods in DOCUMENT["paths"].items()
    for method in methods
    if not path.endswith("/import")
]
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def small(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = Limits(new_tokens=4, prompt_tokens=100, choices=2)
    with with_letters(), serving_run(small_run, tmp_path_factory.mktemp("schema"), limits, has_nemo=True) as server:
        yield server


@pytest.fixture(scope="module")
def document(small: Server) -> Any:
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    schema.config.update(base_url=small.url)
    return schema


def test_a_job_number_that_no_table_holds(small: Server) -> None:
    """Found by the test below."""
    with small.client() as client:
        assert client.get(f"/v1/jobs/{1 << 70}").status_code == 404


def test_it_is_of_the_routes_there_are(small: Server) -> None:
    with small.client("read") as client:
        document = client.get("/openapi.json").json()
    operations = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert len(operations) == len(ROUTES) + len(NEMO_ROUTES)
    taking = {(method, path) for method, path, _, _ in [*ROUTES, *NEMO_ROUTES] if method in ("POST", "PUT")}
    assert taking - set(BODIES) == {("POST", "/v1/documents/import"), ("POST", "/v1/files")}
    names = set(document["components"]["schemas"])
    assert {"Completion", "Chat", "NewDocument", "RetroOptions"} <= names
    assert document["paths"]["/v1/documents/{id}"]["get"]["parameters"][0]["in"] == "path"


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_it_allows_is_never_a_server_error(method: str, path: str, document: Any, small: Server) -> None:
    headers = {"Authorization": f"Bearer {small.keys['admin']}"}

    @settings(
        max_examples=300 if os.environ.get("RETRO_CAMPAIGN") else 8,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(document[path][method].as_strategy())
    def check(case: Any) -> None:
        case.validate_response(case.call(headers=headers, timeout=60), checks=CHECKS)

    check()
