"""Progress, timeline, values, stacks and failures of a run, as its user gets them."""
