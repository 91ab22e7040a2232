"""Angles: circles on which outputs live, components wrapped around them, and what single angles are asked for."""
