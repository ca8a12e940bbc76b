"""How a model may be split over GPUs, and what one of them then holds and does in a step."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import cached_property

from ...models.dsv3.configuration_dsv3 import DeepseekV3Config
from ...option_error import OptionError
from ..pipeline.kinds import rank_of_stage
from .gpus import Gpu
from .layout import PieceTimes, Pipeline
from .units import RECOMPUTATION, Unit, operations_per_token, units_of


# Bytes of a parameter: bf16 for the products, gradients summed in fp32; and of what the optimizer keeps, fp32 weights
# with Adam's two moments, or with Muon's one of matrices
WEIGHT, GRADIENT = 2, 4
OPTIMIZERS = {"adamw": 12, "muon": 8}
# Of an H100's 132 multiprocessors, those that DeepSeek-V3 had send tokens while the others compute (section 3.2.2)
SENDING = 20 / 132
# Fused attention computes its scores again on the way back: five products for two
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Workload:
    """What is to be trained.

    Args:
        config: of the model.
        sequence: tokens of one sequence.
        global_batch: sequences of one optimizer step.
        micro_batch: sequences of one forward pass of a GPU.
        accumulation: passes through the pipeline for one step, each of which fills and empties it.
        mtp: whether MTP layers are trained.
        optimizer: "adamw" or "muon".

    Raises:
        OptionError: for numbers that are not at least 1, and an optimizer that is not known.
    """

    config: DeepseekV3Config
    sequence: int = 4096
    global_batch: int = 15360
    micro_batch: int = 1
    accumulation: int = 1
    mtp: bool = True
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        for option, value in (
            ("--sequence", self.sequence),
            ("--global-batch", self.global_batch),
            ("--micro-batch", self.micro_batch),
            ("--accumulation", self.accumulation),
        ):
            if value < 1:
                raise OptionError(option, f"must be at least 1, not {value}")
        if self.optimizer not in OPTIMIZERS:
            raise OptionError("--optimizer", f"is one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.sequence * self.global_batch

    @cached_property
    def units(self) -> list[Unit]:
        return units_of(self.config, self.sequence, self.mtp)

    @cached_property
    def kinds(self) -> Counter[Unit]:
        """How often each unit is there, whatever its name."""
        return Counter(replace(unit, name="") for unit in self.units)


@dataclass(frozen=True)
class Split:
    """How the model is divided, and what is traded for memory.

    Args:
        tp: GPUs that share every product and the tokens between.
        pp: ranks of the pipeline.
        ep: GPUs that share the experts, of the `tp * dp` that have the same layers.
        dp: GPUs, or groups of `tp`, that have batches of their own.
        schedule: one of `SCHEDULES`; None without a pipeline.
        stages_per_rank: of Interleaved1F1B; None for 2.
        recompute: one of `RECOMPUTATION`.
        fp8: whether products, and tokens on their way to experts, are in FP8.
        sharded: whether weights and gradients are divided over `dp` too (FSDP2), not only what the optimizer keeps.
    """

    tp: int
    pp: int
    ep: int
    dp: int
    schedule: str | None
    recompute: str = "none"
    fp8: bool = False
    sharded: bool = False
    stages_per_rank: int | None = None

    def __str__(self) -> str:
        parts = [f"TP{self.tp}", f"PP{self.pp}", f"EP{self.ep}", f"DP{self.dp}", self.schedule or "no pipeline"]
        parts += ["FP8" if self.fp8 else "BF16"]
        parts += ["FSDP"] if self.sharded else []
        return " ".join(parts + ([] if self.recompute == "none" else [f"{self.recompute} recomputation"]))

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp

    def check(self, workload: Workload, gpu: Gpu) -> int:
        """Microbatches of one pass through the pipeline.

        Raises:
            OptionError: for what does not divide, or is not there on such a GPU.
        """
        config = workload.config
        for option, value in (("--tp", self.tp), ("--pp", self.pp), ("--ep", self.ep), ("--gpus", self.dp)):
            if value < 1:
                raise OptionError(option, f"must be at least 1, not {value}")
        if config.num_attention_heads % self.tp or self.tp > gpu.per_node:
            raise OptionError(
                "--tp",
                f"{self.tp} must divide {config.num_attention_heads} heads and lie in one machine of {gpu.per_node}",
            )
        if config.moe_layers and config.n_routed_experts % self.ep or (self.dp * self.tp) % self.ep:
            raise OptionError(
                "--ep",
                f"{self.ep} must divide {config.n_routed_experts} experts and the {self.dp * self.tp} GPUs of a stage",
            )
        if self.recompute not in RECOMPUTATION:
            raise OptionError("--recompute", f"is one of {', '.join(RECOMPUTATION)}, not {self.recompute!r}")
        if self.fp8 and gpu.fp8 is None:
            raise OptionError("--fp8", f"a {gpu.name} has no products in FP8")
        together = self.dp * workload.micro_batch * workload.accumulation
        microbatches, rest = divmod(workload.global_batch, together)
        if rest or not microbatches:
            raise OptionError(
                "--global-batch",
                f"{workload.global_batch} sequences do not divide by {together}: data parallel {self.dp}, "
                f"microbatches of {workload.micro_batch}, accumulation {workload.accumulation}",
            )
        if (self.schedule is None) != (self.pp == 1):
            raise OptionError("--schedule", f"{self.schedule} with {self.pp} ranks of a pipeline")
        if self.schedule is not None:
            Pipeline(self.schedule, self.pp, microbatches, self.stages_per_rank)
        return microbatches


@dataclass(frozen=True)
class Plan:
    """What one split gives.

    Attributes:
        seconds: of a step.
        parts: seconds of a step in which the mean GPU does each kind of thing, idle time among them; they sum up.
        memory: bytes of the fullest GPU by part.
        busy: of each rank of the pipeline, the share of its time in which it works.
        pipeline: None without one.
        times: of the pieces, `workload.units`, in it.
        bounds: where its stages begin among them.
    """

    workload: Workload
    split: Split
    gpu: Gpu
    seconds: float
    parts: dict[str, float]
    memory: dict[str, float]
    busy: list[float]
    pipeline: Pipeline | None
    times: PieceTimes
    bounds: list[int]

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.gpu.room

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.workload.tokens / self.seconds / self.split.gpus

    @property
    def tokens_per_day(self) -> float:
        """Of all."""
        return self.workload.tokens / self.seconds * 86400

    @property
    def idle(self) -> float:
        """Share of the pipeline's time in which a GPU waits, 0 without one."""
        return 1 - sum(self.busy) / len(self.busy)

    @property
    def flops(self) -> float:
        """Floating-point operations of the model a second on one GPU."""
        return self.tokens_per_second * operations_per_token(self.workload.units)

    @property
    def utilisation(self) -> float:
        """`flops` over the rate that the GPU's matrix products reach."""
        return self.flops / self.gpu.rate(self.split.fp8)

    def days(self, tokens: float) -> float:
        return tokens / self.tokens_per_day

    def gpu_hours(self, tokens: float) -> float:
        return tokens / self.tokens_per_second / 3600


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a split as if its ranks had as equal work as the largest piece lets them have."""

    seconds: float
    memory_bytes: float


def estimate(workload: Workload, split: Split, gpu: Gpu) -> Estimate:
    """What a split gives at the best, without a cut and without a simulation. Takes a millisecond.

    Raises:
        OptionError: as `Split.check` does.
    """
    microbatches = split.check(workload, gpu)
    place, tokens = RECOMPUTATION.index(split.recompute), _tokens(workload, split)
    work = largest = kept = logits = others = experts = 0.0
    for unit, count in workload.kinds.items():
        one = sum(sum(way.values()) for way in _times(unit, workload, split, gpu))
        work, largest = work + count * one, max(largest, one)
        kept += count * unit.kept_bytes(place, split.fp8) * tokens
        logits = max(logits, unit.logits * tokens)
        others += count * unit.parameters / split.tp / split.pp
        experts += count * unit.expert_parameters / split.ep / split.pp
    filling = 0.0
    if split.schedule is not None:  # work at the start and the end, over that of a microbatch on a rank
        pieces = {"GPipe": 1, "1F1B": 1, "Interleaved1F1B": split.stages_per_rank or 2, "ZBV": 6, "DualPipeV": 3}
        filling = (split.pp - 1) / pieces[split.schedule]
    seconds = (microbatches + filling) * workload.accumulation * max(work / split.pp, largest)
    once = _once_a_step(workload, split, gpu, (others, experts))
    memory = _states(workload, split, others, experts, 0.0)
    kept *= max(1.0, microbatches / split.pp) if split.schedule == "GPipe" else 1.0
    return Estimate(seconds + sum(once.values()), sum(memory.values()) + kept + logits / split.pp)


def plan(workload: Workload, split: Split, gpu: Gpu, tries: int = 60) -> Plan:
    """Time and memory of a split, its pipeline simulated.

    Args:
        tries: simulated steps to find a better cut of the pipeline by.

    Raises:
        OptionError: as `Split.check` does, and for more stages than there are pieces.
    """
    microbatches = split.check(workload, gpu)
    units = workload.units
    kinds = [_times(unit, workload, split, gpu) for unit in units]
    times = PieceTimes(*(tuple(sum(kind[way].values()) for kind in kinds) for way in range(3)))
    pipeline, bounds, rank_of, alive = None, [0, len(units)], [0], {0: 1}
    seconds, busy = microbatches * sum(times.whole), [1.0]
    if split.schedule is not None:
        hop = gpu.network if split.tp * split.pp > gpu.per_node else gpu.link
        carried = 2.0 * workload.config.hidden_size * _tokens(workload, split) / (hop * gpu.reached.network)
        pipeline = Pipeline(split.schedule, split.pp, microbatches, split.stages_per_rank, carried)
        bounds = pipeline.cut(times, tries)
        seconds = pipeline.seconds(times, bounds)
        busy = [microbatches * load / seconds for load in pipeline.loads(times.whole, bounds)]
        alive = pipeline.first(times, bounds).most_alive
        rank_of = [rank_of_stage(split.schedule, split.pp, stage) for stage in range(len(bounds) - 1)]
    seconds, microbatches = seconds * workload.accumulation, microbatches * workload.accumulation
    parts: dict[str, float] = defaultdict(float)
    for kind in kinds:
        for way in kind:
            for name, value in way.items():
                parts[name] += value * microbatches / split.pp
    parts["idle in the pipeline"] = seconds - microbatches * sum(times.whole) / split.pp
    memory, owned = _fullest(units, workload, split, bounds, alive, rank_of)
    once = _once_a_step(workload, split, gpu, owned)
    total = seconds + sum(once.values())
    return Plan(workload, split, gpu, total, {**parts, **once}, memory, busy, pipeline, times, bounds)


def _tokens(workload: Workload, split: Split) -> float:
    """Of one microbatch on one GPU, where those of a tensor-parallel group share them."""
    return workload.sequence * workload.micro_batch / split.tp


def _times(unit: Unit, workload: Workload, split: Split, gpu: Gpu) -> tuple[dict[str, float], ...]:
    """Seconds by kind of a piece's forward pass, gradient of inputs and gradient of weights, for one microbatch."""
    tokens = _tokens(workload, split)
    hidden = workload.config.hidden_size
    # Scores of the vocabulary stay in bf16
    is_fp8 = split.fp8 and unit.part != "head"
    rate, reached = gpu.rate(is_fp8), gpu.reached
    products = 2.0 * unit.products * tokens / rate
    context = unit.context * tokens / (gpu.bf16 * reached.attention)
    rest = unit.traffic * tokens / (gpu.bandwidth * reached.bandwidth)
    between = 0.0
    if split.tp > 1 and unit.part != "embedding":  # gathered before each half, summed behind it
        between = 2 * 2.0 * hidden * tokens * (split.tp - 1) / (gpu.link * reached.network)
    sent = _sent_to_experts(unit, workload, split, gpu)
    ways = [
        {"matrix products": products, "attention": context, "other operations": rest},
        {"matrix products": products, "attention": ATTENTION_BACKWARD * context, "other operations": rest},
        {"matrix products": products, "other operations": rest},
    ]
    if split.recompute == "full":
        again = {"recomputation": products + context + rest}
    else:
        again = {"recomputation": 2.0 * unit.again * tokens / rate + rest} if split.recompute == "selective" else {}
    ways[1] |= again
    overlapped = split.schedule == "DualPipeV" and sent > 0
    if overlapped:
        ways = [{kind: value / (1 - SENDING) for kind, value in way.items()} for way in ways]
    compute = sum(sum(way.values()) for way in ways)
    exposed = max(0.0, 2 * sent - compute) / 2 if overlapped else sent
    twice = 2 if split.recompute == "full" else 1  # a forward pass that is run again sends again
    for way, times in zip(ways, (1, twice)):
        way["tokens to experts and back"] = exposed * times
        way["tensor parallelism"] = between * times
    return tuple(ways)


def _sent_to_experts(unit: Unit, workload: Workload, split: Split, gpu: Gpu) -> float:
    """Seconds in which a microbatch's tokens go to their experts and come back, once.

    A token crosses the network once for each machine with experts of its, to be handed on there (DeepSeek-V3, section
    3.2.2), and `topk_group` bounds in how many these are.
    """
    if not unit.copies or split.ep == 1:
        return 0.0
    config, tokens = workload.config, _tokens(workload, split)
    there, back = (1.0 if split.fp8 else 2.0), 2.0
    bytes_both = config.hidden_size * (there + back) * tokens
    nodes = max(1, split.ep // gpu.per_node)
    reach = nodes * (1 - (1 - 1 / nodes) ** unit.copies) if nodes > 1 else 1.0
    if config.n_group > 1:
        reach = min(reach, float(config.topk_group))
    far = bytes_both * reach * (nodes - 1) / nodes / gpu.network
    in_node = min(split.ep, gpu.per_node)
    near = bytes_both * unit.copies * (in_node - 1) / in_node / gpu.link
    return max(far, near) / gpu.reached.network


def _fullest(
    units: list[Unit],
    workload: Workload,
    split: Split,
    bounds: list[int],
    alive: dict[int, int],
    rank_of: list[int],
) -> tuple[dict[str, float], tuple[float, float]]:
    """Bytes by part on the fullest GPU, and the most parameters that one has: others', and routed experts'."""
    tokens = _tokens(workload, split)
    ranks: list[dict[str, float]] = [defaultdict(float) for _ in range(split.pp)]
    owned = [[0.0, 0.0] for _ in range(split.pp)]
    place = RECOMPUTATION.index(split.recompute)
    for stage, (start, end) in enumerate(zip(bounds, bounds[1:])):
        rank = rank_of[stage]
        for unit in units[start:end]:
            owned[rank][0] += unit.parameters / split.tp
            owned[rank][1] += unit.expert_parameters / split.ep
            ranks[rank]["activations"] += unit.kept_bytes(place, split.fp8) * tokens * alive[stage]
            ranks[rank]["logits"] = max(ranks[rank]["logits"], unit.logits * tokens)
    largest = max(unit.parameters / split.tp + unit.expert_parameters / split.ep for unit in units)
    for memory, (others, experts) in zip(ranks, owned):
        memory.update(_states(workload, split, others, experts, largest))
    fullest = max(ranks, key=lambda memory: sum(memory.values()))
    others, experts = max(owned, key=sum)
    order = ("weights", "gradients", "optimizer", "activations", "logits")
    return {part: fullest[part] for part in order}, (others, experts)


def _states(workload: Workload, split: Split, others: float, experts: float, largest: float) -> dict[str, float]:
    """Bytes of a GPU that has so many parameters, and so many of experts, before they are sharded.

    Args:
        largest: parameters of the largest piece, two of which are whole at a time where weights are sharded.
    """
    replicas = _replicas(split)
    held = others / split.dp + experts / replicas if split.sharded else others + experts
    return {
        "weights": WEIGHT * (held + (2 * largest if split.sharded else 0.0)),
        "gradients": GRADIENT * held,
        "optimizer": OPTIMIZERS[workload.optimizer] * (others / split.dp + experts / replicas),
    }


def _replicas(split: Split) -> int:
    """How many GPUs have the same experts."""
    return split.dp * split.tp // split.ep


def _once_a_step(workload: Workload, split: Split, gpu: Gpu, owned: tuple[float, float]) -> dict[str, float]:
    """Seconds of what is done once a step, nothing of it hidden behind anything."""
    replicas = _replicas(split)
    sent = sum(
        parameters * (WEIGHT + GRADIENT) * (group - 1) / group
        for parameters, group in zip(owned, (split.dp, replicas))
    )
    if split.sharded:  # weights are gathered once more, for the way back
        sent += owned[0] * WEIGHT + owned[1] * WEIGHT * (replicas > 1)
    is_far = split.tp * split.dp > gpu.per_node
    wire = (gpu.network if is_far else gpu.link) * gpu.reached.network
    mine = owned[0] / split.dp + owned[1] / replicas
    moved = mine * (2 * OPTIMIZERS[workload.optimizer] + GRADIENT + WEIGHT)
    optimizer = moved / (gpu.bandwidth * gpu.reached.bandwidth)
    if workload.optimizer == "muon":
        # Five iterations of Newton-Schulz of a matrix of m by n, m the smaller: 20 m n m + 10 m m m operations
        width = min(workload.config.moe_intermediate_size, workload.config.hidden_size)
        optimizer += 25.0 * width * mine / gpu.rate(fp8=False)
    return {"gradients and weights between GPUs": sent / wire, "optimizer": optimizer}
