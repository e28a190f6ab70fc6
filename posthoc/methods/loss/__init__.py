"""Loss prediction: a small network beside the frozen one."""
