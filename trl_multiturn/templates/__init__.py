"""Which tokens of a conversation the policy would have sampled, under any chat template.

The definition: an assistant turn's tokens run from the end of the generation prompt to the end-of-turn token, that
token included. Role headers, scaffolding that the generation prompt prints (an opened `<think>`), the newline after
the end-of-turn token, tool results and user turns are context.

Nothing here knows a model family and nothing searches for marker strings inside text, so text that imitates markers
cannot move a mask. What a template does is found by rendering: with one character changed, to see what ends a turn;
with one part of a message changed, to see whether it is shown; in TRL's original templates, to see whether one of its
training templates fits. Every span is checked against the renderings that the policy saw: of all before the turn, with
the generation prompt, and of the turn as the last one. Where a template renders a turn differently once more turns
follow (it strips their thinking), the next turn begins a token sequence of its own. A template that leaves a part of a
message out is refused with the part.
"""

from .turn_template import TurnTemplate as TurnTemplate
from .unproven import tokenize_unproven as tokenize_unproven
