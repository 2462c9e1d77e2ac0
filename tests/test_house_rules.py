"""Rules that keep the method files readable and copyable, checked on their syntax trees."""

import ast
import io
import re
import sys
import textwrap
import tokenize
import types
from pathlib import Path

import pytest
import torch
from conftest import METHODS

ROOT = Path(__file__).parent.parent
HEADINGS = ("Paper", "Idea", "Equations", "Paper vs this code", "Run", "Result", "Copy")
PACKAGES = {"torch", "torchaudio", "numpy", "tqdm", "soundfile", "common"}
OPTIONAL = {"matplotlib", "safetensors", "transformers"}  # only inside the function that uses it
BOUNDARY = "# ---- copy boundary"


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def source(name):
    return (ROOT / f"{name}.py").read_text()


def docstring(name):
    return ast.get_docstring(ast.parse(source(name)))


def ids(name):
    """Rows of the table "Paper vs this code": id -> topic."""
    table = docstring(name).split("Paper vs this code\n")[1].split("\nRun\n")[0]
    return dict(re.findall(r"^([DS]\d+)  (\S+(?: \S+)*)", table, re.M))


def test_top_level_holds_the_files_of_the_card_and_no_others():
    card = {"README.md", "requirements.txt", "common.py", "tests"} | {f"{s}.py" for s in METHODS}
    ignored = {"runs", "__pycache__"}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - ignored
    assert found == card


def test_the_licence_travels_with_the_file(name):
    assert source(name).startswith("# SPDX-License-Identifier: MIT\n")


def test_headings_stand_in_order(name):
    lines = docstring(name).splitlines()
    places = [lines.index(heading) for heading in HEADINGS]
    assert places == sorted(places)


def test_only_the_allowed_packages_are_imported_and_nothing_else_is_required():
    for name in (*METHODS, "common"):
        tree = ast.parse(source(name))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for package in (n.split(".")[0] for n in names):
                optional = OPTIONAL if node not in tree.body else set()
                allowed = PACKAGES | optional | set(sys.stdlib_module_names)
                assert package in allowed, (name, package)
    lines = [re.split(r"[=<>#\s]", line)[0] for line in (ROOT / "requirements.txt").open()]
    assert set(filter(None, lines)) == PACKAGES - {"common"} | {"pytest"}


def test_student_and_loss_need_torch_only(name):
    head, boundary, _ = source(name).partition(BOUNDARY)
    assert boundary
    body = ast.parse(head).body
    body = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
    used = {n.id for node in body for n in ast.walk(node) if isinstance(n, ast.Name)}
    assert not used & {"common", "InputError", "tqdm", "torchaudio", "np", "soundfile"}


def test_example_under_copy_runs_pasted_alone_behind_the_part_above_the_boundary(name):
    """With torch alone; it takes gradients of a finite loss to the student.

    Of 7 frames where the example has 49, which take longer.
    """
    lines = source(name).partition(BOUNDARY)[0].splitlines()
    foreign = ("import common", "from common", "from tqdm", "import numpy", "import torchaudio")
    alone = types.ModuleType("alone")
    sys.modules["alone"] = alone  # where dataclasses look for themselves
    exec("\n".join(line for line in lines if not line.startswith(foreign)), alone.__dict__)
    torch.manual_seed(0)
    example = docstring(name).split("Copy\n----\n")[1].split("\n\n", 1)[1]
    for size, less in (("16000", "2320"), ("9000", "1300"), ("49", "7")):
        example = re.sub(rf"\b{size}\b", less, example)
    exec(textwrap.dedent(example), alone.__dict__)
    assert torch.isfinite(alone.loss)
    weights = [p for p in alone.student.parameters() if p.grad is not None]
    assert len(weights) > 20 and all(torch.isfinite(p.grad).all() for p in weights)


def names_used(tree):
    """Names and attributes in the code of a file: no imports, no docstrings."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


TEXT_TEACHER = {"load_text_teacher"}  # a teacher, and so in common.py, though PAD alone has one


def test_each_name_of_common_has_two_users():
    """The code of two scripts, or common.py itself outside of the definition."""
    body = ast.parse(source("common")).body
    names_of = {node: names_used(node) for node in body}
    defined = {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    scripts = [names_used(ast.parse(source(name))) for name in METHODS]
    for name in defined.keys() - TEXT_TEACHER:
        inside = any(name in names_of[node] for node in body if node is not defined[name])
        users = sum(name in names for names in scripts)
        assert inside or users >= 2, f"{name} has {users} users"


def test_common_keeps_its_size():
    """Comments and docstrings aside: 14,000 tokens, 2,800 for people's files, 400 for GPUs."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    skipped += (tokenize.ENCODING, tokenize.ENDMARKER)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {
        node.body[0].lineno
        for node in ast.walk(ast.parse(source("common")))
        if isinstance(node, documented) and ast.get_docstring(node) is not None
    }
    tokens = tokenize.generate_tokens(io.StringIO(source("common")).readline)
    tokens = [token for token in tokens if token.type not in skipped]
    tokens = [x for x in tokens if x.type != tokenize.STRING or x.start[0] not in docs]
    assert len(tokens) < 17_200


def test_common_knows_no_method():
    """No branch, name or import of common depends on a method."""
    tree = ast.parse(source("common"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            text = node.id if isinstance(node, ast.Name) else node.attr
            assert text.lower() not in METHODS
        if isinstance(node, ast.Compare):
            words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            assert not words & set(METHODS)


def test_no_function_reads_a_global_that_is_not_constant():
    for name in (*METHODS, "common"):
        for node in ast.parse(source(name)).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            for target in targets:
                constant = re.fullmatch(r"_?[A-Z][A-Za-z0-9_]*", ast.unparse(target))
                assert constant, (name, ast.unparse(target))


def test_equation_numbers_stand_in_docstring_code_and_tests(name):
    numbers = set(re.findall(r"^    \((\d+)\)  ", docstring(name), re.M))
    assert numbers
    code = source(name).split('"""', 2)[2]
    tests = (ROOT / "tests" / f"test_{name}.py").read_text()
    for number in numbers:
        assert re.search(rf"Eq\. {number}\b", code), number
        assert re.search(rf"def test_(\w+_)?eq{number}_", tests), number


def test_deviation_ids_stand_in_the_code(name):
    rows = ids(name)
    assert rows and sorted(rows) == sorted(set(rows))
    code = source(name).split('"""', 2)[2]
    for row in rows:
        assert re.search(rf"\b{row}\b", code), f"{row} is in the table but not at its line"
    for row in set(re.findall(r"\b[DS]\d+\b", code)):
        assert row in rows, f"{row} is in the code but not in the table"


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 330 and max(map(len, lines)) <= 125
    assert len(" ".join(lines).split()) <= 5500


def test_every_config_field_has_its_source_behind_it(name):
    body = re.search(r"class Config:\n(.*?)\n\n", source(name), re.S)[1]
    for line in body.splitlines():
        assert re.fullmatch(r"    \w+: .+ = .+  # .+", line), line


def test_shared_blocks_are_identical():
    """What every file repeats on purpose is letter for letter the same; names the odd one out."""
    shared = ("ScaleGradient", "ConvLayer", "FeatureExtractor", "PositionalConv", "learning_rate")
    blocks = {}
    for name in METHODS:
        for node in ast.parse(source(name)).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in shared:
                text = ast.get_source_segment(source(name), node).replace(name, "METHOD")
                blocks.setdefault(node.name, {}).setdefault(text, []).append(name)
    for block, versions in blocks.items():
        assert len(versions) == 1, f"{block} differs between {list(versions.values())}"


def test_nothing_of_this_workplace_is_named():
    patterns = ("*.py", "*.md", "*.txt", ".github/*.md")
    names = [name for pattern in patterns for name in ROOT.glob(pattern)]
    for path in [*names, *(ROOT / "tests").glob("*.py"), ROOT / ".ci" / "run"]:
        text = path.read_text() if path.name != Path(__file__).name else ""
        for word in ("/work/", "pypi-more", "localhost", "../shared"):
            assert word not in text, (path.name, word)
