"""One of several given options; their number may differ from example to example."""

from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from lightning_modules.network.task_heads.base import HeadSpec, States, TaskHead, linear, symmetric_divergence


class ChoiceHead(TaskHead):
    """A score for each option, linear in the pooled state of the text with that option (Radford et al. 2018); no bias, which
    would add the same to every option.

    The rows of ``states`` are the options of all examples one after another, ``states.options`` (m,) how many each has.
    """

    def __init__(self, hidden_size: int, spec: HeadSpec) -> None:
        super().__init__(hidden_size, spec)
        self.linear = linear(hidden_size, 1, self.generator, bias=False)

    def outputs(self, hidden: Tensor, states: States) -> Tensor:
        """(n, S, d) states of m examples' n options -> scores (m, most options), padded with -inf."""
        assert states.options is not None, "a choice needs the number of options of each example"
        scores = self.linear(states.pooled(hidden, self.spec.pooling)).squeeze(-1)
        return pad_sequence(scores.split(states.options.tolist()), batch_first=True, padding_value=float("-inf"))

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy over each example's options of scores (m, most options) with labels (m,) int64 -> (m,)."""
        return functional.cross_entropy(outputs, labels, reduction="none")

    def predict(self, outputs: Tensor) -> list[int]:
        """The number of the best option of each example."""
        return outputs.argmax(-1).tolist()

    def divergence(self, first: Tensor, second: Tensor) -> Tensor:
        """Between the distributions over the options, (m,)."""
        return symmetric_divergence(first, second)
