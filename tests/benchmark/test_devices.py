"""Where and how time is taken: the host's clock on a CPU, events of the device on a GPU, here imitated."""

import time
from types import SimpleNamespace

import pytest
import torch
from transformers import StaticCache

from transformers_dsv3.benchmark import ceilings, devices
from transformers_dsv3.benchmark.contenders import ModelContender, plain_generation
from transformers_dsv3.benchmark.devices import Device, find_device, nvidia_smi
from transformers_dsv3.benchmark.kernel_workloads import exact_experts, make_experts, routing
from transformers_dsv3.benchmark.settings import BenchSettings
from transformers_dsv3.benchmark.workloads import SETTLING_STEPS, Workload, decode, make_inputs
from transformers_dsv3.option_error import OptionError


class SlowQueue:
    """Work that a device does after it was handed over: events are stamped when it gets to them."""

    def __init__(self):
        self.now = 0.0
        self.waits = 0

    def event(self, enable_timing):
        assert enable_timing
        queue = self

        class Event:
            def record(self):
                self.at = queue.now

            def synchronize(self):
                queue.waits += 1

            def elapsed_time(self, other):
                return (other.at - self.at) * 1000  # milliseconds, as torch's

        return Event()


@pytest.fixture
def queue(monkeypatch):
    queue = SlowQueue()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return queue


def test_time_on_a_gpu_is_its_own(queue):
    device = Device("cuda")

    def work():
        queue.now += 0.25
        return "done"

    assert device.timed(work) == (0.25, "done")
    marks = [device.mark()]
    for seconds in (1.0, 2.0):
        queue.now += seconds
        marks.append(device.mark())
    before = queue.waits
    assert device.seconds_between(marks) == [1.0, 2.0] and queue.waits == before + 1


def test_time_on_a_cpu_is_the_hosts():
    seconds, value = Device().timed(lambda: time.sleep(0.02) or 7)
    assert value == 7 and seconds >= 0.02


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert find_device("auto").kind == kind
    assert find_device("cpu") == Device("cpu")
    with pytest.raises(OptionError, match="no GPU to use here") as error:
        find_device("cuda")
    assert error.value.option == "--device"


def test_decoding_on_a_gpu_skips_no_step_of_a_full_cache_and_the_first_of_a_static_one(make_model, monkeypatch):
    model = plain_generation(make_model())
    inputs = make_inputs(Workload("decode", 6, 2, "fp32"), model.config, torch.float32, seed=0)
    queue, forward = SlowQueue(), model.forward
    calls = []

    def counted(*arguments, **options):
        cache = options["past_key_values"]
        calls.append(type(cache))
        queue.now += 1.0 if len(calls) > 3 else 100.0  # compiling and recording take the first steps
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    device = Device("cuda")
    static = decode(model, inputs, 5, device=device, static=True)
    assert (static.seconds, static.units) == (1.0, 5)
    assert set(calls) == {StaticCache} and len(calls) == 1 + SETTLING_STEPS + 5
    calls.clear()
    full = decode(model, inputs, 5, device=device)
    assert full.units == 5 and full.seconds == pytest.approx((2 * 100 + 3) / 5)
    assert StaticCache not in calls


def test_caches_of_one_workload_do_not_lengthen_those_of_the_next(make_model):
    model = make_model()
    contender = ModelContender("plugin static", model, torch.float32, static=True)
    lengths = []
    forward = model.forward

    def noted(*arguments, **options):
        lengths.append(options["past_key_values"].get_max_length())
        return forward(*arguments, **options)

    model.forward = noted
    for tokens in (40, 5):
        inputs = make_inputs(Workload("decode", tokens, 1, "fp32"), model.config, torch.float32, seed=0)
        contender.measure(Workload("decode", tokens, 1, "fp32"), inputs, 3)
        contender.rest()
    assert len(set(lengths)) == 2 and max(lengths) - min(lengths) == 35


def test_ceilings_of_a_gpu_are_timed_by_it(queue, monkeypatch):
    monkeypatch.setattr(ceilings, "READ_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "GPU_GEMM_SHAPE", (64, 64, 64))
    monkeypatch.setattr(Device, "torch", property(lambda self: torch.device("cpu")))
    device = Device("cuda")

    def passes(name, seconds):
        original = getattr(torch.Tensor, name)

        def slow(*arguments, **options):
            queue.now += seconds
            return original(*arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, slow)

    passes("copy_", 1.0)
    passes("sum", 0.75)
    linear = torch.nn.functional.linear

    def product(*arguments):
        queue.now += 2.0
        return linear(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    measured = ceilings.Ceilings([torch.float32], device)
    measured.measure()
    # A copy moves twice the buffer in a second, a sum reads it once in three quarters of one
    assert measured.record()["read_by"].startswith("copies")
    assert measured.bandwidth() == 2**20 * 2
    assert measured.rate(torch.float32) == 2 * 64**3 / 2.0


def test_memory_that_is_free_is_the_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3, 5))
    assert Device("cuda").free_memory() == 3
    assert Device().free_memory() > 2**20 and Device().record() == {}


def test_what_a_gpu_says_about_itself(monkeypatch, tmp_path):
    answer = SimpleNamespace(stdout="580.1, 345 MHz\n")
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="0-1"))
    monkeypatch.setattr(devices.subprocess, "run", lambda command, **options: asked.append(command) or answer)
    assert nvidia_smi(("driver_version", "clocks.sm")) == {"driver_version": "580.1", "clocks.sm": "345 MHz"}
    assert "--id=GPU-0-1" in asked[0]

    def missing(*arguments, **options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(devices.subprocess, "run", missing)
    assert nvidia_smi(("driver_version",)) == {}


def test_exact_experts_are_the_plain_ones_in_float64(tiny_config):
    config = tiny_config()
    experts = make_experts(config, torch.float64, seed=0)
    torch.manual_seed(1)
    hidden = torch.randn(7, config.hidden_size, dtype=torch.float64)
    index, weight = routing(config, 7)
    assert index.shape == (7, 3) and all(len(set(row)) == 3 for row in index.tolist())
    torch.testing.assert_close(weight.sum(-1), torch.ones(7))
    weight = weight.double()
    given = torch.randn_like(hidden)
    output, *gradients = exact_experts(experts, hidden, index, weight, given)
    experts.config._experts_implementation = "eager"
    sources = (hidden.requires_grad_(), weight.requires_grad_(), *experts.parameters())
    plain = experts(hidden, index, weight)
    torch.testing.assert_close(output, plain.detach())
    for mine, theirs in zip(gradients, torch.autograd.grad(plain, sources, given)):
        torch.testing.assert_close(mine, theirs)


def test_settings_of_parts_need_no_longer_positions():
    settings = BenchSettings(what=("experts", "attention"))
    assert settings.model_what == () and settings.longest == 2
