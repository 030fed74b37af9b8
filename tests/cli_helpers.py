"""What tests of the command line share."""

from __future__ import annotations

import json


def ok_json(result: tuple[int, str, str]):
    """What a command that succeeded printed, which is JSON and nothing else."""
    status, out, err = result
    assert status == 0, err
    return json.loads(out)
