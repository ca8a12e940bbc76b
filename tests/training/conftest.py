"""What the tests of TRL's trainers share: a small checkpoint on disk, data, and what must not move."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from transformers_dsv3.models.dsv3.mtp_dsv3 import Dsv3MtpLayer


# On a CPU TRL's own defaults ask for a GPU's bf16; all else stays as TRL has it
ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


@pytest.fixture(scope="session")
def on_cpu() -> dict:
    return dict(ON_CPU)


@pytest.fixture(scope="session")
def checkpoint(make_model, byte_tokenizer, tmp_path_factory) -> Path:
    """Folder of a small checkpoint with its tokenizer. TRL reads the reference model from it."""
    folder = tmp_path_factory.mktemp("trl") / "model"
    model = make_model(
        vocab_size=len(byte_tokenizer),
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=byte_tokenizer.eos_token_id,
        pad_token_id=byte_tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def preference_rows() -> Dataset:
    """Pairs of unlike lengths, so that batches have padding."""
    return Dataset.from_list(
        [
            {"prompt": f"def f{n}(x):", "chosen": f" return x + {n}" + " * 2" * (n % 3), "rejected": f" pass  # {n}"}
            for n in range(12)
        ]
    )


@pytest.fixture(scope="session")
def untouched() -> Callable:
    """Context in which routers' biases and MTP layers do not change, and the latter do not run.

    What else the model has moves, or, with `weights_move=False`, does not: that is a base under adapters.
    """

    @contextmanager
    def watch(model: torch.nn.Module, weights_move: bool = True) -> Iterator[None]:
        mtp_layers = {name: layer for name, layer in model.named_modules() if type(layer) is Dsv3MtpLayer}
        assert mtp_layers

        def weights() -> dict[str, torch.Tensor]:
            tensors = [*model.named_parameters(), *model.named_buffers()]
            return {name: tensor.detach().clone() for name, tensor in tensors if "lora" not in name}

        ran: list[str] = []
        handles = [
            layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
            for name, layer in mtp_layers.items()
        ]
        before = weights()
        yield
        for handle in handles:
            handle.remove()
        assert not ran, "MTP layers ran"
        moved = {name for name, tensor in weights().items() if not torch.equal(tensor, before[name])}
        assert not [name for name in moved if name.endswith("e_score_correction_bias")]
        assert not [name for name in moved if name.startswith(tuple(mtp_layers))]
        expected = {"self_attn.o_proj", "mlp.experts.down_proj", "mlp.gate.weight"} if weights_move else set()
        assert {kind for kind in expected if any(kind in name for name in moved)} == expected
        assert weights_move or not [name for name in moved if "score" not in name]

    return watch
