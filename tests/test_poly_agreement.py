"""Task-level skill routing agrees with peft's Poly: the same weights, the same draws, the same layer."""

import torch
from peft import PolyConfig
from peft.tuners.poly.layer import Linear
from torch import Tensor, nn

from lightning_modules.network.dispatch import mix
from lightning_modules.network.routers.record import Route, Routing, Units
from lightning_modules.network.routers.selection import choose
from lightning_modules.router_config import RouterConfig

SKILLS, TASKS, WIDTH, OUT, RANK = 5, 3, 8, 6, 2
CONFIG = RouterConfig(selection="skills", combine="parameters")


class LowRank(nn.Module):
    """x A B / r."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.a @ self.b / RANK


def poly() -> Linear:
    torch.manual_seed(0)
    settings = PolyConfig(r=RANK, n_tasks=TASKS, n_skills=SKILLS, n_splits=1, init_weights=False)
    layer = Linear(nn.Linear(WIDTH, OUT), "default", settings)
    nn.init.normal_(layer.poly_router["default"].module_logits)
    return layer


def routed(layer: Linear, tasks: list[int], training: bool) -> Routing:
    logits = layer.poly_router["default"].module_logits.detach()[tasks]
    uniform = torch.rand(logits.shape) if training else None
    return choose(CONFIG, logits, temperature=1.0, training=training, uniform=uniform)


def test_weights_are_those_of_poly_when_scoring_and_for_the_same_draws() -> None:
    layer, tasks = poly(), [2, 0, 1, 2]
    for training in (False, True):
        router = layer.poly_router["default"].train(training)
        torch.manual_seed(3)
        theirs = router(torch.tensor(tasks), torch.zeros(1)).squeeze(1)
        torch.manual_seed(3)
        torch.testing.assert_close(routed(layer, tasks, training).weights, theirs, atol=1e-6, rtol=0)


def test_merged_parameters_compute_the_poly_layer() -> None:
    layer = poly().eval()
    a, b = layer.poly_lora_A["default"][0], layer.poly_lora_B["default"][0]
    experts = nn.ModuleList(LowRank(a[skill], b[skill]) for skill in range(SKILLS))
    rows = ((1, 0, 2), (2, 2, 5))
    task = torch.tensor([1, 2])
    units = Units("task", task, torch.tensor([0, 2]), torch.full((2,), 0.5), groups=((1, 0, 1), (2, 1, 2)))
    routing = routed(layer, [1, 2], training=False)
    hidden = torch.randn(5, 4, WIDTH)
    ours = mix(experts, Route(rows, units, routing, routing.chosen.tolist()), hidden, "parameters")
    theirs = layer(hidden, task_ids=torch.tensor([1, 1, 2, 2, 2])) - layer.base_layer(hidden)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
