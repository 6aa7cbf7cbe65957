"""Labelled spans of words that do not overlap, such as named entities: every span scored, or BIO tags."""

from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor, nn

from lightning_modules.data.forms import bio_spans
from lightning_modules.network.task_heads.base import HeadSpec, States, TaskHead, linear
from lightning_modules.network.task_heads.biaffine import Biaffine
from lightning_modules.network.task_heads.tagging import Scores, mean_cross_entropy

Span = tuple[int, int, int]
"""Start, end (exclusive), label number."""


class SpansHead(TaskHead):
    """Flat labelled spans, by the scheme that ``spec.heads.spans`` names."""

    def __init__(self, hidden_size: int, spec: HeadSpec) -> None:
        super().__init__(hidden_size, spec)
        schemes = {"biaffine": BiaffineSpans, "bio": BioSpans}
        self.scheme: BiaffineSpans | BioSpans = schemes[spec.heads.spans](hidden_size, spec, self.generator)

    def outputs(self, hidden: Tensor, states: States) -> Scores:
        """(n, S, d) -> scores of every span (n, W, W, C + 1), or of every word's tags (n, W, 2C + 1)."""
        return self.scheme(states.word_states(hidden), states.word_mask)

    def loss(self, outputs: Scores, labels: Tensor) -> Tensor:
        """Cross-entropy, mean over each example's spans or words; ``labels`` (n, K, 3) start, end, label number -> (n,).

        Gold spans that reach beyond the words that have been read take no part.
        """
        return mean_cross_entropy(outputs, self.scheme.targets(labels, outputs.mask))

    def predict(self, outputs: Scores) -> list[list[Span]]:
        """The spans of each example, in order, none overlapping another."""
        return self.scheme.decode(outputs)


class BiaffineSpans(nn.Module):
    """Yu et al. (ACL 2020, arXiv 2005.07150): a biaffine score of every label for every first and last word of a span.

    Their states are plain linear projections of the words' (He and Choi 2021), not an MLP's. The last label number, C,
    stands for no entity.
    """

    def __init__(self, hidden_size: int, spec: HeadSpec, generator: torch.Generator) -> None:
        super().__init__()
        self.none = spec.num_labels
        self.first = linear(hidden_size, spec.heads.span_size, generator)
        self.last = linear(hidden_size, spec.heads.span_size, generator)
        self.dropout = nn.Dropout(spec.heads.dropout)
        self.biaffine = Biaffine(spec.heads.span_size, spec.num_labels + 1, generator, bias=True)

    def forward(self, words: Tensor, mask: Tensor) -> Scores:
        """(n, W, d), (n, W) -> scores (n, W first, W last, C + 1) and the spans of words that have been read (n, W, W)."""
        scores = self.biaffine(self.dropout(self.first(words)), self.dropout(self.last(words)))
        return Scores(scores, (mask[:, :, None] & mask[:, None, :]).triu())

    def targets(self, labels: Tensor, mask: Tensor) -> Tensor:
        """The label number, or C, of each span, (n, W, W)."""
        targets = torch.full_like(mask, self.none, dtype=torch.int64)
        starts, ends, numbers = labels.unbind(-1)
        example, k = ((starts >= 0) & (ends <= mask.shape[1])).nonzero(as_tuple=True)
        targets[example, starts[example, k], ends[example, k] - 1] = numbers[example, k]
        return targets

    def decode(self, outputs: Scores) -> list[list[Span]]:
        """The spans whose best label is an entity's, by falling score of it, without those that overlap one before."""
        best, labels = outputs.scores.max(-1)
        found = outputs.mask & (labels != self.none)
        order = best[found].argsort(descending=True, stable=True)
        candidates = torch.stack([*found.nonzero(as_tuple=True), labels[found]], -1)[order].tolist()
        by_example: list[list[Span]] = [[] for _ in found]
        for example, first, last, label in candidates:
            by_example[example].append((first, last + 1, label))
        return [without_overlaps(spans) for spans in by_example]


class BioSpans(nn.Module):
    """A tag per word: 0 outside, 1 + 2c at the first word of a span with label c, 2 + 2c at its further words."""

    def __init__(self, hidden_size: int, spec: HeadSpec, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = linear(hidden_size, 2 * spec.num_labels + 1, generator)
        self.names = ["O", *(f"{place}-{label}" for label, place in product(range(spec.num_labels), "BI"))]

    def forward(self, words: Tensor, mask: Tensor) -> Scores:
        """(n, W, d), (n, W) -> logits (n, W, 2C + 1) and the words that have been read."""
        return Scores(self.linear(words), mask)

    def targets(self, labels: Tensor, mask: Tensor) -> Tensor:
        """The tag of each word, (n, W); -100 in a span that has not been read to its end."""
        position = torch.arange(mask.shape[1], device=mask.device)
        starts, ends, numbers = labels[..., None].unbind(2)
        inside = (starts <= position) & (position < ends)
        tags = (inside * torch.where(position == starts, 1 + 2 * numbers, 2 + 2 * numbers)).sum(1)
        cut = inside & (ends > mask.sum(-1)[:, None, None])
        return tags.masked_fill(cut.any(1), -100)

    def decode(self, outputs: Scores) -> list[list[Span]]:
        """The spans of each word's most probable tag, read as the scores read tags: a stray I- begins a span."""
        counts = outputs.mask.sum(-1).tolist()
        rows = outputs.scores.argmax(-1).tolist()
        return [self.spans(tags[:count]) for tags, count in zip(rows, counts, strict=True)]

    def spans(self, tags: list[int]) -> list[Span]:
        """The spans that tag numbers mark."""
        return [(start, end, int(label)) for start, end, label in bio_spans([self.names[tag] for tag in tags])]


def without_overlaps(spans: Iterable[Span]) -> list[Span]:
    """Of spans given best first, those that share no word with one before them that was kept; in order of position."""
    kept: list[Span] = []
    taken: set[int] = set()
    for span in spans:
        words = range(*span[:2])
        if taken.isdisjoint(words):
            taken.update(words)
            kept.append(span)
    return sorted(kept)
