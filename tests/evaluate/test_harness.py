"""The model that lm-eval asks: the same numbers as ours, from a task file of one's own."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lst.data.batch import pack_documents
from lst.data.interleave import record_document, stable_rng
from lst.data.patching import final_strategy
from lst.data.records import Record
from lst.errors import UserError
from lst.pretrained import Pretrained, save_pretrained

pytest.importorskip("lm_eval", reason="lst[eval] is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from lst.evaluate.__main__ import main
from lst.evaluate.harness import HarnessModel

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
WORDS = ["the", "small", "red", "fox", "went", "over", "hills", "and", "told", "a", "story"]
TASK = """
task: riddles
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{activity_label}}}}: {{{{ctx_a}}}} {{{{ctx_b.capitalize()}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def folder(
    make_trained: Callable[..., Pretrained], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("harness") / "model"
    save_pretrained(make_trained(), out)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> HarnessModel:
    return HarnessModel(str(folder))


def request(kind: Any, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def text_nats(model: HarnessModel, text: str) -> np.ndarray:
    """(n,) of each piece of a document that is the text: the oracle."""
    trained = model.trained
    record = Record("r", text, None, None, None, None, "test")
    document = record_document(record, trained.vocabulary, trained.tokenizer, stable_rng(0), "text")
    strategy = final_strategy(trained.config.data.patching)
    batch = pack_documents([document], trained.vocabulary, strategy, trained.config.model.plan())
    with torch.no_grad():
        losses = trained.model(batch)
    return -losses[:-2].double().numpy()  # without <eos>


def test_likelihoods_are_those_of_the_text_alone(model: HarnessModel) -> None:
    pairs = [("the small red", " fox went"), ("a story", " of hills"), ("", "the fox")]
    found = model.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    for (context, continuation), (nats, _) in zip(pairs, found, strict=True):
        whole = text_nats(model, context + continuation)
        start = len(model.tok_encode(context)) if context else 0
        assert nats == pytest.approx(whole[start:].sum(), abs=1e-4)
    # However they are packed.
    model._tokens_per_batch, before = 1, model._tokens_per_batch
    alone = model.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    model._tokens_per_batch = before
    assert [nats for nats, _ in alone] == pytest.approx([nats for nats, _ in found], abs=1e-4)


def test_what_is_generated_greedily_is_the_likeliest(model: HarnessModel) -> None:
    settings = {"until": ["\n\n"], "max_gen_toks": 5}
    (text,) = model.generate_until([request("generate_until", "the small", settings)])
    assert text
    tokens = model.tok_encode("the small")
    trained = model.trained
    for _ in range(5):  # the oracle: the likeliest piece, five times
        batch = pack_documents(
            [_document([1, *tokens])],
            trained.vocabulary,
            final_strategy(trained.config.data.patching),
            trained.config.model.plan(),
        )
        with torch.no_grad():
            scores = trained.model.logits(batch)[-1]
        allowed = torch.full_like(scores, -torch.inf)
        pieces = slice(trained.vocabulary.first_piece, trained.vocabulary.first_unit)
        allowed[pieces] = scores[pieces]
        allowed[2] = scores[2]  # <eos>
        tokens.append(int(allowed.argmax()))
        if tokens[-1] == 2:
            break
    pieces = [trained.vocabulary.id_to_piece(token) for token in tokens if token > 4]
    assert "the small" + text == trained.tokenizer.decode(pieces)
    # Cut at the first stop string that comes, which is not told.
    stop = text[len(text) // 2]
    (cut,) = model.generate_until(
        [request("generate_until", "the small", settings | {"until": ["\n\n", stop]})]
    )
    assert cut == text.split(stop)[0]


def _document(tokens: list[int]) -> Any:
    from lst.data.interleave import Document

    return Document(np.array(tokens, np.int32), np.zeros((0, 2), np.int32), (), 0, False, "")


def test_a_likelihood_says_whether_it_is_the_likeliest(model: HarnessModel) -> None:
    scores = []
    for piece in range(300):
        ids = [model.trained.vocabulary.piece_to_id(piece)]
        scores.append((("", ""), model.tok_encode("the"), ids))
    found = model._loglikelihood_tokens(scores)
    likeliest = [place for place, (_, greedy) in enumerate(found) if greedy]
    best = int(np.argmax([nats for nats, _ in found]))
    assert likeliest in ([best], [])  # none where a unit or a special is likelier
    assert sum(np.exp(nats) for nats, _ in found) < 1


def test_a_long_text_is_read_in_windows_each_token_once(folder: Path) -> None:
    text = " ".join(WORDS * 6)
    long, short = (
        HarnessModel(str(folder), max_length=500),
        HarnessModel(str(folder), max_length=20),
    )
    (whole,) = long.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    assert whole == pytest.approx(text_nats(long, text).sum(), abs=1e-3)
    tokens = long.tok_encode(text)
    parts = [
        (tokens[max(0, start - 1) : start], tokens[start : start + 20])
        for start in range(0, len(tokens), 20)
    ]
    expected = sum(
        nats for nats, _ in short._loglikelihood_tokens([(("", ""), a, b) for a, b in parts])
    )
    # The last window keeps its length and looks further back.
    (found,) = short.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    assert len(parts) > 3
    assert found == pytest.approx(expected, rel=0.02)


def test_a_context_that_is_too_long_loses_its_start(folder: Path) -> None:
    model = HarnessModel(str(folder), max_length=10)
    tokens = model.tok_encode(" ".join(WORDS * 3))
    found, cut = model._loglikelihood_tokens(
        [(("", ""), tokens[:-2], tokens[-2:]), (("", ""), tokens[-11:-2], tokens[-2:])]
    )
    assert found == cut
    with pytest.raises(UserError, match="expected continuations of 1 to 10 tokens, got 30"):
        model._loglikelihood_tokens([(("", "x"), [], tokens[:30])])
    with pytest.raises(UserError, match="expected max_gen_toks below the model's 10 tokens"):
        model.generate_until([request("generate_until", "a", {"max_gen_toks": 10})])


def test_a_task_file_of_ones_own_scores_as_our_command_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(least, most))))

    data = tmp_path / "riddles.jsonl"
    lines = [
        {"activity_label": words(1, 3), "ctx_a": words(3, 7), "ctx_b": words(1, 3),
         "endings": [f"{words(1, 8)} {last}" for last in WORDS[:4]], "label": int(rng.integers(4))}
        for _ in range(24)
    ]  # fmt: skip
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "riddles.yaml").write_text(TASK.format(data=data, cache=tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # The harness's own thousands of task files are left alone: to list them takes a minute.
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    asked = {"model": "lst", "model_args": f"checkpoint={folder}", "device": "cuda:0"}
    found = simple_evaluate(**asked, tasks=["riddles"], batch_size=8, task_manager=tasks)
    theirs = found["results"]["riddles"]
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    code = code.replace('"runs/demo"', repr(str(folder))).replace('tasks=["hellaswag"]', "**local")
    names: dict[str, Any] = {"local": {"tasks": ["riddles"], "task_manager": tasks}}
    exec(code, names)
    assert names["results"]["results"]["riddles"]["acc,none"] == theirs["acc,none"]

    out = tmp_path / "ours.json"
    monkeypatch.setattr(
        "sys.argv",
        ["evaluate", str(folder), "--task", "hellaswag", "--data", str(data), "--json", str(out)],
    )
    main()
    ours = {score["measure"]: score["accuracy"] for score in json.loads(out.read_text())["scores"]}
    assert ours["sum"] == pytest.approx(theirs["acc,none"])
    assert ours["per character"] == pytest.approx(theirs["acc_norm,none"])
    assert 0 < ours["sum"] < 1


def test_without_lm_eval_the_command_ends_in_one_line():
    script = "import runpy, sys; sys.modules['lm_eval'] = None\n"
    script += "runpy.run_module('lst.evaluate.harness', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: the harness needs lm-eval, which is not installed: pip install 'lst[eval]'\n"
    )


@pytest.mark.parametrize("option", ["max_length", "tokens_per_batch"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "many"])
def test_a_size_that_is_no_number_above_zero_is_refused(option: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{option.replace('_', '-')}: expected 1 or more, got"):
        HarnessModel("none", **{option: value})
