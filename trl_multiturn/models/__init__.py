"""Models beside the policy: values per token and outcome or process rewards. Trainers load them."""
