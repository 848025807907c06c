"""Chat templates and tokenizers of other families: prompts equal transformers', or the checkpoint is refused."""

import json
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from braidsdk.errors import UnsupportedModelError
from braidsdk.models import fingerprints
from braidsdk.prompt.history import SpokenTurns, Turn, conversation
from braidsdk.prompt.layout import LayoutWarning, PromptLayout
from braidsdk.prompt.text import normalise

# Tokenizers

CONTROL = [
    *("<unk>", "<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|im_start|>", "<|im_end|>", "<pad>"),
]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus() -> list[str]:
    """Sentences from which merges of a space and a word, and of marks and words, are learned."""
    rng = random.Random(0)
    words = ["First", "Which", "Oslo", "Answer", "Why", "fact", "one", "is", "of", "a", "the", "city", "in", "(see)"]
    words += ["'Tis", "user", "assistant", "system", "[INST]", "12"]
    return [" ".join(rng.choices(words, k=9)) + rng.choice(".?:") for _ in range(3000)]


def byte_level(*, regex: str | None) -> Tokenizer:
    """As Qwen2's and Llama 3's, or GPT-2's and SmolLM2's without a regex of its own."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    split = [pre_tokenizers.Split(Regex(regex), behavior="isolated")] if regex else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [*corpus(), *("\n\n".join(corpus()[:50]) for _ in range(20))]
    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    return tokenizer


def metaspace(*, legacy: bool) -> Tokenizer:
    """As Llama 2's and Mistral's: words begin with U+2581, and bytes stand for what the vocabulary lacks. A space
    stands before every text (legacy) or before the first."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    trained = Tokenizer(BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = BpeTrainer(vocab_size=520, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(corpus(), trainer)
    model = json.loads(trained.to_str())["model"]
    spec = json.loads(tokenizer.to_str())
    spec["model"] |= {"vocab": model["vocab"], "merges": model["merges"]}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "qwen2": lambda: byte_level(regex=QWEN2),
    "gpt2": lambda: byte_level(regex=None),
    "legacy": lambda: metaspace(legacy=True),
    "first": lambda: metaspace(legacy=False),
}

# Templates, each with the shape of a family's

CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
DEFAULT_SYSTEM = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a \
helpful assistant.<|im_end|>\\n' }}{% endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for m in turns %}{%- if m.role == 'user' %}{%- if loop.WHERE and system is defined %}
{{- '[INST] ' + system + '\\n\\n' + m.content + ' [/INST]' }}{%- else %}{{- '[INST] ' + m.content + ' [/INST]' }}
{%- endif %}{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"""
TINYLLAMA = """\
{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
COLONS = """\
{% for m in messages %}{{ m.role + ': ' + m.content + '\\n\\n' }}{% endfor %}\
{% if add_generation_prompt %}assistant:{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "qwen2.5": DEFAULT_SYSTEM + CHATML,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "mistral, system first": MISTRAL.replace("WHERE", "first"),
    "mistral, system last": MISTRAL.replace("WHERE", "last"),
    "tinyllama": TINYLLAMA,
    "colons": COLONS,
    "escapes": CHATML.replace("m.content", "m.content | e"),
    "upper": CHATML.replace("m.content", "m.content | upper"),
    "twice": CHATML.replace("m.content", "m.content + m.content"),
    "system last": "{% set messages = messages[::-1] %}" + CHATML,
    "by chance": "{{ range(90000) | random }}" + CHATML,
    "no system": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
}

EXACT, ANCHORED, NO_HISTORY, WARNS, REFUSED = "exact", "exact after a system prompt", "no history", "warns", "refused"
EXPECTED = {
    **dict.fromkeys(("chatml", "qwen2.5", "llama3", "tinyllama"), EXACT),
    **dict.fromkeys(("escapes", "upper", "twice", "system last", "no system", "by chance"), REFUSED),
    "llama2": ANCHORED,
    "mistral, system first": ANCHORED,
    "mistral, system last": NO_HISTORY,
    "colons": REFUSED,
    ("qwen2", "colons"): WARNS,
    ("gpt2", "colons"): WARNS,
}
"""What becomes of a template, with any tokenizer or with one."""

CASES = [
    (tokenizer, template, EXPECTED.get((tokenizer, template), EXPECTED.get(template)))
    for tokenizer in TOKENIZERS
    for template in TEMPLATES
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder of a tokenizer with a template."""
    made: dict[str, Tokenizer] = {}

    def folder(tokenizer: str, template: str) -> Path:
        made[tokenizer] = made.get(tokenizer) or TOKENIZERS[tokenizer]()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=made[tokenizer],
            bos_token="<|begin_of_text|>" if template == "llama3" else "<s>",
            eos_token="</s>",
            chat_template=TEMPLATES[template],
        )
        path = tmp_path_factory.mktemp("t")
        fast.save_pretrained(path)
        return path

    return folder


def theirs(tokenizer: PreTrainedTokenizerFast, *texts: str | None) -> tuple[int, ...]:
    """Ids by transformers of a system text, or None, and of turns."""
    system, *turns = texts
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(turns)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
    )
    return tuple(ids)


def ours(layout: PromptLayout, system: str | None, documents: Sequence[str], *turns: str) -> tuple[int, ...]:
    *past, question = turns
    head = layout.header_ids if system is None else layout.chunk_ids(0, normalise(system))
    ids = head + tuple(i for text in documents for i in layout.plain_ids(normalise(text)))
    pairs = [Turn(normalise(q), normalise(a)) for q, a in zip(past[::2], past[1::2], strict=True)]
    said = conversation(pairs, layout, SpokenTurns())
    ids += tuple(i for turn in said.turns for i in turn) + said.opening
    return ids + layout.question_ids(question, follows=bool(past))


def joined(documents: Sequence[str], question: str) -> str:
    return "".join(f"{normalise(text)}\n" for text in documents) + normalise(question)


DOCUMENTS = ["First fact: 12 is one.", "(see) Oslo", "'Tis so"]
PAST = ["Why?", "Oslo is.", "Which one?", "(No)"]


def opened(folder: Path, remembered: Path | None = None) -> PromptLayout:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The chat template shows today's date", LayoutWarning)
        return PromptLayout(folder, remembered=remembered)


def opened_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> PromptLayout:
    """The layout that is made of what an earlier one remembered."""
    monkeypatch.setattr(fingerprints, "SETTLED_NS", 0)
    file = folder.parent / f"{folder.name}.json"
    first = opened(folder, file)
    assert first.end_ids is not None, "as a Braid asks for them"
    first.remember()
    layout = opened(folder, file)
    assert layout._tokenizer.record.is_known
    assert (layout.fingerprint, layout.end_ids) == (first.fingerprint, first.end_ids)
    assert "_hf" not in vars(layout._tokenizer), "nothing was asked of transformers"
    return layout


@pytest.mark.parametrize("again", [False, True], ids=["", "opened again"])
@pytest.mark.parametrize(
    ("tokenizer", "template", "outcome"), [case for case in CASES if case[2] not in (WARNS, REFUSED)]
)
def test_prompts_and_conversations_are_transformers_own(
    folders: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: str,
    template: str,
    outcome: str,
    again: bool,
) -> None:
    folder = folders(tokenizer, template)
    layout, hf = opened_again(folder, monkeypatch) if again else opened(folder), AutoTokenizer.from_pretrained(folder)
    system, question = "Answer the fact.", "First one?"
    past = [PAST[0], joined(DOCUMENTS, PAST[0])]
    for documents in (DOCUMENTS, DOCUMENTS[1:], []):
        assert ours(layout, system, documents, question) == theirs(hf, system, joined(documents, question))
    want = theirs(hf, system, past[1], *PAST[1:], question)
    bos = [layout.chunk_ids(0, "x").count(each) for each in (hf.bos_token_id,)]
    assert bos == [int("bos_token" in TEMPLATES[template])], "a BOS token is there once if the template has it"
    if outcome == NO_HISTORY:
        with pytest.raises(UnsupportedModelError, match=r"join to those of the whole.* Ask without history"):
            ours(layout, system, DOCUMENTS, *PAST, question)
    else:
        assert ours(layout, system, DOCUMENTS, *PAST, question) == want
    if outcome == EXACT:
        for documents in (DOCUMENTS, []):
            assert ours(layout, None, documents, question) == theirs(hf, None, joined(documents, question))
        assert ours(layout, None, DOCUMENTS, *PAST, question) == theirs(hf, None, past[1], *PAST[1:], question)
    else:
        with pytest.raises(UnsupportedModelError, match="first chunk must be a system prompt with this model"):
            layout.header_ids  # noqa: B018


@pytest.mark.parametrize(("tokenizer", "template", "outcome"), [case for case in CASES if case[2] == REFUSED])
def test_what_can_not_be_followed_is_refused(
    folders: Callable[[str, str], Path], tokenizer: str, template: str, outcome: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"The (chat template|texts of a prompt) must"):
        PromptLayout(folders(tokenizer, template))


@pytest.mark.parametrize(("tokenizer", "template", "outcome"), [case for case in CASES if case[2] == WARNS])
def test_other_tokens_for_the_same_text_are_said(
    folders: Callable[[str, str], Path], tokenizer: str, template: str, outcome: str
) -> None:
    folder = folders(tokenizer, template)
    with pytest.warns(LayoutWarning, match="differ by some tokens"):
        layout = PromptLayout(folder)
    hf = AutoTokenizer.from_pretrained(folder)
    prompt = ours(layout, "Answer the fact.", DOCUMENTS, "Why?")
    want = theirs(hf, "Answer the fact.", joined(DOCUMENTS, "Why?"))
    assert hf.decode(prompt) == hf.decode(want)


TEXTS = st.text(
    alphabet=st.one_of(
        st.sampled_from("abFOW Z9.,!?'()\n\r\t \u00a0\u3000\u0301\u2581é中🙂"),
        st.characters(blacklist_categories=["Cs"]),
    ),
    min_size=1,
    max_size=30,
).filter(lambda text: bool(text.strip()))


@pytest.mark.parametrize(("tokenizer", "template"), [case[:2] for case in CASES if case[2] in (EXACT, ANCHORED)])
def test_any_text_joins(folders: Callable[[str, str], Path], tokenizer: str, template: str) -> None:
    folder = folders(tokenizer, template)
    layout, hf = opened(folder), AutoTokenizer.from_pretrained(folder)

    @settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
    @given(system=TEXTS, documents=st.lists(TEXTS, max_size=2), question=TEXTS, answer=TEXTS)
    def joins(system: str, documents: list[str], question: str, answer: str) -> None:
        assume(not any(mark in text for mark in CONTROL for text in (system, *documents, question, answer)))
        asked = joined(documents, question)
        assert ours(layout, system, documents, question) == theirs(hf, normalise(system), asked)
        got = ours(layout, system, documents, question, answer, "Why?")
        assert got == theirs(hf, normalise(system), asked, normalise(answer), "Why?")

    joins()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_text_is_no_control_and_streams_whole(folders: Callable[[str, str], Path], tokenizer: str) -> None:
    layout = opened(folders(tokenizer, "chatml"))
    text = f"Oslo{''.join(CONTROL)} is 中🙂 one"
    ids = layout.plain_ids(text)
    assert not set(ids) & set(layout._tokenizer.control.values())
    detokenizer = layout.detokenizer()
    streamed = "".join(map(detokenizer.feed, ids)) + detokenizer.flush()
    assert streamed == layout.decode(ids)


def test_the_day_is_always_the_same_and_that_is_said(
    folders: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders("gpt2", "llama3")
    with pytest.warns(LayoutWarning, match="told that today is 26 Jul 2024"):
        layout = PromptLayout(folder)
    assert "Today Date: 26 Jul 2024" in layout._tokenizer.decode(layout.header_ids, with_control=True)
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    from braidsdk.prompt import template

    for day in (template.DAY, template._OTHER_DAY):
        for form, text in template._written(day).items():
            assert day.strftime(form) == text


def test_a_template_that_takes_a_date_but_has_one_of_its_own_does_not_warn(
    folders: Callable[[str, str], Path],
) -> None:
    folder = folders("gpt2", "llama3")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace('strftime_now("%d %b %Y")', '"1 May 2020"'))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layout = PromptLayout(folder)
    assert "Today Date: 1 May 2020" in layout._tokenizer.decode(layout.header_ids, with_control=True)


def test_a_template_that_changes_by_chance_is_refused_by_name(folders: Callable[[str, str], Path]) -> None:
    folder = folders("gpt2", "by chance")
    for remembered in (None, folder.parent / "remembered.json"):
        with pytest.raises(UnsupportedModelError, match="must give the same text each time"):
            PromptLayout(folder, remembered=remembered)


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"])
def test_changed_files_are_read_again(
    folders: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    folder = folders("gpt2", "chatml")
    layout = opened_again(folder, monkeypatch)
    text = (folder / file).read_text()
    (folder / file).write_text(f"{{{{ 'Go.' }}}}{text}" if "jinja" in file else text.replace("</s>", "<|im_end|>"))
    changed_layout = opened(folder, folder.parent / f"{folder.name}.json")
    assert not changed_layout._tokenizer.record.is_known
    assert changed_layout.fingerprint == opened(folder).fingerprint
    assert (changed_layout.fingerprint == layout.fingerprint) == (file == "tokenizer_config.json")


def test_a_tokenizer_that_transformers_changes_is_not_remembered(
    folders: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED_NS", 0)
    folder, other = folders("gpt2", "chatml"), folders("qwen2", "chatml")
    hf = AutoTokenizer.from_pretrained(other)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: hf)
    layout = opened(folder, folder.parent / "changed.json")
    layout.remember()
    assert not (folder.parent / "changed.json").exists()
    assert layout.chunk_ids(0, "Well?") == PromptLayout(other).chunk_ids(0, "Well?")


def test_warnings_are_given_each_time(folders: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED_NS", 0)
    folder = folders("gpt2", "llama3")
    for _ in range(2):
        with pytest.warns(LayoutWarning, match="shows today's date"):
            layout = PromptLayout(folder, remembered=folder.parent / "warned.json")
        layout.remember()
    assert layout._tokenizer.record.is_known


def test_a_template_whose_beginning_depends_on_the_history_is_refused_with_one(
    folders: Callable[[str, str], Path],
) -> None:
    """The chunks' entries stand after that beginning."""
    folder = folders("gpt2", "chatml")
    path = folder / "chat_template.jinja"
    path.write_text("{% if messages | length > 2 %}{{ 'Go on.' }}{% endif %}" + path.read_text())
    layout = opened(folder)
    assert ours(layout, "Be brief.", DOCUMENTS, "Why?")
    with pytest.raises(UnsupportedModelError, match="Ask without history"):
        ours(layout, "Be brief.", DOCUMENTS, *PAST, "Why?")


def test_the_default_system_prompt_stands_before_documents_without_another(
    folders: Callable[[str, str], Path],
) -> None:
    layout = opened(folders("qwen2", "qwen2.5"))
    default = "You are Qwen, created by Alibaba Cloud."
    assert default in layout.decode(layout.header_ids)
    assert default not in layout.decode(layout.chunk_ids(0, "Be brief."))


def test_answers_end_where_the_template_ends_them(folders: Callable[[str, str], Path]) -> None:
    for template, end in (
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("llama2", "</s>"),
        ("tinyllama", "</s>"),
    ):
        layout = opened(folders("legacy", template))
        assert {layout._tokenizer.token(each) for each in layout.end_ids} == {end}
    with pytest.warns(LayoutWarning):
        layout = PromptLayout(folders("gpt2", "colons"))
    with pytest.warns(LayoutWarning, match="begins with no control token.* Answers may not end there"):
        assert layout.end_ids == frozenset()
