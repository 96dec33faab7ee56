"""The grammar: what it reads, and what it says about what it does not."""

import pytest

from distill.data.shapes import GRAMMAR
from distill.prompt import Prompt, PromptError


@pytest.mark.parametrize(
    "text",
    [
        "a red circle moves right quickly, static camera",
        "a blue star spins clockwise",
        "a yellow triangle spins slowly, camera zooms out, and a ring enters",
        "a white ring wanders",
    ],
)
def test_canonical_sentences_survive_parse_and_format(text):
    assert GRAMMAR.format(GRAMMAR.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "  A Red  circle moves RIGHT quickly , static camera. ",
        "a red circle moves right quickly, static camera.",
        "an red circle moves right quickly, static camera",
    ],
)
def test_case_spaces_and_a_full_stop_do_not_matter(text):
    assert GRAMMAR.canonical(text) == "a red circle moves right quickly, static camera"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "at the start came nothing"),
        ("a pink circle moves right", "came 'a pink circle moves'"),
        ("a pink circle moves right", "a red | a green"),
        ("a red circle moves right fast", "after 'a red circle moves right' came 'fast'; expected one of: quickly |"),
        ("a red circle moves", "after 'a red circle' came 'moves'; expected one of: moves left"),
        ("a red circle moves right quickly static camera", "expected one of: , static camera"),
        ("a red circle moves right, and a cat enters", "and a circle enters"),
        ("a red circle moves right, static camera tomorrow", "came 'tomorrow'"),
        ("a red circle moves rightwards", "came 'moves rightwards'"),
        ("a red ring spins", "looks the same however it is turned"),
    ],
)
def test_the_error_says_what_came_where_and_what_was_expected(text, says):
    with pytest.raises(PromptError) as caught:
        GRAMMAR.parse(text)
    assert says in str(caught.value)


def test_free_prompts_are_only_asked_to_say_something():
    prompt = Prompt(kind="free", help="anything", examples=("a cat yawns",))
    assert prompt.canonical("  a dog\n runs ") == "a dog runs"
    with pytest.raises(PromptError, match="a cat yawns"):
        prompt.canonical("   ")
