"""Write a folder with some layers of a model, its norm and its head: a small model that drafts for the whole one.

    python scripts/early_exit.py smollm2 /tmp/early --layers 0-7,28-29

The layers are not trained for this, so such a model is often wrong; it is there to try `--speculative draft:K:FOLDER`
where no small model of the series is at hand. Weights are written in float32.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from longspan.models.registry import find_family
from longspan.weights.source import ModelSource, resolve_model
from longspan.weights.tokenizer import load_serialised

_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..*)")
_PER_LAYER = ("layer_types",)  # lists in a config.json with an entry for each layer


def layers_of(text: str) -> list[int]:
    """The numbers in a text such as `0-3,8`."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def write(source: ModelSource, layers: list[int], folder: Path) -> None:
    """Write the folder, with the model's tokenizer."""
    family, model = find_family(source.config)
    place = {layer: number for number, layer in enumerate(layers)}
    tensors: dict[str, Tensor] = {}
    for param in set(family.params(replace(model, num_draft_layers=0))):
        found = _LAYER.fullmatch(param.name)
        if found and int(found[2]) not in place:
            continue
        name = f"{found[1]}{place[int(found[2])]}{found[3]}" if found else param.name
        tensors[name] = torch.empty(param.shape)
        source.checkpoint.read(param.name, tuple(slice(0, size) for size in param.shape), tensors[name])
    values = {**source.config, "num_hidden_layers": len(layers)}
    values |= {name: [values[name][layer] for layer in layers] for name in _PER_LAYER if values.get(name)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values, indent=1))
    tokenizer = load_serialised(source)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder, a .gguf file, or smollm2")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--layers", default="0-7,28-29", help="numbers and ranges of the layers that are kept")
    options = parser.parse_args()
    write(resolve_model(options.model), layers_of(options.layers), options.folder)


if __name__ == "__main__":
    main()
