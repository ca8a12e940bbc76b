"""A grammar of mistakes: requests as broken clients, bad networks and curious people send them."""

import json
import random
import string

from tests.serving.pictures import bomb, clip, data_url, file_of, part, shade


SURROGATE = "\ud800"
PICTURE = file_of(shade(7))
MOVING = file_of(shade(1), "GIF", save_all=True, append_images=[shade(90), shade(180)])
VIDEO = clip(6)
MEDIA = [
    PICTURE, PICTURE[: len(PICTURE) // 2], PICTURE[:30], b"", b"\x00" * 50, b"\x89PNG\r\n\x1a\n", MOVING, bomb(),
    bomb(20_000, 1), bomb(0, 0), file_of(shade(3, mode="CMYK"), "JPEG"), file_of(shade(3, mode="1")),
    file_of(shade(3, (1, 1)), "WEBP"), file_of(shade(3), "TIFF"), VIDEO, VIDEO[:200],
    b"\0\0\0\0ftypisom" + b"\xff" * 99,
    b"\x1a\x45\xdf\xa3" * 9, b"RIFF\0\0\0\0AVI " * 3, b"RIFF\xff\xff\xff\xffWEBPVP8 ", b"#EXTM3U\nfile:///etc/passwd",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a\xff\xff\xff\xff",
]  # fmt: skip
URLS = [
    "", "data:", "data:,", "data:image/png;base64", "data:image/png;base64,%%%", "data:image/png;base64,=", "http://",
    "http://127.0.0.1:1/a.png", "http://169.254.169.254/", "file:///etc/passwd", "https://[::1", SURROGATE, "a" * 5000,
]  # fmt: skip
SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "integer"}}},
    {"type": "nothing"},
    {"$ref": "#/nowhere"},
    {"$ref": "#"},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "pattern": "(?=a)b"},
    {"type": "string", "minLength": 10**7},
    {"type": "array", "minItems": 10**9, "items": {"type": "null"}},
    {"enum": []},
    {"properties": 5},
    5,
    [],
    "",
]
REGEXES = ["[0-9]{3}", "(", "a{1000000}", "(a|b)*c{500}", "\\p{Nope}", "[z-a]", "(?i)x", ""]
GRAMMARS = ['start: "a"', "start: b", "start: start", 'start: "a" start', "", "%json {", "start: /(/"]


class Mistakes:
    """Draws requests; `send` gives what came back, or None where nothing has to.

    Args:
        client: of the tests. seed: of the draws. vocabulary, sequence: of the model.
        of_media: the share of messages with pictures.
    """

    def __init__(self, client, seed, vocabulary, sequence, of_media=0.1):
        self.of_media = of_media
        self.client, self.random = client, random.Random(seed)
        self.vocabulary, self.sequence = vocabulary, sequence

    def number(self):
        choose = self.random.choice
        return choose(
            [0, -1, 1, 2, 0.5, -0.0, 1e-300, 1e300, 2**31, 2**63, 2**64, 2**70, 10**30, -(2**70), 3.7, 1e999]
        )

    def text(self):
        return self.random.choice(
            [
                "",
                "a",
                "hot",
                "\x00",
                "\x1b[31m",
                SURROGATE,
                f"a{SURROGATE}b",
                "😀" * 9,
                "<think>",
                "</think>",
                "<｜tool▁calls▁begin｜>",
                "{{ 7 * 7 }}",
                "a" * (2 * self.sequence),
                " " * 10_000,
                "ẞ" * 40,
                "../../etc/passwd",
                "\u202e\u0000\ufeff",
                "NaN",
                "data: [DONE]\n\n",
                "%s%n",
                "'; --",
            ]
        )

    def nested(self):
        value = self.random.choice([[], {}, 1, "x"])
        for _ in range(self.random.choice([2, 30, 70, 400])):
            value = [value] if self.random.random() < 0.5 else {"a": value}
        return value

    def anything(self):
        draw = self.random.random()
        if draw < 0.35:
            return self.number()
        if draw < 0.6:
            return self.text()
        if draw < 0.68:
            return self.nested()
        return self.random.choice(
            [None, True, False, [], {}, [None], [[]], [{}], {"type": None}, {"a": []}, [self.text()], [self.number()]]
        )

    def tokens(self):
        count = self.random.choice([0, 1, 3, self.sequence + 1])
        draw = self.random.random()
        ids = [self.random.randrange(self.vocabulary) for _ in range(count)]
        if draw < 0.5 and ids:
            place = self.random.randrange(len(ids))
            ids[place] = self.random.choice([-1, self.vocabulary, 10**9, 2**63, 10**40, None, "a", 1.5, True, [1]])
        return ids

    def media(self):
        """A part of a message that is a picture or a video, or is none."""
        choose = self.random.choice
        content = bytearray(choose(MEDIA))
        if self.random.random() < 0.3 and content:  # some of the bytes are wrong
            for _ in range(choose([1, 5])):
                content[self.random.randrange(len(content))] = self.random.randrange(256)
        kind = choose(["image/png", "image/png", "video/mp4", "", "text/plain"])
        url = choose([data_url(bytes(content), kind), data_url(bytes(content), kind), choose(URLS), self.anything()])
        found = part(url, choose(["image_url", "image_url", "video_url", "input_audio"]))
        return found if self.random.random() < 0.9 else choose([{"type": "image_url"}, {"type": "video_url", "x": 1}])

    def message(self):
        choose = self.random.choice
        if self.random.random() < self.of_media:
            parts = [self.media() for _ in range(choose([1, 1, 2, 9]))]
            return {"role": choose(["user", "user", "tool"]), "content": [*parts, {"type": "text", "text": "a"}]}
        message = {
            "role": choose(["user", "assistant", "system", "tool", "developer", "", "King", None, 5]),
            "content": choose([self.text(), self.anything(), "Hello", None, [{"type": "text", "text": self.text()}]]),
        }
        if self.random.random() < 0.2:
            message["tool_calls"] = choose(
                [self.anything(), [{"function": {"name": self.text(), "arguments": self.text()}}]]
            )
        if self.random.random() < 0.1:
            message.pop(choose(list(message)))
        return message

    def tools(self):
        function = {"name": self.random.choice(["add", "", self.text()]), "parameters": self.random.choice(SCHEMAS)}
        return self.random.choice(
            [self.anything(), [{"type": "function", "function": function}], [{"function": function}], [function]]
        )

    def structured(self):
        choose = self.random.choice
        return choose(
            [
                {"json": choose(SCHEMAS)},
                {"regex": choose(REGEXES)},
                {"grammar": choose(GRAMMARS)},
                {"choice": choose([[], ["a", "b"], [""], "a", [5], [SURROGATE]])},
                {"json": {"a": self.nested()}},
                self.anything(),
            ]
        )

    def response_format(self):
        choose = self.random.choice
        kind = choose(["json_schema", "json_object", "regex", "grammar", "text", "xml", None, 5])
        schema = {"name": "x", "schema": choose(SCHEMAS)}
        return choose([{"type": kind, "json_schema": schema, "regex": choose(REGEXES)}, self.anything()])

    FIELDS = (
        "max_tokens max_completion_tokens min_tokens temperature top_k top_p min_p repetition_penalty "
        "presence_penalty frequency_penalty seed n best_of logprobs top_logprobs echo stream stream_options stop "
        "stop_token_ids ignore_eos logit_bias priority cache_salt model user suffix add_special_tokens "
        "add_generation_prompt continue_final_message chat_template_kwargs tool_choice unknown_field "
        "include_stop_str_in_output truncate_prompt_tokens prompt_embeds"
    ).split()

    def fields(self):
        values = {"max_tokens": self.random.choice([1, 3, 8])}
        for _ in range(self.random.choice([0, 1, 1, 2, 3])):
            values[self.random.choice(self.FIELDS)] = self.anything()
        draw = self.random.random()
        if draw < 0.1:
            values["structured_outputs"] = self.structured()
        elif draw < 0.2:
            values["response_format"] = self.response_format()
        elif draw < 0.3:
            values |= {"tools": self.tools(), "tool_choice": self.random.choice(["auto", "required", self.anything()])}
        elif draw < 0.36:
            values["logit_bias"] = {self.random.choice(["1", "-1", "a", "99999999999999", ""]): self.anything()}
        elif draw < 0.42:
            values |= {
                "stream": True,
                "stream_options": self.random.choice([{"include_usage": True}, self.anything()]),
            }
        if self.random.random() < 0.05:
            values[self.text()] = self.anything()
        return values

    def completion(self):
        prompt = self.random.choice(
            [self.text(), self.tokens(), [self.text(), "a"], [self.tokens(), [1]], self.anything(), "Hello", "Hello"]
        )
        return "/v1/completions", {"prompt": prompt, **self.fields()}

    def chat(self):
        many = self.random.choice([0, 1, 1, 2, 50])
        messages = self.random.choice([[self.message() for _ in range(many)], [{"role": "user", "content": "Hi"}]])
        if self.random.random() < 0.05:
            messages = self.anything()
        return "/v1/chat/completions", {"messages": messages, **self.fields()}

    def other(self):
        path = self.random.choice(
            ["/tokenize", "/detokenize", "/v1/routing", "/v1/embeddings", "/v1/responses", "/v1/"]
        )
        value = self.random.choice(
            [
                {"tokens": self.tokens()},
                {"prompt": self.text()},
                {"messages": [self.message()]},
                {"model": self.anything(), "prompt": "a"},
                self.anything(),
            ]
        )
        return path, value

    def send(self):
        """One request. The answer, or None of connections that were broken on purpose."""
        path, value = self.random.choice([self.completion, self.completion, self.chat, self.chat, self.other])()
        body = json.dumps(value).encode()
        draw = self.random.random()
        if draw < 0.8:
            return self.client.post(path, body)
        if draw < 0.86:  # some of the bytes are wrong
            damaged = bytearray(body)
            for _ in range(self.random.choice([1, 2, 20])):
                damaged[self.random.randrange(len(damaged))] = self.random.randrange(256)
            return self.client.post(path, bytes(damaged))
        if draw < 0.9:
            kind = self.random.choice(
                ["text/plain", "", "application/xml", "multipart/form-data", "application/json; x"]
            )
            return self.client.post(path, body, **{"Content-Type": kind})
        if draw < 0.93:
            method = self.random.choice(["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
            return self.client.request(method, path, body, **{"Content-Type": "application/json"})
        self.broken(path, body)
        return None

    def broken(self, path, body):
        """Connections that end early, lie of their length, or are no HTTP."""
        length = self.random.choice([len(body), len(body) + 50, max(len(body) - 5, 0), 10**18])
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        data = head.encode() + body
        draw = self.random.random()
        if draw < 0.5:
            data = data[: self.random.randrange(len(data))]
        elif draw < 0.7:
            data = "".join(self.random.choices(string.printable, k=200)).encode()
        with self.client.raw() as connection:
            try:
                connection.sendall(data)
                if self.random.random() < 0.3:
                    connection.settimeout(0.02)
                    connection.recv(100)
            except (TimeoutError, ConnectionError):
                pass
