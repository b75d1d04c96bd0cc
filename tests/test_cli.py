"""The command line: results on stdout, progress on stderr, exit codes, no tracebacks."""

import json
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.arguments import parse_arguments, settings_of
from pipelines.bulk.job import ScoreJob
from pipelines.cli import main
from pipelines.model_folder import read_model_folder
from pipelines.training.job import TrainJob
from pipelines.training_settings import TrainSettings


def run(*arguments, capsys):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def labelled(tmp_path, emails):
    pq.write_table(emails.slice(0, 50), tmp_path / "labelled.parquet")
    return tmp_path / "labelled.parquet"


@pytest.fixture
def folder(spam_folder, tmp_path):
    import shutil

    shutil.copytree(spam_folder.path, tmp_path / "spam")
    return tmp_path / "spam"


def test_evaluate_tune_and_inspect(folder, labelled, capsys):
    code, out, _ = run("evaluate", folder, "--data", labelled, "--json", capsys=capsys)
    before = json.loads(out)
    assert code == 0
    assert before["rows"] == 50
    code, out, _ = run("tune", folder, "--data", labelled, "--json", "--objective", "recall=0.9", capsys=capsys)
    tuned = json.loads(out)
    assert code == 0
    assert "thresholds" in out
    assert tuned["tp"] / (tuned["tp"] + tuned["fn"]) >= 0.9
    after = read_model_folder(folder)
    assert list(after.decision.thresholds) == tuned["thresholds"]
    assert tuned["thresholds_before"] == [0.4]
    code, out, _ = run("evaluate", folder, "--data", labelled, "--json", capsys=capsys)
    assert {k: json.loads(out)[k] for k in ("mcc", "tp")} == {k: tuned[k] for k in ("mcc", "tp")}
    code, out, _ = run("inspect", folder, capsys=capsys)
    assert code == 0
    assert "kind: binary" in out
    assert f"weights_hash: {after.weights_hash}" in out


def test_tune_changes_only_settings_hash(folder, labelled, capsys):
    before = read_model_folder(folder)
    assert run("tune", folder, "--data", labelled, capsys=capsys)[0] == 0
    after = read_model_folder(folder)
    assert after.weights_hash == before.weights_hash
    assert after.settings_hash != before.settings_hash


@pytest.mark.usefixtures("local_ray")
def test_score_exits_3_with_rows_in_error(folder, input_folder, tmp_path, capsys):
    code, out, err = run("score", folder, "--input", input_folder, "--output", tmp_path / "out", capsys=capsys)
    assert code == 3
    assert "rows_in_error: 2" in out
    assert "units to do" in err
    code, out, err = run("score", folder, "--input", input_folder, "--output", tmp_path / "out", capsys=capsys)
    assert code == 3
    assert "rows_in_error: 2" in out
    assert "nothing to do" in err


def test_settings_precedence_yaml_set_flags(folder, input_folder, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"input: {input_folder}\noutput: {tmp_path}/out\ntext_column: a\nlimit: 1\n")
    arguments = ("score", folder, "--config", tmp_path / "c.yaml", "--set", "text_column=b")
    assert "has no column 'b'" in run(*arguments, capsys=capsys)[2]
    assert "has no column 'c'" in run(*arguments, "--text-column", "c", capsys=capsys)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["score", "{folder}", "--output", "x"],
            "a required setting is missing: input (File, folder or glob with the rows to score",
        ),
        (
            ["score", "{folder}", "--input", "{empty}", "--output", "{empty}/x"],
            "contains no Parquet, JSON Lines or CSV files",
        ),
        (["score", "{empty}", "--input", "{data}", "--output", "{empty}/x"], "has no pipeline.json"),
        (
            ["score", "{folder}", "--input", "{data}", "--output", "{empty}/x", "--set", "keeep=a"],
            "did you mean 'keep'",
        ),
        (["score", "{folder}", "--set", "limit"], "has no '='"),
        (["score", "{folder}", "--set", "keep=[a"], "no valid YAML"),
        (["score", "{folder}", "--config", "{empty}/none.yaml"], "cannot be read: No such file"),
        (
            ["train", "--train", "{data}"],
            "required settings are missing: model (Pretrained weights: a folder or a model name",
        ),
        (["evaluate", "{folder}", "--data", "{data}", "--label-column", "nope"], "has no column 'nope'"),
        (["evaluate", "{folder}", "--data", "{data}", "--text-column", "n"], "of type int64, not string"),
        (["tune", "{folder}", "--data", "{data}", "--objective", "f3"], "objective 'f3' is none of"),
        (["inspect", "{empty}/none"], "is not a folder"),
        (["serve", "{empty}"], "has no pipeline.json"),
        (["serve", "{folder}", "--set", "port=99999"], "port=99999 must be at least 0 and at most 65535"),
    ],
)
def test_bad_arguments_exit_2_with_one_line(arguments, message, folder, tmp_path, capsys):
    empty, data = tmp_path / "empty", tmp_path / "data.parquet"
    empty.mkdir()
    pq.write_table(pa.table({"text": ["a", "b"], "label": ["ham", "spam"], "n": [1, 2]}), data)
    filled = [argument.format(folder=folder, empty=empty, data=data) for argument in arguments]
    code, out, err = run(*filled, capsys=capsys)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith(f"pipelines {arguments[0]}: ")


def test_python_m_pipelines():
    done = subprocess.run([sys.executable, "-m", "pipelines", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--epoch", "1"], "pipelines train: --epoch 1 is not known here; did you mean --epochs?"),
        (["train", "--warmup-ratio=0.1"], "it is a setting without a flag: --set warmup_ratio=VALUE"),
        (["train", "--warmup-ration", "0.1"], "did you mean --set warmup_ratio=VALUE?"),
        (["score", "m", "--ouput", "o"], "pipelines score: --ouput o is not known here; did you mean --output?"),
        (["relabel", "s", "--thresholds", "1", "--output", "o", "--json5"], "did you mean --json?"),
        (["serve", "m", "extra"], "pipelines serve: extra is not known here"),
        (["scor"], "there is no command 'scor'; did you mean score?"),
        (["zzz"], "there is no command 'zzz'. The commands are: train, score"),
        (["tune", "m"], "the following arguments are required: --data"),
    ],
)
def test_unknown_arguments_suggest_the_nearest(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_all_missing_settings_are_named(capsys):
    code, _, err = run("score", capsys=capsys)
    assert code == 2
    assert [name in err for name in ("model (", "input (", "output (")] == [True] * 3


def test_flags_give_the_settings_that_are_changed_first():
    arguments = ["train", "--train", "t", "--model", "m", "--output", "o", "--epochs", "2", "--learning-rate", "1e-4",
                 "--batch-size", "8", "--max-length", "256", "--stride", "64", "--dtype", "float32", "--seed", "7",
                 "--pos-weight", "{a: 2}", "--weight", "balanced", "--max-windows", "3"]  # fmt: skip
    job = TrainJob.parse(settings_of(parse_arguments(arguments)))
    train = job.settings
    assert (train.epochs, train.learning_rate, train.batch_size, train.seed) == (2, 1e-4, 8, 7)
    assert (job.windows.max_length, job.windows.stride, job.windows.max_windows) == (256, 64, 3)
    assert (train.pos_weight, train.weight, job.compute.dtype) == ({"a": 2.0}, "balanced", "float32")


def test_help_has_groups_and_help_all_every_setting(capsys):
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as caught:
            main(["train", flag])
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert shown.index("required, here or in --config:") < shown.index("--epochs") < shown.index("--num-workers")
        assert "example:\n  pipelines train --train" in shown
        assert ("adam_epsilon=1e-08" in shown) == (flag == "--help-all")


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel", "regression"])
def test_init_prints_settings_that_train_reads(kind, tmp_path, capsys):
    code, out, _ = run("init", kind, capsys=capsys)
    assert code == 0
    (tmp_path / "train.yaml").write_text(out)
    values = settings_of(parse_arguments(["train", "--config", str(tmp_path / "train.yaml")]))
    assert values["kind"] == kind
    assert TrainJob.parse(values).settings == TrainSettings()
    whole = "\n".join(line.removeprefix("#") if re.match(r"#\w+: ", line) else line for line in out.splitlines())
    (tmp_path / "whole.yaml").write_text(whole)
    whole_values = settings_of(parse_arguments(["train", "--config", str(tmp_path / "whole.yaml")]))
    assert len(whole_values) > 60
    assert TrainJob.parse(whole_values) == TrainJob.parse(values), "the comments are the defaults"


def test_local_means_without_ray(capsys):
    for arguments, name in ((["score", "m", "--input", "i", "--output", "o"], "replicas"),
                            (["train", "--train", "t", "--model", "m", "--output", "o"], "num_workers")):  # fmt: skip
        assert settings_of(parse_arguments([*arguments, "--local"]))[name] == 0
        assert name not in settings_of(parse_arguments(arguments))


def test_score_placement_flags(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    shown = capsys.readouterr().out
    flags = (
        "tokenize-cpus",
        "tokenize-resources",
        "tokenize-labels",
        "replica-resources",
        "replica-labels",
        "max-errors",
    )
    assert [flag for flag in flags if f"--{flag} " not in shown] == []
    options = parse_arguments(
        ["score", "m", "--input", "i", "--output", "o", "--replica-resources", "{spot: 1}", "--max-errors", "0.5",
         "--replica-labels", "{zone: a}", "--tokenize-cpus", "2", "--append"]
    )  # fmt: skip
    job = ScoreJob.parse(settings_of(options)).score
    assert (job.replica_resources, job.replica_labels) == ({"spot": 1.0}, {"zone": "a"})
    assert (job.tokenize_cpus, job.max_errors, job.append, job.overwrite) == (2.0, 0.5, True, False)
    code, _, err = run("score", folder, "--input", "i", "--output", "o", "--dry-run", "--rate", "0", capsys=capsys)
    assert (code, err) == (2, "pipelines score: --rate 0.0 must be above 0: tokens per second of one replica\n")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("metric=mcc", "metric='mcc' needs validation data: add --valid"),
        ("evaluate_steps=5", "evaluate_steps=5 needs validation data: add --valid"),
        ("early_stopping_patience=2", "early_stopping_patience=2 needs validation data: add --valid"),
    ],
)
def test_settings_that_need_valid_data(labelled, tmp_path, capsys, setting, message):
    code, _, err = run("train", "--train", labelled, "--model", tmp_path, "--kind", "binary", "--output",
                       tmp_path / "out", "--set", setting, capsys=capsys)  # fmt: skip
    assert code == 2
    assert message in err


def test_label_columns_of_the_command_line(folders, tmp_path, capsys):
    """One column of 0 and 1 for each label, found by their names."""
    texts = [f"some text number {number}" for number in range(12)]
    columns = {name: [number >> place & 1 for number in range(12)] for place, name in enumerate("cab")}
    pq.write_table(pa.table({"text": texts, **columns}), tmp_path / "wide.parquet")
    names = [[name for name in "abc" if columns[name][row]] for row in range(12)]
    pq.write_table(pa.table({"text": texts, "label": names}), tmp_path / "lists.parquet")
    folder = str(folders["multilabel"].path)
    found = []
    for data, more in (("wide", ["--label-columns", "c,a,b"]), ("lists", [])):
        assert main(["evaluate", folder, "--data", str(tmp_path / f"{data}.parquet"), "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    wrong = ["evaluate", folder, "--data", str(tmp_path / "wide.parquet"), "--label-columns", "a,b"]
    assert main(wrong) == 2
    assert "both must have the same names" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: binary\nepochs: [1\nseed: 2\n", "line 3, column 5: no valid YAML: expected ',' or ']'"),
        ("kind: binary\nepochs: 1\nkind: multilabel\n", "line 3, column 1: no valid YAML: 'kind' occurs twice"),
    ],
)
def test_yaml_errors_have_a_line(text, message, tmp_path, capsys):
    (tmp_path / "train.yaml").write_text(text)
    code, _, err = run("train", "--config", tmp_path / "train.yaml", capsys=capsys)
    assert code == 2
    assert f"train.yaml, {message}" in err


def test_results_are_tables_with_what_comes_next(folder, labelled, tmp_path, capsys):
    code, out, _ = run("evaluate", folder, "--data", labelled, capsys=capsys)
    assert code == 0
    assert re.search(r"^label +rows +predicted +precision +recall +f1 +auprc +calibration error +threshold$", out, re.M)
    assert re.search(r"^spam +\d+ +(0 +-|[1-9]\d* +0\.\d{4}) ", out, re.MULTILINE)
    code, out, _ = run("score", folder, "--input", labelled, "--output", tmp_path / "out", "--local", capsys=capsys)
    assert f"next:\n  pipelines evaluate --scored {tmp_path / 'out'}" in out
    code, out, _ = run("relabel", tmp_path / "out", "--thresholds", "0.9", "--output", tmp_path / "new", capsys=capsys)
    assert re.search(r"^label +threshold +rows before +rows now$", out, re.MULTILINE)
    code, out, _ = run("score", folder, "--input", labelled, "--output", tmp_path / "o", "--dry-run", capsys=capsys)
    assert re.match(r"takes: \d+ s with 1 replica\n", out)
