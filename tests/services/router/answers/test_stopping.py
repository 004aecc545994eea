"""Stop strings: found across pieces, held back no longer than needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blockserve.router.answers.stopping import StopMatcher


def shown(stops: list[str], pieces: list[str], *, include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include=include)
    text = "".join(matcher.push(piece) for piece in pieces)
    return text + matcher.finish(), matcher.matched


def test_a_stop_string_across_three_pieces_is_cut_out() -> None:
    assert shown(["STOP"], ["so far S", "TO", "P and more", "later"]) == ("so far ", "STOP")


def test_it_stays_when_asked_to() -> None:
    assert shown(["STOP"], ["so far S", "TO", "P and more"], include=True) == ("so far STOP", "STOP")


def test_what_cannot_become_a_stop_string_is_shown_at_once() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("one") == "one"
    assert matcher.push("two\n") == "two"
    assert matcher.push("three") == "\nthree"
    assert matcher.push("\n\nUse") == ""
    assert matcher.finish() == "\n\nUse"


def test_only_the_longest_possible_beginning_is_held_back() -> None:
    matcher = StopMatcher(["aab"])
    assert matcher.push("aaaa") == "aa"
    assert matcher.push("b") == ""
    assert matcher.matched == "aab"


def test_the_first_to_be_complete_wins() -> None:
    assert shown(["abcd", "bc"], ["xabcd"]) == ("xa", "bc")


def test_of_two_that_end_together_the_longer_wins() -> None:
    assert shown(["c", "abc"], ["xabc"]) == ("x", "abc")


def test_no_stop_strings_pass_everything() -> None:
    assert shown([], ["a", "", "b"]) == ("ab", None)


def brute_force(stops: list[str], text: str) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


few_letters = st.text("ab", max_size=12)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(few_letters, max_size=8))
def test_however_the_text_is_cut_the_answer_is_that_of_a_search(stops: list[str], pieces: list[str]) -> None:
    assert shown(stops, pieces) == brute_force(stops, "".join(pieces))


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.lists(few_letters, max_size=8)
)
def test_what_is_held_back_could_still_match(stops: list[str], pieces: list[str]) -> None:
    matcher, shown_so_far, pushed = StopMatcher(stops), "", ""
    for piece in pieces:
        shown_so_far += matcher.push(piece)
        pushed += piece
        if matcher.matched:
            return
        held = pushed[len(shown_so_far) :]
        assert pushed == shown_so_far + held
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
