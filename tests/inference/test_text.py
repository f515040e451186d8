import pytest

from raymill.inference.text import TextStream


class Pieces:
    """An id is an index into a list of texts."""

    def __init__(self, pieces, rest=""):
        self.pieces, self.rest = pieces, rest

    def push(self, token):
        return self.pieces[token]

    def finish(self):
        return self.rest


def run(pieces, stop, rest=""):
    stream = TextStream(Pieces(pieces, rest), stop)
    shown = [stream.push(index) for index in range(len(pieces))]
    return [*shown, stream.finish()], stream.stopped


def test_without_stop_strings_text_passes_at_once():
    assert run(["ab", "", "c"], []) == (["ab", "", "c", ""], False)


def test_nothing_of_a_stop_string_is_ever_shown():
    assert run(["one E", "N", "D two"], ["END"]) == (["one ", "", "", ""], True)


def test_held_text_comes_out_when_it_was_no_stop_after_all():
    assert run(["one E", "N", "Dear"], ["ENDS"]) == (["one ", "", "ENDear", ""], False)
    assert run(["one E", "N"], ["END"]) == (["one ", "", "EN"], False)


def test_the_earliest_of_several_stops_wins():
    assert run(["a xx b yy"], ["yy", "xx"]) == (["a ", ""], True)


def test_a_stop_that_overlaps_itself_is_found():
    assert run(["aa", "ab"], ["aab"]) == (["", "a", ""], True)


def test_the_bytes_left_in_the_decoder_count():
    assert run(["a"], ["Z"], rest="Z") == (["a", ""], True)
    assert run(["a"], ["Z"], rest="?") == (["a", "?"], False)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_any_cut_of_the_same_text_shows_the_same(size):
    text, stop = "the quick brown fox jumps over the lazy dog\n\nThe end", ["\n\nT", "lazy cat"]
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    shown, stopped = run(pieces, stop)
    assert ("".join(shown), stopped) == ("the quick brown fox jumps over the lazy dog", True)
