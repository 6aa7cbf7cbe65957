"""Save one task's path through a trained mixture as a plain Hugging Face model:
``python pipelines/export.py TRIAL_ID TASK --to FOLDER [--storage runs]``.

For dense trials and routers whose route depends on the task alone. The folder holds the model (``AutoModel``, or
``AutoModelForSeq2SeqLM``, reads it), its tokenizer, and the task's head: ``head.safetensors`` and ``head.json``, which says how
to apply it. Model and head answer as the mixture does for this task.
Exit status: 0 written, 2 a mistake (one line says which).
"""

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_modules.building import ConfigError
from lightning_modules.config import AdapterMoEConfig, TaskMoEConfig, TrialConfig, to_plain
from lightning_modules.data.prepared import TaskData
from lightning_modules.data.tokenizer import load_tokenizer, tokenizer_key
from lightning_modules.files import atomic_folder
from lightning_modules.network.backbones import NotPlainError
from lightning_modules.network.dispatch import RoutedExperts
from lightning_modules.network.model import MultiTaskNetwork
from lightning_modules.network.routers.record import Routing
from lightning_modules.network.seams import FeedForward, LayerSeam
from pipelines.restore import restore

UNIT_WEIGHT = 1e-5
"""A weight this near to 1 is 1: straight-through weights ``1 + p - p`` are so up to rounding."""


class ExportError(ValueError):
    """What cannot be exported, and why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("trial", metavar="TRIAL_ID")
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("--storage", default="runs", metavar="DIR", help="where trials live (default: ./runs)")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="a new folder for the model")
    options = parser.parse_args(arguments)
    try:
        export(Path(options.storage), options.trial, options.task, Path(options.to))
    except (ExportError, ConfigError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    print(f"{options.task} of {options.trial}: {options.to}")
    return 0


def export(storage: Path, trial_id: str, task: str, to: Path) -> None:
    """Write the plain model of ``task`` in a finished trial to the new folder ``to``.

    Raises:
        ExportError: there is no such task, ``to`` exists, or the task's path is no plain model.
        ConfigError: there is no such finished trial, or its files or its backbone cannot be read any more.
    """
    if to.exists():
        raise ExportError(f"--to must be a new folder, but {to} exists")
    trial = restore(storage, trial_id)
    config, network = trial.config, trial.network
    number = _number(config, task)
    if isinstance(config.model, AdapterMoEConfig):
        raise ExportError("an adapter_moe has no plain model: its adapters add to the backbone's layers")
    if isinstance(config.model, TaskMoEConfig) and not config.model.router.per_task:
        kind = config.model.router.kind
        raise ExportError(f"the router decides by more than the task (kind: {kind}), so no plain model has its path")
    try:
        straighten(network, number)
        model = network.backbone.plain()
    except NotPlainError as error:
        raise ExportError(str(error)) from error
    with atomic_folder(to) as folder:
        model.save_pretrained(folder)
        tokenizer = storage / "prepared" / f"tokenizer-{tokenizer_key(config)}"
        if tokenizer.is_dir():
            load_tokenizer(tokenizer).save_pretrained(folder)
        _write_head(folder, network, config, trial.tasks[number], number)


def straighten(network: MultiTaskNetwork, task: int) -> None:
    """Put one FFN or one layer, in place, where task number ``task`` goes through experts: the only one that it chose, the
    merged one under ``combine: parameters``, or the chosen ones side by side, which is one wider FFN.

    Raises:
        NotPlainError: whole layers are mixed, or weighted by another number than 1.
    """
    routers, backbone = network.routers, network.backbone
    if routers is None:
        return
    routed = network.routed()
    routings = routers.of_tasks(torch.tensor([task]))
    whole = any(isinstance(seam.replacement, RoutedExperts) for seam in _layer_seams(network))
    seams: Mapping[int, Any] = {seam.block: seam for seam in (_layer_seams(network) if whole else backbone.seams())}
    with torch.no_grad():
        for block, module in routed.items():
            parts = _parts(module, routings.get(block))
            seams[block].restore(_one_layer(parts, block) if whole else _side_by_side(parts))


def _layer_seams(network: MultiTaskNetwork) -> list[Any]:
    return [module for module in network.backbone.modules() if isinstance(module, LayerSeam)]


@dataclass(frozen=True)
class _Part:
    """An expert and the weight of its output."""

    weight: float
    expert: nn.Module


def _parts(module: RoutedExperts, routing: Routing | None) -> list[_Part]:
    """What a task's output at a block is the sum of."""
    shared = [_Part(1.0, expert) for expert in module.shared]
    if len(module.experts) == 1:
        return [_Part(1.0, module.experts[0]), *shared]
    assert routing is not None
    chosen = [e for e in routing.chosen[0].tolist() if e >= 0]
    weights = [routing.weights[0, e] for e in chosen]
    experts = [module.experts[e] for e in chosen]
    if module.combine == "parameters":
        return [_Part(1.0, _merged(experts, weights)), *shared]
    return [*(_Part(_rounded(w), expert) for w, expert in zip(weights, experts, strict=True)), *shared]


def _rounded(weight: Tensor) -> float:
    return 1.0 if abs(float(weight) - 1) < UNIT_WEIGHT else float(weight)


def _merged(experts: Sequence[nn.Module], weights: Sequence[Tensor]) -> nn.Module:
    merged = copy.deepcopy(experts[0])
    for name, parameter in merged.named_parameters():
        parameter.copy_(sum((w * e.get_parameter(name) for w, e in zip(weights, experts, strict=True)), torch.zeros(())))
    return merged


def _one_layer(parts: Sequence[_Part], block: int) -> nn.Module:
    if len(parts) > 1:
        law = f"block {block} mixes the outputs of {len(parts)} whole layers, which is no one layer"
        raise NotPlainError(f"{law}; top_k: 1 or combine: parameters has a plain model")
    if parts[0].weight != 1:
        raise NotPlainError(f"block {block} weights its layer's output by {parts[0].weight:.4g}, which no plain layer does")
    return parts[0].expert


def _side_by_side(parts: Sequence[_Part]) -> FeedForward:
    """One FFN with the units of all, whose sum of outputs it computes."""
    ffns = [part.expert for part in parts if isinstance(part.expert, FeedForward)]
    weights = [part.weight for part in parts]
    one = copy.deepcopy(ffns[0])
    if weights == [1.0]:
        return one
    one.up = _stacked([ffn.up for ffn in ffns])
    one.gate = None if one.gate is None else _stacked([ffn.gate for ffn in ffns if ffn.gate is not None])
    one.down = nn.Linear(one.up.out_features, one.down.out_features, bias=one.down.bias is not None)
    one.down.weight.copy_(torch.cat([w * ffn.down.weight for w, ffn in zip(weights, ffns, strict=True)], 1))
    if one.down.bias is not None:
        one.down.bias.copy_(torch.stack([w * ffn.down.bias for w, ffn in zip(weights, ffns, strict=True)]).sum(0))
    return one


def _stacked(linears: Sequence[nn.Linear]) -> nn.Linear:
    tall = nn.Linear(linears[0].in_features, sum(each.out_features for each in linears), bias=linears[0].bias is not None)
    for name, parameter in tall.named_parameters():
        parameter.copy_(torch.cat([each.get_parameter(name) for each in linears]))
    return tall


def _number(config: TrialConfig, task: str) -> int:
    if task not in config.mixture.tasks:
        raise ExportError(f"TASK must be one of the trial's ({', '.join(config.mixture.tasks)}), got {task!r}")
    return config.mixture.tasks.index(task)


def _write_head(folder: Path, network: MultiTaskNetwork, config: TrialConfig, task: TaskData, number: int) -> None:
    head = network.head(number)
    if head is not None:
        save_file(head.state_dict(), folder / "head.safetensors", metadata={"format": "pt"})
    about = {
        "task": task.name,
        "kind": task.kind,
        "labels": task.labels,
        "facts": head.spec.facts if head is not None else task.facts,
        "num_labels": head.spec.num_labels if head is not None else None,
        "hidden_size": network.backbone.hidden_size,
        "pooling": config.backbone.pooling,
        "max_length": config.backbone.max_length,
        "heads": to_plain(config.heads),
        "generation": to_plain(config.generation) if head is None else None,
        "note": _note(task.kind, config, "encoder_last_hidden_state" if network.backbone.is_seq2seq else "last_hidden_state"),
    }
    (folder / "head.json").write_text(json.dumps(about, indent=1))


def _note(kind: str, config: TrialConfig, states: str) -> str:
    """How to apply the head to the model's ``states``, in words."""
    first = config.backbone.pooling == "first"
    state = f"the first token's {states}" if first else f"the mean of {states} over all tokens but padding"
    match kind:
        case "classification":
            return f"logits = linear.weight @ s + linear.bias with s = {state}; logit i belongs to labels[i]"
        case "regression":
            return f"answer = (linear.weight @ s + linear.bias) * facts.sd + facts.mean with s = {state}"
        case "choice":
            return f"score of an option = linear.weight @ s with s = {state} of the text paired with it; the best is the answer"
        case "text2text":
            answer = f"num_beams={config.generation.beams}, max_new_tokens={config.backbone.max_target_length}"
            return f"no head: model.generate(..., {answer}, length_penalty={config.generation.length_penalty})"
        case "tagging":
            word = "the mean of the last hidden states of a word's tokens"
            return f"logits of a word = linear.weight @ w + linear.bias with w = {word}; logit i belongs to labels[i]"
    return f"the head is lightning_modules.network.model.HEADS[{kind!r}], built from this file's settings"


if __name__ == "__main__":
    sys.exit(main())
