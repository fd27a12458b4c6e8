"""How many tokens a text or a message takes, as an estimate."""

import orjson
from langchain_core.messages import AIMessage, AnyMessage

# There is no tokenizer here: it would have to be the model's own. Three bytes a token is on the safe side for prose,
# code and most scripts; where it is not, the server refuses and half as much is sent.
BYTES_PER_TOKEN = 3
TOKENS_PER_MESSAGE = 6


def count_text(text: str) -> int:
    return len(text.encode(errors="replace")) // BYTES_PER_TOKEN + 1


def count(message: AnyMessage) -> int:
    """About how many tokens a message takes."""
    tokens = TOKENS_PER_MESSAGE + count_text(message.text if isinstance(message.content, str) else str(message.content))
    if isinstance(message, AIMessage):
        for call in message.tool_calls:
            tokens += TOKENS_PER_MESSAGE + count_text(call["name"])
            tokens += len(orjson.dumps(call["args"], default=str)) // BYTES_PER_TOKEN
    return tokens
