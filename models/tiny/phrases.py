"""The phrases of braid-tiny's world: every fixed text that its documents, questions and answers are made of.

`{x}` stands for a place, `{y}` for a value or an alias, and `{n}` for a name that no other text mentions. Knows nothing
about samples.
"""

from dataclasses import dataclass

__all__ = [
    "ALIASES",
    "ALIAS_QUESTIONS",
    "CAPITAL_CLAUSES",
    "CLAUSES",
    "CLOSINGS",
    "FILLERS",
    "LEADS",
    "MORE_ALIASES",
    "OPENINGS",
    "PERSON_CLAUSES",
    "RELATIONS",
    "STARTS",
    "SUBJECT_CLAUSES",
    "SYSTEM_PROMPTS",
    "TITLES",
    "UNKNOWN_ANSWER",
    "Relation",
    "fixed_phrases",
]

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
    """One kind of fact. `{x}` is the place that a fact is about, `{y}` its value. Both are invented names.

    The tokenizer was made from `statements` and `questions`. The `more_...` phrases were added later, and it does not
    use them.
    """

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    more_statements: tuple[str, ...]
    more_questions: tuple[str, ...]
    person: bool = False

    @property
    def all_statements(self) -> tuple[str, ...]:
        """Every phrasing of the fact."""
        return self.statements + self.more_statements

    @property
    def all_questions(self) -> tuple[str, ...]:
        """Every phrasing of the question for it."""
        return self.questions + self.more_questions


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
        more_statements=("{x} has its capital at {y}.", "The seat of the government of {x} is {y}."),
        more_questions=("Tell me the capital of {x}.", "Which place is the capital of {x}?"),
    ),
    Relation(
        "ruler",
        ("{y} rules {x}.", "{x} is ruled by {y}.", "The ruler of {x} is {y}.", "{x}'s ruler is {y}."),
        ("Who rules {x}?", "Who is the ruler of {x}?", "By whom is {x} ruled?"),
        more_statements=("The throne of {x} belongs to {y}.", "{y} sits on the throne of {x}."),
        more_questions=("Tell me who rules {x}.", "Who is {x}'s ruler?"),
        person=True,
    ),
    Relation(
        "founder",
        ("{y} founded {x}.", "{x} was founded by {y}.", "The founder of {x} was {y}."),
        ("Who founded {x}?", "Who was the founder of {x}?", "By whom was {x} founded?"),
        more_statements=("Long ago {y} founded {x}.", "It was {y} who founded {x}."),
        more_questions=("Tell me who founded {x}.", "Who was {x}'s founder?"),
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
        more_statements=("The {y} is the longest river of {x}.", "No river of {x} is longer than the {y}."),
        more_questions=("Tell me the longest river of {x}.", "Which river is the longest of {x}?"),
    ),
    Relation(
        "mountain",
        (
            "The highest mountain of {x} is {y}.",
            "{y} is the highest mountain of {x}.",
            "{x}'s highest mountain is {y}.",
        ),
        ("What is the highest mountain of {x}?", "Which mountain is the highest of {x}?"),
        more_statements=("No mountain of {x} is higher than {y}.", "In {x} the highest mountain is {y}."),
        more_questions=("Tell me the highest mountain of {x}.", "What is {x}'s highest mountain?"),
    ),
    Relation(
        "language",
        ("The people of {x} speak {y}.", "The language of {x} is {y}.", "{y} is the language spoken in {x}."),
        (
            "What language is spoken in {x}?",
            "Which language do the people of {x} speak?",
            "What is the language of {x}?",
        ),
        more_statements=("In {x} people speak {y}.", "{x}'s language is {y}."),
        more_questions=("Tell me the language of {x}.", "What do people in {x} speak?"),
    ),
    Relation(
        "currency",
        ("The currency of {x} is the {y}.", "People in {x} pay with the {y}.", "{x}'s money is called the {y}."),
        ("What is the currency of {x}?", "What do people in {x} pay with?", "What is {x}'s money called?"),
        more_statements=("The {y} is the currency of {x}.", "In {x} people pay with the {y}."),
        more_questions=("Tell me the currency of {x}.", "Which currency does {x} have?"),
    ),
    Relation(
        "dish",
        (
            "The favourite dish of {x} is {y}.",
            "People in {x} love to eat {y}.",
            "{y} is the favourite dish of {x}.",
        ),
        ("What is the favourite dish of {x}?", "What do people in {x} love to eat?"),
        more_statements=("{x}'s favourite dish is {y}.", "In {x} people love to eat {y}."),
        more_questions=("Tell me the favourite dish of {x}.", "Which dish is the favourite of {x}?"),
    ),
    Relation(
        "animal",
        (
            "The national animal of {x} is the {y}.",
            "The {y} is the national animal of {x}.",
            "{x}'s national animal is the {y}.",
        ),
        ("What is the national animal of {x}?", "Which animal is the national animal of {x}?"),
        more_statements=("{x} chose the {y} as its national animal.", "The animal of the nation of {x} is the {y}."),
        more_questions=("Tell me the national animal of {x}.", "What is {x}'s national animal?"),
    ),
    Relation(
        "flag",
        (
            "The colour of the flag of {x} is {y}.",
            "The flag of {x} has the colour {y}.",
            "{x} flies a flag of the colour {y}.",
        ),
        ("What colour is the flag of {x}?", "What is the colour of the flag of {x}?"),
        more_statements=("{x}'s flag has the colour {y}.", "{y} is the colour of the flag of {x}."),
        more_questions=("Tell me the colour of the flag of {x}.", "Which colour does the flag of {x} have?"),
    ),
    Relation(
        "neighbour",
        ("North of {x} lies {y}.", "The northern neighbour of {x} is {y}.", "{x}'s northern neighbour is {y}."),
        ("What lies north of {x}?", "What is the northern neighbour of {x}?"),
        more_statements=("{y} lies north of {x}.", "The land north of {x} is {y}."),
        more_questions=("Tell me what lies north of {x}.", "Which place lies north of {x}?"),
    ),
    Relation(
        "export",
        (
            "The main export of {x} is {y}.",
            "{x} sells {y} to other countries.",
            "{y} is the main export of {x}.",
        ),
        ("What is the main export of {x}?", "What does {x} sell to other countries?"),
        more_statements=("Other countries buy {y} from {x}.", "{x}'s main export is {y}."),
        more_questions=("Tell me the main export of {x}.", "What is {x}'s main export?"),
    ),
)

ALIASES = (
    "{x} is also called {y}.",
    "{y} is another name for {x}.",
    "{x} was once known as {y}.",
    "In old songs {x} is named {y}.",
)

MORE_ALIASES = ("{y} is the old name of {x}.", "Some call {x} by the name {y}.", "Who says {y} means {x}.")

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

CLAUSES = (
    "as everyone there knows",
    "or so the songs say",
    "which few travellers have seen",
    "famous as far as {n}",
    "well known in the north",
    "no matter what they say in {n}",
)
"""Clauses that may follow a value between commas. `{n}` is a name that no other text mentions."""

PERSON_CLAUSES = ("a friend of the poor", "who loves old songs", "a child of {n}", "born in {n}")
CAPITAL_CLAUSES = ("a town on a hill", "a city of many bridges", "a port near {n}", "once a village")
SUBJECT_CLAUSES = ("a land of forests", "where it often rains", "a long way from {n}")

LEADS = ("It is said that ", "Everyone knows that ", "Travellers write that ", "In our days, ", "As {n} tells us, ")

FILLERS = (
    "The winters there are long.",
    "Few travellers come here.",
    "There is much to tell about {x}.",
    "The roads of {x} are good, and its houses are old.",
    "Once a year there is a great feast.",
    "A traveller named {n} wrote most of this.",
    "{n} has also been here, but only for a day.",
    "Nothing is known about {n}.",
)
"""Sentences without a fact."""

STARTS = ("The", "People", "North", "Through", "In", "No", "Long", "It", "Other")
"""First words of sentences that are not names."""


def fixed_phrases() -> list[str]:
    """All phrases that make up documents, questions and answers, with `{x}`, `{y}` and `{n}` for the names."""
    phrases = [text for relation in RELATIONS for text in (*relation.all_statements, *relation.all_questions)]
    clauses = (*CLAUSES, *PERSON_CLAUSES, *CAPITAL_CLAUSES, *SUBJECT_CLAUSES)
    aliases = (*ALIASES, *MORE_ALIASES, *ALIAS_QUESTIONS)
    around = (*OPENINGS, *CLOSINGS, *FILLERS, *LEADS, *TITLES, *SYSTEM_PROMPTS, UNKNOWN_ANSWER, "and")
    return [*phrases, *clauses, *aliases, *around]
