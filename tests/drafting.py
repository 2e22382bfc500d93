"""Tiny checkpoints that draft, which transformers neither makes nor reads: modules of a model, and EAGLE-3's."""

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
# tensors that lead back into the hidden states
_WRITES = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias", "experts.down_proj", "down_proj_bias")
NEAR = 0.04  # with this share about half of the drafts are right
SMALL = 0.015  # so it is between models of different families


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


@cache
def predictable_folder(name: str, share: float = SMALL) -> str:
    """The tiny folder of a family whose next token follows from the current one, but for a `share` of what layers do.

    All of these folders have the same embedding and head, so that one often drafts what another samples.
    """
    return changed_folder(tiny_folder(name), lambda weights: _follow(weights, share))


def changed_folder(
    folder: str, change: Callable[[Weights], object] = len, fields: dict[str, object] | None = None
) -> str:
    """A copy of a folder, with its weights changed in place and fields of its config.json replaced."""
    copy = shared_folder("changed")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file({each: tensor.contiguous() for each, tensor in weights.items()}, copy / "model.safetensors")
    _change(copy / "config.json", lambda values: values.update(fields or {}))
    return str(copy)


def _follow(weights: Weights, share: float) -> None:
    """Let the head give token t + 1 after t. Layers add `share` of what they did."""
    hidden = TINY["hidden_size"]
    for name, tensor in weights.items():
        if name.endswith(_WRITES):
            tensor.mul_(share)
        elif "norm" in name:
            tensor.fill_(1.0)
    generator = torch.Generator().manual_seed(3)
    table = torch.nn.functional.normalize(torch.randn(VOCAB, hidden, generator=generator), dim=-1)
    weights["model.embed_tokens.weight"].copy_(table)
    weights["lm_head.weight"].copy_(table.roll(1, 0) * 20)  # row t + 1 is the embedding of t


def _make_predictable(weights: Weights, layer: int, share: float, module_is_right: bool) -> None:
    """See `_follow`. The module sees token t, or another one."""
    hidden = TINY["hidden_size"]
    _follow(weights, share)
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


EAGLE3_LAYERS = 7  # of the model that a tiny EAGLE-3 module drafts for
EAGLE3_TAKES = (2, 3, 4)  # the layers whose inputs it takes
DRAFT_VOCAB = 61
EAGLE3 = {
    "architectures": ["LlamaForCausalLMEagle3"], "hidden_size": TINY["hidden_size"], "num_hidden_layers": 1,
    "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 56, "vocab_size": VOCAB,
    "draft_vocab_size": DRAFT_VOCAB, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip


@cache
def eagle3_folder(kind: str = "random", layer: str = "midlayer", **fields: object) -> str:
    """A tiny EAGLE-3 checkpoint in the published format, for a tiny Llama of 7 layers.

    It has no embedding, offsets to a part of the vocabulary, and attention with other heads than the model's. `layer`
    is what its layer is called. With the kind `near` its first draft is often right for a model of
    `predictable_folder`. `fields` are replaced in its config.json.
    """
    values = {**EAGLE3, **fields}
    hidden, wide, drafts = (int(values[name]) for name in ("hidden_size", "intermediate_size", "draft_vocab_size"))
    heads = [int(values[name]) * int(values["head_dim"]) for name in ("num_attention_heads", "num_key_value_heads")]
    generator = torch.Generator().manual_seed(5)

    def near(*shape: int, mean: float = 0.0) -> Tensor:
        return mean + torch.randn(shape, generator=generator) * 0.2

    chosen = torch.randperm(VOCAB, generator=generator)[:drafts].sort().values
    weights = {
        f"{layer}.self_attn.q_proj.weight": near(heads[0], 2 * hidden),
        f"{layer}.self_attn.k_proj.weight": near(heads[1], 2 * hidden),
        f"{layer}.self_attn.v_proj.weight": near(heads[1], 2 * hidden),
        f"{layer}.self_attn.o_proj.weight": near(hidden, heads[0]),
        f"{layer}.mlp.gate_proj.weight": near(wide, hidden),
        f"{layer}.mlp.up_proj.weight": near(wide, hidden),
        f"{layer}.mlp.down_proj.weight": near(hidden, wide),
        **{
            name: near(hidden, mean=1.0)
            for name in (
                f"{layer}.input_layernorm.weight", f"{layer}.hidden_norm.weight",
                f"{layer}.post_attention_layernorm.weight", "norm.weight",
            )
        },
        "fc.weight": near(hidden, 3 * TINY["hidden_size"]),
        "lm_head.weight": near(drafts, hidden),
        "d2t": chosen - torch.arange(drafts),
        "t2d": torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, chosen, value=True),
    }  # fmt: skip
    if kind == "near":
        _echo(weights, layer, chosen)
    folder = shared_folder(f"eagle3-{kind}")
    save_file({each: tensor.contiguous() for each, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def _echo(weights: Weights, layer: str, chosen: Tensor) -> None:
    """Let the head give token t + 2 where the model's layers took the embedding of t."""
    hidden = TINY["hidden_size"]
    generator = torch.Generator().manual_seed(3)
    table = torch.nn.functional.normalize(torch.randn(VOCAB, hidden, generator=generator), dim=-1)
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.mul_(NEAR)
        elif "norm" in name:
            tensor.fill_(1.0)
    weights["fc.weight"].copy_(torch.eye(hidden).repeat(1, 3) / 3)
    weights["lm_head.weight"].copy_(table.roll(2, 0)[chosen])


class ReferenceEagle3:
    """What an EAGLE-3 module drafts by the paper's equations (Li et al. 2025, section 3), over the whole text.

    transformers computes the model; the module is written out in plain PyTorch, without a cache.
    """

    def __init__(self, target: str, folder: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval().model
        self._config = json.loads((Path(folder) / "config.json").read_text())
        weights = load_file(Path(folder) / "model.safetensors")
        self._own = {re.sub(r"^(midlayer|layers\.0)\.", "", name): tensor for name, tensor in weights.items()}
        self.logits, self._rows = cache(self._logits), cache(self._output)

    def after(self, tokens: tuple[int, ...], count: int) -> tuple[int, ...]:
        """The `count` tokens that are drafted after a text whose last token has just been sampled."""
        return tuple(int(self.logits(tokens, number).argmax()) for number in range(count))

    @torch.inference_mode()
    def _logits(self, tokens: tuple[int, ...], number: int) -> Tensor:
        """Of draft token `number`, counted from 0, over the model's vocabulary."""
        own = self._own["lm_head.weight"] @ self._norm(self._rows(tokens, number)[-1], "norm.weight")
        found = torch.full((VOCAB,), -torch.inf)
        for draft_id, offset in enumerate(self._own["d2t"].tolist()):
            found[draft_id + offset] = own[draft_id]
        return found

    def _output(self, tokens: tuple[int, ...], number: int) -> Tensor:
        """The output of run `number`, with the rows of those before it."""
        following = list(tokens[1:])
        states = self._model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
        taken = torch.cat([states[layer][0] for layer in EAGLE3_TAKES], dim=-1)  # what goes into these layers
        hidden = taken @ self._own["fc.weight"].T
        for before in range(number):
            following.append(int(self.logits(tokens, before).argmax()))
            hidden = torch.cat((hidden, self._rows(tokens, before)[-1:]))
        return self._layer(self._model.embed_tokens(torch.tensor(following)), hidden)

    def _layer(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        before = self._norm(hidden, "hidden_norm.weight")
        x = torch.cat((self._norm(embedded, "input_layernorm.weight"), before), dim=-1)
        residual = before if self._config.get("norm_before_residual") else hidden
        after = residual + self._attention(x)
        y = self._norm(after, "post_attention_layernorm.weight")
        gate, up = (y @ self._own[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        return after + (torch.nn.functional.silu(gate) * up) @ self._own["mlp.down_proj.weight"].T

    def _attention(self, x: Tensor) -> Tensor:
        """Causal attention of x [T, 2 hidden] to itself, with rope: [T, hidden]."""
        dim = self._config["head_dim"]
        q, k, v = ((x @ self._own[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, dim)) for n in "qkv")
        angles = torch.arange(len(x))[:, None] / self._config["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
        cos, sin = (f(torch.cat((angles, angles), dim=-1))[:, None] for f in (torch.cos, torch.sin))
        q, k = (y * cos + torch.cat((-y[..., dim // 2 :], y[..., : dim // 2]), dim=-1) * sin for y in (q, k))
        k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for y in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / dim**0.5
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1) @ self._own["self_attn.o_proj.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self._config["rms_norm_eps"]).sqrt() * self._own[name]
