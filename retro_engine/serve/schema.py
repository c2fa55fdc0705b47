"""`GET /openapi.json`: the routes, what each takes and which scope, as an OpenAPI 3.1 document for clients and fuzzers."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from retro_engine.serve import (
    access,
    ask,
    documents,
    explain,
    messages,
    native,
    nemo,
    openai,
    rerank,
    responses,
    tokens,
    vector_stores,
)

BODIES: dict[tuple[str, str], tuple[type[BaseModel], ...]] = {  # any one of the forms
    ("POST", "/v1/completions"): (openai.Completion,),
    ("POST", "/completion"): (native.NativeCompletion,),
    ("POST", "/v1/chat/completions"): (openai.Chat,),
    ("POST", "/v1/responses"): (responses.Create,),
    ("POST", "/v1/messages"): (messages.CreateMessage,),
    ("POST", "/v1/messages/count_tokens"): (messages.Conversation,),
    ("POST", "/v1/rerank"): (rerank.Rerank,),
    ("POST", "/rerank"): (rerank.Rerank,),
    ("POST", "/v1/embeddings"): (tokens.Embeddings,),
    ("POST", "/tokenize"): (tokens.Tokenize,),
    ("POST", "/detokenize"): (tokens.Detokenize,),
    ("POST", "/v1/explain"): (explain.Explain,),
    ("POST", "/v1/ask"): (ask.Ask,),
    ("POST", "/v1/retrieve"): (documents.Query,),
    ("POST", "/v1/documents"): (documents.NewDocument, documents.ManyDocuments),
    ("POST", "/v1/documents/reset"): (documents.Confirmation,),
    ("POST", "/v1/vector_stores"): (vector_stores.CreateStore,),
    ("POST", "/v1/vector_stores/{store:str}/files"): (vector_stores.AddFile,),
    ("POST", "/v1/vector_stores/{store:str}/files/{file:str}"): (vector_stores.NewAttributes,),
    ("POST", "/v1/vector_stores/{store:str}/search"): (vector_stores.SearchStore,),
    ("POST", "/auth/users"): (access.NewUser,),
    ("POST", "/auth/users/{name:str}"): (access.ChangedUser,),
    ("POST", "/auth/keys"): (access.NewKey,),
    ("PUT", "/generate"): (nemo.Generate,),
    ("PUT", "/knn"): (nemo.Knn,),
}
PAGES = {"after": {"type": "string"}, "limit": {"type": "integer", "minimum": 1, "maximum": 1000}}
LISTS = ("/v1/documents", "/v1/files", "/v1/vector_stores", "/v1/vector_stores/{store:str}/files")
QUERIES = dict.fromkeys(LISTS, PAGES)
FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": ["assistants", "user_data"]}},
}
DOCUMENT_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        **{name: {"type": "string"} for name in ("id", "title", "metadata")},
    },
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"]}},
}
REF = "#/components/schemas/{model}"


def describe(routes: Sequence[tuple[str, str, Any, str]]) -> dict[str, Any]:
    """The document of routes (method, path, endpoint, scope)."""
    models = list({model: None for method, path, _, _ in routes for model in BODIES.get((method, path), ())})
    names, schemas = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    paths: dict[str, dict[str, Any]] = {}
    for method, path, endpoint, scope in routes:
        forms = [names[model, "validation"] for model in BODIES.get((method, path), ())]
        operation = {
            "operationId": f"{method.lower()}_{endpoint.__name__}",
            "summary": (endpoint.__doc__ or "").strip().partition("\n")[0],
            "description": f"Takes scope {scope}.",
            "parameters": _parameters(method, path),
            "responses": {
                "202" if path.endswith("/import") else "200": {"description": "as docs/serving.md says"},
                "default": {"description": "an error", "content": _json(ERROR)},
            },
        }
        content = _json(forms[0] if len(forms) == 1 else {"anyOf": forms}) if forms else None
        if path.endswith("/import"):
            content = {"application/x-ndjson": {"schema": {"type": "string"}}}
        if (method, path) == ("POST", "/v1/files"):
            content = {"multipart/form-data": {"schema": FORM}}
        if (method, path) == ("POST", "/v1/documents") and content is not None:
            content = {**content, "multipart/form-data": {"schema": DOCUMENT_FORM}}
        if content is not None:
            operation["requestBody"] = {"required": True, "content": content}
        paths.setdefault(re.sub(r"\{(\w+):\w+\}", r"{\1}", path), {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "retro-engine", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": schemas.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _parameters(method: str, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, kind in re.findall(r"\{(\w+):(\w+)\}", path):
        schema = {"type": "integer", "minimum": 0} if kind == "int" else {"type": "string", "minLength": 1}
        found.append({"name": name, "in": "path", "required": True, "schema": schema})
    if method == "GET":
        found += [{"name": name, "in": "query", "schema": schema} for name, schema in QUERIES.get(path, {}).items()]
    return found
