"""`RetroConfig` and `RetroForCausalLM`: this model under transformers' AutoConfig and AutoModelForCausalLM.

Importing this module registers both. The classes only pass on: the network is `RetroModel`, generation is our own cached
loop (transformers changes what it hands to a model's cache between versions).
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from retro_engine.config import ModelConfig
from retro_engine.errors import extra
from retro_engine.generate.sampling import Sampling, choose
from retro_engine.model.decoding import decode
from retro_engine.model.retro import RetroModel

with extra("hf", "transformers is not installed", "RetroForCausalLM is one of its models"):
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationConfig,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import CausalLMOutput

MODEL_TYPE = "retro_engine_hf"
SAMPLED = ("temperature", "top_k", "top_p")
MEANINGLESS = ("transformers_version", "bos_token_id", "use_cache")  # in a GenerationConfig


class RetroConfig(PretrainedConfig):
    """`retro`: the fields of ModelConfig."""

    model_type = MODEL_TYPE

    def __init__(self, retro: dict[str, Any] | None = None, **kwargs: Any):
        self.retro = dict(retro or {})
        known = {item.name for item in fields(ModelConfig)}
        unknown = sorted(set(self.retro) - known)
        if unknown:
            raise ValueError(f"config.json has fields of another version: {', '.join(unknown)}")
        kwargs["tie_word_embeddings"] = False  # the network ties its own
        super().__init__(**kwargs)

    @property
    def architecture(self) -> ModelConfig:
        return ModelConfig(**self.retro)

    @property
    def vocab_size(self) -> int:
        return self.architecture.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.architecture.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.architecture.dec_num_layers


class RetroForCausalLM(PreTrainedModel, GenerationMixin):
    """`forward` takes neighbors [b, l, k, r] as RetroModel does; `generate` takes those of the prompt, [b, k, r].

    Of GenerationMixin it has the name alone, by which transformers' pipelines know that it generates.
    """

    config_class = RetroConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: RetroConfig):
        super().__init__(config)
        self.model = RetroModel(config.architecture)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """RetroModel has initialised itself."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        neighbors: Tensor | None = None,
        neighbor_lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Logits and, with labels [b, n] (-100 = none; token t is predicted at t - 1, as in transformers), the mean loss.

        attention_mask 0 = padding, neighbors None = retrieval off.
        """
        if document_ids is None and attention_mask is not None:
            document_ids = attention_mask.long() - 1
        logits = self.model(input_ids, neighbors, neighbor_lengths, document_ids)
        loss = None
        if labels is not None:
            shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), shifted.flatten())
        return CausalLMOutput(loss=loss, logits=logits) if return_dict else (loss, logits)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        neighbors: Tensor | None = None,
        neighbor_lengths: Tensor | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        max_length: int | None = None,
        generation_config: Any = None,
    ) -> Tensor:
        """input_ids [b, n] with what follows, padded on the right. neighbors [b, k, r] act from each prompt's last token on.

        attention_mask 0 = padding. What is None is as `generation_config` says, then the model's own; seed None: 0 where
        the likeliest token is taken, else torch's. Searches with beams and the like are not there: an argument or a
        setting that is not known is a TypeError.
        """
        asked = {"max_new_tokens": max_new_tokens, "max_length": max_length, "do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}  # fmt: skip
        settings = self._settings(asked, generation_config)
        count = settings.get("max_new_tokens") or 64
        if settings.get("max_length") is not None and settings.get("max_new_tokens") is None:
            count = max(1, settings["max_length"] - input_ids.shape[1])
        seed = int(torch.randint(1 << 31, ())) if seed is None and settings.get("do_sample") else seed or 0
        is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, is_token)]
        stops = settings.get("eos_token_id", self.config.eos_token_id)
        stop_ids = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
        pad = next((i for i in (settings.get("pad_token_id"), self.config.pad_token_id, *stop_ids) if i is not None), 0)
        cuts = {name: settings[name] for name in SAMPLED if settings.get(name) is not None}
        sampling = Sampling(greedy=not settings.get("do_sample", False), seed=seed, **cuts)
        generator = torch.Generator().manual_seed(seed)
        answers = decode(
            self.model,
            prompts,
            neighbors,
            neighbor_lengths,
            max_new_tokens=count,
            stop_ids=stop_ids,
            pad_id=pad,
            choose=lambda logits: torch.tensor([choose(row.cpu(), sampling, generator) for row in logits]),
        )
        answers = [row + stop_ids[:1] if len(row) < count else row for row in answers]
        longest = max(map(len, answers))
        padded = torch.tensor([row + [pad] * (longest - len(row)) for row in answers], device=input_ids.device)
        return torch.cat((input_ids, padded.long()), 1)

    def _settings(self, asked: dict[str, Any], given: Any) -> dict[str, Any]:
        """What is asked for, then what a GenerationConfig sets, then the model's own. Raises TypeError."""
        settings: dict[str, Any] = {}
        for config in (self.generation_config, given):
            if config is None:
                continue
            said = config.to_diff_dict() if isinstance(config, GenerationConfig) else dict(config)
            odd = [name for name, value in said.items() if name not in {*asked, *MEANINGLESS} and value is not None]
            if odd:
                raise TypeError(f"RetroForCausalLM.generate has no {', '.join(odd)}")
            settings |= {name: value for name, value in said.items() if name in asked and value is not None}
        chosen = {name: value for name, value in asked.items() if value is not None}
        settings |= chosen
        if not settings.get("do_sample"):  # as in transformers, what a config says of sampling then means nothing
            settings = {name: value for name, value in settings.items() if name not in SAMPLED or name in chosen}
        return settings


AutoConfig.register(MODEL_TYPE, RetroConfig)
AutoModelForCausalLM.register(RetroConfig, RetroForCausalLM)
