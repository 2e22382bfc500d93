"""The architecture of docs/architecture.md, enforced on the imports of the source itself."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "longspan"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def imports(path: Path) -> set[str]:
    """Every module a file imports at run time, at any depth of nesting; TYPE_CHECKING blocks do not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def closure(path: Path) -> set[str]:
    """Everything a file imports, directly or through other files of the project."""
    seen: set[str] = set()
    todo = list(imports(path))
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        base = SOURCE.parent / Path(*name.split("."))
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.exists() and SOURCE in candidate.parents:
                todo += imports(candidate)
    return seen


def files_under(*folders: str) -> list[Path]:
    return [path for path in FILES if any(SOURCE / folder in path.parents for folder in folders)]


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(SOURCE)) for path in paths]


PURE = [*files_under("scheduler", "cache"), SOURCE / "plan.py", SOURCE / "view.py"]


@pytest.mark.parametrize("path", PURE, ids=names(PURE))
def test_scheduler_cache_and_plans_never_reach_torch_or_collectives(path):
    reached = closure(path)
    assert not [name for name in reached if name == "torch" or name.startswith("torch.")]
    assert "longspan.parallel.collectives" not in reached


BLIND = files_under("models", "attention/backends", "cache")


@pytest.mark.parametrize("path", BLIND, ids=names(BLIND))
def test_models_backends_and_cache_know_nothing_of_ranks(path):
    assert not [name for name in imports(path) if name.startswith("longspan.parallel")]
    words = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert not words & {"world_size", "pcp", "dcp", "tp_size"}


def test_only_schedules_and_the_groups_of_a_stage_call_collectives():
    allowed = {
        "attention/schedules/gather_q.py", "attention/schedules/gather_kv.py",
        "attention/schedules/gather_q_rs.py", "attention/schedules/ring_q.py", "attention/schedules/tree_q.py",
        "engine/worker.py", "engine/runner.py", "parallel/collectives.py", "parallel/experts.py",
        "attention/calibrate.py", "bench/schedules.py", "parallel/nccl.py",
    }  # fmt: skip
    calls = {"all_gather", "all_to_all", "_exchange"}
    callers = {
        str(path.relative_to(SOURCE))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in calls
    }
    assert callers <= allowed


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_house_rules(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}: raise an error with a remedy"
    if path.name != "__init__.py" or text.strip():
        assert ast.get_docstring(tree), "a module says what it owns"


def test_ownership_is_never_computed_from_a_number_of_ranks():
    sizes = {"world_size", "num_shards", "pcp", "dcp", "tp", "cp_size", "size_of_group"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mod):
                right = {getattr(n, "id", getattr(n, "attr", None)) for n in ast.walk(node.right)}
                divides_heads = path.name in ("config.py", "sharding.py", "setup.py", "grid.py", "worker.py")
                assert divides_heads or not right & sizes, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Gt | ast.GtE):
                left = getattr(node.left, "id", getattr(node.left, "attr", None))
                is_one = isinstance(node.comparators[0], ast.Constant) and node.comparators[0].value == 1
                assert not (left in sizes and is_one), f"{path.name}:{node.lineno} branches on a world size"
