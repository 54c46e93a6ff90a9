"""What do the kernels save in transformers' BLT, in time and in memory?

    cross-attention   dense masks: S · P · k pairs a head, and as many mask elements, for S · k
    self-attention    dense causal masks: S² pairs for S · 512 of the local window
    memory            its masks, scores and their gradients grow with S²

On a CPU the model is the small offline configuration of the tests, widened to 256 local and 512
global features: one encoder layer, two global and three decoder layers, two slots, patches of 4
bytes in the mean, float32. Forward and backward, against both of transformers' attention
implementations, on weights that are the same; logits and gradients of what was timed are compared.

On a GPU it is BLT-1B, `BltConfig`'s own sizes (1, 25 and 9 layers, half a million hashes of each of
six lengths), with random weights in bfloat16. There is one more peer, ``flex``: compiled
flex_attention under block masks, which is how the authors' code attends across; transformers has it
for other models, and its own functions run it here. What does not fit the device's memory is said.

    pytest benchmarks/test_blt.py --benchmark-only
    pytest benchmarks/test_blt.py --benchmark-only -m gpu
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

pytest.importorskip("transformers.models.blt")
from transformers import BltConfig, BltForCausalLM
from transformers.models.blt import modeling_blt

from lst_kernels import native
from lst_kernels.integrations import apply_lst_kernels_to_blt

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and native.unavailable_reason() is not None,
    reason=str(native.unavailable_reason()),
)

LENGTHS = (1024, 4096, 8192)
FLOORS = {
    1024: {"eager": 1.0, "sdpa": 1.0},
    4096: {"eager": 1.0, "sdpa": 1.0},
    8192: {"eager": 2.0, "sdpa": 1.3},
}
SWITCHES = ("cross_attention", "self_attention", "pooling", "patch_ids")


def make_model(attention: str) -> BltForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    large = {
        "num_attention_heads": 4,
        "max_position_embeddings": 16384,
        "rope_parameters": rope,
    }
    local = {**large, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 64}
    config = BltConfig(
        vocab_size=64,
        patch_in_forward=False,
        cross_attn_k=2,
        rope_parameters=rope,
        encoder_hash_byte_group_size=[2, 3],
        encoder_hash_byte_group_vocab=64,
        patcher_config={**local, "num_hidden_layers": 1},
        encoder_config={**local, "num_hidden_layers": 1, "hidden_size_global": 512},
        decoder_config={**local, "num_hidden_layers": 3, "hidden_size_global": 512},
        global_config={
            **large, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
        },
        attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    return BltForCausalLM(config)


def make_bytes(length: int) -> tuple[Tensor, Tensor]:
    """(1, S) bytes, and patch lengths of 1 to 7 that sum to S + 1."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 8, (length,), generator=generator)
    lengths[0] = 1
    lengths = lengths[: int((lengths.cumsum(0) <= length).sum()) + 1]
    lengths[-1] -= lengths.sum() - (length + 1)
    return torch.randint(4, 64, (1, length), generator=generator), lengths[None]


def differentiate(model: BltForCausalLM, length: int) -> list[Tensor]:
    """Logits, and the gradient of every weight."""
    x, patches = (each.to(model.device) for each in make_bytes(length))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    out = model(x, patch_lengths=patches, labels=x, use_cache=False)
    return [out.logits.detach(), *torch.autograd.grad(out.loss, weights)]


def agree(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(
        bool((x - y).abs().max() <= 1e-4 * max(1.0, float(y.abs().max())))
        for x, y in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_training_against_transformers(race, length: int):
    models = {attention: make_model(attention) for attention in ("eager", "sdpa")}
    patched = make_model("sdpa")
    apply_lst_kernels_to_blt(patched)
    results: dict[str, list[Tensor]] = {}

    def run(name: str, model: BltForCausalLM) -> None:
        results[name] = differentiate(model, length)

    def check() -> None:
        for attention in models:
            assert agree(results["ours"], results[attention]), f"{attention} gives something else"

    race(
        f"BLT, {length:,} bytes: forward + backward",
        lambda: run("ours", patched),
        {name: lambda name=name, model=model: run(name, model) for name, model in models.items()},
        floors=FLOORS[length],
        rounds=3 if length < 8192 else 2,
        slow_rounds=None if length < 4096 else 1,
        facts={"length": length},
        check=check,
    )


def test_what_each_switch_brings(race):
    """All but one switch against all of them: what that one saves at 4,096 bytes."""
    length = LENGTHS[1]
    everything = make_model("sdpa")
    apply_lst_kernels_to_blt(everything)
    without = {}
    for switch in SWITCHES:
        without[f"without {switch}"] = make_model("sdpa")
        apply_lst_kernels_to_blt(without[f"without {switch}"], **{switch: False})
    race(
        f"BLT, {length:,} bytes: every switch",
        lambda: differentiate(everything, length),
        {name: lambda model=model: differentiate(model, length) for name, model in without.items()},
        floors={},
        rounds=2,
        slow_rounds=1,
    )


PEAK = """
import json, sys
from benchmarks.test_blt import apply_lst_kernels_to_blt, differentiate, make_model

def resident(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))

attention, *lengths = sys.argv[1:]
model = make_model("sdpa" if attention == "ours" else attention)
if attention == "ours":
    apply_lst_kernels_to_blt(model)
differentiate(model, 256)
peaks = []
for length in map(int, lengths):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = resident("VmRSS")
    differentiate(model, length)
    peaks.append(resident("VmHWM") - before)
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_grows_with_the_length_and_not_its_square(benchmark, compare_memory):
    """Each in a process of its own; a peak is what a training step adds to what was there. At 8,192
    bytes eager adds some 10 GB, which take half a minute: it is measured up to 4,096."""

    def peaks(attention: str, lengths: tuple[int, ...] = LENGTHS) -> dict[int, float]:
        command = [sys.executable, "-c", PEAK, attention, *map(str, lengths)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return dict(zip(lengths, json.loads(run.stdout), strict=True))

    ours = benchmark.pedantic(lambda: peaks("ours"), rounds=1)
    for attention, lengths in {"eager": LENGTHS[:2], "sdpa": LENGTHS}.items():
        theirs = peaks(attention, lengths)
        for length in lengths:
            case = f"BLT, {length:,} bytes"
            compare_memory(case, ours[length], attention, theirs[length], length=length)
    assert ours[8192] < 1.2 * 2 * ours[4096]


# --- BLT-1B on a GPU ------------------------------------------------------------------------------

GPU_LENGTHS = (4096, 8192, 16384, 24576)
PEERS = ("eager", "sdpa", "flex")


@pytest.fixture(scope="module")
def blt_1b() -> BltForCausalLM:
    # flex_attention that is no longer compiled would make all scores; rather more graphs
    torch._dynamo.config.recompile_limit = 256
    config = BltConfig(
        patch_in_forward=False,
        encoder_config={"max_position_embeddings": GPU_LENGTHS[-1]},
        decoder_config={"max_position_embeddings": GPU_LENGTHS[-1]},
        global_config={"max_position_embeddings": GPU_LENGTHS[-1]},
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return BltForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def attending(model: BltForCausalLM, how: str) -> Iterator[None]:
    """The model with our kernels, or with one of transformers' ways to attend."""
    if how == "ours":
        with apply_lst_kernels_to_blt(model):
            yield
        return
    before = model.config._attn_implementation
    dense = modeling_blt._prepare_patch_cross_attention_mask
    model.config._attn_implementation = "flex_attention" if how == "flex" else how
    if how == "flex":
        modeling_blt._prepare_patch_cross_attention_mask = block_mask
    try:
        yield
    finally:
        model.config._attn_implementation = before
        modeling_blt._prepare_patch_cross_attention_mask = dense


def block_mask(
    patch_ids: Tensor,
    num_patches: int,
    sequence_length: int,
    patches_as_queries: bool = False,
    cross_attn_k: int = 1,
    dtype: torch.dtype = torch.float32,
) -> BlockMask:
    """What transformers' dense mask says, for flex_attention."""

    def reads_its_bytes(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return patch_ids[row, key] == query // cross_attn_k

    def reads_its_patch(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return patch_ids[row, query] == key // cross_attn_k

    sizes = [num_patches * cross_attn_k, sequence_length]
    return create_block_mask(
        reads_its_bytes if patches_as_queries else reads_its_patch,
        len(patch_ids),
        None,
        *(sizes if patches_as_queries else reversed(sizes)),
        device=patch_ids.device,
        _compile=patch_ids.is_cuda,
    )


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that it takes beside what is there, once it has run before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.parametrize("length", GPU_LENGTHS)
def test_training_at_1b_shapes(race, compare_memory, add_row, blt_1b, length: int):
    def steps(how: str) -> list[Tensor]:
        with attending(blt_1b, how):
            return differentiate(blt_1b, length)

    def timed(how: str) -> None:
        steps(how)
        torch.cuda.synchronize()

    peaks: dict[str, int] = {}
    case = f"BLT-1B, {length:,} bytes"
    device = torch.cuda.get_device_name()
    for how in ("ours", *PEERS):
        try:
            peaks[how] = peak_of(lambda how=how: steps(how))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties().total_memory
            add_row(
                case=f"{case}: peak memory",
                peer=how,
                ours=f"{peaks['ours'] / 1e6:,.0f} MB",
                theirs="does not fit",
                ratio=total / peaks["ours"],
                floor=None,
                note="ratio: the device's memory to ours",
                facts={"bytes": peaks["ours"], "length": length, "device": device},
            )
    if length == GPU_LENGTHS[0]:
        ours = steps("ours")
        for how in set(PEERS) & peaks.keys():
            assert apart(ours, steps(how)) < 5e-2, how
        del ours
    for how in [how for how in PEERS if how in peaks]:
        compare_memory(case, peaks["ours"], how, peaks[how], length=length, device=device)
    race(
        f"{case}: forward + backward",
        lambda: timed("ours"),
        {how: lambda how=how: timed(how) for how in PEERS if how in peaks},
        floors={},
        rounds=3,
        facts={"length": length, "device": device},
    )


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The difference's share of the norm, of the logits or of all gradients: the larger one."""
    whole = sum(float(y.float().square().sum()) for y in theirs[1:]) ** 0.5
    logits = float((ours[0] - theirs[0]).float().norm() / theirs[0].float().norm())
    pairs = zip(ours[1:], theirs[1:], strict=True)
    gradients = sum(float((x - y).float().square().sum()) for x, y in pairs) ** 0.5 / whole
    return max(logits, gradients)
