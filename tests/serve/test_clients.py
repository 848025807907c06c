"""Other clients, unchanged: LangChain's chat model for OpenAI, `llm`, and curl."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RULES = "You answer questions from the documents."
AISTONIA = "The capital of Aistonia is Flubarg."


def chat_model(served: Any, **options: Any) -> Any:
    langchain = pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    return langchain.ChatOpenAI(model="fake", base_url=f"{served.url}/v1", api_key="none", max_retries=0, **options)


def test_langchain_asks_streams_and_goes_on(served: Any) -> None:
    from langchain_core.messages import HumanMessage, SystemMessage

    model = chat_model(served, temperature=0, stream_usage=True)
    messages: list[Any] = [SystemMessage(RULES), HumanMessage("What?")]
    answer = model.invoke(messages)
    assert answer.content == "What? | "
    usage = answer.usage_metadata
    assert usage["input_token_details"]["cache_read"] > len(RULES)
    parts = list(model.stream(messages))
    assert "".join(part.content for part in parts) == answer.content
    assert len([part for part in parts if part.content]) > 3
    assert any(part.usage_metadata for part in parts)
    assert model.invoke([*messages, answer, HumanMessage("And?")]).content == "And? | "
    assert [each.content for each in model.batch(["One?", "Two?", "Three?"])] == ["One? | ", "Two? | ", "Three? | "]


def test_langchain_names_chunks_in_a_prompt(served: Any) -> None:
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    model = chat_model(served, extra_body={"braid": {"chunks": ["aistonia"]}})
    chain = ChatPromptTemplate.from_messages([("system", RULES), ("user", "{question}")]) | model | StrOutputParser()
    assert chain.invoke({"question": "What?"}) == f"What? | {AISTONIA}"


def test_llm_asks_through_its_configuration(served: Any, tmp_path: Path) -> None:
    pytest.importorskip("llm", reason="needs llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: fake\n  model_name: fake\n  api_base: {served.url}/v1\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    for options in (["--no-stream"], [], ["-s", RULES]):
        command = [str(Path(sys.executable).parent / "llm"), "-m", "fake", "--no-log", *options, "What?"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout.strip()) == (0, "What? |"), done.stderr


def test_curl_reads_a_stream(served: Any, ask: Callable[..., Any]) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    body = {"model": "fake", "stream": True, "messages": [{"role": "user", "content": "What?"}]}
    command = [curl, "-sN", f"{served.url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    done = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, text=True, timeout=60, check=True)
    *lines, last = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
    assert last == "[DONE]"
    text = "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines)
    assert text == ask("What?").json()["choices"][0]["message"]["content"]
