"""Predicates and their labelled arguments, end to end, by ranking spans (He et al. 2018)."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_modules.network.task_heads.base import HeadSpec, States, TaskHead, linear
from lightning_modules.network.task_heads.spans import Span, without_overlaps
from lightning_modules.network.task_heads.tagging import Scores, mean_cross_entropy

WIDTH_FEATURES = 20

Argument = tuple[int, int, int, int]
"""Predicate, start, end (exclusive), role number; (predicate, -1, -1, -1): a predicate without arguments."""


class SRLOutputs(NamedTuple):
    """Of n examples of W words: scores of all candidates, K spans and W words, and of pairs of the A and P that were kept."""

    arguments: Scores
    """(n, K), phi_arg; the mask is of spans of words that have been read."""
    predicates: Scores
    """(n, W), phi_pred; the mask is of words that have been read."""
    pairs: Scores
    """(n, P, A, C + 1) for C roles and, last, no role; the mask is of pairs of two kept candidates."""
    starts: Tensor
    """(K,) int64, of the candidate arguments."""
    ends: Tensor
    """(K,) int64, exclusive."""
    kept_arguments: Tensor
    """(n, A) int64, their numbers among the K."""
    kept_predicates: Tensor
    """(n, P) int64, word numbers."""


class SRLHead(TaskHead):
    """phi_arg(a) + phi_pred(p) + phi_label(a, p, r) scores span a as argument of word p with role r; no role scores 0.

    Candidate arguments are the spans of up to ``srl_max_width`` words, candidate predicates all words. As many as
    ``srl_argument_ratio`` and ``srl_predicate_ratio`` of the words are kept, the best by phi_arg and phi_pred, at least one.
    Gold candidates may be pruned in training, as in the paper, so that it sees the pairs that prediction will see.

    Beyond the paper, phi_arg and phi_pred are trained as log-odds, too, that a candidate is an argument or a predicate: the
    paper's loss, which knows kept pairs only, gives a gold candidate that is pruned no gradient, so that it may stay pruned
    forever, and a predicate without arguments nothing that tells it from a word that is none. And in decoding no two
    arguments of a predicate overlap.
    """

    def __init__(self, hidden_size: int, spec: HeadSpec) -> None:
        super().__init__(hidden_size, spec)
        heads, generator = spec.heads, self.generator
        self.attention = linear(hidden_size, 1, generator, bias=False)
        self.width = nn.Parameter(torch.empty(heads.srl_max_width, WIDTH_FEATURES).normal_(generator=generator))
        self.argument_input = SpanLinear(hidden_size, heads.span_size, generator)
        self.argument_score = _score(heads.dropout, heads.span_size, heads.span_size, 1, generator=generator)
        self.predicate_input = linear(hidden_size, heads.span_size, generator)
        self.predicate_score = _score(heads.dropout, heads.span_size, heads.span_size, 1, generator=generator)
        self.label_argument = SpanLinear(hidden_size, heads.label_size, generator)
        self.label_predicate = linear(hidden_size, heads.label_size, generator, bias=False)
        self.label_score = _score(heads.dropout, heads.label_size, spec.num_labels, generator=generator)

    def outputs(self, hidden: Tensor, states: States) -> SRLOutputs:
        """(n, S, d) -> scores of the kept pairs, and of every word as a predicate."""
        heads, words, mask, counts = self.spec.heads, states.word_states(hidden), states.word_mask, states.word_counts
        predicates = Scores(self.predicate_score(self.predicate_input(words)).squeeze(-1), mask)
        kept_predicates, predicate_mask = _best(predicates, counts * heads.srl_predicate_ratio)

        starts, ends = _candidates(mask.shape[1], heads.srl_max_width, mask.device)
        ranking = self.argument_score(self.argument_input(words, self.parts(words, starts, ends))).squeeze(-1)
        arguments = Scores(ranking, ends <= counts[:, None])
        kept_arguments, argument_mask = _best(arguments, counts * heads.srl_argument_ratio)

        of_predicate = _take(self.label_predicate(words), kept_predicates)
        of_argument = self.label_argument(words, self.parts(words, starts[kept_arguments], ends[kept_arguments]))
        labels = self.label_score(of_predicate[:, :, None] + of_argument[:, None])
        unary = _take(predicates.scores, kept_predicates)[:, :, None] + _take(ranking, kept_arguments)[:, None]
        pair_mask = predicate_mask[:, :, None] & argument_mask[:, None]
        pairs = Scores(functional.pad(labels + unary[..., None], (0, 1)), pair_mask)
        return SRLOutputs(arguments, predicates, pairs, starts, ends, kept_arguments, kept_predicates)

    def parts(self, words: Tensor, starts: Tensor, ends: Tensor) -> "SpanParts":
        """Of the spans ``starts`` to ``ends``, both (K,) or (n, K), in ``words`` (n, W, d)."""
        position = torch.arange(words.shape[1], device=words.device)
        inside = (starts[..., None] <= position) & (position < ends[..., None])
        attention = self.attention(words).mT.masked_fill(~inside, float("-inf")).softmax(-1)
        first, last = (one[..., None] == position for one in (starts, ends - 1))
        return SpanParts(
            first.to(words.dtype), last.to(words.dtype), attention, functional.embedding(ends - starts - 1, self.width)
        )

    def loss(self, outputs: SRLOutputs, labels: Tensor) -> Tensor:
        """Three means over an example's kept pairs, candidate arguments and words, summed: cross-entropy of the role, and
        binary cross-entropy of phi_arg and of phi_pred -> (n,).

        ``labels`` (n, K, 4) predicate, start, end, role number, one role for a predicate and span. What was pruned takes no
        part in the first mean, what has not been read in none.
        """
        predicates, starts, ends, roles = labels[..., None].unbind(2)
        read = outputs.predicates.mask[:, None]
        is_predicate = read & (predicates == torch.arange(read.shape[-1], device=labels.device))
        # An argument of a predicate that has not been read cannot be told from what is none.
        is_argument = (starts == outputs.starts) & (ends == outputs.ends) & is_predicate.any(-1, keepdim=True)
        kept = outputs.kept_predicates[:, None], outputs.kept_arguments[:, None]
        is_pair = is_predicate.take_along_dim(kept[0], 2)[..., None] & is_argument.take_along_dim(kept[1], 2)[:, :, None]
        example, k, p, a = is_pair.nonzero(as_tuple=True)
        targets = torch.full_like(outputs.pairs.mask, outputs.pairs.scores.shape[-1] - 1, dtype=torch.int64)
        targets[example, p, a] = roles[example, k, 0]
        of_arguments = _mean_detection_loss(outputs.arguments, is_argument)
        return (
            mean_cross_entropy(outputs.pairs, targets) + of_arguments + _mean_detection_loss(outputs.predicates, is_predicate)
        )

    def predict(self, outputs: SRLOutputs) -> list[list[Argument]]:
        """The arguments of each example in order, (p, -1, -1, -1) for a predicate without.

        A kept pair has its best role if that scores above 0. Of a predicate's arguments that overlap, the best is kept. A
        word is a predicate if it has an argument or phi_pred is positive.
        """
        frames: list[dict[int, list[Span]]] = [{} for _ in outputs.pairs.mask]
        for example, predicate in (outputs.predicates.mask & (outputs.predicates.scores > 0)).nonzero().tolist():
            frames[example][predicate] = []
        scores, roles = outputs.pairs.scores[..., :-1].max(-1)
        found = outputs.pairs.mask & (scores > 0)
        example, p, a = found.nonzero(as_tuple=True)
        predicates, arguments = outputs.kept_predicates[example, p], outputs.kept_arguments[example, a]
        fields = [example, predicates, outputs.starts[arguments], outputs.ends[arguments], roles[found]]
        order = scores[found].argsort(dim=0, descending=True, stable=True)
        for number, predicate, start, end, role in torch.stack(fields, -1)[order].tolist():
            frames[number].setdefault(predicate, []).append((start, end, role))
        return [[item for predicate in sorted(of) for item in _frame(predicate, of[predicate])] for of in frames]


def _frame(predicate: int, candidates: list[Span]) -> list[Argument]:
    arguments = without_overlaps(candidates) or [(-1, -1, -1)]
    return [(predicate, *argument) for argument in arguments]


class SpanParts(NamedTuple):
    """What a span's representation [its first word; its last; its content; its width] is made of, for K spans of W words.

    The weights are dense because the gradient of a gather with repeated indices is summed in no fixed order on a GPU.
    """

    first: Tensor
    """(K, W) or (n, K, W), 1 at the first word."""
    last: Tensor
    """(K, W) or (n, K, W), 1 at the last word."""
    content: Tensor
    """(n, K, W), attention to the span's words."""
    width: Tensor
    """(K, 20) or (n, K, 20)."""


class SpanLinear(nn.Module):
    """A linear layer on the representation of spans.

    Its share of each part is computed per word, before spans are formed: the same numbers, and W words instead of 30 W spans.
    """

    def __init__(self, hidden_size: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.size = size
        self.words = linear(hidden_size, 3 * size, generator, bias=False)
        self.width = linear(WIDTH_FEATURES, size, generator)

    def forward(self, words: Tensor, parts: SpanParts) -> Tensor:
        """(n, W, d) and the parts of K spans -> (n, K, size)."""
        first, last, content = self.words(words).split(self.size, -1)
        return parts.first @ first + parts.last @ last + parts.content @ content + self.width(parts.width)


def _score(dropout: float, *sizes: int, generator: torch.Generator) -> nn.Sequential:
    """The rest of an MLP after its first linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.ReLU(), nn.Dropout(dropout), linear(inputs, outputs, generator)]
    return nn.Sequential(*layers)


def _candidates(num_words: int, max_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Start and end, (K,), of all spans of up to ``max_width`` of ``num_words`` words."""
    position = torch.arange(num_words, device=device)
    width = position - position[:, None] + 1
    starts, last = ((width >= 1) & (width <= max_width)).nonzero(as_tuple=True)
    return starts, last + 1


def _best(candidates: Scores, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The candidates to keep by scores (n, K), and which of them each example keeps: (n, most kept) int64 and bool."""
    scores, mask = candidates
    sizes = shares.long().clamp_min(1).minimum(mask.sum(-1))
    order = scores.masked_fill(~mask, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    kept = order[:, : int(sizes.max().clamp_min(1))]
    return kept, torch.arange(kept.shape[1], device=kept.device) < sizes[:, None]


def _take(values: Tensor, index: Tensor) -> Tensor:
    """``values`` (n, K, ...) at ``index`` (n, k) of each example, which names nothing twice -> (n, k, ...)."""
    return values.take_along_dim(index.view(*index.shape, *[1] * (values.dim() - 2)), 1)


def _mean_detection_loss(candidates: Scores, gold: Tensor) -> Tensor:
    """Binary cross-entropy of log-odds (n, K) with whether any of G labels (n, G, K) is the candidate, mean over K -> (n,)."""
    scores, mask = candidates
    losses = functional.binary_cross_entropy_with_logits(scores, gold.any(1).to(scores.dtype), reduction="none")
    return losses.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp_min(1)
