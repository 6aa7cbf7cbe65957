"""A head and a relation for every word: the biaffine parser of Dozat & Manning (ICLR 2017, arXiv 1611.01734).

Legend: n examples, W words of the longest, N = W + 1 possible heads (0 the root, h the word h - 1), R relations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_modules.network.task_heads.base import HeadSpec, States, TaskHead
from lightning_modules.network.task_heads.biaffine import Biaffine, Projection
from lightning_modules.network.task_heads.trees import best_projective_tree, best_tree


@dataclass(frozen=True)
class DependencyScores:
    """What the head says of n examples."""

    arcs: Tensor
    """(n, W, N) of [word, head]; minus infinity for a word as its own head and for heads that the model has not read."""
    relations: Tensor
    """(n, W, N, R) of [word, head, relation]."""
    counts: Tensor
    """(n,) int64, the words of each example that the model has read."""

    def relations_at(self, heads: Tensor) -> Tensor:
        """The relations' scores (n, W, R) if the words' heads are ``heads`` (n, W)."""
        index = heads[:, :, None, None].expand(-1, -1, 1, self.relations.shape[-1])
        return self.relations.gather(2, index).squeeze(2)


class DependencyHead(TaskHead):
    """Biaffine scores of arcs and, given an arc, of relations, from the means of the words' subwords.

    The root is a learned state, so that encoders without a first token that stands for the text serve as well.
    """

    def __init__(self, hidden_size: int, spec: HeadSpec) -> None:
        super().__init__(hidden_size, spec)
        sizes = spec.heads
        # The scale of an encoder's normalised states.
        self.root = nn.Parameter(torch.empty(hidden_size).normal_(generator=self.generator))
        self.arc_dependent = Projection(hidden_size, sizes.arc_size, sizes.dropout, self.generator)
        self.arc_head = Projection(hidden_size, sizes.arc_size, sizes.dropout, self.generator)
        self.relation_dependent = Projection(hidden_size, sizes.label_size, sizes.dropout, self.generator)
        self.relation_head = Projection(hidden_size, sizes.label_size, sizes.dropout, self.generator)
        self.arcs = Biaffine(sizes.arc_size, 1, self.generator, bias=False)
        self.relations = Biaffine(sizes.label_size, spec.num_labels, self.generator, bias=True)

    def outputs(self, hidden: Tensor, states: States) -> DependencyScores:
        """(n, S, d) -> scores of all arcs and of all relations."""
        words = states.word_states(hidden)
        heads = torch.cat([self.root.expand(len(words), 1, -1), words], 1)
        arcs = self.arcs(self.arc_dependent(words), self.arc_head(heads)).squeeze(-1)
        relations = self.relations(self.relation_dependent(words), self.relation_head(heads))
        unread = torch.arange(arcs.shape[2], device=arcs.device) > states.word_counts[:, None, None]
        itself = torch.eye(*arcs.shape[1:], dtype=torch.bool, device=arcs.device).roll(1, 1)
        return DependencyScores(arcs.masked_fill(unread | itself, -torch.inf), relations, states.word_counts)

    def loss(self, outputs: DependencyScores, labels: Tensor) -> Tensor:
        """Cross-entropy of the arc plus that of the relation at the gold arc, mean over each example's words -> (n,).

        ``labels`` (n, W', 2) head and relation, -100: no word. Words that the model has not read, and those whose head it has
        not read, do not count.
        """
        counts, width = outputs.counts[:, None], outputs.arcs.shape[1]
        heads, relations = functional.pad(labels, (0, 0, 0, width - labels.shape[1]), value=-100).unbind(-1)
        read = (torch.arange(width, device=labels.device) < counts) & (heads <= counts)
        known = read & (heads >= 0) & (relations >= 0)
        heads, relations = heads.where(known, -100), relations.where(known, -100)
        at_gold = outputs.relations_at(heads.clamp_min(0))
        arc_losses = functional.cross_entropy(outputs.arcs.transpose(1, 2), heads, reduction="none")
        relation_losses = functional.cross_entropy(at_gold.transpose(1, 2), relations, reduction="none")
        return (arc_losses + relation_losses).sum(-1) / known.sum(-1).clamp_min(1)

    def predict(self, outputs: DependencyScores) -> list[list[tuple[int, int]]]:
        """The (head, relation) of each word that the model has read; the heads as ``spec.heads.tree`` says."""
        heads = self._heads(outputs)
        relations = outputs.relations_at(heads).argmax(-1)
        pairs = torch.stack([heads, relations], -1).tolist()
        counts = outputs.counts.tolist()
        return [[(head, relation) for head, relation in rows[:count]] for rows, count in zip(pairs, counts, strict=True)]

    def _heads(self, outputs: DependencyScores) -> Tensor:
        """(n, W) int64, each word's head; 0 for what is no word, except if greedy."""
        if self.spec.heads.tree == "greedy":
            return outputs.arcs.argmax(-1)
        if self.spec.heads.tree == "projective":
            return best_projective_tree(outputs.arcs, outputs.counts)
        heads = torch.zeros(outputs.arcs.shape[:2], dtype=torch.int64)
        arcs = outputs.arcs.detach().double().cpu().numpy()
        for example, count in enumerate(outputs.counts.tolist()):
            heads[example, :count] = torch.tensor(best_tree(arcs[example, :count, : count + 1]), dtype=torch.int64)
        return heads.to(outputs.arcs.device)
