import dataclasses
import datetime
import math

import pytest

from pipelines import settings
from pipelines.config_file import read_config
from pipelines.errors import SettingsError
from pipelines.fields import field_help, parse
from pipelines.settings import DecisionSettings, ScoreSettings, WindowSettings
from pipelines.training_settings import TrainPaths, TrainSettings

GROUPS = [group for group in vars(settings).values() if isinstance(group, type) and dataclasses.is_dataclass(group)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:8", "1:8"), ("0:1", "0:1"), ("190:20:30", "190:20:30"), ("off", "off"), ("no", "no"), ("true", True),
        ("12", 12), ("-3", -3), ("0", 0), ("007", "007"), ("1e-4", 1e-4), ("2.5", 2.5), (".5", 0.5), ("1.", 1.0),
        ("1_000", "1_000"), ("null", None), ("0x1f", "0x1f"), ("e5", "e5"), ("-.inf", -math.inf), ("10", 10),
        ("{spam: 0.4, ham: 1}", {"spam": 0.4, "ham": 1}), ("'1'", "1"), ("2026-11-23", datetime.date(2026, 11, 23)),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text, value, tmp_path):
    (tmp_path / "settings.yaml").write_text(f"name: {text}\n")
    found = read_config(str(tmp_path / "settings.yaml"))["name"]
    assert (found, type(found)) == (value, type(value))


def test_flat_mapping_is_split_and_coerced():
    windows, train = parse({"stride": 4, "learning_rate": "4e-5", "weight": [1, 2]}, WindowSettings, TrainSettings)
    assert windows.stride == 4
    assert isinstance(windows.stride, int)
    assert train.learning_rate == 4e-5
    assert train.weight == (1.0, 2.0)
    (decision,) = parse({"kind": "binary", "labels": [0, 1]}, DecisionSettings)
    assert decision.labels == ("0", "1")
    (score,) = parse({"thresholds": {"spam": 1}}, ScoreSettings)
    assert score.thresholds == {"spam": 1.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
        ({"zzz": 1}, "unknown setting 'zzz'; known: "),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"epochs": 1.5}, "epochs=1.5 must be int"),
        ({"epochs": True}, "epochs=True must be int"),
        ({"learning_rate": "fast"}, "learning_rate='fast' must be float"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be above 0"),
        ({"weight": [1, -2]}, "weight=-2.0 must be at least 0"),
        ({"weight": [1, float("inf")]}, "weight=inf must be at least 0"),
        ({"train_dtype": "float8"}, "train_dtype='float8' must be 'auto' or 'float32'"),
        ({"stride": 1.5}, "stride=1.5 is a float above 1.0"),
        ({"stride": 0}, "stride=0 must be above 0"),
        ({"kind": "ternary"}, "kind='ternary' must be 'binary' or"),
        ({"kind": "binary", "labels": ["a", "b", "c"]}, "kind binary needs 2 labels, got 3"),
        ({"kind": "multilabel", "merge": "vote"}, "merge=vote needs one label per text"),
        ({"kind": "binary", "labels": ["a", "b"], "tie_value": 2}, "tie_value=2 is not a label id: it must be 0 to 1"),
        ({"kind": "multiclass", "thresholds": 0.5}, "kind multiclass takes no thresholds"),
        ({"kind": "binary", "abstain_below": 0.5}, "abstain_below is for kind multiclass"),
        ({"labels": ["a", "a"]}, "labels repeat"),
        ({"labels": [True, False]}, "labels"),
        ({"kind": "regression", "labels": ["a", "b"]}, "kind regression has no labels, got a, b"),
    ],
)
def test_error_messages(values, message):
    with pytest.raises(SettingsError) as caught:
        parse(values, TrainSettings, WindowSettings, DecisionSettings)
    assert message in str(caught.value)


def test_missing_setting_message():
    with pytest.raises(
        SettingsError, match=r"a required setting is missing: output \(New folder for the finished model"
    ):
        parse({"train": "a", "model": "b", "valid": None}, TrainPaths)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_every_setting_is_documented(group):
    assert set(field_help(group)) == set(group.__dataclass_fields__)
    assert all(text.endswith(".") for text in field_help(group).values())


@pytest.mark.parametrize(("text", "expected"), [("1:8", (1, 8)), (4, (4, 4)), ("4", (4, 4)), (None, None)])
def test_replicas_number_or_range(text, expected):
    assert ScoreSettings(replicas=text).replica_range == expected


@pytest.mark.parametrize("text", ["8:1", "x", "1:", "0:2", -1])
def test_invalid_replica_ranges_are_refused(text):
    with pytest.raises(SettingsError, match="replicas="):
        ScoreSettings(replicas=text)
