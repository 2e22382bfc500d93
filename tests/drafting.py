"""Tiny models with a module for multi-token prediction, which transformers neither makes nor reads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.folders import shared_folder
from tests.oracle import TINY, VOCAB, tiny_folder

Weights = dict[str, Tensor]
NEAR = 0.04  # with this share about half of the drafts are right


@cache
def folder_with_module(name: str, kind: str = "random") -> str:
    """The tiny folder of a family, with the tensors of a module behind its last layer.

    `kind` is `random`; or `right` or `wrong`: in the model the next token then follows from the current one alone, and
    the module always predicts that token, or another one. With `near` attention and MLPs add a little to both, so that
    tokens depend on the whole text and the module is often right.
    """
    folder = shared_folder(f"{name}-{kind}")
    shutil.copytree(tiny_folder(name), folder, dirs_exist_ok=True)
    path = folder / "model.safetensors"
    weights = load_file(path)
    layer = max(int(found[1]) for found in map(re.compile(r"model\.layers\.(\d+)\.").match, weights) if found) + 1
    weights |= _module(weights, layer)
    if kind != "random":
        _make_predictable(weights, layer, NEAR if kind == "near" else 0.0, module_is_right=kind != "wrong")
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


def _make_predictable(weights: Weights, layer: int, share: float, module_is_right: bool) -> None:
    """Let the head give token t + 1 after t. Layers add `share` of what they did; the module may see a token for t."""
    hidden = TINY["hidden_size"]
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.mul_(share)
        elif "norm" in name:
            tensor.fill_(1.0)
    generator = torch.Generator().manual_seed(3)
    table = torch.nn.functional.normalize(torch.randn(VOCAB, hidden, generator=generator), dim=-1)
    weights["model.embed_tokens.weight"].copy_(table)
    weights["lm_head.weight"].copy_(table.roll(1, 0) * 20)  # row t + 1 is the embedding of t
    turned = torch.eye(hidden) * (1 if module_is_right else -1)
    weights[f"model.layers.{layer}.eh_proj.weight"].copy_(torch.cat((turned, torch.zeros(hidden, hidden)), dim=1))


def _change(path: Path, how: Callable[[dict[str, object]], None]) -> None:
    values = json.loads(path.read_text())
    how(values)
    path.write_text(json.dumps(values))


class ReferenceDrafts:
    """What a module drafts by the paper's equations (DeepSeek-V3, 2024, 21-23), over the whole text, without a cache.

    transformers computes the model, and the module's decoder layer as one more layer of it.
    """

    def __init__(self, folder: str, layers: int) -> None:
        self._model = _without_logits(folder, layers)
        self._layer = _without_logits(folder, layers + 1)
        self._layer.layers = self._layer.layers[layers:]
        self._layer.norm = torch.nn.Identity()
        weights = load_file(Path(folder) / "model.safetensors")
        prefix = f"model.layers.{layers}."
        self._own = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
        self._head = weights["lm_head.weight"]
        self._eps = self._model.config.rms_norm_eps
        self.logits, self._rows = cache(self._logits), cache(self._output)

    def after(self, tokens: tuple[int, ...], count: int) -> tuple[int, ...]:
        """The `count` tokens that are drafted after a text whose last token has just been sampled."""
        return tuple(int(self.logits(tokens, number).argmax()) for number in range(count))

    @torch.inference_mode()
    def _logits(self, tokens: tuple[int, ...], number: int) -> Tensor:
        """Of draft token `number`, counted from 0."""
        return self._head @ self._norm(self._rows(tokens, number)[-1], "shared_head.norm.weight")

    def _output(self, tokens: tuple[int, ...], number: int) -> Tensor:
        """The output of run `number`, with the rows of those before it."""
        following, hidden = list(tokens[1:]), self._model(torch.tensor([tokens[:-1]])).last_hidden_state[0]
        for before in range(number):
            following.append(int(self.logits(tokens, before).argmax()))
            hidden = torch.cat((hidden, self._rows(tokens, before)[-1:]))
        embedded = self._model.embed_tokens(torch.tensor(following))
        both = (self._norm(embedded, "enorm.weight"), self._norm(hidden, "hnorm.weight"))
        joined = torch.cat(both, dim=-1) @ self._own["eh_proj.weight"].T
        return self._layer(inputs_embeds=joined[None], use_cache=False).last_hidden_state[0]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self._eps).sqrt() * self._own[name]


def _without_logits(folder: str, layers: int) -> Any:
    found = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=layers, dtype=torch.float32)
    return found.eval().model
