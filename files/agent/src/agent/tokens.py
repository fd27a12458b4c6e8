"""How many tokens a text or a message takes, as an estimate."""

from typing import Any

import orjson
from langchain_core.messages import AIMessage, AnyMessage

# There is no tokenizer here: it would have to be the model's own. Three bytes a token is on the safe side for prose,
# code and most scripts; where it is not, the server refuses and half as much is sent.
BYTES_PER_TOKEN = 3
TOKENS_PER_MESSAGE = 6
# What an image of usual size takes in most models that see. Its bytes say nothing of it.
TOKENS_PER_IMAGE = 1500


def count_text(text: str) -> int:
    return len(text.encode(errors="replace")) // BYTES_PER_TOKEN + 1


def count(message: AnyMessage) -> int:
    """About how many tokens a message takes."""
    tokens = TOKENS_PER_MESSAGE + (count_text(message.text) if isinstance(message.content, str) else sum(map(_count_part, message.content)))
    if isinstance(message, AIMessage):
        for call in message.tool_calls:
            tokens += TOKENS_PER_MESSAGE + count_text(call["name"])
            tokens += len(orjson.dumps(call["args"], default=str)) // BYTES_PER_TOKEN
    return tokens


def _count_part(part: str | dict[Any, Any]) -> int:
    if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
        return TOKENS_PER_IMAGE
    return count_text(part if isinstance(part, str) else str(part.get("text", part)))
