"""The routing of one checkpoint, or of two beside each other on the same text, as a table, a file and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import transformers_dsv3  # noqa: F401  registers the plugin's classes with the Auto classes

from ..data.local_paths import load_refusal, model_arguments
from ..files import file_refusal, write_json, write_whole
from ..option_error import OptionError
from .held_out_text import checked_stream, read_texts
from .loading import check_device, check_dtype
from .routing import RoutingReport, routing_report
from .routing_plot import heat_map, plot_refusal


HEADINGS = ("layer", "utilisation", "MaxVio", "entropy", "dead", "above half fair", "busiest experts (load / mean)")


def check_options(
    window: int, max_tokens: int, device: str | None, dtype: str, plot: Path | None, json: Path | None
) -> None:
    """Refuse what cannot be measured or written, before anything is loaded. Raises `OptionError`."""
    check_dtype(dtype)
    if window < 2:
        raise OptionError("--window", f"{window} is not at least 2")
    if max_tokens < window:
        raise OptionError("--max-tokens", f"{max_tokens} is less than one window of {window}")
    if plot is not None and plot.suffix.lower() != ".png":
        raise OptionError("--plot", f"{plot} does not end in .png")
    for option, path in (("--plot", plot), ("--json", json)):
        if path is not None and (refusal := file_refusal(path)) is not None:
            raise OptionError(option, refusal)
    check_device(device)
    if plot is not None and (refusal := plot_refusal()) is not None:
        raise OptionError("--plot", refusal)


@dataclass(frozen=True)
class RoutingComparison:
    """Reports of checkpoints on one text.

    Attributes:
        source: of the text, in words.
        reports: pairs of a checkpoint's name and its report.
    """

    source: str
    dtype: str
    device: str
    reports: tuple[tuple[str, RoutingReport], ...]

    def write_json(self, path: Path) -> None:
        """Every count and figure, of each expert too."""
        checkpoints = [{"checkpoint": name, **report.to_dict()} for name, report in self.reports]
        record = {"text": self.source, "dtype": self.dtype, "device": self.device, "checkpoints": checkpoints}
        write_json(path, record, indent=1)

    def write_plot(self, path: Path) -> None:
        """The load of each expert of each layer."""
        titles = [Path(name).name or name for name, _ in self.reports]
        if len(set(titles)) < len(titles):
            titles = [name for name, _ in self.reports]
        write_whole(path, heat_map([(title, report) for title, (_, report) in zip(titles, self.reports)]))


def compare_routing(
    checkpoints: dict[str, str],
    text: Sequence[Path] | None,
    *,
    window: int,
    max_tokens: int,
    device: str | None,
    dtype: str,
) -> RoutingComparison:
    """Run checkpoints over a text, one after the other.

    Args:
        checkpoints: folders or names on the Hub, by the options that name them.
        text: files and folders; what `quickstart` holds out where not given.
        window, max_tokens: see `routing_report`.

    Raises:
        OptionError: a checkpoint that cannot be loaded or has no routing, or a text that is not enough. All are looked
            at before the first model is loaded.
    """
    configs = {option: _config(option, name, window) for option, name in checkpoints.items()}
    source, texts = read_texts(text)
    streams = {
        option: checked_stream(option, name, _tokenizer(option, name), texts, window, configs[option].vocab_size)
        for option, name in checkpoints.items()
    }
    reports = []
    for option, name in checkpoints.items():
        try:
            model = AutoModelForCausalLM.from_pretrained(**model_arguments(name), dtype=dtype, device_map=device)
        except (OSError, ValueError) as error:
            raise OptionError(option, load_refusal(name, error)) from error
        reports.append((name, routing_report(model, streams[option], window=window, max_tokens=max_tokens)))
        del model  # let go before the next is loaded
    return RoutingComparison(source, dtype, device or "cpu", tuple(reports))


def _config(option: str, checkpoint: str, window: int) -> Any:
    """The config of a checkpoint whose routing can be measured."""
    try:
        config = AutoConfig.from_pretrained(**model_arguments(checkpoint)).get_text_config()
    except (OSError, ValueError) as error:
        raise OptionError(option, load_refusal(checkpoint, error)) from error
    if config.model_type != "deepseek_v3":
        raise OptionError(option, f"{checkpoint} is a {config.model_type!r} checkpoint, not 'deepseek_v3'")
    if not config.moe_layers:
        raise OptionError(
            option,
            f"{checkpoint} has no mixture-of-experts layer: first_k_dense_replace={config.first_k_dense_replace} of "
            f"{config.num_hidden_layers} layers are dense",
        )
    if window > config.max_position_embeddings:
        raise OptionError(
            "--window", f"{window} is more than the {config.max_position_embeddings} positions of {checkpoint}"
        )
    return config


def _tokenizer(option: str, checkpoint: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(**model_arguments(checkpoint))
    except (OSError, ValueError) as error:
        reason = load_refusal(checkpoint, error).removeprefix(f"{checkpoint}: ").removesuffix(":")
        raise OptionError(
            option,
            f"{checkpoint} has no tokenizer that can be loaded ({reason}): save one there with "
            "tokenizer.save_pretrained(...)",
        ) from error


def table_rows(report: RoutingReport) -> Iterator[tuple[str, ...]]:
    """One row a layer below `HEADINGS`, and their mean."""
    for layer in report.layers:
        loads = layer.relative_load
        busiest = ", ".join(f"{expert} ({loads[expert]:.2g})" for expert in layer.busiest_experts[:4])
        yield (str(layer.layer), *_figures(vars(layer)), busiest)
    yield ("mean", *_figures(report.statistics.mean()), "dead: of all layers")


def notes(report: RoutingReport, source: str) -> Iterator[str]:
    """What belongs below the table."""
    yield f"{report.tokens:,} tokens of {source}, in windows of {report.window}."
    yield f"Loss {report.loss:.3f} nats a token."
    if report.mtp is not None:
        deeper = "".join(
            f", layer {depth + 1} {share:.1%}" for depth, share in enumerate(report.mtp.agreement) if depth
        )
        yield (
            f"MTP: second-token acceptance {report.mtp.second_token_acceptance:.1%}{deeper}; "
            f"loss {report.mtp.mean_loss:.3f} nats a token. MTP layers' own experts are not counted."
        )


def _figures(values: dict[str, Any]) -> tuple[str, ...]:
    """The columns that a layer and the mean over layers share."""
    return (
        f"{values['utilisation']:.3f}",
        f"{values['max_violation']:.2f}",
        f"{values['load_entropy']:.3f}",
        f"{values['dead_experts']:.0f}",
        f"{values['above_half_fair']:.0%}",
    )
