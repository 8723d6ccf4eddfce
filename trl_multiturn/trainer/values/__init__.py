"""What OREO and DQO share: the value model beside the policy, its settings, its forward pass and its metrics."""
