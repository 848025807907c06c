"""Several requests at once: a step gives each of them its next token, and reads what they share only once."""

from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from braidsdk.context import Context
from braidsdk.engine import Engine
from braidsdk.errors import InputError, PoolFullError
from braidsdk.graphs import MOST_ROWS
from braidsdk.sampling import SamplingOptions
from braidsdk.types import Answer

if TYPE_CHECKING:
    from braidsdk.stream import Stream


def ask_many(engine: Engine, requests: Sequence[tuple[Context, str]], options: SamplingOptions) -> list[Answer]:
    """`Braid.ask_many`."""
    engine.check_open()
    for request in requests:
        if not isinstance(request, tuple | list) or len(request) != 2 or not isinstance(request[0], Context):
            raise InputError("ask_many takes pairs of a context and a question, [(context, 'What is ...?'), ...].")
        if not request[0].belongs_to(engine):
            raise InputError("ask_many takes contexts of this Braid; one was composed by another.")
    for context, question in requests:  # all are checked before any is computed
        context.open_stream(question, options)
    answers: dict[int, Answer] = {}
    waiting = deque(range(len(requests)))
    running: dict[int, Stream] = {}
    with engine.calls:
        with engine.working():
            decoder = engine.decoder()
        try:
            while waiting or running:
                while waiting and len(running) < MOST_ROWS:
                    context, question = requests[waiting[0]]
                    stream = context.open_stream(question, options, started=perf_counter(), decoder=decoder)
                    try:
                        stream.step()
                    except PoolFullError:
                        if not running:
                            raise
                        break  # one that ends makes room
                    running[waiting.popleft()] = stream
                for index, stream in list(running.items()):
                    if stream.step() is None:
                        answers[index] = running.pop(index).answer
        finally:
            for stream in running.values():
                stream.close()
    return [answers[index] for index in range(len(requests))]
