"""Conversations become prompt and answer tokens, through the tokenizer's chat template.

The plain template is for tokenizers that have none. It is set as `tokenizer.chat_template`, so that training, sampling and
an exported folder use the very same one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dlmconvert.errors import UserError, nearest

ROLES = ("system", "user", "assistant")

# The header of the answer ends with a line end and contents are trimmed, so that no token reaches across the boundary:
# the tokens of the prompt alone are then the tokens it has in front of an answer.
_PLAIN_TEMPLATE = (
    "{{ BOS }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] | trim + '\\n\\n' }}"
    "{% else %}{{ 'Assistant:\\n' }}{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}{{ '\\n\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Turn(NamedTuple):
    """Token ids in front of an answer (template and earlier turns included), and of the answer with its closing tokens."""

    prompt_ids: list[int]
    answer_ids: list[int]


def plain_chat_template(starts_with_bos: bool) -> str:
    """`User: ...`, blank line, `Assistant:` and the answer on a new line, closed with the end token; with generation marks."""
    return _PLAIN_TEMPLATE.replace("{{ BOS }}", "{{ bos_token }}" if starts_with_bos else "")


def ensure_chat_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template the plain one. Returns whether it was needed.

    The rendered text begins with the bos token where the tokenizer itself puts it in front of a text.
    """
    if tokenizer.chat_template:
        return False
    bos = tokenizer.bos_token_id
    starts_with_bos = bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]
    tokenizer.chat_template = plain_chat_template(starts_with_bos)
    return True


def has_generation_marks(tokenizer: Any) -> bool:
    """Whether the chat template marks the assistant's text with {% generation %}."""
    return isinstance(tokenizer.chat_template, str) and bool(_MARKS.search(tokenizer.chat_template))


def check_messages(messages: Any, origin: str) -> list[dict[str, str]]:
    """[{role, content}]: optionally a system message, then user and assistant by turns.

    Raises UserError that names file and line for an unknown role, roles out of order, content that is no text, an empty
    answer, and a conversation without any answer.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{origin}: `messages` is not a list of objects", "", 'write [{"role": "user", "content": ...}, ...]')
    expected: tuple[str, ...] = ("system", "user")
    checked = []
    for number, message in enumerate(messages, start=1):
        where = f"{origin}, message {number}"
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                there = ", ".join(map(repr, message)) or "none"
                raise UserError(f"{where}: `{field}` is missing or not a string", f"fields there: {there}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise UserError(f"{where}: unknown role {role!r}", nearest(role, ROLES), "rename the roles of the file")
        if role not in expected:
            raise UserError(
                f"{where}: roles out of order: {role!r} where {' or '.join(map(repr, expected))} must stand",
                "a conversation is an optional system message, then user and assistant by turns",
            )
        if role == "assistant" and not content.strip():
            raise UserError(f"{where}: empty response", "an answer without text teaches only to stop", "remove the conversation")
        expected = {"system": ("user",), "user": ("assistant",), "assistant": ("user",)}[role]
        checked.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in checked):
        raise UserError(f"{origin}: no assistant turn", "only the assistant's tokens are trained on: there is nothing to learn from")
    return checked


def assistant_turns(tokenizer: Any, messages: Sequence[dict[str, str]], origin: str) -> Iterator[Turn]:
    """One `Turn` for each assistant message: everything before it is prompt, everything after it is not there.

    The span of the answer comes from the template's generation marks; without them from rendering the prompt alone, whose
    tokens must be a prefix of the tokens of the whole. Raises UserError where they are not, or the template refuses.
    """
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            conversation = list(messages[: number + 1])
            turn = _from_marks(tokenizer, conversation, origin) if has_generation_marks(tokenizer) else None
            yield turn or _from_prefix(tokenizer, conversation, origin)


def _from_marks(tokenizer: Any, conversation: list[dict[str, str]], origin: str) -> Turn | None:
    if not getattr(tokenizer, "is_fast", False):
        return None  # without character offsets the marks cannot be found among the tokens
    rendered = _render(tokenizer, conversation, origin, return_assistant_tokens_mask=True)
    ids, mask = list(rendered["input_ids"]), list(rendered["assistant_masks"])
    end = len(mask)
    while end and not mask[end - 1]:
        end -= 1
    start = end
    while start and mask[start - 1]:
        start -= 1
    if start == end:
        raise UserError(
            f"{origin}: the chat template marks no token of the answer",
            "its {% generation %} block is empty for this conversation",
            "correct the chat template of the tokenizer, or remove its {% generation %} marks",
        )
    return Turn(ids[:start], ids[start:end])


def _from_prefix(tokenizer: Any, conversation: list[dict[str, str]], origin: str) -> Turn:
    prompt = list(_render(tokenizer, conversation[:-1], origin, add_generation_prompt=True)["input_ids"])
    whole = list(_render(tokenizer, conversation, origin)["input_ids"])
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        agree = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole)))
        raise UserError(
            f"{origin}: the answer cannot be told from the prompt",
            f"rendered alone the prompt has {len(prompt)} tokens, of which only the first {agree} begin the whole conversation: "
            f"{tokenizer.decode(prompt[agree : agree + 8])!r} became {tokenizer.decode(whole[agree : agree + 8])!r}",
            "add {% generation %} marks to the chat template of the tokenizer",
        )
    return Turn(prompt, _without_trailing_template(tokenizer, whole[len(prompt) :]))


def _without_trailing_template(tokenizer: Any, answer: list[int]) -> list[int]:
    """Drop white space behind the token that closes the turn (ChatML writes a line end there); marks exclude it as well."""
    special = set(tokenizer.all_special_ids)
    closing = max((i for i, token in enumerate(answer) if token in special), default=None)
    if closing is not None and not tokenizer.decode(answer[closing + 1 :]).strip():
        return answer[: closing + 1]
    return answer


def _render(tokenizer: Any, conversation: list[dict[str, str]], origin: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True, **options)
    except Exception as error:  # templates are programs of others: they raise what they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{origin}: the chat template refuses this conversation", reason) from error
