"""Pictures and videos in conversations: the texts of `generate`, and what is said of those that cannot be taken."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from tests.serving.pictures import about, bomb, clip, data_url, file_of, part, shade
from transformers_dsv3.serving.pictures import Pictures


@pytest.fixture
def tower_calls(joined, monkeypatch):
    """How many tiles each call of the tower got, which has kept nothing."""
    model, _ = joined
    model.__dict__.pop("_feature_cache", None)
    seen, tower = [], model.model.vision_tower.forward
    monkeypatch.setattr(
        model.model.vision_tower, "forward", lambda **given: seen.append(len(given["pixel_values"])) or tower(**given)
    )
    return seen


def generated(joined, images=None, videos=None, text="What is it?", new=12):
    model, processor = joined
    content = [{"type": "image"}] * len(images or []) + [{"type": "video"}] * len(videos or [])
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    given = {"images": images} if images else {"videos": videos}
    inputs = processor(text=prompt, **given, return_tensors="pt")
    tokens = copy.deepcopy(model).generate(**inputs, max_new_tokens=new, do_sample=False)
    count = inputs["input_ids"].shape[1]
    return processor.tokenizer.decode(tokens[0, count:], skip_special_tokens=True), count


def test_eight_at_a_time_are_told_what_generate_says(joined, picture_server):
    values = [(25 * place, 255 - 25 * place)[: 1 + place % 2] for place in range(8)]

    def ask(shades):
        return picture_server.chat(about(*shades), max_tokens=12, temperature=0)

    with ThreadPoolExecutor(10) as threads:
        word = threads.submit(picture_server.complete, "abc", max_tokens=12, temperature=0)
        answers = list(threads.map(ask, values))
    assert word.result().status == 200
    texts = []
    for shades, answer in zip(values, answers):
        assert answer.status == 200, answer.body
        text, count = generated(joined, [shade(value) for value in shades])
        assert answer.json["choices"][0]["message"]["content"] == text
        assert answer.json["usage"]["prompt_tokens"] == count
        texts.append(text)
    assert len(set(texts)) > 4


def test_a_second_question_computes_its_own_words_alone(picture_server, tower_calls):
    def ask(text):
        answer = picture_server.chat(about(77, text=text), max_tokens=2, temperature=0).json["usage"]
        return answer["prompt_tokens"], answer["prompt_tokens_details"]["cached_tokens"]

    asked, cached = ask("What is it?")
    assert tower_calls == [1]
    again, found = ask("What colour has it?")
    assert tower_calls == [1]
    assert cached < found and again - found == len("colour has it?\n")
    picture_server.chat(about(78, text="What is it?"), max_tokens=1)
    assert tower_calls == [1, 1]


def test_videos_and_files_of_all_kinds(joined, picture_server):
    video = data_url(clip(12), "video/mp4")
    content = [part(video, "video_url"), {"type": "text", "text": "What is it?"}]
    told = picture_server.chat(content, max_tokens=4, temperature=0)
    assert told.status == 200, told.body
    # Three frames, each of a tile
    assert told.json["usage"]["prompt_tokens"] == generated(joined, videos=[[shade(1)] * 3])[1]
    picture = shade(99)
    texts = set()
    for content in (
        file_of(picture),
        file_of(picture, "WEBP", lossless=True),
        file_of(picture, "GIF"),
        file_of(picture, "JPEG", quality=100),
        file_of(picture.convert("CMYK"), "JPEG"),
        file_of(shade(99, mode="RGBA")),
        file_of(shade(99, mode="L")),
        file_of(shade(99, (1, 1))),
        file_of(shade(99, (1, 200))),
    ):
        told = picture_server.chat([part(data_url(content))], max_tokens=3, temperature=0)
        assert told.status == 200, told.body
        texts.add(told.json["choices"][0]["message"]["content"])
    events = picture_server.chat(about(99), max_tokens=3, stream=True, stream_options={"include_usage": True}).events
    assert events[-1] == "[DONE]" and events[-2]["usage"]["completion_tokens"] <= 3
    n = picture_server.chat(about(99), max_tokens=2, n=2, seed=1)
    assert len(n.json["choices"]) == 2


def test_other_endpoints_know_of_pictures(picture_server):
    assert picture_server.get("/v1/models").json["data"][0]["input_modalities"] == ["text", "image", "video"]
    messages = [{"role": "user", "content": about(5)}]
    counted = picture_server.post("/tokenize", {"messages": messages})
    told = picture_server.chat(about(5), max_tokens=1).json["usage"]["prompt_tokens"]
    assert counted.json["count"] == told
    routed = [picture_server.post("/v1/routing", {"messages": [{"role": "user", "content": about(value)}]}).json
              for value in (5, 250)]  # fmt: skip
    assert routed[0]["tokens"] == told and routed[0]["layers"] != routed[1]["layers"]


URL = "messages[0].content[0].image_url.url"
MOVING = file_of(shade(1), "GIF", save_all=True, append_images=[shade(90), shade(180)])
NOISE = file_of(Image.effect_noise((64, 64), 50))


@pytest.mark.parametrize(
    ("content", "param", "reason"),
    [
        ([part("")], URL, "`data:` URL"),
        ([part("pictures/one.png")], URL, "`data:` URL"),
        ([part("file:///etc/passwd")], URL, "`data:` URL"),
        ([part("data:image/png,abc")], URL, "base64"),
        ([part("data:image/png;base64,abc")], URL, "no base64"),
        ([part("data:image/png;base64,a*cd")], URL, "no base64"),
        ([part("data:image/png;base64,äöü=")], URL, "no base64"),
        ([part("data:image/png;base64,")], URL, "no bytes"),
        ([part("data:text/html;base64,AAAA")], URL, "of type text/html"),
        ([part(data_url(b"nothing"))], URL, "no picture of PNG, JPEG, WEBP, GIF"),
        ([part(data_url(b"\x00" * 20_001))], URL, "larger than 20,000 bytes"),
        ([part(data_url(NOISE[: len(NOISE) // 2]))], URL, "cannot be decoded"),
        ([part(data_url(MOVING))], URL, "it moves"),
        ([part(data_url(bomb()))], URL, "too many pixels"),
        ([part(data_url(bomb(101, 100)))], URL, "101 x 100 pixels are more than a request's 10,000"),
        ([part(data_url(file_of(shade(1), "BMP")), "image_url")], URL, "no picture of"),
        ([part("https://images.example/a.png")], URL, "fetches nothing"),
        ([part(7)], URL, "a string"),
        ([{"type": "image_url"}], "messages[0].content[0].image_url", "missing"),
        ([{"type": "image_url", "image_url": data_url(NOISE)}], "messages[0].content[0].image_url", "an object"),
        ([{"type": "image_url", "image_url": {"url": "", "detail": "x"}}], URL[:-3] + "detail", "one of auto"),
        ([{"type": "input_audio"}], "messages[0].content[0].type", "reads text, image_url, video_url"),
        ([{"type": "text", "text": "<IMG_CONTEXT>"}], "messages[0].content[0].text", "stands for a picture"),
        ("<video>", "messages[0].content", "stands for a picture"),
        (about(*range(5)), "messages[0].content[4].image_url", "may have 4 pictures"),
        ([part(data_url(file_of(shade(1, (80, 80)))))] * 2, URL.replace("[0].i", "[1].i"), "3,600 are left"),
        ([part(data_url(b"nothing"), "video_url")], "messages[0].content[0].video_url.url", "of type image/png"),
        ([part(data_url(b"#EXTM3U\n/etc/passwd", "video/mp4"), "video_url")],
         "messages[0].content[0].video_url.url", "no video of MP4"),
        ([part(data_url(b"\0\0\0\0ftypisom", "video/mp4"), "video_url")],
         "messages[0].content[0].video_url.url", "no video that can be taken"),
        ([part(data_url(clip(20, (256, 256)), "video/mp4"), "video_url")],
         "messages[0].content[0].video_url.url", "frames of 256 x 256 pixels are more than"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_named(picture_server, tower_calls, content, param, reason):
    answer = picture_server.chat(content, max_tokens=2)
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param and reason in answer.error["message"], answer.error
    assert "/tmp" not in answer.error["message"] and not tower_calls


def test_pictures_belong_to_users_and_to_models_that_read_them(picture_server, echo):
    messages = [{"role": "assistant", "content": about(1)}, {"role": "user", "content": "Hello"}]
    answer = picture_server.post("/v1/chat/completions", {"messages": messages})
    assert answer.status == 400 and answer.error["param"] == "messages[0].content[0].type"
    answer = echo.chat(about(1), max_tokens=2)
    assert answer.status == 400 and answer.error["param"] == "messages[0].content[0].type"
    assert "is 'image_url': this model reads text and nothing else" in answer.error["message"]
    assert echo.get("/v1/models").json["data"][0]["input_modalities"] == ["text"]


def test_a_prompt_that_is_too_long_is_refused_before_the_tower(picture_server, tower_calls):
    answer = picture_server.chat(about(1, text="a" * 600), max_tokens=2)
    assert answer.status == 400 and answer.error["code"] == "context_length_exceeded"
    assert not tower_calls


def test_a_template_that_knows_texts_alone(joined, serve, picture_server, tmp_path):
    """Pictures get their places all the same."""
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}")
    pictures = Pictures(*joined, picture_server.service.pictures.limits)
    client = serve(picture_server.engine, template_file=tmp_path / "plain.jinja", pictures=pictures)
    assert not client.service.conversations.writes_parts and picture_server.service.conversations.writes_parts
    answer = client.chat(about(1), max_tokens=2)
    assert answer.status == 200, answer.body
    # A tile between its marks
    assert answer.json["usage"]["prompt_tokens"] == len("user: \nWhat is it?") + 4 + 2


def test_too_many_that_wait_are_sent_away(picture_server, monkeypatch):
    monkeypatch.setattr("transformers_dsv3.serving.pictures.WAITING", 0)
    answer = picture_server.chat(about(1), max_tokens=2)
    assert answer.status == 429 and answer.headers["Retry-After"]
    assert picture_server.chat("Hello", max_tokens=2).status == 200


def test_the_openai_package_sends_pictures(joined, picture_server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{picture_server.address}/v1", api_key="none", max_retries=0)
    told = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": about(42)}], max_tokens=12, temperature=0
    )
    assert told.choices[0].message.content == generated(joined, [shade(42)])[0]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": [part("https://images.example/a.png")]}]
        )
    assert caught.value.param == URL
