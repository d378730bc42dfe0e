"""The tree is the architecture: import direction, line budget, and the README's commands."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data_tools", "bert_cpt", "launcher")
LINE_BUDGET = 6000


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("data_tools", {"bert_cpt", "launcher", "torch", "deepspeed", "transformers"}),
        ("bert_cpt", {"launcher"}),
    ],
)
def test_dependencies_point_one_way(package: str, forbidden: set[str]) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        assert not imports_of(path) & forbidden, path.name


def test_nothing_is_unpickled() -> None:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            names = imports_of(path)
            assert not names & {"pickle", "dill", "cloudpickle", "joblib"}, path.name
            text = path.read_text()
            assert "torch.load(" not in text, path.name
            assert "allow_pickle=True" not in text, path.name
            assert "trust_remote_code=True" not in text, path.name


def lines_of_code(path: Path) -> int:
    """Lines of code: no docstrings, comments, blank lines, or lines of brackets alone."""
    text = path.read_text()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout | {tokenize.OP, tokenize.ENDMARKER}:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


def test_the_library_stays_within_its_line_budget() -> None:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    lines = sorted(((lines_of_code(path), path.name) for path in paths), reverse=True)
    assert sum(number for number, _ in lines) < LINE_BUDGET, lines[:5]


def test_ci_runs_the_readme_test_command() -> None:
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if "venv" in line]
    tests = [line for line in commands if "pytest" in line]
    assert len(tests) == 1
    assert tests[0] in (ROOT / ".ci" / "run").read_text()


def test_source_files_are_ascii() -> None:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            assert path.read_text().isascii(), path.name
