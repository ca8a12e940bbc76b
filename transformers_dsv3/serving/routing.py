"""Where the routers send the tokens of one text: how often each expert of each layer was chosen.

Shape suffixes: S tokens, E routed experts, K experts chosen a token, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

from ..generation.requests import Features
from ..models.dsv3.modeling_dsv3 import DeepseekV3ForCausalLM


# Of one call: a text is run through the model beside the engine's batches
TOKENS_LIMIT = 2048


def language_model(model: Any) -> DeepseekV3ForCausalLM | None:
    """The model of this package that a model is, or holds."""
    return next((module for module in model.modules() if isinstance(module, DeepseekV3ForCausalLM)), None)


@torch.inference_mode()
def expert_counts(
    model: DeepseekV3ForCausalLM, tokens: tuple[int, ...], features: Features | None = None, left_out: int = 0
) -> list[dict[str, Any]]:
    """Runs a text through the layers and asks each mixture's router what it chooses.

    Routers are asked beside the layers, which stay as they are: a hook would make the engine's steps slower.

    Args:
        features: of pictures in the prompt that begins so many tokens, `left_out`, before these.

    Returns:
        For each mixture-of-experts layer its number, and for each expert how many of the tokens chose it.
    """
    decoder = model.model
    ids_1S = torch.tensor([tokens], device=decoder.embed_tokens.weight.device)
    embeds_1SD = decoder.embed_tokens(ids_1S)
    if features is not None:
        shown = [row for row, place in enumerate(features.places) if place >= left_out]
        places_F = torch.tensor([features.places[row] - left_out for row in shown], device=ids_1S.device)
        embeds_1SD = embeds_1SD.index_copy(1, places_F.long(), features.rows[shown][None])
    beginning = decoder.begin(inputs_embeds=embeds_1SD, use_cache=False)
    hidden_1SD = beginning.inputs_embeds
    layers = []
    for number, layer in enumerate(decoder.layers[: model.config.num_hidden_layers]):
        hidden_1SD = layer.attend(hidden_1SD, **beginning.layer_inputs)
        if number in model.config.moe_layers:
            _, _, chosen_SK = layer.mlp.gate(layer.post_attention_layernorm(hidden_1SD))
            counts_E = torch.bincount(chosen_SK.flatten().cpu(), minlength=model.config.n_routed_experts)
            layers.append({"layer": number, "tokens_per_expert": counts_E.tolist()})
        hidden_1SD = layer.feed_forward(hidden_1SD)
    return layers
