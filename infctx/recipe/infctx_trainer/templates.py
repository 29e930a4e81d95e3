"""How rows become documents in RWKV-infctx-trainer, as templates: one column, columns merged, conversations."""

import re
from collections.abc import Mapping
from typing import Any

from infctx.recipe.infctx_trainer.draft import Part, shown

_MERGED = ("multi_column_prefix", "multi_column_suffix", "multi_column_train_mask", "multi_column_separator")
_LABELS = {"System:": "system", "User:": "user", "Assistant:": "assistant", "Tool:": "tool"}
_DEFAULT_WEIGHTS = {"system": 0, "user": 0, "assistant": 1, "tool": 0}
_PAIR_FIELDS = {"system": "system", "user": "input", "assistant": "output"}
_LISTS = ("messages", "conversations", "conversation")
_SHAPES = (("role", "content"), ("from", "value"), ("sender", "message"))
_LABELS_REASON = "A chat has the labels System:, User:, Assistant: and Tool:, each after an empty line."


def translate_template(data: Part) -> None:
    """The first of what that trainer looks for: one column, a conversation, columns to merge, prompt and completion."""
    _warn_of_backslashes(data)
    mask = "disable_prompt_completion_mask"
    if data.get(mask) is False:
        data.no_effect(mask)
    column, keys = data.get("custom_text_key"), data.get("multi_column_keys")
    if isinstance(column, str) and column:
        data.to(
            "custom_text_key", {"data.fields": {"text": column}} if column != "text" else {}, text="data.fields: text"
        )
        _unused(data, "conversation_", "multi_column_", mask, reason="custom_text_key comes before it.")
        return
    if data.has("conversation_format"):
        _conversation(data)
        _unused(data, "multi_column_", mask, reason="conversation_format comes before it.")
        return
    _unused(data, "conversation_", reason="Not used there without conversation_format.")
    if isinstance(keys, list) and keys and all(isinstance(key, str) and key for key in keys):
        _merged_columns(data, keys)
        _unused(data, mask, reason="Columns are merged; their pieces say what is trained.")
        return
    if keys == []:
        data.no_effect("multi_column_keys")
    _unused(data, *_MERGED, reason="Not used there without multi_column_keys.")
    if data.get(mask) is True:
        ours = {"data.template": "completion", "data.weights": {"prompt": 1}}
        data.to(mask, ours, text="data.template: completion, data.weights: prompt 1")
    elif isinstance(data.get("source"), str) and data.get("source") != "text" and data.get("tokenizer") != "binidx":
        data.draft.note(
            "Nothing says which columns the rows have. That trainer looks into each row: instruction, input and "
            "output, then prompt and completion, then text. Here data.template is text; if rows have other columns, "
            "say so: completion, instruct, or pieces of your own."
        )


def _unused(data: Part, *prefixes: str, reason: str) -> None:
    for prefix in prefixes:
        for name in data.names(prefix):
            data.without(name, reason)


def _warn_of_backslashes(data: Part) -> None:
    for name in (*data.names("multi_column_"), *data.names("conversation_")):
        if any("\\n" in text for text in _texts(data.get(name))):
            data.draft.note(
                f"data.{name} holds a backslash and an n, as single quotes in YAML keep them: {shown(data.get(name))}. "
                'They were trained as these two characters, and are kept; if a new line was meant, write "\\n" in '
                "double quotes."
            )


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else []
    return [text for one in inner for text in _texts(one)]


# Columns merged


def _merged_columns(data: Part, keys: list[str]) -> None:
    """One piece for each column, with what stands before and after it, left out where the column is empty."""
    prefixes, suffixes = _list(data, "multi_column_prefix"), _list(data, "multi_column_suffix")
    trained, separator = _list(data, "multi_column_train_mask"), data.get("multi_column_separator")
    pieces: list[dict[str, object]] = []
    renamed: dict[str, str] = {}
    for place, key in enumerate(keys):
        column = key
        if set(key) & set("{}:!") or key != key.strip():
            column = f"column_{place + 1}"
            renamed[column] = key
        before = separator if place and isinstance(separator, str) else ""
        text = f"{_braced(before + _text_at(prefixes, place))}{{{column}}}{_braced(_text_at(suffixes, place))}"
        piece: dict[str, object] = {"text": text}
        if place >= len(trained) or trained[place] is not False:
            piece["train"] = True
        pieces.append({**piece, "when": column})
    ours: dict[str, object] = {"data.template": {"pieces": pieces}}
    if renamed:
        ours["data.fields"] = renamed
    data.to("multi_column_keys", ours)
    for name in _MERGED:
        if data.has(name):
            data.to(name, {}, text="data.template")
    data.draft.note(
        "Columns that are merged: their prefixes, suffixes and separators were trained there whatever "
        "multi_column_train_mask said; here they are trained like the column they stand at. A row with fewer than two "
        "of the columns was read as prompt and completion, or as text, there; here it is what it has. A row without "
        "the first column begins with the separator here."
    )


def _list(data: Part, name: str) -> list[Any]:
    value = data.get(name, [])
    return value if isinstance(value, list) else []


def _text_at(texts: list[Any], place: int) -> str:
    text = texts[place] if place < len(texts) else None
    return text if isinstance(text, str) else ""


def _braced(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


# Conversations


def _conversation(data: Part) -> None:
    kind, column = data.get("conversation_format"), data.get("conversation_key")
    if kind not in ("iopairs", "sender"):
        _unused(data, "conversation_", reason="Not a format of that trainer: it knows iopairs and sender.")
        return
    fields: dict[str, str] = {}
    if isinstance(column, str) and column:
        if column not in _LISTS:
            fields["conversation"] = column
        data.to("conversation_key", {}, text="the list of turns")
    weights = _iopairs(data, fields) if kind == "iopairs" else _sender(data, fields)
    changed = {role: weight for role, weight in weights.items() if weight != _DEFAULT_WEIGHTS[role]}
    more: dict[str, object] = {"data.fields": fields, "data.weights": changed}
    data.to("conversation_format", {"data.template": "chat", **{key: value for key, value in more.items() if value}})
    suffixes = data.get("conversation_sender_suffix")
    if any(_texts(suffixes)):
        data.without("conversation_sender_suffix", "A turn of a chat ends with an empty line.")
    else:
        data.no_effect("conversation_sender_suffix")
    data.without(
        "conversation_end_of_conversation",
        "A conversation closes with the end of text, which is trained after a turn that is.",
    )
    data.no_effect(*data.names("conversation_"))
    data.draft.note(
        "Chats: labels and the lines between turns were trained there whatever the masks said; here a turn is trained "
        "with the empty line that ends it, and labels never are."
    )


def _iopairs(data: Part, fields: dict[str, str]) -> dict[str, int]:
    """Turns as {input, output}."""
    name = "conversation_input_key_prefix_map"
    prefixes, mask = _map(data, name), _map(data, "conversation_input_key_mask")
    roles = {key: _role(prefix) for key, prefix in prefixes.items()}
    known = [role for role in roles.values() if role in _PAIR_FIELDS]
    if not roles or len(known) < len(roles) or len(set(known)) < len(known):
        data.without(name, f"{_LABELS_REASON} data.fields says which key is input and which is output.")
        data.without("conversation_input_key_mask", "data.weights says which roles are trained.")
        return {}
    fields.update({_PAIR_FIELDS[str(role)]: key for key, role in roles.items() if _PAIR_FIELDS[str(role)] != key})
    data.to(name, {}, text="data.template: chat")
    data.to("conversation_input_key_mask", {}, text="data.weights")
    return {str(role): _weight(mask, key) for key, role in roles.items()}


def _sender(data: Part, fields: dict[str, str]) -> dict[str, int]:
    """Turns as {sender, message}."""
    labels, mask = _map(data, "conversation_sender_value_map"), _map(data, "conversation_sender_mask")
    texts, sender = _map(data, "conversation_input_key_map"), data.get("conversation_sender_key")
    messages = [key for key, text in texts.items() if isinstance(text, str) and "{sender}" in text]
    if isinstance(sender, str) and sender and messages:
        if (sender, messages[0]) not in _SHAPES:
            fields.update({"sender": sender, "message": messages[0]})
        data.to("conversation_sender_key", {}, text="data.fields")
    roles: dict[str, str | None] = {}
    for value, label in labels.items():
        roles[value] = _role(str(texts[messages[0]]).replace("{sender}", str(label))) if messages else None
    weights = {
        role: [_weight(mask, value) for value, other in roles.items() if other == role] for role in roles.values()
    }
    if not roles or None in roles.values() or any(len(set(found)) > 1 for found in weights.values()):
        data.without("conversation_sender_value_map", f"{_LABELS_REASON} data.roles says which sender is which.")
        data.without("conversation_input_key_map", _LABELS_REASON)
        data.without(
            "conversation_sender_mask", "data.weights says which roles are trained, the same for all its senders."
        )
        return {}
    named = {value: role for value, role in roles.items() if value != role}
    data.to("conversation_sender_value_map", {"data.roles": named} if named else {}, text="data.roles")
    if len(texts) > 1:
        data.without(
            "conversation_input_key_map", f"A turn has one text, {shown(messages[0])} here; the others are left out."
        )
    else:
        data.to("conversation_input_key_map", {}, text="data.fields")
    data.to("conversation_sender_mask", {}, text="data.weights")
    return {str(role): found[0] for role, found in weights.items()}


def _map(data: Part, name: str) -> dict[str, Any]:
    value = data.get(name, {})
    return {str(key): inner for key, inner in value.items()} if isinstance(value, Mapping) else {}


def _role(prefix: object) -> str | None:
    """The role whose label a prefix is, with the empty line before it and the space after it or without."""
    match = re.fullmatch(r"\n*(\w+:) ?", prefix) if isinstance(prefix, str) else None
    return _LABELS.get(match[1]) if match else None


def _weight(mask: Mapping[str, Any], key: str) -> int:
    """What is not in a mask was trained there."""
    return 1 if mask.get(key, True) else 0
