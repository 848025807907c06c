"""A conversation over documents: past turns stay resident, and the documents can change between turns."""

from braidsdk import Braid

DOCUMENTS = {
    "aistonia": "The capital of Aistonia is Flubarg. The currency of Aistonia is the Quorra.",
    "belmora": "The longest river of Belmora is the Droune. The highest mountain of Belmora is Plamint.",
    "thessily": "The capital of Thessily is Troick. The favourite dish of Thessily is Tathulo.",
}
# The third document is added later. It stands before the conversation, so the turns so far are computed again.
TURNS = [
    (["aistonia", "belmora"], "Which city is the capital of Aistonia?"),
    (["aistonia", "belmora"], "Which river flows through Belmora?"),
    (["aistonia", "belmora"], "What is the currency of Aistonia?"),
    (["aistonia", "belmora", "thessily"], "What is the capital of Thessily?"),
    (["aistonia", "belmora", "thessily"], "What do people in Thessily love to eat?"),
]

with Braid("braid-tiny", namespace="chat") as braid:
    rules = braid.register_system("You answer questions from the documents.")
    braid.register_many(list(DOCUMENTS.values()), names=list(DOCUMENTS), anchor=rules)
    history: list[dict[str, str]] = []
    for documents, question in TURNS:
        print(f"> {question}")
        stream = braid.stream(question, chunks=[rules, *documents], history=history)
        for piece in stream:
            print(piece, end="", flush=True)
        usage = stream.answer.usage
        print(f"  ({usage.cached_tokens} tokens from the cache, {usage.computed_tokens} computed)")
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": stream.answer.text}]
