"""Rows as other tools write them: what they are, and the same in the columns that the trainers read.

Reads one row at a time and renders nothing; messages go through `messages`.
"""

from .columns import CONVERSATIONS, SIDES, SYSTEM, TOOLS, conversation_column, listed, tools_column
from .images import (
    IMAGE_COLUMNS,
    PROMPT_IMAGES,
    SIDES_WITH_IMAGES,
    has_images,
    holds_image_parts,
    holds_own_images,
    images_of,
    place_images,
    sequence_images,
)
from .nested import NESTED, unfolded
from .recognition import FORMATS, Format, describe, recognize
from .rows import Shapes, begins_both_sides, columns_read, find_reward, find_tools, read_row
from .shapes import column_shapes, shape_of
from .token_logs import read_token_log
from .traces import is_trace, read_trace


__all__ = [
    "CONVERSATIONS",
    "FORMATS",
    "IMAGE_COLUMNS",
    "NESTED",
    "PROMPT_IMAGES",
    "Format",
    "SIDES",
    "SIDES_WITH_IMAGES",
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
    "has_images",
    "holds_image_parts",
    "holds_own_images",
    "images_of",
    "is_trace",
    "listed",
    "place_images",
    "read_row",
    "read_token_log",
    "read_trace",
    "recognize",
    "sequence_images",
    "shape_of",
    "tools_column",
    "unfolded",
]
