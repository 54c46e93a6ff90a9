"""The GPU benchmark gives no figure that its checks do not bear out, and keeps what it has.

On the CPU, with the reference in the kernels' place and a timer that counts: what is tested is
everything but the figures.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lst.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TOKENS = 96


class Counting:
    """A timer for which every call takes one millisecond."""

    def race(self, runs):
        from benchmarks.gpu_measure import Timing

        for run in runs.values():
            run(0)
            run(1)
        return {name: Timing(1.0, 1.0, 1.0, 2) for name in runs}


@pytest.fixture
def gpu(monkeypatch):
    """`benchmarks.gpu`, whose kernels are the reference."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import gpu, gpu_checks, gpu_peers

    for module in (gpu, gpu_checks, gpu_peers):
        monkeypatch.setattr(module, "BACKEND", "reference")
    return gpu


@pytest.fixture
def report(gpu, tmp_path):
    return gpu.Report(tmp_path / "out" / "a.json", {"device": "none"}, minutes=8.0)


def pass_checks(report, *ops):
    for op in ops:
        report.check(op, "by hand", "passed")


def named(entries, **facts):
    return [e for e in entries if all(e.get(key) == value for key, value in facts.items())]


def test_the_reference_passes_every_check(gpu, report):
    from benchmarks import gpu_checks

    gpu_checks.check_attention(report, TOKENS, CPU)
    gpu_checks.check_pooling(report, TOKENS, CPU)
    gpu_checks.check_scan(report, TOKENS, CPU)
    assert {check["op"] for check in report.checks} == {
        *("encoder", "decoder", "causal", "patch_pool", "patch_expand", "segment_scan")
    }
    assert len(report.checks) == 4 + 4 + 2 + 4 + 4 + 4
    assert not [check for check in report.checks if check["outcome"] != "passed"]


@pytest.mark.parametrize("harm", ["value", "gradient", "nan", "bits", "raises"])
def test_an_op_that_is_wrong_somewhere_fails_its_check(gpu, report, harm):
    from benchmarks.gpu_checks import check_function

    calls = []

    def square(x):
        return x.square()

    def wrong(x):
        calls.append(x)
        if harm == "raises":
            raise RuntimeError("no kernel\nat all")
        out = x.square()
        error = torch.zeros_like(out)
        error[3] = {"value": 0.5, "nan": torch.nan}.get(harm, 0.0)
        if harm == "gradient":
            error = error + 0.1 * (x - x.detach())
        if harm == "bits" and len(calls) > 1:
            error = error + 2e-3
        return out + error

    x, grad = (torch.randn(8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    x, grad = x.bfloat16(), grad.bfloat16()
    check_function(report, "square", "right", square, square, [x], grad)
    assert report.failed_check("square") is None
    check_function(report, "square", "wrong", wrong, square, [x], grad)
    assert report.failed_check("square").startswith("its check failed: wrong: ")
    if harm == "raises":
        assert report.checks[-1]["outcome"] == "RuntimeError: no kernel"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the scan would run")
def test_checks_that_fail_break_off_or_never_end_fail_their_ops(gpu, report, monkeypatch):
    from benchmarks import gpu_checks

    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)  # run in the repository, as the command is
    parts = gpu_checks.PARTS | {"no such part": (("causal",), None)}
    monkeypatch.setattr(gpu_checks, "PARTS", parts)
    gpu_checks.check_apart(report, ["scan", "no such part"], 100)
    assert "backend 'triton' cannot run this segment_scan" in report.failed_check("segment_scan")
    assert "their process ended with status 1" in report.failed_check("causal")
    assert report.failed_check("encoder") == "it was not checked"
    gpu_checks.check_apart(report, ["encoder"], 0)
    assert "they took more than 0 s" in report.failed_check("encoder")
    assert list(report.path.parent.iterdir()) == [report.path]


def test_checks_that_are_interrupted_leave_no_process_and_no_file(gpu, report, monkeypatch):
    from benchmarks import gpu_checks

    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

        def wait(self, timeout=None):
            if timeout is not None:
                raise KeyboardInterrupt
            return super().wait()

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_checks.check_apart(report, ["scan", "encoder"], 100)
    assert [process.returncode for process in started] == [-9, -9]
    assert not report.path.parent.exists()


def test_the_last_document_of_many_elements_is_held_against_itself_alone(gpu, report):
    from benchmarks.gpu_checks import check_tail

    x, grad = torch.randn(100, 4), torch.randn(100, 4)
    check_tail(report, "op", [x], grad, torch.sin, torch.sin, [10, 10])
    wrapped = lambda x: torch.cat((x[:95].sin(), x[:5].sin()))  # noqa: E731  offsets that wrap
    check_tail(report, "op", [x], grad, wrapped, torch.sin, [10, 10])
    assert [check["outcome"] == "passed" for check in report.checks] == [True, False]
    assert "400 elements" in report.checks[0]["case"]


def test_an_op_without_a_passed_check_gets_no_figure(gpu, report):
    gpu.measure_encoder(report, Counting(), TOKENS, CPU, 1e6)
    assert not report.figures
    assert "it was not checked" in report.not_measured[0]["reason"]
    pass_checks(report, "encoder")
    report.check("encoder", "twice", "a second run gives other bits")
    gpu.measure_encoder(report, Counting(), TOKENS, CPU, 1e6)
    assert not report.figures
    assert not report.targets
    assert "its check failed: twice" in report.not_measured[-1]["reason"]


def test_memory_bound_figures_count_every_byte_once(gpu, report):
    pass_checks(report, "encoder", "patch_pool", "patch_expand")
    gpu.measure_encoder(report, Counting(), TOKENS, CPU, 1e6)
    gpu.measure_pooling(report, Counting(), TOKENS, CPU, 1e6)
    case = "encoder, static 4, slots 2"
    patches = 4 * (1 + 5 + 1)  # of each document 1, five of 4, 3 tokens
    row, queries = 16 * 64 * 2, 2 * patches
    forward = queries * (2 * row + 4 * 16 + 8) + TOKENS * 2 * row
    backward = forward + queries * 2 * row + TOKENS * 2 * row
    for what, size in (("forward", forward), ("backward", backward)):
        (figure,) = named(report.figures, name="lst_kernels", case=case, what=what)
        assert figure["bytes"] == size
        assert figure["share_of_copy"] == pytest.approx(size / 1e6)
        assert figure["shape"]["queries"] == queries
        (target,) = named(report.targets, case=case, target=f"encoder {what}: share of copy")
        assert target["met"] == (target["got"] >= 0.75)
    (figure,) = named(
        report.figures, name="lst_kernels", case="patch_pool max, static 4", what="forward"
    )
    assert figure["bytes"] == (TOKENS + patches) * 2048 + patches * 1024 * 4 + 4 * (patches + 1)
    assert named(report.figures, name="indexing")
    assert named(report.figures, name="index_select")
    for peer in ("scatter_reduce", "segment_reduce", "embedding_bag", "index_add"):
        told = named(report.figures, name=peer) or [
            each for each in report.not_measured if each["what"].endswith(peer)
        ]
        assert told, peer
    assert any("varlen_attn" in each["what"] for each in report.not_measured)  # no CPU kernel


def test_the_scan_is_set_beside_the_copy_and_torchs_own_scan(gpu, report):
    gpu.measure_scan(report, Counting(), TOKENS, CPU, 1e6)
    assert not report.figures
    pass_checks(report, "segment_scan")
    gpu.measure_scan(report, Counting(), TOKENS, CPU, 1e6)
    rows, decays, offsets = TOKENS * 1024 * 2, TOKENS * 4, 4 * (4 + 1)
    sizes = {"forward": 2 * rows, "backward": 3 * rows + decays}
    for what, size in sizes.items():
        (figure,) = named(report.figures, name="lst_kernels", what=what)
        assert figure["bytes"] == size + decays + offsets
        assert figure["share_of_copy"] == pytest.approx(figure["bytes"] / 1e6)
    assert named(report.figures, name="associative_scan"), report.not_measured


def test_backward_runs_are_made_when_they_are_first_called(gpu, report, monkeypatch):
    """An op that raises and whose check failed does not end the part that would measure it."""
    from benchmarks import gpu_checks, gpu_peers

    def broken(*args, **options):
        raise RuntimeError("no kernel")

    for op in ("range_attention", "patch_pool", "patch_expand", "segment_scan"):
        monkeypatch.setattr(gpu_checks, op, broken)
        monkeypatch.setattr(gpu_peers if op == "range_attention" else gpu, op, broken)
    gpu_checks.check_attention(report, TOKENS, CPU)
    gpu_checks.check_pooling(report, TOKENS, CPU)
    gpu_checks.check_scan(report, TOKENS, CPU)
    assert {check["outcome"] for check in report.checks} == {"RuntimeError: no kernel"}
    gpu.measure_encoder(report, Counting(), TOKENS, CPU, 1e6)
    gpu.measure_pooling(report, Counting(), TOKENS, CPU, 1e6)
    gpu.measure_scan(report, Counting(), TOKENS, CPU, 1e6)
    gpu.measure_causal(report, Counting(), TOKENS, CPU)
    assert not report.figures


def test_decoder_and_encoder_are_raced_against_flex_under_the_same_mask(gpu, report, monkeypatch):
    from torch.nn.attention import flex_attention as flex

    def attend(q, k, v, block_mask):  # the real one has no backward pass on the CPU
        mask = flex.create_mask(block_mask.mask_mod, None, None, *block_mask.seq_lengths, "cpu")
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    monkeypatch.setattr(flex, "flex_attention", attend)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    pass_checks(report, "encoder", "decoder")
    gpu.measure_flex(report, Counting(), TOKENS, CPU, 0)
    peers = {"flex_attention, compiled", "flex_attention and its mask, compiled", "dense-mask SDPA"}
    (expected,) = named(report.figures, name="lst_kernels", case="decoder, window all, static 4")
    measured = {f["name"] for f in named(report.figures, case="decoder, window all, static 4")}
    assert measured == {"lst_kernels", *peers}, report.not_measured
    assert expected["tflops"] == 12 * expected["shape"]["pairs"] * 1024 / 1e9
    floors = {t["target"]: t["at_least"] for t in report.targets if "decoder" in t["case"]}
    assert sorted(floors.values()) == [1.0, 2.0]


def test_block_causal_is_raced_against_varlen_attn(gpu, report, monkeypatch):
    from benchmarks import gpu_peers
    from lst_kernels import range_attention

    def dense(case):
        return lambda q, k, v: range_attention(q, k, v, case.ranges, backend="reference")

    pass_checks(report, "causal")
    gpu.measure_causal(report, Counting(), TOKENS, CPU)  # varlen_attn has no CPU kernel
    assert {figure["name"] for figure in report.figures} == {"lst_kernels"}
    assert not report.targets
    monkeypatch.setattr(gpu_peers, "varlen_call", dense)
    gpu.measure_causal(report, Counting(), TOKENS, CPU)
    assert {target["case"] for target in report.targets} == {"block-causal"}
    assert [target["got"] for target in report.targets] == [1.0, 1.0]


def test_varlen_attn_is_called_with_one_key_fewer_than_the_window(gpu, monkeypatch):
    from torch.nn.attention import varlen

    from benchmarks import gpu_peers, shapes

    calls = []
    monkeypatch.setattr(varlen, "varlen_attn", lambda *args, **options: calls.append(options))
    q = torch.ones(1, 1, 64)
    for case in (*shapes.causal_cases(TOKENS, CPU), *shapes.encoder_cases(TOKENS, CPU)):
        gpu_peers.varlen_call(case)(q, q, q)
    windows = [options["window_size"] for options in calls]
    assert windows == [(511, 0), (-1, 0), *[(-1, -1)] * 4]


def test_rounds_take_turns_and_slow_calls_run_few(gpu, monkeypatch):
    now = [0.0]
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, other):
            return other.at - self.at

    class Properties:
        L2_cache_size = 1024

    def call(name, milliseconds):
        def run(number):
            order.append((name, number))
            now[0] += milliseconds

        return run

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    timer = gpu.Timer(CPU)
    times = timer.race({"quick": call("quick", 0.5), "slow": call("slow", 300.0)})
    assert (times["quick"].median, times["quick"].rounds) == (0.5, timer.MOST_ROUNDS)
    assert (times["slow"].median, times["slow"].rounds) == (300.0, timer.FEWEST_ROUNDS)
    timed = order[2 * (timer.WARM_UP + 1) :]
    assert timed[:4] == [("quick", 0), ("slow", 0), ("quick", 1), ("slow", 1)]


def test_a_short_run_leaves_flex_out_and_says_so(gpu, report):
    report.minutes = 2.0
    gpu.measure_flex(report, Counting(), TOKENS, CPU, 100.0)
    assert not report.figures
    assert len(report.not_measured) == 6


def test_a_peer_with_another_result_is_no_peer(gpu, report):
    x = torch.randn(64)
    pass_checks(report, "op")
    peers = {
        "right": lambda: gpu.Peer(lambda _: x.clone()),
        "wrong": lambda: gpu.Peer(lambda _: x + 1),
        "absent": lambda: pytest.importorskip("no_such_module_at_all").Peer,
    }
    peers["absent"] = lambda: (_ for _ in ()).throw(ImportError("no such package"))
    facts = {"op": "op", "case": "c"}
    gpu.compare(report, Counting(), {"lst_kernels": lambda _: x}, peers, facts, "forward")
    assert {figure["name"] for figure in report.figures} == {"lst_kernels", "right"}
    reasons = {each["what"]: each["reason"] for each in report.not_measured}
    assert "differs from ours" in reasons["c, forward: wrong"]
    assert reasons["c, forward: absent"] == "ImportError: no such package"


def test_what_was_measured_is_kept_when_the_run_is_cut_short(gpu, report):
    with report.part("first"):
        report.figure("copy", None, gigabytes_per_second=1.0)
    with report.part("broken"):
        raise ValueError("of this part alone")

    def cut_short():
        with report.part("cut short"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_short()
    kept = json.loads(report.path.read_text())
    assert kept["machine"] == {"device": "none"}
    assert kept["figures"] == [{"name": "copy", "gigabytes_per_second": 1.0}]
    outcomes = {part["part"]: part["outcome"] for part in kept["parts"]}
    assert outcomes["broken"] == "ValueError: of this part alone"
    assert outcomes["cut short"] == "interrupted"


def test_tests_that_fail_fail_the_ops_of_their_names(gpu, report, tmp_path):
    from benchmarks.gpu_checks import record_suite

    results = tmp_path / "results.xml"
    results.write_text(
        "<testsuites><testsuite>"
        '<testcase name="test_a[encoder-triton]"><failure/></testcase>'
        '<testcase name="test_b[sliding-flash]"><error/></testcase>'
        '<testcase name="test_c"><skipped/></testcase><testcase name="test_d"/>'
        "</testsuite></testsuites>"
    )
    pass_checks(report, "encoder", "decoder", "causal", "flash")
    record_suite(report, results)
    failed = {op for op in ("encoder", "decoder", "causal", "flash") if report.failed_check(op)}
    assert failed == {"encoder", "flash"}
    pass_checks(report, "segment_scan", "patch_pool")
    results.write_text(
        '<testsuite><testcase classname="tests.kernels.triton_scan" name="test_e"><failure/>'
        "</testcase></testsuite>"
    )
    record_suite(report, results)
    assert report.failed_check("segment_scan")
    assert not report.failed_check("decoder")
    results.write_text('<testsuite><testcase name="test_f"><failure/></testcase></testsuite>')
    record_suite(report, results)
    assert report.failed_check("decoder")
    assert report.failed_check("patch_pool")


def test_tests_that_ran_before_the_time_was_over_count(gpu, report, monkeypatch):
    from benchmarks import gpu_checks

    monkeypatch.setattr(gpu_checks, "SUITE_FILES", ("test_schedule.py",))
    monkeypatch.setattr(gpu_checks, "WORKERS", 1)
    gpu_checks.run_suite(report, 0.001)
    (suite,) = report.checks
    assert (suite["outcome"], suite["ran"]) == ("passed", 1)
    (rest,) = report.not_measured
    assert rest["what"].startswith("the rest of")


def test_what_the_gpu_benchmarks_import_needs_no_command_line():
    """A GPU machine may have torch and little else."""
    blocked = f"import sys; sys.modules['tyro'] = None; sys.path.append({str(ROOT)!r}); "
    modules = "import benchmarks.gpu, benchmarks.train_steps, benchmarks.test_model"
    subprocess.run([sys.executable, "-c", blocked + modules], check=True)


def test_the_plan_is_set_beside_the_modules_that_read_it(gpu, report, monkeypatch):
    from lst.model import config

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    small = config.StackConfig(layers=1, dim=32, heads=2)
    monkeypatch.setattr(config, "_paper_local", lambda layers: small)
    gpu.measure_plan(report, Counting(), TOKENS, CPU)
    (target,) = report.targets
    share = named(report.figures, name="layout and ranges, share of encoder and decoder")[0]
    assert target["got"] == share["share"]
    assert target["met"] == (target["got"] <= 0.01)


def test_the_table_has_the_worst_of_each_target(gpu, report):
    report.target("share of copy", 0.9, "encoder", at_least=0.75)
    report.target("share of copy", 0.7, "pooling", at_least=0.75)
    report.target("share of copy", 0.8, "expansion", at_least=0.75)
    report.target("plan", 0.002, "65536 tokens", at_most=0.01)
    report.check("encoder", "a", "passed")
    report.skip("varlen_attn", "refuses")
    table = report.table()
    assert re.search(r"share of copy +>= 0\.75 +0\.7 +NOT MET +3: pooling$", table, re.M)
    assert re.search(r"plan +<= 0\.01 +0\.002 +met +1: 65536 tokens$", table, re.M)
    assert "1 checks passed, 0 did not" in table
    assert "not measured: varlen_attn: refuses" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_the_command_says_so(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="this measures a GPU, and torch sees none"):
        gpu.main()
