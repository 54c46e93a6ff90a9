"""The smallest model of every part learns twenty demo records by heart."""

import numpy as np
import pytest
import torch

from lst.data.batch import pack_documents
from lst.data.interleave import record_document
from lst.data.patching import Aligned, NoPatching, Static
from lst.data.records import Dataset
from lst.model import ModelConfig, StackConfig, build_model
from lst.vocabulary import Tokenizer, Vocabulary

LIMIT, MAX_STEPS = 0.1, 400  # nats a token


@pytest.mark.parametrize(
    ("architecture", "text_path", "strategy"),
    [
        ("lst", "local", Static(size=4)),
        ("lst", "local", Aligned(silence="separate")),
        ("lst", "global", Static(size=4)),
        ("token", "local", NoPatching()),
    ],
    ids=["static", "aligned", "global text", "token"],
)
def test_one_layer_each_overfits_twenty_records(tiny_corpus, architecture, text_path, strategy):
    tokenizer = Tokenizer.load(tiny_corpus / "tokenizer.model")
    vocabulary = Vocabulary(num_pieces=tokenizer.num_pieces, num_units=501)
    rng = np.random.default_rng(0)
    records = [
        dataset[i]
        for dataset in (
            Dataset.open(tiny_corpus / "train" / "text"),
            Dataset.open(tiny_corpus / "train" / "speech"),
        )
        for i in range(10)
    ]
    documents = [record_document(record, vocabulary, tokenizer, rng) for record in records]
    config = ModelConfig(
        architecture=architecture,
        text_path=text_path,
        encoder=StackConfig(layers=1, dim=64, heads=2),
        global_transformer=StackConfig(layers=1, dim=128, heads=2),
        decoder=StackConfig(layers=1, dim=64, heads=2),
    )
    torch.manual_seed(0)
    model = build_model(config, vocabulary)
    batch = pack_documents(documents, vocabulary, strategy, config.plan())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss = torch.tensor(torch.inf)
    for _ in range(MAX_STEPS):
        loss = model(batch).sum() / batch.num_targets
        if loss < LIMIT:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < LIMIT
