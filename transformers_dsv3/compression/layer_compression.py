"""One decoder layer, rounded on the inputs that the layers before it give once they are rounded themselves.

The residual stream of all windows is in a file, `(T, D)`; another takes what the layer makes of it. Weights are read
when their turn comes, and what is in memory at a time is one matrix with its Hessian, or one part of the windows.
Sums are made in an order that only the settings decide, so that a layer that is begun anew comes out the same.

Shape suffixes: T tokens of all windows, D hidden size, E routed experts, K experts chosen a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.dsv3.modeling_dsv3 import DeepseekV3Model
from ..models.dsv3.moe_dsv3 import DeepseekV3MoE
from .checkpoint_weights import CheckpointWeights
from .compressed_files import CompressedFiles
from .compressed_layout import Layout, kind_of
from .gptq import InverseFactor, gptq, inverse_factor, round_to_nearest
from .row_file import RowFile
from .settings import CompressionSettings


# How the weights of an expert were rounded, the first first
OWN_TOKENS, LAYERS_TOKENS, NEAREST = "gptq", "gptq, the layer's tokens", "nearest"
# Tokens that run through a layer at once: so many fp32 values of the residual stream, within these limits
_VALUES_AT_ONCE, _FEWEST, _MOST = 1 << 22, 1024, 4096


@dataclass
class LayerReport:
    """What came of one layer: its number in the checkpoint, tokens routed to each expert, how each was rounded."""

    layer: int
    tokens_per_expert: list[int] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)


def tokens_at_once(hidden_size: int, window: int) -> int:
    """Tokens that run through a layer together, in whole windows."""
    wanted = min(max(_VALUES_AT_ONCE // hidden_size, _FEWEST), _MOST)
    return max(1, wanted // window) * window


class LayerCompressor:
    """Compresses the layers of one checkpoint.

    Args:
        model: on the meta device, but for its rotary embedding. A layer has its weights while it is compressed.
        windows: `(number of windows, tokens of one)`.
        folder: for activations.
    """

    def __init__(
        self,
        model: DeepseekV3Model,
        source: CheckpointWeights,
        files: CompressedFiles,
        settings: CompressionSettings,
        windows: tuple[int, int],
        folder: Path,
    ):
        self.model, self.source, self.files, self.settings = model, source, files, settings
        self.layout: Layout = files.layout
        self.n_windows, self.window = windows
        self.n_tokens = self.n_windows * self.window
        self.folder = folder
        self.tokens_at_once = tokens_at_once(model.config.hidden_size, self.window)

    def rows(self, name: str) -> RowFile:
        """The residual stream of that name."""
        return RowFile(self.folder / f"{name}.rows", self.n_tokens, self.model.config.hidden_size)

    def parts(self, n_tokens: int | None = None) -> Iterator[slice]:
        """All tokens, in parts that run at once."""
        total = self.n_tokens if n_tokens is None else n_tokens
        for start in range(0, total, self.tokens_at_once):
            yield slice(start, min(start + self.tokens_at_once, total))

    def compress(self, number: int, given: RowFile, made: RowFile) -> LayerReport:
        """Rounds and writes the tensors of `model.layers.{number}`.

        Args:
            given: residual stream before the layer. made: file to create, the stream behind it.
        """
        config = self.model.config
        prefix = f"model.layers.{number}."
        depth = number - config.num_hidden_layers
        layer: nn.Module = self.model.layers[number] if depth < 0 else self.model.mtp_layers[depth]
        self._fill(layer, prefix)
        try:
            self._attention(layer, prefix, given)
            normalised = self.rows("normalised").create()
            made.create()
            is_mixture = isinstance(layer.mlp, DeepseekV3MoE)
            hessian = torch.zeros(config.hidden_size, config.hidden_size)
            chosen, mixing = [], []
            for part in self.parts():
                hidden = self._attend(layer, given.read(part))
                made.write(part, hidden)
                normed = layer.post_attention_layernorm(hidden)  # type: ignore[operator]
                normalised.write(part, normed)
                hessian.addmm_(normed.T, normed)
                if is_mixture:
                    _, weights, indices = layer.mlp.gate(normed)  # type: ignore[union-attr,operator]
                    chosen.append(indices.to(torch.int32))
                    mixing.append(weights)
            activation: Callable = (layer.mlp.experts if is_mixture else layer.mlp).act_fn  # type: ignore
            factor = inverse_factor(hessian)
            del hessian
            report = LayerReport(number)
            network = _Network(self, activation, normalised, made)
            if is_mixture:
                shared = self.source.tensors.get(f"{prefix}mlp.shared_experts.gate_proj.weight")
                if shared is not None and shared.nbytes:  # some checkpoints have them at size zero
                    network.compress(f"{prefix}mlp.shared_experts.", factor)
                self._experts(prefix, network, torch.cat(chosen), torch.cat(mixing), factor, report)
            else:
                network.compress(f"{prefix}mlp.", factor)
            normalised.remove()
            return report
        finally:
            layer.to("meta")

    def project(self, depth: int, previous: RowFile, embedded: Callable[[slice], torch.Tensor], made: RowFile) -> None:
        """What an MTP layer does before its own decoder layer: the pair of hidden state and next embedding, projected.

        Args:
            previous: hidden states of the depth before, normalised. embedded: from a part of the tokens to embeddings
            of the tokens `depth + 1` on.
        """
        layer = self.model.mtp_layers[depth]
        prefix = f"model.layers.{self.model.config.num_hidden_layers + depth}."
        norms = [self.source.read(f"{prefix}{name}.weight").float() for name in ("enorm", "hnorm")]
        eps = layer.embed_layernorm.variance_epsilon  # type: ignore[union-attr]

        def pairs() -> Iterator[tuple[slice, torch.Tensor]]:
            for part in self.parts():
                both = (embedded(part), previous.read(part))
                yield part, torch.cat([F.rms_norm(x, x.shape[-1:], w, eps) for x, w in zip(both, norms)], dim=-1)

        width = 2 * self.model.config.hidden_size
        hessian = torch.zeros(width, width)
        for _, pair in pairs():
            hessian.addmm_(pair.T, pair)
        weight = self.round(f"{prefix}eh_proj.weight", inverse_factor(hessian))
        made.create()
        for part, pair in pairs():
            made.write(part, pair @ weight.T)

    def round(self, name: str, factor: InverseFactor | None) -> torch.Tensor:
        """Rounds a weight and hands it to the files; what it stands for then, fp32 `(N, K)`.

        Raises:
            ValueError: for weights that are not finite; names the tensor.
        """
        bits = self.layout.bits.get(name)
        weight = self.source.read(name)
        if bits is None:
            self.files.put(name, weight)
            return weight.float()
        try:
            rounded = round_to_nearest(weight, bits) if factor is None else gptq(weight, factor, bits)
        except ValueError as error:
            raise ValueError(f"{name} cannot be rounded: {error}.") from error
        del weight
        self.files.put(name, rounded)
        return rounded.dequantized()

    def _fill(self, layer: nn.Module, prefix: str) -> None:
        """Reads what is not rounded, and what attention needs to run before it is."""
        weights = {}
        for name in self.layout_names(prefix):
            inside, kind = name.removeprefix(prefix), kind_of(name)
            if kind == "head":  # the model's own again
                stored, bits = self.source.read(name), self.layout.bits.get(name)
                self.files.put(name, stored if bits is None else round_to_nearest(stored, bits))
            elif kind is None or not self.source.tensors[name].nbytes:
                stored = self.source.read(name)
                self.files.put(name, stored)
                weights[inside] = stored.float()
            elif inside.startswith("self_attn."):
                weights[inside] = self.source.read(name).float()
        layer.load_state_dict(weights, assign=True, strict=False)
        layer.requires_grad_(False).eval()

    def layout_names(self, prefix: str) -> list[str]:
        return [name for names in self.layout.files for name in names if name.startswith(prefix)]

    def _attend(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        windows = hidden.view(-1, self.window, hidden.shape[-1])
        inputs = self.model.begin(inputs_embeds=windows, use_cache=False).layer_inputs
        return layer.attend(windows, **inputs).flatten(0, 1)  # type: ignore[operator,no-any-return]

    def _attention(self, layer: Any, prefix: str, given: RowFile) -> None:
        """Rounds the projections of attention, whose inputs are taken while it runs as it was."""
        attention = layer.self_attn
        first = "q_a_proj" if attention.q_proj is None else "q_proj"
        # Projections that have the same input, the one that it is taken at first
        shared = {first: [first, "kv_a_proj_with_mqa"], "o_proj": ["o_proj"]}
        if attention.q_proj is None:
            shared["q_b_proj"] = ["q_b_proj"]
        hessians, hooks = {}, []
        for name in shared:
            module = getattr(attention, name)
            hessians[name] = torch.zeros(module.in_features, module.in_features)

            def take(module: nn.Module, inputs: tuple, hessian: torch.Tensor = hessians[name]) -> None:
                flat = inputs[0].flatten(0, -2)
                hessian.addmm_(flat.T, flat)

            hooks.append(module.register_forward_pre_hook(take))
        for part in self.parts():
            self._attend(layer, given.read(part))
        for hook in hooks:
            hook.remove()
        for name, together in shared.items():
            factor = inverse_factor(hessians.pop(name))
            for projection in together:
                weight = self.round(f"{prefix}self_attn.{projection}.weight", factor)
                getattr(attention, projection).weight = nn.Parameter(weight, requires_grad=False)

    def _experts(
        self,
        prefix: str,
        network: _Network,
        chosen: torch.Tensor,
        mixing: torch.Tensor,
        layers_factor: InverseFactor | None,
        report: LayerReport,
    ) -> None:
        """Rounds the routed experts one after another.

        Args:
            chosen, mixing: `(T, K)`, the router's choice and weights.
        """
        for expert in range(self.model.config.n_routed_experts):
            tokens, places = torch.where(chosen == expert)
            count = len(tokens)
            report.tokens_per_expert.append(count)
            own = count >= self.settings.min_tokens
            method = network.compress(
                f"{prefix}mlp.experts.{expert}.", None if own else layers_factor, tokens, mixing[tokens, places], own
            )
            report.methods.append(method)


class _Network:
    """SwiGLU networks over the same normalised inputs, whose outputs are added to the residual stream."""

    def __init__(self, compressor: LayerCompressor, activation: Callable, inputs: RowFile, made: RowFile):
        self.compressor, self.activation = compressor, activation
        self.inputs, self.made = inputs, made

    def compress(
        self,
        prefix: str,
        factor: InverseFactor | None,
        tokens: torch.Tensor | None = None,
        mixing: torch.Tensor | None = None,
        own: bool = False,
    ) -> str:
        """Rounds one network, and adds its outputs.

        Args:
            factor: of the inputs of all tokens.
            tokens: int64 `(n,)`, those that it is for; None for all. mixing: their weights, fp32 `(n,)`.
            own: whether to calibrate on `tokens` alone. Otherwise on all; of the last matrix, whose inputs have to be
                computed for that, on some, evenly spaced.

        Returns:
            How the last matrix was rounded: one of the three methods.
        """
        compressor = self.compressor
        n_tokens = compressor.n_tokens if tokens is None else len(tokens)
        kept: list[torch.Tensor] = []  # of few tokens the inputs are read once

        def inputs() -> Iterator[tuple[Any, torch.Tensor]]:
            for part in compressor.parts(n_tokens):
                rows = part if tokens is None else tokens[part]
                if kept and n_tokens <= compressor.tokens_at_once:
                    yield rows, kept[0]
                    continue
                kept[:] = [self.inputs.read(rows)]
                yield rows, kept[0]

        if own:
            hessian = torch.zeros(self.inputs.shape[1], self.inputs.shape[1])
            for _, x in inputs():
                hessian.addmm_(x.T, x)
            factor = inverse_factor(hessian)
            del hessian
        gate, up = (compressor.round(f"{prefix}{name}_proj.weight", factor) for name in ("gate", "up"))

        def inside(x: torch.Tensor) -> torch.Tensor:
            return self.activation(x @ gate.T) * (x @ up.T)  # type: ignore[no-any-return]

        hessian = torch.zeros(gate.shape[0], gate.shape[0])
        if own or tokens is None:
            for _, x in inputs():
                y = inside(x)
                hessian.addmm_(y.T, y)
        elif factor is not None:
            spaced = torch.arange(0, compressor.n_tokens, -(-compressor.n_tokens // compressor.tokens_at_once))
            y = inside(self.inputs.read(spaced))
            hessian.addmm_(y.T, y)
        factor = inverse_factor(hessian)
        del hessian
        down = compressor.round(f"{prefix}down_proj.weight", factor)
        start = 0
        for rows, x in inputs():
            y = inside(x) @ down.T
            if mixing is not None:
                y *= mixing[start : start + len(x), None]
            start += len(x)
            self.made.add(rows, y)
        if factor is None:
            return NEAREST
        return OWN_TOKENS if own or tokens is None else LAYERS_TOKENS
