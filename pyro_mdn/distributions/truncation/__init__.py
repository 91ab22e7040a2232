"""Components given that they lie in an interval."""
