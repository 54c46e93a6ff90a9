"""A configuration survives JSON, and JSON that is not one is refused by the key at fault."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lst.errors import UserError
from lst.presets import DESCRIPTIONS, PRESETS
from lst.train.config import TrainConfig, differences, from_json, read_config, to_json


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name: str) -> None:
    text = json.dumps(to_json(PRESETS[name]))
    assert from_json(json.loads(text), "config.json") == PRESETS[name]


def test_every_preset_has_its_name_and_a_description_of_one_line() -> None:
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert len(DESCRIPTIONS[name].splitlines()) == 1


def remove(path: str) -> Callable[[dict[str, Any]], Any]:
    *outer, last = path.split(".")
    return lambda values: inside(values, outer).pop(last)


def put(path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    *outer, last = path.split(".")
    return lambda values: inside(values, outer).update({last: value})


def inside(values: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    for key in keys:
        values = values[key]
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("stepz", 3), "c.json: unknown key stepz"),
        (put("optimizer.lrr", 3), "c.json: unknown key optimizer.lrr"),
        (remove("seed"), "c.json: missing key seed"),
        (remove("model.encoder.dim"), "c.json: missing key model.encoder.dim"),
        (put("steps", "6"), 'c.json: expected steps to be int, got "6"'),
        (put("steps", True), "c.json: expected steps to be int, got true"),
        (put("steps", None), "c.json: expected steps to be int, got null"),
        (put("out", 3), "c.json: expected out to be Path, got 3"),
        (put("evaluate", 1), "c.json: expected evaluate to be bool, got 1"),
        (put("optimizer.lr", "fast"), 'c.json: expected optimizer.lr to be float, got "fast"'),
        (put("optimizer.betas", [0.9]), "c.json: expected optimizer.betas to be tuple"),
        (put("optimizer.betas", [0.9, "x"]), "c.json: expected optimizer.betas[1] to be float"),
        (put("data.mixture.text", "x"), "c.json: expected data.mixture.text to be float"),
        (put("optimizer", 3), "c.json: expected optimizer to be OptimizerConfig, got 3"),
        (put("precision", "int8"), "c.json: expected precision to be"),
        (put("steps", 0), "c.json: --steps: expected 1 or more, got 0"),
        (
            put("optimizer.weight_decay", math.inf),
            "c.json: --optimizer.weight-decay: expected 0 or",
        ),
        (put("hang_timeout", -1), "c.json: --hang-timeout: expected 0 or more, got -1"),
        (put("hang_timeout", math.inf), "c.json: --hang-timeout: expected 0 or more, got inf"),
        (put("hang_timeout", math.nan), "c.json: --hang-timeout: expected 0 or more, got nan"),
    ],
)
def test_wrong_json_is_refused_by_its_key(
    tiny: Callable[..., TrainConfig], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    values = to_json(tiny())
    change(values)
    with pytest.raises(UserError) as caught:
        from_json(values, "c.json")
    assert str(caught.value).startswith(message)


def test_a_whole_number_is_read_as_a_float(tiny: Callable[..., TrainConfig]) -> None:
    values = to_json(tiny())
    values["data"]["mixture"]["text"] = 2
    mixture = from_json(values, "c.json").data.mixture
    assert mixture["text"] == 2.0
    assert type(mixture["text"]) is float


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"config\.json: expected JSON"):
        read_config(path)


def test_differences_are_named_by_dotted_keys(tiny: Callable[..., TrainConfig]) -> None:
    first, second = tiny(seed=1), tiny(seed=2)
    assert differences(first, first) == []
    assert differences(first, second) == [("seed", 1, 2)]
    values = to_json(first)
    values["data"]["mixture"] = {"text": 1.0}
    keys = [key for key, _, _ in differences(first, from_json(values, "c.json"))]
    assert keys == ["data.mixture.text", "data.mixture.speech"]
