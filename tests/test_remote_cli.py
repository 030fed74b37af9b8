"""pull, cache, run, eval and inspect by URL, as a user meets them."""

from __future__ import annotations

import json

import pytest
import tiny_lm
from range_server import RangeServer

import comoe
from comoe.cli import main
from comoe.tiers import cache

PROMPT = "def f(x): "


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    checkpoint = tiny_lm.save_qwen3_moe(tmp_path_factory.mktemp("checkpoint") / "tiny")
    return comoe.pack(checkpoint, checkpoint.parent / "packed")


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def server(packed):
    with RangeServer(packed) as server:
        yield server


def answer(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_run_by_url_as_from_disk(server, packed, capsys):
    options = ("-p", PROMPT, "-n", "6", "--exact")
    here = answer(capsys, "run", str(packed), *options)
    there = answer(capsys, "run", server.url, *options)
    assert there["tokens"] == here["tokens"]
    assert there["bytes_read"]["network"] > 0 and here["bytes_read"].keys() == {"disk"}
    assert there["remote"]["sources"][server.url]["failures"] == 0
    again = answer(capsys, "run", server.url, *options)
    assert again["tokens"] == here["tokens"] and again["bytes_read"]["network"] == 0


def test_several_sources(server, packed, capsys):
    with RangeServer(packed) as other:
        figures = answer(
            capsys, "run", server.url, "--source", other.url, "-p", PROMPT, "-n", "4", "--exact"
        )
    assert set(figures["remote"]["sources"]) == {server.url, other.url}
    assert main(["run", str(packed), "--source", server.url, "-p", PROMPT]) == 1
    assert "is not a URL" in capsys.readouterr().err


def test_pull_then_without_a_source(server, packed, capsys):
    low = answer(capsys, "pull", server.url, "--up-to", "bits2")
    assert low["fetched"] == low["bytes"] > 0 and low["level"] == "2"
    whole = answer(capsys, "pull", server.url)
    assert whole["fetched"] == whole["bytes"] - low["bytes"]
    assert main(["pull", server.url]) == 0
    assert "fetched now" in capsys.readouterr().out
    here = answer(capsys, "run", str(packed), "-p", PROMPT, "-n", "4", "--exact")
    server.down()
    assert main(["run", server.url, "-p", PROMPT, "-n", "4", "--exact", "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["tokens"] == here["tokens"] and "no source answers" in out.err
    assert main(["pull", server.url, "--up-to", "bits99"]) == 1
    assert "--up-to: expected one of 2, 3" in capsys.readouterr().err


def test_cache_lists_limits_and_removes(server, capsys):
    answer(capsys, "pull", server.url)
    shown = answer(capsys, "cache", "--limit", "20GB")
    (store,) = shown["stores"]
    assert shown["limit"] == 20_000_000_000 and 0 < store["bytes"] == shown["bytes"]
    assert not store["in_use"] and store["store_bytes"] > 0
    assert main(["cache"]) == 0 and "limit 20.0 GB" in capsys.readouterr().out
    assert answer(capsys, "cache", "--limit", "none")["limit"] is None
    assert main(["cache", "--remove", "nothing"]) == 1
    assert "`comoe cache` lists what is" in capsys.readouterr().err
    assert answer(capsys, "cache", "--remove", store["name"])["stores"] == []
    answer(capsys, "pull", server.url, "--up-to", "2")
    small = answer(capsys, "cache", "--limit", "1")
    assert small["stores"] == [] and small["bytes"] == 0
    assert answer(capsys, "cache", "--clear")["stores"] == []


def test_inspect_and_eval_by_url(server, packed, capsys, tmp_path):
    there, here = answer(capsys, "inspect", server.url), answer(capsys, "inspect", str(packed))
    assert there == here
    assert not any(path.endswith(".safetensors") for path, *_ in server.requests)
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x * 2\n" * 4)
    options = ("--text", str(text), "--window", "32", "--no-reference", "--exact")
    far = answer(capsys, "eval", server.url, *options)
    near = answer(capsys, "eval", str(packed), *options)
    assert far["perplexity"] == near["perplexity"]


@pytest.mark.parametrize("command", ["run", "pull", "inspect"])
def test_errors_name_no_secrets(command, server, capsys):
    url = server.url.replace("//", "//ann:hunter2@") + "/nowhere?sig=hush"
    arguments = [command, url, *(["-p", "x"] if command == "run" else [])]
    server.fault = lambda *_: "404"
    assert main(arguments) == 1
    text = "".join(capsys.readouterr())
    assert server.url in text and "packed folder" in text
    assert not any(word in text for word in ("ann:", "hunter2", "hush"))
    assert cache.stores(cache.root()) == []
