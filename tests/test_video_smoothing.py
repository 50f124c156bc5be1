"""From rows of outputs to answers: windows, votes, masks and merging, each against its definition in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.schema import from_json, to_json
from edgekit.tasks.video.smoothing import Smoother
from edgekit.tasks.video.spec import EventRule, Smoothing, VideoSpec
from tests.video_bundles import LABELS, spec

CLASS = st.integers(0, len(LABELS) - 1)
ROWS = st.lists(
    st.lists(st.floats(-20, 20, width=32), min_size=5, max_size=5), min_size=1, max_size=40
)  # fmt: skip


def answers(smoother: Smoother, rows: list[list[float]]) -> list[int]:
    return [smoother.answer(smoother.scores(np.array(row, np.float32))) for row in rows]


def best(classes: list[int]) -> list[list[float]]:
    """Rows in which these classes are best by far."""
    return [[9.0 if c == cls else 0.0 for c in range(len(LABELS))] for cls in classes]


def softmax(values: np.ndarray) -> np.ndarray:
    e = np.exp(values.astype(np.float64) - values.max())
    return e / e.sum()


@given(ROWS, st.integers(1, 15))
def test_a_window_is_the_softmax_of_the_mean_of_its_outputs(rows: list[list[float]], window: int) -> None:
    smoother = Smoother(spec(smoothing=Smoothing(window)))
    for i, row in enumerate(rows):
        got = smoother.scores(np.array(row, np.float32))
        mean = np.mean(np.array(rows[max(0, i - window + 1) : i + 1], np.float32), axis=0, dtype=np.float64)
        np.testing.assert_allclose(got, softmax(mean), atol=2e-6)
        assert got.dtype == np.float32


@given(st.lists(CLASS, min_size=1, max_size=60))
def test_votes_let_a_new_answer_in_when_the_two_before_agree(classes: list[int]) -> None:
    got = answers(Smoother(spec(background="", smoothing=Smoothing(votes=True))), best(classes))
    assert got[0] == classes[0]
    for i in range(1, len(got)):
        settled = i >= 2 and got[i - 1] == got[i - 2]
        assert got[i] == (classes[i] if settled else got[i - 1])
    changes = [i for i in range(1, len(got)) if got[i] != got[i - 1]]
    assert all(b - a >= 2 for a, b in itertools.pairwise(changes)), "an answer stays for two steps"


def test_before_the_first_frame_the_answer_was_background() -> None:
    assert answers(Smoother(spec(smoothing=Smoothing(votes=True))), best([2, 2, 3])) == [2, 2, 3]
    assert answers(Smoother(spec(smoothing=Smoothing(votes=True))), best([2, 3, 3])) == [2, 2, 3]


def test_masked_labels_leave_the_answer_before_and_merged_ones_count_as_another() -> None:
    smoothing = Smoothing(masked=("push",), merged={"shake": "wave"})
    assert answers(Smoother(spec(smoothing=smoothing)), best([2, 3, 2, 4, 2, 1])) == [0, 3, 3, 1, 1, 1]
    # without a background there is nothing before the first frame: the best that is allowed
    assert answers(Smoother(spec(background="", smoothing=smoothing)), [[0, 1, 9, 2, 8]]) == [1]
    grouped = Smoother(spec(smoothing=smoothing)).grouped(np.array([0.1, 0.2, 0.3, 0.1, 0.3], np.float32))
    np.testing.assert_allclose(grouped, [0.1, 0.5, 0.3, 0.1, 0.0], atol=1e-7)


@given(ROWS)
def test_the_published_demo_is_an_option(rows: list[list[float]]) -> None:
    """Its rules in the order in which it applies them: sum of 12 outputs, mask, merge, and the vote of two answers."""
    smoothing = Smoothing(window=12, votes=True, masked=("turn", "shake"), merged={"wave": "nothing"})
    got = answers(Smoother(spec(smoothing=smoothing)), rows)
    said = [0, 0]
    for i in range(len(rows)):
        total = np.sum(np.array(rows[max(0, i - 11) : i + 1], np.float64), axis=0)
        if len(total) > 1 and np.diff(np.sort(total))[-1] < 1e-3:
            return  # a tie, which rounding may decide
        cls = int(total.argmax())
        cls = said[-1] if cls in (3, 4) else cls
        cls = 0 if cls == 1 else cls
        said.append(cls if cls == said[-1] or said[-1] == said[-2] else said[-1])
    assert got == said[2:]


def test_reset_forgets_the_window_and_the_votes() -> None:
    smoother = Smoother(spec(smoothing=Smoothing(5, votes=True)))
    answers(smoother, best([2, 2, 2]))
    smoother.reset()
    again = Smoother(spec(smoothing=Smoothing(5, votes=True)))
    rows = best([3, 4, 4, 1])
    assert answers(smoother, rows) == answers(again, rows)


def test_the_default_is_each_steps_own_best() -> None:
    rows = best([1, 3, 2, 2, 0, 4])
    assert answers(Smoother(spec()), rows) == [1, 3, 2, 2, 0, 4]
    scores = [0.1, 0.6, 0.1, 0.1, 0.1]
    np.testing.assert_array_equal(
        Smoother(spec(activation="none")).scores(np.array(scores, np.float32)), np.array(scores, np.float32)
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"labels": ()}, "at least one label"),
        ({"labels": ("a", "a")}, "differ"),
        ({"background": "waev"}, "'waev' is not one of the 5 labels"),
        ({"smoothing": Smoothing(masked=("?",))}, "not one of"),
        ({"smoothing": Smoothing(merged={"wave": "?"})}, "not one of"),
        ({"smoothing": Smoothing(merged={"wave": "push", "push": "turn"})}, "masked or merged itself"),
        ({"smoothing": Smoothing(masked=("nothing",))}, "background 'nothing' must not"),
        ({"smoothing": Smoothing(merged={"wave": ""})}, "'' is not one of"),
        ({"smoothing": Smoothing(masked=("",)), "background": ""}, "'' is not one of"),
        ({"smoothing": Smoothing(masked=LABELS), "background": ""}, "no label is left"),
        ({"dt_s": 0.2, "reset_after_s": 0.1}, "longer than dt_s"),
        ({"dt_s": 1e305}, "at most"),
        ({"dt_s": 0.0}, "above 0"),
        ({"reset_after_s": float("inf")}, "above 0"),
        ({"stepping": "jump"}, "plain, hold, resample, reset"),
        ({"fill": "none"}, "this, last, blend"),
        ({"frames": 0}, "between 1"),
        ({"top_k": 0}, "between 1"),
        ({"score_threshold": 2.0}, "between 0 and 1"),
    ],
)
def test_a_spec_refuses_what_cannot_be(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        spec(**fields)


def test_options_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="window"):
        Smoothing(0)
    with pytest.raises(ValueError, match="off <= on"):
        EventRule(on=0.3, off=0.5)
    with pytest.raises(ValueError, match="min_off"):
        EventRule(min_off=0)


def test_a_spec_goes_through_json() -> None:
    smoothing = Smoothing(12, True, ("turn",), {"wave": "nothing"})
    full = spec(dt_s=0.1, reset_after_s=0.5, stepping="hold", fill="blend", smoothing=smoothing)
    assert from_json(VideoSpec, to_json(full), "pipeline") == full
