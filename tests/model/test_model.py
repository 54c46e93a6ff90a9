"""A document's logits depend on its own earlier tokens and on nothing else, whatever the patching.

The oracle rebuilds the forward pass from the model's weights with dense masks, one document at a
time, in float64, without the kernel library.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lst.data.batch import make_batch, pack_documents
from lst.data.interleave import Document
from lst.data.packing import patch_document
from lst.data.patching import Aligned, NoPatching, Static, patch_lengths
from lst.errors import UserError
from lst.model import ModelConfig, RopeScaling, StackConfig, build_model, count_parameters
from lst.model.cross_entropy import token_losses
from lst.vocabulary import BOS, EOS, SPEECH, TEXT, Vocabulary

VOCABULARY = Vocabulary(num_pieces=40, num_units=20)
STRATEGIES = {
    "none": NoPatching(),
    "static": Static(size=3),
    "aligned": Aligned(silence="separate"),
    "merged": Aligned(silence="merged"),
    "at most 2": Aligned(silence="separate", max_length=2),
}


def small_config(**changes) -> ModelConfig:
    config = ModelConfig(
        encoder=StackConfig(layers=1, dim=16, heads=2),
        global_transformer=StackConfig(layers=2, dim=32, heads=2),
        decoder=StackConfig(layers=2, dim=16, heads=2),
        local_window=7,
        decoder_window=4,
    )
    return replace(config, **changes)


def config_of(architecture, text_path, slots, decoder_window) -> ModelConfig:
    local = StackConfig(layers=1, dim=WIDTHS[slots], heads=2)
    return small_config(
        architecture=architecture,
        text_path=text_path,
        encoder=local,
        decoder=replace(local, layers=2),
        decoder_window=decoder_window,
    )


def model_of(config: ModelConfig, seed: int = 0):
    torch.manual_seed(seed)
    return build_model(config, VOCABULARY).double()


def make_document(rng: np.random.Generator, spans: list[int], name: str) -> Document:
    """Text and speech spans in turn; a speech span of n units has words at [1, 4) and [4, n-2)."""
    tokens, aligned = [BOS], []
    for place, length in enumerate(spans):
        if place % 2:
            tokens.append(SPEECH)
            first = len(tokens)
            aligned += [(first + a, first + b) for a, b in ((1, 4), (4, length - 2)) if b > a]
            tokens += (VOCABULARY.first_unit + rng.integers(0, 20, length)).tolist()
        else:
            tokens.append(TEXT)
            tokens += (VOCABULARY.first_piece + rng.integers(0, 40, length)).tolist()
    tokens.append(EOS)
    return Document(
        tokens=np.array(tokens, np.int32),
        aligned=np.array(aligned, np.int32).reshape(-1, 2),
        breaks=(),
        score_from=0,
        score_eos=True,
        record_id=name,
    )


def documents() -> list[Document]:
    rng = np.random.default_rng(3)
    return [
        make_document(rng, [3, 8, 2], "a"),
        make_document(rng, [1, 5, 1, 7], "b"),
        make_document(rng, [4], "c"),
    ]


def logits(model, docs, strategy) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(pack_documents(docs, VOCABULARY, strategy, model.config.plan()))


# (architecture, text_path, patching): every kind of model with every way to patch for it
MODELS = [("lst", path, name) for path in ("local", "global") for name in STRATEGIES]
MODELS += [("token", "local", "none")]
WIDTHS = {1: 32, 2: 16}  # of the local modules, by slots


@pytest.mark.parametrize("decoder_window", [1, 4, None])
@pytest.mark.parametrize("slots", WIDTHS)
@pytest.mark.parametrize(("architecture", "text_path", "name"), MODELS)
def test_no_token_moves_an_earlier_or_a_foreign_logit(
    architecture, text_path, name, slots, decoder_window
):
    """Each token of a stream replaced in turn by each kind of token, the changed stream patched
    anew. All changed streams lie in one batch, so a leak between documents would show too."""
    model = model_of(config_of(architecture, text_path, slots, decoder_window))
    # Without targets: where text belongs to the global transformer, a piece after a unit has none.
    docs = [d._replace(score_from=len(d.tokens), score_eos=False) for d in documents()]
    strategy = STRATEGIES[name]
    before = logits(model, docs, strategy)
    kinds = [SPEECH, TEXT, EOS, VOCABULARY.first_piece + 1, VOCABULARY.first_unit + 1]
    changes = [
        (d, t, new)
        for d, document in enumerate(docs)
        for t in range(1, len(document.tokens))
        for new in kinds
        if new != document.tokens[t]
    ]
    streams = []
    for d, t, new in changes:
        tokens = docs[d].tokens.copy()
        tokens[t] = new
        streams += [*docs[:d], docs[d]._replace(tokens=tokens), *docs[d + 1 :]]
    after = logits(model, streams, strategy).view(len(changes), *before.shape)
    moved = (after.exp() - before.exp()).abs().amax(-1) > 1e-12  # exp: some are −inf
    starts = np.cumsum([0] + [len(document.tokens) for document in docs])
    for (d, t, new), rows in zip(changes, moved, strict=True):
        assert not rows[: starts[d] + t].any(), f"document {d}, token {t} → {new}: earlier moved"
        assert not rows[starts[d + 1] :].any(), f"document {d}, token {t} → {new}: foreign moved"
        assert rows[starts[d] + t], f"document {d}, token {t} → {new}: nothing moved"


@pytest.mark.parametrize("decoder_window", [1, 4, None])
@pytest.mark.parametrize("slots", WIDTHS)
@pytest.mark.parametrize(("architecture", "text_path", "name"), MODELS)
def test_logits_do_not_depend_on_the_company(architecture, text_path, name, slots, decoder_window):
    model = model_of(config_of(architecture, text_path, slots, decoder_window))
    docs = documents()
    together = logits(model, docs[::-1] + docs, STRATEGIES[name])
    alone = torch.cat([logits(model, [document], STRATEGIES[name]) for document in docs])
    torch.testing.assert_close(together[-len(alone) :], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("decoder_window", [4, None])
def test_what_is_older_than_the_local_window_arrives_through_the_patches(decoder_window):
    rng = np.random.default_rng(1)
    docs = [make_document(rng, [2, 30], "long")]  # 34 tokens; the local window is 7
    tokens = docs[0].tokens.copy()
    tokens[2] = VOCABULARY.first_piece + (tokens[2] - VOCABULARY.first_piece + 1) % 40
    changed = [docs[0]._replace(tokens=tokens)]
    model = model_of(small_config(decoder_window=decoder_window))
    difference = logits(model, docs, Static(size=3)) - logits(model, changed, Static(size=3))
    assert difference[-1].abs().max() > 1e-9


# --- the equations, dense, in float64 ---------------------------------------------------------


def norm(x, module):
    return x / (x.pow(2).mean(-1, keepdim=True) + module.eps).sqrt() * module.weight


def turn(x, positions, theta):
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * theta ** (-torch.arange(half).double() / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    return torch.cat((z.real, z.imag), -1)


def dense(q, k, v, mask):
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.nan_to_num(torch.softmax(scores, -1), nan=0.0)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def layer(x, module, mask, theta):
    stack = module.attention.config
    qkv = norm(x, module.attention_norm) @ module.attention.qkv.weight.T
    heads = (stack.heads, stack.num_kv_heads, stack.num_kv_heads)
    q, k, v = qkv.view(len(x), sum(heads), stack.head_dim).split(heads, 1)
    k, v = (part.repeat_interleave(stack.heads // stack.num_kv_heads, 1) for part in (k, v))
    positions = torch.arange(len(x))
    out = dense(turn(q, positions, theta), turn(k, positions, theta), v, mask)
    x = x + out @ module.attention.output.weight.T
    gate, up = (norm(x, module.feed_forward_norm) @ module.feed_forward.gate_up.weight.T).chunk(
        2, -1
    )
    return x + (F.silu(gate) * up) @ module.feed_forward.down.weight.T


def oracle_logits(model, document, strategy):
    """Logits of one document from the model's weights, dense, patch by patch."""
    config, theta = model.config, model.config.rope_theta
    tokens = torch.from_numpy(document.tokens).long()
    lengths, late = patch_lengths(
        document.tokens, VOCABULARY, strategy, aligned=document.aligned, breaks=document.breaks
    )
    stops = np.cumsum(lengths)
    T, P, S = len(tokens), len(lengths), config.slots
    t, p = torch.arange(T), torch.arange(P)
    causal = p[:, None] >= p[None]
    if config.architecture == "token":
        x = model.embedding.weight[tokens]
        for module in model.global_transformer.layers:
            x = layer(x, module, causal, theta)
        return norm(x, model.norm) @ model.head.weight.T

    # which tokens and which patches pass the local modules, and the rows of their embeddings
    split = config.text_path == "global"
    mine = VOCABULARY.is_unit(tokens) if split else torch.ones(T, dtype=torch.bool)
    patched = mine[torch.from_numpy(stops - 1)]
    rows = tokens - VOCABULARY.num_pieces * VOCABULARY.is_unit(tokens) if split else tokens
    x = (model.speech_embedding if split else model.embedding).weight[rows[mine]]

    n = torch.arange(len(x))
    window = (n[:, None] >= n[None]) & (n[:, None] - n[None] < config.local_window)
    encoder, decoder, heads = model.encoder, model.decoder, config.encoder.heads
    for module in encoder.layers:
        x = layer(x, module, window, theta)
    owner = torch.from_numpy(np.repeat(np.arange(P), lengths))[mine]
    local = p[patched]
    if len(local):
        pooled = torch.stack([x[owner == patch].amax(0) for patch in local])
        q = (pooled @ encoder.slot_queries.weight.T).view(len(local) * S, -1)
        k, v = (norm(x, encoder.token_norm) @ encoder.key_value.weight.T).chunk(2, -1)
        k, v = (part.unflatten(-1, (heads, -1)) for part in (k, v))
        queries = (norm(q, encoder.query_norm) @ encoder.query.weight.T).unflatten(-1, (heads, -1))
        own = local.repeat_interleave(S)[:, None] == owner[None]
        u = (q + dense(queries, k, v, own) @ encoder.output.weight.T).view(len(local), -1)
    z = torch.zeros(P, config.global_transformer.dim, dtype=torch.float64)
    for patch in range(P):
        if patched[patch]:
            z[patch] = u[int(patched[:patch].sum())]
        else:
            z[patch] = model.embedding.weight[tokens[stops[patch] - 1]]
    for module in model.global_transformer.layers:
        z = layer(z, module, causal, theta)

    readable_from = torch.from_numpy(stops - 1 + late)
    read = (readable_from[None] <= t[:, None]) & (
        readable_from.new_tensor([(readable_from <= i).sum() for i in range(T)])[:, None] - p[None]
        <= (config.decoder_window or P)
    )
    heads = config.decoder.heads
    slots = norm(z.view(P * S, -1), decoder.patch_norm)
    kv = (slots @ decoder.key_value.weight.T).view(P * S, len(decoder.layers), 2, heads, -1)
    for i, module in enumerate(decoder.layers):
        q = (norm(x, module.cross_norm) @ module.cross_query.weight.T).unflatten(-1, (heads, -1))
        out = dense(q, kv[:, i, 0], kv[:, i, 1], read[mine].repeat_interleave(S, 1))
        x = layer(x + out @ module.cross_output.weight.T, module.layer, window, theta)
    if not split:
        return norm(x, model.norm) @ model.head.weight.T
    expected = torch.full((T, VOCABULARY.size), -torch.inf, dtype=torch.float64)
    expected[~mine] = norm(z[~patched], model.norm) @ model.head.weight.T
    spoken = norm(x, model.speech_norm) @ model.speech_head.weight.T
    ids = torch.tensor([*range(5), *range(VOCABULARY.first_unit, VOCABULARY.size)])
    expected[mine.nonzero(), ids] = spoken
    return expected


@pytest.mark.parametrize("decoder_window", [1, 4, None])
@pytest.mark.parametrize("slots", WIDTHS)
@pytest.mark.parametrize(("architecture", "text_path", "name"), MODELS)
def test_logits_follow_the_equations(architecture, text_path, name, slots, decoder_window):
    check_equations(config_of(architecture, text_path, slots, decoder_window), name)


@pytest.mark.parametrize("text_path", ["local", "global"])
def test_heads_of_keys_may_be_shared_and_the_feed_forward_of_any_width(text_path):
    large = StackConfig(layers=2, dim=32, heads=4, kv_heads=2, hidden=40)
    local = StackConfig(layers=1, dim=16, heads=4, kv_heads=1, hidden=24)
    check_equations(
        small_config(text_path=text_path, global_transformer=large, encoder=local, decoder=local),
        "static",
    )


def test_encoder_and_decoder_may_differ_in_heads():
    check_equations(small_config(decoder=StackConfig(layers=2, dim=16, heads=4)), "static")


def check_equations(config: ModelConfig, name: str) -> None:
    model, docs = model_of(config), documents()
    packed = logits(model, docs, STRATEGIES[name])
    with torch.no_grad():
        expected = [oracle_logits(model, document, STRATEGIES[name]) for document in docs]
    # rotary angles are computed in float32 by the model and in float64 by the oracle
    torch.testing.assert_close(packed, torch.cat(expected), atol=2e-5, rtol=1e-4)


# --- losses, sizes, settings --------------------------------------------------------------------


def test_chunked_losses_and_gradients_equal_those_of_all_logits_at_once():
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=False).double()
    x = torch.randn(23, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (23,))
    targets[::4] = -100
    weights = torch.rand(23)
    chunked = token_losses(x, head, targets, rows=5)
    got = torch.autograd.grad((chunked * weights).sum(), (x, head.weight))
    whole = F.cross_entropy(head(x).float(), targets, ignore_index=-100, reduction="none")
    expected = torch.autograd.grad((whole * weights).sum(), (x, head.weight))
    torch.testing.assert_close(chunked, whole)
    assert (chunked[::4] == 0).all()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("architecture", "text_path"), [("lst", "local"), ("lst", "global"), ("token", "local")]
)
def test_the_stream_is_of_the_precision_of_products(architecture, text_path):
    model = model_of(small_config(architecture=architecture, text_path=text_path)).float()
    seen = []
    model.global_transformer.register_forward_hook(lambda _, inputs, z: seen.append(z.dtype))
    strategy = Static(size=3) if architecture == "lst" else NoPatching()
    batch = pack_documents(documents(), VOCABULARY, strategy, model.config.plan())
    with torch.autocast("cpu", torch.bfloat16):
        states = model.states(batch)
    for state in states if text_path == "global" else [states]:
        assert state.dtype == torch.bfloat16
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("text_path", ["local", "global"])
def test_forward_is_the_loss_of_the_logits(text_path):
    model = model_of(small_config(text_path=text_path))
    batch = pack_documents(documents(), VOCABULARY, Static(size=3), model.config.plan())
    expected = F.cross_entropy(
        model.logits(batch).float(), batch.targets, ignore_index=-100, reduction="none"
    )
    torch.testing.assert_close(model(batch), expected)


@pytest.mark.parametrize("text_path", ["local", "global"])
@pytest.mark.parametrize("spans", [[9], [0, 11]], ids=["text alone", "speech alone"])
@pytest.mark.parametrize("dead_tail", [True, False])
def test_every_parameter_gets_a_finite_gradient(text_path, spans, dead_tail):
    """Also where a batch holds no speech: ranks that add up gradients wait for each of them."""
    model = model_of(small_config(text_path=text_path))
    document = make_document(np.random.default_rng(0), spans, "a")
    if dead_tail:
        row = patch_document(document, VOCABULARY, Static(size=3))
        batch = make_batch([row, row], VOCABULARY, model.config.plan(), step=0)
    else:
        batch = pack_documents([document], VOCABULARY, Static(size=3), model.config.plan())
    model(batch).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.global_transformer.layers[0].attention.qkv.weight.grad.any()


@pytest.mark.parametrize(
    ("architecture", "text_path"), [("lst", "local"), ("lst", "global"), ("token", "local")]
)
def test_a_training_step_asks_the_device_nothing(architecture, text_path):
    """Meta tensors hold nothing: whatever waits for a value raises on them."""
    config = small_config(architecture=architecture, text_path=text_path)
    with torch.device("meta"):
        model = build_model(config, VOCABULARY)
    strategy = Static(size=3) if architecture == "lst" else NoPatching()
    rows = [patch_document(document, VOCABULARY, strategy) for document in documents()]
    batch = make_batch(rows, VOCABULARY, config.plan(), step=0).to("meta")
    model(batch).sum().backward()
    assert all(parameter.grad.is_meta for parameter in model.parameters())
    with pytest.raises(RuntimeError):
        batch.tokens.nonzero()


@pytest.mark.parametrize("text_path", ["local", "global"])
def test_the_dead_tail_changes_no_loss(text_path):
    model, docs = model_of(small_config(text_path=text_path)), documents()
    rows = [patch_document(document, VOCABULARY, Static(size=3)) for document in docs]
    plan = model.config.plan()
    with torch.no_grad():
        training = model(make_batch(rows, VOCABULARY, plan, step=0))
        whole = model(pack_documents(docs, VOCABULARY, Static(size=3), plan))
    torch.testing.assert_close(training[: len(whole)], whole)
    assert (training[len(whole) :] == 0).all()


@pytest.mark.parametrize("text_path", ["local", "global"])
def test_a_tied_head_is_the_embedding(text_path):
    model = model_of(small_config(text_path=text_path, tied=True))
    assert model.head.weight is model.embedding.weight
    counts = count_parameters(model)
    assert counts["head"] == 0
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    check_equations(model.config, "static")


def test_text_alone_is_read_by_the_global_transformer_alone():
    """As in any language model of text: nothing else has a weight in it."""
    model = model_of(small_config(text_path="global"))
    tokens = np.array([BOS, *VOCABULARY.piece_to_id(np.arange(9)), EOS], np.int32)
    text = make_document(np.random.default_rng(0), [1], "a")._replace(tokens=tokens)
    before = logits(model, [text], Static(size=3))
    with torch.no_grad():
        for name in ("encoder", "decoder", "speech_embedding", "speech_norm", "speech_head"):
            for parameter in getattr(model, name).parameters():
                parameter.fill_(torch.nan)
    torch.testing.assert_close(logits(model, [text], Static(size=3)), before)


def test_the_paper_sizes_are_those_of_table_7():
    with torch.device("meta"):
        counts = count_parameters(
            build_model(ModelConfig(), Vocabulary(num_pieces=32000, num_units=501))
        )
    assert round(counts["global_transformer"] / 1e6, 1) == 1284.6
    assert counts["total"] == sum(v for k, v in counts.items() if k != "total")
    assert 1.4e9 < counts["total"] < 1.6e9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 30, "heads": 4}, "does not split into 4 heads"),
        ({"layers": 0}, "expected every size of a stack to be 1 to"),
        ({"hidden": 0}, "expected every size of a stack to be 1 to"),
        ({"dim": 2**31, "heads": 2}, "expected every size of a stack to be 1 to 1,048,576"),
        ({"layers": 2**31}, "at most 10,000 layers"),
        ({"heads": 4, "kv_heads": 3}, "3 heads of keys cannot be shared evenly by 4"),
    ],
)
def test_impossible_stacks_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        StackConfig(**({"layers": 1, "dim": 32, "heads": 2} | changes))


@pytest.mark.parametrize("name", ["local_window", "decoder_window", "rope_theta", "norm_eps"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_window_or_constant_that_is_not_above_zero_is_refused(name, value):
    option = f"--model.{name.replace('_', '-')}"
    with pytest.raises(UserError, match=f"{option}: expected .*, got {value}"):
        small_config(**{name: value})


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="multiple of 16"):
        small_config(global_transformer=StackConfig(layers=1, dim=40, heads=2))
    with pytest.raises(UserError, match=r"--model\.rope-scaling\.factor: expected more than 0"):
        RopeScaling(kind="linear", factor=0.0)
    with pytest.raises(UserError, match="widths must agree"):
        small_config(decoder=StackConfig(layers=1, dim=32, heads=2))
