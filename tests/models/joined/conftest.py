"""Small models of pictures and text, and native's classes of the same weights."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText, InternVLConfig
from transformers.models.internvl import configuration_internvl

from transformers_dsv3.models.joined.internvl import InternVLForConditionalGeneration


VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": [16, 16],
    "patch_size": [4, 4],
    "use_qk_norm": True,
}
IMAGE, TILE = 90, 4  # the token that stands for pictures, and how many of it a tile takes


@pytest.fixture(scope="session")
def small_tower():
    """Config of a tower of one layer, for pictures of 16 x 16 pixels."""
    return configuration_internvl.InternVLVisionConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[16, 16],
        patch_size=[4, 4],
    )


@pytest.fixture(scope="session")
def joined_config(tiny_config):
    """Function from changed fields of the text to a small `InternVLConfig`."""

    def make(tied=False, **fields):
        text = tiny_config(tie_word_embeddings=tied, **fields)
        return InternVLConfig(
            vision_config=copy.deepcopy(VISION),
            text_config=text,
            image_token_id=IMAGE,
            image_seq_length=TILE,
            tie_word_embeddings=tied,
        )

    return make


@pytest.fixture(scope="session")
def make_joined(joined_config):
    """Function from changed fields of the text to a small joined model in evaluation mode."""

    def make(tied=False, seed=0, **fields):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration._from_config(joined_config(tied, **fields))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                if name.endswith(("norm.weight", "norm_before.weight", "norm_after.weight")):
                    tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
                elif name.endswith((".bias", "position_embeddings", "cls_token")):
                    tensor.normal_(0.0, 0.1, generator=generator)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def native_of():
    """Function from a folder to native's model of it."""

    def load(folder):
        import transformers_dsv3

        transformers_dsv3.unregister()
        try:
            return AutoModelForImageTextToText.from_pretrained(folder).eval()
        finally:
            transformers_dsv3.register()

    return load


@pytest.fixture
def prompt():
    """Two rows of 14 tokens: the first with two tiles, the second padded on the left, with one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, IMAGE, (2, 14), generator=generator)
    ids[0, 2:6] = ids[0, 7:11] = ids[1, 6:10] = IMAGE
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    pixels = torch.randn(3, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
