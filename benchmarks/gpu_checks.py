"""Whether the ops are right on this GPU, before `benchmarks.gpu` measures one of them.

Each part of the checks is a process, ``python -m benchmarks.gpu_checks PART FILE``, all of them
side by side: a kernel that breaks the device for its process, or never ends, leaves the others
their checks and the figures their device, and kernels compile on many cores.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

import lst_kernels
from benchmarks import shapes
from benchmarks.gpu_measure import Report, one_line
from lst_kernels import (
    KeyRanges,
    PatchLayout,
    flash,
    patch_expand,
    patch_pool,
    range_attention,
    segment_scan,
)

__all__ = [
    "BACKEND", "PARTS", "ROOT", "Function", "check_apart", "check_attention", "check_beyond_int32",
    "check_pooling", "check_scan", "difference", "feature_rows", "flash_call", "run_suite",
]  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
BACKEND = "triton"
CHECKED_TOKENS = 2048
BEYOND_INT32 = 2_211_840  # tokens: 135 documents, 2.26e9 elements of 1024 features
ATTENTION, POOLING = ("encoder", "decoder", "causal"), ("patch_pool", "patch_expand")
OPS = (*ATTENTION, *POOLING, "segment_scan")

Function = Callable[..., Tensor]


def check_function(
    report: Report, op: str, case: str, ours: Function, oracle: Function,
    inputs: list[Tensor], grad: Tensor, *, repeats: bool = True,
) -> None:  # fmt: skip
    """Outputs and gradients of ``ours`` against ``oracle`` in float64 and in the inputs' dtype;
    then once more without a question to the device, for the same bits (with ``repeats``)."""
    try:
        dtype = grad.dtype
        first = _with_gradients(ours, inputs, grad, dtype)
        eager = _with_gradients(oracle, inputs, grad, dtype)
        exact = _with_gradients(oracle, inputs, grad, torch.float64)
        eps = torch.finfo(dtype).eps
        # dq, dk and dv share one scale: where dq cancels, the rounding of what cancels remains
        excess = max(
            shapes.excess_error(first[0], eager[0], exact[0], eps),
            shapes.excess_error(_flat(first[1:]), _flat(eager[1:]), _flat(exact[1:]), eps),
        )
        outcome = "passed" if excess <= 1 else f"error is {excess:.3g} times what is allowed"
        again = _without_questions(lambda: _with_gradients(ours, inputs, grad, dtype))
        same = all(map(torch.equal, first, again))
        if outcome == "passed" and repeats and not same:
            outcome = "a second run gives other bits"
        report.check(op, case, outcome, excess=excess, same_bits=same)
    except Exception as error:
        report.check(op, case, one_line(error))


def _with_gradients(
    function: Function, inputs: list[Tensor], grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def _without_questions(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """An op that waits for the device raises."""
    if not torch.cuda.is_available():
        return call()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_attention(
    report: Report, num_tokens: int, device: torch.device, ops: tuple[str, ...] = ATTENTION
) -> None:
    """With a window that is shorter than the documents of so few tokens, in patches too."""
    window = num_tokens // 64
    all_cases = {
        "encoder": shapes.encoder_cases(num_tokens, device),
        "decoder": shapes.decoder_cases(num_tokens, device, window),
        "causal": shapes.causal_cases(num_tokens, device, window),
    }
    for op in ops:
        for case in all_cases[op]:
            qkv, grad = shapes.attention_inputs(case.ranges, case.heads, torch.bfloat16)

            def oracle(q: Tensor, k: Tensor, v: Tensor, case: shapes.Case = case) -> Tensor:
                return shapes.dense_attention(q, k, v, case.ranges)

            def ours(q: Tensor, k: Tensor, v: Tensor, case: shapes.Case = case) -> Tensor:
                return range_attention(q, k, v, case.ranges, backend=BACKEND)

            check_function(report, case.op, case.name, ours, oracle, qkv, grad)
            if case.cu is not None and flash.unavailable_reason() is None:
                call = flash_call(case)
                check_function(
                    report, "flash", case.name, call, oracle, qkv, grad, repeats=False
                )  # its backward pass is deterministic only on request


def flash_call(case: shapes.Case) -> Function:
    cu = case.cu
    assert cu is not None, f"{case.name} is not causal"

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"max_length": case.max_length, "backend": "flash"}
        if case.window is None:
            return lst_kernels.block_causal_attention(q, k, v, cu, **options)
        return lst_kernels.sliding_window_attention(q, k, v, cu, window=case.window, **options)

    return call


def check_pooling(report: Report, num_tokens: int, device: torch.device) -> None:
    for name, make in shapes.LAYOUTS.items():
        layout = make(num_tokens).to(device)
        x, grad = (
            feature_rows(layout.num_tokens, device, 0),
            feature_rows(layout.num_patches, device, 1),
        )
        for reduce in ("max", "mean"):

            def ours(x: Tensor, layout: PatchLayout = layout, how: Any = reduce) -> Tensor:
                return patch_pool(x, layout, how, backend=BACKEND)

            def oracle(x: Tensor, layout: PatchLayout = layout, how: Any = reduce) -> Tensor:
                return patch_pool(x, layout, how, backend="reference")

            check_function(
                report, "patch_pool", f"patch_pool {reduce}, {name}", ours, oracle, [x], grad
            )
        for shift in (0, 1):

            def expand(z: Tensor, layout: PatchLayout = layout, by: Any = shift) -> Tensor:
                return patch_expand(z, layout, by, backend=BACKEND)

            def gather(z: Tensor, layout: PatchLayout = layout, by: Any = shift) -> Tensor:
                return patch_expand(z, layout, by, backend="reference")

            check_function(
                report, "patch_expand", f"patch_expand shift {shift}, {name}", expand, gather,
                [grad], x,
            )  # fmt: skip


def scan_call(cu: Tensor, backend: str) -> Function:
    """segment_scan with a decay in any precision, as `_with_gradients` makes it."""

    def call(x: Tensor, decay: Tensor) -> Tensor:
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        return segment_scan(x, decay.to(precise), cu, backend=backend)

    return call


def check_scan(report: Report, num_tokens: int, device: torch.device) -> None:
    """Each gradient by itself: the decay's is a sum over features, and much the larger."""
    layout = shapes.static_layout(num_tokens)
    x, grad = (feature_rows(num_tokens, device, seed) for seed in (0, 1))
    decay = torch.rand(num_tokens, device=device).to(x.dtype)
    for name, offsets in (("documents", layout.cu_tokens), ("patches", layout.cu_patches)):
        ours, oracle = (scan_call(offsets.to(device), each) for each in (BACKEND, "reference"))
        check_function(
            report, "segment_scan", f"segment_scan, {name}: x",
            lambda x, of=ours: of(x, decay), lambda x, of=oracle: of(x, decay), [x], grad,
        )  # fmt: skip
        check_function(
            report, "segment_scan", f"segment_scan, {name}: decay",
            lambda decay, of=ours: of(x.to(decay.dtype), decay),
            lambda decay, of=oracle: of(x.to(decay.dtype), decay), [decay], grad,
        )  # fmt: skip


def check_beyond_int32(report: Report, num_tokens: int, device: torch.device) -> None:
    """More elements than an int32 counts: the last document gives what it gives on its own."""
    free, _ = torch.cuda.mem_get_info(device)
    if free < 60e9:
        report.skip("more than 2³¹ elements", f"{free / 1e9:.0f} GB of memory are free, not 60")
        return
    documents = num_tokens // 16_384
    whole, alone = shapes.static_layout(num_tokens, documents), shapes.static_layout(16_384, 1)
    patterns: dict[str, Callable[[PatchLayout], KeyRanges]] = {
        "encoder": lambda layout: layout.patches_read_tokens(slots=shapes.SLOTS),
        "decoder": lambda layout: layout.tokens_read_patches(64, slots=shapes.SLOTS),
        "causal": lambda layout: layout.sliding_window(64),
    }
    for op, pattern in patterns.items():
        ranges, last = pattern(whole).to(device), pattern(alone).to(device)
        qkv, grad = shapes.attention_inputs(ranges, shapes.LOCAL_HEADS, torch.bfloat16)
        check_tail(
            report, op, qkv, grad,
            lambda *qkv, ranges=ranges: range_attention(*qkv, ranges, backend=BACKEND),
            lambda *qkv, last=last: range_attention(*qkv, last, backend=BACKEND),
            [last.num_queries, last.num_keys, last.num_keys, last.num_queries],
        )  # fmt: skip
        del qkv, grad
    whole, alone = whole.to(device), alone.to(device)
    x, z = feature_rows(whole.num_tokens, device, 0), feature_rows(whole.num_patches, device, 1)
    check_tail(
        report, "patch_pool", [x], z,
        lambda x: patch_pool(x, whole, "max", backend=BACKEND),
        lambda x: patch_pool(x, alone, "max", backend=BACKEND),
        [alone.num_tokens, alone.num_patches],
    )  # fmt: skip
    check_tail(
        report, "patch_expand", [z], x,
        lambda z: patch_expand(z, whole, backend=BACKEND),
        lambda z: patch_expand(z, alone, backend=BACKEND),
        [alone.num_patches, alone.num_tokens],
    )  # fmt: skip
    check_tail(
        report, "segment_scan", [x, torch.rand(len(x), device=device)], x,
        scan_call(whole.cu_tokens, BACKEND), scan_call(alone.cu_tokens, BACKEND),
        [alone.num_tokens] * 3,
    )  # fmt: skip


def check_tail(
    report: Report, op: str, inputs: list[Tensor], grad: Tensor,
    whole: Function, alone: Function, rows: list[int],
) -> None:  # fmt: skip
    """``rows``: how many of each input's rows, and of ``grad``'s, are the last document's."""
    case = f"{max(x.numel() for x in (*inputs, grad)):.3g} elements"
    try:
        tails = [x[len(x) - n :] for x, n in zip((*inputs, grad), rows, strict=True)]
        everything = _with_gradients(whole, inputs, grad, grad.dtype)
        own = _with_gradients(alone, tails[:-1], tails[-1], grad.dtype)
        worst = max(
            difference(x[len(x) - len(y) :], y) for x, y in zip(everything, own, strict=True)
        )
        outcome = "passed" if worst <= 1e-2 else f"the last document differs by {worst:.2g}"
        report.check(op, case, outcome, difference=worst)
    except Exception as error:
        report.check(op, case, one_line(error))


def difference(x: Tensor, y: Tensor) -> float:
    """Norm of x - y over that of y; infinite where x has no number."""
    x, y = x.detach().float(), y.detach().float()
    error = float((x - y).norm() / y.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def feature_rows(number: int, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(
        number, shapes.FEATURES, generator=generator, device=device, dtype=torch.bfloat16
    )


#: name → the ops that a part checks, and the part
PARTS: dict[str, tuple[tuple[str, ...], Callable[[Report, torch.device], None]]] = {
    **{
        op: (
            (op, "flash") if op == "causal" else (op,),
            lambda report, device, op=op: check_attention(report, CHECKED_TOKENS, device, (op,)),
        )
        for op in ATTENTION
    },
    "pooling": (POOLING, lambda report, device: check_pooling(report, CHECKED_TOKENS, device)),
    "scan": (("segment_scan",), lambda report, device: check_scan(report, CHECKED_TOKENS, device)),
    "beyond-int32": (OPS, lambda report, device: check_beyond_int32(report, BEYOND_INT32, device)),
}


def check_apart(report: Report, names: list[str], seconds: float) -> None:
    """Some of `PARTS`, side by side. One that breaks off, or is not done in time, fails its ops."""
    begun = time.monotonic()
    running: dict[str, tuple[Path, subprocess.Popen[bytes]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in names:
                path = Path(folder) / f"{name}.json"
                command = [sys.executable, "-m", "benchmarks.gpu_checks", name, str(path)]
                running[name] = path, subprocess.Popen(command, cwd=ROOT)
            for name, (path, process) in running.items():
                try:
                    status = process.wait(max(begun + seconds - time.monotonic(), 0))
                    ended = f"their process ended with status {status}"
                except subprocess.TimeoutExpired:
                    process.kill()
                    status, ended = process.wait(), f"they took more than {seconds:g} s"
                if path.exists():
                    found = json.loads(path.read_text())
                    report.checks += found["checks"]
                    report.not_measured += found["not_measured"]
                if status != 0:
                    for op in PARTS[name][0]:
                        report.check(op, f"checks of {name}", ended)
        finally:
            for _, process in running.values():  # where this one is interrupted
                process.kill()
                process.wait()


def main() -> None:
    name, path = sys.argv[1:]
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    flash.activate()  # as `benchmarks.gpu` does
    PARTS[name][1](Report(Path(path), {}, minutes=0), device)


SUITE = "the library's tests on the GPU"
SUITE_FILES = ("test_gpu.py", "triton_attention.py", "triton_pooling.py", "triton_scan.py")
WORKERS = 12  # where pytest-xdist is there: most of the time goes into compiling kernels


def run_suite(report: Report, seconds: float) -> None:
    """The library's own tests on this GPU. What fails there fails the ops that its name tells.

    After ``seconds`` no further test begins; what ran until then counts. Tests of more than 2³¹
    elements are left to `check_beyond_int32`, for side by side they would not fit the memory.
    """
    for needed in ("hypothesis", "pytest_timeout"):
        if importlib.util.find_spec(needed) is None:
            report.skip(SUITE, f"{needed} is not installed")
            return
    results = report.path.with_suffix(".tests.xml")
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *(f"tests/kernels/{name}" for name in SUITE_FILES)]
    command += ["-m", "gpu or not gpu", "-k", "not two_to_the_31", "-q", "-p", "no:cacheprovider"]
    command += [f"--session-timeout={seconds:g}", f"--junitxml={results}"]
    if importlib.util.find_spec("xdist"):
        workers = min(WORKERS, len(os.sched_getaffinity(0)))
        command += ["-n", str(workers), "--dist", "worksteal"]
    limit = seconds + 60  # for the tests that have begun by then
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        report.skip(SUITE, f"it took more than {limit:.0f} s")
        return
    finally:
        with contextlib.suppress(ProcessLookupError):  # its workers too, should one hang
            os.killpg(process.pid, signal.SIGKILL)
    said = out.strip().splitlines()
    print("   " + (said[-1] if said else f"exit status {process.returncode}"), flush=True)
    cut_short = "session-timeout:" in out
    if not results.exists() or (process.returncode not in (0, 1) and not cut_short):
        tail = " | ".join((said + errors.strip().splitlines())[-3:])
        report.skip(SUITE, f"exit status {process.returncode}: {tail}")
        return
    record_suite(report, results)
    if cut_short:
        report.skip(f"the rest of {SUITE}", f"{seconds:g} s were over")


#: what a test's name says it is about; the flash backend is an op of its own here
TESTED: dict[str, tuple[str, ...]] = {
    "flash": ("flash",), "encoder": ("encoder",), "decoder": ("decoder",), "sliding": ("causal",),
    "causal": ("causal",), "patch_pool": ("patch_pool",), "patch_expand": ("patch_expand",),
    "scan": ("segment_scan",), "attention": ATTENTION, "pooling": POOLING,
}  # fmt: skip


def record_suite(report: Report, results: Path) -> None:
    """A failed check for every test that failed, of the ops that the first word known in its name
    tells (of all, where it tells none); and one check of the op "suite" for the whole."""
    cases = list(ElementTree.parse(results).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None]
    failed += [case for case in cases if case.find("error") is not None]
    for case in failed:
        name = f"{case.get('classname', '').rpartition('.')[2]}: {case.get('name', '')}"
        told = (ops for word, ops in TESTED.items() if word in name)
        for op in next(told, ("flash", *OPS)):
            report.check(op, f"tests/kernels: {name}", "failed")
    ran = len(cases) - len(failed) - sum(case.find("skipped") is not None for case in cases)
    report.check("suite", SUITE, "passed" if ran else "ran no test", ran=ran)


if __name__ == "__main__":
    main()
