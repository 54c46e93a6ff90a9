"""The package needs neither Triton nor the native library, and says once what it lacks."""

import subprocess
import sys

SCRIPT = """
import sys, warnings
sys.modules["triton"] = None  # importing it fails
with warnings.catch_warnings(record=True) as imported:
    warnings.simplefilter("always")
    import torch
    import lst_kernels
    from lst_kernels import PatchLayout, explain, native, patch_expand, patch_pool, range_attention
assert [w for w in imported if "lst_kernels" in str(w.message)] == []
native.LIBRARY = native.LIBRARY.with_name("absent.so")

layout = PatchLayout.from_lengths([1, 3, 2], [3])
ranges = layout.patches_read_tokens()
with warnings.catch_warnings(record=True) as used:
    warnings.simplefilter("always")
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(6, 2, 16, dtype=dtype, requires_grad=True)
        slots = patch_pool(x, layout, "max")
        out = range_attention(slots, x, x, ranges)
        patch_expand(out, layout, 1, x).square().sum().backward()
        lst_kernels.segment_scan(x, torch.ones(6), layout.cu_tokens).sum().backward()
        lst_kernels.sliding_window_attention(
            x, x, x, layout.cu_tokens, window=2, max_length=6
        ).sum().backward()
        lst_kernels.block_causal_attention(x, x, x, layout.cu_tokens, max_length=6)
        assert x.grad.isfinite().all()
assert explain(range_attention, x, x, x, ranges)["reference"] == "chosen"
for warning in used:
    print(f"{warning.category.__name__}: {warning.message}")
"""


def test_without_triton_and_the_native_library_the_reference_runs_and_one_warning_tells():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "UserWarning: lst_kernels runs without its native backend: "
        "the native library was not built; reinstall lst where there is a C++17 compiler"
    ]


def test_importing_needs_torch_and_numpy_alone_and_does_not_import_the_compiler():
    """The compiler takes as long as torch itself, and who compiles nothing does not need it."""
    script = """
import sys
for name in ("fsspec", "pyarrow", "safetensors", "sentencepiece", "tqdm", "tyro"):
    sys.modules[name] = None  # importing it fails
import torch, torch.library, torch.utils.flop_counter
before = "torch._dynamo" in sys.modules
import lst_kernels, lst_kernels.integrations
assert ("torch._dynamo" in sys.modules) == before
layout = lst_kernels.PatchLayout.from_lengths([1, 2], [2])
assert lst_kernels.patch_pool(torch.ones(3), layout, "sum").tolist() == [1, 2]
"""
    subprocess.run([sys.executable, "-c", script], check=True)
