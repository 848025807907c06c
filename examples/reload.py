"""Compute in one process, answer in another: the second one finds every entry in the store."""

import subprocess
import sys

from braidsdk import Braid

NAMESPACE = "reload"


def ingest() -> None:
    """What a nightly job would do."""
    with Braid("braid-tiny", namespace=NAMESPACE) as braid:
        rules = braid.register_system("You answer questions from the documents.", name="rules")
        braid.register("The capital of Aistonia is Flubarg.", name="aistonia", anchor=rules)
        braid.register("The capital of Thessily is Troick.", name="thessily", anchor=rules)


def answer() -> None:
    """What a service would do, given the names that its retriever found."""
    with Braid("braid-tiny", namespace=NAMESPACE) as braid:
        context = braid.compose(["rules", "thessily", "aistonia"])
        reply = context.ask("What is the capital of Thessily?")
        assert reply.usage.cached_tokens == len(context.input_ids)
        print(f"{reply.text} ({reply.usage.cached_tokens} tokens reloaded, {reply.usage.computed_tokens} computed)")


if __name__ == "__main__":
    if sys.argv[1:] == ["answer"]:
        answer()
    else:
        ingest()
        subprocess.run([sys.executable, __file__, "answer"], check=True)
