import pytest

from raymill.errors import RequestError
from raymill.inference.scheduler import Progression, Scheduler


def scheduler(**changes):
    return Scheduler(
        **{"num_slots": 2, "max_queued": 2, "max_step_tokens": 8, "num_pages": 4, "max_seq_len": 64, **changes}
    )


def progression(name, length):
    return Progression(name, list(range(length)), length)


def shape(plan):
    return [
        (p.request_id, chunk.start, len(chunk.ids), bool(chunk.num_logits))
        for p, chunk in zip(plan.sequences, plan.chunks, strict=True)
    ]


def test_a_long_prompt_is_fed_in_chunks_and_only_the_last_wants_logits():
    s = scheduler()
    s.add(progression("a", 20))
    assert [shape(s.plan()) for _ in range(3)] == [[("a", 0, 8, False)], [("a", 8, 8, False)], [("a", 16, 4, True)]]


def test_completions_go_first_and_a_prompt_gets_what_is_left():
    s = scheduler()
    a = progression("a", 3)
    s.add(a)
    assert shape(s.plan()) == [("a", 0, 3, True)]
    a.ids.append(7)
    s.add(progression("b", 30))
    plan = s.plan()
    assert shape(plan) == [("a", 3, 1, True), ("b", 0, 7, False)]
    assert plan.chunks[0].ids == (7,)


def test_two_prompts_share_the_budget_oldest_first():
    s = scheduler()
    s.add(progression("a", 6))
    s.add(progression("b", 6))
    assert shape(s.plan()) == [("a", 0, 6, True), ("b", 0, 2, False)]


def test_a_prompt_of_one_id_left_over_is_fed_as_a_single_row():
    s = scheduler()
    s.add(progression("a", 9))
    s.plan()
    assert shape(s.plan()) == [("a", 8, 1, True)]


def test_the_queue_is_bounded_and_the_refusal_says_429():
    s = scheduler()
    for name in "abcd":
        s.add(progression(name, 3))
    with pytest.raises(RequestError) as refused:
        s.add(progression("e", 3))
    assert refused.value.status == 429
    assert [p.request_id for p in s.running] == ["a", "b"] and [p.request_id for p in s.queued] == ["c", "d"]


def test_a_freed_slot_goes_to_the_oldest_waiting_and_the_lowest_slot_is_used_first():
    s = scheduler()
    for name in "abcd":
        s.add(progression(name, 3))
    s.remove("a")
    assert {p.request_id: p.slot for p in s.running} == {"b": 1, "c": 0}
    s.remove("d")
    assert not s.queued
    s.remove("nobody")
    s.remove("b"), s.remove("c")
    s.add(progression("e", 3))
    assert s.running[0].slot == 0


def test_no_slots_to_wait_for_still_admits_into_a_free_slot():
    s = scheduler(max_queued=0)
    s.add(progression("a", 3)), s.add(progression("b", 3))
    with pytest.raises(RequestError):
        s.add(progression("c", 3))
