"""Rows that are wrong, each with the line that its user sees."""

from tests.torture.rows import GOOD, LABELLED, PAIR, RANKED, chat, lines, turns

NEEDS_DEMONSTRATION = "needed: demonstration (messages, or prompt and completion, or text)"
NEEDS_PAIR = "needed: pair (prompt, chosen, rejected) or ranking (prompt, completions, ranks)"
NEEDS_LABEL = "needed: unpaired (prompt, completion, label)"
A_ROW_NEEDS = (
    "a row needs: messages, or prompt and completion, or text; prompt, chosen, rejected; prompt, completions, ranks; "
    "prompt, completion, label; prompt, completion, score; prompt"
)
KNOWN_ROLES = "(known: system, developer, user, assistant, tool)"

# name: (method, the file's bytes, the whole line)
BAD_ROWS: dict[str, tuple[str, bytes, str]] = {
    # --- no object, no known field
    "text in place of a row": ("sft", lines("text"), "rows.jsonl:1: row: text, must be an object with fields"),
    "null in place of a row": ("sft", b"null\n", "rows.jsonl:1: row: null, must be an object with fields"),
    "an object without fields": ("sft", b"{}\n", f"rows.jsonl:1: row: no known fields (fields: none); {A_ROW_NEEDS}"),
    "unknown fields": (
        "sft",
        lines({"foo": 1, "bar": 2}),
        f"rows.jsonl:1: row: no known fields (fields: foo, bar); {A_ROW_NEEDS}",
    ),
    "misspelt field": (
        "sft",
        lines({"massages": turns("user", "assistant")}),
        f"rows.jsonl:1: row: no known fields (fields: massages) (did you mean messages?); {A_ROW_NEEDS}",
    ),
    "misspelt answer": (
        "dpo",
        lines({"prompt": "a", "chosen": "b", "rejectd": "c"}),
        "rows.jsonl:1: rejected: missing (fields: prompt, chosen, rejectd) (did you mean rejectd?)",
    ),
    # --- missing, empty, of the wrong type
    "no prompt": (
        "sft",
        lines({"completion": "b"}),
        "rows.jsonl:1: prompt: missing (fields: completion)",
    ),
    "no answer": (
        "sft",
        lines({"prompt": "a"}),
        f"rows.jsonl:1: row: is of shape prompts (fields: prompt), {NEEDS_DEMONSTRATION}",
    ),
    "no rejected": (
        "dpo",
        lines(PAIR, {"prompt": "a", "chosen": "b"}),
        "rows.jsonl:2: rejected: missing (fields: prompt, chosen)",
    ),
    "no chosen": (
        "dpo",
        lines({"prompt": "a", "rejected": "b"}),
        "rows.jsonl:1: chosen: missing (fields: prompt, rejected)",
    ),
    "null chosen": ("dpo", lines({**PAIR, "chosen": None}), "rows.jsonl:1: chosen: missing (fields: prompt, rejected)"),
    "several bad rows": (
        "dpo",
        lines(PAIR, {"prompt": "a", "chosen": "b"}, PAIR, [], 3),
        "rows.jsonl:2: rejected: missing (fields: prompt, chosen) (and 2 more bad rows; --skip-bad sets them aside)",
    ),
    "empty prompt": ("sft", lines({**GOOD, "prompt": ""}), "rows.jsonl:1: prompt: empty"),
    "blank completion": ("sft", lines(GOOD, {**GOOD, "completion": " \n"}), "rows.jsonl:2: completion: empty"),
    "blank chosen": ("dpo", lines({**PAIR, "chosen": "\u00a0\t"}), "rows.jsonl:1: chosen: empty"),
    "blank rejected": ("dpo", lines({**PAIR, "rejected": ""}), "rows.jsonl:1: rejected: empty"),
    "empty text": ("sft", lines({"text": "  "}), "rows.jsonl:1: text: empty"),
    "no messages": ("sft", lines({"messages": []}), "rows.jsonl:1: messages: empty"),
    "empty turn": (
        "sft",
        lines({"messages": [{"role": "user", "content": ""}, *turns("assistant")]}),
        "rows.jsonl:1: messages[0].content: empty",
    ),
    "number for a prompt": (
        "sft",
        lines({"prompt": 3, "completion": "b"}),
        "rows.jsonl:1: prompt: a number, must be text or a list of messages",
    ),
    "object for an answer": (
        "sft",
        lines({**GOOD, "completion": {"content": "b"}}),
        "rows.jsonl:1: completion: an object, must be text or a list of messages",
    ),
    "list for a text": ("sft", lines({"text": ["a"]}), "rows.jsonl:1: text: a list, must be text"),
    "text for messages": (
        "sft",
        lines({"messages": "hello"}),
        "rows.jsonl:1: messages: text, must be a list of messages",
    ),
    "label as text": ("kto", lines({**LABELLED, "label": "true"}), "rows.jsonl:1: label: text, must be true or false"),
    "label as a number": (
        "kto",
        lines({**LABELLED, "label": 1}),
        "rows.jsonl:1: label: a number, must be true or false",
    ),
    "label as null": (
        "kto",
        lines({**LABELLED, "label": None}),
        f"rows.jsonl:1: row: is of shape demonstration (fields: prompt, completion), {NEEDS_LABEL}",
    ),
    "preference over 1": (
        "reward",
        lines({**PAIR, "preference": 1.5}),
        "rows.jsonl:1: preference: 1.5, must be from 0 to 1 (1: chosen surely better, 0.5: a tie)",
    ),
    "preference as text": (
        "dpo",
        lines({**PAIR, "preference": "1"}),
        "rows.jsonl:1: preference: text, must be a number",
    ),
    "preference as true": (
        "dpo",
        lines({**PAIR, "preference": True}),
        "rows.jsonl:1: preference: true/false, must be a number",
    ),
    "margin infinite": (
        "reward",
        lines({**PAIR, "margin": 0}).replace(b"0", b"1e400"),
        "rows.jsonl:1: margin: inf, must be finite",
    ),
    "margin of 400 digits": (
        "reward",
        lines({**PAIR, "margin": 10**400}),
        "rows.jsonl:1: margin: a number of hundreds of digits, must be finite",
    ),
    # --- characters
    "NUL": (
        "reward",
        lines({**PAIR, "rejected": "a\0b"}),
        "rows.jsonl:1: rejected: contains a NUL character (at character 2)",
    ),
    "NUL in a turn": (
        "sft",
        lines(chat("user", "assistant", content="a\0")),
        "rows.jsonl:1: messages[1].content: contains a NUL character (at character 2)",
    ),
    "half a surrogate pair": (
        "sft",
        lines({**GOOD, "prompt": "smile \ud83d"}),
        "rows.jsonl:1: prompt: contains half a surrogate pair (at character 7)",
    ),
    "half a pair in tools": (
        "sft",
        lines({**chat("user", "assistant"), "tools": [{"name": "\udc00"}]}),
        "rows.jsonl:1: tools[0].name: contains half a surrogate pair (at character 1)",
    ),
    # --- pairs
    "chosen is rejected": (
        "dpo",
        lines({**PAIR, "rejected": PAIR["chosen"]}),
        "rows.jsonl:1: rejected: the same as chosen, a pair needs two different answers",
    ),
    "no beginning shared": (
        "dpo",
        lines({"chosen": "one text", "rejected": "another"}),
        "rows.jsonl:1: prompt: chosen and rejected share no beginning (fields: chosen, rejected)",
    ),
    "nothing after the beginning": (
        "dpo",
        lines({"chosen": "one text", "rejected": "one text more"}),
        "rows.jsonl:1: chosen: nothing is left after the shared beginning: give prompt as a field",
    ),
    "text against messages": (
        "dpo",
        lines({"chosen": turns("user", "assistant"), "rejected": "no"}),
        "rows.jsonl:1: rejected: text, but chosen is messages",
    ),
    "turns not shared": (
        "reward",
        lines({"chosen": turns("user", "assistant"), "rejected": turns("system", "assistant")}),
        "rows.jsonl:1: prompt: chosen and rejected share no beginning (fields: chosen, rejected)",
    ),
    "parting before the answer": (
        "dpo",
        lines({"chosen": turns("user", "user", "assistant"), "rejected": turns("user", "tool", "assistant")}),
        "rows.jsonl:1: prompt: not shared: chosen and rejected part at turn 2, before the answer",
    ),
    "prompt not among the turns": (
        "dpo",
        lines(
            {
                "prompt": "else",
                "chosen": turns("user", "assistant"),
                "rejected": [*turns("user"), *turns("assistant")][:1] + [{"role": "assistant", "content": "no"}],
            }
        ),
        "rows.jsonl:1: prompt: not shared: not among the turns of chosen and rejected",
    ),
    "answer that begins with the user": (
        "sft",
        lines({"prompt": turns("system"), "completion": turns("user", "assistant")}),
        "rows.jsonl:1: completion: begins with a turn of role user, but not with the prompt: prompt not shared",
    ),
    # --- rankings
    "fewer ranks than answers": ("reward", lines({**RANKED, "ranks": [1]}), "rows.jsonl:1: ranks: 1 for 2 completions"),
    "one answer to rank": (
        "reward",
        lines({**RANKED, "completions": ["a"], "ranks": [1]}),
        "rows.jsonl:1: completions: 1, a ranking needs at least 2",
    ),
    "rank as text": ("dpo", lines({**RANKED, "ranks": [1, "2"]}), "rows.jsonl:1: ranks[1]: text, must be a number"),
    "rank infinite": (
        "dpo",
        lines(RANKED).replace(b"[1, 2]", b"[1, 1e999]"),
        "rows.jsonl:1: ranks[1]: inf, must be finite",
    ),
    "ranks missing": (
        "dpo",
        lines({"prompt": "a", "completions": ["a", "b"]}),
        "rows.jsonl:1: ranks: missing (fields: prompt, completions)",
    ),
    "completions as text": (
        "dpo",
        lines({**RANKED, "completions": "ab"}),
        "rows.jsonl:1: completions: text, must be a list",
    ),
    "one answer on two ranks": (
        "dpo",
        lines({**RANKED, "completions": ["a", "a"]}),
        "rows.jsonl:1: completions[1]: the same as completions[0], but ranked differently",
    ),
    "an empty ranked answer": (
        "dpo",
        lines({**RANKED, "completions": ["a", ""]}),
        "rows.jsonl:1: completions[1]: empty",
    ),
    # --- messages
    "unknown role": (
        "sft",
        lines(chat("usr", "assistant")),
        f"rows.jsonl:1: messages[0].role: unknown role 'usr' (did you mean user?) {KNOWN_ROLES}",
    ),
    "role as a number": (
        "sft",
        lines({"messages": [{"role": 1, "content": "a"}]}),
        f"rows.jsonl:1: messages[0].role: unknown role 1 {KNOWN_ROLES}",
    ),
    "role as a list": (
        "sft",
        lines({"messages": [{"role": ["user"], "content": "a"}]}),
        f"rows.jsonl:1: messages[0].role: unknown role ['user'] {KNOWN_ROLES}",
    ),
    "no role": (
        "sft",
        lines({"messages": [{"content": "a"}]}),
        "rows.jsonl:1: messages[0].role: missing (fields: content)",
    ),
    "no content": (
        "sft",
        lines({"messages": [{"role": "user"}, *turns("assistant")]}),
        "rows.jsonl:1: messages[0].content: missing (fields: role)",
    ),
    "content as a number": (
        "sft",
        lines({"messages": [{"role": "user", "content": 7}]}),
        "rows.jsonl:1: messages[0].content: a number, must be text",
    ),
    "an image": (
        "sft",
        lines({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}),
        "rows.jsonl:1: messages[0].content: has a part that is not text (only text is supported)",
    ),
    "text for a turn": (
        "sft",
        lines({"messages": ["hello"]}),
        "rows.jsonl:1: messages[0]: text, must be an object with role and content",
    ),
    "last turn the user's": (
        "sft",
        lines(chat("user", "assistant", "user")),
        "rows.jsonl:1: messages: the last turn is of role user, must be the assistant's",
    ),
    "last turn a tool's": (
        "sft",
        lines(chat("user", "assistant", "tool")),
        "rows.jsonl:1: messages: the last turn is of role tool, must be the assistant's",
    ),
    "the assistant alone": (
        "sft",
        lines(chat("assistant")),
        "rows.jsonl:1: messages: only the assistant's turns, nothing to answer",
    ),
    "prompt that answers itself": (
        "sft",
        lines({"prompt": turns("user", "assistant"), "completion": "b"}),
        "rows.jsonl:1: prompt: the last turn is the assistant's, must leave the answer to it",
    ),
    "ShareGPT of nobody": (
        "sft",
        lines({"conversations": [{"from": "humann", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        "rows.jsonl:1: conversations[0].from: unknown role 'humann' (did you mean human?) (known: system, human, user, "
        "gpt, chatgpt, assistant, bot, model, function_call, tool, observation)",
    ),
    "ShareGPT of a list": (
        "sft",
        lines({"conversations": [{"from": ["human"], "value": "a"}, {"from": "gpt", "value": "b"}]}),
        "rows.jsonl:1: conversations[0].from: unknown role ['human'] (known: system, human, user, gpt, chatgpt, "
        "assistant, bot, model, function_call, tool, observation)",
    ),
    "a function call that is none": (
        "sft",
        lines({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{x"}]}),
        "rows.jsonl:1: conversations[1].value: not the JSON of a function call",
    ),
    # --- what a template reads
    "tools as text": ("sft", lines({**chat("user", "assistant"), "tools": "{x"}), "rows.jsonl:1: tools: not JSON"),
    "tools as a number": (
        "sft",
        lines({**chat("user", "assistant"), "tools": 3}),
        "rows.jsonl:1: tools: a number, must be a list of objects",
    ),
    "template arguments as a list": (
        "sft",
        lines({**chat("user", "assistant"), "chat_template_kwargs": []}),
        "rows.jsonl:1: chat_template_kwargs: a list, must be an object",
    ),
    "another template from a row": (
        "sft",
        lines({**chat("user", "assistant"), "chat_template_kwargs": {"chat_template": "{{ x }}"}}),
        "rows.jsonl:1: chat_template_kwargs.chat_template: is set by this program and cannot be given by a row",
    ),
    "another end token from a row": (
        "sft",
        lines({**chat("user", "assistant"), "chat_template_kwargs": {"eos_token": ""}}),
        "rows.jsonl:1: chat_template_kwargs.eos_token: is set by this program and cannot be given by a row",
    ),
    # --- shapes
    "a pair and a label": (
        "sft",
        lines({**PAIR, **LABELLED}),
        "rows.jsonl:1: chosen, rejected, label: fields of several shapes (pair, unpaired): keep those of one",
    ),
    "two demonstrations in one": (
        "sft",
        lines({**GOOD, "text": "abc"}),
        "rows.jsonl:1: text, completion: several forms of a demonstration: keep one",
    ),
    "a pair for sft": (
        "sft",
        lines(PAIR),
        f"rows.jsonl:1: row: is of shape pair (fields: prompt, chosen, rejected), {NEEDS_DEMONSTRATION}; "
        "`lowrank-align data convert rows.jsonl --to demonstrations --out OUT.jsonl` makes them",
    ),
    "a demonstration for dpo": (
        "dpo",
        lines(GOOD),
        f"rows.jsonl:1: row: is of shape demonstration (fields: prompt, completion), {NEEDS_PAIR}",
    ),
    "shapes mixed": (
        "dpo",
        lines(PAIR, GOOD, RANKED),
        f"rows.jsonl:2: row: is of shape demonstration (fields: prompt, completion), {NEEDS_PAIR}",
    ),
    "segments for dpo": (
        "dpo",
        lines(
            {
                "chosen": turns("user", "assistant"),
                "rejected": [{"role": "user", "content": "else"}, *turns("assistant")],
            }
        ),
        "rows.jsonl:1: prompt: chosen and rejected share no beginning (fields: chosen, rejected)",
    ),
    "segments that begin with an answer": (
        "cpl",
        lines({"chosen": turns("assistant", "user", "assistant"), "rejected": turns("user", "assistant")}),
        "rows.jsonl:1: prompt: chosen and rejected share no beginning (fields: chosen, rejected)",
    ),
    "segments that end with the user": (
        "cpl",
        lines({"chosen": turns("user", "assistant", "user"), "rejected": turns("system", "assistant")}),
        "rows.jsonl:1: chosen: the last turn is of role user, must be the assistant's",
    ),
    # --- too long
    "all too long": (
        "sft",
        lines({**GOOD, "prompt": "a" * 999}),
        "no row is left of 1 (1: the prompt leaves no room); raise --max-length or shorten the prompts",
    ),
    "answers equal once cut": (
        "dpo",
        lines({"prompt": "a", "chosen": "b" * 400 + "c", "rejected": "b" * 400 + "d"}),
        "no row is left of 1 (1: the answers are equal after cutting); raise --max-length or shorten the prompts",
    ),
}
