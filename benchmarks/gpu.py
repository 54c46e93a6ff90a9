"""How fast are the kernels on this GPU, beside what else it can do and what else there is?

::

    python -m benchmarks.gpu --out DIR

needs the repository, torch with CUDA, Triton, numpy and pyarrow, and under 8 minutes; nothing is
installed or downloaded, and the package need not be installed: run it in the repository's root.
(pytest, hypothesis and pytest-timeout are needed for the test suite alone, pytest-xdist quickens
it; what is absent is said.) It writes ``DIR/<gpu>-<date>.json`` anew after each part, so that a run
cut short keeps what it measured, and ends with a table of the project's targets beside the figures.
The exit status is 1 where a check failed; a target not met is no failure.

    floor of a memory-bound op:    its inputs and outputs, each byte once, over the copy bandwidth
    floor of tiled attention:      4 D FLOP a head and pair forward, 8 D backward, over its rate

1. **Limits**, measured here: bandwidth of a large copy (read + written), rate of a bf16 product.
2. **Checks.** Each op at the benchmark's heads and patterns, fewer tokens, in bfloat16 against
   dense float64 (twice the error of eager bfloat16 plus four roundings); a second run gives the
   same bits and asks the device nothing; more than 2³¹ elements; the library's tests, as many as
   two minutes allow. An op whose check fails gets no figure.
3. **Memory-bound ops** at T = 65,536: the encoder's attention, the poolings and the scan, forward
   and backward, as a share of the copy bandwidth; torch's own ways beside them.
4. **Decoder, encoder, sliding window, block-causal** beside compiled flex_attention, with and
   without the building of its mask, dense-mask SDPA and ``varlen_attn``, forward and backward.
5. **The plan**: layout and ranges of a batch of 65,536 tokens, made on the CPU and moved, beside
   the time of the encoder and decoder that read it (`lst.model`, bfloat16, forward and backward).
   In training the loader makes it beside the step before; here all of its time counts.
6. ``benchmarks.train_steps``, in a process of its own with the time that is left (``--no-model``
   leaves it out).

How it times: `benchmarks.gpu_measure.Timer`. CUDA events, medians, ours and peers in turn, caches
flushed before each call, two sets of inputs that take turns; the device's time, without Python's.
Peers get their inputs in the layout they like best. A peer that fails, or whose result differs from
ours, is a reason in the report and no figure. Shapes: `benchmarks.shapes`.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.gpu_checks import (
    BACKEND,
    PARTS,
    ROOT,
    check_apart,
    difference,
    feature_rows,
    flash_call,
    run_suite,
)
from benchmarks.gpu_measure import Report, Run, Timer, Timing, one_line
from benchmarks.gpu_peers import (
    Peer,
    Sets,
    attention_sets,
    expanding_peers,
    flex_peers,
    pooling_peers,
    scan_peer,
    sdpa_peer,
    varlen_peer,
)
from lst.errors import UserError, expect_positive, run_command
from lst.files import make_folder
from lst.machine import describe_machine, file_stem
from lst_kernels import (
    KeyRanges,
    PatchLayout,
    flash,
    patch_expand,
    patch_pool,
    segment_scan,
)

TOKENS = 65_536
MINUTES = 8.0
CHECK_SECONDS = 150
WAKING = 300  # products, about half a second, in which an idle GPU's clocks rise
SUITE_SECONDS = 120
MODEL_SECONDS = 100  # kept free for train_steps


# --- 1: the machine's limits ----------------------------------------------------------------------


def measure_limits(report: Report, timer: Timer, device: torch.device) -> float:
    """Bytes per ms that a copy moves."""
    source = torch.ones(2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(WAKING):
        a @ b
    times = timer.race({"copy": lambda _: target.copy_(source), "product": lambda _: a @ b})
    bandwidth = 2 * source.nbytes / times["copy"].median
    report.figure("copy of 1 GiB", times["copy"], gigabytes_per_second=bandwidth / 1e6)
    rate = 2 * 8192**3 / times["product"].median / 1e9
    report.figure("bf16 product of 8192³", times["product"], tflops=rate)
    print(f"   copy {bandwidth / 1e6:,.0f} GB/s, bf16 product {rate:,.0f} TFLOP/s", flush=True)
    return bandwidth


# --- 3 and 4: ours and peers ----------------------------------------------------------------------


def compare(
    report: Report, timer: Any, ours: Mapping[str, Run],
    peers: Mapping[str, Callable[[], Peer]], facts: dict[str, Any], what: str,
    *, nbytes: int = 0, flops: float = 0, bandwidth: float = 0,
) -> dict[str, Timing]:  # fmt: skip
    """Time ours (the first of them is the measure) and its peers; a peer is made here, so that its
    failure is a reason and no more."""
    runs: dict[str, Run] = {}
    for name, run in ours.items():
        op = "flash" if name.startswith("flash") else facts["op"]
        if (reason := report.failed_check(op)) is not None:
            report.skip(f"{facts['case']}, {what}: {name}", reason)
        else:
            runs[name] = run
    if not runs:
        return {}
    expected = _first(next(iter(runs.values()))(0))
    for name, make in peers.items():
        try:
            peer = make()
            apart = difference(peer.as_ours(_first(peer.run(0))), expected)
            if apart > 2e-2:
                raise ArithmeticError(f"its result differs from ours by {apart:.2g} of the norm")
            runs[name] = peer.run
        except Exception as error:
            report.skip(f"{facts['case']}, {what}: {name}", one_line(error))
            torch.cuda.empty_cache()
    timings = timer.race(runs)
    for name, timing in timings.items():
        more: dict[str, Any] = {"backend": BACKEND if name in ours else "peer"}
        if nbytes:
            more |= {"bytes": nbytes, "share_of_copy": nbytes / timing.median / bandwidth}
        if flops:
            more["tflops"] = flops / timing.median / 1e9
        report.figure(name, timing, what=what, **facts, **more)
        extra = "".join(f", {key} {value:.3g}" for key, value in more.items() if key[0] in "st")
        told = f"{facts['case']}, {what}: {name} {timing.median:.3f} ms{extra}"
        print(f"   {told}", flush=True)
    report.save()
    return timings


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple | list) else result


def nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def measure_encoder(
    report: Report, timer: Any, num_tokens: int, device: torch.device, bandwidth: float
) -> None:
    """Memory-bound: forward reads q, k, v and the ranges and writes out and lse; backward reads
    these and the gradient, and writes three gradients."""
    for case in shapes.encoder_cases(num_tokens, device):
        sets = attention_sets(case)
        (q, k, v), grad = sets.sets[0]
        lse = 4 * q.shape[0] * q.shape[1]
        ends = nbytes(case.ranges.start, case.ranges.stop)
        there = nbytes(q, k, v, q) + lse + ends
        varlen = {"varlen_attn": lambda case=case: varlen_peer(case, "forward")}
        for what, run, size, peers in (
            ("forward", sets.forward, there, varlen),
            ("backward", sets.backward(), there + nbytes(grad, q, k, v), {}),
        ):
            times = compare(
                report, timer, {"lst_kernels": run}, peers, case.facts(), what,
                nbytes=size, bandwidth=bandwidth,
            )  # fmt: skip
            if times:
                share = size / times["lst_kernels"].median / bandwidth
                report.target(f"encoder {what}: share of copy", share, case.name, at_least=0.75)


def measure_pooling(
    report: Report, timer: Any, num_tokens: int, device: torch.device, bandwidth: float
) -> None:
    """Memory-bound: the tokens' rows and the patches' rows once each, and max's winners."""
    for name, make in shapes.LAYOUTS.items():
        layout = make(num_tokens).to(device)
        tokens = [feature_rows(layout.num_tokens, device, seed) for seed in (0, 1)]
        patches = [feature_rows(layout.num_patches, device, seed) for seed in (2, 3)]
        facts = {
            "dtype": "bfloat16",
            "shape": {
                "tokens": num_tokens,
                "patches": layout.num_patches,
                "features": shapes.FEATURES,
            },
        }
        size = nbytes(tokens[0], patches[0], layout.cu_patches)
        for reduce in ("max", "mean"):
            sets = Sets(
                lambda x, how=reduce, layout=layout: patch_pool(x, layout, how, backend=BACKEND),
                [([x.clone().requires_grad_()], z) for x, z in zip(tokens, patches, strict=True)],
            )
            winners = 4 * patches[0].numel() if reduce == "max" else 0
            _measure_rows(
                report, timer, f"patch_pool {reduce}, {name}", sets, size + winners, bandwidth,
                facts | {"op": "patch_pool"}, pooling_peers(sets, layout, reduce),
            )  # fmt: skip
        for shift in (0, 1):
            sets = Sets(
                lambda z, by=shift, layout=layout: patch_expand(z, layout, by, backend=BACKEND),
                [([z.clone().requires_grad_()], x) for x, z in zip(tokens, patches, strict=True)],
            )
            ids = layout.patch_ids if shift == 0 else layout.readable_ids
            peers = expanding_peers(sets, ids)
            _measure_rows(
                report, timer, f"patch_expand shift {shift}, {name}", sets,
                size + nbytes(ids), bandwidth, facts | {"op": "patch_expand"},
                peers if shift == 0 else {},
            )  # fmt: skip


def _measure_rows(
    report: Report, timer: Any, case: str, sets: Sets, size: int, bandwidth: float,
    facts: dict[str, Any], peers: dict[str, Callable[[], Peer]],
) -> None:  # fmt: skip
    for what, run in (("forward", sets.forward), ("backward", sets.backward())):
        times = compare(
            report, timer, {"lst_kernels": run}, {}, facts | {"case": case}, what,
            nbytes=size, bandwidth=bandwidth,
        )  # fmt: skip
        if times:
            share = size / times["lst_kernels"].median / bandwidth
            report.target(f"{facts['op']} {what}: share of copy", share, case, at_least=0.75)
    compare(
        report, timer, {"lst_kernels": sets.both}, peers, facts | {"case": case},
        "forward + backward", nbytes=2 * size, bandwidth=bandwidth,
    )  # fmt: skip


def measure_scan(
    report: Report, timer: Any, num_tokens: int, device: torch.device, bandwidth: float
) -> None:
    """Memory-bound, without a target: forward reads x and writes y; backward reads dy and y and
    writes dx. The decays and their gradient are a thousandth of that."""
    layout = shapes.static_layout(num_tokens)
    cu = layout.cu_tokens.to(device)
    rows = [feature_rows(num_tokens, device, seed) for seed in range(4)]
    decays = [torch.rand(num_tokens, device=device) for _ in range(2)]
    sets = Sets(
        lambda x, decay: segment_scan(x, decay, cu, backend=BACKEND),
        [([x.requires_grad_(), decay.requires_grad_()], grad)
         for x, decay, grad in zip(rows[:2], decays, rows[2:], strict=True)],
    )  # fmt: skip
    facts = {
        "op": "segment_scan", "case": "segment_scan, documents", "dtype": "bfloat16",
        "shape": {
            "rows": num_tokens, "segments": layout.num_documents, "features": shapes.FEATURES,
        },
    }  # fmt: skip
    read = nbytes(rows[0], decays[0], cu)
    peers = {"associative_scan": lambda: Peer(Sets(scan_peer(cu), sets.sets).forward)}
    for what, run, size, others in (
        ("forward", sets.forward, read + nbytes(rows[0]), peers),
        ("backward", sets.backward(), read + nbytes(*rows[:2], decays[0]), {}),
    ):
        compare(
            report, timer, {"lst_kernels": run}, others, facts, what,
            nbytes=size, bandwidth=bandwidth,
        )  # fmt: skip


def measure_causal(report: Report, timer: Any, num_tokens: int, device: torch.device) -> None:
    """Ours through FlashAttention and through Triton, beside torch's varlen_attn."""
    for case in shapes.causal_cases(num_tokens, device):
        product = 4 * case.ranges.num_pairs * case.heads[0] * case.heads[1]
        for what, name, flops in (
            ("forward", "forward", product), ("both", "forward + backward", 3 * product),
        ):  # fmt: skip
            ours = {"lst_kernels": getattr(attention_sets(case), what)}
            if flash.unavailable_reason() is None:
                ours["flash (lst_kernels)"] = getattr(attention_sets(case, flash_call(case)), what)
            peers = {"varlen_attn": lambda case=case, what=what: varlen_peer(case, what)}
            times = compare(report, timer, ours, peers, case.facts(), name, flops=flops)
            if case.window is None and {"lst_kernels", "varlen_attn"} <= times.keys():
                ratio = times["varlen_attn"].median / times["lst_kernels"].median
                report.target(f"{name}, Triton against varlen_attn", ratio, case.name, at_least=0.7)


def measure_flex(
    report: Report, timer: Any, num_tokens: int, device: torch.device, keep_seconds: float
) -> None:
    """Forward + backward beside compiled flex_attention. Compiling takes long, so the cases that
    have targets come first, and cases are left out when time runs short."""
    floors = {"decoder": (1.0, 2.0), "encoder": (None, 10.0)}
    cases = [*shapes.decoder_cases(num_tokens, device), *shapes.encoder_cases(num_tokens, device)]
    cases = [
        case for case in cases if case.op == "decoder" or case.name.endswith(f"s {shapes.SLOTS}")
    ]
    for case in sorted(cases, key=lambda case: "word" in case.name):
        if report.seconds_left() < keep_seconds + 45:
            report.skip(f"{case.name}: flex_attention", "the time for the whole run was short")
            continue
        sets = attention_sets(case)
        flops = 12 * case.ranges.num_pairs * case.heads[0] * case.heads[1]
        peers = flex_peers(case, sets, "both")
        if "static" in case.name:
            peers["dense-mask SDPA"] = sdpa_peer(case, sets, "both")
        times = compare(
            report, timer, {"lst_kernels": sets.both}, peers, case.facts(),
            "forward + backward", flops=flops,
        )  # fmt: skip
        for peer, floor in zip(list(peers)[:2], floors[case.op], strict=True):
            if floor is not None and {"lst_kernels", peer} <= times.keys():
                ratio = times[peer].median / times["lst_kernels"].median
                target = f"{case.op}: times faster than {peer}"
                report.target(target, ratio, case.name, at_least=floor)


# --- 5 and 6: the plan and the model --------------------------------------------------------------


def make_plan(lengths: Tensor, documents: Tensor, num_tokens: int) -> list[PatchLayout | KeyRanges]:
    """What a batch needs, as `lst.data.batch.plan_batch` makes it; on the tensors' device."""
    layout = PatchLayout.from_lengths(lengths, documents, num_tokens=num_tokens)
    return [
        layout,
        layout.patches_read_tokens(slots=shapes.SLOTS),
        layout.tokens_read_patches(shapes.WINDOW, slots=shapes.SLOTS),
        layout.sliding_window(shapes.WINDOW),
        layout.block_causal(),
    ]


def measure_plan(report: Report, timer: Any, num_tokens: int, device: torch.device) -> None:
    layout = shapes.static_layout(num_tokens)
    lengths, documents = torch.diff(layout.cu_patches), torch.diff(layout.cu_documents)
    plan = make_plan(lengths, documents, num_tokens)
    facts = {"shape": {"tokens": num_tokens, "patches": layout.num_patches}}

    def move() -> None:
        for each in plan:
            each.to(device, non_blocking=True)
        torch.cuda.synchronize()

    made = _seconds(lambda: make_plan(lengths, documents, num_tokens))
    moved = _seconds(move)
    threads = torch.get_num_threads()
    report.figure(
        "layout and ranges, made on the CPU", None, seconds=made, threads=threads, **facts
    )
    report.figure("layout and ranges, moved to the GPU", None, seconds=moved, **facts)
    print(f"   made in {made * 1e3:.2f} ms, moved in {moved * 1e3:.2f} ms", flush=True)
    there = lengths.to(device), documents.to(device)
    on_device = timer.race({"plan": lambda _: make_plan(*there, num_tokens)})["plan"]
    report.figure("layout and ranges, made on the GPU with bounds for maxima", on_device, **facts)
    served = timer.race({"modules": encoder_and_decoder(layout, device)})["modules"]
    report.figure(
        "encoder and decoder of lst.model, forward + backward", served,
        dtype="bfloat16 autocast, float32 weights", **facts,
    )  # fmt: skip
    share = (made + moved) * 1e3 / served.median
    report.figure("layout and ranges, share of encoder and decoder", None, share=share)
    case = f"{num_tokens} tokens, static 4"
    report.target("layout and ranges: share of encoder and decoder", share, case, at_most=0.01)


def _seconds(call: Callable[[], object], rounds: int = 20) -> float:
    call()
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return sorted(taken)[rounds // 2]


def encoder_and_decoder(layout: PatchLayout, device: torch.device) -> Run:
    """The modules around the global transformer of ``lst-1b``, on a stream of random tokens."""
    import numpy as np

    from lst.data.batch import plan_batch
    from lst.data.packing import Packed
    from lst.model import ModelConfig
    from lst.model.patch_decoder import PatchDecoder
    from lst.model.patch_encoder import PatchEncoder
    from lst.vocabulary import Vocabulary

    config = ModelConfig()
    packed = Packed(
        tokens=np.full(layout.num_tokens, 600, np.int32),
        targets=np.full(layout.num_tokens, 600, np.int32),
        lengths=torch.diff(layout.cu_patches).numpy(),
        closed_late=np.zeros(layout.num_patches, bool),
        patches_per_document=torch.diff(layout.cu_documents).numpy(),
        record_ids=("random",) * layout.num_documents,
    )
    vocabulary = Vocabulary(num_pieces=500, num_units=501)
    batch = plan_batch(packed, vocabulary, config.plan()).to(device)
    with device:
        encoder, decoder = PatchEncoder(config), PatchDecoder(config)
        x = torch.randn(layout.num_tokens, config.encoder.dim, requires_grad=True)
        z = torch.randn(layout.num_patches, config.global_transformer.dim, requires_grad=True)
    weights = [*encoder.parameters(), *decoder.parameters()]

    def run(_: int) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            h, patches = encoder(x, batch)
            out = decoder(h, z, batch)
        loss = out.float().mean() + patches.float().mean()
        torch.autograd.grad(loss, [x, z, *weights])

    return run


def run_model(report: Report, out: Path) -> None:
    seconds = report.seconds_left() - 5
    if seconds < 30:
        report.skip("benchmarks.train_steps", f"{max(seconds, 0):.0f} s of the run were left")
        return
    command = [sys.executable, "-m", "benchmarks.train_steps", "--out", str(out)]
    try:
        run = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        report.skip("benchmarks.train_steps", f"stopped after {seconds:.0f} s; see its own file")
        return
    if run.returncode:
        report.skip("benchmarks.train_steps", f"exit status {run.returncode}; it says why above")


# --- all of it ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the result file")
    parser.add_argument("--no-model", action="store_true", help="leave training steps out")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it")
    options = parser.parse_args()
    expect_positive(options, "minutes")
    if not torch.cuda.is_available():
        raise UserError("this measures a GPU, and torch sees none")
    device = torch.device("cuda", torch.cuda.current_device())
    about = describe_machine(device) | {"flash": flash.activate() | flash.providers()}
    options.out = options.out.resolve()  # for the processes that run in the repository's root
    make_folder(options.out)
    report = Report(options.out / f"{file_stem(about)}.json", about, options.minutes)
    _allow_many_compilations()
    keep = 0 if options.no_model else MODEL_SECONDS
    try:
        with torch.cuda.device(device):
            measure(report, Timer(device), device, keep)
        if not options.no_model:
            with report.part("training steps"):
                run_model(report, options.out)
    finally:
        print(f"\n{about['device']}, torch {about['torch']}, commit {about['commit']}")
        print(report.table())
        print(f"written to {report.path}", flush=True)
    sys.exit(any(check["outcome"] != "passed" for check in report.checks))


def measure(report: Report, timer: Timer, device: torch.device, keep_seconds: float) -> None:
    """Every part but the model's."""
    bandwidth = 0.0
    with report.part("limits"):
        bandwidth = measure_limits(report, timer, device)
    if not bandwidth:
        return
    with report.part("checks"):
        check_apart(report, list(PARTS), CHECK_SECONDS)
    with report.part("checks: the library's tests"):
        run_suite(report, SUITE_SECONDS)
    with report.part("encoder"):
        measure_encoder(report, timer, TOKENS, device, bandwidth)
    with report.part("pooling"):
        measure_pooling(report, timer, TOKENS, device, bandwidth)
    with report.part("scan"):
        measure_scan(report, timer, TOKENS, device, bandwidth)
    with report.part("causal"):
        measure_causal(report, timer, TOKENS, device)
    with report.part("plan"):
        measure_plan(report, timer, TOKENS, device)
    with report.part("flex"):
        measure_flex(report, timer, TOKENS, device, keep_seconds)


def _allow_many_compilations() -> None:
    """flex_attention that is no longer compiled materialises all scores; rather more graphs."""
    import torch._dynamo.config as config

    for name in ("recompile_limit", "cache_size_limit"):  # the name has changed
        if hasattr(config, name):
            setattr(config, name, 256)


if __name__ == "__main__":
    run_command(main)
