"""Compile the Triton kernels for a GPU that is not there, and read what came out.

    python -m lst_kernels.aot --target sm_90

Every kernel is compiled as it would be launched, in every configuration of the tables, and listed
with its registers and stack bytes a thread, its shared memory, and its tensor-core instructions.
Exits with 1 if one of them spills registers to memory, has more shared memory than the GPU, or
lacks the tensor-core instructions that its tile is made for.

16-bit kernels are compiled in bfloat16 alone: float16 has the same tiles and instructions.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lst_kernels.triton import patch_attention, pooling, scan, tables, tiled_attention
from lst_kernels.triton.launch import Launch


class Target(NamedTuple):
    """A GPU architecture."""

    triton: GPUTarget
    max_shared: int  # bytes of shared memory that one program can have
    tensor_core: str  # how its best matrix instruction reads in the assembly


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912, "mma.sync"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448, "wgmma.mma_async"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448, "tcgen05.mma"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536, "v_mfma"),
}
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way in which a kernel is launched: name of the family and what it depends on."""

    #: forward, backward_q, backward_kv, patch_forward, patch_backward, or of `POOLING` or `SCAN`
    family: str
    dtype: torch.dtype
    size: int  # D, or F
    heads: tuple[int, int] = (16, 16)
    slots: int = 1

    def __str__(self) -> str:
        heads, kv_heads = self.heads
        detail = f"D {self.size}, {heads}/{kv_heads} heads"
        if self.family.startswith("patch"):
            detail += f", {self.slots} slots"
        if self.family in POOLING or self.family in SCAN:
            detail = f"F {self.size}"
        return f"{self.family:16} {TYPES[self.dtype]} {detail}"


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a configuration compiled to."""

    registers: int  # a thread
    spilled: int  # bytes of stack a thread
    shared: int  # bytes a program
    instructions: dict[str, int]  # tensor-core instructions by name
    warps: int
    ttir: str


def configurations() -> Iterator[Configuration]:
    """All that are shipped, for any architecture."""
    bf16, fp32 = torch.bfloat16, torch.float32
    tiled: tuple[tables.Kernel, ...] = ("forward", "backward_q", "backward_kv")
    for family in tiled:
        for size in (16, 40, 64, 72, 80, 128, 256):
            yield Configuration(family, bf16, size)
        for size in (64, 128):
            yield Configuration(family, bf16, size, heads=(16, 4))
        for size in (64, 128, 256):
            yield Configuration(family, fp32, size)
    for owned in ("patch_forward", "patch_backward"):
        for slots in (1, 2, 4, 8, 32):
            yield Configuration(owned, bf16, 64, slots=slots)
        for size in (16, 72, 80, 128, 256):
            yield Configuration(owned, bf16, size, slots=2)
        yield Configuration(owned, bf16, 64, heads=(16, 4), slots=2)
        yield Configuration(owned, fp32, 64, slots=2)
    for rowwise in (*POOLING, *SCAN):
        for dtype in (bf16, fp32):
            yield Configuration(rowwise, dtype, 1024)


def launch(configuration: Configuration, architecture: str) -> Launch:
    """The launch of a configuration, over tensors without data."""
    family, dtype, size = configuration.family, configuration.dtype, configuration.size
    heads, kv_heads = configuration.heads
    if family in POOLING:
        return POOLING[family](_empty(1024, size, dtype=dtype))
    if family in SCAN:
        return SCAN[family](_empty(1024, size, dtype=dtype))
    num_queries = 1024 * configuration.slots
    q = _empty(num_queries, heads, size, dtype=dtype)
    k = _empty(1024, kv_heads, size, dtype=dtype)
    lse = _empty(num_queries, heads, dtype=torch.float32)
    ranges: Any = _Ranges(configuration.slots)
    if family == "patch_forward":
        return patch_attention.forward(q, k, k, ranges, 0.125)[0]
    if family == "patch_backward":
        return patch_attention.backward(q, q, k, k, q, lse, ranges, 0.125)[0]
    if family == "forward":
        tile = tables.tile("forward", architecture, dtype, size)
        return tiled_attention.forward(q, k, k, ranges, 0.125, tile)[0]
    if family == "backward_q":
        tile = tables.tile("backward_q", architecture, dtype, size)
        return tiled_attention.backward_q(q, q, k, k, q, lse, ranges, 0.125, tile)[0]
    tile = tables.tile("backward_kv", architecture, dtype, size)
    return tiled_attention.backward_kv(q, q, k, k, (lse, lse), ranges, 0.125, tile)[0]


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Triton's compiled kernel, of the types and alignments that the launch would have."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value, name = launch.arguments[parameter.name], parameter.name
        counted = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (counted and value == 1):
            signature[name], constants[i,] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            # An allocation is aligned to 16 bytes; `offsets[1:]` is not.
            if value.storage_offset() * value.itemsize % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if counted and value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=target, options=options)


def compile_configuration(configuration: Configuration, target_name: str) -> Compiled:
    """Compile one configuration for a target of `TARGETS`."""
    target = TARGETS[target_name]
    described = launch(configuration, target_name)
    kernel = compile_launch(described, target.triton)
    if target.triton.backend == "hip":
        registers, spilled = _amd_resources(kernel.asm["amdgcn"])
        assembly, names = kernel.asm["amdgcn"], ["v_mfma"]
    else:
        registers, spilled = _nvidia_resources(kernel.asm["cubin"])
        assembly, names = kernel.asm["ptx"], ["wgmma.mma_async", "tcgen05.mma", "mma.sync"]
    counts = {name: len(re.findall(re.escape(name) + r"[._]", assembly)) for name in names}
    return Compiled(
        registers, spilled, kernel.metadata.shared,
        {name: count for name, count in counts.items() if count},
        described.num_warps, kernel.asm["ttir"],
    )  # fmt: skip


def faults(configuration: Configuration, compiled: Compiled, target_name: str) -> list[str]:
    """What is wrong with a compiled configuration; nothing if it can be shipped."""
    target = TARGETS[target_name]
    found = []
    if compiled.spilled:
        found.append(f"spills {compiled.spilled} bytes")
    if compiled.shared > target.max_shared:
        found.append(f"needs more than {target.max_shared} bytes of shared memory")
    wanted = target.tensor_core if _wants_tensor_core(configuration, target_name) else None
    if wanted is not None and wanted not in compiled.instructions:
        found.append(f"has no {wanted}")
    return found


def _wants_tensor_core(configuration: Configuration, target_name: str) -> bool:
    """Tiled kernels of 16-bit numbers; on sm_90 and sm_100 only where a tile has the 64 rows that a
    warp group's instruction takes."""
    family = configuration.family
    if family not in ("forward", "backward_q", "backward_kv") or configuration.dtype.itemsize > 2:
        return False
    tile = tables.tile(family, target_name, configuration.dtype, configuration.size)
    rows = tile.block_n if family == "backward_kv" else tile.block_m
    return rows >= 64 or target_name in ("sm_80", "gfx942")


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread. (ptxas -v prints them too, where it can parse the PTX
    that this Triton writes; the binary can always be asked.)"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert usage is not None, listing
    return int(usage[1]), int(usage[2])


def _amd_resources(assembly: str) -> tuple[int, int]:
    """Vector registers and spilled bytes of a thread."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spilled = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    assert registers is not None, "no register count in the assembly"
    return int(registers[1]), int(spilled[1]) if spilled else 0


class _Ranges:
    """The tensors of a KeyRanges, without data."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.start = self.stop = self.query_start = self.query_stop = _empty(64, dtype=torch.int32)
        self.query_order = self.key_order = self.start


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


_OFFSETS = _empty(65, dtype=torch.int32)
_START, _STOP = _OFFSETS[:-1], _OFFSETS[1:]


def _pool(x: Tensor, reduce: str) -> Launch:
    return pooling.pool(x, _START, _STOP, reduce)[0]


def _pool_backward(grad: Tensor, reduce: str) -> Launch:
    index = _empty(64, grad.shape[1], dtype=torch.int32) if reduce == "max" else None
    return pooling.pool_backward(grad, _START, _STOP, reduce, index, 1024)[0]


POOLING = {
    "pool_mean": lambda x: _pool(x, "mean"),
    "pool_max": lambda x: _pool(x, "max"),
    "pool_last": lambda x: _pool(x, "last"),
    "pool_mean_back": lambda x: _pool_backward(x, "mean"),
    "pool_max_back": lambda x: _pool_backward(x, "max"),
    "pool_last_back": lambda x: _pool_backward(x, "last"),
    "expand": lambda x: pooling.expand(x, _START)[0],
    "expand_add": lambda x: pooling.expand(x, _START, x)[0],
}


def _scan(x: Tensor, kernel: int) -> Launch:
    return scan.scan(x, _empty(1025, dtype=torch.float32))[0][kernel]


def _scan_backward(grad: Tensor, kernel: int) -> Launch:
    return scan.scan_backward(grad, _empty(1025, dtype=torch.float32), grad)[0][kernel]


SCAN = {
    "scan_ends": lambda x: _scan(x, 0),
    "scan_carries": lambda x: _scan(x, 1),
    "scan_rows": lambda x: _scan(x, 2),
    "scan_ends_back": lambda x: _scan_backward(x, 0),
    "scan_rows_back": lambda x: _scan_backward(x, 2),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lst_kernels.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", choices=TARGETS, default="sm_90", help="GPU architecture")
    parser.add_argument("--family", help="only configurations whose family starts with this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    arguments = parser.parse_args()

    if arguments.jobs < 1:
        parser.error(f"--jobs: expected 1 or more, got {arguments.jobs}")
    chosen = [c for c in configurations() if c.family.startswith(arguments.family or "")]
    if not chosen:
        families = ", ".join(sorted({c.family for c in configurations()}))
        parser.error(f"--family: expected the start of one of {families}; got {arguments.family!r}")
    print(f"{'kernel':46} warps registers stack  shared  tensor cores")
    failures = 0
    with ProcessPoolExecutor(
        min(arguments.jobs, len(chosen)), mp_context=get_context("spawn")
    ) as pool:
        results = pool.map(compile_configuration, chosen, [arguments.target] * len(chosen))
        for configuration, compiled in zip(chosen, results, strict=True):
            found = faults(configuration, compiled, arguments.target)
            failures += bool(found)
            instructions = ", ".join(f"{n} {name}" for name, n in compiled.instructions.items())
            print(
                f"{configuration!s:46} {compiled.warps:5} {compiled.registers:9} "
                f"{compiled.spilled:5} {compiled.shared:7}  {instructions or '-'}"
                + "".join(f"  <-- {fault}" for fault in found),
                flush=True,
            )
    print(f"{len(chosen)} configurations for {arguments.target}, {failures} with faults")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
