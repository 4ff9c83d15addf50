"""What the documentation shows exists and runs."""

import re
import shlex
import subprocess
import sys
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from packaging.requirements import Requirement

from btinet.cli import _parser

CHECKOUT = Path(__file__).parents[2]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
OF_OTHER_PROGRAMS = {"--benchmark-only", "--check", "--no-compile", "--nproc-per-node", "--save-results"}
PERMISSIVE = ("MIT", "BSD", "APACHE", "PYTHON SOFTWARE FOUNDATION", "PSF", "HPND", "ISC", "ZLIB")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(parser: ArgumentParser) -> dict[str, set[str]]:
    """Every command, with its options."""
    found: dict[str, set[str]] = {}
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for name, sub in action.choices.items():
                deeper = commands(sub)
                found |= {f"{name} {key}".strip(): options for key, options in deeper.items()}
    own = {option for action in parser._actions for option in action.option_strings}
    return found or {"": own}


COMMANDS = commands(_parser())


def test_the_python_examples_of_the_readme_run(tmp_path: Path) -> None:
    code = "\n".join(blocks((CHECKOUT / "README.md").read_text(), "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "replaced by fused_" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    text = page.read_text()
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["btinet"]:
                continue
            command = next((name for name in COMMANDS if words[1:][: len(name.split())] == name.split()), None)
            assert command is not None, line
            used = {word.split("=")[0] for word in words if word.startswith("--")}
            assert used <= COMMANDS[command], line
    known = set().union(*COMMANDS.values()) | OF_OTHER_PROGRAMS
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))
    assert named <= known, named - known


def test_dependencies_have_permissive_licences() -> None:
    """Of everything that the package asks for, optional parts included."""
    for requirement in map(Requirement, requires("btinet-kernels") or []):
        if requirement.name == "btinet-kernels" or 'extra == "dev"' in str(requirement.marker):
            continue
        about = metadata(requirement.name)
        classified = [line for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
        said = " ".join([about.get("License-Expression") or "", *classified, (about.get("License") or "")[:100]])
        assert any(name in said.upper() for name in PERMISSIVE), f"{requirement.name}: {said}"
        assert "GPL" not in said.upper(), f"{requirement.name}: {said}"
