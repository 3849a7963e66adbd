"""Chats, prompts, packing and written answers, each beside a naive way to the same thing."""

import json
from decimal import Decimal

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("datasets")

TEMPLATE = """{% for m in messages %}{% if m['role'] == 'user' %}the {{ m['content'] }} [SEP] {% else %}\
{{ m['content'] }} [EOS] {% endif %}{% endfor %}{% if add_generation_prompt %}was {% endif %}"""
MARKED = TEMPLATE.replace(
    "{{ m['content'] }} [EOS] ", "was {% generation %}{{ m['content'] }} [EOS]{% endgeneration %} "
)
SPOKEN = TEMPLATE.replace("{{ m['content'] }} [EOS] ", "was {{ m['content'] }} [EOS] ")
FORGETFUL = SPOKEN.replace(
    "{% for m in messages %}", "{{ 'warm' if messages|length > 2 else 'cold' }} {% for m in messages %}"
)
CHAT = [
    {"role": "user", "content": "film"},
    {"role": "assistant", "content": "very good"},
    {"role": "user", "content": "plot"},
    {"role": "assistant", "content": "dull"},
]


@pytest.fixture
def chatty(tokenizer):
    """chatty(template): the tiny tokenizer with a chat template."""
    import copy

    def make(template):
        made = copy.deepcopy(tokenizer)
        made.chat_template = template
        return made

    return make


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encoded(parsed, tokenizer, path, length, *words):
    from unilora_cli.data.corpus import read_corpora
    from unilora_cli.data.language import encode_corpora

    arguments = parsed("finetune", "lm", "--model", "m", "--data", path, *words)
    return encode_corpora(*read_corpora(arguments), arguments, tokenizer, length)


def heard(tokenizer, example):
    """The tokens that have a loss."""
    return tokenizer.decode([label for label in example["labels"] if label != -100])


# ---- chats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [MARKED, SPOKEN], ids=["marked", "by what a turn adds"])
def test_only_the_assistant_has_a_loss(chatty, parsed, tmp_path, template):
    tokenizer, path = chatty(template), write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 2)
    data = encoded(parsed, tokenizer, path, 32, "--response-only")
    whole = "the film [SEP] was very good [EOS] the plot [SEP] was dull [EOS]"
    assert tokenizer.decode(data.train[0]["input_ids"]) == whole
    assert heard(tokenizer, data.train[0]) == "very good [EOS] dull [EOS]"
    assert tokenizer.decode(data.prompts[0].tokens) == "the film [SEP] was very good [EOS] the plot [SEP] was"
    assert data.prompts[0].response == "dull"
    assert heard(tokenizer, encoded(parsed, tokenizer, path, 32).train[0]) == whole


def test_a_template_that_changes_earlier_turns_is_refused_where_it_matters(chatty, parsed, tmp_path):
    from unilora_cli.console import CommandError

    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 2)
    assert len(encoded(parsed, chatty(FORGETFUL), path, 32).train) == 1
    with pytest.raises(CommandError, match="the chat template changes earlier turns when later ones follow"):
        encoded(parsed, chatty(FORGETFUL), path, 32, "--response-only")


def test_chats_that_cannot_be_used(unilora, llama, tmp_path):
    def result(rows, *words):
        path = write(tmp_path / "a.jsonl", rows)
        return unilora("finetune", "lm", "--model", llama, "--data", path, "--out", "run", *words).err

    bad = [{**CHAT[0], "role": "bot"}]
    assert "a.jsonl, record 2, turn 1: the role 'bot' is none of system, developer, user, assistant, tool." in result(
        [{"messages": CHAT}, {"messages": bad}]
    )
    assert "record 1, turn 1: expected a text as the content, got None" in result([{"messages": [{"role": "user"}]}])
    assert "record 1: there is no turn of the assistant" in result([{"messages": CHAT[:1]}])
    assert "record 1: expected a list of turns in 'messages', got 'hello'" in result([{"messages": "hello"}])
    assert f"the tokenizer of {llama} has no chat template" in result([{"messages": CHAT}] * 2)
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_the_data_is_said_before_the_model_loads(unilora, llama, tmp_path, monkeypatch):
    from unilora_cli.tasks import lm

    monkeypatch.setattr(lm, "loaded", lambda *_: pytest.fail("the model was loaded"))
    path = write(tmp_path / "a.jsonl", [{"question": "the film", "answer": "very good"}] * 3)
    words = ("finetune", "lm", "--model", llama, "--data", path, "--out", "run")
    assert "has no number in it ('very good')" in unilora(*words, "--metric", "exact-match").err
    assert "--metric rouge: this task has perplexity, exact-match." in unilora(*words, "--metric", "rouge").err
    assert "there is no column 'film' for --prompt or --response-column" in unilora(*words, "--prompt", "{film}").err
    assert "--prompt: Single '}' encountered" in unilora(*words, "--prompt", "film}").err
    path = write(tmp_path / "a.jsonl", [{"text": "the film was good"}] * 9)
    assert "it holds whole texts, so there is no --packing" in unilora(*words, "--packing").err
    assert "there is no --metric exact-match" in unilora(*words, "--metric", "exact-match").err


def test_a_prompt_is_filled_in(tokenizer, parsed, tmp_path):
    rows = [{"query": "film", "kind": "good", "response": "very dull"}] * 2
    path = write(tmp_path / "a.jsonl", rows)
    held_out = write(tmp_path / "b.jsonl", [{"question": "plot", "kind": "bad", "answer": "cold"}])
    words = ("--prompt", "the {prompt} was {kind}", "--eval-data", held_out, "--response-only")
    data = encoded(parsed, tokenizer, path, 16, *words)
    assert tokenizer.decode(data.train[0]["input_ids"]) == "the film was good very dull [EOS]"
    assert tokenizer.decode(data.held_out[0]["input_ids"]) == "the plot was bad cold [EOS]"
    assert heard(tokenizer, data.held_out[0]) == "cold [EOS]"
    data = encoded(parsed, tokenizer, path, 16, "--prompt", "the", "--response-column", "kind")
    assert tokenizer.decode(data.train[0]["input_ids"]) == "the good [EOS]"


# ---- packing ----------------------------------------------------------------------------------------------------


def examples_of(lengths, vocabulary=16):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]


def test_every_example_is_packed_once_and_the_blocks_are_full(tokenizer):
    from unilora_cli.data.packing import pack

    examples = examples_of([5, 3, 8, 2, 2, 4, 1, 7])
    blocks = pack(examples, 8, -100)
    found = []
    for block in blocks:
        starts = [i for i, position in enumerate(block["position_ids"]) if position == 0]
        for start, stop in zip(starts, [*starts[1:], len(block["input_ids"])], strict=True):
            found.append(tuple(block["input_ids"][start:stop]))
            assert block["labels"][start:stop] == [-100, *block["input_ids"][start + 1 : stop]]
    assert sorted(found) == sorted(tuple(example["input_ids"]) for example in examples)
    assert [len(block["input_ids"]) for block in blocks] == [
        8,
        8,
        8,
        8,
    ]  # 32 tokens: none of the 4 blocks has room left


ARCHITECTURES = {
    "Llama": {"num_key_value_heads": 2},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "Gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "Qwen2": {"num_key_value_heads": 2},
    "GPT2": {},
}


def decoder(name, **more):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if name == "GPT2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24}
    config = getattr(transformers, f"{name}Config")(
        **sizes, **more, vocab_size=16, initializer_range=0.5, bos_token_id=None, eos_token_id=None
    )
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{name}{head}")(config).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_loss_and_gradients_are_those_of_single_examples(name):
    from unilora_cli.data.packing import check_packing, pack
    from unilora_cli.data.texts import pad
    from unilora_cli.tasks.lm import score

    model, examples = decoder(name, **ARCHITECTURES[name]), examples_of([7, 3, 5, 6, 2])
    model.config.use_cache = False
    check_packing(model, examples, name)
    packed = pad({"input_ids": 0, "labels": -100})(pack(examples, 12, -100))
    assert (packed["labels"] != -100).sum() == sum(len(example["labels"]) - 1 for example in examples)
    scores = score(model, packed)
    gradients = torch.autograd.grad(scores.loss, model.parameters())
    total = 0
    for example in examples:
        one = score(model, {key: torch.tensor([value]) for key, value in example.items()})
        total = total + one.loss * one.count
    torch.testing.assert_close(scores.loss, total / scores.count, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(gradients, torch.autograd.grad(total / scores.count, model.parameters()), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_that_sees_past_its_example_is_refused():
    import transformers

    from unilora_cli.console import CommandError
    from unilora_cli.data.packing import check_packing

    torch.manual_seed(0)
    config = transformers.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=16, initializer_range=0.5)
    with pytest.raises(CommandError, match=r"--packing: bloom (gives other logits|takes no position_ids)"):
        check_packing(transformers.BloomForCausalLM(config), examples_of([7, 5]), "bloom")


def test_packing_from_the_command_line(unilora, llama, dialogues):
    words = ("--packing", "--response-only", "--length", 48, "--max-steps", 2, "--device", "cpu", "--out", "run")
    result = unilora("finetune", "lm", "--model", llama, "--data", dialogues, *words)
    assert result.code == 0, result.err
    assert "36 examples in" in result.out


# ---- exact match ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("so 3 + 4 = 7. The answer is: 1,234.50", "1234.5"),
        ("The answer is 5. The answer is 6 of 8", "6"),
        ("first 3, then -4.", "-4"),
        ("#### $-7 and 9", "-7"),
        ("there are 12. The answer is unknown", None),
        ("none at all", None),
        ("it costs .5", "0.5"),
    ],
)
def test_the_final_number(text, number):
    from unilora_cli.tasks.generation import final_number

    assert final_number(text) == (None if number is None else Decimal(number))


def test_answers_of_a_batch_are_those_of_single_prompts(llama, tokenizer):
    import transformers

    from unilora_cli.tasks.generation import _answers

    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    rows = [example["input_ids"] for example in examples_of([7, 2, 4])]
    together = _answers(model, rows, tokenizer, 6)
    assert together == [_answers(model, [row], tokenizer, 6)[0] for row in rows]
    assert len(set(together)) > 1


def test_exact_match_counts_right_answers(tokenizer):
    from unilora_cli.data.language import Prompt
    from unilora_cli.tasks import generation
    from unilora_cli.training.metrics import Outcome

    class Echo(torch.nn.Module):
        """Writes its last token again."""

        device = torch.device("cpu")

        def generate(self, input_ids, **_):
            return torch.cat([input_ids, input_ids[:, -1:]], 1)

    class Digits:
        pad_token_id = eos_token_id = 0

        def batch_decode(self, rows, **_):
            return ["".join(map(str, row)) for row in rows.tolist()]

    prompts = [Prompt([9, 3], "#### 3"), Prompt([4], "the answer is 4.0"), Prompt([7, 7, 7], "8"), Prompt([1], "1")]
    metric = generation.exact_match(prompts, Digits(), 3, 2, 1)
    assert metric.of(Outcome(Echo(), 0.0, None, None)) == pytest.approx(2 / 3)
