"""The two parts of a layer that decide its speed, each by itself: routed experts, and attention over cached latents.

Every backend that can serve a part runs it on the same tensors. Beside its time stand operations and bytes a second,
and its error against float64 on the same (rounded) inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..kernels import backends, experts_liger, mla_triton, selection, triton_support
from ..kernels.cpu import attention as mla_cpu
from ..models.dsv3.attention_dsv3 import absorbed_attention, softmax_scale
from ..models.dsv3.configuration_dsv3 import DeepseekV3Config
from ..models.dsv3.moe_dsv3 import DeepseekV3Experts
from .devices import Device
from .rounds import Turn, interleave, ratio, reason_of, spread
from .settings import DTYPES, BenchSettings


# Calls of a turn: routing and queries differ between them, so that no cache holds the weights of the chosen experts
CALLS = 8
# Those that read sizes on the host cannot be captured in a CUDA graph, those from the Hub would download something
ON_THE_HOST = ("eager",)
FROM_THE_HUB = ("deepgemm", "sonicmoe")
WITHOUT_GRADIENTS = ("cpu",)
IN_TRITON = (triton_support.NAME, experts_liger.NAME)
DEVIATION = 0.02  # of weights


class Watcher(Protocol):
    """Told what is going on."""

    def say(self, message: str) -> None: ...


@dataclass(frozen=True)
class Part:
    """One measurement.

    Args:
        what: "experts" or "attention". title: what the table calls it.
        size: what else describes it, for the JSON file.
        operations, bytes_read: that one call needs at the least.
        runs: for each backend, a function that makes `CALLS` calls.
        errors: for each backend, relative errors (root mean square) beside float64, by name of the result.
        failed: the reasons of backends that cannot serve it.
        capture: whether the calls may be captured in a CUDA graph.
    """

    what: str
    title: str
    size: dict[str, Any]
    operations: int
    bytes_read: int
    runs: dict[str, Callable[[], Any]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    capture: bool = True


def measure_kernels(
    settings: BenchSettings, config: DeepseekV3Config, dtype_name: str, device: Device, watcher: Watcher
) -> Iterator[dict[str, Any]]:
    """Measures the parts that the settings name, one entry of the results after another.

    Args:
        config: gives the sizes of a layer.
        dtype_name: one of `settings.DTYPES`.
    """
    listed = parts(settings, config, getattr(torch, DTYPES[dtype_name]))
    while True:
        with device.torch:  # not while the caller has its turn
            part = next(listed, None)
            if part is None:
                return
            watcher.say(f"{part.title}, {dtype_name}")
            entry = measure_part(part, settings.rounds, device)
        yield {**entry, "dtype": dtype_name}
        device.tidy()


def parts(settings: BenchSettings, config: DeepseekV3Config, dtype: torch.dtype) -> Iterator[Part]:
    """The measurements in turn on torch's default device, each made when the one before is done with."""
    if "experts" in settings.what:
        experts = make_experts(config, dtype, settings.seed)
        for tokens in sorted(settings.expert_tokens):
            yield experts_part(experts, tokens, settings.seed, with_gradients=False)
        # Of many tokens, as in training
        yield experts_part(experts, max(settings.expert_tokens), settings.seed, with_gradients=True)
        del experts
    if "attention" in settings.what:
        for batch, context in settings.attention:
            yield attention_part(config, batch, context, dtype, settings.seed)


def measure_part(part: Part, rounds: int, device: Device) -> dict[str, Any]:
    """Lets the backends take turns, and puts together what is known of each."""
    failed = dict(part.failed)
    replays: dict[str, tuple[Callable[[], Any], bool]] = {}
    for name, run in part.runs.items():
        try:
            run()
            device.wait()
            replays[name] = captured(run, device) if part.capture and name not in ON_THE_HOST else (run, False)
        except Exception as error:  # compilers have errors of their own, and one backend is not the run
            failed[name] = reason_of(error)

    def turn(name: str) -> Turn:
        seconds, _ = device.timed(replays[name][0])
        return Turn(seconds / CALLS, CALLS)

    turns, lost = interleave(list(replays), turn, rounds, lambda: None, lambda turns, failed: None)
    contenders: dict[str, dict[str, Any]] = {}
    for name, taken in turns.items():
        seconds = [each.seconds for each in taken]
        figures: dict[str, Any] = {"seconds": seconds, **spread(seconds), "replayed": replays[name][1]}
        figures["operations_per_second"] = part.operations / figures["median"]
        figures["bytes_per_second"] = part.bytes_read / figures["median"]
        contenders[name] = {**figures, "errors": part.errors.get(name, {})}
    return {
        "what": part.what,
        "title": part.title,
        **part.size,
        "operations": part.operations,
        "bytes_read": part.bytes_read,
        "contenders": contenders,
        "ratios": {
            f"{other} / {name}": ratio(contenders[other]["seconds"], contenders[name]["seconds"])
            for name in contenders
            for other in contenders
            if other != name
        },
        "failed": {**failed, **lost},
    }


def captured(run: Callable[[], Any], device: Device) -> tuple[Callable[[], Any], bool]:
    """A CUDA graph's replay of a call that has run before, and True; on a CPU the call itself, and False."""
    if not device.is_gpu:
        return run, False
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay, True


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference over that of the exact values; NaN stays NaN."""
    return ((result.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


def make_experts(config: DeepseekV3Config, dtype: torch.dtype, seed: int) -> DeepseekV3Experts:
    """One layer's routed experts of random weights on the current default device, in evaluation mode."""
    experts = DeepseekV3Experts(copy.deepcopy(config)).to(dtype).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0.0, DEVIATION)
    return experts


def routing(config: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts `(T, K)` for each token, all equally likely, and their weights `(T, K)` in fp32."""
    weights, chosen = torch.rand(tokens, config.n_routed_experts).topk(config.num_experts_per_tok, sorted=False)
    return chosen, weights / weights.sum(dim=-1, keepdim=True)


def experts_part(experts: DeepseekV3Experts, tokens: int, seed: int, with_gradients: bool) -> Part:
    """Experts on `tokens` tokens, without gradients or forward and backward."""
    config: Any = experts.config
    torch.manual_seed(seed)
    dtype = experts.gate_up_proj.dtype
    calls = []
    for _ in range(CALLS):
        hidden = torch.randn(tokens, config.hidden_size, dtype=dtype)
        calls.append((hidden, *routing(config, tokens)))
    given = torch.randn(tokens, config.hidden_size, dtype=dtype)
    pairs = tokens * config.num_experts_per_tok
    chosen = sum(index.unique().numel() for _, index, _ in calls) / CALLS
    one_expert = 3 * config.hidden_size * config.moe_intermediate_size
    part = Part(
        "experts",
        f"experts, {tokens:,} token{'s' if tokens > 1 else ''}, forward{' + backward' if with_gradients else ''}",
        {"tokens": tokens, "with_gradients": with_gradients, "experts_used": chosen},
        operations=2 * pairs * one_expert * (3 if with_gradients else 1),
        bytes_read=round(chosen * one_expert * dtype.itemsize),
        capture=not with_gradients,
    )
    experts.requires_grad_(with_gradients)
    experts.train(with_gradients)
    exact = exact_experts(experts, *calls[0], given if with_gradients else None)

    def once(
        hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        if not with_gradients:
            with torch.no_grad():
                return experts(hidden, index, weight), ()
        sources = (hidden.detach().requires_grad_(), weight.detach().requires_grad_(), *experts.parameters())
        output = experts(sources[0], index, sources[1])
        return output, torch.autograd.grad(output, sources, given)

    for backend in backends.EXPERTS.backends:
        name = backend.name
        few_only = name == "batched_mm" and pairs > config.n_routed_experts  # it copies weights for every pair
        if name in FROM_THE_HUB or few_only:
            continue
        if with_gradients and name in WITHOUT_GRADIENTS:
            continue
        reason = interpreter_refusal(name) or backend.module_refusal(experts)
        if reason is not None:
            part.failed[name] = reason
            continue

        def run(name: str = name) -> None:
            config._experts_implementation = name
            for call in calls:
                once(*call)

        config._experts_implementation = name
        try:
            output, gradients = once(*calls[0])
        except Exception as error:  # as in measure_part
            part.failed[name] = reason_of(error)
            continue
        names = ("output", "hidden_gradient", "mixing_gradient", "gate_up_gradient", "down_gradient")
        part.errors[name] = {
            key: relative_error(result, true) for key, result, true in zip(names, (output, *gradients), exact)
        }
        part.runs[name] = run
    return part


def exact_experts(
    experts: DeepseekV3Experts,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    given: torch.Tensor | None,
) -> list[torch.Tensor]:
    """The output in float64, expert after expert, and with `given` the gradients of all that it is computed from."""
    weights = [parameter.detach() for parameter in (experts.gate_up_proj, experts.down_proj)]
    sources = [hidden.double(), weight.double()]
    if given is not None:
        sources += [each.double() for each in weights]
        weights = sources[2:]
        for source in sources:
            source.requires_grad_()
    output = torch.zeros_like(sources[0])
    for expert in range(experts.num_experts):
        tokens, places = torch.where(index == expert)
        gate_up, down = (each[expert].double() for each in weights)
        gate, up = (sources[0][tokens] @ gate_up.T).chunk(2, dim=-1)
        result = (torch.nn.functional.silu(gate) * up) @ down.T
        output = output.index_add(0, tokens, result * sources[1][tokens, places].unsqueeze(-1))
    if given is None:
        return [output]
    return [output.detach(), *torch.autograd.grad(output, sources, given.double())]


def attention_part(config: DeepseekV3Config, batch: int, context: int, dtype: torch.dtype, seed: int) -> Part:
    """Absorbed attention of one new token a row over `context` cached latents, with both absorbing products."""
    torch.manual_seed(seed)
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    weight = torch.empty(heads * (nope + value), rank, dtype=dtype).normal_(0.0, DEVIATION)
    latent, k_rope = (torch.randn(batch, context, width, dtype=dtype) for width in (rank, rope))
    queries = [tuple(torch.randn(batch, heads, 1, width, dtype=dtype) for width in (nope, rope)) for _ in range(CALLS)]
    scaling = softmax_scale(config)
    latents = batch * context * (rank + rope)
    part = Part(
        "attention",
        f"attention over latents, {batch} x {context:,} cached",
        {"batch": batch, "tokens": context},
        operations=2 * batch * heads * (context * (2 * rank + rope) + rank * (nope + value)),
        bytes_read=latents * dtype.itemsize,
    )
    few = min(batch, 4)  # rows, for float64
    q_nope, q_rope, some_latent, some_k_rope = (x[:few].double() for x in (*queries[0], latent, k_rope))
    exact, _ = absorbed_attention(q_nope, q_rope, some_latent, some_k_rope, weight.double(), None, scaling)
    for name, (refusal, attention) in absorbed_backends().items():
        with selection.use(attention=name), torch.no_grad():
            arguments = (latent, k_rope, weight, None)
            reason = interpreter_refusal(name)
            if reason is None and refusal is not None:
                reason = refusal(queries[0][0], *arguments)
            if reason is not None:
                part.failed[name] = reason
                continue

            def run(attention: Callable = attention, arguments: tuple = arguments) -> None:
                with torch.no_grad():
                    for query in queries:
                        attention(*query, *arguments, scaling)

            try:
                output = attention(*queries[0], *arguments, scaling)
            except Exception as error:  # as in measure_part
                part.failed[name] = reason_of(error)
                continue
        part.errors[name] = {"output": relative_error(output[:few], exact)}
        part.runs[name] = run
    return part


def interpreter_refusal(name: str) -> str | None:
    """The reason why a backend's time would mean nothing: Triton's interpreter is for tests."""
    if name in IN_TRITON and triton_support.interpreted():
        return "is interpreted, as TRITON_INTERPRET asks"
    return None


def absorbed_backends() -> dict[str, tuple[Callable | None, Callable]]:
    """For each backend of absorbed attention, what tells why it takes no call, and what computes it."""
    return {
        "cpu": (mla_cpu.absorbed_refusal, mla_cpu.absorbed_attention),
        "triton": (mla_triton.absorbed_refusal, mla_triton.absorbed_attention),
        "torch": (None, lambda *arguments: absorbed_attention(*arguments)[0]),
    }
