"""What people's files look like, a row of a table each: the file, and the queries, pairs or demonstrations in it."""

import bz2
import gzip
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from sso_jax.data.demonstrations import load_demonstrations
from sso_jax.data.pair_files import load_pairs
from sso_jax.data.queries import load_queries
from sso_jax.data.rows import Table
from sso_jax.runtime.errors import InputError

SYSTEM = {"role": "system", "content": "Be brief."}
USER, BOT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
AGAIN, NO = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "No."}
BRIEF, ASKED = ("system", "Be brief."), (("user", "Why?"), ("assistant", "So."))
WHY = [((), "Why?")]
PAIR = [((), "Why?", "So.", "No.")]
DEMO = [((), "Why?", "So.")]
SIDES = {"chosen": "So.", "rejected": "No."}
HH = "\n\nHuman: Why?\n\nAssistant: So."
LIST = '[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]'


@dataclass(frozen=True)
class Form:
    """A file's rows, what is read from them, and words of the log."""

    rows: list[dict] | dict | str | bytes
    """Rows of JSON Lines, one row, or the contents of the file."""
    found: list[tuple] | str
    """(history, query), (history, query, chosen, rejected) or (history, query, response); or words of a refusal."""
    name: str = "f.jsonl"
    said: tuple[str, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)


def rows(*given: dict, good: int = 0, row: dict | None = None) -> list[dict]:
    """Rows, after `good` copies of a row that is in order, each with a query of its own."""
    row = {"prompt": "Why {}?"} if row is None else row
    return [{key: value.replace("{}", str(i)) for key, value in row.items()} for i in range(good)] + list(given)


def many(found: tuple, count: int = 20) -> list[tuple]:
    """What `rows(good=count)` gives."""
    history, query, *rest = found
    return [(history, query.replace("{}", str(i)), *rest) for i in range(count)]


GOOD_QUERIES, GOOD_PAIRS, GOOD_DEMOS = (
    {"prompt": "Why {}?"},
    {"prompt": "Why {}?", **SIDES},
    {"prompt": "Why {}?", "response": "So."},
)
MANY, MANY_PAIRS, MANY_DEMOS = many(((), "Why {}?")), many(((), "Why {}?", "So.", "No.")), many(((), "Why {}?", "So."))

QUERIES = {
    # A1: text that was lost
    "alpaca_input": Form({"instruction": "Sum up.", "input": "A fox."}, [((), "Sum up.\n\nA fox.")]),
    "alpaca_blank_input": Form({"instruction": "Why?", "input": " "}, WHY),
    "alpaca_null_input": Form({"instruction": "Why?", "input": None}, WHY),
    "two_inputs_are_two_queries": Form(
        [{"instruction": "Sum up.", "input": "A fox."}, {"instruction": "Sum up.", "input": "A dog."}],
        [((), "Sum up.\n\nA fox."), ((), "Sum up.\n\nA dog.")],
    ),
    "dolly_context": Form({"instruction": "Sum up.", "context": "A fox."}, [((), "Sum up.\n\nA fox.")]),
    "input_alone": Form({"input": "Why?"}, WHY),
    "system_field": Form({"prompt": "Why?", "system": "Be brief."}, [((BRIEF,), "Why?")]),
    "system_prompt_field": Form({"query": "Why?", "system_prompt": "Be brief."}, [((BRIEF,), "Why?")]),
    "system_of_blanks": Form({"query": "Why?", "system": "  "}, WHY),
    "system_turn": Form({"messages": [SYSTEM, USER]}, [((BRIEF,), "Why?")]),
    "several_turns": Form({"messages": [SYSTEM, USER, BOT, AGAIN]}, [((BRIEF, *ASKED), "Sure?")]),
    "answer_after_the_query": Form({"messages": [USER, BOT]}, WHY, said=("messages: turns after the query (1)",)),
    "same_query_other_history": Form(
        [{"messages": [USER, BOT, AGAIN]}, {"messages": [USER, NO, AGAIN]}],
        [(ASKED, "Sure?"), ((("user", "Why?"), ("assistant", "No.")), "Sure?")],
    ),
    "history_of_pairs": Form({"prompt": "Sure?", "history": [["Why?", "So."]]}, [(ASKED, "Sure?")]),
    "history_of_turns": Form({"prompt": "Sure?", "history": [USER, BOT]}, [(ASKED, "Sure?")]),
    "turns_asked_one_by_one": Form({"turns": ["Why?", "Sure?"]}, WHY, said=("turns[1:] (1)",)),
    "turns_without_roles": Form({"turns": [{"content": "Why?"}]}, WHY),
    "messages_as_json": Form({"messages": LIST}, WHY, said=("messages: turns after the query",)),
    "messages_as_python": Form({"messages": repr([SYSTEM, USER])}, [((BRIEF,), "Why?")]),
    "conversations_as_json": Form({"conversations": json.dumps([{"from": "human", "value": "Why?"}])}, WHY),
    "prompt_as_json": Form({"prompt": json.dumps([SYSTEM, USER])}, [((BRIEF,), "Why?")]),
    "a_list_that_is_no_conversation": Form({"prompt": "[1, 2]"}, [((), "[1, 2]")]),
    "a_query_about_json": Form({"prompt": '{"role": 7} is what?'}, [((), '{"role": 7} is what?')]),
    "messages_of_plain_text": Form({"messages": "Why?"}, "messages is a text that is not a list of turns ('Why?')"),
    "fields_left_out": Form(
        {"prompt": "Why?", "category": "x", "answer": "So."}, WHY, said=("category (1), answer (1)",)
    ),
    # B7, B11: turns as public files write them
    "columns_of_datasets": Form(
        {"messages": {"role": ["system", "user"], "content": ["Be brief.", "Why?"]}}, [((BRIEF,), "Why?")]
    ),
    "roles_in_any_case": Form(
        {"messages": [{"role": "System", "content": "Be brief."}, {"role": "USER", "content": "Why?"}]},
        [((BRIEF,), "Why?")],
    ),
    "developer_is_system": Form(
        {"messages": [{"role": "developer", "content": "Be brief."}, USER]}, [((BRIEF,), "Why?")]
    ),
    "text_parts": Form(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}]},
        WHY,
    ),
    "image_parts": Form(
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "y"}]}
            ]
        },
        "messages has a part of type 'image_url'; give text parts only",
    ),
    "openassistant_roles": Form({"conversation": [{"role": "prompter", "content": "Why?"}]}, WHY),
    "tool_turn": Form({"messages": [{"role": "tool", "content": "x"}]}, "a turn of role 'tool'"),
    "transcript": Form(
        {"prompt": "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: Sure?\n\nAssistant:"}, [(ASKED, "Sure?")]
    ),
    # B9: odd rows
    "blank_instruction": Form(
        rows({"prompt": " "}, good=20),
        MANY,
        dropped={"blank_prompt": 1},
        said=("dropped 1 of 21 rows, blank_prompt: line 21: no text",),
    ),
    "no_prompt": Form(
        rows({"text": "x"}, {"text": "y"}, good=20),
        MANY,
        dropped={"no_prompt": 2},
        said=("line 21: no prompt", "line 22: no prompt"),
    ),
    "a_tenth_is_dropped": Form(rows({"text": "x"}, good=9), many(((), "Why {}?"), 9), dropped={"no_prompt": 1}),
    "more_than_a_tenth_is_refused": Form(
        rows({"text": "x"}, good=8),
        "(the row has text) (1 of 9 rows are bad, of which at most 10% may be dropped)",
    ),
    "half_a_character": Form(rows({"prompt": "\ud83d"}, good=20), MANY, dropped={"bad_characters": 1}),
    "id_twice": Form(
        rows({"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}, good=20),
        [*MANY, ((), "a")],
        dropped={"repeated_id": 1},
    ),
    # B11: files as people have them
    "byte_order_mark": Form('\ufeff[{"prompt": "Why?"}]', WHY, "f.json"),
    "byte_order_mark_of_lines": Form('\ufeff{"prompt": "Why?"}\n', WHY),
    "lines_named_json": Form('{"prompt": "Why?"}\n{"prompt": "How?"}\n', [*WHY, ((), "How?")], "f.json"),
    "list_named_jsonl": Form('[{"prompt": "Why?"},\n {"prompt": "How?"}]', [*WHY, ((), "How?")]),
    "single_object": Form('{"prompt": "Why?"}', WHY, "f.json"),
    "single_object_of_messages": Form(json.dumps({"messages": [SYSTEM, USER]}), [((BRIEF,), "Why?")], "f.json"),
    "data_object": Form('{"version": 1, "data": [{"prompt": "Why?"}]}', WHY, "f.json"),
    "object_of_splits": Form('{"train": [{"prompt": "Why?"}], "test": [{"prompt": "How?"}]}', WHY, "f.json"),
    "ndjson": Form('{"prompt": "Why?"}\n', WHY, "f.ndjson"),
    "gzip_lines": Form(gzip.compress(b'{"prompt": "Why?"}\n'), WHY, "f.jsonl.gz"),
    "gzip_json": Form(gzip.compress(b'[{"prompt": "Why?"}]'), WHY, "f.json.gz"),
    "bzip2_lines": Form(bz2.compress(b'{"prompt": "Why?"}\n'), WHY, "f.jsonl.bz2"),
    "broken_gzip": Form(b"no gzip", "cannot be decompressed", "f.jsonl.gz"),
    "csv": Form('id,prompt\n7,"Why, if\nso?"\n', [((), "Why, if\nso?")], "f.csv"),
    "csv_of_numbers": Form("prompt\n42\n", [((), "42")], "f.csv"),
    "csv_of_json": Form('messages\n"[{""role"": ""user"", ""content"": ""Why?""}]"\n', WHY, "f.csv"),
    "csv_with_a_short_line": Form("id,prompt\n7\n", "f.csv, line 2: not 2 cells", "f.csv"),
    "tsv": Form("id\tprompt\n7\tWhy?\n", WHY, "f.tsv"),
    "git_lfs_pointer": Form(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n",
        "a Git LFS pointer and not the file itself; run `git lfs pull`",
    ),
    "git_lfs_pointer_of_parquet": Form(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer", "f.parquet"
    ),
    # what files tried by a new user showed
    "names_in_any_case": Form({"Question": "Why?"}, WHY),
    "lines_that_are_conversations": Form(
        '[{"role": "user", "content": "Why?"}]\n[{"role": "user", "content": "How?"}]\n', [*WHY, ((), "How?")]
    ),
    "part_with_a_value": Form({"messages": [{"role": "user", "content": [{"type": "text", "value": "Why?"}]}]}, WHY),
    "object_with_one_list": Form('{"version": 2, "some_data": [{"prompt": "Why?"}]}', WHY, "f.json"),
    "other_ids_twice": Form([{"idx": 1, "prompt": "a"}, {"idx": 1, "prompt": "b"}], [((), "a"), ((), "b")]),
    "csv_with_a_broken_line": Form(
        "id,prompt\n" + "".join(f"{i},Why {i}?\n" for i in range(20)) + "7\n", MANY, "f.csv", dropped={"broken_line": 1}
    ),
    "hh_prompts": Form({"chosen": HH, "rejected": HH}, WHY, said=("rejected (1), chosen: turns after the query (1)",)),
    "question_with_context": Form({"question": "Why?", "context": "A fox."}, [((), "Why?\n\nA fox.")]),
    "alpaca_noinput": Form({"instruction": "Why?", "input": "<noinput>"}, WHY),
    "rendered_templates": Form(
        {"prompt": "<|im_start|>user\nWhy?<|im_end|>"},
        [((), "<|im_start|>user\nWhy?<|im_end|>")],
        said=("in 1 of 1 rows texts have marks of a chat template",),
    ),
    "openai_preference_input": Form(
        {"input": {"messages": [SYSTEM, USER], "tools": [1]}}, [((BRIEF,), "Why?")], said=("input.tools (1)",)
    ),
}
COMPARED = {"prompt": "Why?"}
PAIRS = {
    "openai_preferences": Form(
        {"input": {"messages": [USER]}, "preferred_output": [BOT], "non_preferred_output": [NO]}, PAIR
    ),
    "alpaca_eval_weighted_first": Form(
        {"instruction": "Why?", "output_1": "So.", "output_2": "No.", "preference": 1.27}, PAIR
    ),
    "alpaca_eval_weighted_second": Form(
        {"instruction": "Why?", "output_1": "No.", "output_2": "So.", "preference": 1.73}, PAIR
    ),
    "prompt_under_a_name_of_its_own": Form(
        {"request": "Is it really safe?", "chosen": "I would not do it.", "rejected": "I would not know."}, "no prompt"
    ),
    "blank_prompt_and_a_common_beginning": Form(
        {"prompt": "", "chosen": "The sky is blue.", "rejected": "The sky is green."}, "no prompt"
    ),
    "beginning_of_two_words": Form({"chosen": "I would do it.", "rejected": "I would not."}, "no prompt"),
    "labels_of_0_and_1": Form(
        [{"prompt": "a", "response_1": "x", "response_2": "y", "label": i} for i in (0, 1)],
        "label is 0 or 1 in all rows, which may number the responses from 0 or mean ties",
    ),
    "empty_second_response": Form(
        {"prompt": "Why?", "response1": "So.", "response2": None, "label": 1},
        "response2 is empty; give both responses of the pair",
    ),
    "no_label": Form(
        {"prompt": "Why?", "response1": "So.", "response2": "No."},
        "no label, which says which response is better; give 1 or 2",
    ),
    "alpaca_input": Form(
        {"instruction": "Sum up.", "input": "A fox.", **SIDES}, [((), "Sum up.\n\nA fox.", "So.", "No.")]
    ),
    "system_prompt_field": Form(
        {"prompt": "Why?", "system_prompt": "Be brief.", **SIDES}, [((BRIEF,), "Why?", "So.", "No.")]
    ),
    "conversations_as_json": Form({"chosen": LIST, "rejected": json.dumps([USER, NO])}, PAIR),
    "hh_transcripts": Form({"chosen": HH, "rejected": HH.replace("So.", "No.")}, PAIR),
    "hh_transcripts_of_turns": Form(
        {"chosen": HH + "\n\nHuman: Sure?\n\nAssistant: Yes.", "rejected": HH + "\n\nHuman: Sure?\n\nAssistant: No."},
        [(ASKED, "Sure?", "Yes.", "No.")],
    ),
    "conversations_that_part_early": Form(
        {"chosen": [USER, BOT, AGAIN, BOT], "rejected": [USER, NO, AGAIN, NO]},
        PAIR,
        said=("chosen: turns after the response (1)",),
    ),
    "conversations_with_nothing_in_common": Form(
        {"chosen": [USER, BOT], "rejected": [AGAIN, NO]}, "the responses answer different prompts"
    ),
    "conversations_that_part_in_a_question": Form(
        {"chosen": [USER, BOT, USER, BOT], "rejected": [USER, BOT, AGAIN, NO]}, "the responses answer different prompts"
    ),
    "implicit_prompt_of_texts": Form(
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        [((), "The sky is", "blue.", "green.")],
        said=("in 1 of 1 rows the prompt is what chosen and rejected begin with",),
    ),
    "implicit_prompt_of_conversations": Form(
        {"chosen": [SYSTEM, USER, BOT], "rejected": [SYSTEM, USER, NO]}, [((BRIEF,), "Why?", "So.", "No.")]
    ),
    "texts_with_nothing_in_common": Form(SIDES, "no prompt"),
    "prompt_apart_and_history": Form(
        {"history": [["Why?", "So."]], "chosen": [AGAIN, BOT], "rejected": [AGAIN, NO]},
        [(ASKED, "Sure?", "So.", "No.")],
    ),
    "text_parts": Form(
        {
            "prompt": "Why?",
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "So."}]}],
            "rejected": [NO],
        },
        PAIR,
    ),
    "roles_in_any_case": Form(
        {"chosen": [USER, {"role": "Assistant", "content": "So."}], "rejected": [USER, NO]}, PAIR
    ),
    "lists_of_texts": Form(
        {"prompt": "Why?", "chosen": ["So."], "rejected": ["No.", "Not."]}, PAIR, said=("rejected[1:] (1)",)
    ),
    "alpaca_eval_first": Form({"instruction": "Why?", "output_1": "So.", "output_2": "No.", "preference": 1.0}, PAIR),
    "alpaca_eval_second": Form({"instruction": "Why?", "output_1": "No.", "output_2": "So.", "preference": 2}, PAIR),
    "alpaca_eval_ties": Form(
        rows(
            *[{"instruction": "q", "output_1": "a", "output_2": "b", "preference": p} for p in (1.5, 0)],
            good=1,
            row=GOOD_PAIRS,
        ),
        MANY_PAIRS[:1],
        dropped={"tie": 2},
    ),
    "pandalm_votes": Form(
        {
            "instruction": "Why?",
            "input": "",
            "response1": "No.",
            "response2": "So.",
            "annotator1": 2,
            "annotator2": 0,
            "annotator3": 2,
        },
        PAIR,
    ),
    "pandalm_tie": Form(
        rows(
            {"instruction": "q", "response1": "a", "response2": "b", "annotator1": 2, "annotator2": 1, "annotator3": 0},
            good=1,
            row=GOOD_PAIRS,
        ),
        MANY_PAIRS[:1],
        dropped={"tie": 1},
    ),
    "judgebench_first": Form({"question": "Why?", "response_A": "So.", "response_B": "No.", "label": "A>B"}, PAIR),
    "judgebench_second": Form({"question": "Why?", "response_A": "No.", "response_B": "So.", "label": "B>A"}, PAIR),
    "judgebench_tie": Form(
        rows({"question": "q", "response_A": "a", "response_B": "b", "label": "A=B"}, good=1, row=GOOD_PAIRS),
        MANY_PAIRS[:1],
        dropped={"tie": 1},
    ),
    "auto_j_first": Form({**COMPARED, "response 1": "So.", "response 2": "No.", "label": 0}, PAIR),
    "auto_j_second": Form({**COMPARED, "response 1": "No.", "response 2": "So.", "label": 1}, PAIR),
    "auto_j_tie": Form(
        rows({**COMPARED, "response 1": "a", "response 2": "b", "label": 2}, good=1, row=GOOD_PAIRS),
        MANY_PAIRS[:1],
        dropped={"tie": 1},
    ),
    "mt_bench_judgment": Form({"winner": "model_b", "conversation_a": [USER, NO], "conversation_b": [USER, BOT]}, PAIR),
    "mt_bench_tie": Form(
        rows(
            {"winner": "tie (bothbad)", "conversation_a": [USER, NO], "conversation_b": [USER, BOT]},
            good=1,
            row=GOOD_PAIRS,
        ),
        MANY_PAIRS[:1],
        dropped={"tie": 1},
    ),
    "arena_55k": Form(
        {
            "prompt": '["Why?"]',
            "response_a": '["No."]',
            "response_b": '["So."]',
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        PAIR,
    ),
    "safe_rlhf": Form({"prompt": "Why?", "response_0": "No.", "response_1": "So.", "better_response_id": 1}, PAIR),
    "shp": Form({"history": "Why?", "human_ref_A": "No.", "human_ref_B": "So.", "labels": 0}, PAIR),
    "helpsteer3": Form({"context": [USER], "response1": "So.", "response2": "No.", "overall_preference": -2}, PAIR),
    "unknown_verdict": Form(
        {"question": "q", "response_A": "a", "response_B": "b", "label": "C"}, "label 'C'; give a>>b or a>b or"
    ),
    "ultrafeedback": Form(
        {
            "instruction": "Why?",
            "completions": [
                {"response": "No.", "overall_score": 2},
                {"response": "So.", "overall_score": 9.5},
                {"response": "Hm.", "overall_score": 5},
            ],
        },
        PAIR,
        said=("completions between the best and the worst (1)",),
    ),
    "ultrafeedback_tie": Form(
        rows(
            {
                "instruction": "q",
                "completions": [{"response": "a", "overall_score": 2}, {"response": "b", "overall_score": 2}],
            },
            good=1,
            row=GOOD_PAIRS,
        ),
        MANY_PAIRS[:1],
        dropped={"tie": 1},
    ),
    "nectar_ranks": Form(
        {"prompt": "Why?", "answers": [{"answer": "No.", "rank": 2}, {"answer": "So.", "rank": 1}]}, PAIR
    ),
    "kto": Form(
        [
            {"prompt": "Why?", "completion": "No.", "label": False},
            {"prompt": "Why?", "completion": "So.", "label": True},
        ],
        PAIR,
    ),
    "kto_with_one_label": Form(
        [
            {"prompt": "Why?", "completion": "So.", "label": True},
            {"prompt": "Why?", "completion": "No.", "label": False},
            {"prompt": "How?", "completion": "x", "label": True},
        ],
        PAIR,
        dropped={"unpaired": 1},
    ),
    "kto_of_turns_in_csv": Form("prompt,completion,label\nWhy?,So.,True\nWhy?,No.,False\n", PAIR, "f.csv"),
    "scores_in_csv": Form("prompt,chosen,rejected,score_chosen,score_rejected\nWhy?,So.,No.,4.5,1\n", PAIR, "f.csv"),
    "of_no_known_form": Form(
        {"prompt": "q", "good": "a", "bad": "b"},
        "give chosen and rejected; or response_j, response_k; or preferred_output, non_preferred_output; or output_1,",
    ),
    "empty_prompt_among_others": Form(
        rows({"prompt": "", **SIDES, "rejected": "x"}, good=20, row=GOOD_PAIRS), MANY_PAIRS, dropped={"no_prompt": 1}
    ),
    "one_without_rejected": Form(
        rows({"prompt": "q", "chosen": "a"}, good=20, row=GOOD_PAIRS), MANY_PAIRS, dropped={"no_response": 1}
    ),
}
DEMONSTRATIONS = {
    "kto_rows": Form(
        [
            {"prompt": "Why?", "completion": "So.", "label": True},
            {"prompt": "Why?", "completion": "No.", "label": False},
        ],
        DEMO,
        dropped={"undesirable": 1},
        said=("label (1)",),
    ),
    "alpaca": Form(
        {"instruction": "Sum up.", "input": "A fox.", "output": "Fox."}, [((), "Sum up.\n\nA fox.", "Fox.")]
    ),
    "messages_as_json": Form({"messages": LIST}, DEMO),
    "system_prompt_field": Form({"messages": [USER, BOT], "system_prompt": "Be brief."}, [((BRIEF,), "Why?", "So.")]),
    "transcript": Form({"chosen": HH}, DEMO),
    "turn_of_weight_0": Form(
        {"messages": [USER, {**BOT, "weight": 0}, AGAIN, NO]},
        [(ASKED, "Sure?", "No.")],
        said=("assistant turns of weight 0 (1)",),
    ),
    "only_turns_of_weight_0": Form(
        rows({"messages": [USER, {**BOT, "weight": 0}]}, good=20, row=GOOD_DEMOS),
        MANY_DEMOS,
        dropped={"nothing_to_learn": 1},
    ),
    "weight_of_a_half": Form(
        {"messages": [USER, {**BOT, "weight": 0.5}]}, "a turn of weight 0.5; give 0 (not learned) or 1"
    ),
    "empty_output": Form(
        rows({"prompt": "q", "response": " "}, good=20, row=GOOD_DEMOS), MANY_DEMOS, dropped={"empty_response": 1}
    ),
    "no_output": Form(
        rows({"prompt": "q", "response": ""}, good=20, row=GOOD_DEMOS), MANY_DEMOS, dropped={"no_response": 1}
    ),
    "user_turn_at_the_end": Form(
        {"messages": [USER, BOT, AGAIN]}, DEMO, said=("messages: turns after the last response to learn (1)",)
    ),
    "reasoning_left_out": Form(
        {"messages": [USER, {**BOT, "reasoning_content": "Hm."}]}, DEMO, said=("messages[].reasoning_content (1)",)
    ),
    "two_answers": Form({"messages": [USER, BOT, AGAIN, NO]}, [*DEMO, (ASKED, "Sure?", "No.")]),
}
READERS = {"queries": load_queries, "pairs": load_pairs, "demonstrations": load_demonstrations}
FORMS = {
    **{f"queries-{name}": form for name, form in QUERIES.items()},
    **{f"pairs-{name}": form for name, form in PAIRS.items()},
    **{f"demonstrations-{name}": form for name, form in DEMONSTRATIONS.items()},
}


def contents(given: Any, name: str) -> bytes:
    if isinstance(given, dict | list):
        lines = [given] if isinstance(given, dict) else given
        return "".join(json.dumps(row) + "\n" for row in lines).encode()
    return given.encode() if isinstance(given, str) else given


def parts(record) -> tuple:
    history = tuple((turn["role"], turn["content"]) for turn in record.history)
    return history, *(
        getattr(record, name) for name in ("query", "chosen", "rejected", "response") if hasattr(record, name)
    )


@pytest.mark.parametrize("case", FORMS)
def test_a_public_form_is_read_whole(tmp_path, caplog, case):
    form, path = FORMS[case], tmp_path / FORMS[case].name
    path.write_bytes(contents(form.rows, form.name))
    kind = case.split("-")[0]
    table = Table(str(path), f"{kind}.path")
    caplog.set_level("INFO", logger="sso_jax")
    if isinstance(form.found, str):
        with pytest.raises(InputError) as error:
            READERS[kind](table)
        assert form.found in str(error.value) and str(path) in str(error.value)
        return
    found = READERS[kind](table)
    assert [parts(record) for record in found.records] == form.found
    assert found.dropped == form.dropped
    assert all(words in caplog.text for words in form.said), caplog.text
    if not form.said and not form.dropped:
        assert "not used" not in caplog.text and "dropped" not in caplog.text, caplog.text


@pytest.mark.parametrize("kind", READERS)
def test_no_odd_row_is_dropped_where_they_are_refused(tmp_path, kind):
    good = {"queries": GOOD_QUERIES, "pairs": GOOD_PAIRS, "demonstrations": GOOD_DEMOS}[kind]
    path = tmp_path / "f.jsonl"
    path.write_bytes(contents(rows({"text": "x"}, good=20, row=good), ""))
    with pytest.raises(InputError, match=r"line 21: .*no .*\(1 of 21 rows are bad, of which none may be dropped\)"):
        READERS[kind](Table(str(path), "x.path", on_bad_rows="refuse"))


def test_scores_of_best_and_worst_are_kept(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(contents(PAIRS["ultrafeedback"].rows, ""))
    assert load_pairs(Table(str(path), "pairs.path")).records[0].scores == {"chosen": 9.5, "rejected": 2.0}
    path = tmp_path / "f.csv"
    path.write_text(PAIRS["scores_in_csv"].rows)
    assert load_pairs(Table(str(path), "pairs.path")).records[0].scores == {"chosen": 4.5, "rejected": 1.0}


def test_zstandard_saved_data_sets_and_column_turns(tmp_path, monkeypatch):
    import datasets
    import pyarrow

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pyarrow.CompressedOutputStream(str(tmp_path / "f.jsonl.zst"), "zstd") as stream:
        stream.write(b'{"prompt": "Why?"}\n')
    assert [q.query for q in load_queries(Table(str(tmp_path / "f.jsonl.zst"), "queries.path")).records] == ["Why?"]

    turns = datasets.Features(
        {"messages": datasets.Sequence({"role": datasets.Value("string"), "content": datasets.Value("string")})}
    )
    table = datasets.Dataset.from_list(
        [{"messages": {"role": ["system", "user"], "content": ["Be brief.", "Why?"]}}], features=turns
    )
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "two"))
    table.to_parquet(str(tmp_path / "f.parquet"))
    for name in ("one", "two", "f.parquet"):
        found = load_queries(Table(str(tmp_path / name), "queries.path")).records
        assert [parts(query) for query in found] == [((BRIEF,), "Why?")], name
    with pytest.raises(InputError, match="has no split 'dev'; give one of train, test"):
        load_queries(Table(str(tmp_path / "two"), "queries.path", split="dev"))


def test_a_config_name_of_a_data_set_reaches_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **how):
        asked.append((args, how))
        return [{"prompt": "Why?"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_queries(Table("owner/set", "queries.path", "test", "hard")).records[0].query == "Why?"
    assert asked == [(("owner/set", "hard"), {"split": "test"})]


def test_the_table_has_what_was_asked_for():
    assert len(FORMS) >= 80
