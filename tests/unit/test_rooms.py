"""The rooms of scripts/bridge/ where import-linter does not see: modules that are named in strings.

A string names a module to import_module, to Python's -m, to verl (external_lib) or to Ray (its hook). Each has to name what is
there, and none may name a module of a room above its own. What import-linter checks of imports is in pyproject.toml.
"""

import ast
import re
import tomllib
from collections.abc import Iterator

import grimp
import pytest

from bridge.door import TOOLS
from bridge.runs import record
from bridge.settings import CONFIGS, ROOT
from bridge.stages.table import STAGES

PROGRAM = ROOT / "scripts" / "bridge"
[LAYERS, _] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
NAME = re.compile(r"(?<![\w./@-])bridge((?:\.(?:\w+|\{\}))+)")
# Written like modules: the image's files, and the one setting that is our own in verl's configuration.
NO_MODULES = re.compile(r"bridge\.(sif|oci|packed_tokens_per_gpu)\b.*")
# What stands for the braces of an f-string, by the room.
TABLES = {"bridge.stages.{}": STAGES, "bridge.tools.{}": TOOLS}
# The door's table of tools is the one name that points up: a tool uses the door's stages, and is started by the door.
UPWARD = {("bridge.door", f"bridge.tools.{name}") for name in TOOLS}


def named(text: str) -> Iterator[str]:
    """The modules (or parts of one) that a text names; {} stands for each row of its table."""
    for found in NAME.finditer(text):
        name = found[0]
        if not NO_MODULES.fullmatch(name):
            yield from (name.replace("{}", row) for row in TABLES[name]) if "{}" in name else [name]


def strings(tree: ast.AST) -> Iterator[str]:
    """The texts of a program that it works with, none of its docstrings; {} for what an f-string puts in."""
    skipped = {id(node.body[0].value) for node in ast.walk(tree)
               if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped.update(id(part) for part in node.values)
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


def module_of(name: str) -> str | None:
    """The module that a name is of: itself, or what has it as an attribute (a hook's function); None if it is not there."""
    path = ROOT / "scripts" / name.replace(".", "/")
    if path.with_suffix(".py").is_file() or path.is_dir():
        return name
    module, _, attribute = name.rpartition(".")
    file = (ROOT / "scripts" / module.replace(".", "/")).with_suffix(".py")
    return module if file.is_file() and re.search(rf"^(def |class )?{attribute}\b", file.read_text(), re.MULTILINE) else None


def graph_with_strings() -> grimp.ImportGraph:
    """Who imports whom, and who names whom in a string."""
    graph = grimp.build_graph("bridge", cache_dir=None)
    for file in PROGRAM.rglob("*.py"):
        importer = ".".join(file.relative_to(ROOT / "scripts").with_suffix("").parts).removesuffix(".__init__")
        for text in strings(ast.parse(file.read_text())):
            for module in map(module_of, named(text)):
                # Of itself a module says how it is started.
                if module not in (None, importer) and (importer, module) not in UPWARD:
                    graph.add_import(importer=importer, imported=module)
    return graph


def upward(graph: grimp.ImportGraph) -> list[str]:
    """What imports or names a module of a room above its own."""
    layers = [grimp.Layer(*re.split(r" [|:] ", layer), independent="|" in layer) for layer in LAYERS["layers"]]
    return [f"{broken.importer} -> {broken.imported}"
            for broken in graph.find_illegal_dependencies_for_layers(layers, containers=set(LAYERS["containers"]))]


def test_every_module_that_a_text_names_is_there():
    files = [*PROGRAM.rglob("*.py"), *CONFIGS.rglob("*.yaml"), *ROOT.glob("docs/*.md"), *ROOT.glob("README*.md"),
             *ROOT.glob("scripts/*/*.sh"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "tests").rglob("*.sh"),
             *(ROOT / name for name in ("CHANGELOG.md", "Containerfile", "apptainer.def", "Makefile", "pyproject.toml"))]
    # These name what is not there, and what was.
    files = [file for file in files if file.name not in ("test_rooms.py", "test_begun_before.py")]
    seen, missing = 0, []
    for file in files:
        # In an f-string's braces only the table's rows count.
        for name in named(re.sub(r"\{[^{}]*\}", "{}", file.read_text())):
            # The entry point is written bridge.door:main.
            seen += 1
            if module_of(name) is None and not (file.name == "record.py" and name in record.RENAMED_MODULES):
                missing.append(f"{file.relative_to(ROOT)}: {name}")
    assert not missing and seen > 150, (seen, missing)


def test_no_string_points_up():
    graph = graph_with_strings()
    # The strings were found: the table's, a command's, a hook's.
    for importer, module in (("stages.table", "stages.sft"), ("stages.train", "trainers.on_cpu"),
                             ("tools.accept", "tools.allreduce"), ("stages.sft", "trainers.loopback")):
        assert graph.direct_import_exists(importer=f"bridge.{importer}", imported=f"bridge.{module}")
    assert upward(graph) == []


@pytest.mark.parametrize(("importer", "text"), [
    ("bridge.runs.record", 'import_module("bridge.stages.train")'),
    ("bridge.settings", 'command = ["-m", "bridge.trainers.loopback"]'),
    ("bridge.trainers.on_cpu", 'hook = "bridge.stages.eval.main"'),
    ("bridge.stages.sft", 'import_module(f"bridge.tools.{name}")')])
def test_a_string_that_points_up_is_found(importer, text):
    graph = graph_with_strings()
    for module in [module_of(name) for string in strings(ast.parse(text)) for name in named(string)]:
        graph.add_import(importer=importer, imported=module)
    assert any(line.startswith(importer.rpartition(".")[0]) for line in upward(graph))


def test_a_name_of_what_is_not_there_is_found():
    text = "-m bridge.speedups, 'bridge.trainers.on_cpu.set_up', bridge.trainers.on_cpu.setup"
    assert [module_of(name) for name in named(text)] == [None, None, "bridge.trainers.on_cpu"]
