"""An installed lst, looked at from outside its checkout: what it found here, and that it computes.

python -P tests/installed.py            prints one line, as: lst 0.1.0, torch 2.13.0, …, native
python -P tests/installed.py --native   fails where the native library is missing
"""

import importlib.metadata
import importlib.util
import sys
import warnings
from pathlib import Path

import torch

import lst
import lst_kernels
from lst_kernels import PatchLayout, native, patch_pool, range_attention


def main() -> None:
    checkout = Path(__file__).resolve().parents[1]
    assert not Path(lst.__file__).is_relative_to(checkout / "lst"), lst.__file__
    assert not Path(lst_kernels.__file__).is_relative_to(checkout / "lst_kernels")
    reason = native.unavailable_reason()
    assert reason is None or "--native" not in sys.argv, reason

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layout = PatchLayout.from_lengths([1, 2], [2])
        tokens = torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
        sums = patch_pool(tokens, layout, "sum")
        q, kv = torch.zeros(2, 1, 1), tokens.unsqueeze(1)
        means = range_attention(q, kv, kv, layout.patches_read_tokens())
        (sums.sum() + means.sum()).backward()
    assert sums.flatten().tolist() == [1, 6]
    torch.testing.assert_close(means.flatten(), torch.tensor([1.0, 3.0]))
    assert tokens.grad is not None
    torch.testing.assert_close(tokens.grad.flatten(), torch.tensor([2.0, 1.5, 1.5]))
    told = [str(warning.message) for warning in caught if "lst_kernels" in str(warning.message)]
    assert len(told) == (reason is not None), told

    found = [f"lst {importlib.metadata.version('lst')}", f"torch {torch.__version__}"]
    for name in ("triton", "transformers", "lhotse"):
        absent = importlib.util.find_spec(name) is None
        found.append(f"no {name}" if absent else f"{name} {importlib.metadata.version(name)}")
    print(", ".join([*found, "native" if reason is None else "no native library"]))


if __name__ == "__main__":
    main()
