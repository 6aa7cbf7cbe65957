"""Labelled brackets: the two-stage tree CRF of Zhang, Zhou & Li (IJCAI 2020, arXiv 2008.03736).

Legend: n examples, W words of the longest, N = W + 1 boundaries between words, C chains of labels, K gold spans;
span (i, j) is words i to j - 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_modules.network.task_heads.base import HeadSpec, States, TaskHead
from lightning_modules.network.task_heads.biaffine import Biaffine, Projection
from lightning_modules.network.task_heads.trees import best_binary_tree, log_partition, span_marginals


@dataclass(frozen=True)
class ConstituencyScores:
    """What the head says of n examples."""

    spans: Tensor
    """(n, N, N) of [start, end]; only start < end <= the example's words mean something."""
    labels: Tensor
    """(n, N, N, C + 1) of [start, end, chain]; the last chain is the empty one."""
    counts: Tensor
    """(n,) int64, the words of each example that the model has read."""


class ConstituencyHead(TaskHead):
    """A CRF over unlabelled binary trees, then a chain of labels for each span of the tree, from the means of words' subwords.

    A boundary between two words is represented by the states of both; learned states stand before the first word and after
    the last. A constituent with more than two children is binarised to the left (its first two children, its first three, ...
    become spans with the empty chain), which leaves one gold tree per example, so that both stages are trained on the very
    spans that decoding has to choose between. Summing over all binarisations would leave open which of the spans that are no
    constituents the label stage should learn to call empty, and costs a second inside pass. Dropping the empty chains
    restores the constituents exactly. Every binary tree holds the whole sentence and each single word, so these spans always
    get a label, and it may be empty.

    ``spec.facts["chains"]`` lists the C unary chains, each a list of label numbers, outer first.
    """

    def __init__(self, hidden_size: int, spec: HeadSpec) -> None:
        super().__init__(hidden_size, spec)
        sizes = spec.heads
        self.chains: list[list[int]] = [*spec.facts["chains"], []]
        # The scale of an encoder's normalised states.
        self.before = nn.Parameter(torch.empty(hidden_size).normal_(generator=self.generator))
        self.after = nn.Parameter(torch.empty(hidden_size).normal_(generator=self.generator))
        self.span_start = Projection(2 * hidden_size, sizes.arc_size, sizes.dropout, self.generator)
        self.span_end = Projection(2 * hidden_size, sizes.arc_size, sizes.dropout, self.generator)
        self.label_start = Projection(2 * hidden_size, sizes.label_size, sizes.dropout, self.generator)
        self.label_end = Projection(2 * hidden_size, sizes.label_size, sizes.dropout, self.generator)
        self.spans = Biaffine(sizes.arc_size, 1, self.generator, bias=False)
        self.labels = Biaffine(sizes.label_size, len(self.chains), self.generator, bias=True)

    def outputs(self, hidden: Tensor, states: States) -> ConstituencyScores:
        """(n, S, d) -> scores of all spans and of all their labels."""
        boundaries = self._boundaries(states.word_states(hidden), states.word_counts)
        spans = self.spans(self.span_start(boundaries), self.span_end(boundaries)).squeeze(-1)
        labels = self.labels(self.label_start(boundaries), self.label_end(boundaries))
        return ConstituencyScores(spans, labels, states.word_counts)

    def _boundaries(self, words: Tensor, counts: Tensor) -> Tensor:
        """(n, W, d) -> (n, N, 2 d): the states to the left and to the right of each boundary."""
        padded = torch.cat([self.before.expand(len(words), 1, -1), functional.pad(words, (0, 0, 0, 1))], 1)
        last = torch.arange(padded.shape[1], device=words.device) == counts[:, None] + 1
        padded = torch.where(last[..., None], self.after, padded)
        return torch.cat([padded[:, :-1], padded[:, 1:]], -1)

    def loss(self, outputs: ConstituencyScores, labels: Tensor) -> Tensor:
        """The tree's negative log-likelihood per word, plus the mean cross-entropy of its 2 W - 1 spans' chains -> (n,).

        ``labels`` (n, K, 3) start, end and chain, -100: no span. Spans that reach words that the model has not read do not
        count.
        """
        counts, boundaries = outputs.counts, outputs.spans.shape[1]
        known = (labels >= 0).all(-1) & (labels[..., 1] <= counts[:, None])
        starts, ends, chains = labels.where(known[..., None], 0).unbind(-1)
        tree = binarised(starts, ends, counts, boundaries - 1)
        targets = torch.full_like(tree, len(self.chains) - 1, dtype=torch.int64).flatten(1)
        # What is no span goes to cell (0, 0), which is no span either.
        targets = targets.scatter(1, starts * boundaries + ends, chains).view_as(tree)
        gold = (outputs.spans * tree).sum((1, 2))
        structure = (log_partition(outputs.spans, counts) - gold) / counts.clamp_min(1)
        labelling = outputs.labels.new_zeros(tree.shape)
        labelling[tree] = functional.cross_entropy(outputs.labels[tree], targets[tree], reduction="none")
        return structure + labelling.sum((1, 2)) / tree.sum((1, 2)).clamp_min(1)

    def predict(self, outputs: ConstituencyScores) -> list[list[tuple[int, int, int]]]:
        """The (start, end, label) of each example, in order, outer before inner.

        The tree is the one with the most expected right spans (minimum Bayes risk); then each span's best chain is unfolded.
        """
        tree = best_binary_tree(span_marginals(outputs.spans, outputs.counts), outputs.counts)
        spans = torch.cat([tree.nonzero(), outputs.labels[tree].argmax(-1, keepdim=True)], -1).tolist()
        brackets: list[list[tuple[int, int, int]]] = [[] for _ in range(len(tree))]
        for example, start, end, chain in sorted(spans, key=lambda span: (span[0], span[1], -span[2])):
            brackets[example].extend((start, end, label) for label in self.chains[chain])
        return brackets


def binarised(starts: Tensor, ends: Tensor, counts: Tensor, words: int) -> Tensor:
    """The spans (n, N, N) bool of the binary tree that properly nested gold spans become when binarised to the left.

    ``starts`` and ``ends`` (n, K), where (0, 0) is no span, ``counts`` (n,) words of each example, ``words`` = W. The whole
    example and each word are spans. Let f(i) be where the longest gold span that starts at i ends. A span (i, j) is a gold
    span or the first children of one exactly if j <= f(i) and it cuts none inside, so if f(s) <= j for all s between i and j.
    """
    place = torch.arange(words, device=starts.device)
    furthest = (place + 1).repeat(len(starts), 1)
    furthest[:, 0] = counts
    furthest = furthest.scatter_reduce(1, starts, ends, "amax")
    inside = torch.where(place[None, :] > place[:, None], furthest[:, None, :], 0).cummax(-1).values
    end = place + 1
    tree = (end > place[:, None]) & (end <= furthest[..., None]) & (inside <= end) & (end <= counts[:, None, None])
    return functional.pad(tree, (1, 0, 0, 1))
