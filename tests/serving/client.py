"""A client of HTTP that sends what it is told, right or wrong."""

import http.client
import json
import socket
import time
from dataclasses import dataclass


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]

    @property
    def events(self):
        """What a stream's events hold, `[DONE]` last."""
        told = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line.startswith("data: ")]
        return [one if one == "[DONE]" else json.loads(one) for one in told]


class Client:
    def __init__(self, host, port, **headers):
        self.host, self.port, self.headers = host, port, headers
        self.address = f"http://{host}:{port}"

    def wait_until_it_answers(self, seconds=120):
        until = time.monotonic() + seconds
        while True:
            try:
                return self.get("/health")
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.01)

    def request(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        try:
            connection.request(method, path, body, {**self.headers, **headers})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path, **headers):
        return self.request("GET", path, **headers)

    def post(self, path, value, **headers):
        body = value if isinstance(value, (bytes, str)) else json.dumps(value)
        return self.request("POST", path, body, **{"Content-Type": "application/json", **headers})

    def complete(self, prompt="abc", **fields):
        return self.post("/v1/completions", {"prompt": prompt, "max_tokens": 4, **fields})

    def chat(self, content="abc", **fields):
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields})

    def raw(self):
        """A connection to be written to."""
        return socket.create_connection((self.host, self.port), timeout=60)

    def sample(self, name, **labels):
        """The value of one of Prometheus' samples, or 0."""
        from prometheus_client.parser import text_string_to_metric_families

        for family in text_string_to_metric_families(self.get("/metrics").body.decode()):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        return 0
