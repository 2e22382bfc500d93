"""Tiny models with a module for multi-token prediction, which transformers neither makes nor reads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.folders import shared_folder
from tests.oracle import TINY, VOCAB, tiny_folder

Weights = dict[str, Tensor]


@cache
def folder_with_module(name: str, kind: str = "random") -> str:
    """The tiny folder of a family, with the tensors of a module behind its last layer.

    `kind` is `random`; or `right` or `wrong`: in the model the next token then follows from the current one alone, and
    the module always predicts that token, or another one.
    """
    folder = shared_folder(f"{name}-{kind}")
    shutil.copytree(tiny_folder(name), folder, dirs_exist_ok=True)
    path = folder / "model.safetensors"
    weights = load_file(path)
    layer = max(int(found[1]) for found in map(re.compile(r"model\.layers\.(\d+)\.").match, weights) if found) + 1
    weights |= _module(weights, layer)
    if kind != "random":
        _make_predictable(weights, layer, shift=1 if kind == "right" else 2)
    save_file({each: tensor.contiguous() for each, tensor in weights.items()}, path)
    _change(folder / "config.json", lambda values: values.update(num_nextn_predict_layers=1))
    return str(folder)


def _module(weights: Weights, layer: int) -> Weights:
    """Random tensors for a module: a decoder layer like the last one, and what joins it to the model."""
    hidden = TINY["hidden_size"]
    generator = torch.Generator().manual_seed(11)

    def near(tensor: Tensor, spread: float) -> Tensor:
        return tensor + torch.randn(tensor.shape, generator=generator) * spread

    last, prefix = f"model.layers.{layer - 1}.", f"model.layers.{layer}."
    found = {
        prefix + name.removeprefix(last): near(tensor, 0.1) for name, tensor in weights.items() if name.startswith(last)
    }
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        found[f"{prefix}{norm}.weight"] = near(torch.ones(hidden), 0.2)
    found[f"{prefix}eh_proj.weight"] = near(torch.zeros(hidden, 2 * hidden), 0.3)
    found[f"{prefix}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    found[f"{prefix}shared_head.head.weight"] = weights["lm_head.weight"].clone()
    return found


def _make_predictable(weights: Weights, layer: int, shift: int) -> None:
    """Let all layers add nothing, and the head give token t + 1 after t. The module sees token t + `shift` after it."""
    hidden = TINY["hidden_size"]
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
        elif "norm" in name and ("layernorm" not in name or "kv_a" in name or "q_a" in name):
            tensor.fill_(1.0)
    generator = torch.Generator().manual_seed(3)
    table = torch.nn.functional.normalize(torch.randn(VOCAB, hidden, generator=generator), dim=-1)
    weights["model.embed_tokens.weight"].copy_(table)
    weights["lm_head.weight"].copy_(table.roll(1, 0) * 20)  # row t + 1 is the embedding of t
    if shift != 1:  # an embedding of another token: another one is predicted
        turned = torch.linalg.lstsq(table, table.roll(-1, 0)).solution.T
    else:
        turned = torch.eye(hidden)
    weights[f"model.layers.{layer}.eh_proj.weight"].copy_(torch.cat((turned, torch.zeros(hidden, hidden)), dim=1))


def _change(path: Path, how: Callable[[dict[str, object]], None]) -> None:
    values = json.loads(path.read_text())
    how(values)
    path.write_text(json.dumps(values))
