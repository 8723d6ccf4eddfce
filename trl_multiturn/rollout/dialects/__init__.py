"""How a policy writes a tool call, and how the answer reaches it: the text between two sampled turns.

A dialect reads one sampled turn (message, calls, whether it answers) and words the observations. What the policy wrote
badly is data: [`Turn.problem`] says what was wrong, in words for the policy. A dialect of your own offers what
[`Dialect`] describes; `RolloutConfig.dialect` takes its dotted path or the object.
"""

from .action import ActionDialect as ActionDialect
from .choice import DIALECTS as DIALECTS, choose_dialect as choose_dialect, resolve_dialect as resolve_dialect
from .dialect import Dialect as Dialect, DialectFactory as DialectFactory, Message as Message, Turn as Turn
from .fenced import FencedDialect as FencedDialect
from .hermes import HermesDialect as HermesDialect
from .native import NativeDialect as NativeDialect
