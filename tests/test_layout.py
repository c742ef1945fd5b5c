"""Who may import whom. Every file of the package and the apps is read as a syntax tree, so nothing is imported here.

Imports inside functions and under `TYPE_CHECKING` count like any other, for knowing a module is what is restricted.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

import lowrank_align

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up: a module imports from its own layer and from those above it in this list. A package's name covers
# its submodules. The package root stands outside: it is the façade, which all may ask for `__version__`.
LAYERS: dict[str, list[str]] = {
    "errors": ["errors", "terminal", "json_files", "durable", "links", "out_folders"],
    "settings": ["locks", "servers", "config", "architecture", "hub", "presets", "plan", "ratings", "alarms", "store"],
    "tensors": ["tensors", "trees", "objectives"],
    "a run": [
        "workers",
        "memory",
        "training_state",
        "checkpoint",
        "doctor",
        "provenance",
        "runs",
        "listing",
        "plots",
        "progress",
        "stopping",
    ],
    "the base and its rows": [
        "data",
        "tiny",
        "annotators",
        "devices",
        "remote_code",
        "loading",
        "skeleton",
        "adapters",
        "attention",
        "cache",
        "trunk",
        "lora",
        "scoring",
        "roles",
        "probe",
        "turns",
        "base",
    ],
    "around the base": [
        "preset_check",
        "rollout",
        "rollout_server",
        "reference_cache",
        "pairs",
        "rewards",
        "conversation",
        "export",
    ],
    "methods": ["methods"],
    "training": [
        "preflight",
        "optimizer",
        "early_stopping",
        "batch_sizes",
        "row_order",
        "skips",
        "loop",
        "checks",
        "train",
    ],
    "evaluation": ["evaluate"],
    "behind the page": ["studio", "rounds"],
    "programs": ["commands", "cli", "apps", "__main__"],
}
FACADE = ""
METHODS_IN_COMMON = {
    "methods",
    "methods.method",
    "methods.metrics",
    "methods.online",
    "methods.grouped",
}  # the registry and what methods share: every method may know these

# Third-party packages that a module may not know, whatever its layer.
MODELS = {"accelerate", "bitsandbytes", "datasets", "gradio", "peft", "transformers", "trl"}
NOT_KNOWN: dict[str, set[str]] = {
    "errors": {"torch", "numpy"} | MODELS,
    "config": {"torch", "numpy"} | MODELS,
    "architecture": {"torch", "numpy"} | MODELS,
    "presets": {"torch"} | MODELS,
    "plan": {"torch"} | MODELS,
    "store": {"torch"} | MODELS,
    "studio": {"gradio"},
    "locks": {"torch", "numpy"} | MODELS,
    "ratings": {"torch"} | MODELS,
    "alarms": {"torch", "numpy"} | MODELS,
    "tensors": MODELS,
    "objectives": MODELS,
}
# Both run code that stands in the file they load; `apps` and `presets` are other people's folders once installed.
NOBODY_KNOWS = {"apps", "cloudpickle", "dill", "joblib", "marshal", "pickle", "presets", "shelve"}


class Import(NamedTuple):
    """One import statement's target; `inside` is None for a third-party package, else our module's name."""

    package: str
    inside: str | None
    place: str
    at_top: bool


def module_name(path: Path) -> str:
    """`data.load` for lowrank_align/data/load.py, `apps.demo` for apps/demo/__init__.py, "" for the package root."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "lowrank_align":
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for top in ("lowrank_align", "apps") for path in sorted((ROOT / top).rglob("*.py"))}


def covers(name: str, module: str) -> bool:
    return module == name or module.startswith(name + ".")


def layer_of(module: str) -> int | None:
    """The place of a module's layer in the table, None where no row names it."""
    for place, names in enumerate(LAYERS.values()):
        if any(covers(name, module) for name in names):
            return place
    return None


def imports_of(module: str) -> Iterator[Import]:
    """Every import in a module's file: of our own modules, and of others by their top package."""
    path = FILES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    later = {inner for node in ast.walk(tree) if runs_later(node) for inner in ast.walk(node)}
    # What a relative import counts from: the package itself in an __init__, the parent elsewhere.
    home = ["lowrank_align", *module.split(".")] if module else ["lowrank_align"]
    if path.name != "__init__.py":
        home = home[:-1]
    for node in ast.walk(tree):
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            targets = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            package, _, rest = target.partition(".")
            yield Import(package, our_module(rest) if package == "lowrank_align" else None, place, node not in later)


def runs_later(node: ast.AST) -> bool:
    """Whether what stands inside is not executed when the module is imported."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def our_module(dotted: str) -> str:
    """The longest beginning of `dotted` that is one of our files; the rest are names in it. `Base` is the façade's."""
    if dotted == "Base":
        return "base"
    parts = dotted.split(".")
    while parts and ".".join(parts) not in FILES:
        if len(parts) == 1 and layer_of(parts[0]) is not None:  # in the table, its file not written yet
            break
        parts.pop()
    return ".".join(parts)


OURS = {module: [i for i in imports_of(module) if i.inside is not None] for module in FILES}
OTHERS = {module: [i for i in imports_of(module) if i.inside is None] for module in FILES}


def test_every_module_has_a_layer() -> None:
    unknown = [str(FILES[m].relative_to(ROOT)) for m in FILES if m != FACADE and layer_of(m) is None]
    assert not unknown, f"in no layer: {unknown}; add each to LAYERS in tests/test_layout.py, as low as it can stand"


def test_no_module_stands_in_two_layers() -> None:
    names = [name for row in LAYERS.values() for name in row]
    assert len(names) == len(set(names))


def test_imports_run_one_way() -> None:
    wrong = []
    for module, found in OURS.items():
        layer = layer_of(module)
        if module == FACADE or layer is None:
            continue
        for item in found:
            target = layer_of(item.inside or "")
            if target is not None and target > layer:
                wrong.append(f"{item.place}: {module} imports {item.inside}, which stands above it")
    assert not wrong, "\n".join(wrong)


def test_modules_of_a_layer_import_each_other_without_a_circle() -> None:
    graph = {m: {i.inside for i in found if i.at_top and i.inside not in (m, FACADE)} for m, found in OURS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other in a circle: {' -> '.join(error.args[1])}")


def test_the_facade_looks_its_names_up_lazily() -> None:
    """`import lowrank_align` must load nothing: its own imports all stand inside functions or under TYPE_CHECKING."""
    assert [i.place for i in OURS[FACADE] if i.at_top] == []


def test_methods_never_import_each_other() -> None:
    wrong = [
        f"{item.place}: {module} imports {item.inside}"
        for module, found in OURS.items()
        for item in found
        if covers("methods", module) and module != "methods"
        if covers("methods", item.inside or "") and item.inside not in METHODS_IN_COMMON | {module}
    ]
    assert not wrong, "\n".join(wrong)


def test_only_cli_imports_the_apps_and_only_inside_a_function() -> None:
    wrong = [
        f"{item.place}: {module} imports {item.inside}"
        for module, found in OURS.items()
        for item in found
        if covers("apps", item.inside or "") and not covers("apps", module)
        if not covers("cli", module) or item.at_top
    ]
    assert not wrong, "\n".join(wrong)


def test_only_main_imports_cli() -> None:
    wrong = [
        f"{item.place}: {module} imports {item.inside}"
        for module, found in OURS.items()
        for item in found
        if covers("cli", item.inside or "") and not covers("cli", module) and module != "__main__"
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_do_not_know_what_is_not_their_business() -> None:
    wrong = [
        f"{item.place}: {module} imports {item.package}"
        for module, found in OTHERS.items()
        for item in found
        if item.package in NOBODY_KNOWS
        or any(covers(name, module) and item.package in banned for name, banned in NOT_KNOWN.items())
    ]
    assert not wrong, "\n".join(wrong)


ASKED = {"False", "is_trusted(path)", "is_trusted(config.name_or_path)"}  # what the user said for this start


def test_no_code_is_loaded_with_a_model_or_a_checkpoint() -> None:
    """SECURITY.md promises safetensors and JSON only, and a model folder's own code only where asked for."""
    wrong = []
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)} pickles")
            if isinstance(node, ast.Call):
                said = {ast.unparse(each.value) for each in node.keywords if each.arg == "trust_remote_code"}
                loads = re.fullmatch(r"(Auto\w+|family)\.from_(pretrained|config)", ast.unparse(node.func))
                if said - ASKED or loads and not said:
                    wrong.append(
                        f"{path.relative_to(ROOT)}:{node.lineno}: trust_remote_code is neither False nor asked"
                    )
    assert not wrong, "\n".join(wrong)


LIGHT = [
    "",
    ".errors",
    ".config",
    ".architecture",
    ".hub",
    ".presets",
    ".plan",
    ".cli",
    ".commands.presets",
    ".commands.plan",
    ".locks",
    ".apps.studio",
]


def test_importing_loads_no_torch() -> None:
    """`--help` answers at once only if nothing on its way imports the heavy libraries."""
    heavy = {"torch", "transformers", "datasets", "peft", "matplotlib", "gradio"}
    code = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module("lowrank_align" + name)
    if found := {heavy} & set(sys.modules):
        sys.exit("lowrank_align" + name + " loads " + ", ".join(found))
"""
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_train_is_the_function_also_after_its_module_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function and its module share a name; importing the module must not put it in the function's place."""
    monkeypatch.delitem(sys.modules, "lowrank_align.train", raising=False)
    monkeypatch.setitem(vars(lowrank_align), "train", None)  # whatever other tests have left there
    module = import_module("lowrank_align.train")
    assert lowrank_align.train is module.train
    monkeypatch.delitem(vars(lowrank_align), "train")
    assert (lowrank_align.train, lowrank_align.train.__name__) == (module.train, "train")
    assert lowrank_align.Base.__name__ == "Base"
