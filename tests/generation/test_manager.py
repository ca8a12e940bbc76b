"""Transformers' entries to continuous batching, as their scripts call them: texts are those of `generate`."""

import asyncio
import inspect

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import RequestStatus

from transformers_dsv3.generation.manager import ContinuousBatching
from transformers_dsv3.generation.requests import RequestError


PROMPTS = [[5, 9, 3], list(range(40)), [7], [5, 9, 3, 4, 4]]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(eos_token_id=None)


def greedy(new=6, **fields):
    return GenerationConfig(max_new_tokens=new, do_sample=False, **fields)


def alone(model, prompt, new=6, **options):
    prompt = torch.tensor([prompt])
    return model.generate(prompt, max_new_tokens=new, do_sample=False, **options)[0, prompt.shape[1] :].tolist()


def test_generate_batch(model):
    outputs = model.generate_batch(PROMPTS, generation_config=greedy(), record_timestamps=True)
    assert [each.generated_tokens for each in outputs.values()] == [alone(model, prompt) for prompt in PROMPTS]
    for prompt, output in zip(PROMPTS, outputs.values()):
        assert output.is_finished() and output.status == RequestStatus.FINISHED and output.error is None
        assert output.prompt_ids == prompt and len(output.timestamps) == 6
        assert 0 < output.created_time <= output.lifespan[0] <= output.lifespan[1]


def test_paged_generate(model):
    tokens = torch.tensor([PROMPTS[3], PROMPTS[3]])
    outputs = model.generate(tokens, cache_implementation="paged", generation_config=greedy())
    assert outputs[0].tolist() == 2 * [PROMPTS[3] + alone(model, PROMPTS[3])]


def test_ends_of_sequence_are_the_configs(model):
    whole = alone(model, PROMPTS[0])
    ending = model.generate_batch([PROMPTS[0]], generation_config=greedy(eos_token_id=[whole[2], 1]))
    first = next(iter(ending.values())).generated_tokens
    assert first == whole[: whole.index(whole[2]) + 1]


def test_a_config_decides_how_tokens_are_drawn(model):
    """Of a prompt's sequences `generate_batch` of the oldest releases returns the first alone."""
    sampled = GenerationConfig(
        max_new_tokens=20, do_sample=True, temperature=1.5, top_k=3, repetition_penalty=1.1, num_return_sequences=2
    )
    batching = ContinuousBatchingConfig(seed=4, return_logprobs=True)
    runs = [list(model.generate_batch([PROMPTS[0]] * 2, sampled, batching).values()) for _ in range(2)]
    texts = [[each.generated_tokens for each in sorted(run, key=lambda each: each.request_id)] for run in runs]
    returned = 4 if "__child#" in inspect.getsource(type(model).generate_batch) else 2
    assert texts[0] == texts[1] and len(set(map(tuple, texts[0]))) == returned
    assert all(len(each.logprobs) == 20 and max(each.logprobs) < 0 for each in runs[0])


def test_sequences_of_one_prompt(model):
    manager = model.init_continuous_batching(
        GenerationConfig(max_new_tokens=3, do_sample=True, num_return_sequences=3)
    )
    manager.start()
    name = manager.add_request(PROMPTS[0])
    found = {manager.get_result(timeout=60).request_id for _ in range(3)}
    assert found == {name, f"{name}__child#0", f"{name}__child#1"}
    manager.stop()


def test_settings_that_cannot_go_with_it(model):
    with pytest.raises(ValueError, match="num_beams"):
        model.generate_batch(PROMPTS, greedy(num_beams=2))
    with pytest.raises(ValueError, match="stop_strings"):
        model.generate_batch(PROMPTS, greedy(stop_strings=["a"]))
    strict = ContinuousBatchingConfig(drop_unsupported_processors=False)
    with pytest.raises(ValueError, match="NoRepeatNGram"):
        model.generate_batch(PROMPTS, greedy(no_repeat_ngram_size=2), strict)
    assert len(model.generate_batch([[1]], greedy(no_repeat_ngram_size=2))) == 1  # left out, with a warning


def test_a_request_that_cannot_be_served_fails_alone(model):
    outputs = list(model.generate_batch([[1], list(range(90)) * 30, [95], [96]], greedy()).values())
    assert [each.status for each in outputs] == [3, 4, 3, 4]
    assert "`prompt`" in outputs[1].error and "`prompt` has 96" in outputs[3].error


def test_more_tokens_than_fit_are_as_many_as_fit(model):
    batching = ContinuousBatchingConfig(num_blocks=1, **{_size_name(): 64})
    output = next(iter(model.generate_batch([[1, 2]], greedy(10**9), batching).values()))
    assert len(output.generated_tokens) == 63 and output.error is None


def _size_name():
    """Of the field that was renamed."""
    return "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"


def test_managers_are_kept_where_that_is_asked_for(make_model):
    model = make_model(eos_token_id=None)
    for _ in range(2):
        outputs = model.generate_batch([PROMPTS[1]], greedy(), persistent_manager=True)
        assert next(iter(outputs.values())).generated_tokens == alone(model, PROMPTS[1])
    kept = model.init_continuous_batching()
    assert isinstance(kept, ContinuousBatching) and not kept.is_running()
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
        model.model.embed_tokens.weight.neg_()
    outputs = model.generate_batch([PROMPTS[1]], greedy(), persistent_manager=True)
    assert next(iter(outputs.values())).generated_tokens == alone(model, PROMPTS[1])  # of the weights of now
    model.destroy_cached_continuous_batching_manager()
    assert model.init_continuous_batching() is not kept


def test_streams_as_a_server_reads_them(model):
    """`transformers serve` registers its handler behind the request, and waits in an event loop."""
    manager = model.init_continuous_batching(greedy())
    manager.start()

    async def read():
        ended, lengths, name = asyncio.Event(), [], "mine"

        def take(output):
            lengths.append(len(output.generated_tokens))
            if output.is_finished():
                ended.set()

        manager.add_request(PROMPTS[0], request_id=name, streaming=True, eos_token_id=None)
        await asyncio.sleep(0.05)
        manager.register_result_handler(name, take)
        await asyncio.wait_for(ended.wait(), 60)
        return lengths

    assert asyncio.run(read()) == [1, 2, 3, 4, 5, 6]
    assert manager.background_thread_status.fatal_error is None
    assert manager.batch_processor.scheduler.running == []
    manager.stop(block=True, timeout=2)
    assert not manager.is_running()


def test_transformers_server_serves_by_it(model, byte_tokenizer):
    """What `transformers serve --continuous-batching` does with a request, streamed and not, and with a wrong one."""
    pytest.importorskip("fastapi")
    from transformers.cli.serving.utils import CBGenerateManager

    serving = CBGenerateManager()
    serving.init_cb(model, greedy())
    inputs, prompt = {"input_ids": PROMPTS[0]}, PROMPTS[0]
    expected = byte_tokenizer.decode(alone(model, prompt), skip_special_tokens=True)

    async def run():
        answers = [
            serving.generate_non_streaming(model, byte_tokenizer, inputs, greedy(), str(place)) for place in range(3)
        ]
        for text, length, tokens in await asyncio.wait_for(asyncio.gather(*answers), 60):
            assert (text, length, tokens) == (expected, 3, alone(model, prompt))
        queue, streamer = serving.generate_streaming(model, byte_tokenizer, inputs, greedy(), "streamed")
        parts = []
        while (part := await asyncio.wait_for(queue.get(), 60)) is not None:
            parts.append(part)
        # The server's own stream keeps a last character back that is not whole
        assert expected.startswith("".join(parts)) and streamer.total_tokens == 6
        with pytest.raises(RuntimeError, match="`prompt`"):
            await serving.generate_non_streaming(model, byte_tokenizer, {"input_ids": [96]}, greedy(), "wrong")

    asyncio.run(run())
    assert serving.is_alive() and not serving.scheduler.running
    serving.stop()


def test_requests_of_their_own_settings(model):
    manager = model.init_continuous_batching(greedy())
    manager.start()
    manager.add_request(PROMPTS[0], "own", max_new_tokens=3, temperature=2.0, seed=1)
    manager.add_request(PROMPTS[0], "plain", max_new_tokens=3)
    manager.add_request(PROMPTS[0], "wrong", beam=3)
    manager.add_request(PROMPTS[0], "ended", eos_token_id=alone(model, PROMPTS[0])[0])
    results = {name: next(iter(manager.request_id_iter(name))) for name in ("own", "plain", "wrong", "ended")}
    assert results["plain"].generated_tokens == alone(model, PROMPTS[0], 3)
    assert "`beam`" in results["wrong"].error
    assert len(results["ended"].generated_tokens) == 1
    manager.add_request([1], "long", max_new_tokens=1000)
    manager.cancel_request("long")
    assert len(next(iter(manager.request_id_iter("long"))).generated_tokens) < 1000
    assert manager.get_result(timeout=0.01) is None
    manager.destroy()
    manager.destroy()
    assert list(manager) == []


def test_a_name_that_is_taken_takes_nobodys_answer(model):
    manager = model.init_continuous_batching(greedy())
    manager.start()
    manager.add_request([1], "mine", max_new_tokens=1000)
    with pytest.raises(RequestError, match="`request_id`"):
        manager.add_request([2], "mine")
    manager.cancel_request("mine")
    results = list(manager.request_id_iter("mine"))
    assert len(results) == 1 and results[0].prompt_ids == [1] and results[0].error is None
    manager.stop()


def test_what_was_not_started_gives_errors(model):
    manager = model.init_continuous_batching(greedy())
    name = manager.add_request([1])
    assert "not started" in manager.get_result(name).error
    assert manager.get_result(name) is None
    manager.stop()
