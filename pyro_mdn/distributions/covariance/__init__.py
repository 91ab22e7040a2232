"""Covariance operators: each stores one factor and derives the rest."""
