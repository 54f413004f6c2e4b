"""What a trajectory must pass: 1 execution, 2 necessity, 3 judgement. Each maps a Record to an Outcome, or raises Waits."""
