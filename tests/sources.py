"""Sources as syntax trees: their names, and what imports what. Nothing is executed."""

import ast
from collections.abc import Iterator

Sources = dict[str, str]  # path relative to the root, with forward slashes -> text


def module_of(path: str) -> str:
    """Dotted name of the module in `path`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported in a tree; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module_of(path).split(".")
                depth = node.level - path.endswith("/__init__.py")
                base = ".".join([*here[: len(here) - depth], *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and name_of(node.func).endswith("import_module") and node.args:
            if isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def name_of(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := name_of(node.value)):
        return f"{base}.{node.attr}"
    return ""


def full_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each name used, import aliases resolved: `dist.x` -> `torch.distributed.x`."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and (name := name_of(node)):
            first, dot, rest = name.partition(".")
            yield node.lineno, aliases.get(first, first) + dot + rest


def python(sources: Sources, *folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Path and syntax tree of the Python files under `folders`; by default the three that hold the product."""
    for path, text in sources.items():
        if path.endswith(".py") and path.startswith(folders or ("moe_engine/", "launch/", "tools/")):
            yield path, ast.parse(text)


def imported(sources: Sources, *folders: str) -> dict[str, set[str]]:
    """Module -> modules that it imports, anywhere in its text; those above it in its own package are left out."""
    modules = {module_of(path) for path, _ in python(sources, *folders)}
    graph = {}
    for path, tree in python(sources, *folders):
        found = {name if name in modules else name.rpartition(".")[0] for _, name in imports(path, tree)}
        me = module_of(path)
        graph[me] = {name for name in found & modules if not f"{me}.".startswith(f"{name}.")}
    return graph
