"""What a run of the benchmark measures, checked before anything expensive starts. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..option_error import OptionError


MODEL_WHAT = ("decode", "prefill", "batched", "mtp", "train", "load")
KERNEL_WHAT = ("experts", "attention")
WHAT = (*MODEL_WHAT, *KERNEL_WHAT, "serving")
# Lengths of requests are lognormal, cut at so many times their mean
LONGEST_OF_MEAN = 8
DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
PEERS = ("vllm", "llama.cpp", "ik_llama.cpp")


@dataclass(frozen=True)
class BenchSettings:
    """Everything that decides what one run measures.

    Args:
        source: the name of a preset, or a checkpoint (a folder, or a repository id on the Hub).
        what: which of `WHAT`: of a whole model (`MODEL_WHAT`), or of one layer's part by itself (`KERNEL_WHAT`),
            or many clients at a time ("serving").
        device: one of `DEVICES`.
        contenders: names of those that take part; none for all that the device is measured with.
        contexts: tokens already cached when decoding starts.
        prefill: lengths of the prompts.
        batches: batch sizes of batched decode, at `batch_context` cached tokens a row.
        dtypes: which of `DTYPES`; each is measured on its own.
        weights: which of `contenders.VARIANTS` the plugin runs with.
        rounds: turns that each contender takes; an even number balances the order.
        new_tokens: tokens timed in a turn of decoding, at most.
        turn_seconds: a turn of decoding is cut to what is expected to fit, though never below two tokens.
        train_batch, train_length: sequences of a training step, and tokens of each.
        expert_tokens: tokens that a layer's experts are given.
        attention: rows and cached tokens of attention over latents.
        clients: numbers of clients that ask at a time.
        static_batches: sizes of static batches beside the engine's.
        lengths: means of the prompts' tokens and of the tokens that clients want.
        peers: interpreters of other programs, by name (`PEERS`).
        converter: llama.cpp's `convert_hf_to_gguf.py`; looked for beside the interpreter where it is None.
        threads: for every contender; None takes torch's own number.
        seed: of random weights, tokens and latents.
        layers: layers of a preset, None for as many as it has or fit in memory.
        json_path, plot_path, keep: files to write; `keep` is the folder for the checkpoints that peers read.
    """

    source: str = "bench-2b"
    what: tuple[str, ...] = ("decode", "prefill")
    device: str = "auto"
    contenders: tuple[str, ...] = ()
    contexts: tuple[int, ...] = (128, 1024, 8192)
    prefill: tuple[int, ...] = (2048,)
    batches: tuple[int, ...] = (32,)
    batch_context: int = 1024
    dtypes: tuple[str, ...] = ("bf16",)
    weights: tuple[str, ...] = ("plain",)
    rounds: int = 6
    new_tokens: int = 16
    turn_seconds: float = 4.0
    train_batch: int = 4
    train_length: int = 512
    expert_tokens: tuple[int, ...] = (1, 32, 4096)
    attention: tuple[tuple[int, int], ...] = ((1, 8192), (64, 8192))
    clients: tuple[int, ...] = (1, 10, 100, 300)
    static_batches: tuple[int, ...] = (8, 32, 64, 100)
    lengths: tuple[int, ...] = (140, 59)
    peers: tuple[tuple[str, str], ...] = ()
    converter: Path | None = None
    threads: int | None = None
    seed: int = 0
    layers: int | None = None
    json_path: Path | None = None
    plot_path: Path | None = None
    keep: Path | None = None

    def __post_init__(self) -> None:
        for option, chosen, known in (
            ("--what", self.what, WHAT),
            ("--dtype", self.dtypes, tuple(DTYPES)),
            ("--device", (self.device,), DEVICES),
        ):
            for name in chosen:
                if name not in known:
                    raise OptionError(option, f"{name!r} is none of {', '.join(known)}")
        for option, values, lowest in (
            ("--contexts", self.contexts, 1),
            ("--prefill", self.prefill, 2),
            ("--batch", self.batches, 1),
            ("--expert-tokens", self.expert_tokens, 1),
            ("--clients", self.clients, 1),
            ("--static-batches", self.static_batches, 1),
            ("--lengths", self.lengths, 1),
            ("--attention", tuple(number for shape in self.attention for number in shape), 1),
        ):
            for value in values:
                if value < lowest:
                    raise OptionError(option, f"{value} is not at least {lowest}")
        lists: list[tuple[str, Sequence[object]]] = [
            ("--what", self.what),
            ("--dtype", self.dtypes),
            ("--weights", self.weights),
            ("--contexts", self.contexts),
            ("--prefill", self.prefill),
            ("--batch", self.batches),
            ("--expert-tokens", self.expert_tokens),
            ("--clients", self.clients),
            ("--static-batches", self.static_batches),
            ("--attention", self.attention),
            ("--contenders", self.contenders),
        ]
        for option, given in lists:
            if not given and option != "--contenders":
                raise OptionError(option, "names nothing")
            if len(set(given)) != len(given):
                raise OptionError(option, f"names {_repeated(given)} twice")
        if len(self.lengths) != 2:
            raise OptionError("--lengths", "is not two numbers, of a prompt's tokens and of those that are wanted")
        limits: list[tuple[str, int | None, int]] = [
            ("--batch-context", self.batch_context, 1),
            ("--rounds", self.rounds, 1),
            ("--new-tokens", self.new_tokens, 2),
            ("--train-batch", self.train_batch, 1),
            ("--train-length", self.train_length, 2),
            ("--threads", self.threads, 1),
            ("--layers", self.layers, 2),
        ]
        for option, given_value, least in limits:
            if given_value is not None and given_value < least:
                raise OptionError(option, f"{given_value} is not at least {least}")
        if not 0 <= self.seed < 2**32:
            raise OptionError("--seed", f"{self.seed} does not lie between 0 and 2**32 - 1")
        for option, path in (("--json", self.json_path), ("--plot", self.plot_path)):
            if path is not None and path.is_dir():
                raise OptionError(option, f"{path} is a folder, not a file")
            if path is not None and not path.absolute().parent.is_dir():
                raise OptionError(option, f"there is no folder {path.absolute().parent}")
        if self.plot_path is not None and self.plot_path.suffix.lower() != ".png":
            raise OptionError("--plot", f"{self.plot_path} does not end in .png")
        if self.keep is not None and self.keep.exists() and not self.keep.is_dir():
            raise OptionError("--keep", f"{self.keep} is a file, not a folder")
        for name, interpreter in self.peers:
            if name not in PEERS:
                raise OptionError("--against", f"{name!r} is none of {', '.join(PEERS)}")
            if not Path(interpreter).is_file():
                raise OptionError("--against", f"{name}: there is no interpreter {interpreter}")
        if len({name for name, _ in self.peers}) != len(self.peers):
            raise OptionError("--against", "names a program twice")
        if "ik_llama.cpp" in dict(self.peers) and "llama.cpp" not in dict(self.peers):
            raise OptionError("--against", "ik_llama.cpp reads the files that llama.cpp writes: name that one too")
        if self.converter is not None and not self.converter.is_file():
            raise OptionError("--converter", f"there is no file {self.converter}")

    @property
    def model_what(self) -> tuple[str, ...]:
        """What needs a whole model."""
        return tuple(what for what in self.what if what in MODEL_WHAT)

    @property
    def reads_files(self) -> bool:
        """Whether the model is needed as a checkpoint on disk."""
        return bool(self.peers) or "load" in self.what

    @property
    def needs_model(self) -> bool:
        """Whether a whole model is measured."""
        return bool(self.model_what) or "serving" in self.what

    @property
    def longest(self) -> int:
        """Positions that the longest measurement of a language model needs."""
        lengths = [0]
        if "decode" in self.what:
            lengths.append(max(self.contexts) + self.new_tokens)
        if "mtp" in self.what:
            lengths.append(min(self.contexts) + self.new_tokens)
        if "batched" in self.what:
            lengths.append(self.batch_context + self.new_tokens)
        if "prefill" in self.what:
            lengths.append(max(self.prefill))
        if "train" in self.what:
            lengths.append(self.train_length)
        if "serving" in self.what:
            lengths.append(LONGEST_OF_MEAN * sum(self.lengths))
        return max(lengths) + 2  # the prompt's own token, and one that starts the clock


def _repeated(values: Sequence[object]) -> object:
    return next(value for place, value in enumerate(values) if value in values[:place])


def names(text: str) -> tuple[str, ...]:
    """`"a, b"` to `("a", "b")`."""
    return tuple(part for part in (piece.strip() for piece in text.split(",")) if part)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """`"128,1k"` to `(128, 1024)`; `k` stands for 1,024."""
    result = []
    for part in names(text):
        digits, factor = (part[:-1], 1024) if part.lower().endswith("k") else (part, 1)
        if not digits.isascii() or not digits.isdigit():
            raise OptionError(option, f"{part!r} is no number")
        result.append(int(digits) * factor)
    return tuple(result)


def shapes(option: str, text: str) -> tuple[tuple[int, int], ...]:
    """`"1x8k,64x8k"` to `((1, 8192), (64, 8192))`."""
    pairs = []
    for part in names(text):
        rows, _, tokens = part.lower().partition("x")
        if not rows or not tokens:
            raise OptionError(option, f"{part!r} is not ROWSxTOKENS")
        pairs.append((numbers(option, rows)[0], numbers(option, tokens)[0]))
    return tuple(pairs)


def interpreters(text: str) -> tuple[tuple[str, str], ...]:
    """`"vllm=PYTHON,llama.cpp=PYTHON"` to pairs of a program's name and an interpreter."""
    pairs = []
    for part in names(text):
        name, equals, interpreter = part.partition("=")
        if not equals or not interpreter:
            raise OptionError("--against", f"{part!r} is not NAME=PYTHON, with the interpreter that has the program")
        pairs.append((name.strip(), str(Path(interpreter.strip()).expanduser())))
    return tuple(pairs)
