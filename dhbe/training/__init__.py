"""How networks are trained: runtime, schedules, processes, compilation."""
