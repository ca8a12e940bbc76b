"""Requests with pictures in the engine beside `generate`: the same texts, and pages of the same pictures alone."""

import copy

import pytest
import torch
from clients import ask
from transformers.models.kimi_k25 import configuration_kimi_k25

import transformers_dsv3
from transformers_dsv3.generation.engine import Engine
from transformers_dsv3.generation.pictures import features_of, with_pictures
from transformers_dsv3.generation.requests import Request, RequestError
from transformers_dsv3.generation.settings import EngineSettings
from transformers_dsv3.models.dsv3.decoding_dsv3 import Decoding
from transformers_dsv3.models.joined.kimi import Kimi_K25ForConditionalGeneration

from .conftest import IMAGE, TILE


NEW = 10
# Of all layers of the small model, in fp32
PAGE_BYTES = 2 * 4 * 24 * 4


@pytest.fixture(scope="module")
def model(make_joined):
    return make_joined(vocab_size=96)


@pytest.fixture
def start():
    """Function from a model and settings to an engine that runs, and is ended with nothing left in its pages."""
    engines = []

    def run(model, **settings):
        settings = {"cache_bytes": 2**20, "page_size": 4, "max_batch_tokens": 32, "max_running": 8, **settings}
        engines.append(Engine(model.causal_lm, settings=EngineSettings(**settings)))
        engines[-1].start()
        return engines[-1]

    yield run
    for engine in engines:
        engine.stop()
        assert engine.statistics().pages_used == 0


@pytest.fixture
def tower_calls(model, monkeypatch):
    """How many tiles each call of the tower got, which has kept nothing."""
    model.__dict__.pop("_feature_cache", None)
    seen, tower = [], model.model.vision_tower.forward
    monkeypatch.setattr(
        model.model.vision_tower, "forward", lambda **given: seen.append(len(given["pixel_values"])) or tower(**given)
    )
    return seen


def conversations(count, seed=0):
    """Prompts with one, two, three or no tiles, which begin alike, and their pixels."""
    generator = torch.Generator().manual_seed(seed)
    same = torch.randint(3, IMAGE, (6,), generator=generator).tolist()
    found = []
    for place in range(count):
        tiles = place % 4
        words = torch.randint(3, IMAGE, (5 * tiles + 7,), generator=generator).tolist()
        prompt = same[: 6 - place % 3]
        for tile in range(tiles):
            prompt += [IMAGE] * TILE + words[5 * tile : 5 * tile + 5]
        pixels = torch.randn(tiles, 3, 16, 16, generator=generator) if tiles else None
        found.append((prompt + words[-7:], {} if pixels is None else {"pixel_values": pixels}))
    return found


def alone(model, prompt, pictures, new=NEW):
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return model.generate(ids, **pictures, max_new_tokens=new, **options)[0, len(prompt) :].tolist()


def asked(engine, model, prompt, pictures, name="a", **fields):
    tokens, features = with_pictures(model, prompt, pictures)
    fields = {"max_new_tokens": NEW, "ignore_eos": True, **fields}
    return ask(engine, tokens, name, features=features, **fields)


@pytest.mark.parametrize(
    "settings",
    [
        {"page_size": 32, "max_batch_tokens": 256},
        {"page_size": 16, "max_batch_tokens": 5, "max_running": 2},
        {"cache_bytes": PAGE_BYTES * 30, "max_batch_tokens": 256, "max_running": 16},
    ],
    ids=["whole prompts", "cut inside pictures", "too few pages"],
)
def test_texts_are_generates_with_and_without_pictures(model, start, tower_calls, settings, monkeypatch):
    program, compiled = Decoding.run_pages, []

    def run_pages(self, *arguments):
        compiled.append(program(self, *arguments))
        return compiled[-1]

    monkeypatch.setattr(Decoding, "run_pages", run_pages)
    prompts = conversations(11)
    copied = copy.deepcopy(model)
    expected = [alone(copied, *conversation) for conversation in prompts]
    tower_calls.clear()
    engine = start(model, **settings)
    answers = [asked(engine, model, *each, name=str(place)) for place, each in enumerate(prompts)]
    assert [answer.wait().tokens for answer in answers] == expected
    assert tower_calls == [1, 2, 3, 1, 2, 3, 1, 2]  # once, however often pages were taken
    assert len({tuple(text) for text in expected}) > 6
    # The compiled step takes pages of a multiple of 16 tokens
    assert all((output is not None) == (settings.get("page_size", 4) % 16 == 0) for output in compiled)
    assert bool(engine.statistics().preemptions) == ("cache_bytes" in settings)


def test_pages_are_shared_by_the_same_pictures_alone(model, start, tower_calls):
    engine = start(model)
    (prompt, pictures), *_ = conversations(4)[2:]
    first = asked(engine, model, prompt, pictures).wait()
    calls = len(tower_calls)
    again = asked(engine, model, prompt, pictures).wait()
    assert len(tower_calls) == calls  # a second question: no tower, and one token to be computed
    assert (first.last.cached_tokens, again.last.cached_tokens) == (0, len(prompt) - 1)
    assert again.tokens == first.tokens == alone(copy.deepcopy(model), prompt, pictures)

    other = pictures["pixel_values"].clone()
    other[1] += 0.5
    changed = asked(engine, model, prompt, {"pixel_values": other}).wait()
    second = prompt.index(IMAGE, prompt.index(IMAGE) + TILE)
    assert changed.last.cached_tokens == second  # up to the picture that differs
    assert changed.tokens == alone(copy.deepcopy(model), prompt, {"pixel_values": other})
    words = ask(engine, prompt, max_new_tokens=NEW, ignore_eos=True).wait()  # the same ids, of no picture
    assert words.last.cached_tokens == prompt.index(IMAGE)
    salted = asked(engine, model, prompt, pictures, cache_salt="tenant").wait()
    assert salted.last.cached_tokens == 0 and salted.tokens == first.tokens

    longer = [*prompt, *first.tokens, 5, *[IMAGE] * TILE, 6]
    more = {"pixel_values": torch.cat([pictures["pixel_values"], other[1:]])}
    third = asked(engine, model, longer, more).wait()
    assert third.last.cached_tokens == len(prompt) + NEW - 1
    assert third.tokens == alone(copy.deepcopy(model), longer, more)


def test_rounded_text_under_pictures(make_joined, start):
    wider = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32}
    model = transformers_dsv3.quantize(make_joined(vocab_size=96, v_head_dim=16, **wider), bits=4)
    engine, prompts = start(model), conversations(5)
    answers = [asked(engine, model, *each, name=str(place)) for place, each in enumerate(prompts)]
    assert [answer.wait().tokens for answer in answers] == [alone(model, *each) for each in prompts]


def test_kimis_pictures_and_videos(tiny_config, start):
    image, video = 200, 91  # the former is beyond the vocabulary, as placeholders may be
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 1}
    sizes = {"patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4}
    config = configuration_kimi_k25.Kimi_K25Config(
        text_config=tiny_config(), vision_config=vision | sizes, image_token_id=image, video_token_id=video,
        projection_hidden_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Kimi_K25ForConditionalGeneration._from_config(config).eval()
    prompt = [3, 4, *[image] * 4, 5, *[video] * 2, 6, 7]
    pictures = {
        "pixel_values": torch.randn(16, 3, 4, 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": torch.randn(24, 3, 4, 4),
        "video_grid_thw": torch.tensor([[3, 2, 4]]),
    }
    engine = start(model)
    assert asked(engine, model, prompt, pictures).wait().tokens == alone(model, prompt, pictures)
    tokens, features = with_pictures(model, prompt, pictures)
    assert features.places == (2, 3, 4, 5, 7, 8) and max(tokens) < 96


def test_the_manager_takes_pictures(model):
    prompts = conversations(3)
    manager = model.init_continuous_batching()
    manager.start()
    try:
        names = manager.add_requests(
            [prompt for prompt, _ in prompts], NEW, eos_token_id=-1, pictures=[given for _, given in prompts]
        )
        told = {name: manager.get_result(name, timeout=60).generated_tokens for name in names}
        wrong = manager.add_request([1, 2], "wrong", pictures=prompts[1][1])
        assert "`pictures` do not fit" in manager.get_result(wrong, timeout=60).error
    finally:
        manager.stop()
    assert list(told.values()) == [alone(model, *each) for each in prompts]
    text = transformers_dsv3.DeepseekV3ForCausalLM(model.config.text_config).init_continuous_batching()
    text.start()
    text.add_request([1, 2], "blind", pictures=prompts[1][1])
    assert "reads text alone" in text.get_result("blind", timeout=60).error
    text.stop()


def test_features_that_do_not_fit_are_refused(model, start):
    engine = start(model)
    for rows, reason in (
        (torch.zeros(2, 8), r"of shape \(2, 8\)"),
        (torch.zeros(2, 32, dtype=torch.bfloat16), "bfloat16"),
    ):
        with pytest.raises(RequestError, match=f"`features` are .*{reason}"):
            ask(engine, [1, 2, 3], features=features_of([0, 1], rows))
    for places, reason in (([1, 0], "do not ascend"), ([0], "not as many"), ([1, 3], "place 3 of a prompt of 3")):
        with pytest.raises(RequestError, match=reason):
            Request("a", (1, 2, 3), features=features_of(places, torch.zeros(2, 32)))
    with pytest.raises(RequestError, match="`pictures` do not fit: .*has 3 tokens .* take 4"):
        with_pictures(model, [IMAGE] * 3, {"pixel_values": torch.zeros(1, 3, 16, 16)})
    unsound = features_of([1], torch.full((1, 32), torch.nan))
    assert ask(engine, [1, 2, 3], features=unsound).wait().last.finish_reason == "error"
    assert ask(engine, [1, 2, 3]).wait().last.finish_reason == "length"
