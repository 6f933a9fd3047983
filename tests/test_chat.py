from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lotr.errors import DataError
from tiny_tokenizers import ids, language, run

PLAIN_TEMPLATE = (
    "{% for turn in messages %}{{ turn.role + ' : ' + turn.content + ' # ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
TAGGED_TEMPLATE = (
    "{% for turn in messages %}{{ turn.role + ':' }}{% if turn.role == 'assistant' %}"
    "{% generation %}{{ turn.content + '#' }}{% endgeneration %}{% else %}{{ turn.content + '#' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
]


def characters(trim_offsets: bool) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer, one token a letter and a blank, with or without blanks in its offsets."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def learned(row: dict) -> list[int]:
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    return [label for label in row["labels"] if label != -100]


def test_only_the_answers_are_learned():
    row = run(language(chat_template=PLAIN_TEMPLATE), messages=[TALK])[0]
    assert row["input_ids"] == ids("user : a # assistant : b c # user : d # assistant : e #")
    assert learned(row) == ids("b c # e #")


def test_marks_in_the_template_say_what_is_learned():
    tokenizer = characters(trim_offsets=False)
    tokenizer.chat_template = TAGGED_TEMPLATE.replace(
        "turn.content + '#' }}{% endg", "turn.content }}{% endg"
    )
    assert tokenizer.decode(learned(run(tokenizer, messages=[TALK])[0])) == "b ce"


def test_blanks_that_the_offsets_leave_out_do_not_spill_the_loss():
    tokenizer = characters(trim_offsets=True)
    tokenizer.chat_template = TAGGED_TEMPLATE.replace("turn.content + '#'", "' ' + turn.content + '#\n'")
    row = run(tokenizer, max_length=99, messages=[[*TALK, {"role": "user", "content": "f"}]])[0]
    assert tokenizer.decode(learned(row)) == " b c#\n e#\n"


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, TAGGED_TEMPLATE], ids=["plain", "marked"])
@pytest.mark.parametrize(
    "answer",
    [{"content": "b c", "weight": 0}, {"content": " "}],
    ids=["of the weight 0", "empty"],
)
def test_an_answer_that_is_empty_or_of_the_weight_0_is_not_learned(template, answer):
    tokenizer = characters(trim_offsets=False)
    tokenizer.chat_template = template
    row = run(tokenizer, max_length=99, messages=[[TALK[0], {"role": "assistant", **answer}, *TALK[2:]]])[0]
    assert tokenizer.decode(learned(row)).strip() in ("e #", "e#")


def test_what_tools_say_is_seen_and_not_learned_and_calls_are_learned():
    template = PLAIN_TEMPLATE.replace(
        "turn.content", "(turn.tool_calls[0].function.name if turn.tool_calls else turn.content)"
    )
    template = "{% if tools %}{{ tools[0].name + ' ' }}{% endif %}" + template
    calls = [{"function": {"name": "g", "arguments": "{}"}}]
    talk = [TALK[0], {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "f"}, TALK[3]]
    row = run(language(chat_template=template), messages=[talk], tools=[[{"name": "d"}]])[0]
    assert row["input_ids"] == ids("d user : a # assistant : g # tool : f # assistant : e #")
    assert learned(row) == ids("g # e #")


def test_keys_that_only_other_turns_have_do_not_reach_the_template():
    template = PLAIN_TEMPLATE.replace("turn.content", "turn.content + (' g' if turn.name is defined else '')")
    talk = [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]
    row = run(language(chat_template=template), messages=[talk])[0]
    assert row["input_ids"] == ids("user : a g # assistant : b #")


def test_rows_whose_answers_are_cut_away_are_dropped_with_their_count():
    tokenizer = language(chat_template=PLAIN_TEMPLATE)
    late = [{"role": "user", "content": "a b c d e f"}, {"role": "assistant", "content": "g"}]
    with pytest.warns(UserWarning, match=r"2 of 3 rows .* within 8 tokens .*--max-length"):
        encoded = run(tokenizer, max_length=8, messages=[TALK, late, TALK[:1]])
    assert [learned(row) for row in encoded] == [ids("b c")]
    with pytest.raises(DataError, match=r"None of the 1 rows.*Raise --max-length"):
        run(tokenizer, max_length=8, messages=[late])


REFUSING = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"


@pytest.mark.parametrize(
    ("before", "talks", "message"),
    [
        ("{{ 'a ' * (messages | length) }}", [TALK], r"Row 1: .* turn 2 change .*\{% generation %\}"),
        ("", [TALK, TALK[1:]], r"Row 2 starts with an answer"),
        (REFUSING, [TALK[1:]], r"Row 1: .*\(user first\)\. Its roles are: assistant, user, assistant"),
    ],
    ids=["earlier turns are rewritten", "an answer first", "the template refuses"],
)
def test_a_conversation_that_cannot_be_encoded_is_refused_with_its_row(before, talks, message):
    with pytest.raises(DataError, match=message):
        run(language(chat_template=before + PLAIN_TEMPLATE), messages=talks)


def test_conversations_need_a_chat_template():
    with pytest.raises(DataError, match=r"Row 1: .*tokenizer\.chat_template is not set.*--text"):
        run(language(), messages=[TALK])
