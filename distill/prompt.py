"""What a model understands: a closed grammar of prompt parts, or free text.

A student folder carries one of these as data (``student.json``, field ``prompt``), so the service can refuse an
unknown word with a 422 and the playground can draw its chips without knowing any model. Reading half of ``distill``:
pydantic only.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict


class PromptError(ValueError):
    """A prompt that the grammar does not hold. The message says what came, where, and what was expected there."""


class Part(BaseModel):
    """One slot of the sentence: ``prefix`` followed by one of ``choices``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    choices: tuple[str, ...]
    prefix: str = " "
    optional: bool = False


class Exclusion(BaseModel):
    """Choices that do not go together: refused when *every* named part has one of the choices listed for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    when: dict[str, tuple[str, ...]]
    reason: str


class Grammar(BaseModel):
    """An ordered list of parts. ``parse`` and ``format`` are inverse on canonical sentences."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: tuple[Part, ...]
    exclusions: tuple[Exclusion, ...] = ()
    aliases: dict[str, str] = {}
    """Words that mean another word: {"an": "a"}."""

    def parse(self, text: str) -> dict[str, str]:
        """Split a sentence into ``{part name: choice}``; absent optional parts are left out.

        Letter case, repeated spaces, a space before a comma and one final full stop do not matter.

        Raises:
            PromptError: the sentence does not fit; the message names the place and the words expected there.
        """
        rest = self._normalise(text)
        done = ""
        values: dict[str, str] = {}
        expected: list[str] = []  # what could have stood at the place where we are
        for part in self.parts:
            prefix = part.prefix if done else part.prefix.lstrip()
            choice = next((c for c in sorted(part.choices, key=len, reverse=True) if _starts(rest, prefix + c)), None)
            if choice is None:
                expected += [f"{prefix.lstrip()}{c}" for c in part.choices]
                if not part.optional:
                    raise PromptError(_complaint(done, rest, expected))
                continue
            values[part.name] = choice
            done += prefix + choice
            rest = rest[len(prefix) + len(choice) :]
            expected = []
        if rest:
            raise PromptError(_complaint(done, rest, [*expected, "the end"]))
        for exclusion in self.exclusions:
            if all(values.get(name) in choices for name, choices in exclusion.when.items()):
                raise PromptError(f"{text.strip()!r} cannot be drawn: {exclusion.reason}.")
        return values

    def format(self, values: dict[str, str]) -> str:
        """The canonical sentence of ``values``. Raises ``KeyError`` when a part that must be there is missing."""
        sentence = ""
        for part in self.parts:
            if part.name not in values and part.optional:
                continue
            sentence += (part.prefix if sentence else part.prefix.lstrip()) + values[part.name]
        return sentence

    def _normalise(self, text: str) -> str:
        words = [self.aliases.get(word, word) for word in text.lower().split()]
        return re.sub(r"\s+,", ",", " ".join(words)).removesuffix(".").rstrip()

    def canonical(self, text: str) -> str:
        """``text`` as the model was taught to read it. Raises ``PromptError``."""
        return self.format(self.parse(text))


class Prompt(BaseModel):
    """What to write in the prompt field of a request to this model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["grammar", "free"]
    help: str
    examples: tuple[str, ...]
    grammar: Grammar | None = None

    def canonical(self, text: str) -> str:
        """The prompt that the model is given for what a person wrote. Raises ``PromptError``."""
        if self.kind == "free" or self.grammar is None:
            if not text.strip():
                raise PromptError("the prompt is empty; describe what should move, for example: " + self.examples[0])
            return " ".join(text.split())
        return self.grammar.canonical(text)


def _starts(rest: str, phrase: str) -> bool:
    """Whether ``rest`` begins with ``phrase`` and the last word of ``phrase`` ends there."""
    return rest.startswith(phrase) and (len(rest) == len(phrase) or not rest[len(phrase)].isalnum())


def _complaint(done: str, rest: str, expected: list[str]) -> str:
    got = rest.strip()
    got = f"{' '.join(got.split()[:4])!r}" if got else "nothing"
    place = f"after {done!r}" if done else "at the start"
    return f"{place} came {got}; expected one of: {' | '.join(expected)}"
