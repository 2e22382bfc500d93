"""The architecture of docs/architecture.md, enforced on the source itself.

Every exemption names a file by its path, and one that nothing needs any more fails: the lists can only shrink.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from inspect import isfunction
from pathlib import Path

from longspan.parallel.collectives import Collectives

SOURCE = Path(__file__).parent.parent / "src" / "longspan"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

SIZES = {
    "world_size", "num_shards", "pcp", "dcp", "tp", "pp", "head_shards", "cp_size", "tp_size", "size",
    "tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size",
}  # fmt: skip
"""What numbers of ranks are called; `size` only as an attribute, of a group."""

FORBIDDEN = {
    "cache": ("torch", "longspan.parallel", "longspan.scheduler", "longspan.engine"),
    "scheduler": ("torch", "longspan.engine", "longspan.models"),
    "parallel": ("longspan.cache", "longspan.models", "longspan.scheduler", "longspan.engine"),
    "attention": ("longspan.request", "longspan.scheduler", "longspan.models", "longspan.engine"),
    "attention/backends": (
        "longspan.parallel.grid",
        "longspan.parallel.sharding",
        "longspan.parallel.collectives",
        "longspan.parallel.threaded",
        "longspan.parallel.distributed",
        "longspan.parallel.nccl",
        "longspan.parallel.world",
        "longspan.attention.schedules",
    ),
    "models": ("longspan.parallel", "longspan.cache", "longspan.scheduler", "longspan.plan.plan", "longspan.engine"),
    "weights": ("longspan.models", "longspan.parallel", "longspan.engine"),
    "engine/rank/runner.py": ("longspan.scheduler", "longspan.server"),
    "engine/rank/build.py": ("longspan.scheduler", "longspan.server"),
    "disaggregation": ("longspan.models", "longspan.scheduler", "longspan.parallel.collectives"),
    "server": (
        "torch",
        "longspan.parallel",
        "longspan.attention",
        "longspan.models",
        "longspan.plan.plan",
        "longspan.plan.view",
    ),
    "planner": ("longspan.engine.rank.runner", "longspan.engine.driver.executors", "longspan.parallel.collectives"),
}
"""What a package or file must not import: the last column of the table in docs/architecture.md."""

ORDER = (
    "version", "errors", "clock", "early_launch", "norm_arithmetic", "private_folder", "secret_file", "compiled",
    "request", "config", "cache", "plan", "parallel", "attention", "scheduler", "models", "weights", "disaggregation",
    "engine", "llm", "server", "bench", "planner", "cli",
)  # fmt: skip
"""Packages, lowest first: each imports only what stands before it."""

WITHIN_ENGINE = ("transport", "rank", "driver")
"""So do these folders of the engine; `frontend` imports none of them, and none of them imports it."""

COMMUNICATE = {
    "attention/calibrate.py": "times the collectives",
    "attention/pool.py": "finds the pools of ranks that share memory",
    "bench/schedules.py": "ranks wait for each other before a measurement",
    "engine/rank/runner.py": "hands hidden states on, and compares digests",
    "engine/rank/drafting.py": "tells the other ranks what it has sampled",
    "engine/rank/build.py": "the TP group's sums and logits, as models know them",
    "parallel/collectives.py": "defines them",
    "parallel/experts.py": "rows go to their experts",
    "parallel/nccl.py": "a transport",
    "parallel/symmetric.py": "a faster sum of the same",
    "parallel/pipeline.py": "hands hidden states on",
    "parallel/threaded.py": "a transport",
}
"""Files that call a collective beside schedules."""

DIVIDE = {
    "config/parallel.py": "tp must be a multiple of dcp",
    "engine/driver/executors/ray_cluster.py": "how many replicas fit into a cluster",
    "engine/rank/warmup.py": "how made-up rows are spread over pcp indices",
    "parallel/grid.py": "tp is head shards times dcp",
    "scheduler/scheduler.py": "a stage's share of the budget",
    "parallel/sharding.py": "query heads must divide evenly",
}
"""Files that divide by a number of ranks; never a position or a page."""

BRANCH = {
    "cli/bench.py": "an option that is refused",
    "config/engine.py": "an option that is refused",
    "engine/driver/executors/threads.py": "whether steps may overlap",
    "engine/setup.py": "what is prepared at start",
    "planner/predict.py": "what a schedule is called on one shard",
    "planner/simulate/instance.py": "as the scheduler does",
    "scheduler/scheduler.py": "whether a step may be planned while the one before it runs",
    "scheduler/step.py": "whether a token that nobody has read is where it is needed",
}
"""Files that compare a number of ranks with one; never what a rank does within a step."""


@cache
def sources() -> dict[str, ast.Module]:
    """Every file by its path below `SOURCE`."""
    return {str(path.relative_to(SOURCE)): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


def below(folder: str) -> list[str]:
    """The files of a folder, or the one file of that name."""
    return [path for path in sources() if path == folder or path.startswith(f"{folder}/")]


def nodes(path: str, typing: bool = False) -> Iterator[ast.AST]:
    """Everything in a file; what stands in a TYPE_CHECKING block only with `typing`."""
    todo: list[ast.AST] = [sources()[path]]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing:
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)


@cache
def imports(path: str, typing: bool = False) -> set[str]:
    """Every module that a file imports, at any depth of nesting, and every name it takes from one."""
    found: set[str] = set()
    for node in nodes(path, typing):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def closure(path: str) -> set[str]:
    """Everything a file imports, directly or through other files of the project."""
    seen: set[str] = set()
    todo = list(imports(path))
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            base = "/".join(name.split(".")[1:]) if within(name, "longspan") else ""
            todo += [n for file in (f"{base}.py", f"{base}/__init__.py") if file in sources() for n in imports(file)]
    return seen


def words(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Every identifier in a piece of source, attributes, arguments and keywords too, and its line."""
    for part in ast.walk(node):
        match part:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word) | ast.alias(name=word):
                yield word, part.lineno
            case ast.keyword(arg=str(word)):
                yield word, part.value.lineno


def sizes_in(node: ast.AST) -> set[str]:
    """The numbers of ranks that an expression looks at."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} - {"size"}
    return (names | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}) & SIZES


def exempt(found: dict[str, list[int]], allowed: dict[str, str]) -> None:
    """Only the files of a list do it, and all of them still do."""
    others = {path: lines for path, lines in found.items() if path not in allowed}
    assert not others, f"in lines {others}"
    assert not allowed.keys() - found.keys(), "take them off the list"


def test_scheduler_cache_and_plans_never_reach_torch_or_collectives():
    for path in [*below("scheduler"), *below("cache"), *below("plan")]:
        reached = closure(path)
        assert not [name for name in reached if within(name, "torch")], path
        assert "longspan.parallel.collectives" not in reached, path


def test_packages_import_nothing_that_they_must_not_know():
    for folder, forbidden in FORBIDDEN.items():
        assert below(folder), f"{folder} is gone: take it off the list"
        for path in below(folder):
            bad = [name for name in imports(path) for module in forbidden if within(name, module)]
            assert not bad, f"{path} imports {bad}"


def test_packages_import_downwards_only():
    for path in sources():
        package = path.split("/")[0].removesuffix(".py")
        if package == "__init__":
            continue
        for name in imports(path):
            if name.startswith("longspan."):
                other = name.split(".")[1]
                assert ORDER.index(other) <= ORDER.index(package), f"{path} imports {name}"


def test_the_folders_of_the_engine_import_downwards_only():
    for place, folder in enumerate(WITHIN_ENGINE):
        for path in below(f"engine/{folder}"):
            for above in (*WITHIN_ENGINE[place + 1 :], "frontend"):
                assert not [n for n in imports(path) if within(n, f"longspan.engine.{above}")], f"{path}: {above}"
    for path in below("engine/frontend"):
        assert not [n for n in imports(path) for f in WITHIN_ENGINE if within(n, f"longspan.engine.{f}")], path


def test_models_backends_and_cache_know_nothing_of_ranks():
    for path in [*below("models"), *below("attention/backends"), *below("cache")]:
        named = [
            (word, line) for word, line in words(sources()[path]) if word in ("world_size", "pcp", "dcp", "tp_size")
        ]
        assert not named, f"{path} names {named}"


def test_only_schedules_and_the_groups_of_a_stage_communicate():
    """By the methods of `Collectives`; a socket has a `send` and a `receive` too, but is not told a member."""
    methods = {name for name, member in vars(Collectives).items() if isfunction(member)} - {"__init__"}
    assert {"all_gather", "all_reduce", "all_to_all", "start_shift", "send", "_exchange"} <= methods
    sockets = {"send", "_send", "receive"}
    found: dict[str, list[int]] = {}
    for path in sources():
        knows_groups = path.startswith("parallel/") or any(
            within(name, f"longspan.parallel.{module}")
            for name in imports(path, typing=True)
            for module in ("collectives", "threaded", "distributed", "nccl", "pipeline", "experts")
        )
        if path.startswith(("models/", "planner/", "attention/schedules/")):
            continue  # models know sums only, the planner knows formulas of that name, schedules are for this
        for node in nodes(path):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            called = node.func.attr
            to_a_member = called in sockets and knows_groups and len(node.args) > 1
            if called in methods - sockets or to_a_member:
                found.setdefault(path, []).append(node.lineno)
    exempt(found, COMMUNICATE)


def test_ownership_is_never_computed_from_a_number_of_ranks():
    found: dict[str, list[int]] = {}
    for path in sources():
        for node in nodes(path):
            divisor: ast.AST | None = None
            match node:
                case ast.BinOp(op=ast.FloorDiv() | ast.Mod(), right=right):
                    divisor = right
                case ast.AugAssign(op=ast.FloorDiv() | ast.Mod(), value=value):
                    divisor = value
                case ast.Call(func=ast.Name(id="divmod") | ast.Attribute(attr="mod" | "floordiv" | "divmod")):
                    divisor = node
            if divisor is not None and sizes_in(divisor):
                found.setdefault(path, []).append(node.lineno)
    exempt(found, DIVIDE)


def test_no_step_branches_on_a_world_of_one():
    found: dict[str, list[int]] = {}
    for path in sources():
        for node in nodes(path):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                number = any(isinstance(side, ast.Constant) and side.value in (1, 2) for side in sides)
                if number and any(isinstance(side, ast.Name | ast.Attribute) and sizes_in(side) for side in sides):
                    found.setdefault(path, []).append(node.lineno)
    exempt(found, BRANCH)


def test_files_and_functions_are_short_say_what_they_own_and_assert_nothing():
    for path, tree in sources().items():
        text = (SOURCE / path).read_text()
        assert len(text.splitlines()) <= MAX_FILE_LINES, path
        assert ast.get_docstring(tree) or not text.strip(), f"{path}: a module says what it owns"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{path}: {node.name}"
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}: raise an error with a remedy"


def test_a_public_class_name_is_used_once():
    where: dict[str, list[str]] = {}
    for path, tree in sources().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(path)
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}
