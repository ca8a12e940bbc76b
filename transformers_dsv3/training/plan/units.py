"""The pieces that a pipeline can be cut into, in order, and what one token costs in each.

Halves of layers, attention and network, the head and each MTP layer's halves and head apart. All numbers are of a
forward pass unless said; a backward pass is twice its matrix products, once for inputs and once for weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...models.dsv3.configuration_dsv3 import DeepseekV3Config


# What a layer keeps for its backward pass: everything; not what norms, activation functions and the up-projections of
# latents give (DeepSeek-V3, section 3.2.3); or its input alone
RECOMPUTATION = ("none", "selective", "full")


@dataclass(frozen=True)
class Unit:
    """One piece.

    Args:
        name: which, for people.
        part: what kind of piece it is.
        parameters: without routed experts.
        expert_parameters: of all routed experts.
        products: parameters that one token is multiplied with, of the routed experts those chosen.
        context: floating-point operations of attention with the tokens before, half of the sequence in the mean.
        traffic: bytes that operations other than products read and write.
        kept: bytes for the backward pass, by the name in `RECOMPUTATION`.
        again: parameters that one token is multiplied with once more under "selective".
        copies: experts that a token is sent to.
        halved: of `kept`, the bytes that FP8 halves: inputs of products, and those of activation functions where
            these are computed again.
        logits: bytes of a head's scores in fp32 and their gradient in bf16, held for one microbatch at a time.
    """

    name: str
    part: str
    parameters: int = 0
    expert_parameters: int = 0
    products: int = 0
    context: float = 0.0
    traffic: float = 0.0
    kept: tuple[float, float, float] = (0.0, 0.0, 0.0)
    again: int = 0
    copies: int = 0
    halved: tuple[float, float, float] = (0.0, 0.0, 0.0)
    logits: float = 0.0

    def kept_bytes(self, recomputation: int, fp8: bool) -> float:
        """Bytes a token keeps for the backward pass, by the place in `RECOMPUTATION`."""
        return self.kept[recomputation] - (self.halved[recomputation] / 2 if fp8 else 0.0)


def units_of(config: DeepseekV3Config, sequence: int, mtp: bool = True) -> list[Unit]:
    """The pieces of a model, embedding first.

    Args:
        sequence: tokens of one.
        mtp: whether MTP layers are trained.
    """
    hidden, vocabulary = config.hidden_size, config.vocab_size
    copies = 0 if config.tie_word_embeddings else 1
    units = [Unit("embedding", "embedding", parameters=hidden * vocabulary, traffic=4.0 * hidden)]
    for layer in range(config.num_hidden_layers):
        units += [_attention(config, sequence, f"layer {layer}"), _network(config, layer, f"layer {layer}")]
    units.append(_head(config, "head", copies))
    for depth in range((config.num_nextn_predict_layers or 0) if mtp else 0):
        name = f"MTP layer {depth}"
        joined = 2 * hidden * hidden  # of the hidden state and the next token's embedding
        units += [
            _attention(config, sequence, name, joined),
            _network(config, config.num_hidden_layers + depth, name),
            _head(config, f"{name}'s head", 0),
        ]
    return units


def _attention(config: DeepseekV3Config, sequence: int, name: str, joined: int = 0) -> Unit:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    width, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    latent = rank + config.qk_rope_head_dim
    queries = config.q_lora_rank or 0
    up = heads * (rank * (config.qk_nope_head_dim + value) + width * queries)
    down = hidden * (latent + (queries or heads * width))
    products = up + down + heads * value * hidden + joined
    heads_width = heads * (2 * width + value)  # queries, keys and values
    everything = 2 * hidden + 2 * (queries + latent) + heads_width + heads * value
    return Unit(
        name=f"{name} attention",
        part="attention",
        parameters=products + queries + rank + 2 * hidden * (2 if joined else 1),  # and the norms'
        products=products,
        context=float(sequence * heads * (width + value)),
        traffic=2.0 * (6 * hidden + 2 * heads_width),
        kept=(2.0 * everything, 2.0 * (hidden + queries + latent + heads * value), 2.0 * hidden),
        halved=(2.0 * (hidden + queries + rank + heads * value), 2.0 * (queries + rank + heads * value), 0.0),
        again=up,
    )


def _network(config: DeepseekV3Config, layer: int, name: str) -> Unit:
    hidden = config.hidden_size
    if not config.is_moe(layer):
        width = config.intermediate_size
        return Unit(
            name=f"{name} network",
            part="network",
            parameters=3 * hidden * width,
            products=3 * hidden * width,
            traffic=2.0 * (6 * hidden + 3 * width),
            kept=(2.0 * (2 * hidden + 3 * width), 2.0 * (hidden + 2 * width), 2.0 * hidden),
            halved=(2.0 * (hidden + width), 4.0 * width, 0.0),
        )
    chosen, experts, width = config.num_experts_per_tok, config.n_routed_experts, config.moe_intermediate_size
    shared = config.n_shared_experts * width
    widths = shared + chosen * width
    sent = 2.0 * chosen * hidden
    return Unit(
        name=f"{name} experts",
        part="experts",
        parameters=hidden * (3 * shared + experts),
        expert_parameters=3 * hidden * width * experts,
        products=hidden * (3 * widths + experts),
        traffic=2.0 * (6 * hidden + 3 * widths + 4 * chosen * hidden),
        kept=(2.0 * (2 * hidden + 3 * widths) + sent, 2.0 * (hidden + 2 * widths) + sent, 2.0 * hidden),
        copies=chosen,
        halved=(2.0 * (hidden + widths) + sent, 4.0 * widths + sent, 0.0),
    )


def _head(config: DeepseekV3Config, name: str, copies: int) -> Unit:
    hidden, vocabulary = config.hidden_size, config.vocab_size
    return Unit(
        name=name,
        part="head",
        parameters=copies * hidden * vocabulary + hidden,
        products=hidden * vocabulary,
        traffic=4.0 * hidden + 12.0 * vocabulary,
        kept=(4.0 * hidden, 2.0 * hidden, 2.0 * hidden),
        logits=6.0 * vocabulary,
    )


def operations_per_token(units: list[Unit]) -> float:
    """Floating-point operations of training on one token: forward and backward, nothing counted twice."""
    return sum(6.0 * unit.products + 3.0 * unit.context for unit in units)
