"""Pages and figures: they draw what evaluators hand over."""
