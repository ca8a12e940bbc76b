"""The engine beside `generate`: the same texts in any company, and one request's errors are its own."""

import random
import threading

import peft
import pytest
import torch
from clients import ask

from transformers_dsv3.generation import engine as engine_module
from transformers_dsv3.generation.engine import Engine, EngineStopped
from transformers_dsv3.generation.requests import QueueFull, RequestError
from transformers_dsv3.generation.settings import EngineSettings


SMALL = EngineSettings(cache_bytes=2**20, page_size=4, max_batch_tokens=32, max_running=8)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(vocab_size=258, eos_token_id=257)


@pytest.fixture
def start():
    """Function from what an engine is made of to one that runs, and is ended with nothing left in its pages."""
    engines = []

    def run(*arguments, **fields):
        engine = Engine(*arguments, **fields)
        engine.start()
        engines.append(engine)
        return engine

    yield run
    for engine in engines:
        engine.stop()
        statistics = engine.statistics()
        assert statistics.pages_used == statistics.running == statistics.waiting == 0
        assert not engine._known


@pytest.fixture(scope="module")
def engine(model, byte_tokenizer):
    engine = Engine(model, byte_tokenizer, SMALL)
    engine.start()
    yield engine
    engine.stop()


def alone(model, prompt, new, **options):
    """What `generate` gives to a prompt by itself."""
    prompt = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, **options}
    return model.generate(prompt, max_new_tokens=new, **options)[0, prompt.shape[1] :].tolist()


def prompts_of(count, longest=40, seed=0):
    random_ = random.Random(seed)
    shared = [random_.randrange(256) for _ in range(longest // 2)]
    prompts = [[random_.randrange(256) for _ in range(random_.randint(1, longest))] for _ in range(count)]
    return [(shared + prompt)[:longest] if place % 3 == 0 else prompt for place, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    "settings",
    [
        SMALL,
        EngineSettings(cache_bytes=2**20, page_size=32),
        EngineSettings(cache_bytes=2**20, page_size=3, max_batch_tokens=5, max_running=2),
        EngineSettings(cache_bytes=2 * 4 * 24 * 4 * 18, page_size=4, max_batch_tokens=64, max_running=16),
    ],
    ids=["small", "one step a prompt", "many steps a prompt", "too few pages"],
)
def test_texts_are_generates_in_any_company(model, start, settings):
    prompts, new = prompts_of(12), [3 + place % 20 for place in range(12)]
    engine = start(model, settings=settings)
    answers = {}
    order = list(range(12))
    random.Random(1).shuffle(order)
    for place in order:
        answers[place] = ask(engine, prompts[place], str(place), max_new_tokens=new[place], ignore_eos=True)
        if place % 4 == 0:
            answers[place].wait()  # some come while others are continued
    for place, answer in answers.items():
        assert answer.wait().tokens == alone(model, prompts[place], new[place])
        assert answer.last.finish_reason == "length" and answer.last.prompt_tokens == len(prompts[place])
    statistics = engine.statistics()
    assert statistics.generated_tokens == sum(new) and statistics.finished == {"length": 12}


def test_texts_whose_pages_were_taken_go_on(model, start):
    """Four begin at once, on pages that suffice for their prompts and not for their texts."""
    engine = start(model, settings=EngineSettings(cache_bytes=2 * 4 * 24 * 4 * 18, page_size=4))
    assert engine.statistics().pages_total == 18
    prompts = [[place, *range(10)] for place in range(4)]
    begun, release = held(model)
    try:
        answers = [ask(engine, [200], "first", max_new_tokens=1)]
        assert begun.wait(60)
        answers += [ask(engine, prompt, str(prompt[0]), max_new_tokens=40, ignore_eos=True) for prompt in prompts]
    finally:
        release()
    for prompt, answer in zip(prompts, answers[1:]):
        assert answer.wait().tokens == alone(model, prompt, 40)
    assert engine.statistics().preemptions > 0


def test_prefixes_are_found_and_change_nothing(model, start):
    engine = start(model, settings=SMALL)
    prompt = prompts_of(1)[0]
    first, again = (ask(engine, prompt, name).wait() for name in ("a", "b"))
    salted = ask(engine, prompt, "c", cache_salt="tenant").wait()
    assert first.tokens == again.tokens == salted.tokens == alone(model, prompt, 8)
    assert (first.last.cached_tokens, salted.last.cached_tokens) == (0, 0)
    assert again.last.cached_tokens == len(prompt) - 1
    conversation = [*prompt, *first.tokens, 1, 2]
    longer = ask(engine, conversation, "d").wait()
    assert longer.last.cached_tokens == len(prompt) + 7  # the last token was drawn and never computed
    assert longer.tokens == alone(model, conversation, 8)
    assert engine.statistics().cached_tokens == again.last.cached_tokens + longer.last.cached_tokens


def test_draws_of_a_seed_are_those_it_has_alone(model, engine):
    prompts = prompts_of(6)
    asked = [{"seed": place, "temperature": 1.5, "max_new_tokens": 12} for place in range(6)]
    asked[2]["top_k"], asked[3]["top_p"], asked[4]["repetition_penalty"] = 20, 0.8, 1.2
    together = [
        ask(engine, prompt, str(place), **fields) for place, (prompt, fields) in enumerate(zip(prompts, asked))
    ]
    together = [answer.wait().tokens for answer in together]
    single = [ask(engine, prompt, **fields).wait().tokens for prompt, fields in zip(prompts, asked)]
    assert together == single
    unseeded = [ask(engine, prompts[0], temperature=1.5).wait().tokens for _ in range(3)]
    assert len(set(map(tuple, unseeded))) > 1


class TestEnds:
    @pytest.fixture
    def text(self, model):
        """A prompt, and what follows it, of which two tokens that differ are used to end it."""
        for prompt in prompts_of(20, seed=3):
            prompt = [*prompt, 65]  # no part of a character
            tokens = alone(model, prompt, 12)
            if tokens[4] not in tokens[:4] and len(set(tokens)) > 6:
                return prompt, tokens
        raise AssertionError("no text is varied enough")

    def test_ends_of_sequence(self, model, engine, text):
        prompt, tokens = text
        try:
            model.generation_config.eos_token_id = [tokens[4], 3]
            ending = Engine(model, settings=SMALL)
        finally:
            model.generation_config.eos_token_id = 257
        ending.start()
        answer = ask(ending, prompt, max_new_tokens=12).wait()
        assert answer.tokens == tokens[:5]
        assert (answer.last.finish_reason, answer.last.stop_reason) == ("stop", None)
        assert ask(ending, prompt, max_new_tokens=12, ignore_eos=True).wait().tokens == tokens
        later = ask(ending, prompt, max_new_tokens=12, min_new_tokens=6).wait()
        assert len(later.tokens) >= 6 and tokens[4] not in later.tokens[:6]
        ending.stop()

    def test_stop_tokens(self, engine, text):
        prompt, tokens = text
        answer = ask(engine, prompt, stop_token_ids=(tokens[4],)).wait()
        assert answer.tokens == tokens[:5] and answer.last.stop_reason == tokens[4]

    def test_stop_strings(self, engine, text, byte_tokenizer):
        prompt, tokens = text
        whole = ask(engine, prompt, max_new_tokens=12).wait()
        assert whole.text == byte_tokenizer.decode(tokens)
        stop = whole.text[3:5]
        answer = ask(engine, prompt, max_new_tokens=12, stop=("never", stop)).wait()
        assert (answer.last.finish_reason, answer.last.stop_reason) == ("stop", stop)
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert len(answer.tokens) < 12

    def test_text_ends_by_length(self, engine, text):
        assert ask(engine, text[0], max_new_tokens=1).wait().last.finish_reason == "length"


def test_logprobs_are_the_models(model, engine):
    prompt = prompts_of(1, longest=60)[0] + list(range(40))  # computed in parts
    answer = ask(engine, prompt, logprobs=2, prompt_logprobs=1, max_new_tokens=4).wait()
    tokens = torch.tensor([*prompt, *answer.tokens])
    with torch.no_grad():
        expected = model(tokens[None]).logits[0].log_softmax(dim=-1)
    of_prompt, *rest = answer.outputs[0].prompt_logprobs
    assert of_prompt is None and len(rest) == len(prompt) - 1
    told = [*rest, *(logprobs for output in answer.outputs for logprobs in output.logprobs)]
    for place, logprobs in enumerate(told):
        assert logprobs.token == int(tokens[place + 1])
        assert logprobs.logprob == pytest.approx(float(expected[place, tokens[place + 1]]), abs=1e-4)
        assert logprobs.top[0][1] == pytest.approx(float(expected[place].max()), abs=1e-4)
    assert all(output.prompt_logprobs is None for output in answer.outputs[1:])


class Breaks:
    """A grammar that raises at the third token."""

    def __init__(self):
        self.tokens = 0

    def allow(self, scores):
        pass

    def accept(self, token):
        self.tokens += 1
        if self.tokens == 3:
            raise RuntimeError("this grammar is broken")

    def finished(self):
        return False


class OnlyFive(Breaks):
    """Five times the same token."""

    def allow(self, scores):
        scores[:5], scores[6:] = -torch.inf, -torch.inf

    def accept(self, token):
        self.tokens += 1

    def finished(self):
        return self.tokens == 5


class TestErrors:
    """Of one request, beside others that are answered."""

    @pytest.fixture
    def beside(self, model, engine):
        prompt = prompts_of(3)[1]
        answers = [ask(engine, prompt, f"beside {place}", max_new_tokens=12) for place in range(2)]
        yield
        for answer in answers:
            assert answer.wait().tokens == alone(model, prompt, 12)
        assert engine.failure is None and engine.statistics().pages_used == 0

    def test_a_grammar(self, engine, beside):
        answer = ask(engine, [1, 2, 3], constraint=Breaks()).wait()
        assert len(answer.tokens) == 2
        assert (answer.last.finish_reason, answer.last.error) == ("error", "this grammar is broken")
        assert ask(engine, [1, 2, 3], constraint=OnlyFive()).wait().tokens == [5] * 5

    def test_a_grammar_that_cannot_tell_whether_it_is_done(self, engine, beside):
        class Unsure(OnlyFive):
            def finished(self):
                raise RuntimeError("who knows")

        answer = ask(engine, [1, 2, 3], constraint=Unsure()).wait()
        assert (answer.last.finish_reason, answer.last.error) == ("error", "who knows")

    def test_a_tokenizer(self, model, byte_tokenizer, start):
        """At a token of one request, and again at its end."""
        engine = start(model, byte_tokenizer, settings=SMALL)
        decode = engine._decode

        def broken(ids):
            if 5 in ids:
                raise ValueError("5 is no token")
            return decode(ids)

        engine._decode = broken
        wrong = ask(engine, [1, 2, 3], "wrong", constraint=OnlyFive())
        right = ask(engine, [1, 2, 3], "right", logit_bias={5: -100})
        assert (wrong.wait().last.finish_reason, wrong.last.error) == ("error", "5 is no token")
        assert right.wait().last.finish_reason == "length"

    def test_logits_that_are_not_finite(self, model, engine, beside):
        poison = list(range(100, 120))
        with torch.no_grad():
            weight = model.model.embed_tokens.weight
            before = weight[119].clone()
            weight[119] = torch.nan
        answer = ask(engine, poison).wait()
        assert answer.last.finish_reason == "error" and "finite" in answer.last.error
        with torch.no_grad():
            weight[119] = before
        healed = ask(engine, poison).wait()  # finds nothing of what was computed before
        assert healed.last.cached_tokens == 0 and healed.tokens == alone(model, poison, 8)

    def test_a_pass_that_raises(self, model, engine, beside):
        def refuse(module, arguments):
            if (arguments[0] == 77).any():
                raise RuntimeError("77 is too much")

        hook = model.model.embed_tokens.register_forward_pre_hook(refuse)
        answer = ask(engine, [1, 77, 2]).wait()
        hook.remove()
        assert (answer.last.finish_reason, answer.last.error) == ("error", "77 is too much")

    def test_a_client_that_raises(self, engine, beside):
        from transformers_dsv3.generation.requests import Request, SamplingSettings

        told = threading.Event()

        def gone(output):
            told.set()
            raise ConnectionError("the client is gone")

        engine.submit(Request("gone", (1, 2), SamplingSettings(max_new_tokens=10**3)), gone)
        assert told.wait(60)
        after = ask(engine, [1, 2], "gone again")
        assert after.wait().last.finish_reason == "length"

    @pytest.mark.parametrize(
        ("field", "asked"),
        [
            ("prompt", {"prompt": [258]}),
            ("prompt", {"prompt": [-1]}),
            ("prompt", {"prompt": list(range(100)) * 25}),
            ("max_new_tokens", {"max_new_tokens": 10**9}),
            ("stop_token_ids", {"stop_token_ids": (300,)}),
            ("logit_bias", {"logit_bias": {258: 1.0}}),
            ("adapter", {"adapter": "none"}),
        ],
    )
    def test_what_can_never_be_served(self, engine, field, asked):
        with pytest.raises(RequestError, match=f"`{field}`"):
            ask(engine, **{"prompt": [1], **asked})


def test_stop_strings_need_a_tokenizer(model):
    with pytest.raises(RequestError, match="`stop`"):
        ask(Engine(model, settings=SMALL), [1], stop=("a",))


def held(model):
    """Holds the model's passes up until it is let go, so that requests are as far as a test needs them."""
    begun, go = threading.Event(), threading.Event()

    def wait(module, arguments):
        begun.set()
        assert go.wait(120)

    hook = model.model.embed_tokens.register_forward_pre_hook(wait)

    def release():
        go.set()
        hook.remove()

    return begun, release


def test_queues_are_bounded_and_names_are_unique(model, start):
    engine = start(model, settings=EngineSettings(cache_bytes=2**20, max_running=1, max_waiting=2))
    begun, release = held(model)
    try:
        answers = [ask(engine, [1], "0")]
        assert begun.wait(60)
        answers += [ask(engine, [1], str(place)) for place in (1, 2)]
        with pytest.raises(RequestError, match="`request_id`"):
            ask(engine, [1], "0")
        with pytest.raises(QueueFull) as full:
            ask(engine, [1], "3")
        assert full.value.waiting == 2 and full.value.retry_after >= 1
    finally:
        release()
    assert all(answer.wait().last.finish_reason == "length" for answer in answers)
    assert ask(engine, [1], "3").wait().last.finish_reason == "length"


def test_cancelling(model, start):
    engine = start(model, settings=EngineSettings(cache_bytes=2**20, max_running=1))
    begun, release = held(model)
    try:
        running = ask(engine, [1], "running", max_new_tokens=1000)
        assert begun.wait(60)
        waiting = ask(engine, [1], "waiting")
        for name in ("running", "waiting", "waiting", "nobody"):
            engine.cancel(name)
    finally:
        release()
    for answer in (running, waiting):
        assert answer.wait().last.finish_reason == "cancelled"
    assert ask(engine, [1], "running").wait().last.finish_reason == "length"
    assert engine.statistics().finished == {"cancelled": 2, "length": 1}


def test_draining_finishes_what_runs_and_stopping_does_not(model, start):
    engine = start(model, settings=SMALL)
    answers = [ask(engine, [1], str(place), max_new_tokens=30, ignore_eos=True) for place in range(10)]
    assert engine.drain(60)
    assert all(len(answer.tokens) == 30 for answer in answers)
    with pytest.raises(EngineStopped):
        ask(engine, [1])
    engine.start()
    begun, release = held(model)
    answer = ask(engine, [1], max_new_tokens=1000, ignore_eos=True)
    assert begun.wait(60)
    drained = []
    thread = threading.Thread(target=lambda: drained.append(engine.drain(0.01)))
    thread.start()
    release()
    thread.join()
    assert drained == [False] and answer.wait().last.finish_reason == "cancelled"


def test_an_engine_that_never_gets_on_is_not_taken_for_a_healthy_one(model, start, monkeypatch):
    engine = start(model, settings=SMALL)
    assert ask(engine, [1]).wait().last.finish_reason == "length"

    def broken(*arguments):
        raise RuntimeError("the model is broken")

    monkeypatch.setattr(engine_module, "forward_pages", broken)
    for _ in range(engine_module._MOST_FAILURES):
        assert ask(engine, [1]).wait().last.error == "the model is broken"
    engine._thread.join(60)
    assert not engine.is_running and str(engine.failure) == "the model is broken"
    with pytest.raises(EngineStopped) as raised:
        ask(engine, [1])
    assert raised.value.__cause__ is engine.failure


def test_a_thread_that_dies_tells_everyone(model, start, monkeypatch):
    engine = start(model, settings=SMALL)
    all_asked = threading.Event()
    monkeypatch.setattr(engine.scheduler, "done", lambda *arguments: all_asked.wait() and 1 / 0)
    answers = [ask(engine, [1], str(place)) for place in range(3)]
    all_asked.set()
    assert {answer.wait().last.finish_reason for answer in answers} == {"error"}
    engine._thread.join(60)
    assert isinstance(engine.failure, ZeroDivisionError)


def test_a_thread_that_dies_in_the_scheduler_tells_everyone(model, monkeypatch):
    """Whose lists may then be anyhow."""
    engine = Engine(model, settings=SMALL)
    monkeypatch.setattr(engine.scheduler, "plan", lambda: 1 / 0)
    monkeypatch.setattr(engine.scheduler, "remove", lambda *arguments, **fields: [].remove(arguments))
    begun, release = threading.Event(), threading.Event()
    await_work = engine._await_work
    monkeypatch.setattr(engine, "_await_work", lambda: await_work() and (begun.set(), release.wait(60)) and True)
    engine.start()
    answers = [ask(engine, [1], "0")]
    assert begun.wait(60)
    answers += [ask(engine, [1], str(place)) for place in (1, 2)]
    release.set()
    assert {answer.wait().last.finish_reason for answer in answers} == {"error"}
    engine._thread.join(60)
    assert isinstance(engine.failure, ZeroDivisionError)


def test_adapters_are_chosen_by_each_request(make_model, start, tmp_path, monkeypatch):
    """And one that cannot be activated is the matter of its own requests, however many there are."""
    model = make_model(vocab_size=258, eos_token_id=None)
    prompt, expected = prompts_of(1)[0], {}
    expected[None] = alone(model, prompt, 8)
    for name in ("one", "two"):
        config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["o_proj", "kv_b_proj"], init_lora_weights=False)
        tuned = peft.get_peft_model(make_model(vocab_size=258, eos_token_id=None), config)
        torch.manual_seed(len(expected))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        tuned.save_pretrained(tmp_path / name)
        expected[name] = alone(tuned.eval(), prompt, 8)
    assert len(set(map(tuple, expected.values()))) == 3
    engine = start(model, settings=SMALL, adapters={name: tmp_path / name for name in ("one", "two")})
    answers = {
        (place, name): ask(engine, prompt, f"{name} {place}", adapter=name) for place in range(2) for name in expected
    }
    for (_, name), answer in answers.items():
        assert answer.wait().tokens == expected[name]
    choose = model.set_adapter

    def set_adapter(name):
        choose("two" if name == "one" else name)
        if name == "one":
            raise RuntimeError("its file is gone")

    monkeypatch.setattr(model, "set_adapter", set_adapter)
    beside = ask(engine, prompt, "beside", adapter="two", max_new_tokens=40)
    for place in range(engine_module._MOST_FAILURES + 1):
        answer = ask(engine, prompt, f"wrong {place}", adapter="one").wait()
        assert answer.last.finish_reason == "error" and "its file is gone" in answer.last.error
    assert ask(engine, prompt, "base").wait().tokens == expected[None]
    assert beside.wait().tokens[:8] == expected["two"] and engine.failure is None
    monkeypatch.setattr(model, "set_adapter", choose)
    assert ask(engine, prompt, "again", adapter="one").wait().tokens == expected["one"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cache_bytes", 0),
        ("page_size", 0),
        ("max_running", 512),
        ("max_waiting", -1),
        ("max_sequence", 1),
        ("target_tpot", 0),
        ("target_tpot", float("nan")),
        ("max_batch_tokens", 1.5),
    ],
)
def test_settings_name_what_is_wrong(field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        EngineSettings(**{field: value})


def test_memory_is_what_was_given(model):
    page = Engine(model, settings=EngineSettings(cache_bytes=2**20, page_size=4))._pages.bytes_per_page
    engine = Engine(model, settings=EngineSettings(cache_bytes=10 * page + 1, page_size=4))
    assert engine.statistics().pages_total == 10 and engine.max_sequence == 41
    whole = Engine(model, settings=EngineSettings(max_running=2, max_sequence=100, page_size=8))
    assert whole.statistics().pages_total == 2 * 13 and whole.max_sequence == 100
    with pytest.raises(ValueError, match="`cache_bytes`"):
        Engine(model, settings=EngineSettings(cache_bytes=page - 1, page_size=4))
