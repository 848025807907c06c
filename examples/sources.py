"""Ask where an answer came from: which documents its tokens paid attention to."""

from braidsdk import Braid

DOCUMENTS = {
    "aistonia": "The capital of Aistonia is Flubarg.",
    "belmora": "The capital of Belmora is Plonk.",
    "falkirra": "The capital of Falkirra is Jassik.",
}

with Braid("braid-tiny", namespace="sources") as braid:
    rules = braid.register_system("You answer questions from the documents.")
    docs = braid.register_many(list(DOCUMENTS.values()), names=list(DOCUMENTS), anchor=rules)
    answer = braid.ask("What is the capital of Belmora?", chunks=[rules, *docs], sources=True)

print(answer.text)
for source in answer.sources or ():
    print(f"{source.share:.0%} {source.chunk.name}")
for token in answer.token_sources or ():
    print(f"{token.text!r:>8}", *(f"{share:.2f}" for share in token.shares))
