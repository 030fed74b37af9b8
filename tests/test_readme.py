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
    assert readme == update_readme.with_tables(readme)
    shown = [name for _, name, *_ in update_readme.SECTION.findall(readme)]
    assert sorted(shown) == sorted(update_readme.TABLES)  # each once
    figures = json.loads((update_readme.RESULTS / "demo.json").read_text())
    assert len(figures["rows"]) >= 4


DEMO_ROW = {
    "memory": 12_500_000,
    "peak": 450_000_000,
    "baseline": 430_000_000,
    "bits_per_weight": 4.198,
    "tokens_per_second": 31.3,
    "perplexity": 12.345,
}
AT = {"threads": 2, "cpu": "a CPU", "date": "2026-01-01"}
SWITCH_ROW = {
    "budget": None,
    "peak_rss": 15_600_000_000,
    "mean_ms_per_token": 50.04,
    "encoder_ms": 900.4,
    "conditions": AT,
}
MADE_UP = {
    "demo.json": json.dumps(
        {
            "command": "comoe demo --json",
            "date": "2026-01-01",
            "cpu": {"cores": 2, "model": "a CPU", "isa": "avx2", "load": 0.1},
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
            "rows": [DEMO_ROW],
            "plain": DEMO_ROW | {"bits_per_weight": 16.0},
        }
    ),
    "switch_base_128.json": json.dumps(
        {
            "rows": [
                SWITCH_ROW | {"row": "plain"},
                {"row": "lru@4.7GB", "failed": "killed"},
                SWITCH_ROW
                | {
                    "row": "comoe@2.4GB",
                    "budget": 2_400_000_000,
                    "peak_rss": 2_350_000_000,
                    "plain_mean_ms_per_token": 75.06,
                    "bits_used": 3.456,
                    "demo_loss_percent": 2.34,
                },
            ]
        }
    ),
    "peers.csv": "run,case,peer,decode_tokens_per_second,prefill_tokens_per_second,perplexity,threads,cpu,date\n"
    "a,resident,comoe exact,99,99,,2,a CPU,2026-01-01\n"
    + "".join(f"b,resident,comoe exact,{speed},200,,2,a CPU,2026-01-02\n" for speed in (20, 30, 40))
    + "b,2 GiB,llama.cpp bf16,1.5,134,,2,a CPU,2026-01-02\n"
    "b,perplexity,comoe exact,,,11.25,2,a CPU,2026-01-02\n",
    "sweep.json": json.dumps(
        [
            {"method": method, "fraction": 0.3, "perplexity": value, "perplexity_exact": 10.0}
            for method, value in (
                ("allocator", 10.01),
                ("plain bits", 10.02),
                ("m-smoe", 20.0),
                ("ream", 15.0),
            )
        ]
    ),
    "soak.json": json.dumps(
        {
            "exact": {
                "minutes": 30.2,
                "jobs": 1234,
                "tokens": 98765,
                "changes": 2000,
                "equal": 1234,
                "different": 0,
                "rss_slope_bytes_per_minute": [-5000, 1000, 7000],
                "command": "python bench/soak.py",
            }
        }
    ),
}
SHOWN = {
    "demo.json": [
        "| 12.5 MB | 20.0 MB | 4.20 | 12.35 | 31.3 |",
        "| plain transformers | 20.0 MB | 16.00 |",
    ],
    "switch_base_128.json": [
        "| plain transformers, bf16 | none | 15.60 GB | 50.0 | 1x | 900 | 16 |  |",
        "| **comoe** | 2.40 GB | 2.35 GB | 50.0 | 1.50x | 900 | 3.46 | +2.3 % |",
    ],
    "peers.csv": [
        "| **comoe** exact | 30.00 | - | - | 200 | 11.25 |",
        "| llama.cpp bf16 | - | 1.50 | - | - | - |",
    ],
    "sweep.json": ["| 30 % | +0.1 % | +0.2 % | +50.0 % |", "| 20 % | does not fit |"],
    "soak.json": ["1,234 calls", "0 not", "RSS +1 kB a minute (at most +7 with 95 % confidence)"],
}


@pytest.mark.parametrize("name", SHOWN)
def test_tables_show_what_was_measured(name, tmp_path):
    page = f"above\n<!-- figures of bench/results/{name} -->\nold\n<!-- end of figures -->\nbelow"
    empty = update_readme.with_tables(page, tmp_path)
    assert empty == page.replace("old\n", "")
    (tmp_path / name).write_text(MADE_UP[name])
    found = update_readme.with_tables(page, tmp_path)
    assert all(line in found for line in SHOWN[name]), found
    assert found.startswith("above\n<!--") and found.endswith("-->\nbelow")
    assert update_readme.with_tables(found, tmp_path) == found
    assert "failed" not in found and "LRU" not in found


def test_sections_that_nobody_knows_are_refused():
    with pytest.raises(ValueError, match="expected the lines"):
        update_readme.with_tables("nothing")
    with pytest.raises(ValueError, match=r"figures of x\.json: expected one of"):
        update_readme.with_tables(
            "<!-- figures of bench/results/x.json -->\n<!-- end of figures -->"
        )


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
