"""Rows as other tools write them: what they are, and the same in the columns that the trainers read.

Reads one row at a time and renders nothing; messages go through `messages`.
"""

from .columns import CONVERSATIONS, SIDES, SYSTEM, TOOLS, conversation_column, listed, tools_column
from .nested import NESTED, unfolded
from .recognition import FORMATS, Format, describe, recognize
from .rows import Shapes, begins_both_sides, columns_read, find_reward, find_tools, read_row
from .shapes import column_shapes, shape_of
from .token_logs import read_token_log


__all__ = [
    "CONVERSATIONS",
    "FORMATS",
    "NESTED",
    "Format",
    "SIDES",
    "SYSTEM",
    "Shapes",
    "TOOLS",
    "column_shapes",
    "begins_both_sides",
    "columns_read",
    "conversation_column",
    "describe",
    "find_reward",
    "find_tools",
    "listed",
    "read_row",
    "read_token_log",
    "recognize",
    "shape_of",
    "tools_column",
    "unfolded",
]
