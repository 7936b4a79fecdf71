"""The shape of the house, checked on the source alone: nothing is imported, only parsed.

Each rule takes a tree of sources and yields one line per violation; CONTRIBUTING.md says why each rule exists. Two
tests: the repository breaks no rule, and every rule fires on small bad sources made for it (a rule that never fires
proves nothing). Floors, from the ground up; an import may only go down, or stay inside its own package:

    0  moe_engine/*.py, config, log    1  parallel, ops, host    2  model, data    3  prepare, checkpoint
    4  train, upcycle, evaluate, analyze, plan, report         5  launch, tools
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.sources import Sources, full_names, imported, imports, module_of, python

ROOT = Path(__file__).parent.parent
FLOORS = {
    "moe_engine": 0,
    **dict.fromkeys(("moe_engine.parallel", "moe_engine.ops", "moe_engine.host"), 1),
    **dict.fromkeys(("moe_engine.model", "moe_engine.data"), 2),
    **dict.fromkeys(("moe_engine.prepare", "moe_engine.checkpoint"), 3),
    **{f"moe_engine.{name}": 4 for name in ("train", "upcycle", "evaluate", "analyze", "plan", "report")},
    **dict.fromkeys(("launch", "tools"), 5),
}
GROUND = ("moe_engine/config/", "moe_engine/log/")  # folders on floor 0, among the files of moe_engine itself
CORE = (
    *("moe_engine/config/section.py", "moe_engine/config/model.py", "moe_engine/config/run.py", "moe_engine/log/"),
    *("moe_engine/parallel/", "moe_engine/model/", "moe_engine/data/", "moe_engine/train/"),
)
BUDGETS = dict(
    core=6_000, top=400, config=2_600, ops=2_800, host=600, prepare=3_800, checkpoint=3_200, upcycle=2_600,
    plan=1_000, report=400,
)  # fmt: skip
CHAIN = 12  # modules on the longest way down through imports
FILE_LINES, FUNCTION_LINES = 400, 60
HEAVY = {"deepspeed", "transformers", "datasets", "matplotlib", "tensorboard"}
PICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "joblib"}
DIST_DATA = (
    *("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "gather", "scatter"),
    *("send", "recv", "isend", "irecv", "batch_isend_irecv", "barrier", "monitored_barrier"),
)
DIST_DATA_ENDINGS = ("", "_single", "_tensor", "_into_tensor", "_object", "_object_list", "_coalesced", "_multigpu")
DIST_CALLS = {f"torch.distributed.{name}{ending}" for name in DIST_DATA for ending in DIST_DATA_ENDINGS}
DIST_MODULES = ("torch.distributed.nn", "torch.distributed._functional_collectives")
MAY_MOVE_DATA = ("moe_engine/parallel/", "moe_engine/train/deepspeed_engine.py", "moe_engine/checkpoint/")


def package_of(module: str) -> str:
    """The unit that has a floor: `launch`, `tools`, `moe_engine` (its own files) or `moe_engine.<package>`."""
    parts = module.split(".")
    if parts[0] != "moe_engine":
        return parts[0]
    return ".".join(parts[:2]) if len(parts) > 1 and f"moe_engine.{parts[1]}" in FLOORS else "moe_engine"


def imports_go_down(sources: Sources) -> Iterator[str]:
    for path, tree in python(sources):
        mine = package_of(module_of(path))
        homeless = mine == "moe_engine" and path.count("/") > 1 and not path.startswith(GROUND)
        if path.startswith("moe_engine/") and homeless:
            yield f"{path}: the package has no floor: give it one in tests/test_architecture.py"
        for line, name in imports(path, tree):
            theirs = package_of(name)
            if theirs in FLOORS and theirs != mine and FLOORS[theirs] >= FLOORS[mine]:
                yield f"{path}:{line}: {mine} (floor {FLOORS[mine]}) imports {name} (floor {FLOORS[theirs]})"


def import_chains_are_short(sources: Sources) -> Iterator[str]:
    graph, chains = imported(sources, "moe_engine/"), dict[str, list[str]]()

    def longest(module: str) -> list[str]:
        if module not in chains:
            chains[module] = [module]  # in a ring, which no_import_cycles names, the way ends here
            chains[module] += max((longest(below) for below in sorted(graph[module])), key=len, default=[])
        return chains[module]

    chain = max(map(longest, graph), key=len, default=[])
    if len(chain) > CHAIN:
        yield f"a chain of {len(chain)} imports, at most {CHAIN}: {' > '.join(chain)}"


def no_import_cycles(sources: Sources) -> Iterator[str]:
    graph = imported(sources)
    while leaves := {module for module, below in graph.items() if not below & graph.keys()}:
        graph = {module: below for module, below in graph.items() if module not in leaves}
    if graph:
        yield f"these modules import each other, or stand above such a ring: {', '.join(sorted(graph))}"


def files_and_functions_are_short(sources: Sources) -> Iterator[str]:
    for path, tree in python(sources, "moe_engine/", "launch/", "tools/", "tests/", "setup.py"):
        lines = len(sources[path].splitlines())
        if lines > FILE_LINES:
            yield f"{path}: {lines} lines, at most {FILE_LINES}: split it by what it knows"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES}"


def no_globals(sources: Sources) -> Iterator[str]:
    for path, tree in python(sources):
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                yield f"{path}:{node.lineno}: global {', '.join(node.names)}: pass it as an argument"


def environment_is_read_at_the_edge(sources: Sources) -> Iterator[str]:
    """Setting variables for a library or a child process (`os.environ.update`, `os.environ[k] = v`) is no read."""
    for path, tree in python(sources, "moe_engine/"):
        stored = (n for n in ast.walk(tree) if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store))
        written = {n.lineno for n in stored} | {line for line, name in full_names(tree) if name == "os.environ.update"}
        for line, name in full_names(tree):
            if name in {"os.environ", "os.getenv", "os.environb"} and line not in written:
                yield f"{path}:{line}: {name}: read the environment in launch/ or tools/ and pass the value"


def data_moves_in_parallel_only(sources: Sources) -> Iterator[str]:
    for path, tree in python(sources):
        if not path.startswith(MAY_MOVE_DATA):
            for line, name in full_names(tree):
                if name in DIST_CALLS or name.startswith(DIST_MODULES):
                    yield f"{path}:{line}: {name}: tensors move between ranks in {', '.join(MAY_MOVE_DATA)} only"


def deepspeed_stays_in_zero(sources: Sources) -> Iterator[str]:
    for path, tree in python(sources):
        for line, name in imports(path, tree):
            if name.split(".")[0] == "deepspeed" and path != "moe_engine/train/deepspeed_engine.py":
                yield f"{path}:{line}: deepspeed is imported in moe_engine/train/deepspeed_engine.py only"


def nothing_is_unpickled(sources: Sources) -> Iterator[str]:
    for path, tree in python(sources):
        for line, name in imports(path, tree):
            if name.split(".")[0] in PICKLE:
                yield f"{path}:{line}: {name}: a pickle runs code when it is read; use safetensors and JSON"
        for line, name in full_names(tree):
            if name in {"torch.load", "torch.save"}:
                yield f"{path}:{line}: {name} pickles: use safetensors and JSON"
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "allow_pickle"}:
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    yield f"{path}:{node.value.lineno}: {node.arg} lets a file run code"


def heavy_imports_are_late(sources: Sources) -> Iterator[str]:
    for path, tree in python(sources, "moe_engine/"):
        for line, name in imports(path, ast.Module([*at_module_level(tree)], [])):
            heavy = name.split(".")[0] in HEAVY or name.startswith("torch.utils.tensorboard")
            if heavy and not (path == "moe_engine/train/deepspeed_engine.py" and name.startswith("deepspeed")):
                yield f"{path}:{line}: {name}: import it in the function that uses it"


def at_module_level(node: ast.AST) -> Iterator[ast.stmt]:
    """Import statements that run when the module is imported: everything outside function bodies."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_module_level(child)


def ops_are_whole(sources: Sources) -> Iterator[str]:
    folders = {path.split("/")[2] for path in sources if path.startswith("moe_engine/ops/") and path.count("/") > 2}
    for folder in sorted(folders):
        for file in ("__init__.py", "reference.py", "cases.py"):
            if f"moe_engine/ops/{folder}/{file}" not in sources:
                yield f"moe_engine/ops/{folder}: no {file}"
    for path in sources:
        stem = path.removeprefix("csrc/").removesuffix(".cpp")
        if path.startswith("csrc/") and path.endswith(".cpp") and stem not in folders:
            shared = f"csrc/{stem}.h" in sources and "TORCH_LIBRARY" not in sources[path]  # what kernels are made of
            if f"moe_engine/data/{stem}.py" not in sources and not shared:
                yield f"{path}: no moe_engine/ops/{stem}/ or moe_engine/data/{stem}.py, nor a part without ops"


def names_say_something(sources: Sources) -> Iterator[str]:
    for path in sources:
        if path.endswith((".py", ".cpp", ".h")) and Path(path).stem in {"utils", "util", "helpers", "common", "misc"}:
            yield f"{path}: name the file after what it holds"
        elif {"utils", "helpers", "common"} & set(path.split("/")[:-1]):
            yield f"{path}: name the folder after what it holds"


Rule = Callable[[Sources], Iterator[str]]
# Each rule with sources that break it (every one alone must) and sources that look alike and do not.
RULES: list[tuple[Rule, list[Sources], list[Sources]]] = [
    (
        imports_go_down,
        [
            {"moe_engine/ops/x/__init__.py": "from moe_engine.parallel.mesh import Axis"},
            {"moe_engine/ops/x/__init__.py": "from moe_engine import model"},
            {"moe_engine/log.py": "def f():\n    import moe_engine.data.loader"},
            {"moe_engine/data/loader.py": "from ..model import loss"},
            {"moe_engine/model/__init__.py": "from ..train.step import step"},
            {"moe_engine/train/loop.py": "from tools.plan import main"},
            {"tools/plan.py": "import launch.pretrain_moe"},
            {"moe_engine/model/moe.py": "import importlib\nx = importlib.import_module('moe_engine.plan')"},
            {"moe_engine/novel/x.py": ""},
        ],
        [
            {"moe_engine/model/moe.py": "from moe_engine.ops import swiglu\nfrom ..parallel import mesh\nimport numpy"},
            {"moe_engine/model/moe.py": "from moe_engine.model.mlp import Mlp\nfrom .loss import f\nfrom . import mlp"},
            {"moe_engine/plan/memory.py": "from moe_engine.model.flops import count\nfrom moe_engine import config"},
            {"moe_engine/log.py": "from moe_engine.errors import DataError"},
        ],
    ),
    (
        no_import_cycles,
        [
            {
                "moe_engine/model/a.py": "from moe_engine.model.b import f",
                "moe_engine/model/b.py": "def g():\n    import moe_engine.model.a",
            }
        ],
        [{"moe_engine/ops/a/__init__.py": "from .fast import f", "moe_engine/ops/a/fast.py": "from . import x"}],
    ),
    (
        import_chains_are_short,
        [{f"moe_engine/model/m{i}.py": f"from moe_engine.model import m{i + 1}" for i in range(CHAIN + 1)}],
        [{f"moe_engine/model/m{i}.py": f"from moe_engine.model import m{i + 1}" for i in range(CHAIN)}],
    ),
    (
        files_and_functions_are_short,
        [{"tools/plan.py": "\n" * 401}, {"tests/test_x.py": "def f():" + "\n    pass" * 60}],
        [{"tools/plan.py": "\n" * 400}, {"tests/test_x.py": "def f():" + "\n    pass" * 59}],
    ),
    (no_globals, [{"tools/plan.py": "def f():\n    global x\n    x = 1"}], [{"tools/plan.py": "globals_ = 1"}]),
    (
        environment_is_read_at_the_edge,
        [
            {"moe_engine/config.py": "import os\nx = os.environ['RANK']"},
            {"moe_engine/config.py": "from os import getenv as read\nx = read('RANK')"},
            {"moe_engine/config.py": "import os as system\nx = system.getenv('RANK')"},
            {"moe_engine/config.py": "import os\nx = os.environ.setdefault('RANK', '0')"},
        ],
        [
            {"launch/a.py": "import os\nx = os.environ['RANK']"},
            {"moe_engine/config.py": "import os\nx = os.path"},
            {"moe_engine/train/deepspeed_engine.py": "import os\nos.environ['A'] = '1'\nos.environ.update(B='2')"},
        ],
    ),
    (
        data_moves_in_parallel_only,
        [
            {"moe_engine/model/moe.py": "import torch.distributed as dist\ndist.all_to_all_single(a, b)"},
            {"moe_engine/train/step.py": "import torch\ntorch.distributed.all_reduce(a)"},
            {"moe_engine/train/step.py": "from torch.distributed import all_gather_into_tensor as f"},
            {"launch/a.py": "from torch import distributed\ndistributed.barrier()"},
            {"tools/a.py": "import torch.distributed as d\nd.broadcast_object_list([1])\nd.recv(x)"},
            {"moe_engine/data/loader.py": "import torch.distributed.nn.functional as f\nf.all_gather(x)"},
        ],
        [
            {"moe_engine/parallel/collectives.py": "import torch.distributed as dist\ndist.all_reduce(a)"},
            {"moe_engine/train/deepspeed_engine.py": "import torch.distributed as dist\ndist.all_reduce(a)"},
            {"moe_engine/model/moe.py": "from moe_engine.parallel.collectives import all_reduce\nall_reduce(a)"},
            {"launch/a.py": "import torch.distributed as dist\ndist.init_process_group()\nsocket.send(x)"},
        ],
    ),
    (
        deepspeed_stays_in_zero,
        [{"moe_engine/train/step.py": "def f():\n    import deepspeed"}, {"tools/a.py": "from deepspeed.ops import x"}],
        [{"moe_engine/train/deepspeed_engine.py": "def f():\n    from deepspeed.utils import groups"}],
    ),
    (
        nothing_is_unpickled,
        [
            {"tools/a.py": "import pickle"},
            {"tools/a.py": "import torch as t\nt.load('x')"},
            {"moe_engine/data/a.py": "from torch import save"},
            {"moe_engine/data/a.py": "AutoConfig.from_pretrained('x', trust_remote_code=True)"},
            {"moe_engine/data/a.py": "numpy.load('x', allow_pickle=flag)"},
        ],
        [{"tools/a.py": "import json\njson.load(f)\nnumpy.load('x', allow_pickle=False)"}],
    ),
    (
        heavy_imports_are_late,
        [
            {"moe_engine/data/formats.py": "import datasets"},
            {"moe_engine/data/formats.py": "try:\n    from transformers import x\nexcept ImportError:\n    x = None"},
            {"moe_engine/log.py": "class A:\n    from torch.utils.tensorboard import SummaryWriter"},
            {"moe_engine/train/deepspeed_engine.py": "import transformers"},
        ],
        [
            {"moe_engine/data/formats.py": "def f():\n    import datasets"},
            {"moe_engine/train/deepspeed_engine.py": "import deepspeed"},
            {"tools/report.py": "import matplotlib"},
        ],
    ),
    (
        ops_are_whole,
        [
            {"moe_engine/ops/swiglu/__init__.py": "", "moe_engine/ops/swiglu/reference.py": ""},
            {"moe_engine/ops/swiglu/__init__.py": "", "moe_engine/ops/swiglu/cases.py": ""},
            {"csrc/swiglu.cpp": ""},
            {"csrc/novel.cpp": "TORCH_LIBRARY_IMPL(moe_engine, CPU, m) {}", "csrc/novel.h": ""},
        ],
        [
            {
                "moe_engine/ops/swiglu/__init__.py": "",
                "moe_engine/ops/swiglu/reference.py": "",
                "moe_engine/ops/swiglu/cases.py": "",
                "csrc/swiglu.cpp": "",
            },
            {
                "moe_engine/data/packing.py": "",
                "csrc/packing.cpp": "",
                "csrc/vector.cpp": "",
                "csrc/vector.h": "",
                "moe_engine/ops/use.py": "",
            },
        ],
    ),
    (
        names_say_something,
        [{"moe_engine/data/utils.py": ""}, {"tools/common/x.py": ""}, {"csrc/helpers.h": ""}],
        [{"moe_engine/parallel/collectives.py": ""}],
    ),
]


@pytest.fixture(scope="module")
def repository() -> Sources:
    folders = ("moe_engine", "launch", "tools", "tests", "csrc")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*"))] + [ROOT / "setup.py"]
    wanted = [file for file in files if file.suffix in {".py", ".cpp", ".h"} and file.is_file()]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in wanted}


@pytest.mark.parametrize("rule", [rule for rule, _, _ in RULES], ids=lambda rule: rule.__name__)
def test_repository_keeps(rule: Rule, repository: Sources) -> None:
    found = list(rule(repository))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(("rule", "bad", "good"), RULES, ids=lambda value: getattr(value, "__name__", ""))
def test_rule_fires(rule: Rule, bad: list[Sources], good: list[Sources]) -> None:
    for sources in bad:
        assert list(rule(sources)), f"{rule.__name__} did not see {sources}"
    for sources in good:
        assert not list(rule(sources)), f"{rule.__name__} fired on {sources}: {list(rule(sources))}"


def test_packages_keep_to_their_budgets(repository: Sources, capsys: pytest.CaptureFixture[str]) -> None:
    """The core, the path of a batch, is what one person reads in an afternoon."""
    lines = dict.fromkeys(BUDGETS, 0)
    for path, text in repository.items():
        if path.startswith("moe_engine/") and path.endswith(".py"):
            package = "core" if path.startswith(CORE) else path.split("/")[1] if path.count("/") > 1 else "top"
            assert package in lines, f"{package} has no budget in BUDGETS"
            lines[package] += len(text.splitlines())
    with capsys.disabled():
        print("\nlines: " + ", ".join(f"{name} {n} of {BUDGETS[name]}" for name, n in lines.items()))
    assert all(n <= BUDGETS[name] for name, n in lines.items()), lines
