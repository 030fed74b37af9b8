from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comoe.config import CoMoEConfig, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4.7GB", 4_700_000_000),
        ("3GiB", 3 << 30),
        ("512 MB", 512_000_000),
        ("1.5g", 1_500_000_000),
        (" 64mib ", 64 << 20),
        ("2k", 2000),
        ("1KiB", 1024),
        (".5 TB", 500_000_000_000),
        ("123", 123),
        ("123B", 123),
        (123, 123),
        (1e9, 1_000_000_000),
        # More digits than a double holds: must not be rounded on the way.
        ("9007199254740993", 9007199254740993),
    ],
)
def test_parse_bytes(text, expected):
    assert parse_bytes(text) == expected
    assert isinstance(parse_bytes(text), int)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "4,7GB",
        "-1GB",
        "1e9",
        "4.7 GBB",
        "nan",
        "inf",
        "0",
        "0.0001",
        "1 2GB",
        "٣GB",
        "9e99",
        "99999999TB",
    ],
)
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="memory: expected a size such as"):
        parse_bytes(text)


@pytest.mark.parametrize("number", [0, -5, float("nan"), float("inf"), 2**63])
def test_parse_bytes_refuses_numbers(number):
    with pytest.raises(ValueError, match="at least 1 byte"):
        parse_bytes(number)


@pytest.mark.parametrize("thing", [None, True, [], b"1GB"])
def test_parse_bytes_refuses_types(thing):
    with pytest.raises(TypeError, match="budget: expected a size"):
        parse_bytes(thing, name="budget")


def test_unknown_unit_is_named():
    with pytest.raises(ValueError, match="got the unit 'PB' in '4PB', known are KB"):
        parse_bytes("4PB")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.00 KB"),
        (1000, "1.00 KB"),
        (4_700_000_000, "4.70 GB"),
        (9_999_000, "10.0 MB"),
        (99_960, "100 KB"),
        (999_600_000, "1.00 GB"),
        (5e15, "5000 TB"),
        (-2000, "-2.00 KB"),
    ],
)
def test_format_bytes(value, text):
    assert format_bytes(value) == text


@given(st.integers(1, 10**14))
def test_format_then_parse_keeps_three_digits(value):
    assert abs(parse_bytes(format_bytes(value)) - value) <= 0.0051 * value


def test_config_reads_sizes_and_is_frozen():
    config = CoMoEConfig.create(memory="1.2GB", exact=True)
    assert config.memory == 1_200_000_000
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.memory = 1
    assert config.with_(memory="2GB").memory == 2_000_000_000
    assert config.with_(memory=None).memory is None
    assert config.memory == 1_200_000_000


def test_unknown_option_lists_the_known_ones():
    with pytest.raises(TypeError, match="unknown option memroy; known are memory, exact"):
        CoMoEConfig.create(memroy="1GB")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threads": -1}, ValueError, "threads: expected at least 0"),
        ({"threads": 1.5}, TypeError, "threads: expected a whole number"),
        ({"io_threads": 0}, ValueError, "io_threads: expected at least 1"),
        ({"max_context": True}, TypeError, "max_context: expected a whole number"),
        ({"exact": 1}, TypeError, "exact: expected True or False"),
        ({"device": ""}, TypeError, "device: expected a name"),
        ({"device": "cuda"}, ValueError, "device: expected 'cpu', got 'cuda'"),
        ({"memory": "lots"}, ValueError, "memory: expected a size"),
    ],
)
def test_config_refuses(options, error, message):
    with pytest.raises(error, match=message):
        CoMoEConfig.create(**options)
