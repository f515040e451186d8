from itertools import pairwise

from raymill.inference.speculation import PromptLookup


def test_a_draft_is_what_followed_the_last_ids_the_last_time():
    ids = [1, 2, 3, 7, 7, 1, 2, 3, 8, 9, 5, 1, 2, 3]
    assert PromptLookup().draft(ids, 3) == (8, 9, 5)


def test_nothing_known_gives_no_draft():
    assert PromptLookup().draft([1, 2, 3, 4, 5], 7) == ()
    assert PromptLookup().draft([1, 2], 7) == ()
    assert PromptLookup().draft([1, 2, 3, 1, 2, 3], 0) == ()


def test_a_draft_that_reaches_the_present_goes_on_in_circles():
    assert PromptLookup().draft([9, 1, 2, 3, 4, 1, 2, 3], 7) == (4, 1, 2, 3, 4, 1, 2)
    assert PromptLookup().draft([5, 5, 5, 5], 3) == (5, 5, 5)


def test_ids_that_came_since_are_known_too():
    lookup, ids = PromptLookup(), [1, 2, 3, 4]
    assert lookup.draft(ids, 2) == ()
    ids += [5, 6, 1, 2, 3]
    assert lookup.draft(ids, 2) == (4, 5)


def drafts(kept, tokens=2000):
    """At which lengths a draft was tried, when `kept` of 7 ids are always right."""
    lookup, tried = PromptLookup(), []
    ids = [1, 2, 3] * 4
    while len(ids) < tokens:
        draft = lookup.draft(ids, 7)
        if draft:
            tried.append(len(ids))
        ids += [1 + len(ids) % 3] * 1
        if draft:
            lookup.learn(ids, 7, kept)
    return tried


def test_drafts_that_are_never_kept_are_tried_ever_more_rarely_but_tried_again():
    tried = drafts(kept=0, tokens=5000)
    assert len([at for at in tried if at < 512]) <= 8
    assert max(later - at for at, later in pairwise(tried)) == 513


def test_drafts_that_are_kept_go_on():
    assert len(drafts(kept=5, tokens=500)) == 500 - 12
    assert len(drafts(kept=1, tokens=500)) < 10, "one of seven does not pay for the rows"
