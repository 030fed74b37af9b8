"""torch gives one thread up where a step waits for the disk, and has it back afterwards."""

import threading

import pytest
import torch

import comoe
from comoe.runtime.reader_core import FEW_TOKENS, ReaderCore


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield torch.get_num_threads
    torch.set_num_threads(before)


class Clock:
    now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_only_after_a_step_that_waited(threads):
    core, seen = ReaderCore(Clock()), []
    for waited in (0.0, 0.1, 0.6, 0.7, 5.0, 5.0):
        core.begin(1, waited)
        seen.append(threads())
        core.end()
        assert threads() == 3
    assert seen == [3, 3, 2, 3, 2, 3]


def test_not_for_many_tokens_nor_below_one_thread(threads):
    core = ReaderCore(Clock())
    core.begin(1, 0.0)
    core.begin(FEW_TOKENS + 1, 1.0)
    assert threads() == 3
    core.begin(FEW_TOKENS, 2.0)
    assert threads() == 2
    core.begin(1, 3.0)  # the step before was not ended
    assert threads() == 2
    core.end()
    core.end()
    assert threads() == 3
    torch.set_num_threads(1)
    core.begin(1, 4.0)
    core.end()
    assert threads() == 1


def test_each_thread_has_its_own_back(threads):
    core = ReaderCore(Clock())
    core.begin(1, 0.0)
    core.begin(1, 1.0)
    seen = []

    def other():
        torch.set_num_threads(3)
        core.begin(1, 2.0)
        seen.append(threads())
        core.end()
        seen.append(threads())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [2, 3]
    core.end()
    assert threads() == 3


@torch.no_grad()
def test_a_model_gives_it_back_also_when_it_fails(packed_demo, threads, monkeypatch):
    model = comoe.load(packed_demo, memory="8MB", exact=True)
    ids, during = torch.arange(1, 9)[None], []
    try:
        monkeypatch.setattr("comoe.runtime.reader_core.WAITING_SHARE", -1.0)
        model.model.layers[0].register_forward_pre_hook(lambda *_: during.append(threads()))
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert during[1:] == [2] * (len(during) - 1) and threads() == 3

        def fail(*_):
            during.append(threads())
            raise RuntimeError("on purpose")

        model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(ids)
        assert during[-1] == 2 and threads() == 3
        model.comoe.set_memory("1GB")
        with pytest.raises(RuntimeError, match="on purpose"):
            model(ids)
        assert during[-1] == 3
    finally:
        model.comoe.close()
