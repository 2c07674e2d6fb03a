"""Freeze train_gpt.py for one env file, strip what that never reaches, pack it, prove it, count the bytes.

    python build_submission.py records/baseline/env --out runs/submission
    python build_submission.py records/baseline/env --weights runs/baseline/model.ptz --out runs/submission

Each stage is a program with the behaviour of the one before, and --until stops at one of them:

    source    train_gpt.py, told everything by its environment
    frozen    the same text; three constants hold the recipe, and the environment may only change LIVE_KNOBS
    folded    every frozen knob a literal, the branches it decides taken, and what nothing reaches gone
    minified  without docstrings and annotations, names shortened by python-minifier
    packed    the minified text, compressed, in a file of a few lines that unpacks and runs it

The proof: the tiny twin of each stage (the same edits, small sizes, and a clock that ticks when it is looked
at) trains, exports and scores on a toy corpus, and its trace.jsonl must be that of the source, byte for byte.
What is written differs from its twin in the values of knobs alone, and when asked it reads the recipe's
configuration out of itself. A stage for which this does not hold is left out with all after it, loudly.
The same inputs and the same versions give the same bytes. Exit status: 1 for a broken proof or for too many
bytes, 2 for a fault in what was given.
"""

from __future__ import annotations

import argparse
import ast
import base64
import builtins
import copy
import dataclasses
import functools
import gc
import hashlib
import importlib
import itertools
import json
import linecache
import lzma
import operator
import os
import platform
import random
import re
import runpy
import signal
import subprocess
import symtable
import sys
import tempfile
import time
import types
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import brotli
import numpy as np
import sentencepiece
import torch

import train_gpt
from train_gpt import UserError

ROOT = Path(__file__).resolve().parent
SOURCE = ROOT / "train_gpt.py"
STAGES = ("frozen", "folded", "minified", "packed")  # what --until may name, in order
PROGRAM, WEIGHTS, REPORT = "train_gpt.py", "model.ptz", "build.json"  # the files of a submission
RECIPE_CONSTANTS = ("FROZEN", "LIVE")  # whose values a frozen file and its twin may differ in
ASKED = ("knob_values", "read_live", "thawed")  # functions that keep their names, for `check_program`
# Knobs of the run section that say what one run does, and so belong to no recipe.
ONE_RUN = ("RUN_DIR", "RESUME", "OVERWRITE", "EVAL_ONLY", "ARTIFACT", "SAMPLE", "PRECOMPILE", "NLL_PATH")
# What a submission does without, unless its recipe asks for it: nobody resumes it or watches it run.
SUBMISSION = {"CHECKPOINT_EVERY": "-1", "PROGRESS": "0", "FORECAST": "0"}
TWIN_SECONDS = 300  # a tiny run takes one; after so many it is killed, and the proof is broken
LOOKS = 20  # at a twin's clock, from the first step to the cap


class BuildError(Exception):
    """The build went wrong where the input was right. Its text is one line."""


# ---------------------------------------------------------------------------------------- the recipe

# What a shell reads in the same way: one assignment, quoted as a whole or not at all, nothing to expand.
ASSIGNMENT = re.compile(
    r"""[ \t]*(?:export[ \t]+)?(?P<name>[A-Za-z_]\w*)=
        (?:'(?P<single>[^']*)'|"(?P<double>[^"$`\\]*)"|(?P<bare>[\w./,:+@%=-]*))
        (?:[ \t]+\#.*)?[ \t]*""",
    re.VERBOSE | re.ASCII,
)
COMMENT = re.compile(r"[ \t]*(#.*)?")


def read_env_file(path: Path) -> dict[str, str]:
    """KEY=value lines -> name to text, as a shell reads them. Raises UserError naming the first bad line."""
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; name a file of KEY=value lines") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text; name a file of KEY=value lines") from e
    env = {}
    for number, line in enumerate(lines, 1):
        if COMMENT.fullmatch(line):
            continue
        match = ASSIGNMENT.fullmatch(line)
        if not match:
            raise UserError(
                f"{path}:{number}: {line[:80]!r} is not KEY=value, with the value plain or in quotes, and "
                f"without $, ` and \\"
            )
        if match["name"] in env:
            raise UserError(f"{path}:{number}: {match['name']} is set a second time; keep one")
        env[match["name"]] = match["single"] or match["double"] or match["bare"] or ""
    return env


@dataclass(frozen=True)
class Recipe:
    """The knobs that an env file sets, by their own names, each as the text that `knob_values` gives it."""

    env: dict[str, str]

    @functools.cached_property
    def cfg(self) -> train_gpt.Config:
        return train_gpt.read_config(self.env)

    @functools.cached_property
    def values(self) -> dict[str, object]:
        """Knob -> value."""
        places = train_gpt.all_knobs().items()
        return {name: getattr(getattr(self.cfg, section), field.name) for name, (section, field) in places}

    @property
    def frozen(self) -> dict[str, object]:
        return {name: value for name, value in self.values.items() if name not in train_gpt.LIVE_KNOBS}

    @property
    def live(self) -> dict[str, object]:
        """The recipe's value unless the environment has another."""
        return {name: self.values[name] for name in train_gpt.LIVE_KNOBS}


def make_recipe(env: dict[str, str]) -> Recipe:
    """Check the knobs and sort them. Raises UserError for unknown names and what `read_config` refuses."""
    strangers = [unknown_knob(name) for name in env if name not in train_gpt.known_names()]
    strangers += [f"{name} is about one run, not part of a recipe" for name in ONE_RUN if name in env]
    if strangers:
        raise UserError("; ".join(strangers))
    env = {**SUBMISSION, **train_gpt.resolve_aliases(env)}
    values = train_gpt.knob_values(train_gpt.read_config(env))
    return Recipe({name: values[name] for name in env if name in values})


def unknown_knob(name: str) -> str:
    near = train_gpt.near_misses({name: ""})
    return near[0] if near else f"{name} is not a knob, so no submission can carry it; --knobs lists them"


def tiny_twin(recipe: Recipe) -> Recipe:
    """The recipe with its features as they are and every size small. Raises UserError where that is none.

    A gate may hang on a size, so what the recipe has at 0 stays 0, and what it has not gets another value:
    else the twin would prove another branch. The clock keeps its cap (see `tick_of`), and what a CPU can
    only do slowly or not at all is left out.
    """
    own, env = recipe.values, {}
    for name, value in train_gpt.tiny_values().items():
        if own[name]:
            env[name] = train_gpt.spelled(value)
    del env["COMPILE"], env["DTYPE"]
    env.pop("MAX_WALLCLOCK_SECONDS", None)
    chosen = {"VAL_LOSS_EVERY": "3", "GRAD_ACCUM_STEPS": "2"}
    env |= {name: text for name, text in chosen.items() if own[name]}
    env |= {"DEVICE": "cpu"} if own["DEVICE"] == "cuda" else {}
    env |= {"COMPILE": "0"} if own["COMPILE"] == "1" else {}
    try:
        return make_recipe({**recipe.env, **env})
    except UserError as e:
        raise UserError(f"no tiny twin of this recipe: {e}; train_gpt.py wants a `tiny` value for it") from e


def tick_of(tiny: Recipe) -> float:
    """Seconds by which a twin's clock moves when it is looked at: the run ends by its cap, as a real one."""
    return (tiny.cfg.budget.seconds or 600.0) / LOOKS


# ------------------------------------------------------------------------------------------ freezing


def find_constants(tree: ast.Module, names: tuple[str, ...]) -> list[ast.Assign | ast.AnnAssign]:
    """The assignments of some names. Raises BuildError unless each has one, with a value, at top level."""
    stores = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)]
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = node
    for name in names:
        if stores.count(name) != 1 or name not in found:
            raise BuildError(f"{name} is set {stores.count(name)} times in train_gpt.py, want one constant")
    return [found[name] for name in names]


def set_constants(source: str, texts: dict[str, str]) -> str:
    """Put other expressions in the place of constants' values; all other characters stay as they are."""
    raw = source.encode()  # the tree counts columns in bytes
    starts = [0, 0, *itertools.accumulate(len(line) for line in raw.splitlines(keepends=True))]
    edits = []
    for node, text in zip(find_constants(ast.parse(source), tuple(texts)), texts.values(), strict=True):
        first = starts[node.value.lineno] + node.value.col_offset
        last = starts[node.value.end_lineno] + node.value.end_col_offset
        edits.append((first, last, text.encode()))
    for first, last, text in sorted(edits, reverse=True):
        raw = raw[:first] + text + raw[last:]
    return raw.decode()


def dict_text(values: dict[str, object]) -> str:
    """A dict display with a row for each knob."""
    rows = [f"    {name!r}: {value!r},\n" for name, value in values.items()]
    return "{\n" + "".join(rows) + "}" if rows else "{}"


def freeze(source: str, recipe: Recipe) -> str:
    """The source with the recipe and the name of the stage in its constants. Raises BuildError."""
    texts = {"FROZEN": dict_text(recipe.frozen), "LIVE": dict_text(recipe.live)}
    return set_constants(source, texts | {"SOURCE_STAGE": "'frozen'"})


def without_constants(source: str, names: tuple[str, ...]) -> str:
    """What two sources share when they differ in the values of some constants alone."""
    return set_constants(source, dict.fromkeys(names, "None"))


# ------------------------------------------------------------------------------------ reading a tree

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.ClassDef, ast.Lambda)
BODIES = ("body", "orelse", "finalbody")  # where statements stand; a lambda's body is none
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
ATTRIBUTE_CALLS = {"getattr", "hasattr", "setattr", "delattr"}
LEAVERS = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def children(node: ast.AST) -> list[ast.AST]:
    """The nodes right below one, as ast.iter_child_nodes has them, in half the time."""
    found = []
    for field in node._fields:
        part = getattr(node, field, None)
        if isinstance(part, list):
            found += [inner for inner in part if isinstance(inner, ast.AST)]
        elif isinstance(part, ast.AST):
            found.append(part)
    return found


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node of a tree, each before those below it."""
    queue = [tree]
    while queue:
        node = queue.pop()
        queue += children(node)
        yield node


def bodies(tree: ast.AST) -> Iterator[tuple[ast.AST, str, list[ast.stmt]]]:
    """(node, field, statements) of every list of statements."""
    for node in walk(tree):
        for field in BODIES:
            if isinstance(statements := getattr(node, field, None), list):
                yield node, field, statements


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body, those of functions and classes inside it left out."""
    queue = list(function.body)
    while queue:
        node = queue.pop()
        yield node
        if not isinstance(node, SCOPES):
            queue += children(node)


def names_bound(tree: ast.AST) -> Counter[str]:
    """How often each name is bound in a tree, whatever the scope: more often than in any one scope of it."""
    found = Counter()
    for node in walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found[node.id] += 1
        elif isinstance(node, ast.arg):
            found[node.arg] += 1
        elif isinstance(node, ast.alias):
            found[(node.asname or node.name).split(".")[0]] += 1
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar, *FUNCTIONS, ast.ClassDef)):
            found[node.name or ""] += 1
        elif isinstance(node, ast.MatchMapping):
            found[node.rest or ""] += 1
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            found.update(node.names * 2)
    return found


def names_read(tree: ast.AST) -> Counter[str]:
    """How often each name is loaded; annotations count where something evaluates them."""
    idle = {note for node in walk(tree) for note in idle_annotations(node)}
    found, queue = Counter(), [tree]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found[node.id] += 1
        queue += [child for child in children(node) if child not in idle]
    return found


def globals_read(tree: ast.AST) -> set[str]:
    """Names that a tree loads and no function of it binds, and a few too many: those of comprehensions."""
    idle = {note for node in walk(tree) for note in idle_annotations(node)}
    found, queue = set(), [(tree, frozenset())]
    while queue:
        node, local = queue.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in local:
            found.add(node.id)
        inside = node.body if isinstance(node, FUNCTIONS) else []
        bound = local | names_local(node) if inside else local
        below = [child for child in children(node) if child not in idle]
        queue += [(child, bound if child in inside else local) for child in below]
    return found


def names_local(function: ast.AST) -> frozenset[str]:
    """Names that a function binds in its own scope, those of comprehensions left out."""
    inner = [node for node in own_nodes(function) if isinstance(node, COMPREHENSIONS)]
    hidden = {name for node in inner for name in walk(node)}
    parts = [node for node in own_nodes(function) if node not in hidden and not isinstance(node, ast.Lambda)]
    names = {arg.arg for arg in walk(function.args) if isinstance(arg, ast.arg)}
    for node in parts:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, (ast.ExceptHandler, *FUNCTIONS, ast.ClassDef)):
            names.add(node.name or "")
    return frozenset(names)


def idle_annotations(node: ast.AST) -> list[ast.AST]:
    """The annotations of a node that nothing evaluates: all but those of kernels and custom operators."""
    if isinstance(node, ast.AnnAssign):
        return [node.annotation]
    if not isinstance(node, FUNCTIONS) or needs_annotations(node):
        return []
    notes = [arg.annotation for arg in walk(node.args) if isinstance(arg, ast.arg)]
    return [note for note in [*notes, node.returns] if note]


def needs_annotations(function: ast.AST) -> bool:
    """torch reads a custom operator's signature from them, and Triton what is constant in a kernel."""
    told = " ".join(ast.unparse(d) for d in function.decorator_list)
    return bool(re.search(r"\b(custom_op|triton_op|triton\.(jit|autotune|heuristics))\b", told))


def literal(node: ast.AST) -> tuple[object, ...]:
    """(value,) of a literal, () of anything else."""
    try:
        return (ast.literal_eval(node),)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return ()


def is_pure(node: ast.AST) -> bool:
    """Whether evaluating an expression can neither do nor raise anything."""
    if isinstance(node, (ast.Constant, ast.Name, ast.Lambda)) or is_cfg(node):
        return True
    if isinstance(node, (ast.Tuple, ast.List)):
        return all(is_pure(part) for part in node.elts)
    return bool(literal(node))


def copied(node: ast.AST) -> ast.AST:
    """A copy of all but what trees share anyway: there python-minifier leaves links to whole other trees."""
    shared = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)
    return copy.deepcopy(node, {id(part): part for part in walk(node) if isinstance(part, shared)})


def place(node: ast.AST) -> tuple[int, ...]:
    """Where a node stands in train_gpt.py."""
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


# --------------------------------------------------------------------------------------- conventions

# What the stripper takes for granted: rule -> how to mend it. A source that breaks one is refused.
CONVENTIONS = {
    "a section of cfg has a second name": "write cfg.<section>.<field> where it is used",
    "cfg has no such field or property": "give it a row in Config, or a function of cfg for what takes more",
    "cfg is given another value": "there is one configuration; what varies belongs into Phase",
    "a name reached by text": "spell the attribute, or look it up in a dict",
    "a name of another scope is rebound": "return the value",
    "a star import": "import the names",
    "a second definition of one name": "rename one of them",
    "work at top level": "put it into a function",
    "an argument list that hides the arguments": "pass them one by one",
}


def check_source(tree: ast.Module) -> None:
    """What can be seen before folding. Raises UserError naming the line, the rule and the mend."""
    seen = set()
    for node in tree.body:
        for name in names_defined(node):
            if name in seen:
                refuse(node, "a second definition of one name", name)
            seen.add(name)
        if not (isinstance(node, (ast.Import, ast.ImportFrom)) or names_defined(node) or is_allowed(node)):
            refuse(node, "work at top level", ast.unparse(node))
    for node in walk(tree):
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            refuse(node, "a name of another scope is rebound", ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            refuse(node, "a star import", ast.unparse(node))


def is_allowed(node: ast.stmt) -> bool:
    """Docstrings, the `__main__` line, and derivatives of custom operators."""
    text = ast.unparse(node)
    return (
        (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or text.startswith("if __name__ == '__main__':")
        or (isinstance(node, ast.Expr) and ".register_autograd(" in text)
    )


def names_defined(node: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [name.id for t in targets if t for name in walk(t) if isinstance(name, ast.Name)]


def check_folded(tree: ast.Module) -> None:
    """What only counts in code that is left: by which other ways it might reach cfg, or a dropped name."""
    for node in walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            hidden = name in ATTRIBUTE_CALLS and not (len(node.args) > 1 and literal(node.args[1]))
            if hidden or name in {"eval", "exec", "globals", "locals", "vars", "__import__"}:
                refuse(node, "a name reached by text", ast.unparse(node))
            if any(is_cfg(arg.value) for arg in (*node.args, *node.keywords) if is_unpacked(arg)):
                refuse(node, "an argument list that hides the arguments", ast.unparse(node))
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and node.value:
            check_assignment(node)


def is_unpacked(arg: ast.AST) -> bool:
    return isinstance(arg, ast.Starred) or (isinstance(arg, ast.keyword) and arg.arg is None)


def check_assignment(node: ast.AST) -> None:
    """`cfg = t.cfg` and `cfg = read_live(env)` are the same configuration; nothing else may be called cfg."""
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        parts = zip(getattr(target, "elts", []), getattr(node.value, "elts", []), strict=False)
        for name, value in [(target, node.value), *parts]:
            if is_cfg(name) and not (is_cfg(value) or ast.unparse(value).startswith("read_live(")):
                refuse(node, "cfg is given another value", ast.unparse(node))


def refuse(node: ast.AST, rule: str, text: str) -> NoReturn:
    raise UserError(
        f"train_gpt.py:{node.lineno}: {rule} ({text.splitlines()[0][:70]}), so nothing can be stripped: "
        f"{CONVENTIONS[rule]}"
    )


# ------------------------------------------------------------------------------- folding: the values


def is_cfg(node: ast.AST) -> bool:
    """`cfg`, `self.cfg`, `t.cfg`: the configuration has no other name."""
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)
    return isinstance(node, (ast.Name, ast.Attribute)) and name == "cfg"


class Values(ast.NodeTransformer):
    """Puts literals in the place of `cfg.section.field`, of properties, and of calls marked `@of_config`.

    The values are asked of the real Config. What depends on a live knob stays: a field becomes
    `cfg["SEED"]`; of a property, two configurations are asked that differ in the live knobs alone.
    """

    def __init__(self, cfg: train_gpt.Config, tree: ast.Module) -> None:
        other = {name: "7" for name in train_gpt.LIVE_KNOBS} | {"SEED": "8"}
        self.configs = (cfg, train_gpt.read_config({**train_gpt.knob_values(cfg), **other}))
        self.sections = {f.name for f in dataclasses.fields(cfg)}
        self.live = {place_of(name): name for name in train_gpt.LIVE_KNOBS}
        self.marked = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and "of_config" in map(ast.unparse, node.decorator_list)
        }

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        inner = node.value
        if isinstance(inner, ast.Attribute) and is_cfg(inner.value):
            return self.field(node, inner)
        if is_cfg(inner):
            if node.attr in self.sections:
                refuse(node, "a section of cfg has a second name", ast.unparse(node))
            return self.value(node, node.attr, lambda cfg: getattr(cfg, node.attr))
        return self.generic_visit(node)

    def field(self, node: ast.Attribute, inner: ast.Attribute) -> ast.AST:
        path = f"{inner.attr}.{node.attr}"
        if path in self.live:
            key = ast.Constant(self.live[path])
            return located(ast.Subscript(inner.value, key, ast.Load()), node)
        return self.value(node, path, lambda cfg: getattr(getattr(cfg, inner.attr), node.attr))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in self.marked and len(node.args) == 1 and is_cfg(node.args[0]):
            return self.value(node, name, getattr(train_gpt, name))
        return self.generic_visit(node)

    def value(self, node: ast.AST, label: str, ask: Callable[[train_gpt.Config], object]) -> ast.AST:
        try:
            values = [ask(cfg) for cfg in self.configs]
            text = repr(values[0])
            told = literal(ast.parse(text, mode="eval").body)
        except (AttributeError, SyntaxError) as e:
            refuse(node, "cfg has no such field or property", f"{ast.unparse(node)}: {e}")
        if values[0] != values[1] or told != (values[0],):
            refuse(node, "cfg has no such field or property", f"{ast.unparse(node)} is no frozen literal")
        return labelled(ast.parse(text, mode="eval").body, label, node)


def place_of(name: str) -> str:
    section, field = train_gpt.all_knobs()[name]
    return f"{section}.{field.name}"


def located(node: ast.AST, at: ast.AST) -> ast.AST:
    """The node and all in it, standing where another one stood."""
    for part in walk(node):
        ast.copy_location(part, at)
    return node


def labelled(node: ast.AST, label: str, at: ast.AST) -> ast.AST:
    """A literal that remembers whose value it is: the shipped file and its twin may differ there."""
    node.knob = label
    return located(node, at)


def set_values(tree: ast.Module, recipe: Recipe) -> None:
    """The constants of the Title, with a label at every value of a knob."""
    texts = {"FROZEN": dict_text(recipe.frozen), "LIVE": dict_text(recipe.live), "FOLDED": "True"}
    for node, text in zip(find_constants(tree, tuple(texts)), texts.values(), strict=True):
        node.value = located(ast.parse(text, mode="eval").body, node)
        for key, value in zip(
            getattr(node.value, "keys", []), getattr(node.value, "values", []), strict=True
        ):
            value.knob = key.value


# ----------------------------------------------------------------------------- folding: the branches

COMPARISONS = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b, ast.Is: lambda a, b: a is b, ast.IsNot: lambda a, b: a is not b,
}  # fmt: skip


class Branches(ast.NodeTransformer):
    """Folds not, and, or, comparisons and conditional expressions of literals, and takes the branch.

    `gates` keeps what each literal condition came to, by its place in train_gpt.py.
    """

    def __init__(self, gates: dict[tuple[int, ...], bool]) -> None:
        self.gates = gates

    def decide(self, node: ast.AST, value: object) -> bool:
        self.gates[place(node)] = bool(value)
        return bool(value)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id == "FOLDED" and isinstance(node.ctx, ast.Load):
            return located(ast.Constant(True), node)
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        value = literal(node.operand) if isinstance(node.op, ast.Not) else ()
        return located(ast.Constant(not self.decide(node, value[0])), node) if value else node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        """Neutral literals go, unless last; after a deciding one nothing is evaluated."""
        self.generic_visit(node)
        stop, kept = isinstance(node.op, ast.Or), []
        for operand in node.values:
            value = literal(operand)
            if value and self.decide(operand, value[0]) == stop:
                kept.append(operand)
                break
            if not value or operand is node.values[-1]:
                kept.append(operand)
        return kept[0] if len(kept) == 1 else ast.copy_location(ast.BoolOp(node.op, kept), node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """From the left, as long as both sides are literals: a chain ends where it does not hold."""
        self.generic_visit(node)
        operands, holds = [node.left, *node.comparators], True
        while node.ops and holds:
            pair = [literal(part) for part in operands[:2]]
            if () in pair or (isinstance(node.ops[0], (ast.Is, ast.IsNot)) and (None,) not in pair):
                node.left, node.comparators = operands[0], operands[1:]
                return node
            holds = bool(COMPARISONS[type(node.ops.pop(0))](*(value for (value,) in pair)))
            operands.pop(0)
        return located(ast.Constant(self.decide(node, holds)), node)

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.AST:
        node.value = self.visit(node.value)  # its format is an f-string too, and must stay one
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        """Literals in an f-string are formatted, and join the text around them."""
        self.generic_visit(node)
        parts: list[ast.AST] = []
        for part in map(formatted, node.values):
            if parts and isinstance(part, ast.Constant) and isinstance(parts[-1], ast.Constant):
                knobs = [getattr(text, "knob", "") for text in (parts[-1], part)]
                whole = located(ast.Constant(parts.pop().value + part.value), node)
                whole.knob, part = " ".join(filter(None, knobs)), whole
            parts.append(part)
        node.values = parts
        return parts[0] if len(parts) == 1 and isinstance(parts[0], ast.Constant) else node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        node.test = as_test(self.visit(node.test))
        value = literal(node.test)
        if not value:
            return self.generic_visit(node)
        return self.visit(node.body if self.decide(node.test, value[0]) else node.orelse)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        node.test = as_test(self.visit(node.test))
        value = literal(node.test)
        if value:
            branch = node.body if self.decide(node.test, value[0]) else node.orelse
            return self.generic_visit(ast.Module(branch, [])).body
        self.generic_visit(node)
        if all(isinstance(s, ast.Pass) for s in node.body) and not node.orelse and is_pure(node.test):
            return []
        return node

    def visit_While(self, node: ast.While) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        value = literal(node.test)
        return node.orelse if value and not self.decide(node.test, value[0]) else node

    def visit_Assert(self, node: ast.Assert) -> ast.AST | None:
        self.generic_visit(node)
        value = literal(node.test)
        return None if value and value[0] else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Left as it is where a dropped branch made it a generator, or made a name its own."""
        branching = any(isinstance(part, (ast.If, ast.While)) for part in walk(node))
        before = copied(node) if branching else node
        self.generic_visit(node)
        if not branching:
            return node
        tidy(node)
        lost = names_bound(before).keys() - names_bound(node).keys()
        if (lost and lost & names_read(node).keys()) or yields(before) != yields(node):
            return before
        return node


def formatted(part: ast.AST) -> ast.AST:
    """The text of a literal in an f-string; every other part as it is."""
    value = literal(part.value) if isinstance(part, ast.FormattedValue) and part.conversion == -1 else ()
    spec = part.format_spec.values if value and part.format_spec else []
    if not value or not all(isinstance(text, ast.Constant) for text in spec):
        return part
    text = located(ast.Constant(format(value[0], "".join(text.value for text in spec))), part)
    text.knob = getattr(part.value, "knob", "")
    return text


def as_test(node: ast.AST) -> ast.AST:
    """A condition is asked for its truth alone: `x and True` is x, `x and False` is False where x is pure."""
    value = literal(node.values[-1]) if isinstance(node, ast.BoolOp) else ()
    if not value:
        return node
    rest = node.values[:-1]
    if bool(value[0]) == isinstance(node.op, ast.Or):
        return node.values[-1] if all(is_pure(part) for part in rest) else node
    return rest[0] if len(rest) == 1 else ast.copy_location(ast.BoolOp(node.op, rest), node)


def yields(function: ast.AST) -> bool:
    return any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in own_nodes(function))


def tidy(tree: ast.AST) -> None:
    """Cut what follows a return, raise, continue or break; drop lonely literals; fill with pass.

    A yield stays even there: it is what makes its function a generator.
    """
    for node, field, statements in bodies(tree):
        ends = [i for i, statement in enumerate(statements) if isinstance(statement, LEAVERS)]
        rest = ast.Module(statements[ends[0] + 1 :] if ends else [], [])
        kept = statements if yields(rest) else statements[: len(statements) - len(rest.body)]
        kept = [s for i, s in enumerate(kept) if i == 0 or not is_idle(s)]
        if kept and isinstance(kept[0], ast.Pass) and len(kept) > 1:
            kept = kept[1:]
        if field == "orelse" and all(isinstance(s, ast.Pass) for s in kept):
            kept = []
        if not kept and field == "body" and not isinstance(node, ast.Module):
            kept = [located(ast.Pass(), node)]
        statements[:] = kept


def is_idle(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and bool(literal(statement.value))
    )


# ------------------------------------------------------------------------------- folding: the locals


def settle_locals(tree: ast.Module) -> None:
    """A local that is bound once, to a number, is that number; one that nobody reads is not stored."""
    for function in [f for f in walk(tree) if isinstance(f, FUNCTIONS) and not needs_annotations(f)]:
        stores = [(node, name) for node in own_nodes(function) if (name := stored_name(node))]
        bound, read = (names_bound(function), names_read(function)) if stores else ({}, {})
        stores = [(node, name) for node, name in stores if bound[name] == 1]
        known = {name: node.value for node, name in stores if is_short(node.value)}
        dead = {n for n, name in stores if name in known or (not read[name] and is_pure(n.value))}
        if dead:
            Substitute(known).visit(function)
            for _, _, statements in bodies(function):
                statements[:] = [s for s in statements if s not in dead]
            tidy(function)


def stored_name(node: ast.AST) -> str | None:
    """x of `x = ...`, None of every other statement."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    simple = isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and len(targets) == 1
    return targets[0].id if simple and isinstance(targets[0], ast.Name) else None


def is_short(node: ast.AST) -> bool:
    value = literal(node)
    return bool(value) and (value[0] is None or isinstance(value[0], (bool, int, float)))


class Substitute(ast.NodeTransformer):
    """Literals in the place of names."""

    def __init__(self, known: dict[str, ast.AST]) -> None:
        self.known = known

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.known and isinstance(node.ctx, ast.Load):
            return located(copied(self.known[node.id]), node)
        return node


# --------------------------------------------------------------------------- folding: the parameters


def settle_parameters(tree: ast.Module) -> None:
    """A parameter that every call gives the same number is that number; one that nobody reads goes.

    Only of top-level functions whose name is called and used in no other way, and only where all arguments
    dropped are names or literals, so that no evaluation is lost.
    """
    calls = defaultdict(list)
    for node in walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            calls[node.func.id].append(node)
    read, bound = names_read(tree), names_bound(tree)
    for function in [node for node in tree.body if isinstance(node, ast.FunctionDef) and is_harmless(node)]:
        name, called = function.name, calls[function.name]
        hidden = any(is_unpacked(arg) for call in called for arg in (*call.args, *call.keywords))
        args = function.args
        hidden = hidden or args.vararg or args.kwarg or args.posonlyargs
        if not hidden and len(called) == read[name] and bound[name] == 1:
            Signature(function, called).settle()


class Signature:
    """A function's parameters beside what each of its calls gives them."""

    def __init__(self, function: ast.FunctionDef, calls: list[ast.Call]) -> None:
        self.function, self.calls, self.args = function, calls, function.args

    def settle(self) -> None:
        bound, read = names_bound(self.function), names_read(ast.Module(self.function.body, []))
        for parameter in [*self.args.args, *self.args.kwonlyargs]:
            name, given = parameter.arg, [self.given(call, parameter) for call in self.calls]
            if not given or bound[name] > 1 or not all(arg and is_pure(arg) for arg in given):
                continue
            same = {(ast.dump(arg), getattr(arg, "knob", "")) for arg in given}
            if not read[name]:
                self.drop(parameter)
            elif is_short(given[0]) and len(same) == 1:
                substitute = Substitute({name: given[0]})
                self.function.body = [substitute.visit(statement) for statement in self.function.body]
                self.drop(parameter)

    def given(self, call: ast.Call, parameter: ast.arg) -> ast.AST | None:
        """What a call gives to a parameter, be it by its default."""
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        if parameter in self.args.kwonlyargs:
            default = self.args.kw_defaults[self.args.kwonlyargs.index(parameter)]
            return named.get(parameter.arg, default)
        index = self.args.args.index(parameter)
        if index < len(call.args):
            return call.args[index]
        defaults = dict(zip(self.args.args[::-1], self.args.defaults[::-1], strict=False))
        return named.get(parameter.arg, defaults.get(parameter))

    def drop(self, parameter: ast.arg) -> None:
        args, keyword_only = self.args, parameter in self.args.kwonlyargs
        index = (args.kwonlyargs if keyword_only else args.args).index(parameter)
        for call in self.calls:
            call.keywords = [keyword for keyword in call.keywords if keyword.arg != parameter.arg]
            if not keyword_only and index < len(call.args):
                del call.args[index]
        if keyword_only:
            del args.kwonlyargs[index], args.kw_defaults[index]
            return
        default = index - (len(args.args) - len(args.defaults))
        if default >= 0:
            del args.defaults[default]
        del args.args[index]


def attributes_read(tree: ast.AST) -> set[str]:
    """Every attribute that is loaded, or reached by a text."""
    found = {n.attr for n in walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return found | {text for call in walk(tree) if isinstance(call, ast.Call) for text in texts_of(call)}


# --------------------------------------------------------------------------- folding: what is reached

# A definition that nothing reaches may go if making it does nothing: its decorators and calls are of these.
HARMLESS_DECORATORS = re.compile(
    r"(functools\.)?(cache|cached_property|wraps\(.*\))|(contextlib\.)?contextmanager|of_config|property|"
    r"staticmethod|classmethod|(dataclasses\.)?dataclass(\(.*\))?|torch\.(no_grad|inference_mode)\(\)"
)
HARMLESS_CALLS = {"dict", "frozenset", "list", "set", "str", "tuple", "range", "len", "max", "min", "sorted"}
TEXT_METHODS = {
    "encode",
    "format",
    "join",
    "lower",
    "removeprefix",
    "removesuffix",
    "replace",
    "split",
    "upper",
}


def drop_unreached(tree: ast.Module) -> list[str]:
    """Keep what `main` reaches by name; the names of what went. Sound because no name is reached by text."""
    owner = {name: node for node in tree.body for name in names_defined(node)}
    todo = [node for node in tree.body if not names_defined(node) or not is_harmless(node)]
    todo = [node for node in todo if not isinstance(node, (ast.Import, ast.ImportFrom))]
    kept = set(todo)
    while todo:
        for name in globals_read(todo.pop()):
            if name in owner and owner[name] not in kept:
                kept.add(owner[name])
                todo.append(owner[name])
    gone = [node for node in tree.body if names_defined(node) and node not in kept]
    tree.body = [node for node in tree.body if node not in gone]
    return [name for node in gone for name in names_defined(node)]


def is_harmless(node: ast.stmt) -> bool:
    """Whether a definition that is not made is missed by nothing but its readers."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return all(HARMLESS_DECORATORS.fullmatch(ast.unparse(d)) for d in node.decorator_list)
    calls = [call.func for call in walk(node.value or node) if isinstance(call, ast.Call)]
    return all(
        (isinstance(call, ast.Name) and call.id in HARMLESS_CALLS)
        or (isinstance(call, ast.Attribute) and call.attr in TEXT_METHODS)
        for call in calls
    )


def drop_methods(tree: ast.Module) -> list[str]:
    """Drop methods that no attribute names; never dunders, nor what a foreign base class has by that name."""
    named, gone = attributes_read(tree), []
    for node in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        for method in [part for part in node.body if isinstance(part, FUNCTIONS)]:
            hook = method.name.startswith("__") or is_inherited(node.name, method.name)
            if method.name not in named and not hook:
                node.body.remove(method)
                gone.append(f"{node.name}.{method.name}")
        tidy(node)
    return gone


def texts_of(call: ast.Call) -> list[str]:
    """Names that getattr and its like reach by a text."""
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    told = [literal(arg) for arg in call.args[1:2]] if name in ATTRIBUTE_CALLS else []
    return [str(value) for (value,) in filter(None, told)]


def is_inherited(owner: str, method: str) -> bool:
    """Whether a class of another module among the bases knows the method, and so may call it."""
    bases = getattr(train_gpt, owner).__mro__[1:]
    return any(hasattr(base, method) for base in bases if base.__module__ != train_gpt.__name__)


def drop_imports(tree: ast.Module, used_before: set[str]) -> None:
    """Drop imports that folding left without a reader. One that never had any is there for its effect."""
    read = names_read(tree)
    for _, _, statements in bodies(tree):
        for node in [s for s in statements if isinstance(s, (ast.Import, ast.ImportFrom))]:
            bound = [(alias, (alias.asname or alias.name).split(".")[0]) for alias in node.names]
            node.names = [alias for alias, name in bound if read[name] or name not in used_before]
        statements[:] = [s for s in statements if getattr(s, "names", True)]
    tidy(tree)


# ------------------------------------------------------------------------------------------- folding


class Folded(NamedTuple):
    """What is left of the source for one recipe."""

    tree: ast.Module
    gates: dict[tuple[int, ...], bool]  # place of a condition -> what it came to
    dropped: list[str]


def fold(source: str, recipe: Recipe) -> Folded:
    """Every knob but the live ones a literal, and nothing left that this does not reach. Raises UserError."""
    tree, gates = ast.parse(source), {}
    check_source(tree)
    set_values(tree, recipe)
    used = {node.id for node in walk(tree) if isinstance(node, ast.Name)}
    values, dropped = Values(recipe.cfg, tree), []
    tree = Branches(gates).visit(tree)
    dropped += drop_unreached(tree)
    tree = values.visit(tree)
    settled: list[str] = []
    while settled != (texts := [ast.unparse(ast.fix_missing_locations(node)) for node in tree.body]):
        pairs = zip(tree.body, texts, strict=True)
        tree.body = [
            part for node, text in pairs for part in ([node] if text in settled else shrunk(node, gates))
        ]
        settled = texts
        settle_parameters(tree)
        dropped += drop_unreached(tree) + drop_methods(tree)
        drop_imports(tree, used)
    check_folded(tree)
    return Folded(tree, gates, dropped)


def shrunk(definition: ast.stmt, gates: dict[tuple[int, ...], bool]) -> list[ast.stmt]:
    """What the passes that look at one definition alone leave of it."""
    part = Branches(gates).visit(ast.Module([definition], []))
    tidy(part)
    settle_locals(part)
    return part.body


# --------------------------------------------------------------------------------------- names, bare

PROVIDED = {"__name__", "__file__", "__class__", "__module__", "__qualname__", "__annotations__"}


def undefined_names(text: str) -> list[str]:
    """Names that a program loads, at any depth, and no scope defines: what compile() does not see."""
    tree = Bare(keep_fields=False).visit(ast.parse(text))
    module = symtable.symtable(ast.unparse(ast.fix_missing_locations(tree)), PROGRAM, "exec")
    known = {symbol.get_name() for symbol in module.get_symbols() if is_bound(symbol)}
    known |= PROVIDED | set(dir(builtins))
    found, tables = set(), [module]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            outer = symbol.is_global() or table is module
            if symbol.is_referenced() and outer and not is_bound(symbol) and symbol.get_name() not in known:
                found.add(f"{symbol.get_name()} (in {table.get_name()})")
    return sorted(found)


def is_bound(symbol: symtable.Symbol) -> bool:
    """Whether its own scope binds it; what symtable calls global in a function named `top` may be bound."""
    kinds = symbol.is_assigned, symbol.is_imported, symbol.is_namespace, symbol.is_parameter
    return any(kind() for kind in kinds)


class Bare(ast.NodeTransformer):
    """Drops docstrings and annotations. Fields of dataclasses and named tuples need one: `int` is shortest.

    Custom operators and kernels keep theirs; they mean something there.
    """

    def __init__(self, keep_fields: bool = True) -> None:
        self.keep_fields, self.inside = keep_fields, False

    def visit_Module(self, node: ast.Module) -> ast.AST:
        return self.without_docstring(self.generic_visit(node))

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.inside, outer = True, self.inside
        self.generic_visit(node)
        self.inside = outer
        return self.without_docstring(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        for note in idle_annotations(node):
            for part in (node, *walk(node.args)):
                field = "returns" if part is node else "annotation"
                if getattr(part, field, None) is note:
                    setattr(part, field, None)
        self.inside, outer = False, self.inside
        self.generic_visit(node)
        self.inside = outer
        return self.without_docstring(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        self.generic_visit(node)
        if self.inside and self.keep_fields:
            node.annotation = ast.Name("int", ast.Load())
            return node
        return ast.Assign([node.target], node.value) if node.value else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        return None if node.module == "__future__" else node

    @staticmethod
    def without_docstring(node: ast.AST) -> ast.AST:
        if node.body and is_idle(node.body[0]):
            del node.body[0]
        if not node.body and not isinstance(node, ast.Module):
            node.body = [ast.Pass()]
        return node


# ----------------------------------------------------------------------------------------- minifying


def minify(text: str) -> str:
    """The folded text without docstrings and annotations, its names shortened, for the minified stage.

    Keyword arguments, attributes (so state_dict's names) and texts stay as they are; literals are not
    hoisted, which the compressor does better; asserts stay. A parameter that very many functions have (cfg,
    world) keeps its name: with others in each, the packed record 1855 was 60 bytes larger. So do the locals
    of kernels, of which Triton may ask more than Python does.
    """
    tree = by_position(Bare().visit(ast.parse(text)))
    common = Counter(node.arg for node in walk(tree) if isinstance(node, ast.arg))
    kernels = [f for f in walk(tree) if isinstance(f, FUNCTIONS) and needs_annotations(f)]
    kept = {name for name, count in common.items() if count >= 30}.union(*map(names_bound, kernels))
    minified = python_minifier().minify(
        ast.unparse(ast.fix_missing_locations(tree)),
        remove_literal_statements=True,
        remove_annotations=False,
        hoist_literals=False,
        constant_folding=False,
        rename_globals=True,
        preserve_globals=list(ASKED),
        preserve_locals=sorted(kept),
    )
    return minified + "\n"


def by_position(tree: ast.Module) -> ast.Module:
    """Mark as positional the parameters that no call names: the minifier renames those, and unmarks them.

    Others get a second name in the first line of their function, which made the packed baseline 800 bytes
    larger. Functions inside functions are left alone: torch calls some of theirs by keyword.
    """
    named = {k.arg for call in walk(tree) if isinstance(call, ast.Call) for k in call.keywords}
    keys = (key for node in walk(tree) if isinstance(node, ast.Dict) for key in node.keys)
    named |= {key.value for key in keys if isinstance(key, ast.Constant)}  # a dict may become keywords
    scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    for function in (node for scope in scopes for node in scope.body if isinstance(node, FUNCTIONS)):
        if not needs_annotations(function):
            args = function.args
            free = len(list(itertools.takewhile(lambda arg: arg.arg not in named, args.args)))
            args.posonlyargs, args.args = args.posonlyargs + args.args[:free], args.args[free:]
    return tree


def python_minifier() -> types.ModuleType:
    """The module, which only the last two stages need. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("python_minifier")
    except ImportError as e:
        raise UserError(
            "the minified stage needs python-minifier; pip install -r tests/requirements.txt, or stop before "
            "with --until folded"
        ) from e


def definition_sizes(text: str, minified: str) -> dict[str, int]:
    """Name in the source -> bytes in the minified text, the largest first; minifying keeps their order."""
    names = [node.name for node in ast.parse(text).body if isinstance(node, (*FUNCTIONS, ast.ClassDef))]
    nodes = [node for node in ast.parse(minified).body if isinstance(node, (*FUNCTIONS, ast.ClassDef))]
    lines = minified.encode().split(b"\n")
    sizes = {
        name: sum(len(line) + 1 for line in lines[node.lineno - 1 : node.end_lineno])
        for name, node in zip(names, nodes, strict=True)
    }
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


# ------------------------------------------------------------------------------------------- packing


@functools.cache
def brotli_codec(data: bytes) -> tuple[bytes, str]:
    """Compressed data, and the expression that undoes it, with \0 in the place of the data."""
    return train_gpt.squeeze(data), "brotli.decompress(\0)"


@functools.cache
def lzma_codec(data: bytes) -> tuple[bytes, str]:
    """Raw LZMA with the best of its three parameters; the decoder's default dictionary holds any program."""
    best, undo = b"", ""
    for lc, lp, pb in itertools.product(range(5), range(3), range(3)):
        options = {"id": lzma.FILTER_LZMA1, "lc": lc, "lp": lp, "pb": pb}
        encoder = options | {"preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 23}
        tried = lzma.compress(data, lzma.FORMAT_RAW, filters=[encoder]) if lc + lp <= 4 else b""
        if tried and (not best or len(tried) < len(best)):
            best, undo = tried, f"lzma.decompress(\0, {int(lzma.FORMAT_RAW)}, None, [{options}])"
    return best, undo


@functools.cache
def zlib_codec(data: bytes) -> tuple[bytes, str]:
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return squeezer.compress(data) + squeezer.flush(), "zlib.decompress(\0, -15)"


# Where sizes are equal the first wins: the standard library's before brotli.
CODECS = {"zlib": zlib_codec, "lzma": lzma_codec, "brotli": brotli_codec}
# The unpacked text stands in linecache under the file's own name: read_facts, inspect (also of classes),
# Triton and tracebacks find it there, without a file that eight ranks would race for. No modification time
# (None) keeps linecache from checking it against the file. The last line is short: a traceback may show it.
EXTRACTOR = """{coding}# Packed by build_submission.py; a run writes the program at the head of its train.log.
import {modules}
t = {decompress}.decode()
linecache.cache[__file__] = len(t), None, io.StringIO(t).readlines(), __file__
exec(compile(t, __file__, "exec"))
"""


def quoted(data: bytes) -> bytes:
    """A text literal, in a file that is read as latin-1, whose characters are the bytes.

    Between three quotes only these are escaped: the backslash, the carriage return, NUL (before a digit with
    all three digits of its own), and a quote that would end the text.
    """
    data = data.replace(b"\\", rb"\\").replace(b"\r", rb"\r")
    data = re.sub(rb"'(?='')|'\Z", rb"\\'", data)
    data = re.sub(rb"\0(?=[0-7])", rb"\\000", data).replace(b"\0", rb"\0")
    return b"'''" + data + b"'''"


def pack(text: str, codec: str, encoding: str) -> bytes:
    """A program that unpacks the text and runs it as `__main__`, of which `__file__` is the packed file."""
    data, undo = CODECS[codec](text.encode())
    modules = ["io", "linecache", codec]
    if encoding == "base85":
        payload, coding = b'base64.b85decode("' + base64.b85encode(data) + b'")', ""
        modules.append("base64")
    else:
        payload, coding = quoted(data) + b'.encode("latin-1")', "# coding: latin-1\n"
    program = EXTRACTOR.format(coding=coding, modules=", ".join(sorted(modules)), decompress=undo)
    return program.encode().replace(b"\0", payload)


def packings(text: str) -> dict[str, bytes]:
    """ "codec, encoding" -> program, the smallest first."""
    made = {
        f"{codec}, {encoding}": pack(text, codec, encoding)
        for codec, encoding in itertools.product(CODECS, ("base85", "latin-1"))
    }
    return dict(sorted(made.items(), key=lambda item: len(item[1])))


# ---------------------------------------------------------------------------------------- the stages


class Stage(NamedTuple):
    """A program and the text that runs in it: the same, unless it is packed."""

    name: str
    program: bytes
    text: str


class Stages(NamedTuple):
    """What was made for one recipe."""

    made: dict[str, Stage]  # by name, the source first
    folded: Folded | None
    packed: dict[str, int]  # "codec, encoding" -> bytes, the smallest first
    faults: dict[str, str]  # why the next stage is not among them


def make_stages(source: str, recipe: Recipe, until: str, packing: str = "") -> Stages:
    """All stages up to `until` or to a fault; the packing is the smallest unless named. Raises UserError."""
    made, folded, packed, text = {"source": Stage("source", source.encode(), source)}, None, {}, ""
    for name in STAGES[: STAGES.index(until) + 1]:
        try:
            if name == "frozen":
                text = freeze(source, recipe)
            elif name == "folded":
                folded = fold(source, recipe)
                text = set_constants(ast.unparse(folded.tree) + "\n", {"SOURCE_STAGE": "'folded'"})
            elif name == "minified":
                text = minify(set_constants(text, {"SOURCE_STAGE": "'minified'"}))
            else:
                text = staged(text, "minified", "packed")
            if unknown := undefined_names(text):
                raise BuildError(f"it reads names that nothing defines: {', '.join(unknown)}")
        except BuildError as e:
            return Stages(made, folded, packed, {name: str(e)})
        program = text.encode()
        if name == "packed":
            programs = packings(text)
            packed = {kind: len(made_) for kind, made_ in programs.items()}
            program = programs[packing or next(iter(packed))]
        made[name] = Stage(name, program, text)
    return Stages(made, folded, packed, {})


def staged(text: str, old: str, new: str) -> str:
    """The minified text with the name of another stage; its constant has no name any more."""
    text, count = re.subn(rf"(['\"]){old}\1", rf"\1{new}\1", text)
    if count != 1:
        raise BuildError(f"its text names the stage {count} times, want once")
    return text


# ------------------------------------------------------------------------------------ the toy corpus

SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]


def toy_sentences(count: int, seed: int) -> list[str]:
    """Sentences of made-up words; a few hold letters that a small tokenizer spells in bytes."""
    rng, sentences = random.Random(seed), []
    for _ in range(count):
        words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(rng.randint(4, 20))]
        words += rng.choices(["café", "Ω", "2026"], k=rng.random() < 0.1)
        sentences.append(" ".join(words).capitalize() + ".")
    return sentences


def write_shard(path: Path, words: np.ndarray) -> None:
    """A file in the challenge's form: 256 int32, then the words as uint16."""
    header = np.zeros(train_gpt.HEADER_BYTES // 4, "<i4")
    header[:3] = train_gpt.MAGIC, train_gpt.VERSION, len(words)
    path.write_bytes(header.tobytes() + words.astype("<u2").tobytes())


def make_toy_data(folder: Path, caseops: bool) -> dict[str, str]:
    """Write a tokenizer of 320 pieces, a training shard and a validation shard; the knobs that name them.

    For CaseOps text there are marks in the sentences, and a sidecar whose figures are no text's bytes: both
    programs read the same ones.
    """
    folder.mkdir()
    marks = train_gpt.CASE_MARKS if caseops else ""
    sentences = {"train": toy_sentences(400, seed=1), "val": toy_sentences(40, seed=2)}
    if caseops:
        sentences = {split: [marks[0] + text.lower() for text in texts] for split, texts in sentences.items()}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences["train"]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=int(train_gpt.tiny_env()["VOCAB_SIZE"]),
        byte_fallback=True,
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
        **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3},
        **({"user_defined_symbols": list(marks)} if caseops else {}),
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for split, texts in sentences.items():
        ids = np.array([i for text in texts for i in (tokenizer.bos_id(), *tokenizer.encode(text))])
        write_shard(folder / f"fineweb_{split}_000000.bin", ids)
    if caseops:
        figures = np.where(ids == tokenizer.bos_id(), 0, 1 + ids % 5)
        write_shard(folder / "fineweb_val_bytes_000000.bin", figures)
    return {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(folder / "tokenizer.model")}


# ------------------------------------------------------------------------------------------- running

INHERITED = ("HOME", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")  # of the environment, and no knob
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "LANG": "C.UTF-8"}


def start_runner() -> subprocess.Popen[str]:
    """A process that imports torch and waits for `run_programs`; it may do so while stages are made."""
    code = "import build_submission; build_submission.run_jobs()"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=bare_env(),
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def bare_env() -> dict[str, str]:
    return {name: os.environ[name] for name in INHERITED if name in os.environ} | ONE_THREAD


def run_programs(
    programs: dict[Path, dict[str, str]], tick: float, runner: subprocess.Popen[str] | None = None
) -> dict[str, str]:
    """Run programs at once, each in its own folder with nothing but its own knobs; folder -> what went wrong.

    One process, the runner, imports torch and forks a child for each: a child shares the import and nothing
    else. Operators, signal handlers, caches and `__main__` are its own, as in a process started for it.
    Without a PATH they find no compiler, so what they measure of this machine decides nothing. Raises
    BuildError.
    """
    jobs = [
        {"program": str(p), "env": {**bare_env(), "PATH": "", **env}, "limit": TWIN_SECONDS, "tick": tick}
        for p, env in programs.items()
    ]
    runner = runner or start_runner()
    told, complaint = runner.communicate(json.dumps(jobs))
    if runner.returncode:
        raise BuildError(f"the proof could not run: {last_line(told + complaint)}")
    faults = {}
    for path, status in zip(programs, json.loads(told), strict=True):
        if status == -signal.SIGALRM:
            faults[path.parent.name] = f"it still runs after {TWIN_SECONDS} s"
        elif status:
            output = path.with_name("output.txt").read_text(errors="replace")
            faults[path.parent.name] = f"it ends with status {status}: {last_line(output)}"
    return faults


def run_jobs() -> None:
    """The process that forks: jobs as JSON on stdin -> their exit statuses as JSON on stdout.

    It runs no operator of torch, so there is no thread that a fork would lose.
    """
    importlib.import_module("torch._dynamo")  # or each program imports it for itself, in 0.7 s
    gc.freeze()  # or each child, when it ends, spends half a second on the garbage of the imports
    children = [start_job(job) for job in json.load(sys.stdin)]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))


def start_job(job: dict) -> int:
    """Fork a child that runs a program as `python program` would; its process id. The child never returns.

    Its clock ticks when it is looked at: two equal programs read the same times. Seconds beyond the job's
    limit end it with SIGALRM, for which nothing in a program listens.
    """
    child = os.fork()
    if child:
        return child
    program, looks = Path(job["program"]), itertools.count()
    output = os.open(program.with_name("output.txt"), os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.chdir(program.parent)
    os.environ.clear()
    os.environ.update(job["env"])
    time.perf_counter = lambda: next(looks) * job["tick"]
    signal.alarm(job["limit"])
    runpy.run_path(str(program), run_name="__main__")
    sys.exit()


def last_line(text: str) -> str:
    """What a program said last, before triton's bindings list what they leaked, as they do after errors."""
    lines = [line for line in text.split("\nnanobind: ")[0].splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


# ----------------------------------------------------------------------------------------- the proof


class Proof(NamedTuple):
    """What running the twins has shown."""

    faults: dict[str, str]  # stage -> in what it is not the source
    lines: int  # of the trace
    sha256: str


def prove(
    twins: dict[str, Stage], tiny: Recipe, folder: Path, runner: subprocess.Popen[str] | None = None
) -> Proof:
    """Run every twin and compare with the source what they trace and what they say of themselves.

    Only the source is told the recipe; the others have it in them. All are told another seed, which must be
    heard. Raises BuildError where the source itself does not run, or traces too little to compare with.
    """
    told = make_toy_data(folder / "toy", tiny.cfg.data.caseops)
    told |= {"RUN_DIR": "run", "SEED": str((tiny.cfg.budget.seed + 1) % 2**31)}
    programs = {}
    for name, twin in twins.items():
        path = folder / name / PROGRAM
        path.parent.mkdir()
        path.write_bytes(twin.program)
        programs[path] = (tiny.env if name == "source" else {}) | told
    faults = run_programs(programs, tick_of(tiny), runner)
    if "source" in faults:
        raise BuildError(f"the source does not run as a tiny twin: {faults['source']}")
    trace = read_trace(folder / "source")
    if b'"artifact_sha256"' not in trace or b'"score"' not in trace:
        raise BuildError("the source traced no artifact or no score, so there is nothing to compare with")
    source = json.loads((folder / "source" / "run" / "results.json").read_text())
    for name, twin in twins.items():
        fault = faults.get(name) or trace_fault(read_trace(folder / name), trace)
        if fault := fault or results_fault(twin, folder / name / "run" / "results.json", source):
            faults[name] = fault
    return Proof(faults, trace.count(b"\n"), sha256(trace))


def read_trace(folder: Path) -> bytes:
    """What a twin traced; nothing where it ended well and yet wrote nothing."""
    path = folder / "run" / "trace.jsonl"
    return path.read_bytes() if path.exists() else b""


def trace_fault(trace: bytes, source: bytes) -> str:
    """The first line that differs, in both; nothing where they are equal byte for byte."""
    if trace == source:
        return ""
    pairs = itertools.zip_longest(source.splitlines(), trace.splitlines())
    number, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    shown = [line.decode(errors="replace") if line is not None else "no line" for line in (theirs, ours)]
    return f"line {number} of trace.jsonl is {shown[0]} from the source and {shown[1]} from it"


def results_fault(twin: Stage, path: Path, source: dict) -> str:
    """In what a program does not tell its stage, text and size right, or has other knobs than the source."""
    results = json.loads(path.read_text())
    pairs = {
        "stage": (results["stage"], twin.name),
        "source_sha256": (results["source_sha256"], sha256(twin.text.encode())),
        "bytes of code": (results["bytes"]["code"], len(twin.program)),
        "knobs": (results["config"], source["config"]),
        "config_hash": (results["config_hash"], source["config_hash"]),
    }
    told = [f"it reports other {k}: {differing(a, b)}" for k, (a, b) in pairs.items() if a != b]
    return told[0] if told else ""


def differing(found: object, wanted: object) -> str:
    """`found, want wanted`, of two dicts only the values that are not equal."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
        found, wanted = ({name: side.get(name) for name in names} for side in (found, wanted))
    return f"{found!r}, want {wanted!r}"


# ------------------------------------------------------------------------------------ what is shipped


class Gate(NamedTuple):
    """A condition on knobs that came to another value in the recipe than in its twin."""

    line: int
    condition: str
    recipe: bool
    twin: bool


def differing_gates(source: str, recipe: Folded, twin: Folded) -> list[Gate]:
    """The conditions whose other branch was proven: what the twin's run says nothing about."""
    lines, found = source.splitlines(), []
    for at in sorted(recipe.gates.keys() & twin.gates.keys()):
        if recipe.gates[at] != twin.gates[at]:
            line, column, last, end = at
            text = lines[line - 1].encode()[column : end if last == line else None].decode()
            found.append(Gate(line, text, recipe.gates[at], twin.gates[at]))
    return found


def literal_pairs(a: ast.AST, b: ast.AST, knob: str = "") -> Iterator[tuple[str, object, object]]:
    """(knob, value, value) wherever literals of two trees differ. Raises BuildError where more does."""
    label = getattr(a, "knob", "")
    knob = label if label and label == getattr(b, "knob", "") else knob
    if same_form(a, b):
        for x, y in zip(children(a), children(b), strict=True):
            yield from literal_pairs(x, y, knob)
        return
    here, there = literal(a), literal(b)
    if not (here and there):
        raise BuildError(f"{ast.unparse(a)[:60]!r} is not {ast.unparse(b)[:60]!r}")
    yield knob, here[0], there[0]


def same_form(a: ast.AST, b: ast.AST) -> bool:
    """Whether two nodes are equal but for the nodes below them, of which they have as many in each field."""
    return type(a) is type(b) and all(
        form_of(getattr(a, field, None)) == form_of(getattr(b, field, None)) for field in a._fields
    )


def form_of(field: object) -> object:
    """What of a field is no node: the length of a list, a name, the type and the text of a constant."""
    if isinstance(field, list):
        return [form_of(part) for part in field]
    return "node" if isinstance(field, ast.AST) else (type(field), repr(field))


def shipped_fault(name: str, stages: Stages, twins: Stages, recipe: Recipe) -> str:
    """In what a shipped stage is not its proven twin with the recipe's own values; nothing where it is."""
    stage, twin = stages.made[name], twins.made[name]
    try:
        if name == "frozen":
            check_frozen(stage, twin, stages.made["source"])
        elif gates := differing_gates(stages.made["source"].text, stages.folded, twins.folded):
            check_definitions(stages.folded, twins.folded, gates)
        else:
            check_values(stage, twin, stages.folded, twins.folded)
        check_program(stage, recipe)
    except BuildError as e:
        return str(e)
    return ""


def check_frozen(stage: Stage, twin: Stage, source: Stage) -> None:
    constants = (*RECIPE_CONSTANTS, "SOURCE_STAGE")
    if without_constants(stage.text, RECIPE_CONSTANTS) != without_constants(twin.text, RECIPE_CONSTANTS):
        raise BuildError("it differs from its proven twin in more than the recipe")
    if without_constants(stage.text, constants) != without_constants(source.text, constants):
        raise BuildError("it differs from the source in more than three constants")


def check_values(stage: Stage, twin: Stage, recipe: Folded, tiny: Folded) -> None:
    """The texts differ where the folded trees do, in the same values, and there each is that of a knob."""
    wanted = list(literal_pairs(recipe.tree, tiny.tree))
    if nameless := [pair for pair in wanted if not pair[0]]:
        raise BuildError(f"it differs from its proven twin in a value that is of no knob: {nameless[0][1:]}")
    found = literal_pairs(ast.parse(stage.text), ast.parse(twin.text))
    if repr([pair[1:] for pair in found]) != repr([pair[1:] for pair in wanted]):
        raise BuildError("it differs from its proven twin in other values than those of the knobs")


def check_definitions(recipe: Folded, tiny: Folded, gates: list[Gate]) -> None:
    """Where gates differ, those definitions do that hold one, or call what has lost other parameters."""
    ours, theirs = (definitions(folded) for folded in (recipe, tiny))
    both = ours.keys() & theirs.keys()
    called = {name for name in both if parameters(ours[name]) != parameters(theirs[name])}
    for name in sorted(both & set(unproven(recipe, tiny))):
        first, last = ours[name].lineno, ours[name].end_lineno
        held = any(first <= gate.line <= last for gate in gates)
        if not (held or called & globals_read(ours[name])):
            raise BuildError(f"{name} differs from its proven twin in more than the values of knobs")


def parameters(node: ast.stmt) -> str:
    return ast.unparse(node.args) if isinstance(node, FUNCTIONS) else ""


def unproven(recipe: Folded, tiny: Folded) -> list[str]:
    """The definitions that are not the twin's up to the values of knobs: its run does not show them."""
    ours, theirs = (definitions(folded) for folded in (recipe, tiny))
    other = [name for name in ours if name not in theirs or not is_twin(ours[name], theirs[name])]
    return [*other, *(name for name in theirs if name not in ours)]


def definitions(folded: Folded) -> dict[str, ast.stmt]:
    return {name: node for node in folded.tree.body for name in names_defined(node)}


def is_twin(a: ast.AST, b: ast.AST) -> bool:
    try:
        return all(knob for knob, _, _ in literal_pairs(a, b))
    except BuildError:
        return False


def check_program(stage: Stage, recipe: Recipe) -> None:
    """Load the program itself and ask for its configuration and its text. Raises BuildError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PROGRAM
        path.write_bytes(stage.program)
        scope = runpy.run_path(str(path), run_name=stage.name)
        text = "".join(linecache.getlines(scope["knob_values"].__code__.co_filename))
    read = scope["read_config" if stage.name == "frozen" else "read_live"]
    try:
        values = scope["knob_values"](read(scope["thawed"]({})))
    except (KeyError, TypeError, ValueError) as e:
        raise BuildError(f"it cannot read its own recipe: {type(e).__name__}: {e}") from e
    wanted = train_gpt.knob_values(recipe.cfg)
    if values != wanted:
        raise BuildError(f"it has other knobs: {differing(values, wanted)}")
    if text != stage.text:
        raise BuildError("it unpacks to another text than was packed")


# ------------------------------------------------------------------------------------------- weights


class Weights(NamedTuple):
    """An artifact that belongs to the recipe."""

    blob: bytes
    tensors: int
    differ: dict[str, list[str]]  # live knobs -> their value in training, and in the recipe


def read_weights(path: Path, recipe: Recipe) -> Weights:
    """Decode an artifact with the recipe's model and codecs. Raises UserError if it does not belong."""
    cfg = recipe.cfg
    train_gpt.artifact_env(path, train_gpt.knob_values(cfg))
    blob = path.read_bytes()
    artifact = train_gpt.open_artifact(blob, cfg, alone(), str(path))
    differ = trained_otherwise(path, artifact.config_hash, cfg)
    foreign = [name for name in differ if name not in train_gpt.LIVE_KNOBS]
    if foreign:
        told = [f"{name} (trained with {differ[name][0]}, now {differ[name][1]})" for name in foreign]
        raise UserError(f"{path} belongs to another configuration: {', '.join(told)}")
    return Weights(blob, len(artifact.tensors), differ)


def alone() -> train_gpt.World:
    """One rank on the CPU that writes nothing."""
    journal = train_gpt.Journal(None)
    return train_gpt.World(0, 1, torch.device("cpu"), torch.float32, False, journal, Path())


def trained_otherwise(path: Path, config_hash: str, cfg: train_gpt.Config) -> dict[str, list[str]]:
    """Knobs in which the run that trained an artifact differs: name -> [there, here].

    Their names are in the run's results.json. Raises UserError where that is not beside the artifact.
    """
    if config_hash == train_gpt.config_hash(cfg):
        return {}
    try:
        results = json.loads(path.with_name("results.json").read_text())
        theirs = results["config"] if results["config_hash"] == config_hash else None
    except (OSError, ValueError, KeyError, TypeError):
        theirs = None
    if not isinstance(theirs, dict):
        raise UserError(
            f"{path} was trained under another configuration (hash {config_hash}, now "
            f"{train_gpt.config_hash(cfg)}), and the results.json of its run, which tells the knobs, is not "
            f"beside it"
        )
    mine = train_gpt.identity(cfg)
    return {k: [theirs.get(k, "unset"), text] for k, text in mine.items() if theirs.get(k, "unset") != text}


# ------------------------------------------------------------------------------------ the submission


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def refuse_other_files(out: Path) -> None:
    """Raise UserError unless the folder is new, empty, or an earlier build."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    others = sorted({path.name for path in out.glob("*")} - {PROGRAM, WEIGHTS, REPORT})
    if others:
        told = ", ".join(others[:3])
        raise UserError(f"--out {out} holds other files ({told}); name a new or empty folder")


def write_submission(out: Path, files: dict[str, bytes], largest: dict[str, int]) -> None:
    """Put all files into place at once, or none. Raises BuildError when they are over the limit."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".build_") as folder:
        new = Path(folder) / "new"
        new.mkdir()
        for name, data in files.items():
            (new / name).write_bytes(data)
        total = counted(new)["total"]
        if total > train_gpt.SIZE_LIMIT:
            told = ", ".join(f"{name} {size:,}" for name, size in list(largest.items())[:3])
            raise BuildError(
                f"code and weights are {total:,} bytes, {total - train_gpt.SIZE_LIMIT:,} above "
                f"{train_gpt.SIZE_LIMIT:,} (largest: {told}); lower MATRIX_BITS or EMBED_BITS, or train a "
                f"smaller model"
            )
        if out.exists():
            out.rename(Path(folder) / "old")
        new.rename(out)


def largest_items(program: bytes, weights: Weights | None) -> dict[str, int]:
    """What takes the bytes of a submission, the largest first: the code, and the streams of the weights."""
    items = {"code": len(program)}
    if weights:
        header = train_gpt.read_artifact_header(weights.blob, "the weights")[0]
        items |= {kind: size for kind, _, size in header["streams"]}
    return dict(sorted(items.items(), key=lambda item: -item[1]))


def counted(folder: Path) -> dict[str, int]:
    """Bytes that the challenge counts, as the disk has them; build.json is for people and is left out."""
    sizes = {name: (folder / name).stat().st_size for name in (PROGRAM, WEIGHTS) if (folder / name).exists()}
    return {"code": sizes[PROGRAM], "weights": sizes.get(WEIGHTS, 0), "total": sum(sizes.values())}


def versions() -> dict[str, str]:
    modules = {"torch": torch, "numpy": np, "brotli": brotli, "sentencepiece": sentencepiece}
    return {"python": platform.python_version()} | {name: m.__version__ for name, m in modules.items()}


class Build(NamedTuple):
    """All that is known when a submission is about to be written."""

    recipe: Recipe
    stages: Stages
    proof: Proof
    gates: list[Gate]
    unproven: list[str]  # the definitions that these gates make differ from the twin's
    faults: dict[str, str]  # the first stage that is left out, and why
    weights: Weights | None

    @property
    def shipped(self) -> Stage:
        """The last stage before a fault."""
        good = itertools.takewhile(lambda name: name not in self.faults, self.stages.made)
        return self.stages.made[list(good)[-1]]


def report_of(made: Build) -> dict[str, object]:
    """build.json: what was built from what, and what was found true. No times, no paths."""
    programs = {name: stage.program for name, stage in made.stages.made.items()}
    folded, minified = made.stages.made.get("folded"), made.stages.made.get("minified")
    largest = definition_sizes(folded.text, minified.text) if minified else {}
    return {
        "stage": made.shipped.name,
        "left out": made.faults,
        "stages": {name: {"bytes": len(p), "sha256": sha256(p)} for name, p in programs.items()},
        "packed_bytes": made.stages.packed,
        "largest definitions": dict(list(largest.items())[:15]),
        "dropped": made.stages.folded.dropped if made.stages.folded else [],
        "config_hash": train_gpt.config_hash(made.recipe.cfg),
        "frozen": made.recipe.frozen,
        "live": made.recipe.live,
        "checks": checks(made),
        "versions": versions(),
    }


def checks(made: Build) -> dict[str, object]:
    """What was found true of the shipped stage and of those before it."""
    names = list(made.stages.made)
    proven = names[: names.index(made.shipped.name) + 1]
    found = {
        "equal traces": {"programs": proven, "lines": made.proof.lines, "sha256": made.proof.sha256},
        "undefined names": "none, in any scope of any stage",
        "shipped file": "its proven twin but for the values of knobs",
        "its configuration": "the env file's",
        "gates that the twin has otherwise": [gate._asdict() for gate in made.gates],
        "definitions that the twin has otherwise": made.unproven,
    }
    if made.weights:
        told = {"sha256": sha256(made.weights.blob), "tensors decoded": made.weights.tensors}
        found["weights"] = told | {"live knobs that differ": made.weights.differ}
    return found


def print_table(made: Build, out: Path) -> None:
    """The stages, then what is counted, as the disk has it, against the limit."""
    sizes = counted(out)
    rows = [(name, len(stage.program), "") for name, stage in made.stages.made.items()]
    if made.stages.packed:
        told = (f"{kind} {size:,}" for kind, size in made.stages.packed.items())
        rows[-1] = (*rows[-1][:2], "; ".join(told))
    rows += [
        ("code", sizes["code"], f"{PROGRAM}, {made.shipped.name}"),
        ("weights", sizes["weights"], WEIGHTS if sizes["weights"] else "none given"),
        ("total", sizes["total"], ""),
        ("limit", train_gpt.SIZE_LIMIT, ""),
        ("left", train_gpt.SIZE_LIMIT - sizes["total"], f"in {out}"),
    ]
    for name, size, note in rows:
        print(f"  {name:<8}{size:>14,}  {note}".rstrip())


# ---------------------------------------------------------------------------------------------- main


def build(env_file: Path, weights_file: Path | None, out: Path, until: str) -> None:
    """From an env file to a folder that can be handed in. Raises UserError and BuildError."""
    env = read_env_file(env_file)
    recipe = make_recipe(env)
    for doubt in train_gpt.near_misses(env):
        warn(doubt)
    tiny = tiny_twin(recipe)
    weights = read_weights(weights_file, recipe) if weights_file else None
    for name, (there, here) in weights.differ.items() if weights else ():
        print(f"note: the weights were trained with {name}={there}, the recipe says {here}")
    refuse_other_files(out)
    made = prove_stages(SOURCE.read_text(encoding="utf-8"), recipe, tiny, until)._replace(weights=weights)
    for name, fault in made.faults.items():
        warn(f"the {name} stage is left out, {made.shipped.name} is shipped instead: {fault}")
    for gate in made.gates:
        warn(f"line {gate.line}: {gate.condition} is {gate.recipe}, in the proven twin {gate.twin}")
    report = report_of(made)
    print(f"proved: {', '.join(report['checks']['equal traces']['programs'])} write the same trace.jsonl")
    files = {PROGRAM: made.shipped.program} | ({WEIGHTS: weights.blob} if weights else {})
    report["bytes"] = {"total": sum(map(len, files.values())), "limit": train_gpt.SIZE_LIMIT}
    files[REPORT] = json.dumps(report, indent=1).encode() + b"\n"
    write_submission(out, files, largest_items(made.shipped.program, weights))
    print_table(made, out)


def prove_stages(source: str, recipe: Recipe, tiny: Recipe, until: str) -> Build:
    """Make every stage and its twin, and find the first that does not hold. Raises BuildError if frozen."""
    with tempfile.TemporaryDirectory() as folder, start_runner() as runner:
        try:
            stages = make_stages(source, recipe, until)
            twins = make_stages(source, tiny, until, next(iter(stages.packed), ""))
            proof = prove(twins.made, tiny, Path(folder), runner)
        finally:
            runner.kill()  # where it was not needed
    both = (stages.folded, twins.folded) if stages.folded and twins.folded else ()
    gates = differing_gates(source, *both) if both else []
    made = Build(recipe, stages, proof, gates, unproven(*both) if gates else [], {}, None)
    for name in STAGES[: STAGES.index(until) + 1]:
        fault = stages.faults.get(name) or twins.faults.get(name) or proof.faults.get(name)
        if fault := fault or shipped_fault(name, stages, twins, recipe):
            if name == STAGES[0]:
                raise BuildError(f"the {name} program is not the source: {fault}")
            return made._replace(faults={name: fault})
    return made


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports a fault as UserError, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description="Freeze, strip, pack and prove train_gpt.py.", allow_abbrev=False)
    add = parser.add_argument
    add("env_file", metavar="ENVFILE", type=Path, help="the recipe: KEY=value lines")
    add("--weights", type=Path, metavar="MODEL", help="model.ptz of a run, to ship and to count")
    add("--out", required=True, type=Path, metavar="FOLDER", help="new, empty or an earlier build")
    add("--until", choices=STAGES, default=STAGES[-1], help="the last stage to make")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Build; 0, or 1 or 2 with one line on stderr, or 130 when interrupted."""
    try:
        words = read_arguments(argv)
        build(words.env_file, words.weights, words.out.absolute(), words.until)
    except BuildError as e:
        message, status = f"{e}; nothing was written", 1
    except UserError as e:
        message, status = str(e), 2
    except OSError as e:
        message, status = f"{e.filename or 'the system'}: {e.strerror or e}", 2
    except KeyboardInterrupt:
        message, status = "interrupted; nothing was written", 130
    else:
        return 0
    print(f"build_submission.py: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
