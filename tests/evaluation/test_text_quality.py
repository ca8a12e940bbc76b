import gzip
import math

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from transformers_dsv3.evaluation.text_quality import bits_per_byte, compressor_bits_per_byte


@pytest.fixture(scope="module")
def native():
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        initializer_range=0.2,
    )
    return DeepseekV3ForCausalLM(config).eval()


def one_token_at_a_time(model, stream, window, stride):
    """Nats of the stream, from one forward a token over exactly the context that the windows give it."""
    nats = 0.0
    for position in range(1, len(stream)):
        start = 0 if position < window else ((position - window) // stride + 1) * stride
        with torch.inference_mode():
            logits = model(input_ids=stream[None, start:position]).logits[0, -1].double()
        nats -= logits.log_softmax(-1)[stream[position]].item()
    return nats


@pytest.mark.parametrize("length", [2, 7, 15, 16, 17, 20, 31, 50])
@pytest.mark.parametrize("stride", [1, 4, 15])
def test_each_token_is_scored_once_in_its_context(native, length, stride):
    stream = torch.randint(60, (length,), generator=torch.Generator().manual_seed(length))
    result = bits_per_byte(native, stream, 33, window=16, stride=stride, batch_size=3)
    expected = one_token_at_a_time(native, stream, 16, stride) / math.log(2) / 33
    assert result.value == pytest.approx(expected, rel=1e-5)
    assert (result.tokens, result.bytes) == (length - 1, 33)


def test_bad_windows_are_refused(native):
    stream = torch.arange(10)
    with pytest.raises(ValueError, match="stride must lie between 1 and window - 1 = 7, got 8"):
        bits_per_byte(native, stream, 10, window=8, stride=8)
    with pytest.raises(ValueError, match="at least two tokens"):
        bits_per_byte(native, stream[:1], 10, window=8, stride=4)


def test_compressors_against_gzip():
    text = b"".join(b"line %d of a text\n" % n for n in range(3000))
    bits = compressor_bits_per_byte(text)
    # gzip is the same stream as zlib between a header and a trailer of other sizes (18 bytes and 6).
    assert bits["zlib"] == pytest.approx(8 * (len(gzip.compress(text, 9, mtime=0)) - 12) / len(text))
    assert 0 < bits["lzma"] < bits["zlib"] < 8
