"""`braid chat`, scripted through stdin, and on a terminal."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

Cli = Callable[..., Any]
Child = Callable[..., subprocess.Popen[str]]

CAPITAL = "What is the capital of Aistonia?"


@pytest.fixture
def added(cli: Cli) -> Cli:
    cli("add", "--system", "--name", "rules", "rules.txt", "-q")
    cli("add", "--anchor", "rules", "aistonia.txt", "belmora.txt", "-q")
    return cli


def turns(cli: Cli, *lines: str, chunks: tuple[str, ...] = ("-c", "rules", "-c", "aistonia.txt")) -> list[Any]:
    out = cli("chat", "--json", "-n", "12", *chunks, stdin="\n".join(lines) + "\n").stdout
    return [json.loads(line) for line in out.splitlines()]


def test_answers_alone_are_on_stdout_and_each_turn_says_what_was_cached(added: Cli) -> None:
    ended = added("chat", "-c", "rules", "-c", "aistonia.txt", stdin=f"{CAPITAL}\n\n/quit\nNever asked.\n")
    assert ended.stdout == "Flubarg.\n"
    assert "Answers come from 2 chunks" in ended.stderr
    assert "28 tokens cached, 15 computed; first token" in ended.stderr


def test_the_history_stays_resident(added: Cli) -> None:
    first, second = turns(added, CAPITAL, "And of Belmora?")
    assert second["question"] == "And of Belmora?"
    added_tokens = second["usage"]["prompt_tokens"] - first["usage"]["prompt_tokens"]
    assert second["usage"]["cached_tokens"] > first["usage"]["prompt_tokens"]
    assert second["usage"]["computed_tokens"] < added_tokens


def test_clear_forgets_the_history(added: Cli) -> None:
    first, again = turns(added, CAPITAL, "/clear", CAPITAL)
    assert again["prompt_ids"] == first["prompt_ids"]


def test_chunks_are_added_and_dropped_within_the_conversation(added: Cli) -> None:
    asked = turns(
        added,
        "What is the capital of Belmora?",
        "/clear",
        "/add bel*",
        "What is the capital of Belmora?",
        "/clear",
        "/drop aist* belmora.txt",
        "Who?",
    )
    assert [turn["text"] == "Plonk." for turn in asked[:2]] == [False, True]
    sizes = [turn["usage"]["prompt_tokens"] for turn in asked]
    assert sizes[2] < sizes[0] < sizes[1]


def test_a_system_prompt_that_is_added_stands_first(added: Cli) -> None:
    ended = added("chat", "-c", "aistonia.txt", stdin="/add rules\n/chunks\n/explain\n")
    assert ended.stderr.count("rules\naistonia.txt") == 1
    assert "0 to compute" in ended.stderr


def test_a_question_of_several_lines(added: Cli) -> None:
    [asked] = turns(added, '"""', "What is the capital", "of Aistonia?", '"""')
    assert asked["question"] == "What is the capital\nof Aistonia?"


def test_slashes_in_a_question_make_no_command(added: Cli) -> None:
    [asked] = turns(added, "/etc/hosts, what is it?")
    assert asked["question"].startswith("/etc/hosts")


def test_what_fails_is_said_and_the_conversation_goes_on(added: Cli) -> None:
    lines = ["/ad x", "/add", "/add nobody", "/drop nobody", "word " * 9000, CAPITAL]
    ended = added("chat", "-c", "rules", "-c", "aistonia.txt", stdin="\n".join(lines), code=1)
    assert ended.stdout == "Flubarg.\n"
    assert "Did you mean '/add'" in ended.stderr
    assert "/add must be followed by names" in ended.stderr
    assert "No chunk 'nobody'" in ended.stderr
    assert "'nobody' is not a chunk of this conversation" in ended.stderr
    assert "window" in ended.stderr


def test_chunks_that_do_not_exist_end_it_before_it_begins(added: Cli) -> None:
    added("chat", "-c", "nobody", code=3)
    assert added("chat", "--help").stdout


def test_help_and_chunks_are_said_on_stderr_even_when_quiet(added: Cli) -> None:
    ended = added("chat", "-q", "-c", "rules", stdin="/help\n/chunks\n")
    assert ended.stdout == ""
    assert "/drop NAME" in ended.stderr
    assert ended.stderr.endswith("rules\n")


@pytest.mark.usefixtures("random_model")
def test_ctrl_c_stops_the_answer_and_not_the_conversation(added: Cli, child: Child) -> None:
    process = child("chat", "-n", "1900", "--repetition-penalty", "1.5", env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("Go on for ever.\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    answer, stderr = process.communicate("/chunks\n", timeout=60)
    assert process.returncode == 0, stderr
    assert len(answer) < 1500, "1,900 tokens of this model are longer: it was not stopped"
    assert "[stopped]" in stderr
    assert stderr.endswith("rules\naistonia.txt\nbelmora.txt\n")


def test_on_a_terminal_it_prompts_ctrl_c_only_hints_and_ctrl_d_leaves(added: Cli, terminal: Cli) -> None:
    chat = terminal("chat", "-q", "-c", "rules", "-c", "aistonia.txt")
    chat.answer("> ", f"{CAPITAL}\n")
    chat.interrupt("Flubarg.\n> ")
    chat.answer("/quit or Ctrl-D quits.\n> ", "\x04")
    assert chat.end()[0] == 0
