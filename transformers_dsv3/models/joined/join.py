"""Joins a vision tower to a language model: a checkpoint of a type that others open."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from ..dsv3.modeling_dsv3 import DeepseekV3ForCausalLM
from . import layout_internvl, layout_llava
from .towers import tower_of


# Makes texts of messages whose content is a list, before a template that knows texts alone; PICTURE is a token
_CONTENT_AS_TEXT = (
    "{%- set ns = namespace(messages=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string or message['content'] is none -%}"
    "{%- set ns.messages = ns.messages + [message] -%}"
    "{%- else -%}"
    "{%- set ns.text = '' -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set ns.text = ns.text + 'PICTURE\\n' -%}"
    "{%- elif part['type'] == 'video' -%}{%- set ns.text = ns.text + '<video>\\n' -%}"
    "{%- elif part['type'] == 'text' -%}{%- set ns.text = ns.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set ns.messages = ns.messages + [dict(message, content=ns.text)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = ns.messages -%}"
)
# Of a tokenizer without one: texts behind each other
_PLAIN = "{%- for message in messages -%}{{ message['content'] + '\\n' }}{%- endfor -%}"


def join(vision: Any, text: Any, tokenizer: Any = None, tiles: int = 1) -> tuple[Any, Any]:
    """A model of a vision tower and a language model, with a new projector between them, and its processor.

    Saved (`model.save_pretrained(folder)`, `processor.save_pretrained(folder)`) it is an official checkpoint: of type
    `internvl` with InternVL's tower, of type `llava` with CLIP's or SigLIP's, which no `internvl` checkpoint can hold.
    The projector is random: train it before answers about pictures mean anything. Tower, decoder and head are those
    that were given, not copies, in the text's dtype; embedding and head get rows for the new tokens.

    Args:
        vision: an `InternVLVisionModel`, `CLIPVisionModel` or `SiglipVisionModel`, a folder with one or with a CLIP or
            SigLIP of both towers, or a folder with an `internvl` or `llava` checkpoint of any text, whose tower is
            taken.
        text: a [`DeepseekV3ForCausalLM`] or a folder with one.
        tokenizer: of the text; from its folder unless given.
        tiles: the most parts that a picture is cut into, each of the tower's size: the processor's `max_patches`. 1
            shows every picture once. Only with InternVL's tower.

    Returns:
        The model, a [`InternVLForConditionalGeneration`] or [`LlavaForConditionalGeneration`] in evaluation mode, and
        its processor.

    Raises:
        ValueError: naming the argument, for another kind of tower or text, a folder that lacks weights of the tower,
            and for a text without a tokenizer.
    """
    if tiles < 1:
        raise ValueError(f"`tiles={tiles}`: a picture has at least one part.")
    language = _language(text)
    tower = tower_of(vision)
    layout: Any = layout_internvl if isinstance(tower, InternVLVisionModel) else layout_llava
    if tiles > 1 and layout is layout_llava:
        raise ValueError(f"`tiles={tiles}`: a picture is one part in a `llava` checkpoint, which holds this tower.")
    tokenizer = _with_tokens(text, tokenizer, layout.TOKENS)
    embedding = language.get_input_embeddings()
    if len(tokenizer) > embedding.num_embeddings:
        language.resize_token_embeddings(len(tokenizer))
    config = layout.config_of(tower, language.config, tokenizer)
    with torch.device("meta"):
        model = layout.MODEL(config)
    projector = type(model.model.multi_modal_projector)(config)
    for layer in projector.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=language.config.initializer_range)
            nn.init.zeros_(layer.bias)
    model.config.text_config, model.config.vision_config = language.config, tower.config
    model.model.config = model.config
    model.model.vision_tower, model.model.language_model = tower.to(language.dtype), language.model
    model.model.multi_modal_projector, model.lm_head = projector.to(language.device, language.dtype), language.lm_head
    model.generation_config = language.generation_config
    model.config.dtype = language.dtype
    template = _CONTENT_AS_TEXT.replace("PICTURE", layout.PICTURE) + (tokenizer.chat_template or _PLAIN)
    return model.eval(), layout.processor_of(vision, config, tokenizer, template, tiles)


def _language(text: Any) -> DeepseekV3ForCausalLM:
    if isinstance(text, DeepseekV3ForCausalLM):
        return text
    if isinstance(text, PreTrainedModel):
        raise ValueError(f"`text`: a {type(text).__name__} is no DeepseekV3ForCausalLM of transformers_dsv3.")
    config = AutoConfig.from_pretrained(text)
    if config.model_type not in ("deepseek_v3", "kimi_k2"):
        raise ValueError(
            f"`text={os.fspath(text)!r}`: a model of type {config.model_type}, not deepseek_v3 or kimi_k2."
        )
    return DeepseekV3ForCausalLM.from_pretrained(text, config=config, dtype="auto")


def _with_tokens(text: Any, tokenizer: Any, tokens: dict[str, str]) -> Any:
    """A copy of the tokenizer that has the tokens of pictures, by the names that the processor asks for."""
    if tokenizer is None:
        if isinstance(text, PreTrainedModel):
            raise ValueError("`tokenizer`: give the text's, which a model does not know.")
        tokenizer = AutoTokenizer.from_pretrained(text)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, extra_special_tokens=tokens)


__all__ = ["join"]
