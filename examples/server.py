"""An HTTP endpoint that streams answers over chosen documents. Needs `pip install -e ".[examples]"`.

python examples/server.py
curl -N localhost:8000/ask -H 'Content-Type: application/json' \
    -d '{"question": "What is the capital of Aistonia?", "documents": ["aistonia"]}'
"""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel

from braidsdk import Braid
from braidsdk.errors import InputError

DOCUMENTS = {
    "aistonia": "The capital of Aistonia is Flubarg.",
    "belmora": "The capital of Belmora is Plonk.",
    "thessily": "The capital of Thessily is Troick.",
}


class Question(BaseModel):
    question: str
    documents: list[str]
    max_new_tokens: int = 256


def create_app(model: str = "braid-tiny") -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        """One model and one store for all requests."""
        with Braid(model, namespace="server") as braid:
            rules = braid.register_system("You answer questions from the documents.", name="rules")
            braid.register_many(list(DOCUMENTS.values()), names=list(DOCUMENTS), anchor=rules)
            app.state.braid = braid
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/ask")
    async def ask(asked: Question) -> StreamingResponse:
        # `astream` composes in a thread too: that tokenizes and reads the store, which would block the event loop here.
        answer = app.state.braid.astream(
            asked.question, chunks=["rules", *asked.documents], max_new_tokens=asked.max_new_tokens
        )
        # Wait for the first piece here: a bad request then ends in an error with a status, not in a broken stream.
        first = await anext(answer, "")

        async def pieces() -> AsyncIterator[str]:
            # A client that disconnects cancels this generator; closing the answer stops the model and frees its memory.
            async with aclosing(answer):
                yield first
                async for piece in answer:
                    yield piece

        return StreamingResponse(pieces(), media_type="text/plain; charset=utf-8")

    @app.exception_handler(InputError)
    async def refuse(_request: object, error: InputError) -> PlainTextResponse:
        return PlainTextResponse(str(error), status_code=400)

    return app


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(create_app())
