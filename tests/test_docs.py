"""The README and the pages of the site: their code runs as a reader would paste it, and their links lead somewhere.

The Python blocks of a page run one after the other in one namespace. A comment in front of a block says otherwise:
`<!-- test: alone -->` gives it a namespace of its own, `<!-- test: needs openvino -->` skips it where that is not
installed, `<!-- test: torchrun -->` runs it as a script, on two processes. A page that needs tensorflow runs in a
process of its own, since Keras has one backend a process.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
KINDS = ("python", "sh", "text")
MARKS = ("alone", "needs", "torchrun")

_BLOCK = re.compile(
    r"^(?:<!-- test: (?P<mark>\w+) ?(?P<package>\w*) -->\n)?```(?P<kind>.*)\n(?P<code>(?:.*\n)*?)```$", re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, what its mark says, and the line that it begins in."""

    page: Path
    line: int
    kind: str
    code: str
    mark: str
    package: str

    @property
    def source(self) -> str:
        """The code, such that a traceback tells the page's own lines."""
        return "\n" * self.line + self.code

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path, *kinds: str) -> list[Block]:
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("kind")) + 1
        found.append(Block(page, line, match["kind"], match["code"], match["mark"] or "", match["package"] or ""))
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)), f"{name(page)}: a block was not understood"
    return [block for block in found if not kinds or block.kind in kinds]


def pages_with(*kinds: str) -> list[Path]:
    return [page for page in PAGES if blocks_of(page, *kinds)]


def needs_tensorflow(page: Path) -> bool:
    return any(block.package == "tensorflow" for block in blocks_of(page, "python"))


def run(blocks: list[Block]) -> None:
    """Runs blocks in one namespace, but for those that stand alone."""
    shared: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        namespace = {"__name__": "__main__"} if block.mark == "alone" else shared
        exec(compile(block.source, str(block.page), "exec"), namespace)


def run_by_torchrun(block: Block, folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(block.source)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tests" / "run_and_leave.py"), str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, f"{block}:\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import atexit, os; atexit.register(os._exit, 9); print(__name__)", 0),
        ("print(__name__); assert False", 1),
        ("print(__name__); raise SystemExit(3)", 3),
    ],
)
def test_what_torchrun_runs_ends_as_its_script_does(code: str, status: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, str(ROOT / "tests" / "run_and_leave.py"), str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (status, "__main__\n"), result.stderr


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    for block in blocks_of(page):
        assert block.kind in KINDS, str(block)
        assert block.mark in ("", *MARKS), str(block)
        assert bool(block.package) == (block.mark == "needs"), str(block)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # torch.onnx's own
@pytest.mark.parametrize("page", [page for page in pages_with("python") if not needs_tensorflow(page)], ids=name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests) -> None:
    monkeypatch.chdir(tmp_path)
    runnable = []
    for block in blocks_of(page, "python"):
        if block.mark == "torchrun":
            run_by_torchrun(block, tmp_path)
        elif block.package and find_spec(block.package) is None:
            with subtests.test(msg=str(block)):
                pytest.skip(f"{block}: {block.package} is not installed")
        else:
            runnable.append(block)
    run(runnable)


@pytest.mark.parametrize("page", [page for page in pages_with("python") if needs_tensorflow(page)], ids=name)
def test_python_of_keras_runs(page: Path, tmp_path: Path) -> None:
    if find_spec("tensorflow") is None:
        pytest.skip("tensorflow is not installed")
    code = f"import sys, pathlib; sys.path.insert(0, {str(ROOT / 'tests')!r}); import test_docs\n"
    code += f"test_docs.run(test_docs.blocks_of(pathlib.Path({str(page)!r}), 'python'))\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def check_command(words: list[str], block: Block) -> None:
    """Asserts that what a line of a shell block names is there: a target, an extra, a module, a file."""
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets), f"{block}: {words}"
    elif program == "pip":
        assert arguments[0] == "install", f"{block}: {words}"
        project = (ROOT / "pyproject.toml").read_text()
        section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
        extras = re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)
        asked = re.findall(r"(?:quantkernels|\.)\[([\w,-]+)\]", " ".join(arguments))
        assert {extra for group in asked for extra in group.split(",")} <= set(extras), f"{block}: {words}"
    elif program == "python" and arguments[0] == "-m":
        assert find_spec(arguments[1]) is not None, f"{block}: {words}"
    elif program in ("python", "bash", "torchrun"):
        file = next(word for word in arguments if not word.startswith("-"))
        assert (ROOT / file).is_file() or file == "train.py", f"{block}: {words}"
    else:
        raise AssertionError(f"{block}: the test does not know `{program}`")


@pytest.mark.parametrize("page", pages_with("sh"), ids=name)
def test_shell_names_what_is_there(page: Path) -> None:
    commands = [(line, block) for block in blocks_of(page, "sh") for line in block.code.splitlines()]
    assert commands
    for line, block in commands:
        if words := shlex.split(line, comments=True):
            check_command(words, block)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file = target.partition("#")[0]
        if file and not re.match(r"https?:", target):
            generated = page.is_relative_to(ROOT / "docs") and "pictures/" in file
            assert generated or (page.parent / file).exists(), f"{name(page)}: {target}"


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(re.findall(r"^!\[", text, re.MULTILINE)) == 1


def test_pictures_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.syspath_prepend(ROOT / "docs")
    import pictures

    shown = {file for page in PAGES for file in re.findall(r"\(pictures/(\w+\.svg)\)", page.read_text())}
    drawn = pictures.drawn()
    assert shown == set(drawn)
    assert all(b"<path" in picture for picture in drawn.values())


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("mkdocs", "mkdocstrings", "material", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "site" / "pictures" / "grid.svg").is_file()
