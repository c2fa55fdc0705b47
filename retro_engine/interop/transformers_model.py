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
from retro_engine.errors import MissingExtraError
from retro_engine.generate.sampling import Sampling, choose
from retro_engine.model.decoding import decode
from retro_engine.model.retro import RetroModel

try:
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput
except ImportError as error:
    raise MissingExtraError(
        "transformers is not installed", "RetroForCausalLM is one of its models", "pip install 'retro-engine[hf]'"
    ) from error

MODEL_TYPE = "retro_engine_hf"


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


class RetroForCausalLM(PreTrainedModel):
    """`forward` takes neighbors [b, l, k, r] as RetroModel does; `generate` takes those of the prompt, [b, k, r]."""

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
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ) -> Tensor:
        """input_ids [b, n] with what follows, padded on the right. neighbors [b, k, r] act from each prompt's last token on.

        attention_mask 0 = padding on the left. Searches with beams and the like are not there: an argument that is not
        known is a TypeError.
        """
        is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, is_token)]
        stops = eos_token_id if eos_token_id is not None else self.config.eos_token_id
        stop_ids = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
        pad = next((i for i in (pad_token_id, self.config.pad_token_id, *stop_ids) if i is not None), 0)
        sampling, generator = (
            Sampling(not do_sample, temperature, top_k, top_p, seed),
            torch.Generator().manual_seed(seed),
        )
        answers = decode(
            self.model,
            prompts,
            neighbors,
            neighbor_lengths,
            max_new_tokens,
            stop_ids,
            pad,
            lambda logits: torch.tensor([choose(row.cpu(), sampling, generator) for row in logits]),
        )
        answers = [row + stop_ids[:1] if len(row) < max_new_tokens else row for row in answers]
        longest = max(map(len, answers))
        padded = torch.tensor([row + [pad] * (longest - len(row)) for row in answers], device=input_ids.device)
        return torch.cat((input_ids, padded.long()), 1)


AutoConfig.register(MODEL_TYPE, RetroConfig)
AutoModelForCausalLM.register(RetroConfig, RetroForCausalLM)
