"""Setup, the loop, one step, schedules, train state."""
