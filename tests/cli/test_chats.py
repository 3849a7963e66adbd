"""Chats of every form that people have, and what is said of what a template or this command leaves out of them."""

import json

import pytest

pytest.importorskip("torch")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("data_cache")
USER, ANSWER = {"role": "user", "content": "rain?"}, {"role": "assistant", "content": "It is dry."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
ASKED = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "no"},
    {"role": "assistant", "content": "WRONG", "weight": 0},
    ANSWER,
]

PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
FULL = """{% if tools %}[{{ tools|tojson }}]{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content or '' }}\
{% for c in m.tool_calls or [] %}<{{ c.function|tojson }}>{% endfor %}|{% endfor %}"""
MARKED = """{% for m in messages %}{% if m.role == 'assistant' %}assistant:{% generation %}{{ m.content }}|\
{% endgeneration %}{% else %}{{ m.role }}:{{ m.content }}|{% endif %}{% endfor %}"""


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of single bytes: whatever is written comes back."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate([*alphabet, "<eos>"])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def learn(letters, parsed, tmp_path):
    """learn(template, record, *words): the text of a chat that is trained on, the text that has a loss, the notes."""
    from unilora_cli.data.corpus import read_corpora
    from unilora_cli.data.language import encode_corpora

    def run(template, record, *words):
        letters.chat_template = template
        (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record))
        arguments = parsed("finetune", "lm", "--model", "m", "--data", tmp_path / "a.jsonl", *words)
        data = encode_corpora(*read_corpora(arguments), arguments, letters, 5000)
        example = data.train[0]
        heard = letters.decode([label for label in example["labels"] if label != -100])
        notes = [(name, str(value)) for name, value in data.notes if name != "seen in training"]
        return letters.decode(example["input_ids"]), heard, notes

    return run


@pytest.fixture
def refused(learn):
    from unilora_cli.console import CommandError

    def run(template, record, *words):
        with pytest.raises(CommandError) as caught:
            learn(template, record, *words)
        return str(caught.value)

    return run


# ---- what reaches the template ----------------------------------------------------------------------------------


def test_tools_and_calls_reach_the_template_and_a_weight_of_0_has_no_loss(learn, letters):
    text, heard, notes = learn(FULL, {"tools": TOOLS, "messages": ASKED})
    assert text == letters.apply_chat_template(ASKED, tools=TOOLS, tokenize=False)
    assert '<{"name": "weather", "arguments": {"city": "Oslo"}}>' in text
    assert heard == text.replace("assistant:WRONG|", "")  # the template has no words that let the assistant begin
    assert notes == []
    assert learn(FULL, {"tools": TOOLS, "messages": ASKED}, "--response-only")[1].count("WRONG") == 0


def test_turns_of_weight_0_in_a_template_with_marks(learn):
    turns = [USER, {**ANSWER, "content": "A", "weight": 0}, USER, {**ANSWER, "content": "B", "weight": 1}]
    assert learn(MARKED, {"messages": turns}, "--response-only")[1] == "B|"
    assert learn(MARKED, {"messages": turns})[1] == "user:rain?|assistant:user:rain?|assistant:B|"
    turns[0] = {**USER, "weight": 0}
    assert learn(MARKED, {"messages": turns})[1] == "assistant:user:rain?|assistant:B|"


def calling(**turn):
    """The chat with its call written in another way."""
    return [USER, {"role": "assistant", **turn}, *ASKED[2:]]


def sharegpt(*turns):
    return {"conversations": [{"from": speaker, "value": value, **more} for speaker, value, more in turns]}


TEXT_CALL = {"id": None, "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
PARTS = [{"type": "text", "text": "ra"}, {"type": "text", "text": "in?"}]
SAME = {
    "arguments as text": {"messages": calling(content=None, tool_calls=[TEXT_CALL])},
    "a call without its function": {"messages": calling(tool_calls=[CALL["function"]])},
    "the older form": {
        "functions": [{"name": "weather"}],
        "messages": [*calling(function_call=CALL["function"])[:2], {"role": "function", "content": "no"}, *ASKED[3:]],
    },
    "everything as text": {"tools": json.dumps(TOOLS), "messages": json.dumps(ASKED)},
    "parts": {"messages": [{"role": "user", "content": PARTS}, *ASKED[1:]]},
    "sharegpt": sharegpt(
        ("human", "rain?", {}),
        ("function_call", json.dumps(CALL["function"]), {}),
        ("observation", "no", {}),
        ("gpt", "WRONG", {"weight": 0}),
        ("gpt", "It is dry.", {}),
    ),
    "conversations of roles": {"conversations": ASKED},
    "prompt and completion": {"prompt": ASKED[:1], "completion": ASKED[1:]},
}


@pytest.mark.parametrize("form", SAME)
def test_forms_of_one_chat(learn, form):
    assert learn(FULL, {"tools": TOOLS, **SAME[form]})[:2] == learn(FULL, {"tools": TOOLS, "messages": ASKED})[:2]


def test_a_table_of_calls_has_no_arguments_of_other_calls(letters, parsed, tmp_path):
    """Arrow gives each call the arguments of all, with None."""
    from unilora_cli.data.corpus import read_corpora

    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}
    rows = [{"messages": [USER, {"role": "assistant", "tool_calls": [call]}]} for call in (CALL, other)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    train, _ = read_corpora(parsed("finetune", "lm", "--model", "m", "--data", tmp_path / "a.parquet"))
    assert [chat.turns[1]["tool_calls"] for chat in train.chats] == [[CALL], [other]]


def test_the_system_column_and_few_shots_of_a_prompt(learn):
    rows = {"system": "Be brief.", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "w"}]}
    assert learn(PLAIN, rows)[0] == "system:Be brief.|user:q|assistant:w|"
    shots = {"prompt": [USER, {**ANSWER, "content": "Few."}, USER], "completion": [ANSWER]}
    assert learn(PLAIN, shots, "--response-only")[1] == "assistant:It is dry.|"


@pytest.mark.parametrize("written", ["{{ c.function.arguments }}", "{{ '' + c.function.arguments }}"])
def test_a_template_that_writes_arguments_as_they_are_gets_json(learn, written):
    template = FULL.replace("{{ c.function|tojson }}", written)
    assert '<{"city": "Oslo"}>' in learn(template, {"messages": ASKED})[0]


def test_a_chat_that_ends_with_the_user_and_a_late_word_of_the_system(learn):
    turns = [USER, ANSWER, {"role": "system", "content": "switch"}, USER, ANSWER, USER]
    text, heard, notes = learn(PLAIN, {"messages": turns}, "--response-only")
    assert text.endswith("system:switch|user:rain?|assistant:It is dry.|user:rain?|")
    assert (heard, notes) == ("assistant:It is dry.|" * 2, [])


def test_templates_by_name(learn):
    """A tokenizer may have one for tools beside the default."""
    assert learn({"default": PLAIN, "tool_use": FULL}, {"messages": ASKED, "tools": TOOLS})[0].startswith("[[{")
    assert learn({"default": PLAIN, "tool_use": FULL}, {"messages": [USER, ANSWER]})[0].startswith("user:")


# ---- what is left out -------------------------------------------------------------------------------------------


def left_out(learn, template, record):
    notes = dict(learn(template, record)[2])
    return notes.get("left out", "").partition("a.jsonl: ")[2]


def test_what_the_template_leaves_out_is_counted(learn):
    turns = [{**USER, "name": "Ann"}, {**ANSWER, "reasoning_content": "hm", "train": False, "refusal": None}]
    record = {"messages": turns, "tools": TOOLS, "documents": [{"text": "x"}], "chat_template_kwargs": {"brief": False}}
    assert left_out(learn, PLAIN, record) == (
        "'brief' of 2 chats, 'documents' of 2 chats, 'tools' of 2 chats, 'name' of 2 turns, "
        "'reasoning_content' of 2 turns, 'train' of 2 turns"
    )
    asks = PLAIN + "{{ tools }}{{ documents }}{{ brief }}"
    asks = asks.replace("{{ m.role }}", "{{ m.role }}{{ m.name }}{{ m.reasoning_content }}{{ m.train }}")
    assert left_out(learn, asks, record) == ""


def test_turns_that_the_template_passes_over_are_counted(learn):
    template = PLAIN.replace("{{ m.role }}", "{% if m.role != 'tool' %}{{ m.role }}").replace("|", "|{% endif %}")
    turns = [USER, {"role": "tool", "content": "no rain"}, ANSWER]
    assert left_out(learn, template, {"messages": turns}) == "2 turns of the tool"
    thinking = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")
    turns = [USER, {**ANSWER, "content": "<think>hm</think>It is dry."}]
    assert left_out(learn, thinking, {"messages": turns}) == "a part of 2 turns of the assistant"


def test_reasoning_that_earlier_turns_lose_is_counted(learn):
    template = PLAIN.replace("{{ m.content }}", "{% if loop.last %}{{ m.reasoning_content }}{% endif %}{{ m.content }}")
    turns = [USER, {**ANSWER, "reasoning_content": "hm"}, USER, {**ANSWER, "reasoning_content": "ah"}]
    assert left_out(learn, template, {"messages": turns}) == "'reasoning_content' of 2 turns"


def test_a_turn_of_which_nothing_is_left_is_refused(learn, refused):
    text = refused(PLAIN, {"messages": ASKED, "tools": TOOLS})
    assert (
        "a.jsonl, record 1, turn 2: the chat template leaves out 'tool_calls', and the assistant says nothing" in text
    )
    assert "leaves out 'refusal'" in refused(PLAIN, {"messages": [USER, {"role": "assistant", "refusal": "No."}]})
    silent = [USER, {**ASKED[1], "weight": 0}, ANSWER]
    assert left_out(learn, PLAIN, {"messages": silent}) == "'tool_calls' of 2 turns"


def test_other_columns_are_named(learn):
    record = {"messages": [USER, ANSWER], "text": "x", "id": 3, "source": None}
    assert learn(PLAIN, record)[2][0][1].startswith("'text', 'id' of ")
    alpaca = {"instruction": "Add.", "input": "1", "output": "2", "history": [["a", "b"]]}
    assert learn(PLAIN, alpaca)[2][0][1].startswith("'history' of ")


def test_ends_that_are_cut_off_are_counted(tokenizer, parsed, tmp_path):
    from unilora_cli.data.corpus import read_corpora
    from unilora_cli.data.language import encode_corpora

    rows = [{"prompt": "the film was", "response": "very good " * n} for n in (1, 9, 2, 9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = parsed("finetune", "lm", "--model", "m", "--data", tmp_path / "a.jsonl")
    notes = dict(encode_corpora(*read_corpora(arguments), arguments, tokenizer, 10).notes)
    assert notes["cut off"] == f"the ends of 2 of {tmp_path}/a.jsonl, after 10 tokens (--length)"


# ---- what is refused --------------------------------------------------------------------------------------------

REFUSED = {
    "an image part": (
        {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
        "'image_url', and this is",
    ),
    "sound": ({"role": "user", "content": [{"type": "input_audio"}]}, "of the type 'input_audio'"),
    "nothing": ({"role": "assistant", "content": None}, "turn 1: expected a text as the content, got None"),
    "a user's nothing": ({"role": "user", "content": None, "name": "A"}, "expected a text as the content, got None"),
    "half a weight": ({**ANSWER, "weight": 0.5}, "turn 1: expected the weight 0 or 1, got 0.5"),
    "no JSON": (
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{a"}}]},
        "of 'f' as JSON",
    ),
    "no name": ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, "with the name of a function"),
    "no call": ({"from": "function_call", "value": "f()"}, "expected the call of a function as JSON, got 'f()'"),
    "a stranger": ({"from": "narrator", "value": "x"}, "the role 'narrator' is none of"),
    "a word": ("hello", "turn 1: expected a turn {'role': ..., 'content': ...}, got 'hello'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_turns_that_cannot_be_used(refused, case):
    turn, message = REFUSED[case]
    assert message in refused(PLAIN, {"messages": [turn, USER, ANSWER]})


RECORDS = {
    "pictures": (
        {"messages": [USER, ANSWER], "images": ["x.png"]},
        "record 1: it has 'images', and this is for models",
    ),
    "no weight": ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no turn of the assistant of a weight above 0"),
    "two systems": ({"system": "a", "messages": [{"role": "system", "content": "b"}, ANSWER]}, "beside it"),
    "preferences": ({"prompt": "x", "chosen": "a", "rejected": "b"}, "--prompt '{prompt}' --response-column chosen"),
    "no completion": ({"prompt": [USER, ANSWER], "completion": [USER]}, "no turn of the assistant after the prompt"),
    "half a chat": ({"prompt": [USER], "completion": "x"}, "expected a list of turns in 'completion', got 'x'"),
    "no turns": ({"messages": []}, "expected a list of turns in 'messages', got []"),
    "tools of text": ({"messages": [USER, ANSWER], "tools": ["weather"]}, "expected objects {...} in 'tools'"),
    "settings": ({"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": False}}, "'tokenize' is not for a"),
    "a template": ({"messages": [USER, ANSWER], "chat_template_kwargs": {"chat_template": ""}}, "chat_template_kwargs"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_records_that_cannot_be_used(refused, case):
    record, message = RECORDS[case]
    assert message in refused(PLAIN, record)


def test_records_of_several_forms_are_refused(parsed, tmp_path):
    from unilora_cli.console import CommandError
    from unilora_cli.data.corpus import read_corpora

    rows = [{"messages": [USER, ANSWER]}, {"text": "a story"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CommandError, match=r"record 2: expected a list of turns in 'messages', got None"):
        read_corpora(parsed("finetune", "lm", "--model", "m", "--data", tmp_path / "a.jsonl"))


# ---- templates of models ----------------------------------------------------------------------------------------


def template_of_trl(name):
    from importlib.resources import files

    pytest.importorskip("trl")
    return files("trl").joinpath("chat_templates", f"{name}.jinja").read_text("utf-8")


QWEN3_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def test_a_chat_with_tool_calls_in_a_template_that_rewrites_earlier_turns(learn):
    """Qwen3's own template writes an empty thought in the last turn alone; TRL's for training in every turn."""
    text, heard, notes = learn(template_of_trl("qwen3"), {"tools": TOOLS_TOLD, "messages": ASKED}, "--response-only")
    answers = [f"<think>\n\n</think>\n\n{words}<|im_end|>\n" for words in (QWEN3_CALL, "It is dry.")]
    assert heard == "".join(answers)
    assert all(f"<|im_start|>assistant\n{answer}" in text for answer in answers)
    assert "WRONG" in text
    assert "<tool_response>\nno\n</tool_response>" in text
    assert "A town." in text
    assert [name for name, _ in notes] == ["chat template"]


def test_a_template_is_the_models_own_where_all_is_learnt(learn, letters):
    text, _, notes = learn(template_of_trl("qwen3"), {"messages": [USER, ANSWER, USER, ANSWER]})
    assert text == letters.apply_chat_template([USER, ANSWER, USER, ANSWER], tokenize=False)
    assert text.count("<think>") == 1
    assert notes == []


REWRITING = ("qwen3", "qwen3_5_think", "gptoss", "nemotron_3_nano", "phi3", "phi3_5")


@pytest.mark.parametrize("name", REWRITING)
def test_only_the_assistant_is_learnt_in_templates_that_rewrite_earlier_turns(learn, letters, name):
    try:
        template = template_of_trl(name)
    except FileNotFoundError:
        pytest.skip("this TRL has no such template")
    turns = [USER, {**ANSWER, "content": "First."}, {**USER, "content": "sun?"}, {**ANSWER, "content": "Second."}]
    text, heard, _ = learn(template, {"messages": turns}, "--response-only")
    assert all(turn["content"] in text for turn in turns)
    assert heard.index("First.") < heard.index("Second.")
    assert "rain?" not in heard
    assert "sun?" not in heard
    assert letters.chat_template == template  # the tokenizer itself is left alone


def test_a_template_by_name_or_one_that_trl_does_not_know_stays(learn):
    names = {"default": FULL, "tool_use": FULL}
    for template in (FULL, names):
        _, heard, notes = learn(template, {"tools": TOOLS, "messages": ASKED}, "--response-only")
        assert heard.endswith("assistant:It is dry.|")
        assert notes == []


def test_the_templates_that_trl_ships_lose_nothing_unsaid(learn, letters):
    """Of each template: the tools, calls and reasoning are in the text or in the notes, or the chat is refused."""
    from importlib.resources import files

    from unilora_cli.console import CommandError

    pytest.importorskip("trl")
    thought = {**ASKED[1], "reasoning_content": "I think so."}
    turns = [{"role": "system", "content": "Be brief."}, USER, thought, ASKED[2], USER, ANSWER]
    done, refused = 0, []
    for path in sorted(files("trl").joinpath("chat_templates").iterdir(), key=str):
        if path.suffix != ".jinja" or path.name.startswith(("idefics", "smolvlm")):  # for images, and slow
            continue
        try:
            text, _, notes = learn(path.read_text("utf-8"), {"tools": TOOLS_TOLD, "messages": turns})
        except CommandError as error:
            refused.append(str(error))
            continue
        said = dict(notes).get("left out", "")
        for words, name in (("I think so.", "'reasoning_content'"), ("Oslo", "'tool_calls'"), ("A town.", "'tools'")):
            assert (words in text) != (name in said), (path.name, name)
        assert all(turn["content"] in text for turn in turns)
        done += 1
    assert done > 9
    assert all("cannot take" in error or "leaves out" in error for error in refused)


TOOLS_TOLD = [{"type": "function", "function": {"name": "weather", "description": "Of today.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "A town."}}}}}]  # fmt: skip
