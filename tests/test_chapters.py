"""Style is tested, not reviewed: the chapters of train_gpt.py, what each may use, and the size of its parts.

The checker works on source text: `violations(source)` gives one line for every broken rule. It is itself
tested, on a small program with one planted violation at a time.
"""

import ast
import builtins
import math
import re
import statistics
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import StringIO

import pytest

from conftest import ROOT, run_program

# Lines a chapter may have, in the order of the chapters; the test allows a fifth more. Changing a row needs a
# reason in the commit.
BUDGETS = {
    "Config": 1050, "Schedule": 150, "Journal": 150, "World": 200, "Clock": 165, "Data": 350,
    "Kernels": 1050, "Storage": 450, "Coding": 400, "Layers": 300, "Mixers": 600, "Feed-forward": 300,
    "Memory": 300, "Model": 350, "Speed": 200, "Teachers": 450, "Objective": 450,
    "Optimizer": 350, "Checkpoint": 200, "Calibrate": 265, "Train": 450, "Export": 675, "Evaluate": 675,
    "Report": 200, "Main": 190,
}  # fmt: skip
MAX_LINES, MAX_WIDTH, MIN_WORDS = 8_500, 110, 0.10  # of the file; a line; share of lines that explain
MEDIAN_LENGTH, P90_LENGTH, MAX_LENGTH, MAX_KERNEL, MAX_MAIN, MAX_CLASS = 12, 35, 60, 90, 25, 150
MAX_NESTING, MAX_BRANCHES, MAX_ARGUMENTS = 3, 10, 6

# Exceptions: rule -> {function or class: the reason}.
ALLOW = {
    "arguments": {"knob": "a knob is one row: name, default, meaning, choices, low, high, tiny"},
    "getattr": {"foreign_files": "other people's modules may have no __file__"},
    "hasattr": {},
}

PLACES = {  # what only some chapters may touch
    "torch.distributed": {"World"},
    "os.environ": {"Config", "Main"},
    "print": {"Journal", "World", "Main"},
    "sys.stdout": {"Journal", "World", "Main"},
    "sys.stderr": {"Journal", "World", "Main"},
    "getattr": {"Config"},  # over dataclass fields
    "hasattr": {"Config"},
}
HIDERS = {"eval", "exec", "globals", "locals", "vars", "setattr", "delattr", "compile", "__import__"}
HIDING_ATTRIBUTES = {"__dict__", "__setattr__", "__globals__", "attrgetter", "import_module"}
IMPORTABLE = sys.stdlib_module_names | {"torch", "numpy"}
SIBLINGS = {"build_submission", "data", "records", "tests", "conftest", "train_gpt"}
MUTATORS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "clear"}
CONTAINERS = {"list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


# --------------------------------------------------------------------------------------
# A source and its chapters
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chapter:
    number: int
    name: str  # "Title" is what stands before the first banner
    first: int  # line of the banner's upper rule
    last: int
    uses: tuple[str, ...]


class Source:
    """A program's text, tree, chapters, and the owner of every top-level name."""

    def __init__(self, text: str):
        self.text, self.lines, self.tree = text, text.splitlines(), ast.parse(text)
        self.bad_banners: list[str] = []
        self.chapters = self.find_chapters()

    def find_chapters(self) -> list[Chapter]:
        heads = [i for i, line in enumerate(self.lines) if re.match(r"# \d+\. ", line)]
        found = [Chapter(0, "Title", 1, (heads[0] - 1 if heads else len(self.lines)), ())]
        for i, after in zip(heads, [*heads[1:], len(self.lines) + 1], strict=True):
            block = "\n".join(self.lines[i - 1 : i + 3])
            match = re.fullmatch(r"# =+\n# (\d+)\. (\S+)(?: -- .+)?\n# uses:(.*)\n# =+", block)
            if not match:
                form = "a banner is a rule, `# N. Name -- what`, `# uses: Names`, a rule"
                self.bad_banners.append(f"line {i + 1}: {form}")
                continue
            found.append(Chapter(int(match[1]), match[2], i, after - 1, tuple(match[3].split())))
        return found

    def chapter_at(self, line: int) -> Chapter:
        return max((c for c in self.chapters if c.first <= line), key=lambda c: c.first)

    @cached_property
    def definitions(self) -> list[tuple[str, ast.stmt]]:
        return [(name, node) for node in self.tree.body for name in names_defined(node)]

    @cached_property
    def owner(self) -> dict[str, Chapter]:
        return {name: self.chapter_at(node.lineno) for name, node in reversed(self.definitions)}

    @cached_property
    def functions(self) -> list[ast.FunctionDef]:
        return [node for node in ast.walk(self.tree) if isinstance(node, FUNCTIONS)]

    @cached_property
    def globals_read(self) -> list[ast.Name]:
        return [name for node in self.tree.body for name in free_names(node)]

    @cached_property
    def config_sections(self) -> dict[str, str]:
        """Field of Config -> name of its class."""
        config = next((n for n in self.tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)
        rows = [n for n in (config.body if config else []) if isinstance(n, ast.AnnAssign)]
        return {row.target.id: ast.unparse(row.annotation).strip("'\"") for row in rows}


def names_defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return [node.name]
    one = [node.target] if isinstance(node, ast.AnnAssign) else []
    targets = node.targets if isinstance(node, ast.Assign) else one
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def free_names(node: ast.AST, local: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Names read in `node` that no function, class body or comprehension around them binds."""
    if isinstance(node, ast.Name):
        if node.id not in local and isinstance(node.ctx, ast.Load):
            yield node
        return
    body, bound = scope_of(node)
    for child in ast.iter_child_nodes(node):
        method = isinstance(node, ast.ClassDef) and isinstance(child, (*FUNCTIONS, ast.ClassDef))
        yield from free_names(child, local | bound if child in body and not method else local)


def scope_of(node: ast.AST) -> tuple[list[ast.AST], frozenset[str]]:
    """The children of a node that see names the node binds, and these names."""
    if isinstance(node, COMPREHENSIONS):
        targets = [n for g in node.generators for n in ast.walk(g.target)]
        return list(ast.iter_child_nodes(node)), frozenset(n.id for n in targets if isinstance(n, ast.Name))
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return node.body, names_bound(node)
    return ([node.body], names_bound(node)) if isinstance(node, ast.Lambda) else ([], frozenset())


def names_bound(scope: ast.AST) -> frozenset[str]:
    """Names that a function, lambda or class body binds itself, its inner functions left out."""
    bound, queue = set(), list(ast.iter_child_nodes(scope))
    while queue:
        node = queue.pop()
        if isinstance(node, ast.arguments):
            bound |= {arg.arg for arg in ast.walk(node) if isinstance(arg, ast.arg)}
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            bound.add(node.name)
            continue
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            bound.add(node.name)
        if not isinstance(node, (ast.Lambda, *COMPREHENSIONS, ast.arguments)):
            queue += ast.iter_child_nodes(node)
    return frozenset(bound)


def walk_function(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function's body, inner functions and classes left out."""
    queue = list(function.body)
    while queue:
        node = queue.pop()
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node
            queue += ast.iter_child_nodes(node)


def decorators(function: ast.AST) -> str:
    return " ".join(ast.unparse(d) for d in function.decorator_list)


def is_kernel(function: ast.AST) -> bool:
    """A Triton kernel: as long as its block of memory asks for, with an argument per pointer and stride."""
    return bool(re.search(r"\btriton\.(jit|autotune|heuristics)\b", decorators(function)))


def classes(tree: ast.AST) -> list[ast.ClassDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def docstring_nodes(tree: ast.AST) -> list[ast.Expr]:
    holders = [n for n in ast.walk(tree) if isinstance(n, (*FUNCTIONS, ast.ClassDef, ast.Module))]
    return [n.body[0] for n in holders if ast.get_docstring(n, clean=False) is not None]


# --------------------------------------------------------------------------------------
# Rules: each gives the violations of one claim
# --------------------------------------------------------------------------------------


def banners_are_numbered_and_known(source: Source) -> Iterator[str]:
    yield from source.bad_banners
    for expected, chapter in enumerate(source.chapters[1:], 1):
        if chapter.number != expected:
            yield f"chapter {chapter.name} is number {chapter.number}, expected {expected}"
        if chapter.name not in BUDGETS:
            yield f"chapter {chapter.name} has no budget"
    names = [c.name for c in source.chapters if c.name in BUDGETS]
    if names != [name for name in BUDGETS if name in names]:
        yield f"chapters are not in the order of the table: {' '.join(names)}"


def table_of_contents_equals_banners(source: Source) -> Iterator[str]:
    row = re.compile(r"\s*(?:\d+ +[A-Z][\w-]*\s*)+")
    rows = [line for line in (ast.get_docstring(source.tree) or "").splitlines() if row.fullmatch(line)]
    contents = [(int(n), name) for line in rows for n, name in re.findall(r"(\d+) +([A-Z][\w-]*)", line)]
    banners = [(c.number, c.name) for c in source.chapters[1:]]
    if contents != banners:
        odd = sorted(set(contents) ^ set(banners)) or "another order"
        yield f"the table of contents differs from the banners: {odd}"


def names_have_one_owner(source: Source) -> Iterator[str]:
    seen: dict[str, int] = {}
    for name, node in source.definitions:
        if name in seen and name != "_":  # `_` is a function that only its decorator names
            yield f"line {node.lineno}: {name} is defined twice, first in line {seen[name]}"
        seen.setdefault(name, node.lineno)


def chapters_use_what_they_list(source: Source) -> Iterator[str]:
    used: dict[str, set[str]] = {c.name: set() for c in source.chapters}
    for name in source.globals_read:
        user, owner = source.chapter_at(name.lineno), source.owner.get(name.id)
        if owner is None or owner.name in {user.name, "Title"}:
            continue
        used[user.name].add(owner.name)
        if owner.name not in user.uses:
            yield f"line {name.lineno}: {user.name} uses {name.id} of {owner.name}, which it does not list"
        if name.id.startswith("_"):
            yield f"line {name.lineno}: {user.name} uses {name.id}, which is private to {owner.name}"
    for chapter in source.chapters:
        earlier = {c.name for c in source.chapters if 0 < c.number < chapter.number}
        for name in chapter.uses:
            if name not in earlier:
                yield f"line {chapter.first + 2}: {chapter.name} lists {name}, which is no earlier chapter"
            elif name not in used[chapter.name]:
                yield f"line {chapter.first + 2}: {chapter.name} lists {name} and never uses it"


def things_stay_in_their_place(source: Source) -> Iterator[str]:
    for node, thing in things_touched(source):
        chapter = source.chapter_at(node.lineno).name
        if chapter not in PLACES[thing] and function_around(source, node) not in ALLOW.get(thing, {}):
            yield f"line {node.lineno}: {thing} in {chapter}, not {' or '.join(sorted(PLACES[thing]))}"


def things_touched(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Uses of what PLACES holds to some chapters; imports in the title are free."""
    aliases = {"dist": "torch.distributed", "environ": "os.environ", "getenv": "os.environ"}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name):
            thing = aliases.get(node.id, node.id)
        elif isinstance(node, ast.Attribute):
            thing = ast.unparse(node).replace("os.getenv", "os.environ").replace("os.putenv", "os.environ")
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and source.chapter_at(node.lineno).number:
            thing = "torch.distributed" if "torch.distributed" in ast.unparse(node) else ""
        else:
            continue
        if thing in PLACES:
            yield node, thing


def function_around(source: Source, node: ast.AST) -> str:
    around = [f for f in source.functions if f.lineno <= node.lineno <= f.end_lineno]
    return max(around, key=lambda f: f.lineno).name if around else ""


def nothing_hides_a_name(source: Source) -> Iterator[str]:
    for name in source.globals_read:
        if name.id in HIDERS:
            yield f"line {name.lineno}: {name.id} hides names from the builder"
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            yield f"line {node.lineno}: {type(node).__name__.lower()} {', '.join(node.names)}"
        if isinstance(node, ast.Attribute) and node.attr in HIDING_ATTRIBUTES:
            yield f"line {node.lineno}: {node.attr} hides names from the builder"


def errors_are_caught_by_name(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.walk(node.type) if node.type else [ast.Name("everything")]
            kinds = {n.id for n in caught if isinstance(n, ast.Name)}
            if kinds & {"everything", "Exception", "BaseException"}:
                yield f"line {node.lineno}: except catches {', '.join(sorted(kinds))}"


def config_never_changes_and_has_one_name(source: Source) -> Iterator[str]:
    sections = set(source.config_sections)
    for node in ast.walk(source.tree):
        text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.arg)) else ""
        stored = isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load)
        if stored and re.match(r"(.+\.)?cfg\.", text):
            yield f"line {node.lineno}: {text} is assigned, and the config never changes"
        if isinstance(node, ast.arg) and re.fullmatch(r"\w+: '?Config'?", text) and node.arg != "cfg":
            yield f"line {node.lineno}: a Config is called {node.arg}, not cfg"
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            yield from aliases_of_config(node, sections)


def aliases_of_config(node: ast.AST, sections: set[str]) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    pairs = [pair for target in targets for pair in paired(target, node.value)]
    for target, value in pairs:
        name, text = ast.unparse(target), ast.unparse(value)
        match = re.fullmatch(r"(?:.+\.)?cfg\.(\w+)", text)
        if match and (match[1] in sections or not sections):
            yield f"line {node.lineno}: {name} = {text} gives a section of the config a second name"
        if text in {"cfg", "self.cfg"} and name not in {"cfg", "self.cfg"}:
            yield f"line {node.lineno}: {name} = {text} gives the config a second name"


def paired(target: ast.AST, value: ast.AST) -> list[tuple[ast.AST, ast.AST]]:
    """(a, b) = (x, y) -> [(a, x), (b, y)]."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)]


def no_work_is_left_for_later(source: Source) -> Iterator[str]:
    for i, line in enumerate(source.lines, 1):
        if word := re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            yield f"line {i}: {word[0]}"


def top_level_only_declares(source: Source) -> Iterator[str]:
    for i, node in enumerate(source.tree.body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if source.chapter_at(node.lineno).number:
                yield f"line {node.lineno}: import below the title"
        elif not (names_defined(node) or is_docstring(node, i) or runs_main(node) or registers(node)):
            yield f"line {node.lineno}: a top-level statement other than import, constant, def, class"


def is_docstring(node: ast.stmt, index: int) -> bool:
    return index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def runs_main(node: ast.stmt) -> bool:
    guard = "if __name__ == '__main__':\n    "
    return ast.unparse(node) in {guard + "main()", guard + "sys.exit(main())"}


def registers(node: ast.stmt) -> bool:
    """The derivative of a custom operator, which torch takes by a call."""
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".register_autograd")


def imports_are_optional_or_standard(source: Source) -> Iterator[str]:
    top = set(source.tree.body)
    for node in ast.walk(source.tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        modules = [node.module or "."] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        for root in {module.split(".")[0] for module in modules}:
            if root in SIBLINGS or relative:
                yield f"line {node.lineno}: import of a sibling, {root}: the program is one file"
            elif node in top and root not in IMPORTABLE:
                yield f"line {node.lineno}: import of {root} at top level; optional ones go into one function"
        if any(alias.name == "*" for alias in node.names):
            yield f"line {node.lineno}: star import"


def globals_do_not_change(source: Source) -> Iterator[str]:
    for name, node in source.definitions:
        assigned = isinstance(node, (ast.Assign, ast.AnnAssign))
        if assigned and makes_container(node.value) and not name.isupper():
            yield f"line {node.lineno}: {name} is a mutable global; a constant is UPPER_CASE"
    read = set(source.globals_read)
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.Subscript, ast.Attribute)):
            stored = not isinstance(node.ctx, ast.Load)
            changed = stored or (isinstance(node, ast.Attribute) and node.attr in MUTATORS)
            if changed and node.value in read and node.value.id in source.owner:
                yield f"line {node.lineno}: the global {node.value.id} is changed"


def makes_container(value: ast.AST | None) -> bool:
    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    return isinstance(value, displays) or (
        isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in CONTAINERS
    )


def functions_are_short(source: Source) -> Iterator[str]:
    lengths = {f: own_length(f) for f in source.functions}
    for function, length in lengths.items():
        kernel = is_kernel(function)
        limit = MAX_KERNEL if kernel else MAX_MAIN if function.name == "main" else MAX_LENGTH
        if length > limit:
            yield f"line {function.lineno}: {function.name} has {length} lines, at most {limit}"
    ordered = sorted(lengths.values()) or [0]
    median, p90 = statistics.median(ordered), ordered[math.ceil(0.9 * len(ordered)) - 1]
    if median > MEDIAN_LENGTH or p90 > P90_LENGTH:
        yield f"function lengths: median {median}, p90 {p90}; at most {MEDIAN_LENGTH} and {P90_LENGTH}"


def own_length(function: ast.AST) -> int:
    """Lines from `def` to the end; kernels inside (next to their import of triton) count for themselves."""
    inner = [n for n in ast.walk(function) if n is not function and isinstance(n, FUNCTIONS) and is_kernel(n)]
    kernels = sum(n.end_lineno - min(d.lineno for d in n.decorator_list) + 1 for n in inner)
    return function.end_lineno - function.lineno + 1 - kernels


def functions_are_flat(source: Source) -> Iterator[str]:
    for function in source.functions:
        if (depth := nesting(function.body)) > MAX_NESTING:
            yield f"line {function.lineno}: {function.name} nests {depth} deep, at most {MAX_NESTING}"


def nesting(body: list[ast.AST], depth: int = 0) -> int:
    deepest = depth
    for node in body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            continue
        if not isinstance(node, BLOCKS):
            deepest = max(deepest, nesting(list(ast.iter_child_nodes(node)), depth))
            continue
        inner = [child for child in ast.iter_child_nodes(node) if child not in elif_of(node)]
        deepest = max(deepest, nesting(inner, depth + 1), nesting(elif_of(node), depth))
    return deepest


def elif_of(node: ast.AST) -> list[ast.AST]:
    """The `elif` of an `if`, which is no deeper than the `if`."""
    branch = node.orelse if isinstance(node, ast.If) else []
    one = len(branch) == 1 and isinstance(branch[0], ast.If) and branch[0].col_offset == node.col_offset
    return branch if one else []


def functions_branch_little(source: Source) -> Iterator[str]:
    for function in source.functions:
        if (paths := cyclomatic(function)) > MAX_BRANCHES:
            complexity = f"cyclomatic complexity {paths}, at most {MAX_BRANCHES}"
            yield f"line {function.lineno}: {function.name} has {complexity}"


def cyclomatic(function: ast.AST) -> int:
    """McCabe's count with boolean operators, conditional expressions and filters of comprehensions."""
    steps = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)
    nodes = list(walk_function(function))
    choices = sum(isinstance(n, steps) for n in nodes)
    operators = sum(len(n.values) - 1 for n in nodes if isinstance(n, ast.BoolOp))
    return 1 + choices + operators + sum(len(n.ifs) for n in nodes if isinstance(n, ast.comprehension))


def functions_take_few_arguments(source: Source) -> Iterator[str]:
    operators = re.compile(r"\b(custom_op|triton_op|register_fake|register_kernel)\b")
    autograd = {f for n in classes(source.tree) if is_autograd(n) for f in n.body}
    for function in source.functions:
        free = is_kernel(function) or operators.search(decorators(function)) or function in autograd
        args = function.args
        count = sum(a.arg not in {"self", "cls"} for a in (*args.posonlyargs, *args.args, *args.kwonlyargs))
        if count > MAX_ARGUMENTS and not free and function.name not in ALLOW["arguments"]:
            yield f"line {function.lineno}: {function.name} takes {count} arguments, at most {MAX_ARGUMENTS}"


def is_autograd(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).endswith("autograd.Function") for base in node.bases)


def classes_are_short(source: Source) -> Iterator[str]:
    for node in classes(source.tree):
        if (length := node.end_lineno - node.lineno + 1) > MAX_CLASS:
            yield f"line {node.lineno}: class {node.name} has {length} lines, at most {MAX_CLASS}"


def chapters_keep_their_budget(source: Source) -> Iterator[str]:
    for chapter in source.chapters:
        size, budget = chapter.last - chapter.first + 1, BUDGETS.get(chapter.name, MAX_LINES)
        if size > 1.2 * budget:
            yield f"chapter {chapter.name} has {size} lines, budget {budget} and a fifth more"
    if len(source.lines) > MAX_LINES:
        yield f"{len(source.lines)} lines, at most {MAX_LINES}"


def lines_fit_and_explain(source: Source) -> Iterator[str]:
    for i, line in enumerate(source.lines, 1):
        if len(line) > MAX_WIDTH:
            yield f"line {i}: {len(line)} characters wide, at most {MAX_WIDTH}"
    tokens = tokenize.generate_tokens(StringIO(source.text).readline)
    words = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for node in docstring_nodes(source.tree):
        words |= set(range(node.lineno, node.end_lineno + 1))
    if len(words) < MIN_WORDS * len(source.lines):
        yield f"{len(words)} of {len(source.lines)} lines explain, at least {MIN_WORDS:.0%}"


def learners_see_only_what_was_scored(source: Source) -> Iterator[str]:
    """A class that adapts weights while scoring is called `...Learner`; it reaches no Data, no targets."""
    for learner in (n for n in classes(source.tree) if n.name.endswith("Learner")):
        for name in free_names(learner):
            if name.id in source.owner and source.owner[name.id].name == "Data":
                yield f"line {name.lineno}: {learner.name} reaches {name.id} of Data"
        for node in ast.walk(learner):
            if isinstance(node, ast.Attribute) and node.attr == "targets":
                yield f"line {node.lineno}: {learner.name} reads targets"


# ---- knobs


@dataclass(frozen=True)
class Knob:
    line: int
    owner: str  # the class
    field: str
    env: str
    doc: str


def knobs(source: Source) -> list[Knob]:
    found = []
    for owner in classes(source.tree):
        for row in owner.body:
            value = row.value if isinstance(row, ast.AnnAssign) else None
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "knob":
                texts = [arg.value if isinstance(arg, ast.Constant) else None for arg in value.args]
                env, _, doc, *_ = *texts, None, None, None
                found.append(Knob(row.lineno, owner.name, row.target.id, env, doc))
    return found


def knobs_are_declared_once_and_explained(source: Source) -> Iterator[str]:
    seen: dict[str, int] = {}
    for knob in knobs(source):
        if not isinstance(knob.env, str) or not re.fullmatch(r"[A-Z][A-Z0-9_]*", knob.env):
            yield f"line {knob.line}: the name of knob {knob.field} is no UPPER_CASE literal"
        elif knob.env in seen:
            yield f"line {knob.line}: {knob.env} is declared twice, first in line {seen[knob.env]}"
        seen.setdefault(knob.env, knob.line)
        if not isinstance(knob.doc, str) or len(knob.doc.split()) < 3 or knob.doc.endswith("."):
            yield f"line {knob.line}: the meaning of {knob.env} is three words or more without a final period"


def knobs_are_read(source: Source) -> Iterator[str]:
    section_of = {owner: section for section, owner in source.config_sections.items()}
    read = {re.sub(r"^(.+\.)?cfg\.", "", ast.unparse(n)) for n in loads(source.tree)}
    for owner in classes(source.tree):
        own = [ast.unparse(n) for n in loads(owner) if ast.unparse(n).startswith("self.")]
        prefix = "" if owner.name == "Config" else f"{section_of.get(owner.name)}."
        read |= {prefix + text.removeprefix("self.") for text in own}
    for knob in knobs(source):
        path = f"{section_of.get(knob.owner)}.{knob.field}"
        if path not in read:
            yield f"line {knob.line}: nothing reads {knob.env} (cfg.{path})"


def fields_of_the_config_exist(source: Source) -> Iterator[str]:
    """What is read of it is a knob, a property or a method; or else the run that gets there ends there."""
    sections = {**source.config_sections, "": "Config"}
    members = {
        section: {name for node in owner.body for name in names_defined(node)}
        for owner in classes(source.tree)
        for section, name in sections.items()
        if name == owner.name
    }
    for node in loads(source.tree):
        if is_config(node.value) and node.attr not in members[""]:
            yield f"line {node.lineno}: the config has no {ast.unparse(node)}"
        inner = node.value
        of_section = isinstance(inner, ast.Attribute) and is_config(inner.value) and inner.attr in members
        if of_section and node.attr not in members[inner.attr]:
            yield f"line {node.lineno}: the config has no {ast.unparse(node)}"
    yield from own_fields_exist(source, sections, members)


def own_fields_exist(source: Source, sections: dict, members: dict) -> Iterator[str]:
    """The same of `self` in the config's own classes."""
    for owner in classes(source.tree):
        for section in (s for s, name in sections.items() if name == owner.name):
            for node in loads(owner):
                path = ast.unparse(node).split(".")
                wrong = path[0] == "self" and len(path) == 2 and path[1] not in members[section]
                deep = not section and path[0] == "self" and len(path) == 3 and path[1] in members
                if wrong or (deep and path[2] not in members[path[1]]):
                    yield f"line {node.lineno}: the config has no {'.'.join(path)}"


def is_config(node: ast.AST) -> bool:
    return (isinstance(node, ast.Name) and node.id == "cfg") or (
        isinstance(node, ast.Attribute) and node.attr == "cfg"
    )


def names_are_defined(source: Source) -> Iterator[str]:
    """Of every name that a function finds outside itself: at top level, by an import, or in Python."""
    imports = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and node in source.tree.body
        for alias in node.names
    }
    known = imports | source.owner.keys() | vars(builtins).keys() | {"__file__", "__name__"}
    for name in source.globals_read:
        if name.id not in known:
            yield f"line {name.lineno}: {name.id} is defined nowhere"


def loads(tree: ast.AST) -> list[ast.Attribute]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]


RULES = (
    banners_are_numbered_and_known, table_of_contents_equals_banners, names_have_one_owner,
    chapters_use_what_they_list, things_stay_in_their_place, nothing_hides_a_name, errors_are_caught_by_name,
    config_never_changes_and_has_one_name, no_work_is_left_for_later, top_level_only_declares,
    imports_are_optional_or_standard, globals_do_not_change, functions_are_short, functions_are_flat,
    functions_branch_little, functions_take_few_arguments, classes_are_short, chapters_keep_their_budget,
    lines_fit_and_explain, learners_see_only_what_was_scored, knobs_are_declared_once_and_explained,
    knobs_are_read, fields_of_the_config_exist, names_are_defined,
)  # fmt: skip


def violations(source: str) -> list[str]:
    parsed = Source(source)
    return [line for rule in RULES for line in rule(parsed)]


# --------------------------------------------------------------------------------------
# The program keeps the rules
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program() -> str:
    return (ROOT / "train_gpt.py").read_text()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_train_gpt_keeps_the_rule(rule, program):
    found = list(rule(Source(program)))
    assert not found, "\n" + "\n".join(found)


def test_every_exception_is_still_there(program):
    names = {function.name for function in Source(program).functions}
    assert {name for reasons in ALLOW.values() for name in reasons} <= names


def test_train_gpt_keeps_no_code_in_comments(program):
    """Ruff's rule, which takes `# uses: Config` for an annotation, on the source without these lines."""
    source = re.sub(r"(?m)^# uses:.*$", "#", program)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=ERA", "--output-format=concise"]
    run = subprocess.run([*command, "-"], input=source, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_readme_knob_table_is_what_the_program_prints():
    marked = re.search(r"<!-- knobs -->\n(.*?)\n<!-- /knobs -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert marked, "README.md has no <!-- knobs --> ... <!-- /knobs --> block"
    run = run_program(["--knobs"])
    assert run.returncode == 0, run.stderr
    assert marked[1].strip() == run.stdout.strip()


# --------------------------------------------------------------------------------------
# The checker catches what it says it catches
# --------------------------------------------------------------------------------------

BANNER = "# " + "=" * 86
CLEAN = f'''"""Toy program that keeps every rule.

 1 Config   2 World   3 Data
 4 Evaluate   5 Main
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch.distributed as dist

FROZEN: dict[str, str] = {{}}  # an UPPER_CASE constant of the title belongs to everybody

{BANNER}
# 1. Config -- what can be set
# uses:
{BANNER}


def knob(env: str, default: int, doc: str, *, choices: tuple = (), low=None, high=None, tiny=None):
    return field(default=default, metadata=dict(env=env, doc=doc, rest=(choices, low, high, tiny)))


@dataclass(frozen=True)
class ModelConfig:
    dim: int = knob("MODEL_DIM", 64, "width of the model")
    heads: int = knob("NUM_HEADS", 4, "heads of attention")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)


def _private(cfg: Config) -> int:
    return getattr(cfg, "model")


{BANNER}
# 2. World -- ranks
# uses:
{BANNER}


def barrier() -> None:
    dist.barrier()


def log(text: str) -> None:
    print(text)


{BANNER}
# 3. Data
# uses: Config
{BANNER}


def batch(cfg: Config) -> list[int]:
    rows = [FROZEN for barrier in range(cfg.model.dim)]  # a local name may be that of another chapter
    rows.append(cfg.model.head_dim)
    return rows


{BANNER}
# 4. Evaluate -- the score
# uses: Config World
{BANNER}


class Learner:
    def learn(self, scored: list[int], cfg: Config) -> None:
        for row in scored:
            if row > cfg.model.dim:
                log("row")


def evaluate(cfg: Config) -> int:
    total = 0
    return total


{BANNER}
# 5. Main -- the story
# uses: Config Evaluate
{BANNER}


def main() -> None:
    evaluate(Config())
    print(os.environ.get("SEED"))


if __name__ == "__main__":
    main()
'''

NESTED = "".join(f"{'    ' * i}for i{i} in range(3):\n" for i in range(4)) + "    " * 4 + "pass"
BRANCHES = "".join(f"if total > {i} and cfg:\n    total += 1\n" for i in range(5))
BODIES = {  # name: (what stands in the body of evaluate, part of the message)
    "torch.distributed imported": ("import torch.distributed as d", "torch.distributed in Evaluate, not"),
    "the environment read": ("total = os.environ['X']", "os.environ in Evaluate"),
    "the environment by getenv": ("total = os.getenv('X')", "os.environ in Evaluate"),
    "print in Evaluate": ("print(total)", "print in Evaluate, not Journal or Main"),
    "getattr in Evaluate": ("total = getattr(cfg, 'model')", "getattr in Evaluate, not Config"),
    "a private name": ("_private(cfg)", "private to Config"),
    "global": ("global FROZEN", "global FROZEN"),
    "nonlocal": ("def f():\n    nonlocal total\n    total = 1\nf()", "nonlocal total"),
    "eval": ("total = eval('1')", "eval hides names"),
    "setattr": ("setattr(cfg, 'a', 1)", "setattr hides names"),
    "__dict__": ("total = cfg.__dict__", "__dict__ hides names"),
    "bare except": ("try:\n    total = 0\nexcept:\n    pass", "catches everything"),
    "broad except": ("try:\n    total = 0\nexcept Exception:\n    pass", "catches Exception"),
    "an assignment to the config": ("cfg.model.dim = 3", "the config never changes"),
    "an alias of a section": ("m = cfg.model", "m = cfg.model gives a section of the config a second name"),
    "an alias in a tuple": ("total, m = 0, cfg.model", "m = cfg.model gives a section"),
    "a second name of the config": ("c = cfg", "c = cfg gives the config a second name"),
    "work left": ("total = 1  # TO" + "DO: count", "TO" + "DO"),
    "a field that is not there": ("total = cfg.model.depth", "the config has no cfg.model.depth"),
    "a section that is not there": ("total = cfg.logger", "the config has no cfg.logger"),
    "a name that is not there": ("total = log0", "log0 is defined nowhere"),
    "a sibling": ("import build_submission", "import of a sibling"),
    "a constant changed by key": ("FROZEN['a'] = 'b'", "the global FROZEN is changed"),
    "a constant changed by method": ("FROZEN.clear()", "the global FROZEN is changed"),
    "a function of 61 lines": ("total += 1\n" * 57, "evaluate has 61 lines, at most 60"),
    "nesting of 4": (NESTED, "evaluate nests 4 deep"),
    "11 paths": (BRANCHES, "cyclomatic complexity 11"),
    "a wide line": (f"total = '{'x' * 100}'", "characters wide"),
}
EDITS = {  # name: (text of CLEAN, what stands in its place, part of the message)
    "a later chapter listed": ("Config World\n", "Config World Main\n", "which is no earlier chapter"),
    "a later chapter used": ("dist.barrier()", "dist.barrier(evaluate)", "World uses evaluate of Evaluate"),
    "a use not listed": ("# uses: Config World\n", "# uses: Config\n", "log of World, which it does not"),
    "a use in an annotation": ("(text: str)", "(text: ModelConfig)", "World uses ModelConfig of Config"),
    "a listed chapter unused": ("Config Evaluate", "Config World Evaluate", "lists World and never uses it"),
    "a banner without uses": ("# 3. Data\n# uses: Config\n", "# 3. Data\n", "a banner is"),
    "a wrong number": ("# 3. Data", "# 7. Data", "is number 7, expected 3"),
    "an unknown chapter": ("# 3. Data", "# 3. Extras", "chapter Extras has no budget"),
    "a table of contents behind": (" 4 Evaluate   5 Main", " 4 Evaluate", "the table of contents differs"),
    "a second definition": ("def main()", "def log():\n    pass\n\n\ndef main()", "log is defined twice"),
    "torch.distributed in Data": ("rows.append(", "dist.barrier(", "torch.distributed in Data, not World"),
    "a config of another name": ("evaluate(cfg:", "evaluate(config:", "a Config is called config, not cfg"),
    "work at import": ("FROZEN: dict", "print(1)\nFROZEN: dict", "a top-level statement other than"),
    "an import below the title": ("def main()", "import sys\n\n\ndef main()", "import below the title"),
    "triton at top level": ("import os", "import os\nimport triton", "import of triton at top level"),
    "a star import": ("import os\n", "from os import *\n", "star import"),
    "a mutable global": ("FROZEN: dict", "seen = []\nFROZEN: dict", "seen is a mutable global"),
    "a main of 26 lines": ("    evaluate(Config())\n", "    evaluate(Config())\n" * 24, "main has 26 lines"),
    "7 arguments": ("evaluate(cfg: Config", "evaluate(cfg: Config, a, b, c, d, *, e, f", "takes 7 arguments"),
    "a class of 151 lines": (
        "class Learner:",
        "class Learner:" + "\n    a = 1" * 146,
        "Learner has 151 lines",
    ),
    "a chapter over budget": ("def main()", "# more\n" * 300 + "def main()", "chapter Main has"),
    "no words": ("def main()", "def f():\n" + "    pass\n" * 800 + "def main()", "lines explain"),
    "a learner that reads data": ('log("row")', "batch(row)", "Learner reaches batch of Data"),
    "a learner that reads targets": ("row in scored", "row in cfg.targets", "Learner reads targets"),
    "a knob declared twice": ('"NUM_HEADS"', '"MODEL_DIM"', "MODEL_DIM is declared twice"),
    "a knob without meaning": ('"heads of attention"', '"heads"', "the meaning of NUM_HEADS"),
    "a knob with a full stop": ('"heads of attention"', '"heads of attention."', "the meaning of NUM_HEADS"),
    "a field of its own that is not there": (
        "self.dim // self.heads",
        "self.dim // self.heads + self.depth",
        "the config has no self.depth",
    ),
    "a knob nobody reads": ("self.dim // self.heads", "self.dim", "nothing reads NUM_HEADS (cfg."),
}


def in_evaluate(body: str) -> str:
    return CLEAN.replace("    total = 0\n", "    total = 0\n" + textwrap.indent(body, "    ") + "\n")


PLANTED = {name: (in_evaluate(body), message) for name, (body, message) in BODIES.items()} | {
    name: (CLEAN.replace(old, new, 1), message) for name, (old, new, message) in EDITS.items()
}


def test_checker_accepts_a_clean_program():
    assert violations(CLEAN) == []


@pytest.mark.parametrize("plant", PLANTED)
def test_checker_catches(plant):
    source, message = PLANTED[plant]
    assert source != CLEAN
    found = violations(source)
    assert any(message in line for line in found), found


def test_checker_counts_kernels_for_themselves():
    kernel = "import triton\n\n@triton.jit\ndef add(a, b, c, d, e, f, g):\n" + "    a += 1\n" * 80
    found = violations(in_evaluate(kernel))
    assert not [line for line in found if "lines, at most" in line or "arguments" in line]
    longer = violations(in_evaluate(kernel + "    a += 1\n" * 10))
    assert any("add has 91 lines, at most 90" in line for line in longer)


def test_elif_is_no_deeper_than_its_if():
    chain = "if a:\n    pass\n" + "elif b:\n    pass\n" * 5 + "else:\n    if c:\n        pass\n"
    assert nesting(ast.parse(chain).body) == 2


def test_names_are_looked_up_as_python_does():
    source = """
def f(a=outer_default, *, b: outer_annotation):
    local = a
    class Inner(outer_base):
        field = 1
        other = field
        def method(self): return field, local
    return [x for x in outer_rows if x], lambda y: (y, outer_free), other
"""
    read = {name.id for name in free_names(ast.parse(source))}
    outer = {"outer_default", "outer_annotation", "outer_base", "outer_rows", "outer_free"}
    assert read == outer | {"field", "other"}  # `field` in the method and `other` outside are not the class's
