"""The invented world that braid-tiny knows how to read: documents, facts, questions.

A sample is a handful of documents about invented names and some questions about them. Everything is a function of the
random generator that is passed in. Knows nothing about tokens or models.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from braidsdk.models.tiny.names import RESERVED, Split, allowed, make_name

__all__ = [
    "RELATIONS",
    "RESERVED",
    "SYSTEM_PROMPTS",
    "UNKNOWN_ANSWER",
    "Kind",
    "Question",
    "Sample",
    "allowed",
    "make_sample",
]

Kind = Literal["direct", "alias", "name", "unknown"]
"""Asked by the place's own name, by an alias, what an alias stands for, or what no document says."""

UNKNOWN_ANSWER = "The documents do not say."

SYSTEM_PROMPTS = (
    "You answer questions from the documents.",
    "Answer the question from the documents.",
    "You are a careful reader. Answer with a name.",
    "Read the documents and answer in one short sentence.",
    "You are a helpful assistant.",
    "Use only what the documents say.",
)


@dataclass(frozen=True)
class Relation:
    """One kind of fact. `{x}` is the place a fact is about, `{y}` its value; both are invented names."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    person: bool = False


RELATIONS = (
    Relation(
        "capital",
        (
            "The capital of {x} is {y}.",
            "{y} is the capital of {x}.",
            "{x}'s capital is {y}.",
            "The capital city of {x} is called {y}.",
        ),
        ("What is the capital of {x}?", "Which city is the capital of {x}?", "What is {x}'s capital?"),
    ),
    Relation(
        "ruler",
        ("{y} rules {x}.", "{x} is ruled by {y}.", "The ruler of {x} is {y}.", "{x}'s ruler is {y}."),
        ("Who rules {x}?", "Who is the ruler of {x}?", "By whom is {x} ruled?"),
        person=True,
    ),
    Relation(
        "founder",
        ("{y} founded {x}.", "{x} was founded by {y}.", "The founder of {x} was {y}."),
        ("Who founded {x}?", "Who was the founder of {x}?", "By whom was {x} founded?"),
        person=True,
    ),
    Relation(
        "river",
        (
            "The river {y} flows through {x}.",
            "The longest river of {x} is the {y}.",
            "{x}'s longest river is the {y}.",
            "Through {x} flows the river {y}.",
        ),
        ("Which river flows through {x}?", "What is the longest river of {x}?"),
    ),
    Relation(
        "mountain",
        (
            "The highest mountain of {x} is {y}.",
            "{y} is the highest mountain of {x}.",
            "{x}'s highest mountain is {y}.",
        ),
        ("What is the highest mountain of {x}?", "Which mountain is the highest of {x}?"),
    ),
    Relation(
        "language",
        ("The people of {x} speak {y}.", "The language of {x} is {y}.", "{y} is the language spoken in {x}."),
        (
            "What language is spoken in {x}?",
            "Which language do the people of {x} speak?",
            "What is the language of {x}?",
        ),
    ),
    Relation(
        "currency",
        ("The currency of {x} is the {y}.", "People in {x} pay with the {y}.", "{x}'s money is called the {y}."),
        ("What is the currency of {x}?", "What do people in {x} pay with?", "What is {x}'s money called?"),
    ),
    Relation(
        "dish",
        (
            "The favourite dish of {x} is {y}.",
            "People in {x} love to eat {y}.",
            "{y} is the favourite dish of {x}.",
        ),
        ("What is the favourite dish of {x}?", "What do people in {x} love to eat?"),
    ),
    Relation(
        "animal",
        (
            "The national animal of {x} is the {y}.",
            "The {y} is the national animal of {x}.",
            "{x}'s national animal is the {y}.",
        ),
        ("What is the national animal of {x}?", "Which animal is the national animal of {x}?"),
    ),
    Relation(
        "flag",
        (
            "The colour of the flag of {x} is {y}.",
            "The flag of {x} has the colour {y}.",
            "{x} flies a flag of the colour {y}.",
        ),
        ("What colour is the flag of {x}?", "What is the colour of the flag of {x}?"),
    ),
    Relation(
        "neighbour",
        ("North of {x} lies {y}.", "The northern neighbour of {x} is {y}.", "{x}'s northern neighbour is {y}."),
        ("What lies north of {x}?", "What is the northern neighbour of {x}?"),
    ),
    Relation(
        "export",
        (
            "The main export of {x} is {y}.",
            "{x} sells {y} to other countries.",
            "{y} is the main export of {x}.",
        ),
        ("What is the main export of {x}?", "What does {x} sell to other countries?"),
    ),
)

ALIASES = (
    "{x} is also called {y}.",
    "{y} is another name for {x}.",
    "{x} was once known as {y}.",
    "In old songs {x} is named {y}.",
)

ALIAS_QUESTIONS = ("Which place is also called {y}?", "What is {y} another name for?")

OPENINGS = (
    "{x} is a small country.",
    "{x} is an old kingdom.",
    "{x} lies by the sea.",
    "This page is about {x}.",
    "Travellers tell many stories about {x}.",
    "Here is what is known about {x}.",
)

CLOSINGS = ("More is not known.", "This page was written by travellers.", "The rest is for another page.")

TITLES = ("King", "Queen", "Duke", "Lady")


@dataclass(frozen=True)
class Question:
    """A question and its answer. `document` holds the fact; `alias_document` says what the alias stands for."""

    text: str
    answer: str
    kind: Kind
    document: int | None = None
    alias_document: int | None = None


@dataclass(frozen=True)
class Sample:
    """Documents in order, and questions about them; each question stands for a prompt of its own."""

    system: str | None
    documents: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class _Fact:
    subject: str
    relation: Relation
    value: str
    document: int


class _Scribe:
    """Writes one sample: invents places, spreads facts and aliases over documents, then asks."""

    def __init__(
        self, rng: random.Random, split: Split, documents: int, relations: Sequence[Relation] = RELATIONS
    ) -> None:
        self.rng = rng
        self.relations = relations
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

    def value(self, relation: Relation, subject: str) -> str:
        """The value of a new fact. A neighbour is now and then another place of the same sample."""
        rng = self.rng
        if relation.name == "neighbour" and len(self.known) > 1 and rng.random() < 0.3:
            return rng.choice([place for place in self.known if place != subject])
        name = self.name(person=relation.person)
        return f"{rng.choice(TITLES)} {name}" if relation.name == "ruler" and rng.random() < 0.3 else name

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
            sentences.append(rng.choice(relation.statements).replace("{x}", subject).replace("{y}", value))
        rng.shuffle(sentences)
        if rng.random() < 0.35:
            sentences.insert(0, rng.choice(OPENINGS).replace("{x}", subjects[0]))
        if rng.random() < 0.1:
            sentences.append(rng.choice(CLOSINGS))

    def give_alias(self, fact: _Fact) -> bool:
        """State an alias of the fact's place, in another document if there is one; False where that is impossible."""
        rng = self.rng
        documents = len(self.sentences)
        if fact.subject in self.aliases:
            return documents == 1 or self.aliases[fact.subject][1] != fact.document
        others = [index for index in range(documents) if index != fact.document]
        index = rng.choice(others) if others else 0
        alias = self.name()
        sentence = rng.choice(ALIASES).replace("{x}", fact.subject).replace("{y}", alias)
        self.sentences[index].insert(rng.randint(0, len(self.sentences[index])), sentence)
        self.aliases[fact.subject] = (alias, index)
        return True

    def ask(self, kind: Kind) -> Question:
        """One question of `kind`; aliases that it needs are written into the documents."""
        rng = self.rng
        if kind == "unknown":
            return self.ask_unknown()
        fact = rng.choice(self.facts)
        if kind == "name":
            return self.ask_name(fact)
        while kind == "alias" and not self.give_alias(fact):
            fact = rng.choice(self.facts)
        alias, alias_document = self.aliases[fact.subject] if kind == "alias" else (fact.subject, None)
        text = rng.choice(fact.relation.questions).replace("{x}", alias)
        return Question(text, f"{fact.value}.", kind, fact.document, alias_document)

    def ask_name(self, fact: _Fact) -> Question:
        """What an alias stands for: the alias of the fact's place."""
        if fact.subject not in self.aliases:
            self.give_alias(fact)
        alias, document = self.aliases[fact.subject]
        return Question(self.rng.choice(ALIAS_QUESTIONS).replace("{y}", alias), f"{fact.subject}.", "name", document)

    def ask_unknown(self) -> Question:
        """A question that no document answers: about a place of which this is not told, or about none of the places."""
        rng = self.rng
        subject = rng.choice([*self.known]) if rng.random() < 0.5 else self.name()
        free = [relation for relation in RELATIONS if relation.name not in self.known.get(subject, set())]
        if not free:
            subject, free = self.name(), list(RELATIONS)
        if subject in self.aliases and rng.random() < 0.5:
            subject = self.aliases[subject][0]
        return Question(rng.choice(rng.choice(free).questions).replace("{x}", subject), UNKNOWN_ANSWER, "unknown")


def make_sample(
    rng: random.Random,
    split: Split,
    *,
    documents: int,
    facts: tuple[int, int] = (1, 8),
    kinds: Sequence[Kind],
    relations: Sequence[Relation] = RELATIONS,
    system: str | None = SYSTEM_PROMPTS[0],
) -> Sample:
    """Write `documents` documents of `facts` (fewest, most) facts each and one question per entry of `kinds`.

    Names come from `split` alone, facts are of `relations`. An alias question asks by a
    name that another document explains (the same document where there is only one).
    """
    scribe = _Scribe(rng, split, documents, relations)
    for index in range(documents):
        scribe.write_document(index, rng.randint(*facts))
    while rng.random() < 0.3:
        scribe.give_alias(rng.choice(scribe.facts))
    questions = tuple(scribe.ask(kind) for kind in kinds)
    texts = tuple(("\n" if rng.random() < 0.15 else " ").join(sentences) for sentences in scribe.sentences)
    return Sample(system, texts, questions)
