"""The command line as a user meets it. Most tests call main() in this process: a fresh one takes seconds."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_lm
import torch
from cli_helpers import ok_json
from transformers import AutoModelForCausalLM

import comoe
from comoe import demo, doctor
from comoe.cli import tables
from comoe.cli.common import warning_line
from comoe.generate import TokenStream, generate_text
from comoe.trace import Trace

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("demo", "pack", "run", "eval", "inspect", "plan", "trace", "doctor")
PROMPT = "def f(x): "
TEXT = "def f(x):\n    return x * 2  # naïve, ü, 你好\n" * 6


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_lm.save_qwen3_moe(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def packed(checkpoint) -> Path:
    return comoe.pack(checkpoint, checkpoint.parent / "packed")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def error_of(result: tuple[int, str, str]) -> str:
    """The one line of an error; nothing on standard output, no traceback."""
    status, out, err = result
    assert status == 1
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


# ---- usage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_json(cli, command):
    status, out, _ = cli(command, "--help")
    assert status == 0
    assert f"Example:  comoe {command}" in out
    assert "--json" in out


def test_help_loads_no_torch():
    code = (
        "import sys; from comoe.cli import main; main(['--help']); main(['run', '--help']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'comoe._C')))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["run"],
        ["run", "x"],
        ["run", "x", "-p", "a", "--max-tokens", "many"],
        ["inspect", "--bogus"],
    ],
)
def test_wrong_usage_is_status_2(cli, arguments):
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "")
    assert "Error: " in err
    assert "Traceback" not in err


def test_version(cli):
    assert cli("--version") == (0, f"{comoe.__version__}\n", "")


# ---- errors -----------------------------------------------------------------------------------------


def failing(monkeypatch, error: BaseException) -> None:
    def pack(*args, **kwargs):
        raise error

    monkeypatch.setattr(comoe, "pack", pack)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("memory=1 is\n  too small"), "error: memory=1 is too small"),
        (
            FileNotFoundError(2, "No such file or directory", "a/b"),
            "error: a/b: No such file or directory",
        ),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
        (RuntimeError(), "error: RuntimeError"),
        (KeyError("x"), "error: KeyError: 'x' (comoe --debug ... shows where)"),
        (MemoryError(), "error: MemoryError"),
    ],
)
def test_an_error_is_one_line(cli, monkeypatch, error, line):
    failing(monkeypatch, error)
    assert error_of(cli("pack", "a", "b")) == line


def test_debug_shows_the_traceback(cli, monkeypatch):
    failing(monkeypatch, ValueError("inner"))
    with pytest.raises(ValueError, match="inner"):
        cli("--debug", "pack", "a", "b")


def test_ctrl_c_is_status_130(cli, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    status, out, err = cli("pack", "a", "b")
    assert (status, out, err.strip()) == (130, "", "interrupted")


def test_warnings_are_one_line_without_source():
    assert warning_line("no\ntokenizer", UserWarning, "a.py", 3) == "warning: no tokenizer\n"


def test_a_closed_pipe_is_no_error(packed):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "comoe", "inspect", str(packed), "--json"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


# ---- pack and inspect -------------------------------------------------------------------------------


def test_pack_then_inspect(cli, checkpoint, tmp_path):
    packed_summary = ok_json(cli("pack", checkpoint, tmp_path / "dst", "--json"))
    summary = ok_json(cli("inspect", tmp_path / "dst", "--json"))
    assert {"version", "layers", "experts", "rungs", "dense_bytes"} <= set(summary)
    assert [set(rung) >= {"name", "bits", "bytes"} for rung in summary["rungs"]] == [True] * 5
    assert [rung["name"] for rung in summary["rungs"]] == ["2", "3", "4", "8", "exact"]
    assert summary["rungs"][-1]["bits"] == 16
    assert packed_summary["rungs"] == summary["rungs"]
    status, out, _ = cli("inspect", tmp_path / "dst")
    assert status == 0
    assert "bits per weight" in out
    assert "exact" in out
    # A second time there is nothing to do.
    assert ok_json(cli("pack", checkpoint, tmp_path / "dst", "--json"))["rungs"] == summary["rungs"]


def test_pack_refuses(cli, checkpoint, tmp_path):
    assert "nowhere" in error_of(cli("pack", tmp_path / "nowhere", tmp_path / "dst"))
    (tmp_path / "empty").mkdir()
    assert "config.json" in error_of(cli("pack", tmp_path / "empty", tmp_path / "dst"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("precious")
    assert "--overwrite" in error_of(cli("pack", checkpoint, tmp_path / "taken"))
    assert (tmp_path / "taken/file").read_text() == "precious"
    assert not (tmp_path / "dst").exists()


def test_inspect_refuses(cli, checkpoint, packed, tmp_path):
    assert str(checkpoint) in error_of(cli("inspect", checkpoint))
    assert "nowhere" in error_of(cli("inspect", tmp_path / "nowhere"))
    damaged = shutil.copytree(packed, tmp_path / "damaged")
    manifest = damaged / "experts/manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    assert "manifest.json" in error_of(cli("inspect", damaged, "--json"))


# ---- run --------------------------------------------------------------------------------------------


def greedy_of_transformers(checkpoint: Path, num_tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    tokenizer = comoe.load_tokenizer(checkpoint)
    return generate_text(model, tokenizer, PROMPT, max_tokens=num_tokens)["tokens"]


def test_run_json(cli, checkpoint, packed):
    result = ok_json(
        cli("run", packed, "-p", PROMPT, "--memory", "40MB", "--exact", "-n", 6, "--json")
    )
    keys = {
        "text",
        "tokens",
        "tokens_per_second",
        "memory",
        "peak",
        "baseline",
        "bytes_read",
        "hits",
        "misses",
    }
    assert keys <= set(result)
    assert result["memory"] == 40_000_000
    assert result["peak"] >= result["baseline"] > 0
    assert result["bytes_read"]["disk"] > 0
    assert result["tokens_per_second"] > 0
    assert result["tokens"] == greedy_of_transformers(checkpoint, 6)
    assert result["text"] == comoe.load_tokenizer(packed).decode(
        result["tokens"], skip_special_tokens=True
    )


def test_run_streams_and_ends_with_figures(cli, packed):
    status, out, err = cli("run", packed, "-p", PROMPT, "--memory", "40MB", "-n", "4")
    assert status == 0
    assert out.startswith(PROMPT)
    last = out.splitlines()[-1]
    for part in ("4 tokens", "tok/s", "peak", "40.0 MB", "read: disk", "hits", "misses"):
        assert part in last
    assert err.count("comoe: memory 40.0 MB: dense") == 1


def test_run_reads_the_prompt_from_standard_input(cli, packed, monkeypatch, tmp_path):
    (tmp_path / "prompt").write_text(PROMPT)
    with (tmp_path / "prompt").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        piped = ok_json(cli("run", packed, "-p", "-", "--memory", "40MB", "-n", 3, "--json"))
    given = ok_json(cli("run", packed, "-p", PROMPT, "--memory", "40MB", "-n", 3, "--json"))
    assert piped["tokens"] == given["tokens"]


def test_run_samples_the_same_with_the_same_seed(cli, packed):
    def sample(seed: int) -> list[int]:
        options = ("--memory", "40MB", "-n", 12, "--temperature", 2, "--seed", seed, "--json")
        return ok_json(cli("run", packed, "-p", PROMPT, *options))["tokens"]

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "100KB"], "needs at least"),
        (["--memory", "3XB"], "--memory: expected a size such as"),
        (["--memory", "40MB", "-n", "0"], "max_tokens: expected at least 1, got 0"),
        (["--memory", "40MB", "--temperature", "-1"], "temperature: expected at least 0"),
        (["--memory", "40MB", "-p", ""], "the prompt is empty"),
        (["--memory", "40MB", "--threads", "-3"], "threads: expected at least"),
    ],
)
def test_run_refuses(cli, packed, arguments, message):
    assert message in error_of(cli("run", packed, "-p", PROMPT, "--json", *arguments))


def test_run_refuses_what_is_no_model(cli, tmp_path):
    assert "nowhere" in error_of(cli("run", tmp_path / "nowhere", "-p", PROMPT, "--json"))


def test_run_without_a_tokenizer(cli, packed, tmp_path):
    bare = shutil.copytree(packed, tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer" in error_of(
        cli("run", bare, "-p", PROMPT, "--memory", "40MB", "--json")
    )


def test_run_with_a_damaged_store(cli, packed, tmp_path):
    damaged = shutil.copytree(packed, tmp_path / "damaged")
    layer = damaged / "experts/layer-00000.bin"
    os.truncate(layer, layer.stat().st_size // 2)
    assert "layer-00000.bin" in error_of(
        cli("run", damaged, "-p", PROMPT, "--memory", "40MB", "--json")
    )


def test_ctrl_c_while_generating(packed, ctrl_c):
    command = [
        sys.executable,
        "-m",
        "comoe",
        "run",
        str(packed),
        "-p",
        PROMPT,
        "--memory",
        "60MB",
        "-n",
        "3000",
    ]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        child.stdout.read(len(PROMPT) + 2)  # the first tokens are out
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == 130
    assert err.decode().splitlines()[-1] == "interrupted"
    assert "Traceback" not in err.decode()


class OneByOne:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


def test_streamed_text_never_shows_half_a_character():
    pieces = []
    stream = TokenStream(OneByOne(), pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    text = "aü你b"
    for byte in text.encode():
        stream.put(torch.tensor([byte]))
    stream.put(torch.tensor([0xE4]))  # begins a character that never comes
    stream.end()
    assert "".join(pieces) == text + "\ufffd"
    assert "\ufffd" not in "".join(pieces[:-1])
    assert stream.tokens == [*text.encode(), 0xE4]


# ---- eval, trace ------------------------------------------------------------------------------------


def test_eval_json(cli, packed, text_file):
    result = ok_json(
        cli("eval", packed, "--text", text_file, "--memory", "40MB", "--window", 64, "--json")
    )
    keys = {
        "perplexity",
        "bits_per_byte",
        "kl",
        "top1_agreement",
        "expert_bytes",
        "expert_bytes_exact",
        "memory",
        "peak",
    }
    assert keys <= set(result)
    assert result["tokens"] == len(TEXT.encode()) - 1
    assert result["memory"] == 40_000_000
    assert result["expert_bytes"] > 0
    assert 0 <= result["top1_agreement"] <= 1
    assert result["peak"] <= result["baseline"] + 40_000_000 + 64_000_000
    status, out, _ = cli(
        "eval",
        packed,
        "--text",
        text_file,
        "--memory",
        "40MB",
        "--max-tokens",
        20,
        "--no-reference",
    )
    assert status == 0
    assert "perplexity" in out
    assert "n/a" in out


def test_eval_exact_is_its_own_reference(cli, packed, text_file):
    options = ("--text", text_file, "--memory", "40MB", "--max-tokens", 60, "--exact", "--json")
    result = ok_json(cli("eval", packed, *options))
    assert (result["kl"], result["top1_agreement"]) == (0, 1)
    assert result["perplexity"] == result["perplexity_exact"]


def test_eval_refuses(cli, packed, tmp_path):
    def fails(path: Path, *more: object) -> str:
        return error_of(cli("eval", packed, "--text", path, "--memory", "40MB", "--json", *more))

    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "good").write_text(TEXT)
    assert "No such file" in fails(tmp_path / "missing")
    assert "the text is empty" in fails(tmp_path / "empty")
    assert "is not UTF-8 text (byte 2)" in fails(tmp_path / "latin")
    assert "window" in fails(tmp_path / "good", "--window", 1)
    assert "at least 2 tokens" in fails(tmp_path / "good", "--max-tokens", 1)


def test_trace(cli, packed, text_file, tmp_path):
    out = tmp_path / "t.npz"
    options = (
        "--text",
        text_file,
        "--out",
        out,
        "--memory",
        "40MB",
        "--max-tokens",
        50,
        "--window",
        20,
    )
    summary = ok_json(cli("trace", packed, *options, "--json"))
    trace = Trace.read(out)
    assert (trace.num_tokens, summary["tokens"]) == (50, 50)
    assert trace.sequence.tolist() == [0] * 20 + [1] * 20 + [2] * 10
    assert trace.experts.shape == (50, 2, 2)
    assert (trace.experts >= 0).all()
    assert (trace.weights > 0).all()
    assert trace.weights.sum(-1).max() <= 1.01
    status, shown, _ = cli("trace", packed, *options)
    assert status == 0
    assert "50 tokens in 3 sequences" in shown
    assert "does not exist" in error_of(
        cli(
            "trace", packed, "--text", text_file, "--out", tmp_path / "no/t.npz", "--memory", "40MB"
        )
    )


# ---- doctor and demo --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(monkeypatch):
    monkeypatch.setattr(doctor.examine, "__defaults__", (".", 8 << 20))


def test_doctor(cli, small_disk, tmp_path):
    report = ok_json(cli("doctor", tmp_path, "--json"))
    assert report["cpu"]["isa"] in ("portable", "avx2", "avx512", "avx512_vnni_bf16")
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert report["bandwidth"]["memory_read"] > 1e8
    assert report["bandwidth"]["disk"]["bytes_per_second"] > 1e5
    assert report["bandwidth"]["disk"]["folder"] == str(tmp_path)
    assert all(set(item) == {"what", "fix"} for item in report["advice"])
    assert list(tmp_path.iterdir()) == []
    status, out, _ = cli("doctor", tmp_path)
    assert status == 0
    for word in ("versions", "kernels", "memory read", "disk read", "GPU"):
        assert word in out


def test_doctor_where_direct_reads_are_refused(cli, small_disk, tmp_path, monkeypatch):
    def preadv(descriptor, buffers, offset, *, real=os.preadv):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    report = ok_json(cli("doctor", tmp_path, "--json"))
    assert report["bandwidth"]["disk"]["direct"] is False
    assert any(
        "refuses O_DIRECT" in item["what"] and "ext4" in item["fix"] for item in report["advice"]
    )


def test_doctor_refuses(cli, small_disk, tmp_path):
    assert "is not a folder" in error_of(cli("doctor", tmp_path / "nowhere", "--json"))


def test_advice_follows_what_is_wrong():
    good = {
        "versions": {"torch": "2", "transformers": "5"},
        "cpu": {"native": True, "isa": "avx2", "load": 0.1, "cores": 2, "cuda_built": True},
        "memory": {"cgroup_limit": None, "available": 1},
        "bandwidth": {"disk": {"direct": True, "why": "", "bytes_per_second": 1e9}},
    }
    assert doctor.advice(good) == []
    bad = {
        "versions": {"torch": None, "transformers": "5"},
        "cpu": {"native": False, "isa": "portable", "load": 9.0, "cores": 2, "cuda_built": True},
        "memory": {"cgroup_limit": 1000, "available": 100},
        "bandwidth": {"disk": {"direct": False, "why": "refused", "bytes_per_second": 1e6}},
    }
    said = " ".join(item["what"] for item in doctor.advice(bad))
    for part in (
        "not built",
        "torch is not installed",
        "portable kernels",
        "page cache",
        "1.00 MB/s",
        "busy",
        "container",
    ):
        assert part in said


def fake_row(**changes) -> dict:
    row = {
        "memory": 20_000_000,
        "peak": 450_000_000,
        "baseline": 420_000_000,
        "bits_per_weight": 4.2,
        "tokens_per_second": 30.0,
        "perplexity": 12.5,
        "perplexity_exact": 12.0,
        "text": "return 1 [bold]",
        "prompt": "def f():",
        "plan": "every expert resident at 4-bit",
        "tokens": 100,
    }
    row["plain"] = {**row, "bits_per_weight": 16.0}
    del row["plain"]["plan"]
    return row | changes


def test_demo_table_and_plot(capsys, tmp_path):
    rows = [fake_row(), fake_row(memory=15_000_000, perplexity=14.0)]
    tables.show_demo(rows)
    out = capsys.readouterr().out
    for part in (
        "20.0 MB",
        "15.0 MB",
        "transformers",
        "14.0",
        "return 1 [bold]",
        "every expert resident at 4-bit",
    ):
        assert part in out
    png = demo.plot(rows, tmp_path / "demo.png").read_bytes()
    assert png.startswith(b"\x89PNG")


def test_demo_budgets_fall_from_exact_to_half_of_the_coarsest():
    budgets = demo.budgets(1000, [100, 200, 300, 500, 1000], quick=False)
    assert budgets == [2100, 1550, 1330, 1220, 1110, 1050]
    assert len(demo.budgets(1000, [100, 200, 300, 500, 1000], quick=True)) == 2


def test_a_demo_run_that_fails_says_why(packed):
    with pytest.raises(RuntimeError, match="demo: memory 1: .*needs at least"):
        demo.run_worker(
            {
                "prompt": PROMPT,
                "max_tokens": 1,
                "text_bytes": 100,
                "folder": str(packed),
                "memory": 1,
                "exact": False,
            }
        )


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / "comoe/demo_model/config.json").exists(), reason="no bundled model here"
)
def test_demo_json(cli, tmp_path):
    rows = ok_json(cli("demo", "--quick", "--out", tmp_path / "out", "--max-tokens", 8, "--json"))
    keys = {
        "memory",
        "peak",
        "baseline",
        "bits_per_weight",
        "tokens_per_second",
        "perplexity",
        "perplexity_exact",
    }
    assert len(rows) == 2
    for row in rows:
        assert keys <= set(row)
        assert row["peak"] <= row["baseline"] + row["memory"] + 64_000_000
        assert row["perplexity"] > 1
    assert rows[0]["memory"] > rows[1]["memory"]
    assert rows[0]["bits_per_weight"] > rows[1]["bits_per_weight"]
    assert abs(rows[0]["perplexity"] / rows[0]["perplexity_exact"] - 1) < 0.02
    assert rows[0]["perplexity"] < rows[1]["perplexity"]
    assert rows[0]["text"]
