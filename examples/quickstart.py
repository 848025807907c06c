"""Register a system prompt and three documents, compose them, ask.

Run it twice: the second run computes no document. The store is the folder in BRAID_STORE, or your user data folder.
"""

from braidsdk import Braid

DOCUMENTS = {
    "aistonia": "The capital of Aistonia is Flubarg.",
    "thessily": "The capital of Thessily is Troick.",
    "belmora": "The capital of Belmora is Plonk.",
}

with Braid("braid-tiny", namespace="quickstart") as braid:
    rules = braid.register_system("You answer questions from the documents.")
    docs = braid.register_many(list(DOCUMENTS.values()), names=list(DOCUMENTS), anchor=rules)

    # Any subset, in any order: the entries are the same ones.
    context = braid.compose([rules, docs[2], docs[0]])
    print(context.explain())

    answer = context.ask("What is the capital of Aistonia?")
    print(answer.text)
    print(f"{answer.usage.cached_tokens} tokens from the cache, {answer.usage.computed_tokens} computed")

    for piece in context.stream("What is the capital of Belmora?"):
        print(piece, end="", flush=True)
    print()
