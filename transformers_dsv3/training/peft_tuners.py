"""PEFT's tuners for this architecture, in PEFT's own table of them, `PEFT_TYPE_TO_TUNER_MAPPING`.

Every tuner gets a subclass, methods for prompts included. For other models these are PEFT's classes unchanged.
"""

from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType, tuners
from peft.tuners.tuners_utils import BaseTuner

from . import prefix_latents
from .lora_tuner import LoraModel
from .peft_mixins import BesideMtp, OfficialClass


class SharedPrompt:
    """PEFT asks `super()` of the class in its table, which it takes for its own, for what all tasks' prompts share."""

    def forward(self, indices: torch.Tensor, *task_ids: Any) -> torch.Tensor:
        if not task_ids:
            return super(tuners.MultitaskPromptEmbedding, self).forward(indices)  # type: ignore[misc]
        return super().forward(indices, *task_ids)  # type: ignore[misc]


def _derive(tuner: type) -> type:
    """The subclass of one of PEFT's tuners, of its name; in this module, by which models are pickled."""
    if tuner is tuners.LoraModel:
        return LoraModel
    mixins: tuple[type, ...] = (OfficialClass,)
    if issubclass(tuner, BaseTuner):
        mixins += (BesideMtp,)
    if tuner is tuners.MultitaskPromptEmbedding:
        mixins += (SharedPrompt,)
    name = tuner.__name__
    return globals().setdefault(name, type(name, (*mixins, tuner), {"__module__": __name__, "__doc__": tuner.__doc__}))


# PEFT's own, as they are when this is imported
THEIRS: dict[PeftType, type] = {
    kind: tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if hasattr(tuner, "_get_adapter_state_dict")
}
OURS: dict[PeftType, type] = {kind: _derive(tuner) for kind, tuner in THEIRS.items()}


def register() -> None:
    """Makes PEFT use the tuners of this package."""
    PEFT_TYPE_TO_TUNER_MAPPING.update(OURS)
    prefix_latents.register()


def unregister() -> None:
    """Gives PEFT its own tuners back."""
    PEFT_TYPE_TO_TUNER_MAPPING.update(THEIRS)
    prefix_latents.unregister()
