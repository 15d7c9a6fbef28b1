"""The rules of the house (CONTRIBUTING.md), read off the sources; each rule is also shown a file that breaks it."""

from __future__ import annotations

import ast
import functools
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from dilated_attention.backends.manifest import dilated_attention_backends

ROOT = Path(__file__).resolve().parents[1]
FACE = ROOT / "src" / "dilated_attention"
FOLDERS = ("core", "exchange", "registry", "patterns", "backends", "models")
MAX_LINES = 400

# What a floor may import of ours, besides itself.
LOWER_FLOORS = {
    "core": (),
    "exchange": ("core",),
    "registry": ("core", "exchange"),
    # The store reads patterns back from their mapping form, as config files do.
    "patterns": ("core", "registry.specs", "registry.hooks", "registry.discovery", "registry.patterns"),
    "backends": ("core", "registry.specs", "registry.hooks"),
    "models": ("core", "registry"),
}
PLUGIN_NAME = re.compile(r"(?:dilated_attention)?\.?((?:patterns|backends)\.\w+)")


def package_files() -> dict[str, Path]:
    """Every module of the package by its path inside it: `core/pattern.py`, `cli.py`, `demo/train.py`."""
    rooms = {folder: ROOT / folder for folder in FOLDERS}
    found = {f"{name}/{p.relative_to(room)}": p for name, room in rooms.items() for p in room.rglob("*.py")}
    for path in FACE.rglob("*.py"):
        inside = path.relative_to(FACE)
        if inside.parts[0] not in FOLDERS:
            found[str(inside)] = path
    return found


def all_files() -> list[Path]:
    """Every Python file and stub that we wrote."""
    tests = [
        path for folder in ("tests", "typings") for path in (ROOT / folder).rglob("*.py*") if path.suffix != ".pyc"
    ]
    return [*package_files().values(), *tests]


def floor_of(name: str) -> str:
    """The first folder of `core/pattern.py` or of `core.pattern`; `__init__` for the face itself."""
    return re.split(r"[/.]", name)[0] or "__init__"


@functools.cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    """All of a file's syntax tree; several rules read it."""
    return tuple(ast.walk(ast.parse(source)))


def imports(name: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and target of each import of our own: `core.pattern`, or `dilated_attention.core…` where it is absolute."""
    here = [*name.removesuffix(".py").split("/")[:-1]]
    for node in nodes(source):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if floor_of(alias.name) == "dilated_attention":
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else [])]
                # `from .x import y` takes y from the module x, `from . import x` takes the module x itself.
                names = [[]] if node.module else [[alias.name] for alias in node.names]
                yield from ((node.lineno, ".".join([*base, *name])) for name in names)
            elif node.module and floor_of(node.module) == "dilated_attention":
                yield node.lineno, node.module


def may_import(name: str, target: str, plugins: Collection[str]) -> bool:
    """Whether the file `name` of one of the four floors may import the module `target`."""
    floor, room = floor_of(name), ".".join(re.split(r"[/.]", name)[:2])
    if floor_of(target) != floor:
        return any(target == lower or target.startswith(f"{lower}.") for lower in LOWER_FLOORS[floor])
    own_room = target == room or target.startswith(f"{room}.")
    return own_room or ".".join(target.split(".")[:2]) not in plugins


def import_problems(name: str, source: str, plugins: Collection[str]) -> list[str]:
    """Imports against the floors, absolute imports of ourselves, and `from .. import` where no `__init__` is above.

    `plugins` are the modules that the manifests name: they are reached through the registry, even by their neighbours.
    """
    problems = []
    for line, target in imports(name, source):
        if floor_of(target) == "dilated_attention":
            problems.append(f"{name}:{line} imports {target} absolutely; inside the package imports are relative")
        elif floor_of(name) in FOLDERS:
            if "." not in target and target not in FOLDERS:
                problems.append(f"{name}:{line} imports {target!r} from the face; name the module that defines it")
            elif not may_import(name, target, plugins):
                problems.append(f"{name}:{line} imports {target}, which its floor may not")
    return problems


def named_plugins(source: str) -> Iterator[tuple[int, str]]:
    """Line and module of every string that names a pattern or backend: `backends.sdpa`."""
    for node in nodes(source):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (match := PLUGIN_NAME.match(node.value)):
            yield node.lineno, match[1]


def plugin_name_problems(name: str, source: str) -> list[str]:
    """Plugins named by string where only their own module, their folder's manifest or the face may.

    The registry may name the manifests, and nothing else.
    """
    own = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return [
        f"{name}:{line} names the plugin {plugin}"
        for line, plugin in named_plugins(source)
        if not (
            name == "__init__.py"
            or f"{own}.".startswith(f"{plugin}.")
            or own == f"{floor_of(plugin)}.manifest"
            or (floor_of(name) == "registry" and plugin.endswith(".manifest"))
        )
    ]


def backend_name_problems(name: str, source: str, backends: Iterable[str]) -> list[str]:
    """Strings with the name of a backend as a word, docstrings aside: what core does for one it does for all."""
    word = re.compile(rf"(?<![\w.])(?:{'|'.join(sorted(backends))})(?!\w)")
    texts = {id(node.value) for node in nodes(source) if isinstance(node, ast.Expr)}
    return [
        f"{name}:{node.lineno} names the backend {found[0]}"
        for node in nodes(source)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts
        if (found := word.search(node.value))
    ]


def floor_cycle(sources: Mapping[str, str]) -> list[str]:
    """Floors that import each other in a circle, or an empty list; the modules beside the face count one by one."""
    edges: dict[str, set[str]] = {}
    for name, source in sources.items():
        floor = floor_of(name.removesuffix(".py"))
        targets = {floor_of(target) for _, target in imports(name, source)}
        known = {
            t if t in FOLDERS or f"{t}.py" in sources or f"{t}/__init__.py" in sources else "__init__" for t in targets
        }
        edges.setdefault(floor, set()).update(known - {floor})
    while edges:
        leaves = {floor for floor, targets in edges.items() if not targets & edges.keys()}
        if not leaves:
            return sorted(edges)
        edges = {floor: targets for floor, targets in edges.items() if floor not in leaves}
    return []


def size_problems(name: str, source: str) -> list[str]:
    """A file that is longer than a reader keeps in mind."""
    lines = source.count("\n")
    return [f"{name} has {lines} lines, more than {MAX_LINES}"] if lines > MAX_LINES else []


def comment_problems(name: str, source: str) -> list[str]:
    """`type: ignore` without a code, found in comments only."""
    if source.count("type: ignore") == source.count("type: ignore["):
        return []  # without taking the file to pieces
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    ignores = ((t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT and "type: ignore" in t.string)
    return [f"{name}:{line} ignores every type error" for line, text in ignores if "type: ignore[" not in text]


def except_problems(name: str, source: str) -> list[str]:
    """`except:` catches even KeyboardInterrupt."""
    handlers = (node for node in nodes(source) if isinstance(node, ast.ExceptHandler))
    return [f"{name}:{node.lineno} has a bare except" for node in handlers if node.type is None]


def link_problems(face: Path, root: Path, folders: Iterable[str]) -> list[str]:
    """Each folder needs a relative link beside the face that leads to it, and no link leads elsewhere."""
    links = {path.name: path.readlink() for path in face.iterdir() if path.is_symlink()}
    problems = [f"{name} -> {to} is absolute" for name, to in links.items() if to.is_absolute()]
    problems += [f"{name} -> {to} is no folder of the house" for name, to in links.items() if name not in folders]
    wrong = (
        name for name in folders if not (face / name).is_dir() or (face / name).resolve() != (root / name).resolve()
    )
    return problems + [f"{name} has no link that leads to it" for name in wrong]


def listing_problems(files: Iterable[str], packages: Iterable[str]) -> list[str]:
    """Every folder with modules must be listed in pyproject.toml, and nothing else."""
    folders = {".".join(["dilated_attention", *Path(name).parts[:-1]]) for name in files}
    listed = set(packages)
    return [f"{name} is missing from pyproject's packages" for name in sorted(folders - listed)] + [
        f"pyproject lists {name}, which has no modules" for name in sorted(listed - folders)
    ]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {name: path.read_text() for name, path in sorted(package_files().items())}


PLANTED = {"backends.sdpa", "backends.reference", "backends.fused", "patterns.dilated"}


def test_the_walk_sees_the_house(sources: Mapping[str, str]) -> None:
    assert {floor_of(name) for name in sources} >= set(FOLDERS)
    assert "core/pattern.py" in sources
    assert Path(__file__).resolve() in all_files()


def test_floors_hold(sources: Mapping[str, str]) -> None:
    manifests = ("patterns/manifest.py", "backends/manifest.py")
    plugins = {plugin for manifest in manifests for _, plugin in named_plugins(sources[manifest])}
    assert {floor_of(plugin) for plugin in plugins} == {"patterns", "backends"}
    assert [p for name, source in sources.items() for p in import_problems(name, source, plugins)] == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("core/merge.py", "from ..registry.select import choose"),
        ("core/merge.py", "from ..patterns.dilated import Dilated"),
        ("core/merge.py", "from .. import build_attention"),
        ("core/merge.py", "def f():\n    from ..backends.sdpa import Sdpa"),
        ("core/merge.py", "from dilated_attention.core.pattern import Full"),
        ("core/merge.py", "import dilated_attention.core"),
        ("registry/select.py", "from ..backends.sdpa import Sdpa"),
        ("registry/select.py", "from ..patterns import dilated"),
        ("patterns/local.py", "from ..registry.select import choose"),
        ("patterns/local.py", "from .dilated import Dilated"),
        ("patterns/local.py", "from . import dilated"),
        ("backends/sdpa.py", "from .reference import Reference"),
        ("backends/fused/run.py", "from ..sdpa import Sdpa"),
        ("backends/sdpa.py", "from ..cli import main"),
    ],
)
def test_a_broken_floor_is_seen(name: str, line: str) -> None:
    assert len(import_problems(name, f"import torch\n{line}\n", PLANTED)) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("core/merge.py", "from .pattern import Full"),
        ("registry/select.py", "from ..core.pattern import Full"),
        ("patterns/local.py", "from ..registry.specs import PatternSpec"),
        ("backends/fused/run.py", "from .tables import lists"),
        ("backends/fused/run.py", "from ..aten import flash"),
        ("backends/sdpa.py", "from .aten import flash"),
        ("demo/train.py", "from .. import build_attention"),
    ],
)
def test_what_the_floors_allow(name: str, line: str) -> None:
    assert import_problems(name, line, PLANTED) == []


def test_plugins_are_named_once(sources: Mapping[str, str]) -> None:
    assert [p for name, source in sources.items() for p in plugin_name_problems(name, source)] == []
    naming = [name for name, source in sources.items() if floor_of(name) == "registry" and [*named_plugins(source)]]
    assert len(naming) == 1


@pytest.mark.parametrize("text", ["dilated_attention.backends.sdpa:SPEC", "backends.sdpa", ".backends.sdpa"])
def test_a_plugin_named_by_string_is_seen(text: str) -> None:
    planted = f"import importlib\nx = importlib.import_module({text!r})\n"
    for name in ("backends/ring.py", "patterns/manifest.py", "registry/discovery.py", "core/merge.py", "cli.py"):
        assert len(plugin_name_problems(name, planted)) == 1
    for name in ("backends/sdpa.py", "backends/sdpa/run.py", "backends/manifest.py", "__init__.py"):
        assert plugin_name_problems(name, planted) == []
    assert plugin_name_problems("registry/discovery.py", "x = ('dilated_attention.backends.manifest',)") == []


def test_core_names_no_backend(sources: Mapping[str, str]) -> None:
    backends = {spec.name for spec in dilated_attention_backends()}
    assert backends >= {"sdpa", "triton", "math", "reference"}
    core = {name: source for name, source in sources.items() if floor_of(name) == "core"}
    assert [p for name, source in core.items() for p in backend_name_problems(name, source, backends)] == []


@pytest.mark.parametrize("line", ["SLOW = {'math': 1}", "x = backend == 'sdpa'", "x = f'{y}: take triton, which'"])
def test_a_backend_named_by_core_is_seen(line: str) -> None:
    text = '"""As math does it."""\nimport math\nx = "use dilated_attention.reference.attention"\n'
    assert backend_name_problems("core/a.py", text, ["math", "reference", "sdpa", "triton"]) == []
    assert len(backend_name_problems("core/a.py", text + line, ["math", "reference", "sdpa", "triton"])) == 1


def test_floors_have_no_cycle(sources: Mapping[str, str]) -> None:
    assert floor_cycle(sources) == []


def test_a_cycle_is_seen() -> None:
    planted = {
        "core/a.py": "from ..registry.b import x",
        "registry/b.py": "from ..core.a import y",
        "cli.py": "from .core.a import x",
    }
    assert floor_cycle(planted) == ["cli", "core", "registry"]
    assert floor_cycle({"core/a.py": "from . import b", "registry/b.py": "from ..core.a import y"}) == []


def test_files_are_small_and_honest() -> None:
    checks = (size_problems, comment_problems, except_problems)
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in all_files()}
    assert [p for name, text in texts.items() for check in checks for p in check(name, text)] == []


def test_a_long_or_careless_file_is_seen() -> None:
    assert size_problems("x.py", "\n" * MAX_LINES) == []
    assert len(size_problems("x.py", "\n" * (MAX_LINES + 1))) == 1
    assert comment_problems("x.py", "a = '# type: " + "ignore'\nb = 1  # type: ignore[assignment]\n") == []
    assert len(comment_problems("x.py", "b = 1  # type: " + "ignore\n")) == 1
    assert except_problems("x.py", "try:\n    f()\nexcept ValueError:\n    pass\n") == []
    assert len(except_problems("x.py", "try:\n    f()\nexcept:\n    pass\n")) == 1


def test_links_resolve() -> None:
    assert link_problems(FACE, ROOT, FOLDERS) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    face = tmp_path / "src" / "package"
    face.mkdir(parents=True)
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
        (face / folder).symlink_to(Path("../..") / folder)
    assert link_problems(face, tmp_path, FOLDERS) == []
    (face / "stray").symlink_to("../../core")
    (face / "core").unlink()
    (face / "core").symlink_to(tmp_path / "core")
    (face / "patterns").unlink()
    (face / "patterns").write_text("../../patterns")  # what git writes where links are switched off
    problems = link_problems(face, tmp_path, FOLDERS)
    assert [problem.split()[0] for problem in problems] == ["core", "stray", "patterns"]


def test_every_package_is_listed(sources: Mapping[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert listing_problems(sources, project["tool"]["setuptools"]["packages"]) == []


def test_an_unlisted_package_is_seen() -> None:
    packages = ["dilated_attention", "dilated_attention.core"]
    assert listing_problems(["cli.py", "core/a.py"], packages) == []
    assert len(listing_problems(["cli.py", "core/a.py", "demo/b.py"], packages)) == 1
    assert len(listing_problems(["cli.py"], packages)) == 1


def missing_from_wheel(wheel: Path, files: Iterable[str]) -> list[str]:
    """Modules, and what a typed and licensed package needs besides them, that `wheel` lacks."""
    with zipfile.ZipFile(wheel) as archive:
        held = [re.sub(r"^dilated_attention-[^/]*\.dist-info/", "", name) for name in archive.namelist()]
    wanted = [f"dilated_attention/{name}" for name in [*files, "py.typed"]]
    return [name for name in [*wanted, "entry_points.txt", "licenses/LICENSE"] if name not in held]


def test_the_wheel_is_whole(sources: Mapping[str, str], tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a copy, so that no build folder is left in the checkout
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in (*FOLDERS, "src"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=junk)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    done = subprocess.run([*command, str(tree)], env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    page = [f"dashboard/page.{kind}" for kind in ("html", "css", "js")]
    assert missing_from_wheel(wheel, [*sources, *page]) == []
    assert missing_from_wheel(wheel, ["core/not_there.py"]) == ["dilated_attention/core/not_there.py"]
