"""Find the private names of other libraries that the package uses, imports or overrides."""

import ast
import functools
import importlib
import inspect
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "hf_lm"
PRIVATE_NAME = re.compile(r"_[A-Za-z]\w*")


def resolve(path: str) -> tuple[object, list[str]]:
    """Import the longest module prefix of a dotted path, follow its attributes; also return what could not be found."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        while length < len(parts) and hasattr(found, parts[length]):
            found, length = getattr(found, parts[length]), length + 1
        return found, parts[length:]
    return None, parts


@functools.cache
def source_of(owner: object) -> str:
    """The source of a class or module; "" for builtins and for what C code makes."""
    try:
        return inspect.getsource(owner)
    except (OSError, TypeError):
        return ""


def mentions(owner: object, name: str) -> bool:
    """
    Whether a class or module has the attribute, the source of the class or of a base of it sets it on instances, or
    the source of the module sets it on other objects.
    """
    if hasattr(owner, name) or name in getattr(owner, "__annotations__", {}):
        return True
    pattern = re.compile(rf"\w\.{name}\b" if inspect.ismodule(owner) else rf"\bself\.{name}\b")
    return any(pattern.search(source_of(base)) for base in getattr(owner, "__mro__", [owner]))


def exists(path: str) -> bool:
    """Whether the installed release still has this dotted name."""
    owner, missing = resolve(path)
    return not missing or (len(missing) == 1 and owner is not None and mentions(owner, missing[0]))


class Module:
    """One file of the package: its imports, its classes and the private names that it defines."""

    def __init__(self, path: Path):
        self.file = path.relative_to(PACKAGE).as_posix()
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        package = ["hf_lm", *path.relative_to(PACKAGE).parent.parts]
        self.imports: dict[str, str] = {}  # local name -> dotted path
        self.classes: dict[str, ast.ClassDef] = {}
        self.defined: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                self.imports |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.asname or alias.name.split(".")[0]
                    self.imports[name] = alias.name if alias.asname else name
            elif isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            self.defined |= defined_by(node)

    def dotted(self, node: ast.AST) -> str | None:
        """The dotted path behind an expression of names and attributes, with imports followed."""
        if isinstance(node, ast.Name):
            return self.imports.get(node.id)
        if isinstance(node, ast.Attribute) and (base := self.dotted(node.value)):
            return f"{base}.{node.attr}"
        return None


def defined_by(node: ast.AST) -> set[str]:
    """Names that a statement defines: functions, classes, parameters, variables and attributes of `self`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.arg):
        return {node.arg}
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return {node.id}
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return set()


def library_bases(module: Module, cls: ast.ClassDef, modules: dict[str, Module]) -> list[object]:
    """The classes of other libraries that a class of the package inherits from, through classes of the package too."""
    found = []
    for base in cls.bases:
        base = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(base, ast.Name) and base.id in module.classes:
            found += library_bases(module, module.classes[base.id], modules)
            continue
        path = module.dotted(base)
        if path is None:
            continue
        if path.startswith("hf_lm."):
            home, _, name = path.rpartition(".")
            if home in modules and name in modules[home].classes:
                found += library_bases(modules[home], modules[home].classes[name], modules)
        elif path.split(".")[0] not in sys.stdlib_module_names:
            owner, missing = resolve(path)
            found += [] if missing else [owner]
    return found


def private_names() -> set[tuple[str, str]]:
    """
    `(file, name)` of every private name of another library in the package.

    A private name of a class belongs to a library if a base class from that library has it. Any other private name
    belongs to a library if no code of the package defines it. Names of the standard library do not count.
    """
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["hf_lm", *path.relative_to(PACKAGE).with_suffix("").parts]
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = Module(path)
    defined = set().union(*(module.defined for module in modules.values()))
    found = set()
    for module in modules.values():
        found |= {(module.file, name) for name in used_by(module, defined)}
        for cls in module.classes.values():
            bases = library_bases(module, cls, modules)
            members = set().union(*(members_of(node) for node in ast.walk(cls)))
            found |= {(module.file, name) for name in members if any(mentions(base, name) for base in bases)}
        for node in ast.walk(module.tree):  # OurClass._name, from outside
            if isinstance(node, ast.Attribute) and PRIVATE_NAME.fullmatch(node.attr):
                home, _, name = (module.dotted(node.value) or "").rpartition(".")
                if home in modules and name in modules[home].classes:
                    bases = library_bases(modules[home], modules[home].classes[name], modules)
                    found |= {(module.file, node.attr) for base in bases if mentions(base, node.attr)}
    return found


def members_of(node: ast.AST) -> set[str]:
    """Private names that a node inside a class uses or defines as members of the class."""
    names = []
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
        names = [node.attr]
    elif isinstance(node, ast.FunctionDef):
        names = [node.name]
    elif isinstance(node, ast.ClassDef):
        targets = [target for part in node.body if isinstance(part, ast.Assign) for target in part.targets]
        targets += [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
    return {name for name in names if PRIVATE_NAME.fullmatch(name)}


def used_by(module: Module, defined: set[str]) -> set[str]:
    """Private names that a file imports from a library, or takes from an object although the package defines none."""
    own = (*sys.stdlib_module_names, "hf_lm")
    found = set()
    for node in ast.walk(module.tree):
        names = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and (module.dotted(node.value) or "").split(".")[0] not in own:
            names = [node.attr] if node.attr not in defined else []
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("getattr", "setattr", "hasattr", "delattr", "pop", "get", "attrgetter"):
                texts = [part.value for part in node.args if isinstance(part, ast.Constant)]
                names = [text for text in texts if isinstance(text, str) and text not in defined]
            names += [keyword.arg for keyword in node.keywords if keyword.arg and keyword.arg not in defined]
        if names and names[0] not in own:
            found |= {name for name in names if PRIVATE_NAME.fullmatch(name)}
    return found
