"""How a policy's tool calls are read: in the format that its chat template prints.

A reader is chosen by round trip: what the template prints for calls is read, and the reader that gives back most of it
is taken. TRL's response templates, the format learned from the template itself, vLLM's parsers and functions of the
user's own pass the same door.
"""

from .choice import UnreadableTemplateError as UnreadableTemplateError, choose_reader as choose_reader
from .parsers import (
    ToolParserFunction as ToolParserFunction,
    ToolParserLike as ToolParserLike,
    resolve_tool_parser as resolve_tool_parser,
    vllm_parser_names as vllm_parser_names,
)
from .reading import (
    CallReader as CallReader,
    Reading as Reading,
    Sampled as Sampled,
    UnreadableCallError as UnreadableCallError,
)
from .round_trip import ReaderFit as ReaderFit
