# /// script
# dependencies = ["trl-multiturn[scienceworld]"]
# ///

"""
64 episodes of ScienceWorld with four Java machines (needs Java), by a model or by a wanderer who needs none.

```bash
python examples/scienceworld_rollouts.py                                        # the wanderer
python examples/scienceworld_rollouts.py HuggingFaceTB/SmolLM2-135M-Instruct    # a model
```
"""

import random
import sys
import time

from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_multiturn import EnvironmentPool, RolloutConfig, ScriptedEngine, TransformersEngine, generate_trajectories
from trl_multiturn.tools import ScienceWorldEnvironment, scienceworld_rows


PLACES = ("kitchen", "hallway", "outside", "greenhouse", "workshop", "bedroom", "living room")


def wander(prompt_text, sampling, session):
    place = random.Random(sampling.seed).choice(PLACES)
    return f"Action: {random.Random(sampling.seed + 1).choice(('go to ', 'open door to ', 'look at '))}{place}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
        engine = TransformersEngine(model, tokenizer)
    else:
        from embedded.tiny_policy import build_tokenizer

        engine = ScriptedEngine(wander, build_tokenizer([]))
    rows = scienceworld_rows(tasks=["find-living-thing", "find-plant"], variations_per_task=8)
    config = RolloutConfig(num_generations=4, dialect="action", max_tool_calling_iterations=10, max_turn_tokens=48)
    config.max_trajectory_tokens, config.tool_timeout_seconds = 16384, 120.0
    with EnvironmentPool(ScienceWorldEnvironment, max_environments=4) as pool:
        start = time.monotonic()
        trajectories = generate_trajectories(rows, engine, environment_factory=pool, config=config)
    rewards = [trajectory.reward for trajectory in trajectories if trajectory.reward is not None]
    print(f"{len(rewards)} of {len(trajectories)} episodes in {time.monotonic() - start:.0f} s,", end=" ")
    print(f"mean score {100 * sum(rewards) / len(rewards):.1f}")
