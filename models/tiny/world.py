"""The invented world that braid-tiny knows how to read: documents, facts, questions.

A sample is a handful of documents about invented names and some questions about them. Everything is a function of the
random generator that is passed in. Knows nothing about tokens or models.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from braidsdk.models.tiny.names import Split, make_name
from braidsdk.models.tiny.phrases import (
    ALIAS_QUESTIONS,
    ALIASES,
    CAPITAL_CLAUSES,
    CLAUSES,
    CLOSINGS,
    FILLERS,
    LEADS,
    MORE_ALIASES,
    OPENINGS,
    PERSON_CLAUSES,
    RELATIONS,
    STARTS,
    SUBJECT_CLAUSES,
    SYSTEM_PROMPTS,
    TITLES,
    UNKNOWN_ANSWER,
    Relation,
)

__all__ = ["Kind", "Question", "Sample", "make_sample"]

Kind = Literal["direct", "alias", "chain", "name", "unknown"]
"""Kinds of questions: by the place's own name, by an alias, by an alias of an alias, for the place of an alias, and
without an answer in the documents."""


@dataclass(frozen=True)
class Question:
    """A question and its answer. `document` holds the fact. `alias_documents` lead to it from the name in the
    question."""

    text: str
    answer: str
    kind: Kind
    document: int | None = None
    alias_documents: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Documents in order, and questions about them. Each question stands for a separate prompt.

    Without `header` the text begins with the first document: nothing stands before it, not even the user header.
    """

    system: str | None
    documents: tuple[str, ...]
    questions: tuple[Question, ...]
    header: bool = True


@dataclass(frozen=True)
class _Fact:
    subject: str
    relation: Relation
    value: str
    document: int


def _lower_start(sentence: str) -> str:
    """The sentence as it stands after other words. A name at its start keeps its capital."""
    first = sentence.split(" ", 1)[0]
    return sentence[0].lower() + sentence[1:] if first in STARTS else sentence


class _Scribe:
    """Writes one sample: invents places, spreads facts and aliases over documents, then asks."""

    def __init__(
        self,
        rng: random.Random,
        split: Split,
        documents: int,
        relations: Sequence[Relation] = RELATIONS,
        clauses: float = 0.0,
    ) -> None:
        self.rng = rng
        self.relations = relations
        self.clauses = clauses
        self.split: Split = split
        self.sentences: list[list[str]] = [[] for _ in range(documents)]
        self.facts: list[_Fact] = []
        self.known: dict[str, set[str]] = {}
        self.aliases: dict[str, tuple[str, int]] = {}
        self.used: set[str] = set()

    def name(self, *, person: bool = False) -> str:
        """A name that this sample has not used yet."""
        while True:
            name = make_name(self.rng, self.split, two_words=0.4 if person else 0.05)
            if name not in self.used:
                self.used.add(name)
                return name

    def fill(self, phrase: str) -> str:
        """The phrase with a new name for `{n}`."""
        return phrase.replace("{n}", self.name()) if "{n}" in phrase else phrase

    def value(self, relation: Relation, subject: str) -> str:
        """The value of a new fact. A neighbour is sometimes another place of the same sample."""
        rng = self.rng
        if relation.name == "neighbour" and len(self.known) > 1 and rng.random() < 0.3:
            return rng.choice([place for place in self.known if place != subject])
        name = self.name(person=relation.person)
        return f"{rng.choice(TITLES)} {name}" if relation.name == "ruler" and rng.random() < 0.3 else name

    def state(self, relation: Relation, subject: str, value: str) -> str:
        """One sentence that states the fact. `clauses` is the share of sentences that go on after the value."""
        rng = self.rng
        text = rng.choice(relation.all_statements)
        if self.clauses and rng.random() < self.clauses:
            more = PERSON_CLAUSES if relation.person else CAPITAL_CLAUSES if relation.name == "capital" else CLAUSES
            value = f"{value}, {self.fill(rng.choice((*more, *CLAUSES)))},"
        if self.clauses and rng.random() < self.clauses / 4 and "{x} " in text:
            subject = f"{subject}, {self.fill(rng.choice(SUBJECT_CLAUSES))},"
        text = text.replace("{x}", subject).replace("{y}", value).replace(",.", ".")
        if self.clauses and rng.random() < self.clauses / 4:
            text = self.fill(rng.choice(LEADS)) + _lower_start(text)
        return text

    def write_document(self, index: int, facts: int) -> None:
        """Fill document `index` with `facts` facts about one place or a few, some known from earlier documents."""
        rng = self.rng
        subjects: list[str] = []
        fewest = -(-facts // len(self.relations))
        for _ in range(min(facts, max(fewest, rng.choices((1, 2, 3), (6, 3, 1))[0]))):
            old = [place for place in self.known if place not in subjects]
            subjects.append(rng.choice(old) if old and rng.random() < 0.15 else self.name())
        sentences = self.sentences[index]
        for number in range(facts):
            subject = subjects[number % len(subjects)]
            known = self.known.setdefault(subject, set())
            free = [relation for relation in self.relations if relation.name not in known]
            if not free:
                continue
            relation = rng.choice(free)
            value = self.value(relation, subject)
            known.add(relation.name)
            self.facts.append(_Fact(subject, relation, value, index))
            sentences.append(self.state(relation, subject, value))
        rng.shuffle(sentences)
        if rng.random() < 0.35:
            sentences.insert(0, rng.choice(OPENINGS).replace("{x}", subjects[0]))
        if rng.random() < 0.1:
            sentences.append(rng.choice(CLOSINGS))
        if self.clauses and rng.random() < 0.2:
            filler = self.fill(rng.choice(FILLERS)).replace("{x}", subjects[0])
            sentences.insert(rng.randint(0, len(sentences)), filler)
        if self.clauses and len(sentences) > 1 and rng.random() < self.clauses:
            at = rng.randrange(len(sentences) - 1)
            first, second = sentences[at : at + 2]
            sentences[at : at + 2] = [f"{first[:-1]}, and {_lower_start(second)}"]

    def give_alias(self, name: str, away_from: Collection[int]) -> bool:
        """State an alias of `name` in a document that is not in `away_from`, or in any if there is no other.

        False if the name has an alias already, in one of `away_from` though others would do.
        """
        rng = self.rng
        others = [index for index in range(len(self.sentences)) if index not in away_from]
        if name in self.aliases:
            return not others or self.aliases[name][1] not in away_from
        index = rng.choice(others or range(len(self.sentences)))
        alias = self.name()
        sentence = rng.choice((*ALIASES, *MORE_ALIASES)).replace("{x}", name).replace("{y}", alias)
        self.sentences[index].insert(rng.randint(0, len(self.sentences[index])), sentence)
        self.aliases[name] = (alias, index)
        return True

    def rename(self, fact: _Fact, times: int) -> tuple[str, tuple[int, ...]] | None:
        """The name after `times` aliases of the fact's place, and the documents that lead to it. None if not possible.

        No two of these documents are the same, nor one of them the fact's, as far as there are enough.
        """
        name, away = fact.subject, [fact.document]
        for _ in range(times):
            if len(away) == len(self.sentences) > 1:
                away = away[-1:]
            if not self.give_alias(name, away):
                return None
            name, index = self.aliases[name]
            away.append(index)
        return name, tuple(away[len(away) - times :])

    def ask(self, kind: Kind) -> Question:
        """One question of `kind`. The aliases that it needs are written into the documents."""
        rng = self.rng
        if kind == "unknown":
            return self.ask_unknown()
        fact = rng.choice(self.facts)
        if kind == "name":
            return self.ask_name(fact)
        times = {"direct": 0, "alias": 1, "chain": 2}[kind]
        while (renamed := self.rename(fact, times)) is None:
            fact = rng.choice(self.facts)
        name, documents = renamed
        text = rng.choice(fact.relation.all_questions).replace("{x}", name)
        return Question(text, f"{fact.value}.", kind, fact.document, documents)

    def ask_name(self, fact: _Fact) -> Question:
        """A question for the place that an alias of the fact's place stands for."""
        if fact.subject not in self.aliases:
            self.give_alias(fact.subject, [fact.document])
        alias, document = self.aliases[fact.subject]
        return Question(self.rng.choice(ALIAS_QUESTIONS).replace("{y}", alias), f"{fact.subject}.", "name", document)

    def ask_unknown(self) -> Question:
        """A question that no document answers: about a fact that is not told of a place, or about an unknown place."""
        rng = self.rng
        subject = rng.choice([*self.known]) if self.known and rng.random() < 0.5 else self.name()
        free = [relation for relation in RELATIONS if relation.name not in self.known.get(subject, set())]
        if not free:
            subject, free = self.name(), list(RELATIONS)
        while subject in self.aliases and rng.random() < 0.5:
            subject = self.aliases[subject][0]
        return Question(rng.choice(rng.choice(free).all_questions).replace("{x}", subject), UNKNOWN_ANSWER, "unknown")


def make_sample(
    rng: random.Random,
    split: Split,
    *,
    documents: int,
    facts: Sequence[tuple[int, int]] = ((1, 8),),
    kinds: Sequence[Kind],
    relations: Sequence[Relation] = RELATIONS,
    clauses: float = 0.12,
    system: str | None = SYSTEM_PROMPTS[0],
) -> Sample:
    """Write `documents` documents and one question per entry of `kinds`.

    Names come from `split` alone, facts are of `relations`. Each document draws its own range (fewest, most) from
    `facts`. An alias question asks by a name that another document explains, a chain question by a name for which two
    other documents are needed, as far as there are so many. `clauses` is the share of facts with words after the
    value; 0 leaves out all other ornament too.
    """
    scribe = _Scribe(rng, split, documents, relations, clauses)
    for index in range(documents):
        scribe.write_document(index, rng.randint(*rng.choice(facts)))
    while documents and rng.random() < 0.3:
        scribe.rename(rng.choice(scribe.facts), 1 + (rng.random() < 0.3))
    questions = tuple(scribe.ask(kind) for kind in kinds)
    texts = tuple(("\n" if rng.random() < 0.25 else " ").join(sentences) for sentences in scribe.sentences)
    return Sample(system, texts, questions)
