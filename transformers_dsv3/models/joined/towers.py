"""Vision towers that [`join`] takes, from models, and from folders of them or of what has one."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from transformers import AutoConfig, PreTrainedModel


# By the type of a tower: native's module and class
TOWERS = {
    "internvl_vision": ("internvl", "InternVLVisionModel"),
    "clip_vision_model": ("clip", "CLIPVisionModel"),
    "siglip_vision_model": ("siglip", "SiglipVisionModel"),
}
# Types of models that have such towers beside another part, and what becomes of the names there
_IN_TOWER = {r"^(?:model\.)?vision_tower\.": ""}
_AROUND = {"internvl": _IN_TOWER, "llava": _IN_TOWER, "clip": None, "siglip": None}


def has_image_processor(vision: Any) -> bool:
    """Whether what a tower was given by is a folder with an image processor."""
    names = ("preprocessor_config.json", "processor_config.json")
    return isinstance(vision, (str, os.PathLike)) and any(os.path.isfile(os.path.join(vision, name)) for name in names)


def tower_of(vision: Any) -> Any:
    """The tower of a model, or of a folder, as native's class of its type.

    Raises:
        ValueError: naming `vision`, for one of another type, and for a folder that lacks some of its weights.
    """
    classes = ", ".join(name for _, name in TOWERS.values())
    if isinstance(vision, PreTrainedModel):
        tower: Any = vision
        for name in ("model", "vision_tower"):
            tower = getattr(tower, name, tower)
        if TOWERS.get(tower.config.model_type, ("", ""))[1] != type(tower).__name__:
            raise ValueError(f"`vision`: a {type(tower).__name__} cannot be joined; what can is one of {classes}.")
        return tower
    named = f"`vision={os.fspath(vision)!r}`"
    config, renamed = AutoConfig.from_pretrained(vision), None
    if config.model_type in _AROUND:
        renamed, config = _AROUND[config.model_type], config.vision_config
    if config.model_type not in TOWERS:
        raise ValueError(
            f"{named}: a tower of type {config.model_type} cannot be joined; what can is one of {classes}."
        )
    module, name = TOWERS[config.model_type]
    tower_class = getattr(import_module(f"transformers.models.{module}.modeling_{module}"), name)
    tower, info = tower_class.from_pretrained(
        vision, config=config, key_mapping=renamed, dtype="auto", output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{named} lacks {len(missing)} tensors of a {name}, such as {missing[0]}.")
    return tower
