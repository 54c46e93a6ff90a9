"""The backend that runs is the one asked for or the first that can, and each can say why not."""

import dataclasses
import warnings

import pytest
import torch

from lst_kernels import (
    PatchLayout,
    backend,
    backends,
    explain,
    patch_expand,
    patch_pool,
    range_attention,
    sliding_window_attention,
)
from lst_kernels.backends import Backend, Call, choose

LAYOUT = PatchLayout.from_lengths([2, 3], [2])
X = torch.ones(5, 4)
POOL = Call("patch_pool", "cpu", torch.float32, reduce="max")


@pytest.fixture
def table(monkeypatch):
    """A table of three backends, of which "quick" can be made unavailable."""
    monkeypatch.delenv("LST_KERNELS_BACKEND", raising=False)
    state = {"quick": None}

    def refuses(call):
        return None if call.dtype == torch.float32 else "takes float32 alone"

    made = (
        Backend("absent", "nowhere", lambda call: "never runs", lambda: None),
        Backend("quick", "lst_kernels.reference", refuses, lambda: state["quick"]),
        Backend("reference", "lst_kernels.reference", lambda call: None, lambda: None),
    )
    monkeypatch.setattr(backends, "BACKENDS", made)
    monkeypatch.setattr(backends, "_BY_NAME", {b.name: b for b in made})
    backends._warn_once.cache_clear()
    yield state
    backends._warn_once.cache_clear()


def test_auto_takes_the_first_that_can(table):
    assert choose(POOL, "auto") == "quick"
    assert choose(dataclasses.replace(POOL, dtype=torch.float16), "auto") == "reference"


def test_the_argument_goes_before_the_context_and_the_context_before_the_environment(
    table, monkeypatch
):
    monkeypatch.setenv("LST_KERNELS_BACKEND", "absent")
    with backend("reference"):
        assert choose(POOL, "auto") == "reference"
        assert choose(POOL, "quick") == "quick"
        with backend("quick"):
            assert choose(POOL, "auto") == "quick"
        assert choose(POOL, "auto") == "reference"
    with pytest.raises(ValueError, match="'absent' cannot run this patch_pool"):
        choose(POOL, "auto")


def test_a_backend_asked_for_is_refused_with_every_candidates_reason(table):
    table["quick"] = "no compiler was found"
    with pytest.raises(ValueError, match="cannot run this patch_pool") as caught:
        choose(POOL, "quick")
    reasons = "(absent: never runs; quick: no compiler was found; reference: can run)"
    assert reasons in str(caught.value)


def test_a_backend_of_no_name_is_refused(table, monkeypatch):
    message = "backend must be auto or one of absent, quick, reference; got 'tritn'"
    with pytest.raises(ValueError, match=message):
        choose(POOL, "tritn")
    with pytest.raises(ValueError, match=message), backend("tritn"):
        pass
    with pytest.raises(ValueError, match=message):
        explain(patch_pool, X, LAYOUT, backend="tritn")
    monkeypatch.setenv("LST_KERNELS_BACKEND", "tritn")
    with pytest.raises(ValueError, match=message):
        choose(POOL, "auto")


def test_a_missing_library_is_told_once_and_only_where_it_would_have_run(table):
    table["quick"] = "no compiler was found"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(dataclasses.replace(POOL, dtype=torch.float16), "auto")
    with pytest.warns(UserWarning, match="without its quick backend: no compiler was found"):
        assert choose(POOL, "auto") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(POOL, "auto") == "reference"


def test_explain_gives_a_word_on_every_backend(table):
    told = explain(patch_pool, X.half(), LAYOUT, reduce="sum")
    assert told == {
        "absent": "never runs",
        "quick": "takes float32 alone",
        "reference": "chosen",
    }
    assert explain("patch_pool", X, LAYOUT)["reference"] == "can run"
    assert explain(patch_expand, X[:2], LAYOUT)["quick"] == "chosen"
    assert "chosen" not in explain(patch_pool, X, LAYOUT, backend="absent").values()
    for no_op in ("patch_poll", torch.relu, 3):
        with pytest.raises(ValueError, match="op must be one of"):
            explain(no_op, X, LAYOUT)


def test_explain_takes_the_arguments_of_the_attention_ops():
    q = torch.ones(5, 2, 16)
    ranges = LAYOUT.sliding_window(2)
    told = explain(range_attention, q, q, q, ranges, return_lse=True)
    assert told["flash"] == "has no range_attention"
    told = explain(sliding_window_attention, q, q, q, LAYOUT.cu_tokens, window=2, max_length=5)
    assert told["flash"] == "runs on cuda, not on cpu"
    assert list(told.values()).count("chosen") == 1


def test_the_backward_pass_runs_where_the_forward_pass_ran(monkeypatch):
    from lst_kernels import native, reference

    if native.unavailable_reason():
        pytest.skip(f"native: {native.unavailable_reason()}")
    calls = []
    for module in (native, reference):
        inner = module.patch_pool_backward
        monkeypatch.setattr(
            module,
            "patch_pool_backward",
            lambda *args, module=module, inner=inner: calls.append(module) or inner(*args),
        )
    for module, name in ((native, "native"), (reference, "reference")):
        x = X.clone().requires_grad_()
        with backend(name):
            out = patch_pool(x, LAYOUT, "max")
        out.sum().backward()  # outside the context
        assert calls.pop() is module
