"""The page says what the files say, the same bytes each time, and nothing else."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import report
from lst.errors import UserError

MACHINE = {
    "device": "Toy(R) Processor",
    "python": "3.11.7",
    "torch": "2.13.0",
    "libraries": {"numpy": "2.4.6"},
    "commit": "abc1234",
    "date": "2026-01-02",
    "threads": 2,
    "load": 0.25,
}
LIMITS = {"bytes_per_second": 2e10, "flops_per_second": 1e11}


def row(question, case, peer="peer", ratio=2.0, floor=None, **facts):
    return {
        "question": question,
        "case": case,
        "peer": peer,
        "ours": "1.00 ms",
        "theirs": "2.00 ms",
        "ratio": ratio,
        "floor": floor,
        "note": "",
        "facts": facts,
        "passed": floor is None or ratio >= floor,
    }


def model_rows():
    for name, cost in (("token-level", 1.0), ("static 4, text global", 0.9)):
        rates = {"tokens_per_second": 1000 / cost, "units_per_second": 800.0}
        yield row(
            "model", f"mix: {name}", ratio=1 / cost, floor=None if cost == 1 else 1 / 0.95,
            model=name, what="train", same="content", content="the paper's mix", seconds=cost,
            flops_ratio=cost - 0.05, time_ratio=cost, hours_per_second=0.01, **rates,
        )  # fmt: skip
        for share in (0.0, 1.0):
            yield row(
                "model", f"{share}: {name}", model=name, what="train", sweep=True,
                speech_share=share, patch_size=1 if cost == 1 else 4, seconds=cost, **rates,
            )  # fmt: skip


def gap_rows():
    for part, kind, seconds, floor in (
        ("global_transformer", "products", 0.6, 0.5),
        ("optimizer", "optimizer", 0.3, 0.1),
        ("between operations", "between", 0.1, 0.0),
    ):
        yield row(
            "gap", f"toy, training step: {part}", part=part, kind=kind, seconds=seconds,
            floor_seconds=floor, bound="FLOPs", step_seconds=1.0, tokens=1536,
            remedy=f"mend {kind}",
        )  # fmt: skip


FILES = {
    "model": list(model_rows()),
    "gap": list(gap_rows()),
    "kernels": [
        row("kernels", "encoder: forward", flops=1e9, bytes=1e8, seconds=0.02),
        row("kernels", "pool: forward", "other", 0.5, 1.0, flops=1e6, bytes=1e7, seconds=0.001),
    ],
    "blt": [
        row("blt", f"BLT, {n}", peer, length=n, seconds=n * 1e-3, peer_seconds=n * factor)
        for n in (1024, 4096)
        for peer, factor in (("eager", 2e-3), ("sdpa", 1.5e-3))
    ],
}


@pytest.fixture
def folder(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    for question, rows in FILES.items():
        write(results / f"{question}-toy-2026-01-02.json", question=question, rows=rows)
    return results


def write(path, machine=MACHINE, **content):
    path.write_text(json.dumps({"machine": machine, "limits": LIMITS, **content}))


def page(folder, out):
    results = report.read_results(folder)
    pictures = report.draw(results, out.with_suffix(""))
    return report.render(results, out, pictures), pictures


def test_the_same_files_give_the_same_bytes(folder, tmp_path):
    first, pictures = page(folder, tmp_path / "a" / "performance.md")
    second, again = page(folder, tmp_path / "b" / "performance.md")
    assert first == second
    assert [path.name for path in pictures] == [path.name for path in again]
    assert [a.read_bytes() for a in pictures] == [b.read_bytes() for b in again]


def test_every_plot_is_drawn_shown_and_of_its_data(folder, tmp_path):
    text, pictures = page(folder, tmp_path / "performance.md")
    names = [f"{name}-toy-processor.svg" for name in ("throughput", "roofline", "length")]
    assert [path.name for path in pictures] == names
    for name in names:
        assert f"](performance/{name})" in text
    assert all((tmp_path / link).exists() for link in re.findall(r"\]\(([^)]+)\)", text))


def test_the_source_of_a_plot_is_whole_in_it(folder, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *a, **k: (saved.append(a[0]), save(*a, **k)))
    libraries = {"numpy": "2.4.6", "triton": "3.7.1", "transformers": "5.23.0", "scipy": "1.17.0"}
    machine = MACHINE | {"libraries": libraries, "device": "Toy(R) Processor of a longer name"}
    results = [
        replace(result, content=result.content | {"machine": machine})
        for result in report.read_results(folder)
    ]
    assert len(report.draw(results, tmp_path)) == len(saved) == 3
    for figure in saved:
        figure.draw_without_rendering()  # what was saved was measured in points
        [source] = [each for each in figure.texts if "commit" in each.get_text()]
        assert source.get_text().split() == results[0].source().split()
        extent = source.get_window_extent()
        assert figure.bbox.x0 < extent.x0 < extent.x1 < figure.bbox.x1
        assert figure.bbox.y0 < extent.y0


def test_every_section_names_machine_versions_and_commit(folder, tmp_path):
    text, _ = page(folder, tmp_path / "performance.md")
    source = (
        "Toy(R) Processor, 2 threads, load 0.2, torch 2.13.0, Python 3.11.7, numpy 2.4.6, "
        "commit abc1234, 2026-01-02"
    )
    assert text.count(source) == text.count("\n## ") == len(FILES)


def test_the_limits_are_told_where_figures_are_shares_of_them(folder, tmp_path):
    row = {"case": "pool", "peer": "other", "ours": "1 ms", "theirs": "2 ms", "ratio": 2.0}
    for question, note in (("kernels", "9 GB/s, 90% of the limit"), ("startup", "")):
        rows = [row | {"floor": None, "note": note}]
        write(folder / f"{question}-toy-2026-01-03.json", MACHINE | {"date": "2026-01-03"},
              question=question, rows=rows)  # fmt: skip
    text, _ = page(folder, tmp_path / "performance.md")
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert {
        name for name, body in sections.items() if "Limits measured in the same run" in body
    } == {
        "Kernels on the CPU",
        "From kernels to the model: where a training step's time goes",
    }


def test_the_gap_adds_up(folder, tmp_path):
    text, _ = page(folder, tmp_path / "performance.md")
    assert "| global transformer | products | 600.0 | 60.0% | 500.0 | FLOPs | 1.20 |" in text
    assert "| **sum** |  | 1000.0 | 100.0% | 600.0 |  | 1.67 |" in text
    assert "A training step of 1,536 tokens of toy takes 1000 ms." in text


def test_a_gap_of_parts_that_exceed_the_whole_says_so(folder, tmp_path):
    text, _ = page(folder, tmp_path / "performance.md")
    assert "a busy machine" not in text
    rows = list(gap_rows())
    rows[0]["facts"]["seconds"] += 0.2
    rows[2]["facts"]["seconds"] -= 0.2
    write(folder / "gap-toy-2026-01-02.json", question="gap", rows=rows)
    text, _ = page(folder, tmp_path / "performance.md")
    assert "watched, than the whole step: a busy machine.**" in text
    assert "| **sum** |  | 1000.0 | 100.0% | 600.0 |  | 1.67 |" in text


def test_costs_of_models_and_their_ceilings(folder, tmp_path):
    text, _ = page(folder, tmp_path / "performance.md")
    assert (
        "| the paper's mix | static 4, text global | × 0.850 | × 0.900 | 0.95 | 900 | 1,111 | 800 |"
        in text
    )


def test_what_is_too_low_says_so(folder, tmp_path):
    text, _ = page(folder, tmp_path / "performance.md")
    assert "| pool: forward | other | 1.00 ms | 2.00 ms | 0.50 | 1 | **too low** |" in text


def test_what_failed_is_named_in_its_section(folder, tmp_path):
    write(folder / "kernels-toy-2026-01-02.json", question="kernels", rows=FILES["kernels"],
          failed={"test_scanning": "the scan gives something else"})  # fmt: skip
    text, _ = page(folder, tmp_path / "performance.md")
    section = text.partition("## Kernels on the CPU")[2].partition("\n## ")[0]
    assert (
        "**`test_scanning` failed, and has no figures:** the scan gives something else" in section
    )
    assert text.count("failed, and has no figures") == 1


def test_limits_are_in_the_precision_of_the_device(folder):
    gpu = {"device": "NVIDIA Toy", "cuda": "13.0", "capability": "9.0"}
    about = {key: value for key, value in MACHINE.items() if key not in ("threads", "load")} | gpu
    write(folder / "gap-zz-nvidia-toy-2026-01-02.json", about, question="gap", rows=FILES["gap"])
    toy, nvidia = (each for each in report.read_results(folder) if each.question == "gap")
    assert "GFLOP/s in a bfloat16 matrix product" in next(report.gap_section(nvidia))
    assert "GFLOP/s in a float32 matrix product" in next(report.gap_section(toy))


def test_medians_are_called_so(folder, tmp_path):
    write(folder / "data-toy-2026-01-02.json", question="data", rows=[row("data", "text")])
    text, _ = page(folder, tmp_path / "performance.md")
    assert "Times and rates are medians of the rounds" in text.partition("## Reading")[2]


def test_kernels_on_a_gpu_are_all_told(tmp_path):
    """What `benchmarks.gpu` writes: limits, shares of them, rates, what was not measured."""
    timer = {"low": 1.0, "high": 2.0, "rounds": 9}
    encoder = {"case": "encoder, static 4", "what": "forward", "name": "lst_kernels"}
    content = {
        "targets": [
            {"target": "share of copy", "case": case, "got": got, "at_least": 0.75, "met": met}
            for case, got, met in (("encoder", 0.6, False), ("pooling", 0.9, True))
        ],
        "checks": [{"op": "encoder", "case": "any", "outcome": "passed"}],
        "figures": [
            {"name": "copy of 1 GiB", "gigabytes_per_second": 4321.0,
             "milliseconds": timer | {"median": 0.5}},
            encoder | {"share_of_copy": 0.625, "milliseconds": timer | {"median": 1.25}},
            encoder | {"name": "flex", "tflops": 512.3, "milliseconds": timer | {"median": 7.0}},
            {"name": "layout, made on the CPU", "seconds": 0.25},
        ],
        "not_measured": [{"what": "varlen_attn", "reason": "no such kernel"}],
    }  # fmt: skip
    write(tmp_path / "nvidia-toy-2026-01-02.json", **content)
    text = report.render(report.read_results(tmp_path), tmp_path / "performance.md", [])
    for line in (
        "| share of copy | encoder | ≥ 0.75 | 0.6 | **not met** |",
        "1 checks passed, 0 did not.",
        "|  |  | copy of 1 GiB | 0.500 | 4,321 GB/s |",
        "| encoder, static 4 | forward | lst_kernels | 1.250 | 62% |",
        "| encoder, static 4 | forward | flex | 7.000 | 512 TFLOP/s |",
        "Not measured: varlen_attn: no such kernel",
    ):
        assert line in text


def test_of_two_files_the_newer_counts(folder, tmp_path):
    newer = MACHINE | {"date": "2026-02-03", "commit": "def5678"}
    rows = [row("gap", "embedding", part="embedding", kind="other", seconds=1.0, floor_seconds=0.5,
                bound="bytes", step_seconds=1.0, tokens=7, remedy="none")]  # fmt: skip
    write(folder / "gap-toy-2026-02-03.json", newer, question="gap", rows=rows)
    text, _ = page(folder, tmp_path / "performance.md")
    assert "| embedding | other |" in text
    assert "| optimizer |" not in text


def test_a_file_of_rows_without_facts_is_a_table(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    plain = {key: value for key, value in row("kernels", "one").items() if key != "facts"}
    content = {"machine": MACHINE, "rows": [plain]}
    (results / "kernels-toy-2026-01-02.json").write_text(json.dumps(content))
    text, pictures = page(results, tmp_path / "performance.md")
    assert "| one | peer | 1.00 ms | 2.00 ms | 2.00 |  |  |" in text
    assert pictures == []


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        "{",
        "[" * 100_000,
        '{"machine": {"device": "x"}}',
        json.dumps({"machine": MACHINE | {"device": {}}}),
        json.dumps({"machine": MACHINE | {"libraries": "x"}}),
        json.dumps({"machine": MACHINE | {"load": []}}),
        json.dumps({"machine": MACHINE, "question": 3}),
        json.dumps({"machine": MACHINE, "rows": [None]}),
        json.dumps({"machine": MACHINE, "rows": [row("kernels", "one") | {"ratio": {}}]}),
        json.dumps({"machine": MACHINE, "limits": {}, "rows": [row("kernels", "one: x", flops=1,
                                                                   bytes=1, seconds=1)]}),
    ],
    ids=range(11),
)  # fmt: skip
def test_another_file_is_one_line(tmp_path, content):
    (tmp_path / "kernels-x.json").write_text(content)
    with pytest.raises(UserError, match=r"kernels-x\.json: expected (a result file|JSON)"):
        page(tmp_path, tmp_path / "performance.md")


def test_no_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="expected result files"):
        report.read_results(tmp_path)


def test_the_committed_page_is_made_from_the_committed_files():
    """Its text; plots may differ from one release of matplotlib to the next."""
    root = Path(__file__).parents[2]
    out = root / "docs" / "performance.md"
    results = report.read_results(root / "benchmarks" / "results")
    pictures = sorted((root / "docs" / "performance").glob("*.svg"))
    drawn = [each for name in report.PICTURES for each in pictures if each.name.startswith(name)]
    assert out.read_text() == report.render(results, out, drawn), "run python -m benchmarks.report"
