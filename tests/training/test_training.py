from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from pipelines.decisions.calibration import WindowLogits, log_loss
from pipelines.errors import JobError, SettingsError
from pipelines.model.scorer import Scorer
from pipelines.model.weights import describe
from pipelines.model.window_model import WindowModel
from pipelines.model_folder import read_model_folder
from pipelines.settings import Calibration, DecisionSettings
from pipelines.text.tokenization import Documents, Tokens
from pipelines.training.checkpoints import steps_of
from pipelines.training.corpus import Corpus, UnitLengths
from pipelines.training.fit import fit, prepare_folder
from pipelines.training.losses import LOSSES
from pipelines.training.optimization import make_optimizer, make_schedule
from pipelines.training.state import BestMetric
from pipelines.training_settings import TrainSettings
from tests import tiny
from tests.training.runs import BINARY, FLOAT32, KINDS, MULTILABEL, in_units, make_job, run


def learning_rates(num_steps=20, **settings):
    optimizer = make_optimizer(torch.nn.Linear(2, 2), TrainSettings(learning_rate=1.0, **settings))
    schedule = make_schedule(optimizer, TrainSettings(learning_rate=1.0, **settings), num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return np.array(rates)


def test_schedules_follow_their_formulas():
    step, warmup, total = np.arange(20), 4, 20
    up = step / warmup
    share = (step - warmup) / (total - warmup)
    after = {
        "linear": 1 - share,
        "cosine": 0.5 * (1 + np.cos(np.pi * share)),
        "constant_with_warmup": np.ones(20),
        "polynomial": (1 - 1e-7) * (1 - share) + 1e-7,
        "cosine_with_restarts": 0.5 * (1 + np.cos(np.pi * (share % 1))),
    }
    for name, expected in after.items():
        rates = learning_rates(scheduler=name, warmup_steps=4)
        np.testing.assert_allclose(rates, np.where(step < warmup, up, expected), atol=1e-6)
    assert (learning_rates(scheduler="constant") == 1).all()
    np.testing.assert_array_equal(learning_rates(warmup_ratio=0.2), learning_rates(warmup_steps=4))
    assert (learning_rates(optimizer="adafactor", scheduler="constant") == 1).all()
    with pytest.raises(SettingsError, match="scheduler=cosine with scheduler_args"):
        learning_rates(scheduler="cosine", scheduler_args={"power": 2})


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_attention_dropout_setting(tmp_path, emails, family):
    losses = {}
    for share in (None, 0.0, 0.5):
        job, train, _ = make_job(tmp_path / str(share), emails, epochs=1, family=family, attention_dropout=share)
        losses[share] = run(job, train).losses
    assert (losses[0.0] == losses[None]) == (family == "bert"), "the base has dropout 0 for bert, 0.1 for distilbert"
    assert losses[0.5] != losses[0.0]


def test_unsupported_attention_dropout_is_refused(tmp_path):
    tiny.classifier("xlnet", num_labels=2).save_pretrained(tmp_path)
    assert describe(str(tmp_path))
    with pytest.raises(
        SettingsError, match=r"attention_dropout=0\.0: xlnet has no dropout of attention weights; leave it unset"
    ):
        describe(str(tmp_path), attention_dropout=0.0)


def test_units_in_one_buffer_change_nothing(tmp_path, emails):
    job, train, valid = make_job(tmp_path / "one", emails, epochs=1)
    valid.documents.errors[5] = train.documents.errors[30] = "the text is null"
    whole = run(job, train, valid)
    job = replace(job, output=str(tmp_path / "parts"))
    prepare_folder(job)
    parts = fit(job, in_units(train, [7, 30, 31]), in_units(valid, [5, 6, 6]))
    assert parts.losses == whole.losses
    assert parts.valid == whole.valid
    assert parts.rows_in_error == whole.rows_in_error == 2
    assert parts.windows == whole.windows


@pytest.mark.parametrize(("last", "kind"), [(3, "binary"), (4, "binary"), (5, "regression"), (9, "binary")])
def test_resume_within_and_between_buffers(tmp_path, emails, monkeypatch, last, kind):
    from pipelines.training import fit as training

    settings = {"shuffle_buffer": 32, "save_steps": 1, "warmup_ratio": 0.5}
    job, train, _ = make_job(tmp_path, emails, KINDS[kind], **settings)
    corpus = in_units(train, range(3, 60, 3))
    rates, save = [], training._save_checkpoint

    def watched(loop, model, checkpoints, settings):
        rates.append(loop._stepper.learning_rate)
        save(loop, model, checkpoints, settings)
        if len(rates) == last:
            checkpoints.close()
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save_checkpoint", watched)
    with pytest.raises(KeyboardInterrupt):
        fit(job, corpus, None)
    went_on = fit(job, corpus, None)
    interrupted, rates[:] = rates[:], [0.0] * last
    job = replace(job, output=str(tmp_path / "whole"))
    prepare_folder(job)
    whole = fit(job, corpus, None)
    assert went_on.losses == pytest.approx(whole.losses, rel=1e-6)
    assert interrupted == pytest.approx(rates[last:], rel=1e-12)
    assert interrupted[-1] < 0.2 * max(interrupted), "the learning rate decays at the end"


@pytest.mark.parametrize(("first", "then"), [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_resume_in_another_dtype(tmp_path, emails, monkeypatch, log_lines, first, then):
    from pipelines.training import fit as training
    from pipelines.training import ranks

    job, train, _ = make_job(tmp_path, emails, epochs=1, save_steps=2, train_dtype="auto")
    save = training._save_checkpoint

    def broken_off(loop, model, checkpoints, settings):
        save(loop, model, checkpoints, settings)
        checkpoints.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks, "resolve_dtype", lambda dtype, device: getattr(torch, first))
    monkeypatch.setattr(training, "_save_checkpoint", broken_off)
    with pytest.raises(KeyboardInterrupt):
        run(job, train)
    monkeypatch.setattr(ranks, "resolve_dtype", lambda dtype, device: getattr(torch, then))
    monkeypatch.setattr(training, "_save_checkpoint", save)
    summary = run(job, train)
    assert "resuming from step 2, in epoch 1" in log_lines
    assert np.isfinite(summary.losses).all()


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [(["bfloat16"] * 3, "bfloat16"), (["bfloat16", "float16", "bfloat16"], "float16"),
     (["bfloat16", "float32"], "float32")],
)  # fmt: skip
def test_ranks_agree_on_one_dtype(monkeypatch, theirs, expected):
    from pipelines.training import ranks

    found = [getattr(torch, name) for name in theirs]
    monkeypatch.setattr(ranks, "world_size", lambda: len(found))
    monkeypatch.setattr(ranks.dist, "all_gather_object", lambda into, mine: into.__setitem__(slice(None), found))
    assert ranks.shared_dtype("auto", torch.device("cpu")) == getattr(torch, expected)


def test_corpus_skips_and_names_rows():
    tokens = Tokens(np.zeros(0, np.int32), np.zeros(4, np.int64))
    bad = Documents(tokens, None, [None, "null", None])
    corpus = Corpus([3, 3], np.arange(6), lambda unit: UnitLengths.of(bad), lambda unit: bad, fingerprint="",
                    name=lambda unit, row: f"{unit}:{row}")  # fmt: skip
    assert [corpus.name(row) for row in corpus.rows_D] == ["0:0", "0:2", "1:0", "1:2"]
    assert (len(corpus), corpus.num_errors) == (4, 2)
    assert corpus.targets.tolist() == [0, 2, 3, 5]
    assert [len(some) for some in corpus.between(1, 4)] == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_scores_like_trained_model(tmp_path, emails, kind):
    job, train, valid = make_job(tmp_path, emails, KINDS[kind])
    summary = run(job, train, valid)
    assert summary.losses[-1] < summary.losses[0]
    folder = read_model_folder(job.output)
    assert folder.windows.max_length == 32
    assert folder.metrics == summary.valid
    scorer = Scorer.load(folder, compute=FLOAT32)
    scored = scorer.score_documents(valid.documents)
    from pipelines.decisions.metrics import evaluate

    again = evaluate(valid.targets, scored.scores_DL, scorer.decide(scored), scorer.decision)
    flat, expected = ({k: v for k, v in m.items() if not isinstance(v, dict)} for m in (again, summary.valid))
    assert expected.pop("loss") == pytest.approx(min(item["loss"] for item in summary.evaluations), rel=0.5)
    assert flat == pytest.approx(expected, abs=1e-6)
    if kind == "multilabel":
        assert folder.decision.thresholds[2] == 0.5, "a label that is always true keeps its threshold"


def test_same_seed_gives_same_run(tmp_path, emails):
    losses = []
    for number in range(2):
        job, train, valid = make_job(tmp_path / str(number), emails, epochs=1)
        losses.append(run(job, train, valid).losses)
    assert losses[0] == losses[1]
    job, train, valid = make_job(tmp_path / "other", emails, epochs=1, seed=7)
    assert run(job, train, valid).losses != losses[0]


def test_accumulation_and_micro_batches_match(tmp_path, emails):
    runs = {"plain": {}, "accumulated": {"batch_size": 4, "gradient_accumulation_steps": 2},
            "small": {"train_batch_tokens": 40}}  # fmt: skip
    losses = {}
    for name, settings in runs.items():
        job, train, _ = make_job(tmp_path / name, emails, epochs=1, weight=(1.0, 3.0), **settings)
        losses[name] = run(job, train).losses
    np.testing.assert_allclose(losses["plain"][:20], losses["accumulated"][:20], rtol=1e-4)
    np.testing.assert_allclose(losses["plain"][:20], losses["small"][:20], rtol=1e-4)


def test_packed_and_padded_training_agree(tmp_path, emails):
    losses = []
    for packing in ("auto", "off"):
        job, train, _ = make_job(tmp_path / packing, emails, epochs=1, compute=replace(FLOAT32, packing=packing))
        summary = run(job, train)
        assert summary.packed == (packing == "auto")
        losses.append(summary.losses)
    np.testing.assert_allclose(losses[0][:20], losses[1][:20], rtol=1e-3)


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_activation_checkpointing_matches(tmp_path, emails, family):
    losses = []
    for on in (False, True):
        job, train, _ = make_job(tmp_path / str(on), emails, epochs=1, family=family, activation_checkpointing=on)
        losses.append(run(job, train).losses)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_calibration_minimizes_log_loss(tmp_path, emails, log_lines):
    job, train, valid = make_job(tmp_path, emails, epochs=6, calibrate="temperature")
    summary = run(job, train, valid)
    folder = read_model_folder(job.output)
    assert folder.calibration == summary.calibration
    assert summary.valid["calibration_error"] < 1 > summary.valid["calibration_error_before"]
    assert any(line.startswith("temperature ") for line in log_lines)
    scored = Scorer.load(folder, compute=FLOAT32).score_documents(valid.documents)
    found, best = WindowLogits(scored.window_logits_WL, scored.windows.offsets, valid.targets), folder.calibration
    temperatures = (best.temperature, best.temperature * 0.9, best.temperature * 1.1, 1.0)
    losses = [log_loss(found, BINARY, Calibration(temperature)) for temperature in temperatures]
    assert losses[0] == min(losses)
    true_scores = scored.scores_DL[np.arange(len(valid.targets)), valid.targets]
    assert -np.log(np.maximum(true_scores, 1e-7)).mean() == pytest.approx(losses[0], rel=1e-5)


def test_non_finite_loss_names_documents(tmp_path, emails):
    job, train, _ = make_job(tmp_path, emails, epochs=1, learning_rate=1e30)
    with pytest.raises(
        JobError, match=r"the loss or its gradient is not finite at step \d+: .*; the step saw (document \d+(, )?)+"
    ):
        run(job, train)


def test_rows_without_text_are_skipped_and_counted(tmp_path, emails):
    job, train, valid = make_job(tmp_path, emails, epochs=1)
    for part in (train, valid):
        part.documents.errors[3] = "the text is null"
    summary = run(job, train, valid)
    assert summary.rows_in_error == 2
    assert sum(summary.valid[name] for name in ("tp", "tn", "fp", "fn")) == 39


def test_all_zero_window_weights(tmp_path, emails):
    job, train, _ = make_job(tmp_path, emails, epochs=1, weight=(0.0, 1.0), batch_size=1)
    losses = run(job, train).losses
    assert 0.0 in losses
    assert max(losses) > 0


def test_train_max_windows_is_reported_and_not_saved(tmp_path, emails):
    job, train, valid = make_job(tmp_path, emails, epochs=1, train_max_windows=1)
    summary = run(job, train, valid)
    assert summary.windows == summary.documents == 60
    assert summary.documents_truncated > 30
    assert read_model_folder(job.output).windows.max_windows is None


def test_non_finite_gradient_is_not_checkpointed(tmp_path, emails, monkeypatch):
    calls = []

    def rooted(logits_WL, target_W):
        calls.append(len(target_W))
        loss_W = F.cross_entropy(logits_WL, target_W, reduction="none")
        return loss_W + (logits_WL.sum(dim=1) * 0).sqrt() if len(calls) == 3 else loss_W  # not finite at 0

    monkeypatch.setitem(LOSSES["binary"], "focal", rooted)
    job, train, _ = make_job(tmp_path, emails, loss_type="focal", max_grad_norm=0.0, save_steps=1)
    with pytest.raises(JobError, match="the loss or its gradient is not finite at step 3: "):
        run(job, train)
    assert steps_of(job.output)[-1] == 2
    weights = load_file(tmp_path / "out" / "checkpoints" / "step-000000002" / "model.safetensors")
    assert all(np.isfinite(weight).all() for weight in weights.values())


def test_non_finite_valid_output_stops_run(tmp_path, emails, monkeypatch):
    job, train, valid = make_job(tmp_path, emails, epochs=1)
    logits = WindowModel.logits

    def overflowing(model, *arguments):
        found = logits(model, *arguments)
        found[-1] = np.inf
        return found

    monkeypatch.setattr(WindowModel, "logits", overflowing)
    with pytest.raises(
        JobError, match=r"output is not finite for \d+ of 40 valid documents \(document \d+.*dtype=float32"
    ):
        run(job, train, valid)


def test_valid_loss_uses_window_weight(tmp_path, emails):
    found = {}
    for weight in ("window", "document"):
        job, train, valid = make_job(tmp_path / weight, emails, epochs=1, window_weight=weight)
        reported = run(job, train, valid).evaluations[-1]["loss"]
        scored = Scorer.load(job.output, compute=FLOAT32).score_documents(valid.documents)
        document_W = scored.windows.document_W
        losses_W = F.cross_entropy(
            torch.from_numpy(scored.window_logits_WL), torch.from_numpy(valid.targets[document_W]), reduction="none"
        ).numpy()
        share_W = 1.0 / np.bincount(document_W)[document_W] if weight == "document" else np.ones(len(document_W))
        assert reported == pytest.approx((losses_W * share_W).sum() / share_W.sum(), rel=1e-4)
        found[weight] = reported
    assert found["window"] != pytest.approx(found["document"], rel=1e-3)


def test_diverged_loss_leaves_no_finished_folder(tmp_path, emails):
    job, train, valid = make_job(tmp_path, emails, epochs=1, learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(JobError, match=r"the loss or its gradient is not finite at step .*: lower learning_rate"):
        run(job, train, valid)
    assert not (tmp_path / "out" / "pipeline.json").exists()


def test_best_epoch_does_not_depend_on_an_untuned_threshold(tmp_path, emails, log_lines):
    """Scores of rare labels are all below 0.5 for epochs: F1 at 0.5 stays at 0, and would keep the first weights."""
    job, train, valid = make_job(tmp_path, emails, MULTILABEL, epochs=3, learning_rate=1e-3)
    rng = np.random.default_rng(0)
    rare = [
        replace(data, targets=(rng.random(data.targets.shape) < 0.15).astype(np.float32)) for data in (train, valid)
    ]
    summary = run(job, *rare)
    values = [evaluation["auprc_macro"] for evaluation in summary.evaluations]
    assert summary.best == int(np.argmax(values))
    assert not any("cannot choose" in line for line in log_lines)
    chosen = replace(job, output=str(tmp_path / "other"), train=replace(job.train, metric="f1_macro"))
    prepare_folder(chosen)
    assert {evaluation["f1_macro"] for evaluation in run(chosen, *rare).evaluations} == {0.0}
    assert any("all 3 evaluations have the same f1_macro (0.0), which cannot choose" in line for line in log_lines)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "multilabel", "labels": ("a", "b")}, "auprc_macro"),
        ({"kind": "multilabel", "labels": ("a",)}, "auprc_macro"),
        ({"kind": "binary", "labels": ("a", "b")}, "auprc"),
        ({"kind": "binary", "labels": ("a", "b"), "thresholds": 0.4}, "mcc"),
        ({"kind": "binary", "labels": ("a", "b"), "merge": "vote"}, "mcc"),
        ({"kind": "multiclass", "labels": ("a", "b", "c")}, "mcc"),
        ({"kind": "regression"}, "rmse"),
    ],
)
def test_default_metric(changes, expected):
    assert BestMetric.of(TrainSettings(), DecisionSettings(**changes)).name == expected
