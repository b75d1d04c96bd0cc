import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipelines.errors import DataError, SettingsError
from pipelines.settings import DecisionSettings
from pipelines.training.losses import Loss, resolve_loss
from pipelines.training_settings import TrainSettings

BINARY = DecisionSettings(kind="binary", labels=("ham", "spam"))
MULTICLASS = DecisionSettings(kind="multiclass", labels=("a", "b", "c"))
MULTILABEL = DecisionSettings(kind="multilabel", labels=("a", "b", "c"))


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_against_float64_references(weighted):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 3)) * 3
    weight = np.array([1, 0.5, 2], np.float32) if weighted else None
    loss = Loss("multiclass", weight)
    full = np.ones(3) if weight is None else weight.astype(np.float64)
    labels = rng.integers(0, 3, 6)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found = loss(torch.tensor(logits), torch.from_numpy(labels))
    np.testing.assert_allclose(found, -full[labels] * log_p[np.arange(6), labels], rtol=1e-5)
    np.testing.assert_allclose(loss.normalizers(labels), full[labels])
    mean = found.sum().item() / loss.normalizers(labels).sum()
    assert mean == pytest.approx(F.cross_entropy(torch.tensor(logits), torch.from_numpy(labels),
                                                 torch.tensor(full)).item(), rel=1e-5)  # fmt: skip
    held = rng.integers(0, 2, (6, 3)).astype(np.float32)
    p = 1 / (1 + np.exp(-logits))
    expected = -(full * held * np.log(p) + (1 - held) * np.log(1 - p)).mean(axis=1)
    found = Loss("multilabel", weight)(torch.tensor(logits), torch.from_numpy(held))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    values = rng.normal(size=6).astype(np.float32)
    found = Loss("regression")(torch.tensor(logits[:, :1]), torch.from_numpy(values))
    np.testing.assert_allclose(found, (logits[:, 0] - values) ** 2, rtol=1e-5)


def test_weights_are_checked_and_balanced():
    targets = np.array([0, 0, 0, 1, 2, 2])
    balanced = resolve_loss(TrainSettings(weight="balanced"), MULTICLASS, targets).weight_L
    np.testing.assert_allclose(balanced, [6 / 9, 6 / 3, 6 / 6])
    held = np.array([[1, 0, 1], [0, 0, 1], [0, 1, 0]], np.float32)
    np.testing.assert_allclose(
        resolve_loss(TrainSettings(pos_weight="balanced"), MULTILABEL, held).weight_L, [2, 2, 0.5]
    )
    with pytest.raises(DataError, match="label 'b' never occurs"):
        resolve_loss(TrainSettings(weight="balanced"), MULTICLASS, np.array([0, 2]))
    with pytest.raises(SettingsError, match="weight has 2 values; there are 3 labels"):
        resolve_loss(TrainSettings(weight=(1, 2)), MULTICLASS, targets)
    with pytest.raises(SettingsError, match="pos_weight is not for kind multiclass; use weight"):
        resolve_loss(TrainSettings(pos_weight=(1, 2, 3)), MULTICLASS, targets)


@pytest.mark.parametrize(
    ("loss_type", "loss_args", "expected"),
    [
        ("focal", {}, 0.0675492),
        ("focal", {"alpha": 0.25}, 0.0495448),
        ("focal", {"alpha": [0.25, 0.75]}, 0.0849339),
        ("dice", {}, 0.3171227),
        ("dice", {"gamma": 2, "smooth": 1}, 0.4834778),
        ("tversky", {"alpha": 0.3, "beta": 0.7}, 0.3171230),
        ("tversky", {"alpha": 0.3, "beta": 0.7, "gamma": 1, "scale": 2, "smooth": 1}, 0.2797928),
    ],
)
def test_losses_match_simpletransformers(loss_type, loss_args, expected):
    """The expected values come from the loss classes of Simple Transformers 0.70.8."""
    targets = np.array([1, 0, 1])
    loss = resolve_loss(TrainSettings(loss_type=loss_type, loss_args=loss_args), BINARY, targets)
    logits = torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 0.0]])
    mean = loss(logits, torch.from_numpy(targets)).sum() / loss.normalizers(targets).sum()
    assert mean.item() == pytest.approx(expected, abs=1e-6)


def test_losses_against_formulas():
    logits, held = np.array([[2.0, -1.0], [0.3, 4.0]]), np.array([[1, 0], [0, 1]], np.float32)
    p = 1 / (1 + np.exp(-logits))
    p_true = np.where(held == 1, p, 1 - p)
    loss = Loss("multilabel", loss_type="focal", loss_args={"gamma": 1.5, "alpha": 0.3})
    expected = (-np.where(held == 1, 0.3, 0.7) * (1 - p_true) ** 1.5 * np.log(p_true)).mean(axis=1)
    np.testing.assert_allclose(loss(torch.tensor(logits), torch.from_numpy(held)), expected, rtol=1e-5)
    loss = Loss("multilabel", loss_type="focal", loss_args={"gamma": 1.5, "alpha": [0.3, 0.8]})
    expected = (-np.where(held == 1, [0.3, 0.8], [0.7, 0.2]) * (1 - p_true) ** 1.5 * np.log(p_true)).mean(axis=1)
    np.testing.assert_allclose(loss(torch.tensor(logits), torch.from_numpy(held)), expected, rtol=1e-5)
    assert loss.normalizers(held).tolist() == [1, 1], "label weights do not change the normalizers"
    loss = Loss("multilabel", loss_type="asymmetric")
    shifted = np.maximum(p - 0.05, 0)
    expected = -np.where(held == 1, (1 - p) * np.log(p), shifted**4 * np.log(1 - shifted)).mean(axis=1)
    np.testing.assert_allclose(loss(torch.tensor(logits), torch.from_numpy(held)), expected, rtol=1e-5)
    values, target = torch.tensor([[3.0], [0.5]]), torch.tensor([0.0, 0.0])
    assert Loss("regression", loss_type="mae")(values, target).tolist() == [3.0, 0.5]
    assert Loss("regression", loss_type="huber")(values, target).tolist() == [2.5, 0.125]
    smoothed = Loss("multiclass", label_smoothing=0.3)(torch.tensor(logits), torch.tensor([0, 1]))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(smoothed, -0.7 * log_p[[0, 1], [0, 1]] - 0.3 * log_p.mean(axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "decision", "message"),
    [
        ({"loss_type": "asymmetric"}, BINARY, "is not for kind binary; it has: focal, dice, tversky"),
        ({"loss_type": "focal", "loss_args": {"gama": 1}}, BINARY, "no argument 'gama'; it has: gamma, alpha"),
        ({"loss_type": "focal", "loss_args": {"alpha": [1]}}, BINARY, "alpha has 1 values; there are 2 labels"),
        ({"loss_type": "focal", "loss_args": {"gamma": "x"}}, BINARY, "gamma='x' must be a finite number"),
        ({"loss_type": "focal", "loss_args": {"gamma": None}}, BINARY, "gamma=None must be a finite number"),
        (
            {"loss_type": "focal", "loss_args": {"alpha": [None, 1]}},
            BINARY,
            r"alpha=\[None, 1\] must be a finite number",
        ),
        (
            {"loss_type": "focal", "loss_args": {"alpha": -1}},
            BINARY,
            "alpha=-1 must be a finite number that is not neg",
        ),
        ({"loss_type": "tversky", "loss_args": {"alpha": [1, 2], "beta": 1}}, BINARY, r"alpha=\[1, 2\] must be a fin"),
        ({"loss_type": "tversky"}, BINARY, "needs loss_args alpha, beta"),
        ({"loss_args": {"gamma": 1}}, BINARY, "loss_args without loss_type"),
        ({"loss_type": "focal", "weight": (1, 2)}, BINARY, "takes no class weights"),
        ({"label_smoothing": 0.1}, MULTILABEL, "label_smoothing is for cross-entropy"),
    ],
)
def test_invalid_loss_settings_are_refused(settings, decision, message):
    with pytest.raises(SettingsError, match=message):
        resolve_loss(TrainSettings(**settings), decision, np.array([0, 1]))


@pytest.mark.parametrize(
    ("kind", "loss_type", "arguments"),
    [
        ("multiclass", "focal", {"gamma": 0.5}),
        ("multiclass", "dice", {"gamma": 0.5}),
        ("multiclass", "tversky", {"gamma": 0.5, "alpha": 0.3, "beta": 0.7}),
        ("multilabel", "focal", {"gamma": 0.5}),
        ("multilabel", "asymmetric", {"gamma_pos": 0.5, "gamma_neg": 0.5}),
    ],
)
def test_gradient_is_finite_for_extreme_logits(kind, loss_type, arguments):
    logits = torch.tensor([[100.0, -100.0, -100.0], [-100.0, 100.0, 0.0]], requires_grad=True)
    target = torch.tensor([0, 1]) if kind == "multiclass" else torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    Loss(kind, loss_type=loss_type, loss_args=arguments)(logits, target).sum().backward()
    assert torch.isfinite(logits.grad).all()
