"""Documentation is run, or at least parsed: what it shows must exist and work."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tiny_lm

import comoe
from comoe.cli import app

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import update_readme  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[pytest.param]:
    return [
        pytest.param(code, id=f"{page.name}-{number}")
        for page in PAGES
        for number, (name, code) in enumerate(BLOCK.findall(page.read_text()))
        if name == language
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_use_what_exists(code):
    """They parse, and every `from x import y` and comoe.z in them is there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("comoe"):
            module = __import__(node.module, fromlist=["*"])
            assert all(hasattr(module, alias.name) for alias in node.names)
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "comoe"
        ):
            assert hasattr(comoe, node.attr)


def test_readme_python_runs(tmp_path, monkeypatch, capsys):
    """With a tiny model in place of the one that the page names."""
    (code,) = [c for name, c in BLOCK.findall((ROOT / "README.md").read_text()) if name == "python"]
    tiny_lm.save_qwen3_moe(tmp_path / "Qwen3-30B-A3B")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert 0 < float(capsys.readouterr().out.splitlines()[-1]) <= 16


@pytest.mark.parametrize("code", blocks("sh"))
def test_shell_blocks_use_commands_and_options_that_exist(code):
    import typer

    commands = typer.main.get_command(app).commands
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["comoe"]:
            known = {option for p in commands[words[1]].params for option in p.opts}
            used = [word for word in words[2:] if word.startswith("-")]
            assert set(used) <= known, line
        elif words[:1] == ["make"]:
            assert words[1] in targets, line
        elif words:
            assert words[0] in ("pip", "python", "git", "cd", "apt-get"), line


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_figures_are_those_measured():
    """When this fails: python bench/update_readme.py --only-table"""
    readme = (ROOT / "README.md").read_text()
    figures = json.loads(update_readme.RESULTS.read_text())
    assert readme == update_readme.with_table(readme, update_readme.table(figures))
    assert len(figures["rows"]) >= 4


def test_the_table_shows_every_row():
    row = {
        "memory": 12_500_000,
        "peak": 450_000_000,
        "baseline": 430_000_000,
        "bits_per_weight": 4.198,
        "tokens_per_second": 31.25,
        "perplexity": 12.345,
    }
    figures = {
        "command": "comoe demo --json",
        "date": "2026-01-01",
        "cpu": {"cores": 2, "model": "a CPU", "isa": "avx2", "load": 0.1},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "rows": [row],
        "plain": row | {"bits_per_weight": 16.0},
    }
    text = update_readme.table(figures)
    assert (
        "| 12.5 MB | 20.0 MB | 4.20 | 12.35 | 31.2 |" in text
        or "| 12.5 MB | 20.0 MB | 4.20 | 12.35 | 31.3 |" in text
    )
    assert "| plain transformers | 20.0 MB | 16.00 |" in text
    with pytest.raises(ValueError, match=r"README\.md: expected the lines"):
        update_readme.with_table("nothing", text)


@pytest.mark.parametrize("example", ["generate.py", "offload.py"])
def test_examples_run(example, tmp_path, monkeypatch, capsys):
    source = tiny_lm.save_qwen3_moe(tmp_path / "tiny")
    if example == "generate.py":
        source = comoe.pack(source, tmp_path / "packed")
    monkeypatch.setattr(
        sys, "argv", [example, str(source), "--memory", "60MB", "--max-tokens", "4"]
    )
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    out = capsys.readouterr().out
    assert (
        "--- the same tokens as before" in out
        if example == "offload.py"
        else out.count("tokens/s") == 2
    )
