"""What the Triton kernels compile to, with no GPU: a few configurations of the many that
``python -m lst_kernels.aot`` goes through.
"""

import re

import pytest
import torch

pytest.importorskip("triton")

from lst_kernels import aot
from lst_kernels.aot import Compiled, Configuration
from lst_kernels.triton import tables

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    "configuration",
    [
        Configuration("forward", BF16, 64),
        Configuration("backward_kv", BF16, 64, heads=(16, 4)),
        Configuration("patch_backward", BF16, 64, slots=2),
        Configuration("pool_max", BF16, 1024),
        Configuration("scan_carries", BF16, 1024),
        Configuration("scan_rows_back", BF16, 1024),
    ],
    ids=str,
)
def test_kernels_fit_hopper(configuration):
    compiled = aot.compile_configuration(configuration, "sm_90")
    assert aot.faults(configuration, compiled, "sm_90") == []
    assert 16 <= compiled.registers <= 255
    assert ("wgmma.mma_async" in compiled.instructions) == configuration.family.startswith(
        ("forward", "backward")
    )


def test_the_patch_family_moves_nothing_through_shared_memory():
    """Its layout keeps sums over slots and tokens within a thread; a conversion would show here."""
    configuration = Configuration("patch_backward", BF16, 64, slots=2)
    assert aot.compile_configuration(configuration, "sm_90").shared == 0


@pytest.mark.parametrize("family", ["scan_carries", "scan_rows", "scan_rows_back"])
def test_the_scan_loads_its_next_rows_before_it_writes_one(family):
    launch = aot.launch(Configuration(family, BF16, 1024), "sm_90")
    ptx = aot.compile_launch(launch, aot.TARGETS["sm_90"].triton).asm["ptx"]
    assert "cp.async" in ptx


@pytest.mark.parametrize("family", ["forward", "backward_kv", "patch_forward"])
def test_heads_of_72_are_loaded_as_wide_as_heads_of_64(family):
    """72 is a multiple of the 8 numbers that a thread loads at once, but not of 16."""
    configuration = Configuration(family, BF16, 72)
    compiled = aot.compile_launch(aot.launch(configuration, "sm_90"), aot.TARGETS["sm_90"].triton)
    assert re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])
    assert not re.search(r"ld\.global\S*\.b16\b", compiled.asm["ptx"])
    assert aot._nvidia_resources(compiled.asm["cubin"])[1] == 0


def test_a_tile_too_large_for_the_registers_is_a_fault(monkeypatch):
    configuration = Configuration("backward_q", BF16, 64)
    table = tables.TILES["sm_90"] | {("backward_q", 2): {256: tables.Tile(128, 128, 4, 1)}}
    monkeypatch.setitem(tables.TILES, "sm_90", table)
    tables.tile.cache_clear()
    try:
        compiled = aot.compile_configuration(configuration, "sm_90")
        assert any("spills" in fault for fault in aot.faults(configuration, compiled, "sm_90"))
    finally:
        tables.tile.cache_clear()


def test_missing_instructions_and_too_much_shared_memory_are_faults():
    configuration = Configuration("forward", BF16, 64)
    compiled = Compiled(64, 0, 300_000, {"mma.sync": 8}, 4, "")
    assert aot.faults(configuration, compiled, "sm_90") == [
        "needs more than 232448 bytes of shared memory",
        "has no wgmma.mma_async",
    ]


# No tile has such numbers of heads or of columns, so they tell a row's length from a tile's.
HEADS = (22, 11)


@pytest.mark.parametrize(
    "configuration",
    [
        Configuration("forward", BF16, 80, HEADS),
        Configuration("backward_q", BF16, 80, HEADS),
        Configuration("backward_kv", BF16, 80, HEADS),
        Configuration("patch_forward", BF16, 80, HEADS, slots=2),
        Configuration("patch_backward", BF16, 80, HEADS, slots=2),
        *[Configuration(family, BF16, 1000) for family in (*aot.POOLING, *aot.SCAN)],
    ],
    ids=str,
)
def test_offsets_of_rows_are_64_bit(configuration):
    """Tensors of more than 2³¹ elements must not wrap: whatever is multiplied by a stride or by the
    length of a row is 64 bits wide."""
    ttir = aot.compile_configuration(configuration, "sm_90").ttir
    strides = set(re.findall(r"%(\w+_(?:row|head))\b: i32", ttir))
    assert strides
    lengths = {22, 11, 80, 11 * 80, 22 * 80, 1000}
    constants = re.findall(r"%(\w+) = arith\.constant (?:dense<)?(\d+)\b[^:]*: \S*i32", ttir)
    narrow = {name for name, value in constants if int(value) in lengths}
    products = 0
    for line in ttir.splitlines():
        used = set(re.findall(r"%(\w+)", line.split(" loc(")[0]))
        if used & strides and "tt.func" not in line:
            assert "arith.extsi" in line, line  # widened before anything else is done with it
        if "arith.muli" in line:
            assert not used & narrow, line
            products += "i64" in line
    assert products


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs: expected 1 or more, got 0"),
        (["--family", "nonsense"], "--family: expected the start of one of .*; got 'nonsense'"),
    ],
)
def test_a_mistaken_command_is_told_in_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["aot", *arguments])
    with pytest.raises(SystemExit) as ended:
        aot.main()
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
