"""The windows of each optimizer step: buffers, ranks, skipped steps, units that have not arrived yet."""

import collections
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.text.template import Template
from pipelines.text.tokenization import Tokens, cut_documents, offsets_of
from pipelines.text.windows import WindowPlan
from pipelines.training.losses import Loss
from pipelines.training.order import LabelledWindows, TrainingWindows, WindowCounts, epoch_steps, num_steps_of_epoch
from pipelines.training_settings import TrainSettings


def windows_of(lengths_UD):
    """Units of documents with these lengths. Every token id of a document is the number of the document."""
    first = np.cumsum([0, *map(len, lengths_UD)])
    loaded = []

    def load(units):
        loaded.append(units)
        lengths = np.concatenate([lengths_UD[unit] for unit in units])
        names = np.concatenate([first[unit] + np.arange(len(lengths_UD[unit])) for unit in units])
        tokens = Tokens(np.repeat(names, lengths).astype(np.int32), offsets_of(lengths))
        cut = cut_documents(tokens, WindowPlan(22, 20, 10), tiny_template())
        return LabelledWindows(cut, names % 2)

    counts = np.array([len(load((unit,)).length_W) for unit in range(len(lengths_UD))])
    loaded.clear()
    num_documents_U = np.array([len(lengths) for lengths in lengths_UD])
    return TrainingWindows(num_documents_U, lambda unit: WindowCounts(counts[unit]), "", load), loaded


def names_of(step):
    """Document and start of each window of a step."""
    cut = step.data.cut
    document_W, start_W = cut.windows.document_W[step.index_W], cut.windows.start_W[step.index_W]
    return list(zip(cut.tokens.ids[cut.tokens.offsets[document_W]].tolist(), start_W.tolist(), strict=True))


@given(
    lengths_UD=st.lists(st.lists(st.integers(1, 60), max_size=6), min_size=1, max_size=8).filter(any),
    world_size=st.integers(1, 5),
    buffer=st.integers(1, 60),
    window_weight=st.sampled_from(["window", "document"]),
)
def test_each_window_once_per_epoch(lengths_UD, world_size, buffer, window_weight):
    data, _ = windows_of([np.array(unit, int) for unit in lengths_UD])
    settings = TrainSettings(batch_size=3, window_weight=window_weight, shuffle_buffer=buffer)
    loss = Loss("binary", window_weight=window_weight)
    ranks = [
        list(epoch_steps(data, settings, loss, epoch=1, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert {len(steps) for steps in ranks} == {num_steps_of_epoch(data, settings, 1)}
    seen = collections.Counter()
    for together in zip(*ranks, strict=True):
        shares = np.concatenate([step.share_W for step in together])
        assert [step.normalizer for step in together] == pytest.approx([shares.sum()] * world_size)
        for step in together:
            for name, share in zip(names_of(step), step.share_W, strict=True):
                seen[name] += share
    whole = windows_of([np.concatenate([np.array(unit, int) for unit in lengths_UD])])[0].first()
    num_windows_W = whole.cut.windows.num_windows_D[whole.cut.windows.document_W]
    expected = {
        (document, start): 1 / count if window_weight == "document" else 1
        for document, start, count in zip(
            whole.cut.windows.document_W.tolist(), whole.cut.windows.start_W.tolist(), num_windows_W, strict=True
        )
    }
    assert {name: share for name, share in seen.items() if share} == pytest.approx(expected)


def test_buffer_size_and_epoch_shuffling():
    data, loaded = windows_of([np.full(20, 15)] * 50)
    settings, loss = TrainSettings(batch_size=8, shuffle_buffer=100), Loss("binary")
    epochs = []
    for epoch in (0, 1):
        steps = list(epoch_steps(data, settings, loss, epoch=epoch, rank=0, world_size=1))
        assert max(len(step.data.length_W) for step in steps) == 100
        epochs.append([names_of(step) for step in steps])
    assert sorted(unit for units in loaded for unit in units) == sorted([*range(50)] * 2)
    assert epochs[0] != epochs[1]
    units_of_a_batch = [len({document // 20 for document, _ in names}) for names in epochs[0]]
    assert np.mean(units_of_a_batch) > 3, "a batch mixes the units of its buffer"


def test_skipped_steps_load_no_buffers():
    data, loaded = windows_of([np.full(20, 15)] * 50)
    settings, loss = TrainSettings(batch_size=8, shuffle_buffer=100), Loss("binary")
    whole = [names_of(step) for step in epoch_steps(data, settings, loss, epoch=0, rank=0, world_size=1)]
    for skip in (0, 1, 12, 13, 14, 129, 130):
        loaded.clear()
        rest = epoch_steps(data, settings, loss, epoch=0, rank=0, world_size=1, skip=skip)
        assert [names_of(step) for step in rest] == whole[skip:]
        assert len(loaded) == 10 - skip // 13


def test_first_epoch_starts_with_first_buffer():
    data, _ = windows_of([np.full(20, 15)] * 50)
    settings, loss = TrainSettings(batch_size=8, shuffle_buffer=100), Loss("binary")
    order = tuple(np.random.default_rng(1).permutation(50).tolist())
    come = [threading.Event() for _ in order]

    def counts(unit):
        assert come[unit].wait(30)
        return data.counts(unit)

    def steps_of(data, epoch):
        steps = epoch_steps(data, settings, loss, epoch=epoch, rank=0, world_size=1)
        return ((names_of(step), step.ends_epoch, step.num_steps) for step in steps)

    late = replace(data, counts=counts, order=order)
    for unit in order[:6]:  # five units of the first buffer and one of the next
        come[unit].set()
    found = steps_of(late, 0)
    begun = [next(found) for _ in range(12)]
    assert not come[order[6]].is_set()
    for event in come:
        event.set()
    there = replace(data, order=order)
    for epoch in range(2):
        steps = list(steps_of(there, epoch))
        assert steps == [*begun, *found] if epoch == 0 else list(steps_of(late, epoch))
        assert [ends for _, ends, _ in steps] == [False] * 129 + [True]
    assert {document // 20 for names, _, _ in begun for document, _ in names} == set(order[:5])


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    buffer=st.integers(1, 80),
    skip=st.integers(0, 200),
)
def test_num_steps_is_exact_after_first_epoch(counts, buffer, skip):
    data, _ = windows_of([np.full(count, 15) for count in counts])
    settings, loss = TrainSettings(batch_size=3, shuffle_buffer=buffer, epochs=3), Loss("binary")
    steps = [list(epoch_steps(data, settings, loss, epoch=n, rank=0, world_size=1)) for n in range(3)]
    exact = sum(map(len, steps))
    assert steps[0][-1].num_steps == exact
    assert {step.num_steps for epoch in steps[1:] for step in epoch} == {exact}
    rest = epoch_steps(data, settings, loss, epoch=0, rank=0, world_size=1, skip=skip)
    assert [step.num_steps for step in rest] == [step.num_steps for step in steps[0][skip:]]


def test_ranks_get_similar_token_counts():
    rng = np.random.default_rng(0)
    data, _ = windows_of([rng.integers(1, 20, 400)])
    settings, loss = TrainSettings(batch_size=40), Loss("binary")
    ranks = [list(epoch_steps(data, settings, loss, epoch=0, rank=rank, world_size=4)) for rank in range(4)]
    for together in zip(*ranks, strict=True):
        tokens = [step.data.length_W[step.index_W].sum() for step in together]
        assert max(tokens) < 1.15 * min(tokens)


def tiny_template():
    return Template((2,), (3,))
