r"""What was observed of a target: a number, an interval, or nothing; and its likelihood under a mixture."""
