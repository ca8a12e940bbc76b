"""Other programs as contenders: each in its own interpreter and process, on the same checkpoint.

A peer's process stays alive for the whole run and sleeps on its input between its turns. What it needs is given as
arguments and lines of JSON, so that its environment needs nothing of this package.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
from pathlib import Path
from typing import IO, Any

import torch
from transformers import PreTrainedModel

from ..option_error import OptionError
from .rounds import Turn
from .settings import BenchSettings
from .workloads import Inputs, Workload


WORKERS = Path(__file__).parent / "peer_workers"
# For loading a model, or filling a context of 32k tokens: beyond it, a peer is taken to hang
PATIENCE_SECONDS = 3600.0
CONVERTER = "llama.cpp/convert_hf_to_gguf.py"


class PeerError(RuntimeError):
    """A peer that could not do what it was asked; the message is the reason that the report gives."""


class Peer:
    """A worker process, as a contender.

    Args:
        command: the interpreter, the worker and its arguments.
        environment: variables beside this process's own.
        log: where its standard error goes.
        patience: seconds after which an answer is no longer waited for.

    Raises:
        PeerError: when the worker does not get ready.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
        patience: float = PATIENCE_SECONDS,
    ):
        self.name = name
        self.linear_dtype = torch.bfloat16
        self.use_mtp = False
        self.static = False
        self.weights: PreTrainedModel | None = None  # the model whose weights it reads as they are
        self.patience = patience
        self.log = log
        self.pending = b""
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **(environment or {})},
                # An interruption is this process's to handle: it ends the workers itself
                start_new_session=True,
            )
        try:
            self.version = self._answer()["version"]
        except BaseException:
            self.close()
            raise

    def measure(self, workload: Workload, inputs: Inputs, new_tokens: int) -> Turn:
        """One turn; the peer makes random tokens of its own."""
        request = {
            "what": workload.what,
            "tokens": workload.tokens,
            "batch": workload.batch,
            "new_tokens": new_tokens,
        }
        try:
            _pipe(self.process.stdin).write(json.dumps(request).encode() + b"\n")
            _pipe(self.process.stdin).flush()
        except (BrokenPipeError, ValueError):
            raise PeerError(self._last_words()) from None
        answer = self._answer()
        return Turn(answer["seconds"], answer["units"])

    def rest(self) -> None:
        pass

    def close(self) -> None:
        """Ends the process."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass

    def _answer(self) -> dict[str, Any]:
        output = _pipe(self.process.stdout)
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while b"\n" not in self.pending:
                if not selector.select(self.patience):
                    self.close()
                    raise PeerError(f"no answer within {self.patience:.0f} s")
                piece = os.read(output.fileno(), 65536)
                if not piece:
                    raise PeerError(self._last_words())
                self.pending += piece
        line, _, self.pending = self.pending.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self.process.wait()
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"its process ended with {code}: {lines[-1] if lines else 'it said nothing'}"


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def find_converter(settings: BenchSettings) -> Path | None:
    """llama.cpp's converter: the one that is named, or `llama.cpp/` beside the interpreter's `bin`; None without peer.

    Raises:
        OptionError: where llama.cpp is asked for and no converter is found.
    """
    interpreter = dict(settings.peers).get("llama.cpp")
    if interpreter is None:
        return None
    if settings.converter is not None:
        return settings.converter
    # Not resolved: the interpreter of a virtual environment is a link to another one
    beside = Path(interpreter).absolute().parent.parent / CONVERTER
    if not beside.is_file():
        raise OptionError(
            "--converter", f"llama.cpp is read through GGUF, and there is no converter at {beside}: name it"
        )
    return beside


def convert(interpreter: str, converter: Path, checkpoint: Path, gguf: Path, outtype: str) -> None:
    """Writes a GGUF file of a checkpoint.

    Args:
        outtype: `bf16` or `q8_0`.

    Raises:
        PeerError: with the converter's last words.
    """
    _run_worker("converter", interpreter, "convert", str(converter), str(checkpoint), str(gguf), outtype)


def quantize(interpreter: str, source: Path, gguf: Path, kind: str) -> None:
    """Writes a GGUF file of another one.

    Args:
        kind: what most of its tensors become, such as `q4_0`.

    Raises:
        PeerError: with the quantizer's last words.
    """
    _run_worker("quantizer", interpreter, "quantize", str(source), str(gguf), kind)


def _run_worker(what: str, interpreter: str, *arguments: str) -> None:
    command = [interpreter, str(WORKERS / "llama_cpp_worker.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_offline())
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise PeerError(f"llama.cpp's {what} failed: {lines[-1] if lines else done.returncode}")


def _offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def reads_gguf(name: str, interpreter: str, gguf: Path, settings: BenchSettings, threads: int, log: Path) -> Peer:
    """llama.cpp, or ik_llama.cpp by its name, on a GGUF file.

    llama.cpp has the settings of its own benchmark: batches of 2,048, micro-batches of 512.
    """
    worker = "ik_llama_cpp_worker.py" if name.startswith("ik_") else "llama_cpp_worker.py"
    command = [interpreter, str(WORKERS / worker), *([] if name.startswith("ik_") else ["serve"])]
    arguments = [str(gguf), str(settings.longest), str(threads), str(settings.seed)]
    return Peer(name, [*command, *arguments], log, {"OMP_NUM_THREADS": str(threads)})


def vllm(
    name: str, interpreter: str, checkpoint: Path, vocab: int, settings: BenchSettings, threads: int, log: Path
) -> Peer:
    """vLLM's CPU build with its own DeepSeek class, in one process."""
    batch = max(settings.batches) if "batched" in settings.what else 1
    worker = [interpreter, str(WORKERS / "vllm_worker.py"), str(checkpoint)]
    arguments = [str(settings.longest), str(batch), str(vocab), str(settings.seed)]
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a second process would poll while others have their turns
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    return Peer(name, [*worker, *arguments], log, environment)
