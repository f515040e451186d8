import random

import pytest

from raymill.errors import RequestError
from raymill.inference.kv_cache import PAGE_TOKENS, pages_for
from raymill.inference.scheduler import Progression, Scheduler
from raymill.inference.speculation import PromptLookup


def scheduler(**changes):
    return Scheduler(
        **{"num_slots": 2, "max_queued": 2, "max_step_tokens": 8, "num_pages": 4, "max_seq_len": 128, **changes}
    )


def progression(name, length, *, completion=8, **changes):
    return Progression(name, [ord(name[0]) + n for n in range(length)], length + completion, **changes)


def shape(plan):
    return [
        (p.request_id, chunk.start, len(chunk.ids), chunk.num_logits)
        for p, chunk in zip(plan.sequences, plan.chunks, strict=True)
    ]


def step(s, token=7):
    """One step of a model that always says the same; what was planned."""
    plan = s.plan()
    for sequence, chunk in zip(plan.sequences, plan.chunks, strict=True):
        if chunk.num_logits and chunk.start + len(chunk.ids) >= len(sequence.ids):
            sequence.ids.append(token)
        s.settle(sequence, chunk)
    return plan


def test_a_long_prompt_is_fed_in_chunks_and_only_the_last_wants_logits():
    s = scheduler()
    s.add(progression("a", 20))
    assert [shape(step(s)) for _ in range(3)] == [[("a", 0, 8, 0)], [("a", 8, 8, 0)], [("a", 16, 4, 1)]]


def test_completions_go_first_and_a_prompt_gets_what_is_left():
    s = scheduler()
    s.add(progression("b", 3))
    assert shape(step(s)) == [("b", 0, 3, 1)]
    s.add(progression("a", 30))
    plan = step(s)
    assert shape(plan) == [("b", 3, 1, 1), ("a", 0, 7, 0)]
    assert plan.chunks[0].ids == (7,)


def test_single_ids_come_first_whoever_is_older():
    s = scheduler()
    s.add(progression("old", 30)), s.add(progression("young", 1))
    assert shape(step(s)) == [("young", 0, 1, 1), ("old", 0, 7, 0)]


def test_two_prompts_share_the_budget_oldest_first():
    s = scheduler()
    s.add(progression("a", 6))
    s.add(progression("b", 6))
    assert shape(s.plan()) == [("a", 0, 6, 1), ("b", 0, 2, 0)]


def test_a_prompt_of_one_id_left_over_is_fed_as_a_single_row():
    s = scheduler()
    s.add(progression("a", 9))
    step(s)
    assert shape(s.plan()) == [("a", 8, 1, 1)]


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
    a, b, c, d = (progression(name, 3) for name in "abcd")
    [s.add(each) for each in (a, b, c, d)]
    s.remove(a)
    assert {p.request_id: p.slot for p in s.running} == {"b": 1, "c": 0}
    s.remove(d)
    assert not s.queued
    s.remove(b), s.remove(c)
    s.add(progression("e", 3))
    assert s.running[0].slot == 0


def test_no_slots_to_wait_for_still_admits_into_a_free_slot():
    s = scheduler(max_queued=0)
    s.add(progression("a", 3)), s.add(progression("b", 3))
    with pytest.raises(RequestError):
        s.add(progression("c", 3))


def test_a_request_that_can_never_fit_is_refused_at_once():
    s = scheduler(num_pages=1)
    s.add(progression("a", 24, completion=8))
    with pytest.raises(RequestError, match="KV cache holds 32") as refused:
        s.add(progression("b", 24, completion=9))
    assert refused.value.status == 400 and refused.value.field == "max_tokens"


def test_slots_and_pages_are_bounds_of_their_own():
    s = scheduler(num_slots=4, max_queued=9)  # 4 pages: all they have, and one more for each
    for name in "abcd":
        s.add(progression(name, 20, completion=40))
    assert [p.request_id for p in s.running] == ["a", "b"]
    s = scheduler(num_slots=4, max_queued=9)
    for name in "abcd":
        s.add(progression(name, 20))  # one page is all that each will ever need
    assert [p.request_id for p in s.running] == ["a", "b", "c", "d"]


def test_the_longest_cached_beginning_is_shared_and_the_last_id_is_always_computed():
    s = scheduler(num_slots=3, num_pages=12, max_step_tokens=100)
    first = progression("a", 64)
    s.add(first)
    step(s)
    second = progression("a", 64)
    s.add(second)
    assert shape(step(s))[-1] == ("a", 32, 32, 1)
    assert second.pages[0] == first.pages[0] and second.pages[1] != first.pages[1]
    longer = Progression("c", first.ids[:64] + [9] * 6, 80)
    s.remove(first)
    s.add(longer)
    assert shape(step(s))[-1] == ("c", 64, 6, 1), "pages of one that is done are found too"
    other_adapter = progression("a", 64, adapter=1)
    s.remove(second), s.add(other_adapter)
    assert shape(step(s))[-1] == ("a", 0, 64, 1)


def test_a_prompt_that_arrives_with_its_twin_waits_for_no_page_twice():
    s = scheduler(num_pages=12, max_step_tokens=33)
    s.add(progression("a", 100)), s.add(progression("a", 100))
    fed = [shape(step(s)) for _ in range(5)]
    assert sum(count for plan in fed for _, _, count, _ in plan) < 150


def test_completions_are_found_by_the_next_turn():
    s = scheduler(num_pages=12, max_step_tokens=100)
    first = progression("a", 30, completion=10)
    s.add(first)
    for token in range(200, 210):
        step(s, token)
    s.remove(first)
    s.add(Progression("next", [*first.ids, 5, 5], 60))
    assert shape(step(s)) == [("next", 32, 10, 1)]


def test_what_a_failed_step_wrote_is_not_found():
    s = scheduler(num_pages=12, max_step_tokens=40)
    first = progression("a", 70)
    s.add(first)
    step(s), step(s)  # the second lets others find the first page
    s.plan()
    s.remove(first, failed=True)
    s.add(progression("a", 70))
    assert shape(step(s)) == [("a", 0, 40, 0)]


def test_a_prompt_whose_logits_are_asked_for_is_computed_whole():
    s = scheduler(num_pages=12, max_step_tokens=50)
    first = progression("a", 70)
    s.add(first)
    step(s), step(s)
    s.remove(first)
    s.add(progression("a", 70, outputs_from=0))
    assert [shape(step(s)) for _ in range(2)] == [[("a", 0, 50, 50)], [("a", 50, 20, 20)]]


def test_the_least_recently_used_pages_go_first_and_their_ends_before_their_beginnings():
    s = scheduler(num_slots=1, num_pages=4, max_step_tokens=100)
    for name in "ab":
        sequence = progression(name, 64)
        s.add(sequence), step(s), s.remove(sequence)
    s.add(third := progression("c", 40))
    step(s), s.remove(third)  # takes two pages: both of a's
    for name, start in [("b", 32), ("a", 0)]:
        s.add(again := progression(name, 64))
        assert s.plan().chunks[0].start == start
        s.remove(again)


def test_when_pages_run_out_the_youngest_goes_back_to_the_head_of_the_queue():
    s = scheduler(num_slots=3, num_pages=6, max_step_tokens=100, max_queued=9)
    old, young, last = (progression(name, 30, completion=90) for name in "abc")
    [s.add(each) for each in (old, young, last)]
    while not s.preemptions:
        step(s)
    assert last.slot is None and s.queued[0] is last and not last.pages and last.computed_tokens == 0
    while young.slot is not None:
        step(s)
    assert [each.request_id for each in s.queued] == ["b", "c"]
    s.remove(old)
    assert s.running[0] is young
    assert step(s).chunks[0].start >= 32, "what is left of its pages is found again"


def test_a_draft_is_rows_of_its_own_and_wrong_ids_leave_nothing():
    s = scheduler(num_pages=4, max_step_tokens=40)
    sequence = Progression("a", [1, 2, 3, 4, 5, 6, 1, 2], 40, lookup=PromptLookup())
    s.add(sequence)
    step(s, 3)
    plan = s.plan()
    assert plan.chunks[0].ids == (3, 4, 5, 6, 1, 2, 3, 4) and plan.chunks[0].num_logits == 8
    sequence.ids += [4, 5, 9]  # two were right
    s.settle(sequence, plan.chunks[0])
    assert sequence.computed_tokens == 11
    assert s.plan().chunks[0] == type(plan.chunks[0])(0, 11, (9,), 1)


def test_no_draft_beyond_max_tokens_beside_a_prompt_or_with_many():
    def first_chunk(others=0, most=40, prompt=0):
        s = scheduler(num_slots=4, num_pages=8, max_step_tokens=40, max_queued=9)
        sequence = Progression("a", [1, 2, 3, 4, 5, 6, 1, 2], most, lookup=PromptLookup())
        s.add(sequence)
        [s.add(Progression(str(n), [n], 20)) for n in range(others)]
        step(s, 3)
        if prompt:
            s.add(progression("p", prompt))
        return next(c for p, c in zip(*vars(s.plan()).values(), strict=True) if p is sequence)

    assert len(first_chunk().ids) == 8
    assert len(first_chunk(most=12).ids) == 3
    assert len(first_chunk(others=1).ids) == 4
    assert len(first_chunk(others=2).ids) == 1
    assert len(first_chunk(prompt=9).ids) == 1


def test_a_text_to_embed_that_was_sent_back_gives_each_hidden_state_once():
    s = scheduler(num_pages=5, max_step_tokens=3, max_queued=9)
    old = progression("a", 31, completion=90)
    text = progression("b", 90, completion=0, outputs_from=0, wants_hidden=True)
    s.add(old), s.add(text)
    given = []
    while len(given) < 90:
        plan = step(s)
        given += [c.start + n for c in plan.chunks if c.wants_hidden for n in range(len(c.ids))]
        if len(old.ids) == old.max_ids and old.slot is not None:
            s.remove(old)
            s.max_step_tokens = 50
    assert s.preemptions == 1 and given == list(range(90))


class House:
    """A scheduler under random load, with a model that remembers in whose pages it wrote which ids."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.slots, self.pages = self.random.randint(1, 6), self.random.randint(5, 14)
        self.s = Scheduler(self.slots, 12, self.slots + self.random.randint(1, 60), self.pages, 5 * PAGE_TOKENS)
        self.written, self.outputs = {}, {}
        self.live, self.arrived, self.first_fed = [], [], []
        self.done = self.refused = 0

    def submit(self):
        start = self.random.choice([0, 0, 100, 200])
        length = self.random.randint(1, 4 * PAGE_TOKENS)
        ids = [start + n % 50 for n in range(length)]
        if self.random.random() < 0.3:
            ids[self.random.randrange(length)] = 999
        kind = self.random.random()
        sequence = Progression(
            str(len(self.arrived)),
            ids,
            length + (0 if kind < 0.1 else self.random.randint(1, PAGE_TOKENS)),
            adapter=self.random.choice([0, 0, 1]),
            outputs_from=0 if kind < 0.2 else None,
            wants_hidden=kind < 0.1,
            lookup=PromptLookup() if kind > 0.5 else None,
        )
        self.arrived.append(sequence)
        try:
            self.s.add(sequence)
            self.live.append(sequence)
        except RequestError as error:
            assert error.status == 429 and len(self.s.queued) >= 12
            self.refused += 1

    def step(self):
        plan = self.s.plan()
        assert self.live == [] or plan.chunks, "someone always gets on"
        sizes = [len(chunk.ids) for chunk in plan.chunks]
        assert sum(sizes) <= self.s.max_step_tokens
        assert sizes == sorted(sizes, key=lambda size: size > 1), "single ids first"
        for sequence, chunk in zip(plan.sequences, plan.chunks, strict=True):
            self.feed(sequence, chunk)
        self.check()
        failed = self.random.random() < 0.02
        for sequence, chunk in zip(plan.sequences, plan.chunks, strict=True):
            if self.random.random() < 0.01:
                self.remove(sequence)  # while the step runs
            elif failed:
                self.remove(sequence, failed=True)
            else:
                self.settle(sequence, chunk)

    def feed(self, sequence, chunk):
        """Writes as the step would, and reads what attention would."""
        table = self.s.table[chunk.slot]
        assert list(table[: len(sequence.pages)]) == sequence.pages and chunk.slot == sequence.slot
        shared = {p for other in self.s.running if other is not sequence for p in other.pages}
        context = tuple(sequence.ids[: chunk.start])
        for offset in range(len(chunk.ids)):
            position = chunk.start + offset
            page = table[position // PAGE_TOKENS]
            assert position // PAGE_TOKENS < len(sequence.pages) and page not in shared, (
                "a shared page is never written"
            )
            self.written[page, position % PAGE_TOKENS] = (sequence.adapter, (*context, *chunk.ids[: offset + 1]))
        for position in range(chunk.start):
            found = self.written[table[position // PAGE_TOKENS], position % PAGE_TOKENS]
            assert found == (sequence.adapter, tuple(sequence.ids[: position + 1])), "a stranger's keys"

    def settle(self, sequence, chunk):
        known = len(sequence.ids)
        if sequence.outputs_from is not None:
            end = chunk.start + len(chunk.ids)
            given = len(chunk.ids) * chunk.wants_hidden if sequence.wants_hidden else chunk.num_logits
            assert not given or end - given == self.outputs.get(sequence, 0), "every position's output comes once"
            self.outputs[sequence] = self.outputs.get(sequence, 0) + given
            assert end < known or self.outputs[sequence] == end
        if chunk.num_logits and chunk.start + len(chunk.ids) >= known and known < sequence.max_ids:
            draft = chunk.ids[known - chunk.start :]
            right = self.random.randint(0, len(draft))
            sequence.ids += [*draft[:right], self.random.choice([5, 6, 7])]
        self.s.settle(sequence, chunk)
        if len(sequence.ids) >= sequence.max_ids and chunk.start + len(chunk.ids) >= known:
            self.done += 1
            self.remove(sequence)

    def remove(self, sequence, failed=False):
        if sequence in self.live:
            self.live.remove(sequence)
            self.s.remove(sequence, failed=failed)

    def check(self):
        s, number = self.s, {id(each): n for n, each in enumerate(self.arrived)}
        order = [number[id(each)] for each in [*s.running, *s.queued]]
        assert order == sorted(order), "whoever runs is older than whoever waits"
        assert len(s.running) <= self.slots and len({each.slot for each in s.running}) == len(s.running)
        held = {}
        for each in s.running:
            assert len(each.pages) <= pages_for(each.max_ids)
            for page in each.pages:
                held[page] = held.get(page, 0) + 1
        assert s.pool.available == self.pages - len(held)
        for each in s.queued:
            assert not each.pages and each.slot is None


@pytest.mark.parametrize("seed", range(8))
def test_under_random_load_no_page_is_lost_or_shared_wrongly_and_everyone_ends(seed):
    house = House(seed)
    for _ in range(250):
        for _ in range(house.random.choice([0, 0, 1, 1, 2, 6])):
            house.submit()
        if house.live and house.random.random() < 0.1:
            house.remove(house.random.choice(house.live))
        house.step() if house.live else None
    for _ in range(20_000):
        if not house.live:
            break
        house.step()
    assert not house.live and not house.s.running and not house.s.queued
    assert house.s.pool.available == house.pages and house.done > 10
    assert len(house.arrived) > 200
