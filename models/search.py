"""Beam search over the tokens of a caption, for any language model with a cache of keys and values.

Equal to transformers' output token by token, with early_stopping=False.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

KeysValues = tuple[Tensor, Tensor]  # of one layer, (B, N, D) each
# New tokens (B·beams, n) behind those of the cache (None: the prompt, before which there is nothing) ->
# logits (B·beams, V) of the token after them, and the extended cache
Step = Callable[[Tensor, list[KeysValues] | None], tuple[Tensor, list[KeysValues]]]


@torch.no_grad()
def beam_search(
    step: Step, prompt: Tensor, beams: int, *, end: int, pad: int, min_new: int, max_new: int,
    length_penalty: float = 1.0, repetition_penalty: float = 1.0, n_tokens: int | None = None,
) -> Tensor:
    """Prompts (B, n) -> the best sequence of each, (B, N): the prompt, at most `max_new` tokens, of which the
    last is `end` unless there was no room for it, and `pad`.

    One beam takes the most probable token each time. With more, a sequence's score is the sum of its new
    tokens' log-probabilities over their number to the power of `length_penalty`. At least `min_new` other new
    tokens precede `end`. Ids from `n_tokens` on are never written. `repetition_penalty` multiplies the
    negative scores of all tokens that prompt and text hold, and divides the positive ones; scores are logits
    for one beam and log-probabilities for several, as in transformers.
    """
    fill = pad if beams == 1 else pad or end  # transformers' beam search ignores a padding id of 0
    images, start = prompt.shape
    first = torch.arange(images, device=prompt.device)[:, None]
    running = prompt[:, None]                                     # (B, 1, N), later (B, beams, N)
    scores = torch.zeros(images, 1, device=prompt.device)         # (B, 1), later (B, beams)
    finished = prompt.new_full((images, beams, start), fill)
    finished_scores = scores.new_full((images, beams), -torch.inf)  # best first, as are all scores here
    hopeful = torch.ones(images, dtype=torch.bool, device=prompt.device)
    new, past = prompt, None
    for length in range(1, max_new + 1):
        logits, past = step(new, past)
        steps, written = logits.float(), running.flatten(0, 1)
        if beams == 1:
            steps = _penalised(steps, written, repetition_penalty).log_softmax(dim=-1)
        else:
            steps = _penalised(steps.log_softmax(dim=-1), written, repetition_penalty)
        if n_tokens is not None:
            steps[:, n_tokens:] = -torch.inf
        steps = steps.unflatten(0, scores.shape)                                          # (B, beams, V)
        if length <= min_new:
            steps[:, :, end] = -torch.inf

        # Each beam can end in one way, so twice as many candidates leave enough unfinished
        best, place = (scores[:, :, None] + steps).flatten(1).topk(2 * beams)
        parent, token = place // steps.shape[-1], place % steps.shape[-1]                 # (B, 2·beams)
        grown = torch.cat([_pick(running, parent), token[:, :, None]], dim=2)             # (B, 2·beams, N)
        ends = (token == end) | (length == max_new)

        # A sequence counts as finished only if it ends among the best `beams` and its image is still active
        normed = best / length**length_penalty
        normed = normed.masked_fill(~(ends & hopeful[:, None]), -torch.inf)[:, :beams]
        finished_scores, kept = torch.cat([finished_scores, normed], dim=1).topk(beams)
        finished = torch.cat([F.pad(finished, (0, 1), value=fill), grown[:, :beams]], dim=1)
        finished = _pick(finished, kept)

        rows = first * scores.shape[1]
        scores, kept = best.masked_fill(ends, -torch.inf).topk(beams)
        running, rows = _pick(grown, kept), (rows + parent.gather(1, kept)).flatten()
        new, past = running[:, :, -1].reshape(-1, 1), [(k[rows], v[rows]) for k, v in past]

        # The best unfinished sequence is scored at its current length; an image whose finished sequences beat
        # it is done
        hope = scores[:, 0] / length**length_penalty > finished_scores[:, -1]
        hopeful = hopeful & hope
        if not hopeful.any():
            break
    sequences = finished[:, 0]
    ended = (sequences[:, start:] == end).long()
    longest = (ended.cumsum(dim=1) == ended).sum(dim=1).max()  # all before the first end, and it
    return sequences[:, : start + longest]


def sampled(step: Step, generator: torch.Generator, top_p: float = 1.0) -> Step:
    """A step whose most probable token is a random draw, so that a search with one beam samples.

    A draw adds Gumbel noise to the logits, those of the most probable tokens of total probability `top_p`
    (Holtzman et al. 2020). The noise comes from the CPU.
    """

    def noisy(new: Tensor, past: list[KeysValues] | None) -> tuple[Tensor, list[KeysValues]]:
        logits, past = step(new, past)
        ordered, tokens = logits.float().sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p
        uniform = torch.rand(logits.shape, generator=generator).clamp_min(1e-30).to(logits.device)
        noise = -torch.log(-torch.log(uniform)).gather(-1, tokens)
        drawn = torch.where(beyond, -torch.inf, ordered + noise)
        return torch.empty_like(drawn).scatter(-1, tokens, drawn), past

    return noisy


def _penalised(scores: Tensor, written: Tensor, penalty: float) -> Tensor:
    """Scores (B, V) after the repetition penalty of the tokens in `written` (B, N)."""
    seen = scores.gather(1, written)
    return scores.scatter(1, written, torch.where(seen < 0, seen * penalty, seen / penalty))


def _pick(sequences: Tensor, places: Tensor) -> Tensor:
    """The rows (B, k, N) of (B, beams, N) at `places` (B, k)."""
    return sequences.take_along_dim(places[:, :, None], dim=1)
