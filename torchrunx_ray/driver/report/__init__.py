"""Progress, timeline, values, stacks and failures of a run, in the form that its user sees."""
