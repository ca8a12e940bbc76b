"""Joins a vision tower to a language model: an `internvl` checkpoint that others open."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl import modeling_internvl as native
from transformers.models.internvl.configuration_internvl import InternVLConfig

from ..dsv3.modeling_dsv3 import DeepseekV3ForCausalLM
from .internvl import InternVLForConditionalGeneration
from .processing_internvl import InternVLProcessor


# By the names that InternVL's processor asks a tokenizer for
TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
# Makes texts of messages whose content is a list, each picture a token, before a template that knows texts alone
_CONTENT_AS_TEXT = (
    "{%- set ns = namespace(messages=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string or message['content'] is none -%}"
    "{%- set ns.messages = ns.messages + [message] -%}"
    "{%- else -%}"
    "{%- set ns.text = '' -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set ns.text = ns.text + '<IMG_CONTEXT>\\n' -%}"
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


def join(vision: Any, text: Any, tokenizer: Any = None, tiles: int = 1) -> tuple[Any, InternVLProcessor]:
    """A model of a vision tower and a language model, with a new projector between them, and its processor.

    Saved (`model.save_pretrained(folder)`, `processor.save_pretrained(folder)`) it is an official `internvl`
    checkpoint. The projector is random: train it before answers about pictures mean anything. Tower, decoder and head
    are those that were given, not copies, in the text's dtype; embedding and head get rows for the new tokens.

    Args:
        vision: an `InternVLVisionModel`, a folder with one, or a folder with an `internvl` checkpoint of any text,
            whose tower is taken.
        text: a [`DeepseekV3ForCausalLM`] or a folder with one.
        tokenizer: of the text; from its folder unless given.
        tiles: the most parts that a picture is cut into, each of the tower's size: the processor's `max_patches`. 1
            shows every picture once.

    Returns:
        The model, a [`InternVLForConditionalGeneration`] in evaluation mode, and its processor.

    Raises:
        ValueError: naming the argument, for another kind of tower or text, and for a text without a tokenizer.
    """
    if tiles < 1:
        raise ValueError(f"`tiles={tiles}`: a picture has at least one part.")
    language = _language(text)
    tokenizer = _with_tokens(text, tokenizer)
    tower = _tower(vision)
    embedding = language.get_input_embeddings()
    if len(tokenizer) > embedding.num_embeddings:
        language.resize_token_embeddings(len(tokenizer))
    config = _config(tower, language, tokenizer)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    projector = native.InternVLMultiModalProjector(config)
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
    return model.eval(), _processor(vision, tower, config, tokenizer, tiles)


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


def _with_tokens(text: Any, tokenizer: Any) -> Any:
    """A copy of the tokenizer that has the tokens of pictures, under the names that the processor asks for."""
    if tokenizer is None:
        if isinstance(text, PreTrainedModel):
            raise ValueError("`tokenizer`: give the text's, which a model does not know.")
        tokenizer = AutoTokenizer.from_pretrained(text)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, extra_special_tokens=TOKENS)


def _tower(vision: Any) -> native.InternVLVisionModel:
    if isinstance(vision, native.InternVLForConditionalGeneration):
        return vision.model.vision_tower
    if isinstance(vision, native.InternVLVisionModel):
        return vision
    if isinstance(vision, PreTrainedModel):
        raise ValueError(f"`vision`: {_refusal(vision.config.model_type)}")
    config = AutoConfig.from_pretrained(vision)
    if config.model_type == "internvl_vision":
        return native.InternVLVisionModel.from_pretrained(vision, dtype="auto")
    if config.model_type == "internvl":
        prefix = {r"^(?:model\.)?vision_tower\.": ""}
        return native.InternVLVisionModel.from_pretrained(
            vision, config=config.vision_config, key_mapping=prefix, dtype="auto"
        )
    raise ValueError(f"`vision={os.fspath(vision)!r}`: {_refusal(config.model_type)}")


def _refusal(model_type: str) -> str:
    reason = "an `internvl` checkpoint, which native opens, holds InternVL's tower alone"
    if model_type.startswith("siglip"):
        reason += ", whose class token SigLIP's attention does not have"
    elif model_type.startswith("clip"):
        reason += ", without the norm that CLIP has before its first layer"
    return f"a tower of type {model_type} cannot be joined: {reason}."


def _config(tower: Any, language: DeepseekV3ForCausalLM, tokenizer: Any) -> InternVLConfig:
    vision, text = tower.config, language.config
    rows, columns = (size // patch for size, patch in zip(vision.image_size, vision.patch_size))
    if rows != columns:
        raise ValueError(f"`vision`: pictures of {rows} x {columns} patches are not square, as InternVL's have to be.")
    ratio = 1.0 if rows % 2 else 0.5
    return InternVLConfig(
        vision_config=copy.deepcopy(vision),  # copies: their attention's implementation is set anew
        text_config=copy.deepcopy(text),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=int((rows * ratio) ** 2),
        downsample_ratio=ratio,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def _processor(vision: Any, tower: Any, config: InternVLConfig, tokenizer: Any, tiles: int) -> InternVLProcessor:
    height, width = tower.config.image_size
    size = {"height": height, "width": width}
    known = isinstance(vision, (str, os.PathLike)) and any(
        os.path.isfile(os.path.join(vision, name)) for name in ("preprocessor_config.json", "processor_config.json")
    )
    if known:
        images = AutoImageProcessor.from_pretrained(vision, size=size, max_patches=tiles)
    else:
        images = GotOcr2ImageProcessorPil(
            size=size, max_patches=tiles, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD
        )
    parts = {"image_processor": images, "tokenizer": tokenizer}
    if "video_processor" in InternVLProcessor.get_attributes():
        from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

        parts["video_processor"] = InternVLVideoProcessor(
            size=size, image_mean=images.image_mean, image_std=images.image_std
        )
    template = _CONTENT_AS_TEXT + (tokenizer.chat_template or _PLAIN)
    return InternVLProcessor(**parts, image_seq_length=config.image_seq_length, chat_template=template)


__all__ = ["join"]
