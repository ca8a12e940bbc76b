"""The files that peers read: the checkpoint that is measured, its tokenizer, and GGUF files made of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..option_error import OptionError
from . import peers
from .settings import BenchSettings


VLLM = "vLLM bf16"
# What llama.cpp and ik_llama.cpp read: llama.cpp's converter writes the first two, its quantizer the last
GGUF = {"bf16": "bf16", "Q8_0": "q8_0", "Q4_0": "q4_0"}
# How often each peer has the weights in memory, in copies of the bf16 ones
COPIES = {"vllm": 1.0, "llama.cpp": 1.8, "ik_llama.cpp": 1.8}
# Its files on disk, in copies likewise, beside the checkpoint itself. ik_llama.cpp reads llama.cpp's
COPIES_ON_DISK = {"vllm": 0.0, "llama.cpp": 1.8, "ik_llama.cpp": 0.0}


def check_disk(settings: BenchSettings, weight_bytes: int) -> None:
    """Refuses a run whose files do not fit the disk.

    Args:
        weight_bytes: of the model in bf16.

    Raises:
        OptionError: naming `--keep`.
    """
    if not settings.reads_files:
        return
    folder = settings.keep if settings.keep is not None else Path(tempfile.gettempdir())
    while not folder.exists():
        folder = folder.absolute().parent
    needed = weight_bytes * (1 + sum(COPIES_ON_DISK[name] for name, _ in settings.peers))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OptionError(
            "--keep",
            f"contenders read about {needed / 2**30:.0f} GiB of files, and {folder} has {free / 2**30:.0f} GiB",
        )


def start_peers(
    settings: BenchSettings,
    model: PreTrainedModel,
    folder: Path,
    checkpoint: Path,
    threads: int,
    converter: Path | None,
    stack: ExitStack,
    say: Callable[[str], None],
) -> tuple[list[peers.Peer], dict[str, str]]:
    """Writes what the peers need and starts them.

    Args:
        folder: of the files that they read. checkpoint: the model's own.
        stack: ends the processes.

    Returns:
        The peers that are ready, and the reasons of those that are not, by name.
    """
    interpreters = dict(settings.peers)
    ready, failed = [], {}

    def start(name: str, make: Callable[[], peers.Peer]) -> None:
        say(f"starting {name}")
        try:
            peer = make()
        except (peers.PeerError, OSError) as error:
            failed[name] = str(error)
            return
        stack.callback(peer.close)
        ready.append(peer)

    for program in ("llama.cpp", "ik_llama.cpp"):
        if program not in interpreters or converter is None:
            continue
        for title, outtype in GGUF.items():

            def with_gguf(program: str = program, title: str = title, outtype: str = outtype) -> peers.Peer:
                gguf = folder / f"model-{outtype}.gguf"
                if program == "llama.cpp" and outtype == "q4_0":
                    peers.quantize(interpreters[program], folder / "model-bf16.gguf", gguf, outtype)
                elif program == "llama.cpp":
                    peers.convert(interpreters[program], converter, checkpoint, gguf, outtype)
                log = folder / f"{program}-{outtype}.log"
                peer = peers.reads_gguf(f"{program} {title}", interpreters[program], gguf, settings, threads, log)
                peer.weights = model if outtype == "bf16" else None
                return peer

            start(f"{program} {title}", with_gguf)
    if "vllm" in interpreters:

        def served() -> peers.Peer:
            vocab = model.config.vocab_size
            peer = peers.vllm(VLLM, interpreters["vllm"], checkpoint, vocab, settings, threads, folder / "vllm.log")
            peer.weights = model
            return peer

        start(VLLM, served)
    return ready, failed


def folder_of_files(settings: BenchSettings, stack: ExitStack) -> Path:
    """`settings.keep`, or one that `stack` removes."""
    if settings.keep is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsv3-bench-")))
    settings.keep.mkdir(parents=True, exist_ok=True)
    return settings.keep


def checkpoint_folder(settings: BenchSettings, model: PreTrainedModel, folder: Path) -> Path:
    """The checkpoint that is measured, as files: written into `folder` where it is a preset of random weights."""
    if Path(settings.source).is_dir():
        return Path(settings.source)
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint)
    bytes_tokenizer().save_pretrained(checkpoint)
    return checkpoint


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte. llama.cpp wants a tokenizer, whatever it is: every contender is given token ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # It loads no BPE without a merge
    merge = (alphabet[0], alphabet[1])
    vocab = {token: number for number, token in enumerate([*alphabet, "".join(merge)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[merge]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=alphabet[0], eos_token=alphabet[1])
