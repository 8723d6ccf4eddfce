"""The one door through which messages and tools come in, whoever wrote them: they leave it in TRL's form.

Nothing here renders, and nothing here knows a chat template: [`normalize_messages`] and [`normalize_tools`] read the
forms that tools and providers write, and refuse by name what they cannot read, so that no word is lost in silence.
"""

from .calls import arguments_as_strings, read_call
from .conversation import REASONING, ROLES, Message, normalize_messages, without_reasoning
from .flags import without_flags
from .nulls import EXACT, NEVER, SET, Shape, field_shape
from .schemas import normalize_tools


__all__ = [
    "EXACT",
    "NEVER",
    "REASONING",
    "ROLES",
    "SET",
    "Message",
    "Shape",
    "arguments_as_strings",
    "field_shape",
    "normalize_messages",
    "normalize_tools",
    "read_call",
    "without_flags",
    "without_reasoning",
]
