"""A train step (forward, backward, optimiser) of task-level and token-level experts over the dense one of equal compute.

    python tests/benchmarks/moe_step.py [--quick] [--rounds N] [--device cuda] [--precision bf16] [--size bert-base|bart-base]

Each variant alternates with the dense base, step by step, in one process with one thread; a ratio is one variant step over the
mean of its two dense neighbours, by CPU time (on a GPU by wall time, between synchronisations). AdamW is fused in both.

- ``task_moe/E``: top-1 by task, batches of one task. ``task_moe_mixed/E``: batches of 8 tasks, each at an expert of its own.
- ``all_experts/E``: all experts, then mix (soft weights): what the published code does whatever the weights are.
- ``token_top2/E``: one block, 2 experts of half width per token, over one dense FFN; forward and backward, no optimiser.
  ``transformers_token_top2/E``: Mixtral's block of equal compute (SwiGLU) with its default grouped products.
- ``token_top2_step/E``: the whole network's step, all experts of which the optimiser moves (left out by ``--quick``).
"""

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from lightning_modules.building import build
from lightning_modules.config import TrialConfig
from lightning_modules.data.batches import Batch, TaskRows
from lightning_modules.network.dispatch import RoutedExperts
from lightning_modules.network.model import MultiTaskNetwork, build_network
from lightning_modules.network.routers.record import Rows
from lightning_modules.network.routers.routers import Routers, Sites
from lightning_modules.network.routers.traffic import Traffic
from lightning_modules.network.seams import FeedForward
from lightning_modules.network.task_heads.base import HeadSpec
from lightning_modules.router_config import RouterConfig

TASKS, ROWS = 8, 32
SIZES = {"small": (256, 1024, 8000, 32), "bert-base": (768, 3072, 30_522, 128), "bart-base": (768, 3072, 50_265, 128)}
"""Hidden width, inner width of the FFN, vocabulary, tokens per row."""
BLOCK_TOKENS = 2048


class Bench:
    """The settings of one run, and its results."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.device = torch.device(options.device)
        self.rounds = max(5, options.rounds or (5 if options.quick else 9))
        self.tasks = 2 if options.quick else TASKS
        """Tasks that the batches of one task go through: each is a warm-up step."""
        self.hidden, self.ffn, self.vocabulary, self.length = SIZES[options.size]
        self.bf16, self.size, self.scratch = options.precision == "bf16", options.size, scratch
        self.beside = 0
        self.ratios: dict[str, dict[str, float]] = {}
        self.throughput: dict[str, dict[str, float]] = {}

    def clock(self) -> float:
        """Seconds; on a GPU once it is done."""
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def compare(self, name: str, base: Callable[[], None], variant: Callable[[], None], tokens: int) -> None:
        """Base and variant in turn."""
        self._peak(reset=True)
        for _ in range(self.tasks):
            variant()
        peak = self._peak()
        base()
        bases, seconds = [self._time(base)], []
        for _ in range(self.rounds):
            seconds.append(self._time(variant))
            bases.append(self._time(base))
        ratios = [2 * own / sum(near) for own, near in zip(seconds, itertools.pairwise(bases), strict=True)]
        self.ratios[name] = summary(ratios)
        self.throughput[name] = {
            "tokens_per_s": round(tokens / statistics.median(seconds)),
            "dense_tokens_per_s": round(tokens / statistics.median(bases)),
            **({"peak_gib": round(peak / 2**30, 3)} if peak else {}),
        }
        row = self.ratios[name]
        print(
            f"{name:<30}{row['median']:>8.3f}{row['min']:>8.3f}{row['max']:>8.3f}"
            f"{self.throughput[name]['tokens_per_s']:>12,}{peak / 2**30:>10.2f}"
        )

    def _time(self, step: Callable[[], None]) -> float:
        begin = self.clock()
        step()
        return self.clock() - begin

    def measure_dense(self, dense: MultiTaskNetwork, batches: list[Batch], tokens: int) -> None:
        """The base alone: its speed and memory."""
        step = self.step_of(dense, batches)
        self._peak(reset=True)
        step()
        peak = self._peak()
        seconds = statistics.median(self._time(step) for _ in range(self.rounds))
        self.throughput["dense"] = {"tokens_per_s": round(tokens / seconds), "peak_gib": round(peak / 2**30, 3)}
        self.beside = sum(parameter.nbytes for parameter in dense.parameters())
        print(f"{'dense':<54}{self.throughput['dense']['tokens_per_s']:>12,}{peak / 2**30:>10.2f}")

    def _peak(self, reset: bool = False) -> int:
        """Bytes on the GPU at most since the last reset, without the base's weights that lie beside; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        if reset:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.beside

    def network(self, model: dict[str, Any]) -> MultiTaskNetwork:
        """The network of a trial with this model section."""
        backbone: dict[str, Any] = {"max_length": self.length, "dropout": 0.0}
        if self.size == "small":
            size = {"hidden_size": self.hidden, "num_layers": 4, "num_heads": 4, "ffn_size": self.ffn}
            backbone |= {"size": size | {"vocab_size": self.vocabulary}}
        else:
            backbone |= {"name": str(self._folder())}
        kind = "text2text" if self.size == "bart-base" else "classification"
        heads = [HeadSpec(f"task{t}", kind, 3, dropout=0.0) for t in range(TASKS)]
        plain: dict[str, Any] = {"backbone": backbone, "mixture": {"tasks": [head.name for head in heads]}, "model": model}
        if self.size != "small":
            plain["digests"] = {"backbone": "benchmark"}
        network = build_network(build(TrialConfig, plain, "trial"), heads, self.vocabulary).to(self.device)
        with torch.no_grad():
            for name, logits in network.named_parameters():
                if logits.shape[0] == TASKS and name.startswith("routers."):
                    # Every task prefers an expert of its own, the most that a mixed batch can ask for.
                    logits[torch.arange(TASKS), torch.arange(TASKS) % logits.shape[1]] += 1.0
        return network

    def _folder(self) -> Path:
        """A model of that size with random weights: speed does not depend on them."""
        folder = self.scratch / self.size
        if not folder.exists():
            if self.size == "bert-base":
                BertModel(BertConfig(), add_pooling_layer=False).save_pretrained(folder)
            else:
                BartForConditionalGeneration(BartConfig.from_dict(_BART_BASE)).save_pretrained(folder)
        return folder

    def step_of(self, network: MultiTaskNetwork, batches: list[Batch]) -> Callable[[], None]:
        """One train step on the next of ``batches``."""
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
        turns: Iterator[Batch] = itertools.cycle(batches)

        def step() -> None:
            batch = next(turns)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                losses = network.losses(batch)
            total = torch.stack([(own * rows.weights).sum() for rows, own in zip(batch.tasks, losses, strict=True)]).sum()
            total.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def batch(self, tasks: list[int]) -> Batch:
        """Rows without padding, as many of each task."""
        generator = torch.Generator().manual_seed(tasks[0])
        ids = torch.randint(5, self.vocabulary, (ROWS, self.length), generator=generator)
        each, ones = ROWS // len(tasks), torch.ones_like(ids)
        shape = (each, 32) if self.size == "bart-base" else (each,)
        top = self.vocabulary if self.size == "bart-base" else 3
        rows = tuple(
            TaskRows(
                task,
                i * each,
                (i + 1) * each,
                torch.randint(top, shape, generator=generator),
                torch.full((each,), 1 / ROWS),
            )
            for i, task in enumerate(tasks)
        )
        return Batch(ids, ones, torch.zeros_like(ids), torch.full_like(ids, -1), rows).to(self.device)

    def block_of(self, module: nn.Module, call: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Forward and backward of one block on ``BLOCK_TOKENS`` tokens."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(BLOCK_TOKENS // self.length, self.length, self.hidden, generator=generator)
        hidden = hidden.to(self.device).requires_grad_()

        def step() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                out = call(hidden)
            out.float().square().mean().backward()
            hidden.grad = None
            module.zero_grad()

        return step

    def feed_forward(self, width: int) -> FeedForward:
        """A plain FFN."""
        return FeedForward(nn.Linear(self.hidden, width), nn.GELU(), nn.Linear(width, self.hidden))


def summary(ratios: list[float]) -> dict[str, float]:
    """Median, ends and number."""
    rounded = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {name: round(value, 3) for name, value in rounded.items()} | {"n": len(ratios)}


def task_model(experts: int, **router: Any) -> dict[str, Any]:
    """The model section of a task-level mixture."""
    return {"family": "task_moe", "num_experts": experts, "router": router}


def whole_steps(bench: Bench, quick: bool) -> None:
    """Dense against task-level experts, and token-level ones of half width."""
    single, mixed = [bench.batch([task]) for task in range(bench.tasks)], [bench.batch(list(range(TASKS)))]
    tokens = ROWS * bench.length
    dense = bench.network({"family": "dense"})
    if bench.device.type == "cuda":
        bench.measure_dense(dense, single, tokens)
    variants = [(f"task_moe/E{count}", task_model(count), single) for count in (2, 4, 8, 16, 32, 64)]
    variants += [(f"task_moe_mixed/E{count}", task_model(count), mixed) for count in (8, 64)]
    variants += [("all_experts/E8", task_model(8, selection="soft"), single)]
    if not quick:
        for count in (8, 32):
            model = task_model(count, kind="token", top_k=2) | {"expert": "ffn_split"}
            variants.append((f"token_top2_step/E{count}", model, mixed))
    for name, model, batches in variants:
        base, variant = bench.step_of(dense, batches), bench.step_of(bench.network(model), batches)
        bench.compare(name, base, variant, tokens)
        del variant


def token_blocks(bench: Bench) -> None:
    """One token-level block, ours and a public one, over a dense FFN of equal compute."""
    dense = bench.feed_forward(bench.ffn).to(bench.device)
    rows: Rows = ((0, 0, BLOCK_TOKENS // bench.length),)
    for count in (8, 32):
        config = RouterConfig(kind="token", top_k=2)
        sites = Sites({0: count}, bench.hidden, bench.vocabulary, 1, 1)
        routers = Routers(config, sites, ["task"], None, 0).to(bench.device)
        experts = RoutedExperts(0, [bench.feed_forward(bench.ffn // 2) for _ in range(count)], "outputs").to(bench.device)
        mask = torch.ones(rows[0][2], bench.length, dtype=torch.long, device=bench.device)
        both = nn.ModuleList([experts, routers])

        def ours(hidden: Tensor, experts: nn.Module = experts, routers: Routers = routers, mask: Tensor = mask) -> Tensor:
            return experts(hidden, Traffic(routers, rows, bench.device, mask=mask))

        # Three matrices instead of two: two thirds of the width, rounded to what grouped products need.
        width = round(bench.ffn / 2 * 2 / 3 / 8) * 8
        public_config = MixtralConfig(
            hidden_size=bench.hidden, intermediate_size=width, num_local_experts=count, num_experts_per_tok=2
        )
        public_config._experts_implementation = "grouped_mm"
        public = MixtralSparseMoeBlock(public_config)
        for parameter in public.parameters():
            nn.init.normal_(parameter, std=0.02)
        public.to(bench.device)
        for name, module, call in ((f"token_top2/E{count}", both, ours), (f"transformers_token_top2/E{count}", public, public)):
            bench.compare(name, bench.block_of(dense, dense), bench.block_of(module, call), BLOCK_TOKENS)


def machine(bench: Bench) -> dict[str, Any]:
    """Where it ran."""
    on_gpu = bench.device.type == "cuda"
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(bench.device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "precision": "bf16" if bench.bf16 else "fp32",
        "size": bench.size,
        "clock": "wall" if on_gpu else "cpu",
    }


_BART_BASE = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
}


def main() -> None:
    """Print the table and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        print(f"{'':<30}{'median':>8}{'min':>8}{'max':>8}{'tokens/s':>12}{'peak GiB':>10}   (ratio to dense)")
        token_blocks(bench)
        whole_steps(bench, options.quick)
    print(json.dumps({"bench": "moe_step", "machine": machine(bench), "ratios": bench.ratios, "throughput": bench.throughput}))


if __name__ == "__main__":
    main()
