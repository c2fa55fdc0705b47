"""`GET /props`, in llama.cpp's form: what its page and its clients ask before they ask for anything else."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from retro_engine.generate.sampling import Sampling
from retro_engine.serve.prompts import check_model_name
from retro_engine.serve.request_context import service_of
from retro_engine.serve.service import Service
from retro_engine.version import __version__

OFF = {  # ways of llama.cpp to choose a token that are not here, as it writes them when they do nothing
    "repeat_last_n": 64, "typical_p": 1.0, "typ_p": 1.0, "xtc_probability": 0.0, "xtc_threshold": 0.1, "dynatemp_range": 0.0,
    "dynatemp_exponent": 1.0, "dry_multiplier": 0.0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1, "mirostat": 0,
}  # fmt: skip


async def props(request: Request) -> Response:
    """The model, how it samples when nothing is said, and its chat template. `model`: one of its names."""
    service = service_of(request)
    check_model_name(service, request.query_params.get("model", service.name))
    template, engine = service.chat.template if service.chat is not None else None, service.engine
    return JSONResponse(
        {
            "default_generation_settings": {"n_ctx": engine.max_tokens, "params": _sampling(service)},
            "total_slots": engine.max_batch,
            "model_alias": service.name,
            "model_path": service.name,
            "modalities": {"vision": False, "audio": False},
            "chat_template": template or "",
            "build_info": f"retro-engine {__version__}",
        }
    )


def _sampling(service: Service) -> dict[str, Any]:
    usual = Sampling(**service.defaults)
    shared = ("top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty")
    return {
        "temperature": 0.0 if usual.greedy else usual.temperature,
        **{name: getattr(usual, name) for name in shared},
        "repeat_penalty": usual.repetition_penalty,
        "max_tokens": -1,
        "stream": True,
        "samplers": ["top_k", "top_p", "min_p", "temperature"],
        **OFF,
    }
