"""comoe serve-experts and its client: same results as at home, and nothing that callers send breaks it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from expert_server import TOKEN, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import comoe
from comoe.tiers import expert_client as client_module
from comoe.tiers.expert_client import (
    BadAnswer,
    ExpertClient,
    Overloaded,
    Refused,
    TimedOut,
    Unauthorized,
    Unreachable,
)
from comoe.tiers.expert_token import make_token, read_token
from comoe.tiers.expert_wire import Call, pack_call

HIDDEN, EXPERTS = 160, 16


@pytest.fixture(scope="module")
def served(host):
    with serving(host, max_bytes=1 << 20, most_calls=16) as both:
        yield both


@pytest.fixture
def client(served):
    client = ExpertClient(served[0], TOKEN, timeout=20)
    yield client
    client.close()


def call_for(host, tokens=1, layer=0, form="bf16", seed=0, k=4):
    rng = np.random.default_rng(seed)
    hidden = host.store.layers[layer].hidden
    index = np.stack([rng.permutation(EXPERTS)[:k] for _ in range(tokens)]).astype(np.int32)
    weights = rng.dirichlet(np.ones(k), tokens).astype(np.float32)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    return Call(layer, host.store_id, index, weights, x, form)


def at_home(host, call):
    """The same by the store's own kernels, on the activations as they arrive."""
    x = torch.from_numpy(call.x).bfloat16()
    index = torch.from_numpy(call.expert_idx).long()
    weights = torch.from_numpy(call.weights)
    return host.runtime.experts_forward(call.layer_idx, x, index, weights).float().numpy()


@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_bf16_is_the_local_result(host, client, tokens):
    """Bit for bit: the wire carries what the kernels take and give."""
    for layer in range(len(host.store.layers)):
        call = call_for(host, tokens, layer, seed=layer)
        np.testing.assert_array_equal(client.compute(call).out, at_home(host, call))


def test_int8_is_near(host, client):
    call = call_for(host, 8, form="int8")
    want = at_home(host, call)
    got = client.compute(call).out
    assert 0 < np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


def test_no_expert_counts_nothing(host, client):
    call = call_for(host, 3)
    call.expert_idx[0] = -1
    call.expert_idx[1, 2] = -1
    out = client.compute(call).out
    assert not out[0].any()
    kept = Call(0, host.store_id, call.expert_idx[1:2, [0, 1, 3]], call.weights[1:2, [0, 1, 3]], call.x[1:2])  # fmt: skip
    np.testing.assert_array_equal(out[1:2], client.compute(kept).out)


def test_info_says_store_and_levels(host, client):
    info = client.info()
    assert info.store_id == host.store_id and info.max_bytes == 1 << 20
    assert info.level_names == ("2", "3", "4", "8", "exact")
    assert [layer.tolist() for layer in info.levels] == [[4] * EXPERTS] * len(host.store.layers)


def test_many_callers_are_batched_and_each_gets_its_own(host, served):
    service = served[1]
    before = service.batches.figures.batches
    calls = [call_for(host, 1 + i % 3, i % 2, seed=i) for i in range(48)]
    want = [at_home(host, call) for call in calls]
    got = [None] * len(calls)

    def work(worker):
        client = ExpertClient(served[0], TOKEN, timeout=30)
        for i in range(worker, len(calls), 12):
            got[i] = client.compute(calls[i]).out
        client.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)
    assert service.batches.figures.batches - before < len(calls)


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["wrong-token-of-a-length", TOKEN[:-1], TOKEN + "x"])
def test_a_wrong_token_is_refused(host, served, token):
    client = ExpertClient(served[0], token)
    with pytest.raises(Unauthorized, match="401"):
        client.compute(call_for(host))
    with pytest.raises(Unauthorized, match="401"):
        client.info()


def test_no_token_is_refused_before_the_body_is_read(served):
    answer = raw(
        served[0], b"POST /v1/experts HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 401")


def test_another_store_is_refused(host, client):
    call = call_for(host)
    other = Call(0, bytes(16), call.expert_idx, call.weights, call.x)
    with pytest.raises(Refused, match="409.*the call is for store 0000"):
        client.compute(other)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_idx": 5}, "layer: expected less than 5, got 5"),
        ({"x": np.zeros((1, 8), np.float32)}, "H: expected"),
        ({"expert_idx": np.array([[16, 0, 1, 2]], np.int32)}, "expert_idx: expected -1 to 15"),
        ({"expert_idx": np.array([[-2, 0, 1, 2]], np.int32)}, "expert_idx: expected -1 to 15"),
    ],
)
def test_what_the_store_has_not_is_refused(host, client, change, message):
    call = call_for(host)
    fields = {f: getattr(call, f) for f in ("layer_idx", "store_id", "expert_idx", "weights", "x")}
    with pytest.raises(Refused, match=f"422.*{message}"):
        client.compute(Call(**(fields | change)))


def test_a_call_too_large_is_refused(host, client):
    call = call_for(host, 4000)
    with pytest.raises((Refused, Unreachable), match="413|Broken|reset"):
        client.compute(call)
    client.info()
    with pytest.raises(Refused, match="takes calls of 1048576 bytes"):
        client.compute(call)


def test_a_length_too_large_is_refused_before_the_body_comes(served):
    assert raw(served[0], HEAD + b"Content-Length: 1048577\r\n\r\n").startswith(b"HTTP/1.1 413")
    assert raw(
        served[0],
        HEAD
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + (b"40000\r\n" + bytes(1 << 18) + b"\r\n") * 5,
    )[:12] in (b"", b"HTTP/1.1 413")


def raw(url, data, seconds=5.0):
    """What a server answers to bytes."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=seconds) as link:
        got = b""
        try:
            link.sendall(data)
            link.shutdown(socket.SHUT_WR)
            while part := link.recv(1 << 16):
                got += part
        except OSError:
            pass
        return got


HEAD = f"POST /v1/experts HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_it_survives_fuzzed_requests(host, served, data):
    """Random bytes, damaged calls, wrong lengths: an answer that is no result, or none; then all goes on."""
    whole = pack_call(call_for(host))
    kind = data.draw(st.sampled_from(["bytes", "head", "body", "damaged", "length", "chunked"]))
    noise = data.draw(st.binary(max_size=300))
    if kind == "bytes":
        request = noise
    elif kind == "head":
        request = HEAD + noise + b"\r\n\r\n"
    elif kind == "body":
        request = HEAD + b"Content-Length: %d\r\n\r\n" % len(noise) + noise
    elif kind == "damaged":
        at = data.draw(st.integers(0, len(whole) - 1))
        broken = whole[:at] + noise + whole[at + len(noise) :]
        request = HEAD + b"Content-Length: %d\r\n\r\n" % len(broken) + broken
    elif kind == "length":
        said = data.draw(st.integers(-5, 1 << 40))
        request = HEAD + b"Content-Length: %d\r\n\r\n" % said + whole
    else:
        request = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + noise
    answer = raw(served[0], request)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 "), answer
    assert not answer.startswith(b"HTTP/1.1 500"), answer


def test_after_the_fuzzing_it_still_computes(host, served, client):
    call = call_for(host, 2)
    np.testing.assert_array_equal(client.compute(call).out, at_home(host, call))
    assert served[1].batches._here == 0


def test_a_head_without_end_is_cut_off(served):
    assert raw(served[0], b"GET /v1/health HTTP/1.1\r\nX: " + bytes([65]) * (3 << 20)) == b""


class SlowHost:
    """A host that computes when it is told to."""

    def __init__(self, host):
        self.go = threading.Event()
        self._host = host
        self.store, self.store_id, self.check, self.levels = host.store, host.store_id, host.check, host.levels  # fmt: skip

    def compute(self, calls):
        assert self.go.wait(20)
        return self._host.compute(calls)


def test_it_sheds_load_instead_of_growing(host):
    """The third of three calls is refused at once, with a time to come back; the others are answered."""
    slow = SlowHost(host)
    with serving(slow, most_calls=2) as (url, service):
        call, got = call_for(host), []

        def work():
            got.append(ExpertClient(url, TOKEN, timeout=30).compute(call).out)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for t in threads:
            t.start()
        end = time.monotonic() + 10
        while service.batches._here < 2 and time.monotonic() < end:
            time.sleep(0.01)
        client = ExpertClient(url, TOKEN)
        with pytest.raises(Overloaded, match="503.*queue is full") as error:
            client.compute(call)
        assert error.value.retry_after >= 1
        slow.go.set()
        for t in threads:
            t.join()
        np.testing.assert_array_equal(got[0], got[1])
        assert client.compute(call).seconds > 0
        assert service.batches.figures.shed == 1


def test_slow_senders_are_let_go(host):
    with serving(host, head_seconds=0.3, body_seconds=0.3) as (url, _):
        parts = urlsplit(url)
        for begin in (b"", b"GET /v1/he", HEAD + b"Content-Length: 100\r\n\r\nabc"):
            with socket.create_connection((parts.hostname, parts.port), timeout=10) as link:
                link.sendall(begin)
                answer = link.recv(4096)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 408")


def test_a_caller_that_gives_up_leaves_no_trace(host):
    slow = SlowHost(host)
    with serving(slow, most_calls=4) as (url, service):
        with pytest.raises(TimedOut):
            ExpertClient(url, TOKEN, timeout=0.2).compute(call_for(host))
        slow.go.set()
        assert ExpertClient(url, TOKEN).compute(call_for(host)).seconds > 0
        end = time.monotonic() + 5
        while service.batches._here and time.monotonic() < end:
            time.sleep(0.01)
        assert service.batches._here == 0


# ---- the client against bad servers -----------------------------------------------------------


def answering(answer, pause=0.0):
    """A server that says the same to everybody. Returns (url, close)."""
    listening = socket.create_server(("127.0.0.1", 0))

    def run():
        while True:
            try:
                link, _ = listening.accept()
            except OSError:
                return
            with link:
                link.recv(1 << 16)
                try:
                    for part in (
                        [answer[i : i + 1] for i in range(len(answer))] if pause else [answer]
                    ):
                        link.sendall(part)
                        time.sleep(pause)
                except OSError:
                    pass

    threading.Thread(target=run, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}", listening.close


@pytest.mark.parametrize(
    "answer, error",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", BadAnswer),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\nhello", BadAnswer),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\nhello", Unreachable),
        (b"HTTP/1.1 302 Found\r\nLocation: /v1/experts\r\nContent-Length: 0\r\n\r\n", Refused),
        (b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", BadAnswer),
        (b"", Unreachable),
        (b"nonsense\r\n\r\n", Unreachable),
    ],
)
def test_bad_answers_are_errors(host, answer, error):
    url, close = answering(answer)
    with pytest.raises(error):
        ExpertClient(url, TOKEN, timeout=5).compute(call_for(host))
    close()


def test_a_server_that_drips_is_given_up(host):
    url, close = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n" + bytes(300), 0.05)
    begin = time.monotonic()
    with pytest.raises(TimedOut):
        ExpertClient(url, TOKEN, timeout=3.0).compute(call_for(host))
    assert time.monotonic() - begin < 10  # dripping on would take 17 s
    close()


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(Unreachable):
        ExpertClient(f"http://127.0.0.1:{port}", TOKEN).info()


def test_a_connection_that_the_server_closed_is_replaced(host):
    call = call_for(host)
    with serving(host) as (url, _):
        client = ExpertClient(url, TOKEN)
        first = client.compute(call).out
        assert len(client._idle) == 1
        client._idle[0].sock.shutdown(socket.SHUT_RDWR)
        np.testing.assert_array_equal(client.compute(call).out, first)
    with pytest.raises(Unreachable):
        client.compute(call)


def test_arguments_are_checked():
    for url in ("ftp://host", "host:80", "http://user:word@host"):
        with pytest.raises(ValueError, match="expected http://host:port"):
            ExpertClient(url, TOKEN)
    with pytest.raises(ValueError, match="one of"):
        ExpertClient("http://host", TOKEN, wire="fp8")
    with pytest.raises(ValueError, match="token"):
        ExpertClient("http://host", "line\nbreak")
    with pytest.raises(ValueError) as error:
        ExpertClient("http://user:secret@host", TOKEN)
    assert "secret" not in str(error.value)


# ---- token file, TLS, the command -------------------------------------------------------------


def test_token_files(tmp_path):
    good = tmp_path / "good"
    make_token(good)
    assert len(read_token(good)) >= 40
    with pytest.raises(FileExistsError):
        make_token(good)
    good.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        read_token(good)
    short = tmp_path / "short"
    short.write_text("short\n")
    short.chmod(0o600)
    with pytest.raises(ValueError, match="at least 16"):
        read_token(short)
    with pytest.raises(ValueError, match="cannot be read"):
        read_token(tmp_path / "none")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    files = (str(folder / "cert.pem"), str(folder / "key.pem"))
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]],
        capture_output=True,
    )  # fmt: skip
    if made.returncode != 0:
        pytest.skip("openssl cannot make a certificate here")
    return files


def test_tls_is_verified(host, certificate):
    call = call_for(host)
    with serving(host, tls=certificate) as (url, _):
        with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
            ExpertClient(url, TOKEN).compute(call)
        trusting = ExpertClient(url, TOKEN, ca_file=certificate[0])
        np.testing.assert_array_equal(trusting.compute(call).out, at_home(host, call))
        trusting.close()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_and_stops_cleanly(packed_demo, host, tmp_path, how, ctrl_c):
    token_file = tmp_path / "token"
    make_token(token_file)
    process = subprocess.Popen(
        [sys.executable, "-m", "comoe", "serve-experts", str(packed_demo), "--token-file", str(token_file),
         "--port", "0", "--memory", "40MB"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        said = ""
        while "listening on " not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        url = said.rsplit("listening on ", 1)[1].strip()
        client = ExpertClient(url, read_token(token_file))
        call = call_for(host, 2)
        np.testing.assert_array_equal(client.compute(call).out, at_home(host, call))
        with pytest.raises(Unauthorized):
            ExpertClient(url, "no-token-of-this-server").info()
        process.send_signal(how)
        rest = process.stderr.read()
        assert process.wait(20) == 0, rest
        assert "stopped after 1 calls in 1 batches, 2 tokens" in rest and "refused 1" in rest
        assert read_token(token_file) not in said + rest
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_the_command_refuses_without_a_token(packed_demo):
    from comoe.cli import main

    assert main(["serve-experts", str(packed_demo)]) == 2


def test_tiers_need_no_torch():
    code = "import sys, comoe.tiers.expert_client; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert comoe.__name__ and client_module.PART
