"""Pages of the pool that move when memory is given back, against a plain copy of as many bytes.

Every second record of a full pool is evicted, then the budget is halved: what is left moves into the free pages of the
slabs that stay, and the empty slabs are unmapped. Timed is `set_budget`, unmapping included.
"""

from __future__ import annotations

import numpy as np
from bench_disk import PAGE, make_file
from kernel import Kernel, memory_copy

from comoe import _C

RECORD = PAGE * 64
RECORDS = 48


def test_pages_move(bench, tmp_path):
    path = tmp_path / "records.bin"
    crcs = make_file(path, RECORDS * RECORD, RECORD, RECORD)
    slab = RECORD * 4
    full = RECORDS * RECORD
    engine = _C.Engine(PAGE, slab, full, level_masks=[1])
    file = engine.add_file(str(path))
    every = np.arange(RECORDS, dtype=np.int32)
    engine.add_records(
        np.full(RECORDS, file, np.int32),
        every.astype(np.int64) * RECORD,
        np.full(RECORDS, RECORD, np.int64),
        np.array(crcs, np.uint32),
    )
    engine.add_experts(every)

    def fill():
        engine.evict(every)
        engine.set_budget(full)
        engine.request(every, 2)
        engine.wait_idle(60.0)
        engine.evict(every[::2].copy())

    fill()
    engine.set_budget(full // 2)
    moved = engine.stats()["relocated_pages"] * PAGE
    kept = [x for x in every[1::2] if engine.resident()[x] == 2]
    assert len(kept) == RECORDS // 2 and moved > 0
    engine.pin(np.array(kept, np.int32), True)
    for record in kept:
        assert _C.crc32c(engine.read_pages(int(record), RECORD)) == crcs[record]
    engine.pin(np.array(kept, np.int32), False)
    bench(
        Kernel(
            "page moves",
            f"{moved // PAGE} pages of {PAGE} bytes",
            lambda: engine.set_budget(full // 2),
            2 * moved,
            ceiling=memory_copy(),
            error=0.0,
            error_of="(bits)",
            prepare=fill,
        )
    )
    engine.close()
