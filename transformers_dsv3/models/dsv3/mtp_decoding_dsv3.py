"""Self-speculation with the MTP layers, behind `generate(use_mtp=True)`.

The MTP layers draft the next tokens, the main model checks them in one pass, and what it would have produced itself is
kept (arXiv 2412.19437, section 5.4.3). Sampling is exact by rejection (arXiv 2211.17192, 2.3).

Rows of a batch accept different numbers of drafts. The cache stays one rectangle: what is rejected in every row is
cropped off, and what is rejected in some rows only is masked from then on, a "hole".

Passes go without drafts while those do not pay ([`DraftPacing`]). The MTP layers see what they missed when drafting is
tried again.
"""

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

from .cache_dsv3 import only_grows, take_back
from .decoding_loop_dsv3 import Ended
from .decoding_steps_dsv3 import Drafts, Steps
from .mtp_pacing_dsv3 import DraftPacing
from .sampling_dsv3 import most_likely


logger = logging.get_logger(__name__)

# Transformers' logits processors that remember their calls: what they do to one token depends on the calls before.
# Drafts are calls too, and those that are rejected cannot be taken back.
REMEMBERING_PROCESSORS = (
    "DiaEOSDelayPatternLogitsProcessor",
    "HiggsAudioV2DelayPatternLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
)


def drafting_refusal(logits_processor: LogitsProcessorList) -> str | None:
    """Why the text with drafts would not be the text without, or None.

    Known by name, of the class or of one that it derives from: not every release of Transformers has them all. What a
    processor of somebody else's remembers cannot be known.
    """
    for processor in logits_processor:
        for cls in type(processor).__mro__:
            if cls.__name__ in REMEMBERING_PROCESSORS and cls.__module__.startswith("transformers."):
                asked_by = " (`watermarking_config`)" if "Watermark" in cls.__name__ else ""
                return (
                    f"{type(processor).__name__}{asked_by} remembers every call, and would take rejected drafts for "
                    "text. Leave `use_mtp=True` out."
                )
    return None


@dataclass
class Dsv3MtpDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """Output of `generate(use_mtp=True, return_dict_in_generate=True)`.

    `scores` and `logits` hold one `(B, vocab)` tensor a new token, zeros for rows that had ended. `past_key_values` is
    None for caches that cannot be cropped (quantized ones), which keep rejected drafts.

    Args:
        mtp_drafted_tokens (`int`): tokens drafted for rows that had not ended.
        mtp_accepted_tokens (`int`): how many of them the main model accepted.
        mtp_acceptance_rate (`float`): the second over the first; 0 where nothing was drafted.
    """

    mtp_drafted_tokens: int | None = None
    mtp_accepted_tokens: int | None = None
    mtp_acceptance_rate: float | None = None


class MtpDecoding:
    """One run of self-speculation over a batch.

    Shape suffixes: B rows, W slots of the last pass that stay in the cache, J drafts and the token before them, V
    vocabulary, D hidden size.
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any,
    ):
        self.model = model
        self.most_drafts = len(model.model.mtp_layers)
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.config = generation_config
        self.streamer = streamer
        self.max_length = generation_config.max_length

        batch_size, self.prompt_length = input_ids.shape
        device = input_ids.device
        pad = generation_config._pad_token_tensor
        self.pad = int(pad) if pad is not None else 0
        # Drafts are written behind the committed tokens, so that logits processors see them
        self.tokens = input_ids.new_full((batch_size, self.max_length + self.most_drafts + 1), self.pad)
        self.tokens[:, : self.prompt_length] = input_ids
        self.lengths = [self.prompt_length] * batch_size
        self.ended = [False] * batch_size
        self.rows = torch.arange(batch_size, device=device)
        self.drafted = self.accepted = 0
        # Times differ from run to run and from rank to rank: none are asked where draws are to be the same, or ranks
        # have to make the same passes
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        paced = alone and getattr(generation_config, "sampling", None) != "exact"
        self.pacing = DraftPacing(self.most_drafts) if paced else None
        wants = generation_config.return_dict_in_generate
        self.scores: list[torch.Tensor] | None = [] if wants and generation_config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if wants and generation_config.output_logits else None
        # What ends a text, where that can be told from its tokens alone
        self.ending = Ended(stopping_criteria, generation_config, batch_size)
        own_code = streamer is None and self.ending.ends is not None and not logits_processor
        self.steps, self.drafts = Steps(model, own_code), Drafts(model, own_code)
        self.by_program = False  # whether the last pass was

    def run(self, model_kwargs: dict[str, Any]) -> Any:
        """Generates until every row has ended. `model_kwargs` are those that `generate` prepared."""
        cache = self._prefill(model_kwargs)
        while not all(self.ended):
            remaining = max(self.max_length - n for n, ended in zip(self.lengths, self.ended) if not ended)
            wanted = self.most_drafts if self.pacing is None else self.pacing.next_drafts()
            count = min(wanted, remaining - 1)
            catches_up, live, started = count > 0 and len(self.unseen) > 1, list(self.ended), perf_counter()
            drafts_BJ, draft_scores = self._draft(count)
            accepted = self._verify(drafts_BJ, draft_scores, cache)
            if self.pacing is not None:
                # Nothing is in flight any more: the pass has asked for what was accepted
                seconds = None if catches_up else perf_counter() - started
                self.pacing.record(count, seconds, [n for n, over in zip(accepted, live, strict=True) if not over])
        if self.croppable:
            self._settle(cache)
        return self._output(cache)

    def _prefill(self, model_kwargs: dict[str, Any]) -> Cache:
        cache = model_kwargs.get("past_key_values")
        if cache is None or not model_kwargs.get("use_cache"):
            raise ValueError("`use_mtp=True` needs a cache: leave `use_cache` on.")
        if cache.is_compileable:
            raise ValueError("`use_mtp=True` cannot run on a static cache, which rejected drafts would fill up.")
        if getattr(cache, "_is_user_defined", False) and not all(map(only_grows, cache.layers)):
            raise ValueError(
                "`use_mtp=True` cannot take rejected drafts out of the given `past_key_values` again: give a "
                "DynamicCache, or none."
            )
        # The MTP cache starts with this call, so it lacks what the main cache held before
        self.mtp_offset = cache.get_seq_length()
        self.mtp_cache = DynamicCache()
        prompt = self.tokens[:, : self.prompt_length]
        new_tokens = None
        mask = model_kwargs.get("attention_mask")
        mask_length = mask.shape[1] if mask is not None else getattr(self.config, "_mask_length", -1)
        if self.mtp_offset and mask_length == self.prompt_length:
            new_tokens = self.prompt_length - self.mtp_offset
        inputs = self.model.prepare_inputs_for_generation(
            prompt, next_sequence_length=new_tokens, is_first_iteration=True, **model_kwargs
        )
        inputs = {name: inputs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")}
        # None while nothing is masked, which keeps the faster attention paths open
        self.mask = inputs["attention_mask"]
        hidden_BWD = self.model.model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
        embeds_BWD = inputs["inputs_embeds"]
        if embeds_BWD is None:
            embeds_BWD = self.model.model.embed_tokens(inputs["input_ids"])

        logits_BV = self._head(hidden_BWD[:, -1:])[:, 0]
        scores_BV = self._process(logits_BV, 0)
        next_B = self._choose(scores_BV)
        self.croppable = all(map(only_grows, cache.layers))
        self.prefilled = cache.get_seq_length()
        # Of each later pass its slots that stay, and for each row the last of them that holds an accepted token
        self.used: list[tuple[int, list[int]]] = []
        width = hidden_BWD.shape[1]
        positions = inputs["position_ids"]
        if positions is None:
            positions = torch.arange(self.mtp_offset, self.mtp_offset + width, device=hidden_BWD.device)[None]
        positions_BW = positions[:, -width:].expand(len(self.lengths), -1)
        # Of each row the slot of the last pass that its text ends in, the position of that, and the token behind it
        self.last = [width - 1] * len(self.lengths)
        self.last_positions: list[int] = positions_BW[:, -1].tolist()
        self.newest: list[int] = next_B.tolist()
        next_embeds_B1D = self.model.model.embed_tokens(next_B[:, None].to(embeds_BWD.device))
        # Of the passes that the MTP layers have not seen: hidden states, positions, and the next tokens, or of the
        # prompt their embeddings
        next_embeds_BWD = torch.cat([embeds_BWD[:, 1:], next_embeds_B1D], dim=1)
        self.unseen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = [
            (hidden_BWD, positions_BW, next_embeds_BWD)
        ]
        self._commit([[token] for token in self.newest], scores_BV[:, None], logits_BV[:, None])
        return cache

    def _draft(self, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Drafts `count` tokens `(B, J)` for every row, with the scores `(B, V)` that each was chosen by."""
        if count == 0:
            return self.tokens[:, :0], []
        before = sum(hidden.shape[1] for hidden, _, _ in self.unseen[:-1])
        last_B = torch.tensor([before + slot for slot in self.last], device=self.rows.device)
        mask = None if self.mask is None else self.mask[:, self.mtp_offset :]
        is_of_ids = self.by_program and all(following.dim() == 2 for _, _, following in self.unseen)
        drafts = self._draft_by_program(count, last_B, mask) if is_of_ids else None
        if drafts is None:
            drafts = self._draft_by_layers(count, last_B, mask)
        self.unseen = []
        return torch.stack([draft_B for draft_B, _ in drafts], dim=1), [scores_BV for _, scores_BV in drafts]

    def _draft_by_program(
        self, count: int, last_B: torch.Tensor, mask: torch.Tensor | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Each draft `(B,)` with its scores, or None where the layers are to be called."""
        hidden_BWD, positions_BW, ids_BW = (
            parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in zip(*self.unseen, strict=True)
        )
        W = ids_BW.shape[1]
        if not self.drafts.begin(ids_BW, self.mtp_cache, int(positions_BW.max())):
            return None
        mask = None if mask is None else mask.bool().contiguous()
        hidden_BWD, positions_BW, ids_BW = hidden_BWD.contiguous(), positions_BW.contiguous(), ids_BW.contiguous()
        wanted_B = self.rows * W + last_B
        drafts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for depth in range(count):
            if depth:
                ids_BW = self._one_further(ids_BW, last_B, drafts[-1][0])
            outputs = self.drafts.run(depth, hidden_BWD, ids_BW, positions_BW, mask, wanted_B)
            if outputs is None:
                return None
            hidden_BWD, logits_BV = outputs
            drafts.append(self._drafted(logits_BV.float(), depth))
        self.drafts.end(W)
        return drafts

    def _draft_by_layers(
        self, count: int, last_B: torch.Tensor, mask: torch.Tensor | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each draft `(B,)` with its scores."""
        model, layers = self.model.model, self.model.model.mtp_layers
        drafts: list[tuple[torch.Tensor, torch.Tensor]] = []
        hidden_BWD, positions_BW = (torch.cat(parts, dim=1) for parts in list(zip(*self.unseen, strict=True))[:2])
        embeds = (f if f.dim() == 3 else model.embed_tokens(f) for _, _, f in self.unseen)
        embeds_BWD = torch.cat(list(embeds), dim=1)
        layer_inputs = model.attention_inputs(embeds_BWD, mask, positions_BW, self.mtp_cache)
        for depth in range(count):
            if depth:
                embeds_BWD = self._one_further(embeds_BWD, last_B, model.embed_tokens(drafts[-1][0]))
            hidden_BWD = layers[depth](hidden_BWD, embeds_BWD, **layer_inputs)
            drafts.append(self._drafted(self._head(hidden_BWD[self.rows, last_B][:, None])[:, 0], depth))
        return drafts

    def _one_further(self, given: torch.Tensor, last_B: torch.Tensor, drafted: torch.Tensor) -> torch.Tensor:
        """What the next layer is given, one token further, `(B, W)` or `(B, W, D)`.

        Entries before the last move up, the last takes the draft. A deeper layer so caches drafts that may be
        rejected, which costs acceptance later, never exactness.
        """
        given = torch.cat([given[:, 1:], given[:, -1:]], dim=1)
        given[self.rows, last_B] = drafted
        return given

    def _drafted(self, logits_BV: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The draft `(B,)` of a layer, written behind the text, and the scores that it was chosen by."""
        scores_BV = self._process(logits_BV, depth)
        draft_B = self._choose(scores_BV)
        for row, length in enumerate(self.lengths):
            if not self.ended[row]:
                self.tokens[row, length + depth] = draft_B[row]
        return draft_B, scores_BV

    def _verify(self, drafts_BJ: torch.Tensor, draft_scores: list[torch.Tensor], cache: Cache) -> list[int]:
        """Runs the main model on the last token and the drafts, and commits what it agrees with.

        Returns how many drafts each row accepted, 0 for those that had ended.
        """
        count, device = drafts_BJ.shape[1], self.rows.device
        drafts: list[list[int]] = drafts_BJ.tolist()
        input_BJ = torch.tensor([[token, *row] for token, row in zip(self.newest, drafts)], device=device)
        # Rows that are about to end may draft past their last position; those drafts are dropped, and are not to make
        # rotary embeddings grow that follow the longest position
        ends = [last + max(self.max_length - n, 1) for last, n in zip(self.last_positions, self.lengths)]
        positions = [
            [min(last + 1 + j, end) for j in range(count + 1)] for last, end in zip(self.last_positions, ends)
        ]
        positions_BJ = torch.tensor(positions, device=device)
        mask = None if self.mask is None else torch.cat([self.mask, self.mask.new_ones(input_BJ.shape)], dim=1)
        outputs = self.steps.run(input_BJ, cache, positions_BJ, mask)
        self.by_program = outputs is not None
        if outputs is not None:
            hidden_BJD, logits_BJV = outputs[0], outputs[1].float()
        else:
            given = {"attention_mask": mask, "position_ids": positions_BJ, "past_key_values": cache}
            hidden_BJD = self.model.model(input_ids=input_BJ, use_cache=True, **given).last_hidden_state
            logits_BJV = self._head(hidden_BJD)
        scores_BJV = logits_BJV
        if self.logits_processor:
            scores_BJV = torch.stack([self._process(logits_BJV[:, j], j) for j in range(count + 1)], dim=1)
        found, self.newest = self._accept(drafts_BJ, drafts, draft_scores, scores_BJV)

        accepted = [0 if ended else n for n, ended in zip(found, self.ended)]
        keep = max(accepted) + 1 if self.croppable else count + 1
        if keep <= count:
            take_back(cache, count + 1 - keep)
        # A row that has ended makes no holes: its output is padding whatever it attends to
        self.last = [keep - 1 if ended else n for n, ended in zip(accepted, self.ended)]
        self.used.append((keep, self.last))
        if self.mask is not None or min(self.last) < keep - 1:
            if self.mask is None:
                self.mask = self.rows.new_ones(len(self.lengths), cache.get_seq_length() - keep)
            self.mask = torch.cat([self.mask, self._used_slots(keep, self.last).to(self.mask.dtype)], dim=1)

        self.last_positions = [row[slot] for row, slot in zip(positions, self.last)]
        following = [[*row, 0] for row in drafts]
        for row, slot in enumerate(self.last):
            following[row][slot] = self.newest[row]
        following_BW = torch.tensor([row[:keep] for row in following], device=device)
        self.unseen.append((hidden_BJD[:, :keep], positions_BJ[:, :keep], following_BW))
        self.drafted += count * self.ended.count(False)
        self.accepted += sum(accepted)
        new = [[*row[:n], token] for row, n, token in zip(drafts, accepted, self.newest)]
        self._commit(new, scores_BJV, logits_BJV)
        return accepted

    def _used_slots(self, keep: int, last: list[int]) -> torch.Tensor:
        """Which of the slots of a pass that stay hold accepted tokens, bool `(B, W)`."""
        device = self.rows.device
        return torch.arange(keep, device=device) <= torch.tensor(last, device=device)[:, None]

    def _accept(
        self,
        drafts_BJ: torch.Tensor,
        drafts: list[list[int]],
        draft_scores: list[torch.Tensor],
        scores: torch.Tensor,
    ) -> tuple[list[int], list[int]]:
        """How many drafts each row accepts, and the token that follows them.

        Args:
            drafts: the same as lists. scores: `(B, J + 1, V)`, the main model's, processed.
        """
        count = drafts_BJ.shape[1]
        if not self.config.do_sample:
            chosen = most_likely(scores.flatten(0, 1)).view(-1, count + 1).tolist()
            accepted = [
                next((j for j, (draft, own) in enumerate(zip(row, choice)) if draft != own), count)
                for row, choice in zip(drafts, chosen)
            ]
            return accepted, [choice[n] for choice, n in zip(chosen, accepted)]
        target = scores.softmax(dim=-1)
        if count == 0:
            return [0] * len(target), torch.multinomial(target[:, 0], 1)[:, 0].tolist()
        draft = torch.stack(draft_scores, dim=1).softmax(dim=-1)
        target_p = target[:, :count].gather(2, drafts_BJ[..., None])[..., 0]
        draft_p = draft.gather(2, drafts_BJ[..., None])[..., 0]
        # Accept with probability min(1, target / draft)
        agrees = torch.rand_like(target_p) * draft_p < target_p
        accepted_B = agrees.long().cumprod(dim=1).sum(dim=1)
        # A rejected draft is replaced from what the main model has above the draft's probabilities
        own = target[self.rows, accepted_B]
        excess = (own - draft[self.rows, accepted_B.clamp(max=count - 1)]).clamp(min=0)
        use_excess = (accepted_B < count) & (excess.sum(dim=-1) > 0)
        next_B = torch.multinomial(torch.where(use_excess[:, None], excess, own), 1)[:, 0]
        return accepted_B.tolist(), next_B.tolist()

    def _commit(self, new: list[list[int]], scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Appends the new tokens of each row, up to its end.

        Args:
            scores, logits: `(B, J, V)`, what each was chosen by, processed and not.
        """
        for row, tokens in enumerate(new):
            if self.ended[row]:
                continue
            start = self.lengths[row]
            self.tokens[row, start : start + len(tokens)] = torch.tensor(tokens)
            for place, token in enumerate(tokens):
                self.lengths[row] += 1
                for kept, source in ((self.scores, scores), (self.logits, logits)):
                    if kept is not None:
                        index = self.lengths[row] - self.prompt_length - 1
                        while len(kept) <= index:
                            kept.append(torch.zeros_like(source[:, 0]))
                        kept[index][row] = source[row, place]
                if self._ends(row, token):
                    self.ended[row] = True
                    break
            end = self.lengths[row]
            if self.streamer is not None:
                self.streamer.put(self.tokens[row, start:end].cpu())
            if self.ended[row]:
                self.tokens[row, end:] = self.pad

    def _ends(self, row: int, token: int) -> bool:
        """Whether a row ends with its last token."""
        length = self.lengths[row]
        if self.ending.ends is not None:
            return token in self.ending.ends or length >= self.ending.max_length
        seen = None if self.scores is None else tuple(score[row : row + 1] for score in self.scores)
        return bool(self.stopping_criteria(self.tokens[row : row + 1, :length], seen)[0])

    def _head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, J, D)` to fp32 logits `(B, J, V)` on the device of the tokens."""
        return self.model.lm_head(hidden_states).to(self.tokens.device, torch.float32)

    def _process(self, logits_BV: torch.Tensor, ahead: int) -> torch.Tensor:
        """Runs the logits processors for the token `ahead` places behind the committed ones.

        A processor sees whole batches of one length. Rows of other lengths are cut or padded to it and their results
        dropped, so that processors which know rows by their index (prefix constraints) still do.
        """
        if not self.logits_processor:
            return logits_BV
        scores_BV = logits_BV.clone()
        for length in set(self.lengths):
            processed = self.logits_processor(self.tokens[:, : length + ahead], logits_BV.clone())
            chosen = [row for row, n in enumerate(self.lengths) if n == length]
            scores_BV[chosen] = processed[chosen]
        return scores_BV

    def _choose(self, scores_BV: torch.Tensor) -> torch.Tensor:
        if self.config.do_sample:
            return torch.multinomial(scores_BV.softmax(dim=-1), 1)[:, 0]
        return most_likely(scores_BV)

    def _settle(self, cache: Cache) -> None:
        """Leaves in the cache what decoding without drafts would: the prompt and every new token but the last.

        Rows that ended early are filled up with positions that mean nothing, as the padding behind them does.
        """
        new = max(self.lengths) - self.prompt_length - 1
        has_holes = any(min(last) < keep - 1 for keep, last in self.used)
        if not self.used or (not has_holes and len(self.lengths) == 1):
            surplus = cache.get_seq_length() - self.prefilled - new
            if surplus > 0:
                cache.crop(-surplus)
            return
        used_BS = torch.cat([self._used_slots(*used) for used in self.used], dim=1)
        slots_BS = torch.zeros(len(self.lengths), self.prefilled + new, dtype=torch.long, device=used_BS.device)
        slots_BS[:, : self.prefilled] = torch.arange(self.prefilled, device=used_BS.device)
        for row, length in enumerate(self.lengths):
            # A row that ended early has its last token cached too: it was fed while the others went on
            kept = used_BS[row].nonzero()[: min(length - self.prompt_length, new), 0]
            slots_BS[row, self.prefilled : self.prefilled + len(kept)] = kept + self.prefilled
        for layer in cache.layers:
            for name in ("keys", "values"):
                states = getattr(layer, name)
                slots = slots_BS.to(states.device)
                setattr(layer, name, torch.stack([states[row][:, slots[row]] for row in range(len(slots))]))

    def _output(self, cache: Cache) -> Any:
        rate = self.accepted / self.drafted if self.drafted else 0.0
        logger.info(f"MTP drafted {self.drafted} tokens, {self.accepted} accepted ({rate:.1%}).")
        if self.streamer is not None:
            self.streamer.end()
        sequences = self.tokens[:, : max(self.lengths)]
        if not self.config.return_dict_in_generate:
            return sequences
        return Dsv3MtpDecoderOnlyOutput(
            sequences=sequences,
            scores=tuple(self.scores) if self.scores is not None else None,
            logits=tuple(self.logits) if self.logits is not None else None,
            past_key_values=cache if self.croppable else None,
            mtp_drafted_tokens=self.drafted,
            mtp_accepted_tokens=self.accepted,
            mtp_acceptance_rate=rate,
        )
