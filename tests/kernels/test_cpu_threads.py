"""The library's threads under ThreadSanitizer, which Python does not run under: in a process of their own.

Its threads there are POSIX's, which the sanitizer follows; how torch's OpenMP pool waits it does not see.
Helgrind takes every atomic operation for a plain one, so reports each of them.
"""

import copy
import platform
import shutil
import subprocess

import pytest
import torch

import transformers_dsv3
from transformers_dsv3.kernels.cpu import linear as linear_cpu
from transformers_dsv3.kernels.cpu.step import Program

from .served_library import build, served


pytestmark = pytest.mark.slow

RACE = """
#include <pthread.h>
static int shared;
static void *add(void *p) { shared++; return p; }
int main(void)
{
    pthread_t other;
    pthread_create(&other, 0, add, 0);
    add(0);
    return pthread_join(other, 0);
}
"""


@pytest.fixture(scope="module")
def under_the_sanitizer(tmp_path_factory):
    """The command that serves the library under ThreadSanitizer, which is seen to find a race here."""
    folder = tmp_path_factory.mktemp("tsan")
    compiler, flags = shutil.which("gcc"), "-fsanitize=thread -O1 -g"
    if compiler is None or shutil.which("setarch") is None:
        pytest.skip("needs gcc and setarch")
    (folder / "race.c").write_text(RACE)
    built = subprocess.run([compiler, *flags.split(), folder / "race.c", "-o", folder / "race"], capture_output=True)
    if built.returncode:
        pytest.skip("needs GCC's libtsan")
    # Its shadow memory has fixed places, which random ones of the kernel may take
    fixed = ["setarch", platform.machine(), "-R"]
    seen = subprocess.run([*fixed, folder / "race"], capture_output=True, text=True)
    if "data race" not in seen.stderr:
        pytest.skip(f"ThreadSanitizer does not run here: {seen.stderr[:200]}")
    return [*fixed, *build(folder / "library", compiler, flags)]


@pytest.fixture
def steps(monkeypatch):
    """Small layers are the compiled backend's too; a list that grows with each step of a program."""
    monkeypatch.setattr(linear_cpu, "FEWEST_BYTES", 0)
    monkeypatch.setattr(linear_cpu, "MOST_ROWS", {})
    found, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda self, *arguments: found.append(1) or run(self, *arguments))
    return found


@pytest.mark.parametrize("bits", [None, 4])
def test_no_data_race(under_the_sanitizer, make_model, threads, steps, bits):
    """Prefill, then steps of decoding as one program, on as many threads as there are tasks and on more."""
    sizes = {"q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16, "hidden_size": 64, "moe_intermediate_size": 32}
    model = make_model(**sizes, intermediate_size=64)
    if bits is not None:
        transformers_dsv3.quantize(model, bits=bits, activations="8")
    prompt = torch.arange(1, 31).view(3, 10)
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 5, "do_sample": False}
    # Of a copy: what this process has described a model by, another does not know
    expected = copy.deepcopy(model).generate(prompt, **arguments)
    del steps[:]
    with served(under_the_sanitizer):
        for count in (2, 3, 8):
            with threads(count):
                assert torch.equal(model.generate(prompt, **arguments), expected)
    assert len(steps) == 3 * 4


def test_no_data_race_of_rows_that_all_threads_round_and_read(under_the_sanitizer, quantize, threads):
    """Found a barrier whose last store released nothing, where the models above have too few tasks to share out."""
    x, (weight, scale) = torch.randn(90, 512), quantize(torch.randn(1024, 512), 4)
    expected = torch.ops.transformers_dsv3.linear(x, weight, scale, None, True)
    with served(under_the_sanitizer), threads(4):
        for _ in range(3):
            result = torch.ops.transformers_dsv3.linear(x, weight, scale, None, True)
    assert torch.equal(result, expected)
