"""One run of the benchmark: models, peers, workloads, rounds, results."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..evaluation import machine
from ..evaluation.held_out_text import checked_stream, read_texts
from ..evaluation.text_quality import bits_per_byte
from ..files import write_json
from ..models.dsv3 import DeepseekV3Config, DeepseekV3ForCausalLM
from ..option_error import OptionError
from . import training_memory
from .ceilings import Ceilings
from .contenders import (
    NATIVE,
    PLUGIN,
    VARIANTS,
    ModelContender,
    agreement,
    describe,
    share_weights,
    static_name,
    variant_name,
)
from .devices import STATE, Device, find_device, nvidia_smi
from .floors import ExpertsUsed, Work, expected_experts, floor_seconds, work_of
from .host_time import kernel_calls
from .kernel_workloads import measure_kernels
from .loading import LoadContender
from .own_process import measure_apart
from .peer_files import COPIES, check_disk, checkpoint_folder, folder_of_files, start_peers
from .peers import find_converter
from .prefill_profile import time_by_kind
from .presets import PRESETS, parameter_count, preset_config, random_model
from .rounds import Turn, interleave, ratio, reason_of, spread
from .serving import measure_serving
from .settings import DTYPES, KERNEL_WHAT, BenchSettings
from .workloads import Inputs, Workload, continue_text, decode, make_inputs, workloads


MTP = f"{PLUGIN} MTP"
# Tokens of the turn that warms a contender up, from which the length of its turns is decided
WARM_UP_TOKENS = 2
# Of the text that forms of the weights are compared on: enough to see hundredths of a percent between them
QUALITY_TOKENS, QUALITY_WINDOW = 16384, 256


class Contender(Protocol):
    """Whatever takes turns: a model of this process or a program of its own.

    `weights` is the model whose weights it reads, None where that says nothing about the least it has to read.
    `static` tells whether its steps of decoding are compiled when it meets a workload.
    """

    name: str
    static: bool
    linear_dtype: torch.dtype
    use_mtp: bool
    weights: PreTrainedModel | None

    def measure(self, workload: Workload, inputs: Inputs, new_tokens: int) -> Turn: ...

    def rest(self) -> None: ...


class Watcher(Protocol):
    """Told what is going on; the command line draws a progress bar from it."""

    def say(self, message: str) -> None: ...

    def plan(self, turns: int) -> None: ...

    def turn(self, workload: str, contender: str) -> None: ...


def load_config(settings: BenchSettings, copies: float, device: Device) -> tuple[DeepseekV3Config, str | None]:
    """The configuration that will be measured, and how it was cut, before any weight exists.

    Raises:
        OptionError: for a source that is neither a preset nor a `deepseek_v3` checkpoint, or does not fit.
    """
    if settings.source in PRESETS:
        return preset_config(settings, device.free_memory() if settings.needs_model else 2**62, copies)
    if settings.layers is not None:
        raise OptionError("--layers", "cuts presets only; a checkpoint has the layers that it has")
    known = f"neither a preset ({', '.join(PRESETS)}) nor a checkpoint"
    local = Path(settings.source).exists()
    if not local and (settings.source.startswith((".", "/", "~")) or settings.source.count("/") != 1):
        raise OptionError(
            "CHECKPOINT_OR_PRESET",
            f"{settings.source!r} is {known}: there is no such folder, and a repository on the Hub is OWNER/NAME",
        )
    try:
        config = AutoConfig.from_pretrained(settings.source)
    except (OSError, ValueError) as error:
        raise OptionError("CHECKPOINT_OR_PRESET", f"{settings.source!r} is {known}: {reason_of(error)}") from None
    if config.model_type != "deepseek_v3":
        raise OptionError(
            "CHECKPOINT_OR_PRESET", f"{settings.source} is a {config.model_type!r} checkpoint, not 'deepseek_v3'"
        )
    if settings.longest > config.max_position_embeddings:
        raise OptionError(
            "--contexts or --prefill",
            f"{settings.longest} positions are needed at the longest measurement, and "
            f"max_position_embeddings of {settings.source} is {config.max_position_embeddings}",
        )
    if "mtp" in settings.what and not config.num_nextn_predict_layers:
        raise OptionError("--what", f"mtp needs MTP layers, and {settings.source} has none")
    return config, None


class Benchmark:
    """One run. `results` is what is known so far, in the form of the JSON file.

    Raises:
        OptionError: from the constructor, for what cannot be measured; nothing has been computed then.
    """

    def __init__(self, settings: BenchSettings, watcher: Watcher):
        for variant in settings.weights:
            if variant not in VARIANTS:
                raise OptionError("--weights", f"{variant!r} is none of {', '.join(VARIANTS)}")
        self.settings = settings
        self.watcher = watcher
        self.device = find_device(settings.device)
        if settings.peers and self.device.is_gpu:
            raise OptionError("--against", "other programs are measured on the CPU only: add --device cpu")
        self._check_contenders()
        if settings.peers and "bf16" not in settings.dtypes:
            raise OptionError("--against", "other programs are measured in bf16, which --dtype leaves out")
        self.converter = find_converter(settings)
        copies = 1 + sum(COPIES[name] for name, _ in settings.peers)
        copies += sum(VARIANTS[name].copies for name in settings.weights)
        copies += 1 if "load" in settings.what else 0
        self.config, cut = load_config(settings, copies, self.device)
        parameters = parameter_count(self.config)
        check_disk(settings, 2 * parameters)
        self.results: dict[str, Any] = {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine.machine_facts(),
            "settings": {
                **{
                    key: value
                    for key, value in vars(settings).items()
                    if key not in ("json_path", "plot_path", "keep")
                },
                "converter": str(settings.converter) if settings.converter else None,
                "peers": [name for name, _ in settings.peers],
            },
            "model": {
                "source": settings.source,
                "weights": "random" if settings.source in PRESETS else "of the checkpoint",
                "cut": cut,
                "parameters": parameters,
                "config": self.config.to_dict(),
            },
            "warnings": [],
            "contenders": {},
            "agreement": {},
            "quality": {},
            "failed": {},
            "workloads": [],
            "finished": False,
        }
        if self.device.is_gpu:
            self.results["machine"]["device"] = self.device.record()
        if set(settings.what) & set(KERNEL_WHAT):
            self.results["kernels"] = []
        if "serving" in settings.what:
            self.results["serving"] = []
        warning = machine.busy_warning(self.results["machine"]["load_average"], self.results["machine"]["cores"])
        if warning:
            self.results["warnings"].append(warning)

    def _check_contenders(self) -> None:
        ours = [variant_name(weights) for weights in self.settings.weights]
        known = [*ours, *map(static_name, ours), NATIVE, static_name(NATIVE), MTP]
        for name in self.settings.contenders:
            if name not in known:
                raise OptionError("--contenders", f"{name!r} is none of {', '.join(known)}")
        if MTP in self.settings.contenders and "mtp" not in self.settings.what:
            raise OptionError("--contenders", f"{MTP!r} takes part in mtp only, which --what leaves out")

    def _takes_part(self, name: str, static: bool = False) -> bool:
        """Whether a contender is wanted: one that is named, or without names all but static caches on a CPU."""
        return name in self.settings.contenders if self.settings.contenders else self.device.is_gpu or not static

    def run(self) -> dict[str, Any]:
        """Measures everything. After an interruption, `results` holds the rounds that were complete."""
        started = time.perf_counter()
        threads_before = torch.get_num_threads()
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        self.results["machine"]["threads"] = torch.get_num_threads()
        planned = {dtype: workloads(self.settings, dtype) for dtype in self.settings.dtypes}
        try:
            with ExitStack() as stack:
                for dtype, listed in planned.items():
                    if "kernels" in self.results:
                        self.watcher.say(f"kernels in {dtype}")
                        parts = measure_kernels(self.settings, self.config, dtype, self.device, self.watcher)
                        for entry in parts:
                            self.results["kernels"].append(entry)
                            self._write()
                    if "serving" in self.results:
                        self.watcher.say(f"{self.settings.source} in {dtype}")
                        model = self._plugin_model(getattr(torch, DTYPES[dtype]))
                        for entry in measure_serving(self.settings, model, dtype, self.watcher.say):
                            self.results["serving"].append(entry)
                            self._write()
                        del model
                    if listed:
                        self._run_dtype(dtype, listed, stack)
            self.results["finished"] = True
        finally:
            torch.set_num_threads(threads_before)
            self.results["seconds"] = time.perf_counter() - started
            self.results["machine"]["load_average_after"] = machine.load_average()
            if self.device.is_gpu:
                self.results["machine"]["device"]["state_after"] = nvidia_smi(STATE)
            self._write()
        return self.results

    def _run_dtype(self, name: str, listed: list[Workload], stack: ExitStack) -> None:
        dtype = getattr(torch, DTYPES[name])
        self.watcher.say(f"{self.settings.source} in {name}")
        model = self._plugin_model(dtype)
        contenders = self._contenders(model, name, dtype)
        ceilings = Ceilings(sorted({each.linear_dtype for each in contenders} | {dtype}, key=str), self.device)
        others: list[Any] = []
        checkpoint = None
        if self.settings.reads_files:
            self.watcher.say("writing the checkpoint")
            folder = folder_of_files(self.settings, stack)
            checkpoint = checkpoint_folder(self.settings, model, folder)
        if checkpoint is not None and name == "bf16" and self.settings.peers:
            threads = torch.get_num_threads()
            others, failed = start_peers(
                self.settings, model, folder, checkpoint, threads, self.converter, stack, self.watcher.say
            )
            self.results["failed"].update(failed)
            self.results["contenders"].update({peer.name: {"version": peer.version} for peer in others})
        groups = [(workload, self._entrants(workload, contenders, others, checkpoint)) for workload in listed]
        self.watcher.plan(sum(len(entrants) for _, entrants in groups) * (self.settings.rounds + 1))
        for workload, entrants in groups:
            inputs = make_inputs(workload, self.config, dtype, self.settings.seed, self.device)
            if workload.what == "mtp":
                inputs = continue_text(model, inputs, self._text())
            self._run_workload(workload, inputs, entrants, ceilings)

    def _plugin_model(self, dtype: torch.dtype) -> DeepseekV3ForCausalLM:
        if self.settings.source in PRESETS:
            return random_model(copy.deepcopy(self.config), dtype, self.settings.seed, self.device)
        placed = {"device_map": self.device.kind} if self.device.is_gpu else {}
        try:
            return DeepseekV3ForCausalLM.from_pretrained(self.settings.source, dtype=dtype, **placed).eval()
        except (OSError, ValueError) as error:
            raise OptionError("CHECKPOINT_OR_PRESET", f"{self.settings.source}: {reason_of(error)}") from None

    def _contenders(self, model: DeepseekV3ForCausalLM, dtype_name: str, dtype: torch.dtype) -> list[ModelContender]:
        found: list[ModelContender] = []

        def add(name: str, build: Callable[[], PreTrainedModel], linear_dtype: torch.dtype) -> None:
            wanted = [(name, False), (static_name(name), True)]
            wanted = [(title, static) for title, static in wanted if self._takes_part(title, static)]
            if wanted:
                built = build()
                found.extend(
                    ModelContender(title, built, linear_dtype, device=self.device, static=static)
                    for title, static in wanted
                )

        for weights in self.settings.weights:
            variant = VARIANTS[weights]
            add(variant_name(weights), partial(variant.build, model), variant.linear_dtype or dtype)
        try:
            add(NATIVE, partial(share_weights, model), dtype)
        except (RuntimeError, ValueError) as error:  # a configuration that only the plugin knows
            self.results["failed"][NATIVE] = reason_of(error)
        if "mtp" in self.settings.what and self._takes_part(MTP):
            found.insert(1, ModelContender(MTP, model, dtype, use_mtp=True, device=self.device))
        text = self._held_out(model.config)
        for contender in found:
            self.results["contenders"].setdefault(contender.name, describe(contender.model))
            if text is not None and not (contender.static or contender.use_mtp):
                self.watcher.say(f"bits a byte of {contender.name}")
                bits = bits_per_byte(contender.model, *text, window=QUALITY_WINDOW, stride=QUALITY_WINDOW // 2)
                self.results["quality"][f"{contender.name}, {dtype_name}"] = vars(bits)
            if contender.model is not model and not contender.static:
                apart = agreement(model, contender.model, self.settings.seed)
                self.results["agreement"][f"{contender.name}, {dtype_name}"] = apart
        return found

    def _entrants(
        self,
        workload: Workload,
        contenders: Sequence[ModelContender],
        others: Sequence[Contender],
        checkpoint: Path | None,
    ) -> list[Contender]:
        if workload.what == "load":
            forms = {variant_name(weights): weights for weights in self.settings.weights} | {NATIVE: NATIVE}
            return [
                LoadContender(each.name, forms[each.name], checkpoint) for each in contenders if each.name in forms
            ]
        if workload.what == "train":
            return [each for each in contenders if each.name in (PLUGIN, NATIVE)]
        if workload.what == "prefill":
            return [*(each for each in contenders if not (each.use_mtp or each.static)), *others]
        if workload.what == "mtp":
            return list(contenders)
        return [*(each for each in contenders if not each.use_mtp), *others]

    def _tokenizer(self) -> Any:
        """The checkpoint's, or None where it has none."""
        if self.settings.source in PRESETS:
            return None
        try:
            return AutoTokenizer.from_pretrained(self.settings.source)
        except (OSError, ValueError):
            return None

    def _text(self) -> torch.Tensor | None:
        """Real text for MTP, since text decides how often drafts are accepted; None without a tokenizer."""
        if "mtp" not in self.settings.what or (tokenizer := self._tokenizer()) is None:
            return None
        ids = tokenizer(Path(copy.__file__).read_text(encoding="utf-8"))["input_ids"]
        return torch.tensor(ids)

    def _held_out(self, config: DeepseekV3Config) -> tuple[torch.Tensor, int] | None:
        """Text by which forms of the weights are compared, as tokens and their bytes; None without a tokenizer."""
        if (tokenizer := self._tokenizer()) is None or config.max_position_embeddings < QUALITY_WINDOW:
            return None
        _, texts = read_texts(None)
        stream = checked_stream(
            "CHECKPOINT_OR_PRESET", self.settings.source, tokenizer, texts, QUALITY_WINDOW, config.vocab_size
        )[:QUALITY_TOKENS]
        return stream, len(tokenizer.decode(stream).encode("utf-8"))

    def _run_workload(
        self, workload: Workload, inputs: Inputs, entrants: Sequence[Contender], ceilings: Ceilings
    ) -> None:
        by_name = {each.name: each for each in entrants}
        tokens: dict[str, int] = {}
        failed: dict[str, str] = {}
        compiling: dict[str, float] = {}
        experts_used = expected_experts(self.config, workload)
        for name, contender in by_name.items():
            self.watcher.turn(workload.title, f"{name}, warming up")
            try:
                if contender.static:
                    # Of the length of those that are timed, since another cache is compiled for anew
                    started = time.perf_counter()
                    contender.measure(workload, inputs, self.settings.new_tokens)
                    compiling[name] = time.perf_counter() - started
                    tokens[name] = self.settings.new_tokens
                    continue
                if name == NATIVE and contender.weights is not None:
                    # Counted on native, whose routers are modules that are called whatever serves the experts
                    with ExpertsUsed(contender.weights) as used:
                        first = contender.measure(workload, inputs, WARM_UP_TOKENS)
                    experts_used = used.mean()
                else:
                    first = contender.measure(workload, inputs, WARM_UP_TOKENS)
            except Exception as error:  # compilers have errors of their own, and one contender is not the run
                failed[name] = reason_of(error)
                contender.rest()
                continue
            fitting = int(self.settings.turn_seconds / max(first.seconds, 1e-9))
            tokens[name] = max(WARM_UP_TOKENS, min(self.settings.new_tokens, fitting))

        entry: dict[str, Any] = {
            "title": workload.title,
            **vars(workload),
            "experts_used": experts_used,
            "contenders": {},
            "failed": failed,
        }
        self.results["workloads"].append(entry)
        works = {name: self._work(by_name[name], workload, experts_used) for name in tokens}

        def turn(name: str) -> Turn:
            self.watcher.turn(workload.title, name)
            return by_name[name].measure(workload, inputs, tokens[name])

        def after_round(turns: dict[str, list[Turn]], lost: dict[str, str]) -> None:
            entry["failed"] = {**failed, **lost}
            entry["ceilings"] = ceilings.record()
            entry["contenders"] = {
                name: self._figures(by_name[name], taken, workload, works[name], ceilings)
                for name, taken in turns.items()
                if taken
            }
            for name in entry["contenders"].keys() & compiling.keys():
                entry["contenders"][name]["first_generate_seconds"] = compiling[name]
            entry["ratios"] = ratios(entry["contenders"])
            self._write()

        ceilings.start()
        interleave(list(tokens), turn, self.settings.rounds, ceilings.measure, after_round)
        for contender in entrants:
            contender.rest()
        for name, figures in entry["contenders"].items():
            own = by_name[name]
            if isinstance(own, ModelContender):
                figures.update(self._extras(own, workload, inputs, figures, ceilings))
        self._write()

    def _work(self, contender: Contender, workload: Workload, experts_used: float) -> Work | None:
        return None if contender.weights is None else work_of(contender.weights, workload, experts_used)

    def _extras(
        self,
        contender: ModelContender,
        workload: Workload,
        inputs: Inputs,
        figures: dict[str, Any],
        ceilings: Ceilings,
    ) -> dict[str, Any]:
        """What needs a pass of its own: the host's part of a step, a prefill's parts, memory of training."""
        if workload.what in ("decode", "batched") and not (self.device.is_gpu or contender.static):
            calls = kernel_calls(lambda tokens: decode(contender.model, inputs, tokens))
            return {"host": {"seconds": max(figures["median"] - calls.seconds, 0.0), "calls": calls.number}}
        if workload.what == "prefill":
            self.watcher.say(f"{workload.title}: profile of {contender.name}")
            profile = time_by_kind(lambda: contender.measure(workload, inputs, 0), self.device)
            fastest = figures["floor"]["linear_operations"] / ceilings.rate(contender.linear_dtype)
            share = fastest / profile["linear_seconds"] if profile["linear_seconds"] else None
            return {"profile": {**profile, "linear_share_of_rate": share}}
        if workload.what == "train":
            self.watcher.say(f"{workload.title}: memory of {contender.name}")
            if self.device.is_gpu:
                return {"memory": training_memory.measure_on_gpu(contender, workload, inputs)}
            request = {
                "contender": contender.name,
                "checkpoint": None if self.settings.source in PRESETS else self.settings.source,
                "config": self.config.to_dict(),
                "dtype": DTYPES[workload.dtype],
                "batch": workload.batch,
                "length": workload.tokens,
                "seed": self.settings.seed,
                "threads": torch.get_num_threads(),
            }
            try:
                return {"memory": measure_apart(training_memory.__name__, request)}
            except RuntimeError as error:
                return {"memory": {"failed": str(error)}}
        return {}

    def _figures(
        self,
        contender: Contender,
        turns: list[Turn],
        workload: Workload,
        work: Work | None,
        ceilings: Ceilings,
    ) -> dict[str, Any]:
        seconds = [turn.seconds for turn in turns]
        figures: dict[str, Any] = {"seconds": seconds, **spread(seconds), "units_a_turn": turns[0].units}
        figures["tokens_per_second"] = workload.tokens_a_unit / figures["median"]
        if work is not None:
            plain_dtype = getattr(torch, DTYPES[workload.dtype])
            floor = floor_seconds(
                work, ceilings.bandwidth(), ceilings.rate(contender.linear_dtype), ceilings.rate(plain_dtype)
            )
            figures["floor"] = {**work.record(), "seconds": floor, "share": floor / figures["median"]}
        if contender.use_mtp:
            drafted = sum(turn.notes["drafted"] for turn in turns)
            accepted = sum(turn.notes["accepted"] for turn in turns)
            figures["mtp"] = {"drafted": drafted, "accepted": accepted, "acceptance": accepted / max(drafted, 1)}
        if workload.what == "train":
            figures["losses"] = [turn.notes["loss"] for turn in turns]
        if workload.what == "load":
            figures["parts"] = {part: median(turn.notes[part] for turn in turns) for part in turns[0].notes}
        return figures

    def _write(self) -> None:
        if self.settings.json_path is not None:
            write_json(self.settings.json_path, self.results)


def ratios(contenders: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How many times faster each form of the plugin is than each other contender: `"transformers / plugin"`.

    Args:
        contenders: figures by name, each with `seconds`, one for each round.
    """
    found = {}
    for ours in contenders:
        if ours.split()[0] == PLUGIN:
            for other in contenders:
                if other != ours:
                    found[f"{other} / {ours}"] = ratio(contenders[other]["seconds"], contenders[ours]["seconds"])
    return found
